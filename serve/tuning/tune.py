"""LoRA kernels tuned for a GPU: made once by `loraport serve --tune`, kept, and used by every start after that.

vLLM's kernels have one set of tiles for all GPUs and shapes. It takes others from the folder that
VLLM_TUNED_CONFIG_FOLDER names; the search for them runs as a process of its own, before the engine takes the memory.
What is found holds for one GPU, one version of vLLM and of the kernels' shapes, so that is what the folder is named by.

    >>> subject = find_subject(launch.plan, shape, launch.device, "0.25.1")
    >>> subject.is_tuned(home), subject.folder(home).name
    (False, 'nvidia-h200-vllm0.25.1-5f0c2a91')
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import EngineError, UsageError, os_errors
from loraport.clients.hardware import Device
from loraport.clients.home import Home, write_json
from loraport.serve.engine.process import start_guarded
from loraport.serve.plan.settings import Plan
from loraport.serve.plan.shape import Shape
from loraport.serve.tuning.space import TOKENS, Group, groups

SEARCH = (sys.executable, "-m", "loraport.serve.tuning")
REPORT = "report.json"
LAST_LINES = 8
# Rows of the report for people: a batch that decodes, and one of prompts.
SHOWN = (64, 8192)


@dataclass(frozen=True)
class Subject:
    """What kernels are tuned for. `slots` as vLLM is told them."""

    gpu: str
    version: str
    groups: tuple[Group, ...]
    rank: int
    slots: int

    def folder(self, home: Home) -> Path:
        """Where its files are, or would be."""
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        shapes = json.dumps([[group.inner, group.outers] for group in self.groups])
        digest = hashlib.sha256(f"{shapes} {self.rank} {self.slots} {TOKENS}".encode()).hexdigest()[:8]
        return home.cache / "lora-kernels" / f"{gpu}-vllm{self.version}-{digest}"

    def is_tuned(self, home: Home) -> bool:
        """Whether the search has run to its end here."""
        return (self.folder(home) / REPORT).is_file()

    def gain(self, home: Home) -> str:
        """What tuning gave, in words: `5.2 to 3.1 us a call at 64 tokens, ...`."""
        calls = json.loads((self.folder(home) / REPORT).read_text(encoding="utf-8"))["calls"]
        found = []
        for tokens in SHOWN:
            own, ours = (sum(call[key] for call in calls if call["tokens"] == tokens) for key in ("own_us", "us"))
            if own:
                found.append(f"{1 - ours / own:.0%} less time at {tokens:,} tokens")
        return ", ".join(found)


def find_subject(plan: Plan, shape: Shape, device: Device, version: str) -> Subject | None:
    """What could be tuned; None where nothing can: without LoRA, on a CPU, or where no linear is of the usual kind."""
    if not plan.slots or device.kind != "cuda" or shape.latent:
        return None
    sizes = {"hidden": shape.hidden, "q": shape.heads * shape.head_dim, "kv": shape.kv_heads * shape.head_dim}
    found = groups(sizes | {"inner": shape.intermediate}, plan.targets, plan.tensor_parallel)
    if shape.experts > 1:  # experts have kernels of their own
        found = [group for group in found if group.name in ("qkv", "o")]
    return Subject(device.name, version, tuple(found), plan.rank, plan.slots) if found else None


def count_calls(subject: Subject) -> int:
    """Lines with results that a search tells: shrink and expand of each group and batch."""
    return 2 * len(TOKENS) * len(subject.groups)


def require_subject(subject: Subject | None, device: Device) -> None:
    """UsageError where `--tune` was asked for and there is nothing to tune."""
    if subject:
        return
    if device.kind != "cuda":
        raise UsageError("--tune makes LoRA kernels faster on GPUs, and there is none here.", "leave --tune away")
    raise UsageError("--tune is about LoRA kernels, and none are used.", "name an adapter, or leave --tune away")


def tune(subject: Subject, home: Home, environment: dict[str, str], tell: Callable[[dict[str, Any]], None]) -> None:
    """Search, which takes a minute or some, and keep what was found; EngineError where it cannot.

    `environment`: the engine's, so that the kernels that are compiled here are those that it finds in its cache.
    `tell`: called with each line of the search. What was begun and not ended leaves nothing.
    """
    folder = subject.folder(home)
    partial = home.ensure(folder.parent) / f".{folder.name}-{os.getpid()}"
    asked = {
        "groups": [[group.name, group.inner, group.outers] for group in subject.groups],
        "rank": subject.rank,
        "slots": subject.slots,
        "out": str(partial),
    }
    calls = []
    try:
        with os_errors("making", partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
        for line in run_search(asked, environment):
            tell(line)
            if "op" in line:
                calls.append(line)
        write_json(partial / REPORT, {"gpu": subject.gpu, "vllm": subject.version, "asked": asked, "calls": calls})
        with os_errors("writing", folder):
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run_search(asked: dict[str, Any], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Lines of the search as they come; EngineError with its last words where it fails.

    It runs under the engine's guard, so that none of its processes outlives us, however we end.
    """
    with os_errors("starting", Path(sys.executable), "end other programs, or look at ulimit -a"):
        process, pipe = start_guarded([*SEARCH, json.dumps(asked)], environment)
    assert process.stdout
    said: deque[str] = deque(maxlen=LAST_LINES)
    try:
        for text in process.stdout:
            try:
                line = json.loads(text)
            except ValueError:
                said.append(text.rstrip())
                continue
            if isinstance(line, dict):
                yield line
        if process.wait():
            hint = "is the GPU free, and is this vLLM's Python? Without --tune vLLM's own are used"
            raise EngineError("the search for LoRA kernels ended before its time.", hint, tuple(said))
    finally:
        os.close(pipe)
        process.wait()
        process.stdout.close()
