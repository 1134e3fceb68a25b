"""Contents on disk: whole under the id of their row, or not there.

What arrives is written as `<id>.partial`; when it is whole and on the disk itself, its row is written, and then it gets
its name. So a kill at any moment leaves either a partial without a row, which `restore` removes, or one with a row,
which is whole and gets its name then. Deleting goes the same way back. A file of a full name is never removed because
no row of this database knows it: it may be another database's.

    >>> with Arriving(service.files, new_id("file-"), most=512 << 20) as arriving:
    ...     arriving.write(data)
    ...     arriving.settle()
    ...     # … write the row …
    ...     arriving.keep()
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from loraport.clients.errors import ResourceError, os_errors
from loraport.serve.finetuning.lines import Lines
from loraport.serve.finetuning.service import FINAL, MIB, disk_full
from loraport.serve.gateway.refusals import Refusal

PARTIAL = ".partial"
SPARE_BYTES = 64 * MIB  # that are left on the disk: the database needs some too
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Arriving:
    """A content as it arrives. Leaving the context removes it unless it was kept.

    `most`: bytes that it may have. `take(count)` is asked before bytes are written, and raises a Refusal where there is
    no room. Checked as JSONL on the way where `is_checked`: `lines` says what was found.
    """

    def __init__(
        self, folder: Path, id: str, most: int, take: Callable[[int], None] = lambda _: None, is_checked: bool = False
    ) -> None:
        self.id, self.most, self.take = id, most, take
        self.path, self.partial = folder / id, folder / f"{id}{PARTIAL}"
        self.bytes = 0
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.lines = Lines() if is_checked else None
        with disk_errors(self.partial):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            self.file = os.fdopen(os.open(self.partial, flags, 0o600), "wb", buffering=0)
        self.is_kept = self.is_handed = False

    def write(self, data: bytes) -> None:
        """Some more; Refusal 413 beyond the bound, 507 for a full disk."""
        self.bytes += len(data)
        if self.bytes > self.most:
            raise too_large(self.most)
        self.take(len(data))
        with disk_errors(self.partial):
            view = memoryview(data)
            while view:
                view = view[self.file.write(view) :]
        self.sha256.update(data)
        self.md5.update(data)
        if self.lines:
            self.lines.feed(data)

    def settle(self) -> None:
        """It is whole: have it on the disk itself, before anything says that it is there."""
        if self.lines:
            self.lines.end()
        with disk_errors(self.partial):
            os.fsync(self.file.fileno())
            self.file.close()

    def keep(self) -> None:
        """Its row is written: give it its name."""
        self.is_kept = True
        self.partial.replace(self.path)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """`settle`, then a block that may `keep` it; removed after the block otherwise.

        For a thread that goes on when its request is given up: that sets `is_handed`, and leaves the end to the block.
        """
        try:
            self.settle()
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Remove it unless it was kept."""
        self.file.close()
        if not self.is_kept:
            self.partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.is_handed:
            self.end()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk is told to the client; what else the operating system says is our ResourceError."""
    try:
        with os_errors("writing", path):
            yield
    except ResourceError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_SPACE:
            raise disk_full() from error
        raise


def too_large(most: int) -> Refusal:
    """413."""
    return Refusal(413, "file_too_large", f"The file is larger than {most / MIB:,.0f} MiB.", param="file")


def bad_file(fault: str) -> Refusal:
    """400 for what is no JSONL, in OpenAI's words."""
    message = f"Expected file to have JSONL format, where every line is a JSON object: {fault}."
    return Refusal(400, "invalid_file_format", message, param="file", headers=FINAL)


def require_space(folder: Path, count: int) -> None:
    """Refusal 507 where the disk has no room for `count` bytes more."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if shutil.disk_usage(existing).free < count + SPARE_BYTES:
        raise disk_full()


def content(folder: Path, id: str) -> Path | None:
    """Where a content lies, also in the moment before it gets its name; None where it is gone."""
    whole = folder / id
    return next((path for path in (whole, whole.with_name(f"{id}{PARTIAL}"), whole) if path.is_file()), None)


def link(source: Path, target: Path) -> None:
    """The same content under a second name, which stays when the first one goes; a copy on disks without links."""
    with disk_errors(target):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def hide(folder: Path, id: str) -> None:
    """The first half of deleting: before its row goes."""
    with contextlib.suppress(FileNotFoundError):
        (folder / id).replace(folder / f"{id}{PARTIAL}")


def drop(folder: Path, id: str) -> None:
    """The second half: after its row has gone."""
    (folder / f"{id}{PARTIAL}").unlink(missing_ok=True)


def restore(folder: Path, is_known: Callable[[Iterable[str]], set[str]]) -> None:
    """At the start of a server: name what is whole, remove what is not. `is_known` says which ids have a row."""
    partials = {path.name.removesuffix(PARTIAL): path for path in folder.glob(f"*{PARTIAL}")}
    known = is_known(partials) if partials else set()
    for id, path in partials.items():
        if id in known:
            path.replace(folder / id)
        else:
            path.unlink()
