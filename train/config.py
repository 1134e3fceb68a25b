"""The run configuration: one typed object for everything a training run depends on.

It comes from a YAML file with flags on top; unknown keys are refused; the resolved form is stored in the adapter's
manifest. Paths in a file are relative to that file.

    model: ../reader-9m
    data: train.jsonl
    preset: aggressive_r16_all
    epochs: 3
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loraport.clients.errors import ConfigError, os_errors

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
# name: (rank, alpha, target modules). The first four are those of a well-known tutorial series, by its names.
PRESETS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "minimal_r4_qv": (4, 8, ("q_proj", "v_proj")),
    "standard_r8_qkvo": (8, 16, ATTENTION),
    "aggressive_r16_all": (16, 32, ALL_LINEAR),
    "high_capacity_r32_all": (32, 64, ALL_LINEAR),
}
DEFAULT_PRESET = "aggressive_r16_all"


class RunConfig(BaseModel):
    """Everything a training run depends on. Field descriptions are the help text of the flags."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Base model: a folder, or an id on the model hub.")
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the hub.")
    data: Path = Field(description="Rows to train on: JSONL, one object with `messages` a line.")
    eval_data: Path | None = Field(None, description="Rows to evaluate on; default: a part of the training rows.")
    eval_fraction: float = Field(0.05, gt=0, lt=0.5, description="That part, where eval_data is not given.")
    eval_rows: int = Field(200, ge=1, description="Most rows that an evaluation looks at.")
    name: str = Field("adapter", description="Name of the adapter; a new training is a new version of it.")

    preset: str = Field(DEFAULT_PRESET, description="Rank, alpha and target modules by name.")
    rank: int = Field(0, ge=0, le=512, description="Rank of the adapter; 0: the preset's.")
    alpha: int = Field(0, ge=0, description="Scale of the adapter, applied as alpha / rank; 0: the preset's.")
    rslora: bool = Field(False, description="Apply the scale as alpha / sqrt(rank) instead: for high ranks.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before A; 0.1 is already high.")
    target_modules: tuple[str, ...] = Field((), description="Linear layers that get an adapter; empty: the preset's.")

    load: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = Field(
        "auto",
        description="How the base is held: auto is bf16 on a GPU (fp16 on one without it) and fp32 on a CPU; int8 is "
        "load_in_8bit, nf4 is load_in_4bit with bnb_4bit_quant_type nf4: both need a GPU.",
    )
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Type of the arithmetic (bnb_4bit_compute_dtype): bf16 or fp16, one of them."
    )
    double_quant: bool = Field(
        True, description="Quantise the scales of nf4 as well (bnb_4bit_use_double_quant): 0.4 bits a weight less."
    )
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = Field(
        "auto", description="auto is paged_adamw_8bit where the base is held in int8 or nf4, adamw elsewhere."
    )
    checkpointing: Literal["auto", "off", "half", "full", "offload"] = Field(
        "auto",
        description="Layers whose activations are computed again in the backward pass instead of kept: slower, less "
        "memory. auto: as few as the memory allows; offload: all, their inputs kept in host memory.",
    )
    gpu_memory: float | None = Field(None, gt=0, description="GiB of GPU memory to stay within; default: what is free.")
    sequence_length: int = Field(2048, ge=16, description="Longest row in tokens; longer rows are refused.")
    batch_size: int = Field(16, ge=1, description="Rows for each step of the optimiser, on all GPUs together.")
    micro_batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens on the device at once; decides about memory, not about the result. Default: what fits.",
    )
    epochs: float = Field(3, gt=0, description="Passes over the rows.")
    max_steps: int | None = Field(None, ge=1, description="Steps of the optimiser after which to end, whatever epochs.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Its way down from there.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which it rises from 0.")
    warmup_steps: int | None = Field(None, ge=0, description="The same as a number of steps; wins over the share.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations; default: once an epoch.")
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints; default: at each evaluation.")
    keep_checkpoints: int = Field(3, ge=1, description="Checkpoints kept while the run goes on, the best aside.")
    seed: int = Field(0, description="Of initialisation, order and dropout.")

    @model_validator(mode="before")
    @classmethod
    def fill_from_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Rank, alpha and targets that are not given come from the preset."""
        preset = values.get("preset", DEFAULT_PRESET)
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is not known; there are {', '.join(PRESETS)}")
        rank, alpha, targets = PRESETS[preset]
        filled = dict(values)
        filled["rank"] = values.get("rank") or rank
        if isinstance(filled["rank"], int):  # anything else is refused by its type
            filled["alpha"] = values.get("alpha") or alpha * filled["rank"] // rank
        filled["target_modules"] = tuple(values.get("target_modules") or targets)
        return filled

    @property
    def max_lora_rank(self) -> int:
        """The smallest --max-lora-rank that vLLM accepts and that holds this rank."""
        return next(allowed for allowed in VLLM_RANKS if allowed >= self.rank)

    def fingerprint(self, data_sha256: str, inputs: dict[str, str]) -> str:
        """Hash of all that decides the result: settings, data, and `inputs` such as the base; not where they lie."""
        settings = self.model_dump(mode="json", exclude=PLACES | {"name"} | MEMORY_ONLY)
        text = json.dumps([settings, data_sha256, inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


PLACES = {"model", "revision", "data", "eval_data"}  # where things lie: their content is hashed instead
MEMORY_ONLY = {"checkpointing", "gpu_memory", "micro_batch_tokens", "keep_checkpoints"}  # the result is the same
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank choices, 0.25 to 0.32


def load_config(path: Path | None, flags: dict[str, Any]) -> RunConfig:
    """The run configuration from a YAML file, if any, with `flags` (None: not given) on top.

    Raises ConfigError that names file and key.
    """
    values = read_yaml(path) if path else {}
    values |= {key: value for key, value in flags.items() if value is not None}
    missing = [key for key in ("model", "data") if key not in values]
    if missing and set(values) <= set(RunConfig.model_fields):  # else a misspelled key is the better explanation
        raise ConfigError(
            f"{' and '.join(missing)} must be given.", f"add --{missing[0]}, or a file with --config run.yaml"
        )
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain_invalid(error, str(path) if path else "the flags") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, its relative paths made absolute."""
    try:
        with os_errors("reading", path):
            if not path.is_file():
                raise ConfigError(f"there is no configuration file {path}.", "check the path after --config")
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.", "check the indentation") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values.", "see examples/demo/train.yaml")
    for key in ("data", "eval_data", "model"):
        value = values.get(key)
        if isinstance(value, str) and (key != "model" or value.startswith(".")):
            values[key] = str((path.parent / value).resolve())
    return values


def explain_invalid(error: ValidationError, where: str) -> ConfigError:
    """The first thing wrong with a configuration, in one sentence, with the good values as the hint."""
    from difflib import get_close_matches

    found = error.errors()
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = get_close_matches(key, RunConfig.model_fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(RunConfig.model_fields)}"
        return ConfigError(f"unknown key {key!r} in {where}.", hint)
    problem = first["msg"].removeprefix("Value error, ")
    value = f" (it is {first['input']!r})" if key else ""
    sentence = f"{key} in {where} is wrong: {problem}{value}." if key else f"{problem}."
    field = RunConfig.model_fields.get(key)
    return ConfigError(sentence, f"{key}: {field.description}" if field and field.description else "")
