"""A queue with everything real but training, serving and checks; also as a process of its own, to be killed.

python -m tests.queue_kit HOME [URL]        # a server with 2 GPUs, until SIGTERM

>>> with kit.serving(home) as queue:
...     job_id = submit(queue, steps=3)
...     assert wait(queue, job_id).status == Status.SUCCEEDED
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from sqlalchemy import select

from loraport.clients.errors import EngineError, ResourceError, VerificationError
from loraport.clients.home import Home
from loraport.serve.jobs.seams import Trained
from loraport.serve.jobs.service import Queue
from loraport.serve.jobs.settings import QueueSettings
from loraport.serve.jobs.validate import Fit, Found, Later, Unfit
from loraport.serve.jobs.words import failure
from loraport.serve.pool.policy import Policy, Window
from loraport.serve.pool.pool import Gpu, Machine, Pool
from loraport.serve.runners.local import LocalRunner
from loraport.serve.runners.seams import Exit, Runner, Task
from loraport.serve.store.store import Store, open_store
from loraport.serve.store.tables import ENDED, Event, Job, Status

T = TypeVar("T")
TRAINER = Path(__file__).parent / "fake_trainer.py"
QUICK = QueueSettings(
    poll_s=0.02, tick_s=0.1, backoff_s=0.05, longest_backoff_s=0.2, grace_s=10.0, checks=4, lost_attempts=1000
)


class Checks:
    """Finds what a job's options say: {"unfit": WORDS}, {"later": COUNT}; else it fits."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def check(self, job: Job, is_over: Callable[[], bool]) -> Found:
        self.seen.append(job.id)
        if "unfit" in job.options:
            return Unfit(failure("invalid_training_file", job.options["unfit"], "training_file"))
        if job.options.get("later", 0) >= self.seen.count(job.id):
            return Later(failure("server_error", "the check died."))
        end = time.monotonic() + job.options.get("check_s", 0.0)
        while time.monotonic() < end:
            if is_over():
                return None
            time.sleep(0.01)
        return Fit(
            {"knobs": job.options}, job.options.get("estimate"), job.options.get("bytes"), job.options.get("gpus", 1)
        )


class Takes:
    """Takes what was trained, or does what the job says: {"engine": N} not now, N times; {"refuse": true}."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.asked: list[str] = []

    def accept(self, job: Job, trained: Trained) -> str:
        self.asked.append(job.id)
        if job.options.get("refuse"):
            raise VerificationError("it answers otherwise than in training.", "see its report")
        if self.asked.count(job.id) <= job.options.get("engine", 0):
            raise EngineError("the engine starts.", "wait")
        with (self.home.root / "accepted.txt").open("a") as file:
            file.write(f"{job.id} {trained.name}@{trained.version}\n")
        return f"ft:base:ann::{job.id.removeprefix('ftjob-')[:12]}"


class Done:
    """A runner whose trainers are done at once: for what is no matter of processes."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def start(self, task: Task) -> None:
        self.started.append(task.job_id)
        made = {"name": task.job_id, "version": "v1", "folder": "", "metrics": {}, "trained_tokens": 1}
        line = json.dumps({"at": time.time(), "type": "adapter"} | made)
        (task.folder / "progress.jsonl").write_text(line + "\n")

    def is_running(self, job_id: str) -> bool:
        return False

    def outcome(self, job_id: str) -> Exit:
        return Exit(0)

    def stop(self, job_id: str, grace_s: float) -> None:
        """There is nothing to stop."""


class Engine:
    """An engine that remembers what it was told."""

    def __init__(self, gpus: dict[int, int] | None = None) -> None:
        self.gpus = gpus or {}
        self.told: list[str] = []
        self.is_here = threading.Event()
        self.is_here.set()

    def suspend(self, reason: str, expected_s: float | None) -> None:
        self.told.append("suspend")
        self.is_here.clear()

    def resume(self) -> None:
        self.told.append("resume")
        self.is_here.set()


