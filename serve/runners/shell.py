"""The job shell: a small process around a trainer, which outlives the server and writes down how the trainer ended.

It runs in a session of its own, holds the lock of the job's folder (and so does every process that inherits it), and
is the subreaper of everything that the trainer starts. It writes process.json before the trainer begins, passes SIGTERM
on, ends what the trainer leaves behind, and writes exit.json. When the shell itself is killed, the kernel sends the
trainer SIGTERM, so that it keeps a checkpoint and ends; then there is no exit.json.

    process.json    {"attempt": 1, "boot": "…", "shell": [pid, ticks], "trainer": [pid, ticks]}
    exit.json       {"attempt": 1, "code": 0}      128 + n where signal n ended it

Process ids come with the time of their start (in ticks since boot, as the kernel counts), which together name a process
for ever. The bytes of exit.json are on the disk before the trainer begins: a full disk hides no outcome.

Standard library only, and run as a file with -I -S: it starts in milliseconds, takes a few MB, and shares nothing with
its parent. local.py starts it, and reads the pipe STATUS_FD: it closes once the trainer runs, or says why it does not.
Without them (-1), on a node of a cluster, it goes without. Its exit code is the trainer's.

    python -I -S shell.py FOLDER ATTEMPT NICE LOCK_FD STATUS_FD COMMAND...
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LEFTOVER_GRACE_S = 2.0  # for what the trainer leaves behind
POLL_S = 0.05
EXIT_BYTES = 128
OOM_SCORE = 500  # of 1000: of all processes of the user the kernel ends a trainer first
RESERVE = ".exit.json"


def prctl(option: int, value: int) -> None:
    """prctl(2); Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def stat_of(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None where there is no such process, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields


def identity(pid: int) -> list[int]:
    """[process id, ticks since boot when it started]; 0 ticks where it is gone."""
    fields = stat_of(pid)
    return [pid, int(fields[19]) if fields else 0]


def boot_id() -> str:
    """What tells one boot of this machine from another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def descendants() -> list[int]:
    """Living processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := stat_of(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def send(pids: list[int], number: int) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or none, also after a power cut."""
    partial = path.with_name(f".{path.name}.new")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_exit(folder: Path, attempt: int, code: int) -> None:
    """Write exit.json into the bytes that were kept for it; nothing where even that cannot be."""
    content = json.dumps({"attempt": attempt, "code": code}).encode().ljust(EXIT_BYTES)
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / RESERVE, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, content, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        (folder / RESERVE).replace(folder / "exit.json")


def start(folder: Path, nice: int, command: list[str], gate: tuple[int, int], status: int) -> int:
    """Fork the trainer, which begins when a byte comes through the pipe `gate`; its process id.

    `status` closes when it begins; before, it takes the reason why it cannot.
    """
    shell = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        os.close(gate[1])
        if not os.read(gate[0], 1) or os.getppid() != shell:  # the shell has died: nobody knows of this trainer
            os._exit(127)
        prepare(folder, nice)
        os.execvp(command[0], command)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(status, f"{error.filename or command[0]}: {error.strerror}".encode())
    finally:
        os._exit(127)


def prepare(folder: Path, nice: int) -> None:
    """What the trainer begins with: its files, signals as they are by default, and manners towards the gateway."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.nice(nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(folder / "result.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
    os.dup2(os.open(folder / "train.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)


def reap(trainer: int) -> int | None:
    """Collect every child that has ended; the trainer's wait status if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            found = status if pid == trainer else found
    return found


def wait(trainer: int) -> int:
    """Wait for the trainer's end and pass SIGTERM on meanwhile; its exit code, 128 + n of a signal."""
    waited = {signal.SIGCHLD, signal.SIGTERM}
    while (status := reap(trainer)) is None:
        if signal.sigwait(waited) == signal.SIGTERM:
            send([trainer], signal.SIGTERM)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def end_leftovers() -> None:
    """End what the trainer has left behind: SIGTERM, a while, SIGKILL until nothing is left."""
    number: int = signal.SIGTERM
    while left := descendants():
        send(left, number)
        end = time.monotonic() + LEFTOVER_GRACE_S
        while time.monotonic() < end and descendants():
            time.sleep(POLL_S)
            reap(0)
        number = signal.SIGKILL
    reap(0)


def main(folder: Path, attempt: int, nice: int, lock: int, status: int, command: list[str]) -> int:
    """Run the trainer to its end; its exit code, 1 where it could not be started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    gate = os.pipe()
    if status < 0:
        status = os.dup(2)
    else:
        os.set_inheritable(lock, True)
        os.set_inheritable(status, False)
    try:
        write_whole(folder / RESERVE, b" " * EXIT_BYTES)
        trainer = start(folder, nice, command, gate, status)
        known = {"attempt": attempt, "boot": boot_id(), "shell": identity(os.getpid()), "trainer": identity(trainer)}
        write_whole(folder / "process.json", json.dumps(known).encode())
    except OSError as error:
        os.write(status, f"{error.filename or folder}: {error.strerror}".encode())
        return 1
    os.write(gate[1], b"1")
    os.close(status)
    code = wait(trainer)
    end_leftovers()
    write_exit(folder, attempt, code)
    return code


if __name__ == "__main__":
    where, *rest = sys.argv[1:]
    attempt_number, nice_level, lock_fd, status_fd = map(int, rest[:4])
    os._exit(main(Path(where), attempt_number, nice_level, lock_fd, status_fd, rest[4:]))
