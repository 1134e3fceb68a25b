"""What a check needs, out of a run configuration and flags: the rows' files, the base's tokenizer, the limits.

The same configuration as for training, so that what is checked is what will be trained. No weights are downloaded.

    >>> read_inputs(Path("examples/demo/train.yaml")).source.name
    'examples/demo/train.jsonl'
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import UsageError
from loraport.clients.rows import FORMATS, Source, find_source
from loraport.train.base_model import read_json, resolve_tokenizer
from loraport.train.config import RunConfig, load_config
from loraport.train.data.check import Limits
from loraport.train.data.tokens import Encoder
from loraport.train.defaults import RANKS, Facts

LENGTH_UNKNOWN = 2048  # where neither the user nor the model names a limit


@dataclass(frozen=True)
class Inputs:
    """Sources, their format, the encoder, the limits that rows must keep, and the method that they are for."""

    source: Source
    eval_source: Source | None
    format: str
    encoder: Encoder
    limits: Limits
    method: str


def read_inputs(config: Path | None, **flags: Any) -> Inputs:
    """Everything a check needs. Where neither a file nor a flag says a method, it is auto: what the rows are for.

    Raises ConfigError or UsageError for wrong settings and missing files, BaseModelError for an unusable base.
    """
    format = flags.pop("format", None)
    if "format" in RunConfig.model_fields:
        flags["format"] = format
    resolved = load_config(config, flags)
    method = resolved.method if config or flags.get("method") else "auto"
    format = getattr(resolved, "format", None) or format or "auto"
    if format not in ("auto", *FORMATS):
        raise UsageError(f"there is no format {format!r}.", f"formats are auto, {', '.join(FORMATS)}")
    source = find_source(str(resolved.data))
    eval_source = find_source(str(resolved.eval_data)) if resolved.eval_data else None
    base = resolve_tokenizer(resolved.model, resolved.revision)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    settings = read_json(base.folder / "config.json") if (base.folder / "config.json").is_file() else {}
    facts = Facts.of_base(settings)
    length = resolved.sequence_length or facts.max_positions or LENGTH_UNKNOWN
    limits = Limits(length, capacity_of(resolved, facts))
    return Inputs(source, eval_source, format, Encoder.load(base.folder), limits, method)


def capacity_of(config: RunConfig, facts: Facts) -> int | None:
    """Parameters of the adapter on all linear layers; None where it is on some of them, or the base does not tell.

    Without a rank it is the largest that the data may choose.
    """
    if not facts.width or len(config.target_modules) in range(2, 7):
        return None
    return (config.rank or RANKS[-1]) * facts.width