def make_queue(
    home: Home,
    url: str | None = None,
    gpus: int = 2,
    engine: Engine | None = None,
    policy: Policy = Policy.AUTO,
    window: Window | None = None,
    is_cpu: bool = False,
    runner: Runner | None = None,
    **settings: Any,
) -> Queue:
    """A queue on a machine of so many GPUs, each of 10 bytes. Not started."""
    machine = Machine("box", tuple(Gpu(number, 10) for number in range(gpus)), is_cpu)
    store = open_store(home, url)
    return Queue(
        store,
        home,
        runner=runner or LocalRunner(home),
        pool=Pool([machine]),
        serving=engine or Engine(),
        hand_over=Takes(home),
        base="base",
        settings=replace(QUICK, **settings),
        policy=policy,
        window=window,
        command=command,
        validator=Checks(),
    )


def command(folder: Path) -> list[str]:
    """The fake trainer, with the knobs of its job."""
    knobs = yaml.safe_load((folder / "config.yaml").read_text())["knobs"]
    return [sys.executable, "-I", "-S", str(TRAINER), str(folder), json.dumps(knobs)]


@contextmanager
def serving(home: Home, url: str | None = None, **options: Any) -> Iterator[Queue]:
    """A queue that runs, and is closed as a server closes it."""
    queue = make_queue(home, url, **options)
    queue.start()
    try:
        yield queue
    finally:
        queue.close()
        queue.parts.store.close()


def new_job(tenant: str, options: dict[str, Any]) -> Job:
    """A job as the API makes one; it is in no table yet."""
    return Job(
        tenant=tenant, model="base", training_file="file-1", seed=1, method={}, options=options, request_sha256=""
    )


def submit(where: Queue | Store, tenant: str = "ann", **options: Any) -> str:
    """A new job. `priority` and `may_share` are its own, the rest are knobs of checks, trainer and hand-over."""
    store = where.parts.store if isinstance(where, Queue) else where
    job = new_job(tenant, options)
    job.priority, job.may_share = options.pop("priority", 0), options.pop("may_share", False)
    with store.begin() as session:
        session.add(job)
    if isinstance(where, Queue):
        where.wake()
    return job.id


def get(where: Queue | Store, job_id: str) -> Job:
    """A job as it is now."""
    store = where.parts.store if isinstance(where, Queue) else where
    with store.read() as session:
        return session.scalars(select(Job).where(Job.id == job_id)).one()


def wait(where: Queue | Store, job_id: str, *statuses: Status) -> Job:
    """Wait for a job's end, or for one of these statuses."""
    return wait_for(lambda: job if (job := get(where, job_id)).status in (statuses or ENDED) else None)


def wait_for(found: Callable[[], T | None], seconds: float = 60.0) -> T:
    """Wait until something is there."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
    return result


def want(queue: Queue, job_id: str, wanted: str) -> None:
    """Ask for a running job to be cancelled or paused, as the API does."""
    with queue.parts.store.begin() as session:
        job = session.scalars(select(Job).where(Job.id == job_id)).one()
        job.wanted = wanted
    queue.wake()


def messages(where: Queue | Store, job_id: str, kind: str = "message") -> list[str]:
    """What the events of a job say."""
    store = where.parts.store if isinstance(where, Queue) else where
    with store.read() as session:
        asked = select(Event.message).where(Event.job_id == job_id, Event.type == kind).order_by(Event.seq)
        return list(session.scalars(asked))


def journal(home: Home, job_id: str) -> list[str]:
    """What really happened in the trainers of a job."""
    return (home.root / "jobs" / job_id / "journal.txt").read_text().splitlines()


class Server:
    """A queue in a process of its own."""

    def __init__(self, home: Home, url: str | None = None) -> None:
        words = [sys.executable, "-m", "tests.queue_kit", str(home.root), *([url] if url else [])]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.is_ready = False

    def ready(self) -> None:
        """Wait until it looks."""
        assert self.process.stdout is not None
        self.is_ready = self.is_ready or self.process.stdout.readline() == "ready\n"
        assert self.is_ready

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As SIGTERM does, once it listens."""
        self.ready()
        self.process.terminate()
        assert self.process.wait(60) == 0


def main(folder: str, url: str | None = None) -> None:
    """Serve until SIGTERM, from when there is a database."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while True:
        with suppress(ResourceError):
            open_store(Home(Path(folder)), url).close()
            break
        time.sleep(0.1)
    with serving(Home(Path(folder)), url):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main(*sys.argv[1:])
