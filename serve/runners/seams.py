"""Who runs a trainer, and with what: on this machine (local.py) or on a cluster (on_ray.py); the queue does not know.

>>> runner.start(Task("ftjob-3f", 1, folder, ["loraport", "train", "--config", "config.yaml"], {}, Share((0,))))
>>> runner.outcome("ftjob-3f")
Exit(code=0)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraport.serve.pool.pool import Share

LOG = "train.log"  # in a task's folder: what the trainer says to people


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
