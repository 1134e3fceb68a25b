"""The engine as a child: its command line, its environment, and the process under its guard.

Flags and environment are the same from start to start, because vLLM's compile cache is keyed by them. Nothing of the
user's environment is lost, save what would make the engine talk to the network or write prompts down.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from loraport.clients.endpoint import process_identity
from loraport.clients.errors import os_errors
from loraport.clients.hardware import Device
from loraport.clients.home import Home
from loraport.serve.engine import versions
from loraport.serve.engine.connect import files_name
from loraport.serve.engine.family import Family
from loraport.serve.engine.leftovers import MARKER, EngineTrace, marker, session_of
from loraport.serve.engine.leftovers import end as end_processes
from loraport.serve.engine.speed import start_arguments
from loraport.serve.plan.flags import vllm_args
from loraport.serve.plan.settings import Plan
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base

DEFAULT_COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
GUARD = Path(__file__).with_name("guard.py")
# Ctrl-C to prompt in ten seconds at most: the engine's own shutdown takes half a second when all is well.
GRACE_S = 6.0
LAST_LINES = 400
LOGS_KEPT = 20


@dataclass(frozen=True)
class Launch:
    """All that is known of an engine before it is started."""

    command: tuple[str, ...]  # how to start vLLM's server, without flags
    version: versions.Version
    base: Base
    base_names: tuple[str, ...]
    adapters: tuple[Adapter, ...]  # those that slots are made for; they are loaded once it runs
    plan: Plan
    device: Device
    port: int  # of the gateway in front of it, which names its files
    socket: Path  # where it listens
    generation_config: Path | None = None  # folder of one that knows what the base's own does not: sampling.py
    family: Family = field(default_factory=Family)  # parsers of thoughts and tool calls
    merged: Adapter | None = None  # what the base's weights hold already
    more: tuple[str, ...] = ()  # flags of the user's, after all of ours
    replica: int = 0  # which of how many engines behind the port
    replicas: int = 1
    kernels: Path | None = None  # folder of tuned LoRA kernels
    gpus: tuple[str, ...] = ()  # those of this replica, by index or UUID; without, the engine sees what we see

    @property
    def name(self) -> str:
        """What people are told of it."""
        return f"replica {self.replica}" if self.replicas > 1 else "the engine"


def arguments(launch: Launch) -> list[str]:
    """The engine's whole command line. The user's own flags come last, where the last of a kind counts."""
    plan = launch.plan
    flags = [
        *("--model", str(launch.base.folder), "--served-model-name", *launch.base_names),
        *("--uds", str(launch.socket)),
        *vllm_args(plan),
        "--disable-uvicorn-access-log",
        *lora_arguments(launch),
        *launch.family.arguments(),
        *device_arguments(launch)[0],
        *start_arguments(plan, launch.base, launch.more),
    ]
    if launch.generation_config:
        flags += ["--generation-config", str(launch.generation_config)]
    return [*launch.command, *flags, *launch.more]


def lora_arguments(launch: Launch) -> list[str]:
    """Adapters kept in memory where they take turns in the slots: all of them, and the version before of each."""
    if not launch.plan.slots or launch.plan.kv_bytes is not None:  # on a CPU each has a slot of its own
        return []
    return ["--max-cpu-loras", str(max(launch.plan.slots, 2 * len(launch.adapters) + 1))]


def device_arguments(launch: Launch) -> tuple[list[str], dict[str, str]]:
    """(flags, environment) for memory and processes."""
    plan = launch.plan
    if plan.kv_bytes is None:
        return [], {}
    memory, memory_environment = versions.cpu_memory_arguments(launch.version, plan.kv_bytes)
    if any(
        flag.startswith(("--tensor-parallel", "-tp", "--distributed-executor", "--pipeline")) for flag in launch.more
    ):
        return memory, memory_environment
    process, process_environment = versions.one_process_arguments(launch.version, launch.device.cores)
    return memory + process, memory_environment | process_environment


def environment(launch: Launch, home: Home, owner: tuple[int, float]) -> dict[str, str]:
    """The engine's environment: the user's, and what makes the engine private, quiet and repeatable."""
    ours = {
        # They can hold code that is executed: nobody else may write there. They last as long as the home does.
        "VLLM_CACHE_ROOT": str(home.cache / "vllm"),
        "TRITON_CACHE_DIR": str(home.cache / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(home.cache),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a complete folder: no question to a hub, no wait for one
        "VLLM_CONFIGURE_LOGGING": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # nobody but us reaches its socket
        MARKER: marker(home, owner),
    }
    if launch.kernels:
        ours["VLLM_TUNED_CONFIG_FOLDER"] = str(launch.kernels)
    if launch.gpus:
        ours["CUDA_VISIBLE_DEVICES"] = ",".join(launch.gpus)
    # The gateway asks for keys. One in the environment would lock it out, and 0.25 writes it into its cache folder.
    kept = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}
    return device_arguments(launch)[1] | kept | ours


def start_guarded(command: Sequence[str], variables: dict[str, str]) -> tuple["subprocess.Popen[str]", int]:
    """(the guard of a new process, the end of a pipe): once that is closed, however we end, all its processes end.

    What it says comes from the guard's standard output.
    """
    read_end, pipe = os.pipe()
    guard = [sys.executable, "-I", "-S", str(GUARD), str(read_end), str(GRACE_S)]
    try:
        process = subprocess.Popen(
            [*guard, *command],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(read_end,),
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except BaseException:
        os.close(pipe)
        raise
    finally:
        os.close(read_end)
    return process, pipe


class Engine:
    """A running engine: its guard, its log, and the end of both.

    Lines of the log arrive in `lines` as (seconds since the start, text); None is the last one.
    """

    def __init__(self, launch: Launch, home: Home) -> None:
        owner = process_identity(os.getpid())
        self.home, self.socket = home, launch.socket
        self.log_path, self.log = open_log(home, files_name(launch.port, launch.replica))
        self.lines: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.started = self.heard = time.monotonic()
        home.ensure(home.cache / "vllm")
        launch.socket.unlink(missing_ok=True)  # of an engine that was killed
        try:
            with os_errors("starting", Path(launch.command[0]), "end other programs, or look at ulimit -a"):
                self.guard, self.pipe = start_guarded(arguments(launch), environment(launch, home, owner))
        except BaseException:
            self.log.close()
            raise
        try:
            self.identity = process_identity(self.guard.pid)
            self.trace = EngineTrace(launch.port, owner, self.identity, launch.replica)
            self.trace.write(home)
        except BaseException:  # a full disk, say: the guard sees the closed pipe and ends the engine
            os.close(self.pipe)
            self.log.close()
            raise
        self.drain = threading.Thread(target=self.copy_log, name="engine log", daemon=True)
        self.drain.start()

    def copy_log(self) -> None:
        """Everything the engine says, into the log file and the queue, so that its pipe never fills up."""
        assert self.guard.stdout is not None
        with self.log:
            for line in self.guard.stdout:
                with contextlib.suppress(OSError):  # a full disk must not stop the engine
                    self.log.write(line)
                    self.log.flush()
                self.last.append(line.rstrip())
                self.heard = time.monotonic()
                self.lines.put((time.monotonic() - self.started, line.rstrip()))
        self.lines.put(None)

    @property
    def status(self) -> int | None:
        """Exit status of the engine, which the guard passes on; None while it runs."""
        return self.guard.poll()

    def wait(self, seconds: float) -> int | None:
        """Wait for its end, at most `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.guard.wait(seconds)
        return None

    def stop(self) -> None:
        """End every process of the engine, by force where it has to be. Does nothing the second time."""
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1
        if self.wait(GRACE_S + 3) is None:
            self.guard.send_signal(signal.SIGKILL)
            self.guard.wait()
        end_processes([session_of(self.trace)])  # nothing, unless the guard was killed
        self.trace.path(self.home).unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        self.drain.join(1)


def open_log(home: Home, name: str) -> tuple[Path, IO[str]]:
    """A new log file that only its owner can read: engines may log what users wrote. The oldest ones are removed."""
    folder = home.ensure(home.logs)
    with contextlib.suppress(OSError):  # of what cannot be removed the next start is told nothing either
        for old in sorted(folder.glob("serve-*.log"), key=modified)[: -LOGS_KEPT + 1]:
            old.unlink(missing_ok=True)
    path = folder / f"serve-{time.strftime('%Y%m%d-%H%M%S')}-{name}-{os.getpid()}.log"
    with os_errors("writing", path):
        return path, os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8")


def modified(path: Path) -> float:
    """When a file was changed last; 0 where another `loraport serve` has just removed it."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
