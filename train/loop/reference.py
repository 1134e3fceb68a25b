"""Log-probabilities of rows under the base, which DPO measures the adapter against: computed once, kept on disk.

Once before the training and not in each step: the base does not change, so every epoch but the first would compute the
same again, and a second run on the same rows (another beta, rate or rank) begins at once. A forward pass needs less
memory than a step. It runs in the ways of the training, with the adapter's B set to zero, which is the base to the bit
and leaves the joined matrices of the fused layers as they are: rounding then is the same on both sides of the
difference, and the first step begins at a margin of zero.

    >>> kept = Kept.of(rows, config, identity, ways)
    >>> reference_N2 = kept.read() if kept else None
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraport.train.config import ResolvedConfig
from loraport.train.data.store import Subset
from loraport.train.loop.fused import forget
from loraport.train.loop.lora import Device
from loraport.train.loop.packing import Rows
from loraport.train.loop.ways import Ways
from loraport.train.memory.machine import choose_types

MADE = 1  # raised when the same inputs would now give other figures


@dataclass(frozen=True)
class Kept:
    """The file with the log-probabilities of `count` rows: float32 (N, 2), preferred sequences first."""

    path: Path
    count: int

    @classmethod
    def of(cls, rows: Rows, config: ResolvedConfig, identity: dict[str, Any], ways: Ways) -> "Kept | None":
        """Beside the tokens of the rows, under a hash of all that decides; None where it is not known what does."""
        base = identity.get("the base")
        if not isinstance(rows, Subset) or base is None:
            return None
        device = Device.here()
        name = torch.cuda.get_device_name() if device.kind == "cuda" else "cpu"
        held = astuple(choose_types(config, device))
        installed = [version(each) for each in ("torch", "transformers")]
        parts = [MADE, base, held, config.double_quant, name, astuple(ways), installed]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode() + rows.indices.tobytes())
        return cls(rows.store.folder / f"reference-{digest.hexdigest()[:24]}.npy", len(rows))

    def read(self) -> torch.Tensor | None:
        """What is there; None where it is not, or damaged."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            found = np.load(self.path, allow_pickle=False)
            if found.shape == (self.count, 2) and found.dtype == np.float32 and np.isfinite(found).all():
                return torch.from_numpy(found)
        return None

    def write(self, reference_N2: torch.Tensor) -> None:
        """Keep it, in one step; a run does not need it to be kept."""
        partial = self.path.with_name(f".{self.path.stem}-{os.getpid()}.npy")
        with contextlib.suppress(OSError):
            try:
                np.save(partial, reference_N2.numpy(), allow_pickle=False)
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def as_base(model: Any) -> Iterator[None]:
    """While it lasts, the PeftModel `model` computes what its base does."""
    learned = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    before = [parameter.detach().clone() for parameter in learned]
    try:
        for parameter in learned:
            parameter.data.zero_()
        forget(model)
        yield
    finally:
        for parameter, value in zip(learned, before, strict=True):
            parameter.data.copy_(value)
        forget(model)
