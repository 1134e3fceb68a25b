"""A run configuration as a request for a job: what OpenAI's API has words for in those, the rest under `loraport`.

>>> wish = Wish.of(Path("run.yaml"), {"epochs": 2}, {})
>>> submit(client, wish, print).id
'ftjob-9f86d081884c7d659a2feaa0'
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loraport.clients.endpoint import KEY_VARIABLES, EndpointRecord, api_key
from loraport.clients.errors import ConfigError, EndpointError, UsageError
from loraport.clients.models import list_models
from loraport.train.config import read_yaml

if TYPE_CHECKING:
    from openai import OpenAI

# Keys of the run configuration that OpenAI's API has words for.
HYPERPARAMETERS = {
    "epochs": "n_epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
}
FOR_DPO = HYPERPARAMETERS | {"beta": "beta"}
NAMED = {"data", "eval_data", "model", "name", "seed", "method"}


@dataclass(frozen=True)
class Wish:
    """What is asked for: keys of the run configuration with their values, and labels."""

    values: Mapping[str, Any]
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Path | None, given: Mapping[str, Any], labels: Mapping[str, str]) -> "Wish":
        """A file with what was given on top; ConfigError without rows, UsageError for rows that are no file."""
        values = read_yaml(config) if config else {}
        values |= {key: value for key, value in given.items() if value is not None and value != []}
        if not values.get("data"):
            raise ConfigError("there are no rows to train on.", "name a JSONL file, or give --config with `data`")
        for key in ("data", "eval_data"):
            if values.get(key) and not Path(values[key]).is_file():
                raise UsageError(
                    f"there is no file {values[key]}.", "a job trains on one JSONL file, which is uploaded"
                )
        return cls(values, labels)

    @property
    def body(self) -> dict[str, Any]:
        """The request without model and files, as keyword arguments of the client."""
        kind = str(self.values.get("method") or "supervised")
        words = FOR_DPO if kind == "dpo" else HYPERPARAMETERS
        said = {words[key]: whole(value) for key, value in self.values.items() if key in words and value is not None}
        made: dict[str, Any] = {"method": {"type": kind, kind: {"hyperparameters": said}}}
        for ours, theirs in (("name", "suffix"), ("seed", "seed")):
            if self.values.get(ours) is not None:
                made[theirs] = self.values[ours]
        if self.labels:
            made["metadata"] = dict(self.labels)
        rest = {key: value for key, value in self.values.items() if key not in NAMED | words.keys()}
        return made | ({"extra_body": {"loraport": plain(rest)}} if rest else {})


def whole(value: Any) -> Any:
    """1 of 1.0: OpenAI's API counts whole epochs."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON types."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def settings_of(words: list[str]) -> dict[str, Any]:
    """KEY=VALUE of --set, each value as in a YAML file."""
    try:
        return {key.replace("-", "_"): yaml.safe_load(value) for key, value in pairs_of("--set", words).items()}
    except yaml.YAMLError as error:
        raise UsageError(
            "--set has a value that is no YAML.", "for example --set target_modules=[q_proj,v_proj]"
        ) from error


def pairs_of(flag: str, words: list[str]) -> dict[str, str]:
    """KEY=VALUE of a flag; UsageError for what is none."""
    for word in words:
        if not word.partition("=")[0] or "=" not in word:
            raise UsageError(f"{flag} {word} is no KEY=VALUE.", f"for example {flag} team=docs")
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def submit(client: "OpenAI", wish: Wish, tell: Callable[[str], None]) -> Any:
    """Upload the rows and create the job; what was uploaded is removed again where that is refused."""
    model = choose_model(client, str(wish.values.get("model") or ""))
    uploaded: list[str] = []
    try:
        for key in ("data", "eval_data"):
            if wish.values.get(key):
                uploaded.append(upload(client, Path(wish.values[key]), tell))
        files: dict[str, Any] = dict(zip(("training_file", "validation_file"), uploaded, strict=False))
        return client.fine_tuning.jobs.create(model=model, **files, **wish.body)
    except BaseException:
        with suppress(Exception):
            for file_id in uploaded:
                client.files.delete(file_id)
        raise


def upload(client: "OpenAI", path: Path, tell: Callable[[str], None]) -> str:
    """The id of a file that is sent."""
    tell(f"uploading {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    with path.open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune").id


def choose_model(client: "OpenAI", wanted: str) -> str:
    """The name of the base as the endpoint knows it: a folder of that name is it, nothing means the one it serves."""
    bases: list[str] = []
    with suppress(EndpointError):  # an engine that has left for a training says nothing; the API knows its base
        bases = [name for card in list_models(client) if card.parent is None for name in (card.id, card.root) if name]
    short = wanted.rstrip("/").rpartition("/")[2]
    known = next((name for name in (wanted, short) if name in bases), None)
    return known or (wanted if bases else short) or next((name for name in bases if name != "base"), "base")


def key_for(record: EndpointRecord | None) -> str:
    """The key that is sent: of LORAPORT_API_KEY, else the owner's on this machine, else of OPENAI_API_KEY."""
    if not os.environ.get(KEY_VARIABLES[0], "").strip() and record and record.admin_key:
        return record.admin_key
    return api_key()
