"""What a request for a job may say: OpenAI's fields and, under `loraport`, knobs of our own run configuration.

Types and bounds of our knobs stand in train/config.py alone: they are described and checked by it.

    >>> NewJob.model_validate({"model": "reader-9m", "training_file": "file-3f", "loraport": {"rank": 8}})
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator

from loraport.clients.errors import ConfigError
from loraport.serve.finetuning.guard import Strict
from loraport.serve.gateway.refusals import Refusal, bad_request
from loraport.serve.gateway.state import closest
from loraport.serve.jobs.recipe import name_of_setting
from loraport.train.config import RunConfig, check_require, explain_invalid

SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FLAG = re.compile(r"--([a-z][a-z-]*)")
PAIRS, KEY_LENGTH, VALUE_LENGTH = 16, 64, 512  # of metadata
MOST_SEED = (1 << 31) - 1
MOST_PRIORITY = 1000
MOST_GPUS = 1024  # where nobody knows how many there are
# Keys of the run configuration that a request may set: what the result is like and how it is measured, no path, no
# program, nothing that is written elsewhere.
KNOBS = (
    *("preset", "rank", "alpha", "rslora", "dropout", "target_modules", "load", "compute_dtype", "double_quant"),
    *("format", "sequence_length", "eval_fraction", "max_steps", "learning_rate", "scheduler", "warmup_ratio"),
    *("warmup_steps", "weight_decay", "max_grad_norm", "optimizer", "checkpointing", "gpu_memory", "gpus"),
    *("micro_batch_tokens", "eval_rows", "eval_steps", "save_steps", "checkpoint_adapters", "eval_prompts"),
    *("check", "require"),
)
QUEUED = {
    "priority": {
        "type": "integer",
        "minimum": -MOST_PRIORITY,
        "maximum": MOST_PRIORITY,
        "description": "The higher, the earlier; above 0 with an admin key.",
    },
    "may_share": {"type": "boolean", "description": "Whether the GPU may be shared with another job."},
}


def knobs_schema() -> dict[str, Any]:
    """The JSON schema of `loraport`, from the run configuration."""
    known = RunConfig.model_json_schema()["properties"]
    return {"type": "object", "additionalProperties": False, "properties": {key: known[key] for key in KNOBS} | QUEUED}


def auto_or_whole(value: Any) -> Any:
    """`auto`, or a whole number from 1."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31):
        return value
    raise ValueError('Input should be "auto" or a whole number, at least 1')


def auto_or_number(value: Any) -> Any:
    """`auto`, or a number above 0."""
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9):
        return value
    raise ValueError('Input should be "auto" or a number above 0')


def plain_suffix(value: str) -> str:
    """A suffix that can stand in a model's name."""
    if value and not SUFFIX.fullmatch(value):
        raise ValueError("Input should be up to 64 letters, digits, dots, dashes and _, the first a letter or digit")
    return value


def small(value: dict[str, str]) -> dict[str, str]:
    """Metadata within OpenAI's bounds."""
    if len(value) > PAIRS:
        raise ValueError(f"Input should be no more than {PAIRS} pairs")
    for key, text in value.items():
        if not 0 < len(key) <= KEY_LENGTH or len(text) > VALUE_LENGTH:
            raise ValueError(f"Input should be keys of 1 to {KEY_LENGTH} and values of up to {VALUE_LENGTH} characters")
    return value


AUTO: dict[str, Any] = {"const": "auto", "type": "string"}
Whole = Annotated[
    Any, BeforeValidator(auto_or_whole), WithJsonSchema({"anyOf": [AUTO, {"type": "integer", "minimum": 1}]})
]
Number = Annotated[
    Any,
    BeforeValidator(auto_or_number),
    WithJsonSchema({"anyOf": [AUTO, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9}]}),
]
Labels = Annotated[dict[str, str], AfterValidator(small), Field(json_schema_extra={"maxProperties": PAIRS})]
Suffix = Annotated[str, AfterValidator(plain_suffix), Field(json_schema_extra={"pattern": f"^({SUFFIX.pattern})?$"})]


class Hyperparameters(Strict):
    """`auto` is derived from rows and base by the trainer."""

    n_epochs: Whole = "auto"
    batch_size: Whole = "auto"
    learning_rate_multiplier: Number = "auto"


class DpoHyperparameters(Hyperparameters):
    """Those, and how far preferences may move the model."""

    beta: Number = "auto"


class Supervised(Strict):
    """Learn the answers of rows."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Strict):
    """Learn preferences between answers."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Strict):
    """How to train."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = None

    @model_validator(mode="after")
    def fits(self) -> "Method":
        """Refuse settings of another method than the one that is named."""
        for other in ("supervised", "dpo"):
            if other != self.type and getattr(self, other) is not None:
                raise ValueError(f"'{other}' is given, and the type is '{self.type}'")
        return self


class Wandb(Strict):
    """Where Weights & Biases is to keep the run; with the endpoint's own key, or on its disk."""

    project: str = Field(min_length=1, max_length=128)
    name: str | None = Field(None, max_length=128)
    entity: str | None = Field(None, max_length=128)
    tags: list[Annotated[str, Field(max_length=64, pattern="^[^,]*$")]] | None = Field(None, max_length=20)


