"""The first part of a job: are its rows and settings fit to be trained, will it fit, how long will it take.

`loraport data check` reads every row on the exact tokens, `loraport plan train` says memory and time; both are
processes, so that no file takes the server down, however large or ill-meant. What they refuse becomes the job's error,
with the rows at fault. Nothing here takes a GPU.

    >>> Validator(store, home, base="reader-9m", settings=settings).check(job, is_over=lambda: False)
    Fit(config={…}, estimated_s=840.0, gpu_bytes=11800000000, gpus=1)
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import select

from loraport.clients.errors import ConfigError, DataError, LoraportError, os_errors
from loraport.clients.home import Home, require_disk, write_whole
from loraport.serve.jobs.outcome import MACHINE
from loraport.serve.jobs.process import Bounds, Ran, run
from loraport.serve.jobs.recipe import (
    CHECKPOINTS,
    CONFIG,
    TRAINING,
    VALIDATION,
    job_folder,
    name_of_setting,
    run_config,
)
from loraport.serve.jobs.settings import QueueSettings
from loraport.serve.jobs.words import clean, failure
from loraport.serve.store.store import Store
from loraport.serve.store.tables import File, Job

ROWS_SHOWN = 5
COPIES = 4  # of an adapter while it is trained: weights, gradients' moments, what is being written
SPARE_DISK = 256 << 20
PARAMS = {"train": "training_file", "eval": "validation_file"}


@dataclass(frozen=True)
class Fit:
    """What is known of a job that can be trained. Bytes of each GPU."""

    config: dict[str, Any]
    estimated_s: float | None
    gpu_bytes: int | None
    gpus: int


@dataclass(frozen=True)
class Unfit:
    """Why it cannot be."""

    error: dict[str, Any]


@dataclass(frozen=True)
class Later:
    """Nobody can say now: the machine lacks something, or a check died."""

    error: dict[str, Any]


Found = Fit | Unfit | Later | None


class Validator:
    """Checks jobs for an endpoint that serves `base`. `gpu_bytes`: of its smallest GPU; None on a CPU.

    `servable` says why an adapter of a rank, on these linears, could not be served there; None: it could. `most_rank`:
    the largest rank that can: a job that leaves its rank to the data gets no larger one.
    """

    def __init__(
        self,
        store: Store,
        home: Home,
        base: Path | str,
        settings: QueueSettings,
        gpu_bytes: int | None = None,
        program: Sequence[str] = (sys.executable, "-m", "loraport_cli"),
        servable: Callable[[int, Sequence[str]], str | None] | None = None,
        most_rank: Callable[[], int] | None = None,
    ) -> None:
        self.servable, self.most_rank = servable, most_rank
        self.store, self.home, self.base, self.settings = store, home, base, settings
        self.gpu_bytes, self.program = gpu_bytes, program

    def check(self, job: Job, is_over: Callable[[], bool]) -> Found:
        """What is found; None where `is_over`. ResourceError passes where the store cannot be used."""
        folder = self.home.ensure(job_folder(self.home, job.id))
        names = {f"{folder}/": "", str(folder): job.id, str(self.home.root): "the home"}
        if Path(self.base).is_absolute():
            names[str(self.base)] = job.model
        try:
            config = self.write(job, folder)
            rows = self.look("data", "check", folder, is_over)
            if rows.code != 0:
                return None if is_over() else judge_rows(rows, names)
            plan = self.look("plan", "train", folder, is_over)
            if plan.code == 0 and "rank" not in config and self.is_too_large(read(plan.out)):
                config["rank"] = self.most_rank() if self.most_rank else None
                write_config(folder / CONFIG, config)
                plan = self.look("plan", "train", folder, is_over)
            if plan.code != 0:
                return None if is_over() else judge_plan(plan, names)
            return self.fit(config, read(plan.out))
        except DataError as error:
            param = "validation_file" if error.file == VALIDATION else "training_file"
            return Unfit(failure(f"invalid_{param}", clean(error.message, names), param))
        except ConfigError as error:
            named = name_of_setting(error.param) if error.param else None
            words, hint = clean(error.message, names), clean(error.hint, names)
            return Unfit(failure("invalid_hyperparameters", words, named, hint))
        except LoraportError as error:
            return Later(failure("resources_lacking", clean(error.message, names)))

    def write(self, job: Job, folder: Path) -> dict[str, Any]:
        """The run configuration of a job and its rows, in its folder."""
        training = self.link(job.training_file, folder / TRAINING)
        validation = self.link(job.validation_file, folder / VALIDATION) if job.validation_file else None
        config = run_config(job, self.base, training, validation)
        write_config(folder / CONFIG, config)
        return config

    def link(self, file_id: str, path: Path) -> Path:
        """A file under another name, there also when its owner deletes it meanwhile. DataError where it is gone."""
        with self.store.read() as session:
            is_known = session.scalars(select(File.id).where(File.id == file_id)).first() is not None
        held = self.home.root / "files" / file_id
        if path.exists():
            return path
        if not is_known or not held.exists():
            error = DataError(f"the file {file_id} is not there any more.", "upload it again")
            error.file = path.name
            raise error
        with os_errors("linking", path), contextlib.suppress(FileExistsError):
            os.link(held, path)
        return path

    def look(self, room: str, command: str, folder: Path, is_over: Callable[[], bool]) -> Ran:
        """Run one of Loraport's commands on a job's configuration."""
        words = [*self.program, room, command, "--config", str(folder / CONFIG), "--json"]
        if room == "plan" and self.gpu_bytes is not None:  # all of it: what others hold now, they will not hold then
            words += ["--gpu-memory", f"{self.gpu_bytes / 2**30:.3f}"]
        bounds = Bounds(self.settings.check_s, self.settings.check_bytes)
        environment = {"LORAPORT_HOME": str(self.home.root), "CUDA_VISIBLE_DEVICES": ""} if room == "data" else {}
        return run(words, folder, f"{room}-{command}", bounds, is_over, environment)

    def is_too_large(self, plan: dict[str, Any]) -> bool:
        """Whether the rank that the data would have is more than can be served."""
        most = self.most_rank() if self.most_rank else 0
        return 0 < most < int(plan.get("max_lora_rank") or 0)

    def fit(self, config: dict[str, Any], plan: dict[str, Any]) -> Fit:
        """What a plan says; ResourceError where the disk lacks room for what will be written, ConfigError where nobody
        could serve it.
        """
        rank, linears = plan.get("max_lora_rank"), plan.get("target_modules") or ()
        reason = self.servable(int(rank), linears) if self.servable and rank else None
        if reason:
            raise ConfigError(f"the model could not be served here: {reason}.", "give the job a smaller rank")
        adapter = int(plan.get("adapter_bytes") or 0)
        require_disk(self.home.root, SPARE_DISK + adapter * (COPIES + CHECKPOINTS + 1), "training")
        hours = plan.get("hours")
        is_gpu = plan.get("gpu", {}).get("kind") == "cuda"
        return Fit(
            config,
            float(hours) * 3600 if hours else None,
            int(plan["peak_memory_bytes"]) if is_gpu and plan.get("peak_memory_bytes") else None,
            int(config.get("gpus") or 1),
        )


def write_config(path: Path, config: dict[str, Any]) -> None:
    """A run configuration as the YAML file that `loraport train --config` reads."""
    write_whole(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode(), is_private=True)


def judge_rows(ran: Ran, names: Mapping[str, str]) -> Unfit | Later:
    """What `loraport data check` refused, with the rows at fault. `names`: what paths are called."""
    found = [each for each in read(ran.out).get("findings", []) if each.get("level") == "error"]
    if not found:
        return judge(ran, "invalid_training_file", "training_file", names)
    rows = [row for each in found for row in each.get("rows", [])]
    is_trained = any(row.get("data") != "eval" for row in rows) or not rows
    param = PARAMS["train" if is_trained else "eval"]
    told = [describe(row) for row in rows if PARAMS.get(row.get("data", "train"), param) == param]
    count = sum(int(each.get("count") or 0) for each in found)
    more = f"; {count - ROWS_SHOWN} more" if len(told) >= ROWS_SHOWN and count > ROWS_SHOWN else ""
    summary = " ".join(str(each.get("message", "")) for each in found)
    words = clean(f"{summary} {'; '.join(told[:ROWS_SHOWN])}{more}", names)
    return Unfit(failure(f"invalid_{param}", words, param))


def describe(row: dict[str, Any]) -> str:
    """`Line 3: no assistant turn`; of a whole file what is wrong with it."""
    detail = str(row.get("detail") or "refused")
    return f"Line {row['row']}: {detail}" if row.get("row") else detail[:1].upper() + detail[1:]


def judge_plan(ran: Ran, names: Mapping[str, str]) -> Unfit | Later:
    """What `loraport plan train` refused. `names`: what paths are called."""
    verdict = read(ran.out)
    if ran.code == 3 and verdict.get("fits") is False:
        words = clean(str(verdict.get("verdict") or "the training does not fit."), names)
        return Unfit(failure("insufficient_memory", words))
    return judge(ran, "invalid_hyperparameters", None, names)


def judge(ran: Ran, code: str, param: str | None, names: Mapping[str, str]) -> Unfit | Later:
    """What is known of a check that left no verdict: its error, or its last words. `names`: what paths are called."""
    error = read(ran.out).get("error") or {}
    told = [line.removeprefix("error: ") for line in ran.said if line.startswith(("error: ", "hint: "))]
    said = clean(" ".join(told), names)
    if ran.code == 3 and error.get("kind") in MACHINE:
        return Later(failure("resources_lacking", clean(str(error.get("message")), names)))
    if ran.code == 2:
        return Unfit(failure("invalid_hyperparameters", said or "the settings are refused."))
    if ran.code == 3 and said:
        return Unfit(failure(code, said, param))
    if ran.is_late:
        return Unfit(failure(code, "checking took too long; give fewer rows.", param))
    if any("MemoryError" in line or "std::bad_alloc" in line for line in ran.said):
        return Unfit(failure(code, "checking needs more memory than it may take; give fewer or shorter rows.", param))
    last = clean(" ".join(ran.said[-1:]), names)
    return Later(failure("server_error", f"the check ended with exit code {ran.code}: {last}"))


def read(out: str) -> dict[str, Any]:
    """A document that a command printed; empty where it printed none."""
    try:
        found = json.loads(out)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
