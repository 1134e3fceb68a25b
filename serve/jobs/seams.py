"""What the queue knows of its neighbours: who runs a trainer, who serves, who takes over what was trained.

The queue and the API do not know which of them is there: trainers run on this machine (local.py) or on a cluster
(on_ray.py), the endpoint may have engines or none.

>>> class Nobody:                                  # a queue that serves nothing
...     gpus = frozenset[int]()
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loraport.serve.store.tables import Job


@dataclass(frozen=True)
class Share:
    """What a job may use: GPUs of a node by number (none on a CPU), and bytes of each; None: all of it.

    `node`: as the pool names it; empty where there is only this machine. Who writes the trainer's configuration says
    `gpu_memory` in it where there are bytes, so that it stays within them.
    """

    gpus: tuple[int, ...] = ()
    gpu_bytes: int | None = None
    node: str = ""


@dataclass(frozen=True)
class Task:
    """A trainer to be run: a command in a folder of its own, where all that it says goes.

    The folder gets progress.jsonl (of `loraport train --progress`), result.json (standard output), train.log (standard
    error), process.json (process id and start time) and exit.json (how it ended).
    """

    job_id: str
    attempt: int
    folder: Path
    command: Sequence[str]
    environment: Mapping[str, str]
    share: Share


@dataclass(frozen=True)
class Exit:
    """How a trainer ended: its exit code, 128 + n where a signal ended it; None where nobody saw it."""

    code: int | None


class Runner(Protocol):
    """Who runs trainers. A task is known by its job: there is never more than one trainer of a job."""

    def start(self, task: Task) -> None:
        """Run it. ResourceError where that cannot be; nothing where that very attempt runs or ran already."""

    def is_running(self, job_id: str) -> bool:
        """Whether any process of the job's trainer lives, also one that an earlier server started."""

    def outcome(self, job_id: str) -> Exit | None:
        """How the last trainer ended; None while it runs."""

    def stop(self, job_id: str, grace_s: float) -> None:
        """Ask it to keep a checkpoint and end; after `grace_s` end it whatever it does. Returns when it is gone."""


class Serving(Protocol):
    """The engines of this endpoint, as a tenant of the GPUs."""

    @property
    def gpus(self) -> dict[int, int]:
        """Bytes that the engines hold or will hold, by number of the GPU; empty where they use none."""

    def suspend(self, reason: str, expected_s: float | None) -> None:
        """Let running requests end, then end the engines and free their GPUs; requests get 503 until `resume`."""

    def resume(self) -> None:
        """Bring the engines back, with all adapters verified. Returns when they are ready; twice is fine."""


@dataclass(frozen=True)
class Trained:
    """What a trainer made: the adapter's name and version in the home, its metrics, and those of its checkpoints."""

    name: str
    version: str
    metrics: Mapping[str, float]
    trained_tokens: int | None
    checkpoints: Sequence["TrainedCheckpoint"] = field(default_factory=tuple)


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint that is an adapter of its own."""

    step: int
    name: str
    version: str
    metrics: Mapping[str, float]


class HandOver(Protocol):
    """Who serves what was trained."""

    def accept(self, job: Job, trained: Trained) -> str:
        """Load, verify and list the adapter of a job; the public name of the model, `ft:…`.

        AdapterError or VerificationError where it is not served: the job has failed. EngineError where the engine
        cannot say now: try again. Doing it twice is fine.
        """


class Wake(Protocol):
    """The queue, for those who change what it looks at."""

    def wake(self) -> None:
        """Something was written that the queue should see now. From any thread; costs nothing."""
