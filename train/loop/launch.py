"""The loop on several GPUs of this machine: a process for each, and the result back as if there had been one.

Every process loads the base onto its GPU and runs the same `fit`; DistributedDataParallel sums their gradients. The
rows of a step are dealt among them (`packing.StepSampler`), so the result is that of one GPU, to rounding. The adapter
and the figures come back through files, and what follows the training happens in the process that started it.

    >>> model, outcome = fit_on(2, base, rows, eval_rows, config, settings, runs, sealed)
"""

import gc
import json
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from loraport.clients import errors
from loraport.clients.errors import LoraportError, ResourceError
from loraport.clients.terminal import console
from loraport.train.base_model import Base
from loraport.train.config import ResolvedConfig
from loraport.train.loop.fit import Outcome, fit
from loraport.train.loop.gpu_memory import limit_memory
from loraport.train.loop.lora import load_lora, load_weights
from loraport.train.loop.packing import Rows
from loraport.train.loop.progress import ProgressCallback
from loraport.train.loop.settings import Settings
from loraport.train.loop.shards import share

ERROR, OUTCOME, ADAPTER = "error.json", "outcome.json", "adapter"
PATIENCE = 60.0  # seconds to end in, after a stop, once one of them has: it may be writing the checkpoint of all
GRACE = 10.0  # and once one has ended without a stop; then again after SIGTERM: they may wait for it within a sum


@dataclass(frozen=True)
class Task:
    """What each process is given. `folder`: where its results go."""

    folder: Path
    processes: int
    port: int
    base: Base
    rows: Rows
    eval_rows: Rows
    config: ResolvedConfig
    settings: Settings
    runs: Path
    sealed: dict[str, Any]
    resume: Path | None
    report_to: list[str] | str
    callbacks: tuple[Any, ...]


def fit_on(
    gpus: int,
    base: Base,
    rows: Rows,
    eval_rows: Rows,
    config: ResolvedConfig,
    settings: Settings,
    runs: Path,
    sealed: dict[str, Any],
    resume: Path | None = None,
    report_to: list[str] | str = "none",
    callbacks: tuple[Any, ...] = (),
) -> tuple[Any, Outcome]:
    """`fit` in `gpus` processes; the model with the trained adapter, on this process's device, and the outcome.

    Raises what `fit` raises in any of them. Without GPUs the processes share the CPU. `callbacks` are for all of them.
    """
    with tempfile.TemporaryDirectory(prefix="loraport-") as name:
        task = Task(
            Path(name),
            gpus,
            free_port(),
            base,
            rows,
            eval_rows,
            config,
            settings,
            runs,
            sealed,
            resume,
            report_to,
            callbacks,
        )
        processes = start_processes(work, (task,), nprocs=gpus, join=False, start_method="spawn")
        try:
            while not processes.join(grace_period=GRACE):
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise told(task.folder) or killed(error) or error from error
        except BaseException:  # a signal
            stop(processes.processes)
            raise
        found = json.loads((task.folder / OUTCOME).read_text())
        outcome = Outcome(found["metrics"], found["history"], Settings(**found["settings"]))
        # What no GPU holds for a training, one may hold for replies, or all of them together.
        return load_trained(base, config, task.folder / ADAPTER, "auto" if settings.sharded else None), outcome


def load_trained(base: Base, config: ResolvedConfig, folder: Path, device: Any = None) -> Any:
    """A fresh PeftModel with the weights of the adapter in `folder`; AdapterError unless they are exactly its own."""
    model = load_lora(base, config, device)
    load_weights(model, folder)
    return model


def stop(processes: list[Any]) -> None:
    """Have all processes write their checkpoint and end; a second signal, which is raised here, ends them at once.

    However long their step takes: they go on waiting for one another while none has ended. Once one has, the others
    either end too or wait for it in vain.
    """
    try:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
        wait([process.sentinel for process in processes])
        until = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def work(rank: int, task: Task) -> None:
    """One process: the first one shows its progress and hands over the result."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(task.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(task.port),
    }
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    console.quiet = rank > 0
    progress = ProgressCallback()
    try:
        train_one(rank, task, progress)
    except LoraportError as error:
        tell(task.folder, {"kind": type(error).__name__, "arguments": [error.message, error.hint, list(error.details)]})
        sys.exit(1)
    except SystemExit as error:
        tell(task.folder, {"exit": error.code})
        raise
    except KeyboardInterrupt:  # a second Ctrl-C; torch would take it for a success
        tell(task.folder, {"exit": 128 + signal.SIGINT})
        sys.exit(128 + signal.SIGINT)
    finally:
        progress.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def train_one(rank: int, task: Task, progress: ProgressCallback) -> None:
    """Load, train, and in the first process write the result."""
    limit_memory(task.config.gpu_memory)
    if task.settings.sharded:
        model = load_to_share(task.base, task.config)
        shards = share(model, this_device())
    else:
        model, shards = load_lora(task.base, task.config, this_device()), None
    outcome = fit(
        model,
        task.rows,
        task.eval_rows,
        task.config,
        task.settings,
        task.runs,
        task.sealed,
        resume=task.resume,
        callbacks=(progress, *task.callbacks),
        report_to=task.report_to if rank == 0 else "none",
        shards=shards,
    )
    if rank == 0:
        model.save_pretrained(task.folder / ADAPTER, save_embedding_layers=False)
        document = {"metrics": outcome.metrics, "history": outcome.history, "settings": asdict(outcome.settings)}
        (task.folder / OUTCOME).write_text(json.dumps(document))


def load_to_share(base: Base, config: ResolvedConfig) -> Any:
    """The whole model on this process's GPU where it holds it without a training, which is fast; else in memory."""
    try:
        return load_lora(base, config, this_device())
    except ResourceError:
        gc.collect()
        torch.cuda.empty_cache()
        return load_lora(base, config, torch.device("cpu"))


def this_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def tell(folder: Path, document: dict[str, Any]) -> None:
    """Leave word why a process ended; the first one that does is heard."""
    try:
        with (folder / ERROR).open("x") as handle:
            json.dump(document, handle)
    except FileExistsError:
        return


def told(folder: Path) -> BaseException | None:
    """The exception that a process left word of, if any did."""
    if not (folder / ERROR).is_file():
        return None
    document = json.loads((folder / ERROR).read_text())
    if "exit" in document:
        return SystemExit(document["exit"])
    message, hint, details = document["arguments"]
    found: BaseException = getattr(errors, document["kind"])(message, hint, tuple(details))
    return found


def killed(error: Exception) -> ResourceError | None:
    """What to say of a process that another one ended: the kernel, when the machine's memory is used up."""
    if not isinstance(error, ProcessExitedException) or not error.signal_name:
        return None
    return ResourceError(
        f"the process of GPU {error.error_index} was ended by {error.signal_name}.",
        "was the machine short of memory? Continue with --resume if there is a checkpoint",
    )


def free_port() -> int:
    """A port on 127.0.0.1 where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
