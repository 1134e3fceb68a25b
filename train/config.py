"""The run configuration: one typed object for everything a training run depends on.

It comes from a YAML file with flags on top; unknown keys are refused. What is not given is derived from data and model
(train/defaults.py), and that resolved form is stored in the adapter's manifest. Paths in a file are relative to it.
Field descriptions are the one place where knobs are explained: `loraport train --help`, docs/configuration.md and the
schema for editors are made from them (train/reference.py).

    model: ../reader-9m
    data: train.jsonl
    preset: aggressive_r16_all
    epochs: 3
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loraport.clients.errors import ConfigError, os_errors
from loraport.clients.rows import looks_like_hub_id
from loraport.train.presets import ALL_LINEAR, DEFAULT_PRESET, PRESETS


class RunConfig(BaseModel):
    """Everything a training run depends on. A field that is None here is derived: see ResolvedConfig."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Base model: a folder, or an id on the model hub.")
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the hub.")
    load: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = Field(
        "auto",
        description="How the base is held: auto is bf16 on a GPU (fp16 on one without it) and fp32 on a CPU; int8 is "
        "load_in_8bit, nf4 is load_in_4bit with bnb_4bit_quant_type nf4 (QLoRA): both need a GPU.",
    )
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Type of the arithmetic (bnb_4bit_compute_dtype) where the base is held in int8 or nf4; else it "
        "computes in the type it is held in.",
    )
    double_quant: bool = Field(
        True, description="Quantise the scales of nf4 as well (bnb_4bit_use_double_quant): 0.4 bits a weight less."
    )

    data: Path = Field(
        description="Rows to train on: a file (JSONL, JSON, Parquet, CSV, text; .gz of them), a folder of such files, "
        "or a data set on the model hub (org/name, org/name:split)."
    )
    eval_data: Path | None = Field(None, description="Rows to evaluate on; default: a part of the training rows.")
    format: Literal["auto", "preference", "chat", "sharegpt", "alpaca", "prompt", "text"] = Field(
        "auto",
        description="What a row is: preference (`input`, `preferred_output`, `non_preferred_output`, or `prompt`, "
        "`chosen`, `rejected`), chat (`messages`, `tools`), sharegpt (`conversations`), alpaca (`instruction`, "
        "`input`, `output`), prompt (`prompt`, `completion`) or text (documents, trained whole). auto: by the keys of "
        "the first rows of a file.",
    )
    eval_fraction: float = Field(0.05, gt=0, lt=0.5, description="That part, where eval_data is not given.")
    sequence_length: int | None = Field(
        None, ge=16, description="Longest row in tokens; longer rows are refused. Default: as long as the longest is."
    )

    name: str = Field("adapter", description="Name of the adapter; a new training is a new version of it.")
    preset: str = Field(DEFAULT_PRESET, description="Rank, alpha, dropout and target modules by name.")
    rank: int | None = Field(
        None, ge=1, le=512, description="Rank of the adapter: its capacity. Default: the preset's, or by the data."
    )
    alpha: int | None = Field(
        None, ge=1, description="Scale of the adapter, applied as alpha / rank. Default: the preset's, often 2 × rank."
    )
    rslora: bool = Field(
        False, description="Apply the scale as alpha / sqrt(rank) instead: for high ranks. Default: the preset's."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter's input; 0.1 is already high. Default: the preset's."
    )
    target_modules: tuple[str, ...] = Field(
        (),
        description="Linear layers that get an adapter: all-linear, which is every one but the head, or names such as "
        "q_proj, one for each flag. Default: the preset's.",
    )

    method: Literal["sft", "dpo"] = Field(
        "sft",
        description="What is learnt: sft, what the rows say; dpo (direct preference optimisation), which of the two "
        "replies in a row is preferred, measured against the base.",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="Of dpo: how dear it is to leave the base; lower strays further from it. Default: 0.1.",
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="Passes over the rows; too many overfit. Default: 1 for thousands of rows, more for few.",
    )
    max_steps: int | None = Field(None, ge=1, description="Steps of the optimiser after which to end, whatever epochs.")
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Rows for each step of the optimiser, on all GPUs together; gradient accumulation follows from it. "
        "Default: by rows.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate; about ten times that of full fine-tuning. Default: by the model's width, and "
        "lower for dpo.",
    )
    learning_rate_multiplier: float | None = Field(
        None, gt=0, description="Multiplies that default, where learning_rate is not given. Default: 1."
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Its way down from there.")
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="Share of the steps in which it rises from 0. Default: 0.05, at most 20 steps."
    )
    warmup_steps: int | None = Field(None, ge=0, description="The same as a number of steps; one of the two.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = Field(
        "auto",
        description="auto is paged_adamw_8bit for more than 64M parameters on a base in int8 or nf4, else adamw.",
    )
    seed: int = Field(0, description="Of initialisation, order and dropout.")

    checkpointing: Literal["auto", "off", "half", "full", "offload"] = Field(
        "auto",
        description="Layers whose activations are computed again in the backward pass instead of kept: slower, less "
        "memory. auto: as few as the memory allows; offload: all, their inputs kept in host memory.",
    )
    gpu_memory: float | None = Field(None, gt=0, description="GiB of GPU memory to stay within; default: what is free.")
    gpus: int | None = Field(
        None, ge=1, description="GPUs to train on, a part of each step's rows on each. Default: all."
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens on the device at once, at least a row; decides about memory, not about the result. "
        "Default: what fits.",
    )

    eval_rows: int = Field(200, ge=1, description="Most rows that an evaluation looks at.")
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations. Default: each epoch, more often in long ones."
    )
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints; default: at each evaluation.")
    keep_checkpoints: int = Field(3, ge=1, description="Checkpoints kept while the run goes on, the best aside.")
    checkpoint_adapters: int = Field(
        0,
        ge=0,
        description="The newest so many checkpoints before the last step become adapters of their own when the run is "
        "done, NAME.step-40 and so on; keep_checkpoints is raised to hold them.",
    )
    eval_prompts: int = Field(
        20, ge=1, description="Held-out prompts that adapter and base answer after training, for scores and samples."
    )
    check: str | None = Field(
        None,
        description="When such a reply is a success: regex:EXPRESSION is found in it, json-schema:FILE accepts it, or "
        "python:FILE.py:FUNCTION, called with reply and row, says so. Default: it is the reference.",
    )
    require: tuple[str, ...] = Field(
        (),
        description="What the result must reach, as 'success>=0.9' or 'stop_rate=1', several times: exit code 4 where "
        "it does not. Default: nothing.",
    )
    track: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = Field(
        (),
        description="Also record the run with mlflow, wandb or tensorboard, on this machine unless their own variables "
        "name a server. Default: none.",
    )

    @model_validator(mode="before")
    @classmethod
    def fill_from_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What the adapter is like and is not given comes from the preset; alpha follows a rank of one's own."""
        name = values.get("preset", DEFAULT_PRESET)
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; there are {', '.join(PRESETS)}")
        preset = PRESETS[name]
        filled = dict(values)
        for field in ("rank", "dropout", "rslora", "target_modules"):
            if filled.get(field) in (None, (), []):
                filled[field] = getattr(preset, field)
        if isinstance(filled["rank"], int) and filled.get("alpha") is None:  # another type is refused as such
            filled["alpha"] = preset.alpha_for(filled["rank"], filled["rslora"] is True)
        return filled

    @model_validator(mode="after")
    def check_together(self) -> Self:
        """Refuse settings that contradict each other, by the names of their flags."""
        if self.load not in ("auto", "int8", "nf4") and self.compute_dtype not in ("auto", self.load):
            raise ValueError(
                f"--load {self.load} and --compute-dtype {self.compute_dtype}: one of them, because a base computes in "
                f"the type it is held in unless that is int8 or nf4"
            )
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            raise ValueError(f"--target-modules {ALL_LINEAR} stands alone: it is all of them")
        if self.beta is not None and self.method != "dpo":
            raise ValueError("--beta goes with --method dpo: there is nothing that it would weigh in sft")
        if self.learning_rate is not None and self.learning_rate_multiplier is not None:
            raise ValueError("--learning-rate and --learning-rate-multiplier: one of them")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("--warmup-ratio and --warmup-steps: one of them")
        if self.eval_data and self.eval_fraction != RunConfig.model_fields["eval_fraction"].default:
            raise ValueError("--eval-data and --eval-fraction: one of them")
        if self.save_steps and self.eval_steps and self.save_steps % self.eval_steps:
            raise ValueError(
                f"--save-steps {self.save_steps} must be a multiple of --eval-steps {self.eval_steps}: a checkpoint "
                f"is kept by its evaluation"
            )
        return self

    @property
    def sequences(self) -> int:
        """Sequences that a row is tokenised to, each with a length up to `sequence_length`."""
        return 2 if self.method == "dpo" else 1

    @property
    def kept_checkpoints(self) -> int:
        """Checkpoints kept while the run goes on: of those that become adapters, the last and the best are none."""
        return max(self.keep_checkpoints, self.checkpoint_adapters + 2 if self.checkpoint_adapters else 0)

    def fingerprint(self, data_sha256: str, inputs: dict[str, str]) -> str:
        """Hash of all that decides the result: settings, data, and `inputs` such as the base; not where they lie.

        Of the configuration as given, before it is resolved: what is derived follows from data and base, which are
        in the hash, so that "nothing to do" is known before a row is read. Whoever changes a rule in
        train/defaults.py raises RECIPE in train/run.py.
        """
        settings = self.model_dump(mode="json", exclude=PLACES | {"name"} | MEMORY_ONLY | REPORTED)
        text = json.dumps([settings, data_sha256, inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class ResolvedConfig(RunConfig):
    """A run configuration in which all that decides the result is a value. Made by train/defaults.py."""

    sequence_length: int
    rank: int
    alpha: int
    epochs: float
    batch_size: int
    learning_rate: float
    warmup_steps: int
    eval_steps: int
    save_steps: int

    @property
    def max_lora_rank(self) -> int:
        """The smallest --max-lora-rank that vLLM accepts and that holds this rank."""
        return next(allowed for allowed in VLLM_RANKS if allowed >= self.rank)


# The first field of each section; the fields between two of them belong to the former.
SECTIONS = {
    "model": "Base",
    "data": "Data",
    "name": "Adapter",
    "method": "Optimisation",
    "checkpointing": "Memory (the result is the same)",
    "eval_rows": "Evaluation and checkpoints",
    "eval_prompts": "Proof and tracking",
}
PLACES = {"model", "revision", "data", "eval_data", "check"}  # where things lie: their content is hashed instead
REPORTED = {"require", "track", "checkpoint_adapters"}  # what is said of the result and where, and stored beside it
MEMORY_ONLY = {
    "checkpointing",
    "gpu_memory",
    "gpus",
    "micro_batch_tokens",
    "keep_checkpoints",
}  # the result is the same
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank choices, 0.25 to 0.32


def section_of(name: str) -> str:
    """The section that a field of the run configuration belongs to."""
    before = list(RunConfig.model_fields)[: list(RunConfig.model_fields).index(name) + 1]
    return next(SECTIONS[field] for field in reversed(before) if field in SECTIONS)


def explain(name: str) -> str:
    """What a field means, its default and, of the preset, its choices: the words of --help and of the docs."""
    field = RunConfig.model_fields[name]
    words = field.description or ""
    if name == "preset":
        words += " " + "; ".join(f"{preset}: {PRESETS[preset].meaning}" for preset in PRESETS) + "."
    if field.is_required() or field.default is None or "efault:" in words:
        return words
    return f"{words} [default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}]"


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
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}{where} is not YAML: {problem}.", "check the indentation") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values.", "see examples/demo/train.yaml")
    for key in ("data", "eval_data", "model"):
        value = values.get(key)
        if isinstance(value, str) and (value.startswith(".") if key == "model" else is_path(value, path.parent)):
            values[key] = str((path.parent / value).resolve())
    kind, _, file = str(values.get("check") or "").partition(":")
    if kind in ("json-schema", "python") and file:
        values["check"] = f"{kind}:{(path.parent / file).resolve()}"
    return values


