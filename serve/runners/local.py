"""Trainers on this machine: each under a job shell (shell.py) that outlives the server, so that a new one adopts it.

What is known of a trainer lies in its folder, and nowhere else: lock, process.json, exit.json. A server that starts
after a `kill -9` asks `is_running` and `outcome` as the one before did. There is never a second trainer of a job: who
starts one holds the folder's lock, which passes on to the shell and to all that inherits it.

A trainer sees the GPUs of its share and no others, none of the server's secrets (an allow-list), and every process of
it carries the job's id in MARK. It is nicer than the gateway, and the first that the kernel ends where memory is short.

    >>> runner = LocalRunner(Home.default())
    >>> runner.start(Task(job.id, 1, folder, command, {}, Share(gpus=(0,))))
    >>> runner.stop(job.id, grace_s=60)
    >>> runner.outcome(job.id)
    Exit(code=143)
"""

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from loraport.clients.errors import ResourceError, os_errors
from loraport.clients.home import Home
from loraport.serve.runners import shell
from loraport.serve.runners.seams import LOG, Exit, Task

MARK = "LORAPORT_JOB"
SHELL = Path(shell.__file__)
NICE = 10
BEGIN_S = 30.0  # for a shell to start its trainer, which takes milliseconds
SHELL_S = 2.0  # for a shell that a server has started before it was killed, to write down who it is
END_S = 5.0  # for what was killed to be gone
POLL_S = 0.05

# What a trainer may know of the server's environment: where programs and libraries are, and how they compute.
ALLOWED = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "VIRTUAL_ENV"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    )
)
ALLOWED_PREFIXES = (
    *("LC_", "XDG_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH", "PYTORCH_", "TRITON_", "HF_", "TOKENIZERS_"),
    *("OMP_", "MKL_", "KMP_", "OPENBLAS_", "GLOO_", "UCX_"),
)
SECRET_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
WITH_PASSWORD = re.compile(r"://[^/\s]*@")


@dataclass(frozen=True)
class Record:
    """process.json: the attempt, and [process id, ticks of its start] of shell and trainer on one boot of a machine."""

    attempt: int
    boot: str
    shell: tuple[int, int]
    trainer: tuple[int, int]

    def lives(self, who: tuple[int, int]) -> bool:
        """Whether that very process runs; a zombie does not."""
        return self.boot == shell.boot_id() and who[1] > 0 and shell.identity(who[0]) == list(who)

    @property
    def session(self) -> int | None:
        """The session of the shell, while shell or trainer live; None when its number may be somebody else's."""
        return self.shell[0] if self.lives(self.shell) or self.lives(self.trainer) else None


