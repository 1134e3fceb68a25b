"""One attempt of a job: the trainer is started, followed to its end, and the job gets its next status.

Each of the three can be done again after it was done in part: a server that was killed in between goes on with them at
its next start (durable.py). What is known lies in the tables and in the job's folder. A store that cannot be reached is
waited for, while the trainer goes on. What follows a training that ended well is in finishing.py.

    >>> attempts = Attempts(Parts(store, home, runner, placer, hand_over, settings))
    >>> attempts.begin(job_id, 1); attempts.follow(job_id, 1); attempts.settle(job_id, 1, None)
"""

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from sqlalchemy import select

from loraport.clients.errors import LoraportError
from loraport.clients.home import require_disk
from loraport.clients.terminal import say
from loraport.serve.jobs.durable import Leaving
from loraport.serve.jobs.finishing import Finishing, load_job
from loraport.serve.jobs.follow import PROGRESS, Follower, Line, all_lines
from loraport.serve.jobs.outcome import ENDS, Done, Fault, Outcome, Refused, Short, judge
from loraport.serve.jobs.parts import Parts
from loraport.serve.jobs.recipe import CONFIG, TRAINING, VALIDATION, environment, job_folder
from loraport.serve.jobs.validate import write_config
from loraport.serve.jobs.words import clean, failure, last_lines
from loraport.serve.pool.pool import Share
from loraport.serve.runners.seams import LOG, Task
from loraport.serve.store.tables import Job, Lease, Status

SPARE_DISK = 256 << 20  # below which no training begins