def is_path(data: str, folder: Path) -> bool:
    """Whether `data` is a path, seen from `folder`, and no data set on the hub."""
    return (folder / data).exists() or not looks_like_hub_id(data)


def explain_invalid(error: ValidationError, where: str) -> ConfigError:
    """The first thing wrong with a configuration, in one sentence, with the good values as the hint."""
    from difflib import get_close_matches

    found = error.errors()
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    key = str(first["loc"][0]) if first["loc"] else ""  # of a list the whole, not the place in it
    if first["type"] == "extra_forbidden":
        near = get_close_matches(key, RunConfig.model_fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(RunConfig.model_fields)}"
        return at_fault(key, ConfigError(f"unknown key {key!r} in {where}.", hint))
    problem = first["msg"].removeprefix("Value error, ")
    value = f" (it is {first['input']!r})" if key else ""
    sentence = f"{key} in {where} is wrong: {problem}{value}." if key else f"{problem}."
    field = RunConfig.model_fields.get(key)
    hint = f"{key}: {field.description}" if field and field.description else "`loraport train --help` explains each"
    return at_fault(key, ConfigError(sentence, hint))


def check_require(texts: Sequence[str]) -> None:
    """ConfigError for a requirement that cannot be judged; for who writes a configuration for another process."""
    from loraport.train.proof.gate import parse_requirements

    parse_requirements(texts)


def at_fault(key: str, error: ConfigError) -> ConfigError:
    """`error` with the name of the setting at fault, if it is one alone."""
    error.param = key or None
    return error