class LocalRunner:
    """Runs trainers in `jobs/<id>` of a home. For any thread. `gpu_names`: how CUDA_VISIBLE_DEVICES calls a number."""

    def __init__(self, home: Home, gpu_names: Mapping[int, str] | None = None, nice: int = NICE) -> None:
        self.home, self.gpu_names, self.nice = home, gpu_names or {}, nice
        self.starting = threading.Lock()
        self.shells: dict[str, subprocess.Popen[bytes]] = {}  # of this server, so that they become no zombies

    def folder(self, job_id: str) -> Path:
        """Where everything of a job lies."""
        return self.home.root / "jobs" / job_id

    def start(self, task: Task) -> None:
        """Run a trainer; nothing where that attempt, or a later one, runs or ran.

        ResourceError where it cannot be started, or an earlier one of the job does not end.
        """
        self.home.ensure(task.folder.parent)
        self.home.ensure(task.folder)
        with self.starting:
            lock = self.lock_for(task)
            if lock is None:
                return
            try:
                end_all(task.job_id, read_record(task.folder))  # what an earlier attempt has left
                self.launch(task, lock)
            finally:
                os.close(lock)

    def lock_for(self, task: Task) -> int | None:
        """The lock of a job's folder; None where the attempt has begun meanwhile, or before."""
        began = time.monotonic()
        while not has_begun(task):
            if (lock := take_lock(task.folder)) is not None:
                if not has_begun(task):
                    return lock
                os.close(lock)
                break
            waited = time.monotonic() - began
            if waited > BEGIN_S:
                raise ResourceError("an earlier trainer of this job still runs.", "cancel the job, or end it")
            if waited > SHELL_S and not is_alive(record := read_record(task.folder)):
                end_all(task.job_id, record)  # neither a shell nor a trainer, but what they have left
            time.sleep(POLL_S)
        return None

    def is_running(self, job_id: str) -> bool:
        """Whether shell or trainer live. Where both are gone, and the shell had no time to, what they left is ended."""
        if (child := self.shells.get(job_id)) and child.poll() is not None:
            self.shells.pop(job_id, None)
        folder = self.folder(job_id)
        record = read_record(folder)
        if is_alive(record):
            return True
        if record is None or read_exit(folder, record.attempt) is not None:
            return is_locked(folder)  # by a shell that has just begun, or just ended
        with self.starting:
            return read_record(folder) != record or end_all(job_id, record) > 0

    def outcome(self, job_id: str) -> Exit | None:
        """How the last trainer ended, by its shell; Exit(None) where the shell was killed, or there never was one."""
        if self.is_running(job_id):
            return None
        record = read_record(self.folder(job_id))
        return Exit(read_exit(self.folder(job_id), record.attempt) if record else None)

    def stop(self, job_id: str, grace_s: float) -> None:
        """SIGTERM to the trainer, which keeps a checkpoint; after `grace_s` SIGKILL to every process of the job."""
        folder = self.folder(job_id)
        wait_until(lambda: read_record(folder) is not None or not is_locked(folder), BEGIN_S)
        record = read_record(folder)
        if record is None:
            return
        if record.lives(record.shell):  # without it, the kernel has told the trainer already
            signal_to(record.shell, signal.SIGTERM)
        if wait_until(lambda: not self.is_running(job_id), grace_s):
            return
        end_all(job_id, record, spared=record.shell[0])
        if not wait_until(lambda: not record.lives(record.shell), END_S):  # it writes down what has happened
            signal_to(record.shell, signal.SIGKILL)
        end_all(job_id, record)
        wait_until(lambda: not self.is_running(job_id), END_S)

    def survivors(self) -> list[str]:
        """The jobs whose trainers run, whoever started them."""
        folders = sorted((self.home.root / "jobs").glob("*/process.json"))
        return [path.parent.name for path in folders if self.is_running(path.parent.name)]

    def leave(self, gpus: Collection[str], grace_s: float) -> list[str]:
        """Stop the trainers that see any of these GPUs, as CUDA_VISIBLE_DEVICES calls them; their jobs."""
        found = [job_id for job_id in self.survivors() if not seen_by(job_id, self.folder(job_id)).isdisjoint(gpus)]
        with ThreadPoolExecutor(max(1, len(found))) as pool:
            list(pool.map(lambda job_id: self.stop(job_id, grace_s), found))
        return found

    def launch(self, task: Task, lock: int) -> None:
        """Start a shell that inherits the lock, and wait until its trainer runs; ResourceError where it does not."""
        status, told = os.pipe()
        numbers = map(str, (task.attempt, self.nice, lock, told))
        command = [sys.executable, "-I", "-S", str(SHELL), str(task.folder), *numbers, *task.command]
        try:
            try:
                child = self.start_shell(task, command, (lock, told))
            finally:
                os.close(told)
            why = read_all(status, BEGIN_S)
        finally:
            os.close(status)
        if why or not has_begun(task):
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:  # it hangs: nobody may find its trainer running later
                os.killpg(child.pid, signal.SIGKILL)  # its id is its own until it is waited for
                child.wait()
                end_all(task.job_id, read_record(task.folder))
            raise ResourceError(
                f"the trainer cannot be started: {why or 'its shell has ended'}.", "see train.log in the job's folder"
            )

    def start_shell(self, task: Task, command: list[str], descriptors: tuple[int, int]) -> "subprocess.Popen[bytes]":
        """The process of a shell, in a session of its own; what it says itself, which is nothing, goes to train.log."""
        with (
            os_errors("starting a trainer in", task.folder, "end other programs, or look at ulimit -a"),
            (task.folder / LOG).open("ab") as log,
        ):
            child = self.shells[task.job_id] = subprocess.Popen(
                command,
                env=environment(task, self.home, self.gpu_names),
                cwd=task.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=descriptors,
                start_new_session=True,
            )
        return child


