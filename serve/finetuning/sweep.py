"""What is cleared away: at the start of a server, what a killed one left; while it runs, what has expired.

>>> begin(service)          # once, before requests are answered
>>> sweep(service)          # every minute or so
"""

import shutil
import time
from collections.abc import Iterable
from typing import Any

from sqlalchemy import delete, select, update

from loraport.serve.finetuning.disk import drop, hide, restore
from loraport.serve.finetuning.kept import DELETED, is_held
from loraport.serve.finetuning.service import Service
from loraport.serve.jobs.recipe import TRAINING, VALIDATION
from loraport.serve.store.tables import ENDED, File, Job, Part, Upload

TOMBSTONE_S = 24 * 3600.0  # for which the row of a deleted file stays
BATCH = 500  # ids in one question to the database


def begin(service: Service) -> None:
    """Finish or undo what a killed server was doing with contents, then sweep. No request may be under way."""
    for folder in (service.files, service.uploads, service.home.root / "jobs"):
        service.home.ensure(folder)
    restore(service.files, lambda ids: known(service, File, ids))
    for folder in folders(service.uploads):
        restore(folder, lambda ids: known(service, Part, ids))
    drop_folders(service)
    sweep(service)


def sweep(service: Service, now: float | None = None) -> None:
    """Expired files and uploads go, and the rows' links of jobs that are over."""
    now = now or time.time()
    expire_files(service, now)
    expire_uploads(service, now)
    unlink_rows(service)


def expire_files(service: Service, now: float) -> None:
    """Delete what has lived as long as it was to, and forget what was deleted long ago and no job holds."""
    with service.store.begin() as session:
        over = (File.status != DELETED) & (File.expires_at <= now)
        gone = list(session.scalars(select(File.id).where(over)))
        for id in gone:
            hide(service.files, id)
        session.execute(update(File).where(File.id.in_(gone)).values(status=DELETED, filename="", expires_at=now))
        long_ago = (File.status == DELETED) & (File.expires_at <= now - TOMBSTONE_S) & ~is_held()
        session.execute(delete(File).where(long_ago))
    for id in gone:
        drop(service.files, id)


def expire_uploads(service: Service, now: float) -> None:
    """End uploads whose time is over; those that are over are forgotten after a day."""
    with service.store.begin() as session:
        over = (Upload.status == "pending") & (Upload.expires_at <= now)
        gone = list(session.scalars(select(Upload.id).where(over)))
        session.execute(delete(Part).where(Part.upload_id.in_(gone)))
        session.execute(update(Upload).where(Upload.id.in_(gone)).values(status="expired"))
        long_ago = (Upload.status != "pending") & (Upload.expires_at <= now - TOMBSTONE_S)
        session.execute(delete(Upload).where(long_ago))
    for id in gone:
        shutil.rmtree(service.uploads / id, ignore_errors=True)


def unlink_rows(service: Service) -> None:
    """Remove a job's own links to its files when it is over: nothing reads them any more."""
    found = [folder for folder in folders(service.home.root / "jobs") if (folder / TRAINING).exists()]
    ended = known(service, Job, [folder.name for folder in found], Job.status.in_(ENDED)) if found else set()
    for folder in found:
        if folder.name in ended:
            for name in (TRAINING, VALIDATION):
                (folder / name).unlink(missing_ok=True)


def drop_folders(service: Service) -> None:
    """Remove folders that a killed server made before the row: uploads that are over, and jobs that never were.

    Of jobs, only what holds nothing but links to files that are still there: what a trainer has written, or what is the
    last of its content, may be another database's.
    """
    pending = [folder.name for folder in folders(service.uploads)]
    alive = known(service, Upload, pending, Upload.status == "pending")
    for name in pending:
        if name not in alive:
            shutil.rmtree(service.uploads / name, ignore_errors=True)
    for folder in folders(service.home.root / "jobs"):
        inside = list(folder.iterdir())
        is_spare = all(path.name in (TRAINING, VALIDATION) and path.stat().st_nlink > 1 for path in inside)
        if is_spare and not known(service, Job, [folder.name]):
            shutil.rmtree(folder, ignore_errors=True)


def folders(parent: Any) -> list[Any]:
    """The folders in one."""
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def known(service: Service, kind: Any, ids: Iterable[str], *where: Any) -> set[str]:
    """Which of these ids have a row, of those `where` holds; deleted files have none."""
    wanted, found = list(ids), set[str]()
    conditions = [*where, kind.status != DELETED] if kind is File else list(where)
    with service.store.read() as session:
        for at in range(0, len(wanted), BATCH):
            chosen = select(kind.id).where(kind.id.in_(wanted[at : at + BATCH]), *conditions)
            found |= set(session.scalars(chosen))
    return found
