"""An adapter that PEFT saved elsewhere, without our manifest: opened as if it had one.

The manifest is made from adapter_config.json, the weight file and the base that the adapter is to be served on. It has
no golden replies, so the adapter stays unproven; that it is applied at all is seen on the engine (proof/applied.py).

    >>> open_foreign(Path("downloads/my lora"), base).manifest.name
    'my-lora'
"""

import hashlib
import re
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loraport.clients.errors import AdapterError
from loraport.serve.adapters import weights
from loraport.serve.adapters.accept import needed_rank, read_peft_config
from loraport.train.adapters import CONFIG, NAME, WEIGHTS, Adapter, check_name
from loraport.train.base_model import Base, hash_weights, identify, resolve
from loraport.train.manifest import DataCounts, Manifest

NOT_OURS = "unknown"  # the type that it was trained in, and so the tolerance is that of 16 bits
UNNAMED = re.compile(r"[^A-Za-z0-9._-]+")
HASH_DIGITS = 8


@dataclass(frozen=True)
class ForeignAdapter(Adapter):
    """An adapter whose manifest was made here: it says nothing of templates, stop tokens and replies."""


def open_foreign(folder: Path, base: Base, name: str | None = None) -> ForeignAdapter:
    """The adapter in `folder`, known to be servable (accept.check_servable), to be served on `base`.

    UsageError for a name that cannot be; AdapterError where the folder is not readable.
    """
    config = read_peft_config(folder)
    pairs = weights.read_pairs(folder)
    label = content_hash(folder)
    manifest = Manifest(
        name=check_name(name or name_of(folder)),
        version=label,
        created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime((folder / WEIGHTS).stat().st_mtime)),
        fingerprint=label,
        base=identify(base),
        base_dtype=NOT_OURS,
        rank=config["r"],
        alpha=config["lora_alpha"],
        target_modules=sorted({pair.suffix for pair in pairs}),
        trainable_parameters=sum(prod(shape) for pair in pairs for shape in (pair.a, pair.b) if shape),
        adapter_bytes=(folder / WEIGHTS).stat().st_size,
        max_lora_rank=needed_rank(config),
        stop_tokens=[],
        chat_template_kwargs={},
        data=DataCounts(files=[], sha256="", rows=0, tokens=0, trained_tokens=0, eval_rows=0),
        run={},
        metrics={},
        versions={},
        golden=[],
    )
    return ForeignAdapter(folder, manifest)


def name_of(folder: Path) -> str:
    """A valid name made of a folder's."""
    name = UNNAMED.sub("-", folder.absolute().name).strip("-._")[:64]
    return name if NAME.fullmatch(name) and name != "base" else "adapter"


def content_hash(folder: Path) -> str:
    """Eight hexadecimal digits that stand for weights and configuration: the version of a folder that has none."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes() + hash_weights([folder / WEIGHTS]).encode())
    return digest.hexdigest()[:HASH_DIGITS]


def recorded_base(folder: Path, config: dict[str, Any] | None = None) -> Base:
    """The base that adapter_config.json names, as a folder or from the hub; AdapterError where it names none."""
    named = (config or read_peft_config(folder)).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise AdapterError(f"{folder / CONFIG} does not say which base it belongs to.", "give the base with --model")
    return resolve(named)
