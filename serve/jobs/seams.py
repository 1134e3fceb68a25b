"""What the queue knows of its neighbours: what a trainer made, and who takes it over. Trainers: serve/runners/seams.py.

>>> class Nobody:                                  # whoever serves nothing
...     def accept(self, job, trained): return trained.name
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loraport.serve.store.tables import Job


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
