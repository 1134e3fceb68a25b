"""What jobs leave behind: leases, checkpoints, links to rows, adapters that nobody is to be served, folders and logs.

Checkpoints and links go with the end of a job; who was killed in between, or cancels a job that waits, leaves them to
the next sweep. Adapters of jobs that failed or were cancelled stay a day, in which somebody may look at them, and
folders with their logs a month (QueueSettings). Nothing goes of a job that is not over, nothing that is served, and
nothing of a job that nobody here knows: it may be another database's.

    >>> tidy(parts, job_id)                     # at the end of a job
    >>> for sweep in SWEEPS: sweep(parts)       # now and then
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select

from loraport.clients.errors import AdapterError, ResourceError
from loraport.serve.adapters.remove import remove_all
from loraport.serve.jobs.parts import Parts
from loraport.serve.jobs.recipe import TRAINING, VALIDATION, job_folder
from loraport.serve.pool.pool import ENGINE, lock_leases
from loraport.serve.store.tables import ENDED, Job, Status

JOB = "ftjob-"
BATCH = 500  # ids in one question to the database


def tidy(parts: Parts, job_id: str) -> None:
    """Remove what only a training needs: its checkpoints, and its hold on the rows. The log stays."""
    folder = job_folder(parts.home, job_id)
    with contextlib.suppress(OSError):
        shutil.rmtree(parts.home.root / "runs" / job_id, ignore_errors=True)
        for name in (TRAINING, VALIDATION):
            (folder / name).unlink(missing_ok=True)


def sweep_leases(parts: Parts, spared: str | None = ENGINE) -> None:
    """End all leases but those of jobs that run, and of holders whose names begin with `spared`."""
    with parts.store.begin() as session:
        lock_leases(session)  # a job that is admitted meanwhile has its lease before it is seen to run
        running = set(session.scalars(select(Job.id).where(Job.status == Status.RUNNING)))
        parts.placer.pool.sweep(
            session, lambda holder: holder in running or (spared is not None and holder.startswith(spared))
        )


def sweep_runs(parts: Parts) -> None:
    """Remove checkpoints of jobs that are over."""
    for path in of_jobs(parts, parts.home.root / "runs", Job.status.in_(ENDED)):
        tidy(parts, path.name)


def sweep_adapters(parts: Parts) -> None:
    """Remove adapters of jobs that failed or were cancelled a while ago; not one that an endpoint serves."""
    before = time.time() - parts.settings.keep_failed_s
    is_late = Job.status.in_((Status.FAILED, Status.CANCELLED)), Job.finished_at < before
    for path in of_jobs(parts, parts.home.adapters, *is_late):
        with contextlib.suppress(AdapterError, ResourceError):  # none is whole, or one is served
            remove_all(parts.home, path.name)


def sweep_folders(parts: Parts) -> None:
    """Remove folders of jobs that ended long ago, and with them their logs."""
    before = time.time() - parts.settings.keep_logs_s
    for path in of_jobs(parts, parts.home.root / "jobs", Job.status.in_(ENDED), Job.finished_at < before):
        shutil.rmtree(path, ignore_errors=True)


SWEEPS: tuple[Callable[[Parts], None], ...] = (sweep_leases, sweep_runs, sweep_adapters, sweep_folders)


def of_jobs(parts: Parts, parent: Path, *where: Any) -> list[Path]:
    """The folders there that are of jobs like that; of a checkpoint `<job>.step-40` its job counts."""
    folders = [path for path in sorted(parent.glob(f"{JOB}*")) if path.is_dir()]
    jobs = found(parts, sorted({job_of(path) for path in folders}), *where)
    return [path for path in folders if job_of(path) in jobs]


def job_of(folder: Path) -> str:
    """The job of a folder."""
    return folder.name.partition(".")[0]


def found(parts: Parts, ids: Sequence[str], *where: Any) -> set[str]:
    """Which of these jobs are like that."""
    names: set[str] = set()
    with parts.store.read() as session:
        for at in range(0, len(ids), BATCH):
            names |= set(session.scalars(select(Job.id).where(Job.id.in_(ids[at : at + BATCH]), *where)))
    return names
