"""`loraport.json`, the manifest beside an adapter's weights: what it was made from, what it needs, how it must answer.

Serving trusts nothing else: it checks the base against `base`, sizes its slots from `max_lora_rank`, and replays
`golden` after each load. No torch here.

    >>> Manifest.read(Path("~/.loraport/adapters/demo/v1").expanduser()).max_lora_rank
    16
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from loraport.clients.errors import AdapterError
from loraport.clients.home import write_json

FILE_NAME = "loraport.json"


class Part(BaseModel):
    """A piece of the manifest: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseIdentity(Part):
    """Which base an adapter belongs to. The hashes are SHA-256 in hexadecimal; see base_model.identify."""

    model: str  # hub id, or folder as given
    revision: str | None  # commit of the hub's repository
    path: str  # folder it was read from
    config_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    weights_sha256: str  # of sizes, headers and samples, not of every byte

    @property
    def hashes(self) -> dict[str, str]:
        """The hashes by the part of the base that they are of."""
        return {name.removesuffix("_sha256"): value for name, value in self if name.endswith("_sha256")}


class Reply(Part):
    """Greedy tokens T from one prompt, as PEFT computed them.

    `margins`: log-probability of each token minus that of the runner-up, in nats. Where it is small, another
    kernel's rounding may legitimately choose the runner-up.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    text: str
    stopped: bool  # the last token is one that generation stops on


class Golden(Part):
    """One prompt, as messages and as the tokens that training made of them, and the replies of adapter and base."""

    messages: list[dict[str, str]]
    prompt_tokens: list[int]
    adapter: Reply
    base: Reply


class DataCounts(Part):
    """What was trained on. Hashes are of the files' bytes."""

    files: list[str]
    sha256: str
    rows: int
    tokens: int
    trained_tokens: int
    eval_rows: int


class Manifest(Part):
    """All of `loraport.json`. `fingerprint` is of data, base and configuration: equal means nothing to train."""

    format: Literal[1] = 1
    name: str
    version: str
    created: str  # ISO 8601, UTC
    fingerprint: str
    step: int | None = None  # of the optimiser, where it is a checkpoint of a run and not its result
    base: BaseIdentity
    base_dtype: str  # as it was loaded in training: float32, bfloat16, nf4, ...
    rank: int
    alpha: float
    target_modules: list[str]
    trainable_parameters: int
    adapter_bytes: int  # of adapter_model.safetensors
    max_lora_rank: int  # the smallest --max-lora-rank of vLLM that holds this adapter
    stop_tokens: list[int]
    chat_template_kwargs: dict[str, bool]  # what the template must be given at inference to render as in training
    data: DataCounts
    run: dict[str, Any]  # the resolved run configuration
    metrics: dict[str, float]
    versions: dict[str, str]  # torch, transformers, peft, loraport
    golden: list[Golden]

    def write(self, folder: Path) -> None:
        """Write the manifest into an adapter folder."""
        write_json(folder / FILE_NAME, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of an adapter folder; AdapterError when it is missing or not one of ours."""
        path = folder / FILE_NAME
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise AdapterError(f"{folder} has no {FILE_NAME}.", "train it with `loraport train`") from error
        except (ValidationError, UnicodeDecodeError, OSError) as error:
            raise AdapterError(
                f"{path} cannot be read as a manifest of format 1: {str(error).splitlines()[0]}.",
                "it was changed by hand or written by another version of Loraport: train again",
            ) from error
