"""Checkpoints of a run that can be trusted: whole or not there, and continued only by the run that made them.

transformers writes a checkpoint file by file. Ours counts from the moment its seal, `loraport.json`, lies in it, which
names every file with its size and what the run was made of.

    <home>/runs/<adapter>/checkpoint-120/   adapter, optimiser, schedule, random states, trainer_state.json, the seal

    >>> newest(folder, identity)            # None, a folder, or ConfigError: the rows or settings are others now
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from loraport.clients.errors import ConfigError, ResourceError, os_errors
from loraport.clients.home import Home, write_json

SEAL = "loraport.json"
STORING = "storing.json"  # beside the checkpoints


def run_folder(home: Home, name: str) -> Path:
    """Where the checkpoints of the adapter `name` lie while it is trained."""
    return home.root / "runs" / name


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run's folder to this process; ResourceError when another run is in it.

    The lock is a hidden file beside the folder (no adapter's name begins with a dot), and goes with the run.
    """
    path = folder.with_name(f".{folder.name}.lock")
    with os_errors("opening", path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        while (lock := take_lock(path)) is None:
            pass
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: see `take_lock`


def take_lock(path: Path) -> IO[str] | None:
    """The file at `path`, locked; None where the run before removed it meanwhile, and with it what others would see."""
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(lock, path):
            return lock
    except BlockingIOError as error:
        lock.close()
        raise ResourceError(
            f"another process is training {path.stem[1:]} right now.", "wait for it, or choose another --name"
        ) from error
    lock.close()
    return None


def is_at(file: IO[str], path: Path) -> bool:
    """Whether the open `file` is the one that lies at `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def seal(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Declare a checkpoint whole. `identity`: what must be the same for a run to continue from it."""
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.name != SEAL}
    write_json(checkpoint / SEAL, {"files": sizes, "identity": identity})


def is_whole(checkpoint: Path) -> bool:
    """Whether it was sealed and every file still has its size."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which it was written."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[-1].isdigit() and is_whole(path)]
    return sorted(found, key=step_of)


def newest(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The last whole checkpoint; ConfigError naming what differs when it belongs to other rows, settings or base."""
    found = whole(folder)
    if not found:
        return None
    sealed = json.loads((found[-1] / SEAL).read_text()).get("identity", {})
    differing = differences(sealed, identity)
    if differing:
        raise ConfigError(
            f"the unfinished run in {folder} cannot be continued: {', '.join(differing)} changed since.",
            "undo the change, or begin anew with --force instead of --resume",
        )
    return found[-1]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of what differs, settings by their own name with both values."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before != after and isinstance(before, dict) and isinstance(after, dict):
            names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
            found += [f"{name} ({before.get(name)} to {after.get(name)})" for name in names]
        elif before != after:
            found.append(key)
    return found


def remove_others(newest: Path, regular: set[int]) -> None:
    """Remove what an undisturbed run would not have beside `newest`: halves of checkpoints, and those of signals.

    `regular`: the steps behind which a checkpoint is due. So what is kept afterwards does not depend on interruptions,
    and a half that was begun at a later step is not taken for the newest.
    """
    for path in newest.parent.glob("checkpoint-*"):
        if path != newest and not (is_whole(path) and step_of(path) in regular):
            shutil.rmtree(path, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove all checkpoints of a run."""
    with os_errors("clearing", folder):
        shutil.rmtree(folder, ignore_errors=True)


def note_storing(folder: Path, fingerprint: str) -> None:
    """Note which version is about to be published; once it is there, nobody needs these checkpoints any more."""
    write_json(folder / STORING, {"fingerprint": fingerprint})


def clear_stored(folder: Path, fingerprint: str) -> None:
    """Remove the checkpoints of a run that was killed behind publishing its version and before it removed them."""
    noted = folder / STORING
    if noted.is_file():
        with contextlib.suppress(ResourceError, FileNotFoundError), held(folder):
            if json.loads(noted.read_text()) == {"fingerprint": fingerprint}:
                clear(folder)


def unwritten(checkpoint: Path, error: Exception) -> ResourceError:
    """What to say when a checkpoint could not be written; removes what was."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    last = whole(checkpoint.parent)
    reason = (str(error) or type(error).__name__).splitlines()[0]
    kept = f"the one of step {step_of(last[-1])} is whole" if last else "there is none before it"
    return ResourceError(
        f"the checkpoint of step {step_of(checkpoint)} could not be written ({reason}); {kept}.",
        "free disk space and continue with --resume" if last else "free disk space, or set LORAPORT_HOME elsewhere",
    )