def environment(task: Task, home: Home, gpu_names: Mapping[int, str]) -> dict[str, str]:
    """The trainer's: what it may know of the server's, what the task says, its GPUs, and the job's mark."""
    kept = {name: value for name, value in os.environ.items() if may_know(name, value)}
    visible = ",".join(gpu_names.get(gpu, str(gpu)) for gpu in task.share.gpus)
    ours = {"LORAPORT_HOME": str(home.root), MARK: task.job_id, "CUDA_VISIBLE_DEVICES": visible}
    return kept | dict(task.environment) | ours


def may_know(name: str, value: str) -> bool:
    """Whether a trainer may know a variable: one of the list that is no secret and holds none."""
    is_listed = name in ALLOWED or name.startswith(ALLOWED_PREFIXES)
    return is_listed and not name.upper().endswith(SECRET_ENDINGS) and not WITH_PASSWORD.search(value)


def is_alive(record: Record | None) -> bool:
    """Whether the shell or the trainer of an attempt runs."""
    return record is not None and (record.lives(record.shell) or record.lives(record.trainer))


def has_begun(task: Task) -> bool:
    """Whether that attempt of the job, or a later one, runs or ran."""
    record = read_record(task.folder)
    return record is not None and record.attempt >= task.attempt


def read_json(path: Path) -> dict[str, Any]:
    """A document; empty where there is none, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def read_record(folder: Path) -> Record | None:
    """process.json of the last attempt; None before the first."""
    found = read_json(folder / "process.json")
    with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
        who = [(int(found[name][0]), int(found[name][1])) for name in ("shell", "trainer")]
        return Record(int(found["attempt"]), str(found["boot"]), *who)
    return None


def read_exit(folder: Path, attempt: int) -> int | None:
    """The exit code of an attempt; None where nobody has written it down."""
    found = read_json(folder / "exit.json")
    code = found.get("code")
    return code if found.get("attempt") == attempt and isinstance(code, int) else None


def take_lock(folder: Path) -> int | None:
    """The lock of a job's folder, as a descriptor; None where somebody has it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether somebody has the lock."""
    if not (folder / "lock").exists():
        return False
    lock = take_lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def read_all(descriptor: int, wait_s: float) -> str:
    """What comes through a pipe until it is closed, or nothing comes for that long."""
    found = b""
    while select.select([descriptor], [], [], wait_s)[0]:
        piece = os.read(descriptor, 4096)
        if not piece:
            return found.decode(errors="replace")
        found += piece
    return found.decode(errors="replace") or "its shell does not answer"


def signal_to(who: tuple[int, int], number: int) -> None:
    """Send a signal to that very process: its id may be somebody else's by now."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        descriptor = os.pidfd_open(who[0])
        try:
            if shell.identity(who[0]) == list(who):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def processes(job_id: str, record: Record | None) -> list[psutil.Process]:
    """Living processes of a job: those with its mark, and those of the session of its shell."""
    session = record.session if record else None
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = process.environ().get(MARK) == job_id or os.getsid(process.pid) == session
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def seen_by(job_id: str, folder: Path) -> set[str]:
    """The GPUs that processes of a job see."""
    found: set[str] = set()
    for process in processes(job_id, read_record(folder)):
        with contextlib.suppress(psutil.Error, OSError):
            found |= set(process.environ().get("CUDA_VISIBLE_DEVICES", "").split(","))
    return found - {""}


def end_all(job_id: str, record: Record | None, spared: int | None = None) -> int:
    """SIGKILL to every process of a job but `spared`, again until none is left; how many are left after END_S."""
    end = time.monotonic() + END_S
    while left := [process for process in processes(job_id, record) if process.pid != spared]:
        if time.monotonic() > end:
            return len(left)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=POLL_S)
    return 0


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Wait for that, at most so long; whether it is so."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True