class Integration(Strict):
    """Where else a job is recorded."""

    type: Literal["wandb"]
    wandb: Wandb


class NewJob(Strict):
    """A job to be made."""

    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(min_length=1, max_length=64)
    validation_file: str | None = Field(None, min_length=1, max_length=64)
    suffix: Suffix | None = None
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    metadata: Labels | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, json_schema_extra={"deprecated": True})
    integrations: list[Integration] | None = Field(None, max_length=1)
    loraport: Annotated[dict[str, Any], WithJsonSchema(knobs_schema())] | None = None


def method_of(body: NewJob) -> dict[str, Any]:
    """The method, with what was left open as `auto`; the deprecated form of it, too."""
    method, old = body.method, body.hyperparameters
    if method is not None and method.type == "reinforcement":
        message = "Reinforcement fine-tuning is not offered here: this endpoint trains by 'supervised' and by 'dpo'."
        raise bad_request("unsupported_method", message, "method.type")
    if method is not None and old is not None:
        message = "'hyperparameters' is the old form of those in 'method': give one of the two."
        raise bad_request("invalid_value", message, "hyperparameters")
    if method is not None and method.type == "dpo":
        return {"type": "dpo", "dpo": (method.dpo or Dpo()).model_dump()}
    said = method.supervised if method else Supervised(hyperparameters=old or Hyperparameters())
    return {"type": "supervised", "supervised": (said or Supervised()).model_dump()}


def options_of(body: NewJob, is_admin: bool, gpus: int | None) -> dict[str, Any]:
    """Our knobs as they were given. Refusal for one that is none, or more than this key or machine has."""
    options = dict(body.loraport or {})
    unknown = next((key for key in options if key not in KNOBS and key not in QUEUED), None)
    if unknown is not None:
        name, near = f"loraport.{unknown[:64]}", closest(unknown, (*KNOBS, *QUEUED))
        meant = f"Did you mean '{near}'?" if near else f"There are {', '.join((*KNOBS, *QUEUED))}."
        raise bad_request("unknown_parameter", f"Unknown parameter: '{name}'. {meant}", name)
    priority, may_share = options.get("priority", 0), options.get("may_share", False)
    if type(priority) is not int or abs(priority) > MOST_PRIORITY or type(may_share) is not bool:
        name = "loraport.may_share" if type(may_share) is not bool else "loraport.priority"
        words = "true or false" if type(may_share) is not bool else f"a whole number, at most {MOST_PRIORITY}"
        raise bad_request("invalid_value", f"Invalid value for '{name}': it should be {words}.", name)
    if priority > 0 and not is_admin:
        message = "A priority above 0 needs an admin key."
        raise Refusal(403, "admin_only", message, param="loraport.priority")
    wanted = options.get("gpus")
    most = MOST_GPUS if gpus is None else max(1, gpus)
    if isinstance(wanted, int) and wanted > most:
        message = f"A job can have {most:,} GPU{'s' if most > 1 else ''} here at most."
        raise bad_request("too_many_gpus", message, "loraport.gpus")
    check = options.get("check")
    if check is not None and not (isinstance(check, str) and check.startswith("regex:")):
        message = "Of a request, a check can be 'regex:EXPRESSION' alone: files and programs are the endpoint's own."
        raise bad_request("invalid_value", message, "loraport.check")
    return options


def check_config(values: dict[str, Any]) -> RunConfig:
    """The run configuration of a job; Refusal 400 where it cannot be, by the name that its client used."""
    try:
        config = RunConfig.model_validate(values)
        check_require(config.require)
        re.compile((config.check or "").removeprefix("regex:"))
        return config
    except ConfigError as error:
        message = f"Invalid value for 'loraport.require': {error.message.replace('--require ', '', 1)} {error.hint}"
        raise bad_request("invalid_value", message, "loraport.require") from None
    except (re.error, OverflowError, RecursionError) as error:
        message = f"Invalid value for 'loraport.check': it is no regular expression ({error})."
        raise bad_request("invalid_value", message, "loraport.check") from None
    except ValidationError as error:
        found = explain_invalid(error, "the request")
        if found.param:
            param = name_of_setting(found.param)
            message = found.message.replace(f"{found.param} in the request", f"'{param}'", 1)
            raise bad_request("invalid_value", f"{message[:500]} {found.hint[:500]}", param) from None
        message = FLAG.sub(lambda flag: f"'{name_of_setting(flag[1].replace('-', '_'))}'", found.message)
        raise bad_request("invalid_value", message[:500], "loraport") from None