class Attempts:
    """What DBOS runs (`durable.Work`)."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.finishing = Finishing(parts)
        self.training: set[str] = set()  # jobs whose trainers are ours to stop, whatever has become of their workflow

    def begin(self, job_id: str, attempt: int) -> dict[str, Any] | None:
        """Start the trainer; the error where that cannot be."""
        job = self.parts.patient(lambda: load_job(self.parts.store, job_id))
        if not is_of(job, attempt) or job.wanted or job.adapter:  # what has trained already is handed over
            return None
        share = self.parts.patient(lambda: self.parts.placer.share_of(job_id))
        if share is None:
            return failure("server_error", "the GPUs of the job were given to others.")
        try:
            require_disk(self.parts.home.root, SPARE_DISK, "training")
            self.parts.placer.make_room(job.estimated_s)
            if self.parts.stopping.is_set() or self.parts.leaving.is_set():  # making room may take a while
                raise Leaving
            self.training.add(job_id)
            self.parts.runner.start(self.task(job, share))
        except LoraportError as error:
            names = self.names(job)
            return failure("resources_lacking", clean(error.message, names), hint=clean(error.hint, names))
        return None

    def task(self, job: Job, share: Share) -> Task:
        """The trainer's command and surroundings. A part of a GPU is said in the configuration."""
        folder = self.parts.home.ensure(job_folder(self.parts.home, job.id))
        config = dict(job.config or {})
        if share.gpu_bytes is not None:
            config["gpu_memory"] = round(share.gpu_bytes / 2**30, 3)
        if share.gpus:
            config["gpus"] = len(share.gpus)
        write_config(folder / CONFIG, config)
        command = self.parts.command(folder) if self.parts.command else train_command(folder)
        return Task(job.id, job.attempt, folder, command, environment(job), share)

    def follow(self, job_id: str, attempt: int) -> None:
        """Tell what the trainer says, until it has ended: by itself, or because somebody wants that.

        A server that is stopped ends it also where there is no store to ask or tell.
        """
        self.training.add(job_id)
        try:
            self.follow_to_end(job_id, attempt)
        except Leaving:
            if self.parts.stopping.is_set():
                self.parts.runner.stop(job_id, self.parts.settings.grace_s)
            raise

    def follow_to_end(self, job_id: str, attempt: int) -> None:
        """The same, while the store can be used."""
        path = job_folder(self.parts.home, job_id) / PROGRESS
        follower = self.parts.patient(lambda: Follower(self.parts.store, job_id, path))
        while self.parts.runner.is_running(job_id):
            job = self.parts.patient(lambda: load_job(self.parts.store, job_id))
            if not is_of(job, attempt):
                return  # another attempt runs by now, and is no affair of this one
            self.parts.patient(follower.advance)
            if self.has_to_end(job):
                self.parts.runner.stop(job_id, self.parts.settings.grace_s)
            elif self.parts.leaving.is_set():
                raise Leaving
            else:
                self.parts.pause()
        self.parts.patient(follower.finish)

    def has_to_end(self, job: Job) -> bool:
        """Whether the trainer is to be stopped now."""
        if self.parts.stopping.is_set() or job.wanted:
            return True
        return self.parts.patient(lambda: self.is_over_time(job) or self.is_out_of_window(job.id))

    def is_out_of_window(self, job_id: str) -> bool:
        """Whether the engine wants its GPUs back at this time of the day."""
        share = self.parts.placer.share_of(job_id)
        return share is not None and self.parts.placer.is_out_of_window(share, time.time())

    def is_over_time(self, job: Job) -> bool:
        """Whether the job has trained for longer than any may, all its attempts together."""
        began = self.began(job.id)
        now_s = time.time() - began if began else 0.0
        return job.gpu_s / max(1, job.gpus) + now_s > self.parts.settings.time_limit_s

    def began(self, job_id: str) -> float | None:
        """When this attempt got its GPUs; None where it has none any more."""
        with self.parts.store.read() as session:
            return session.scalars(select(Lease.created_at).where(Lease.holder == job_id).limit(1)).first()

    def settle(self, job_id: str, attempt: int, error: dict[str, Any] | None) -> None:
        """Give the job its next status."""
        self.training.discard(job_id)
        job = self.parts.patient(lambda: load_job(self.parts.store, job_id))
        if not is_of(job, attempt):
            return
        outcome = Fault(error) if error else self.judge(job)
        self.conclude(job, outcome)
        self.parts.wake()

    def judge(self, job: Job) -> Outcome:
        """What came of the attempt."""
        folder = job_folder(self.parts.home, job.id)
        lines = said_since(folder / PROGRESS, job.attempt_bytes)
        return judge(self.parts.runner.outcome(job.id), lines, self.names(job), last_lines(folder / LOG))

    def names(self, job: Job) -> Mapping[str, str]:
        """What paths of this machine are called before clients."""
        folder = job_folder(self.parts.home, job.id)
        rows = {str(folder / TRAINING): "training_file", str(folder / VALIDATION): "validation_file"}
        return rows | {str(folder): job.id, str(self.parts.home.root): "the home"}

    def conclude(self, job: Job, outcome: Outcome) -> None:
        """The one place that says what comes after an attempt."""
        finishing, settings = self.finishing, self.parts.settings
        if job.wanted == "cancel":
            finishing.end(job, Status.CANCELLED)
        elif isinstance(outcome, Done):
            finishing.hand_over(job, outcome.trained)
        elif isinstance(outcome, Short):
            finishing.end(job, Status.FAILED, outcome.error, report=Path(outcome.folder))
        elif isinstance(outcome, Refused):
            finishing.end(job, Status.FAILED, outcome.error)
        elif job.wanted == "pause":
            finishing.put_back(job, Status.PAUSED)
        elif self.parts.patient(lambda: self.is_over_time(job)):
            hours = settings.time_limit_s / 3600
            finishing.end(job, Status.FAILED, failure("time_limit_exceeded", f"it trained for over {hours:g} hours."))
        elif self.parts.stopping.is_set() or self.parts.patient(lambda: self.is_out_of_window(job.id)):
            finishing.put_back(job, Status.QUEUED)
        else:
            finishing.try_again(job, outcome)

    def give_up(self, job_id: str, attempt: int, bug: Exception) -> None:
        """A bug of ours: the trainer ends, and so does the job."""
        say(f"error: job {job_id} failed by a bug of ours: {''.join(traceback.format_exception(bug))}", "red")
        job = self.parts.patient(lambda: load_job(self.parts.store, job_id))
        if is_of(job, attempt):
            self.parts.runner.stop(job_id, self.parts.settings.grace_s)
            words = failure("server_error", f"the server has a bug ({type(bug).__name__}); its own words say more.")
            self.finishing.end(job, Status.FAILED, words)
            self.parts.wake()


def is_of(job: Job | None, attempt: int) -> TypeGuard[Job]:
    """Whether a job runs, and in that attempt."""
    return job is not None and job.status == Status.RUNNING and job.attempt == attempt


def said_since(path: Path, start: int) -> Sequence[Line]:
    """How a trainer says that it ended, from a byte on; before it stands what earlier attempts have said."""
    return [line for line in all_lines(path, start=start) if line.type in ENDS]


def train_command(folder: Path) -> list[str]:
    """`loraport train` as a process, which goes on from its checkpoint where there is one."""
    loraport = [sys.executable, "-m", "loraport_cli", "train"]
    files = ["--config", str(folder / CONFIG), "--progress", str(folder / PROGRESS)]
    return [*loraport, *files, "--json", "--resume-or-start"]
