"""What a run tells other programs while it goes on: `loraport train --progress FILE`, one JSON object a line.

Each line is appended in one piece, with `at` (seconds since 1970) and `type`; a figure that is no number is null.

    phase       name, and a second time with seconds, when it is over
    start       steps, first_step (behind which it begins), rows, tokens_to_learn (a pass), epochs, run (the resolved
                configuration), derived (name, value, reason of each setting that was not given)
    metrics     step, steps, epoch, train_loss, train_mean_token_accuracy, learning_rate, grad_norm, tokens_per_second,
                tokens (trained so far), memory_bytes, left_s (estimated, to the last step)
    evaluation  step, valid_loss, valid_mean_token_accuracy, and the same as full_valid_… where it is over all rows
                of dpo both also have reward_margin, reward_accuracy, chosen_reward, rejected_reward, chosen_logps and
                rejected_logps, of an evaluation with valid_ before them
    checkpoint  step, folder
    adapter     name, version, folder, metrics, trained_tokens, up_to_date, checkpoints (those that became adapters)
    error       kind (class), exit_code, message, hint, details; file and row, or param, where one is at fault
    stopped     signal, step (of the checkpoint that is kept, or null)

A file that cannot be written costs a warning and never the run. What is written outlives a `kill -9` of the process;
where that, or a full disk, cut a line off, the next one begins anew: readers pass over what is no JSON.

    >>> ProgressFile(Path("progress.jsonl")).write("checkpoint", step=20, folder="…")
"""

import json
import math
import os
import re
import stat
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, Signals
from typing import Any

from loraport.clients.errors import DataError, LoraportError, UsageError
from loraport.clients.terminal import say
from loraport.train.adapters import Adapter
from loraport.train.config import RunConfig


class ProgressFile:
    """The file at `path`; without one nothing is written. Several processes may write to it."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path.absolute() if path else None
        self.warned = False

    def write(self, kind: str, /, **fields: Any) -> None:
        """Append a line of this type."""
        if self.path is None:
            return
        document = {"at": round(time.time(), 3), "type": kind} | plain(fields)
        try:
            append(self.path, json.dumps(document, allow_nan=False).encode() + b"\n")
        except OSError as error:
            if not self.warned:
                say(f"warning: {self.path} cannot be written ({error.strerror or error}): progress is lost", "yellow")
            self.warned = True


def append(path: Path, line: bytes) -> None:
    """Add `line` in one piece, behind whatever was left of an earlier one. OSError when it does not go in whole."""
    flags = (
        os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    )  # a pipe that nobody empties: no waiting
    file = os.open(path, flags, 0o666)
    try:
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_size and os.pread(file, 1, found.st_size - 1) != b"\n":
            line = b"\n" + line
        if os.write(file, line) < len(line):
            raise OSError("no space left for a whole line")
    finally:
        os.close(file)


def plain(value: Any) -> Any:
    """`value` as JSON has it: paths as text, numbers that are none as null."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def describe_checkpoint(adapter: Adapter) -> dict[str, Any]:
    """An adapter that was a checkpoint, in short."""
    manifest = adapter.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "step": manifest.step,
        "folder": str(adapter.folder),
        "metrics": manifest.metrics,
    }


def write_adapter(file: ProgressFile, adapter: Adapter, checkpoints: list[Adapter], up_to_date: bool) -> None:
    """The line of what a run has stored, or found stored."""
    manifest = adapter.manifest
    tokens = manifest.metrics.get("trained_tokens")  # older versions of Loraport have not counted them
    file.write(
        "adapter",
        name=manifest.name,
        version=manifest.version,
        folder=adapter.folder,
        metrics=manifest.metrics,
        trained_tokens=None if tokens is None else int(tokens),
        up_to_date=up_to_date,
        checkpoints=[describe_checkpoint(each) for each in checkpoints],
    )


@contextmanager
def ended(file: ProgressFile, kept: Callable[[], int | None]) -> Iterator[None]:
    """While it lasts, what ends the run early is written. `kept`: the step of the checkpoint that there is then."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if name := signal_of(error):
            file.write("stopped", signal=name, step=kept())
        raise
    except Exception as error:
        file.write("error", **describe_error(error))
        raise


def signal_of(error: SystemExit | KeyboardInterrupt) -> str | None:
    """The signal that ended the run: an exit code of 128 + n, or Ctrl-C."""
    code = 128 + SIGINT if isinstance(error, KeyboardInterrupt) else error.code
    known = {128 + each: each.name for each in Signals}
    return known.get(code) if isinstance(code, int) else None


def describe_error(error: Exception) -> dict[str, Any]:
    """All that is known of an error; of one that is a bug of ours, where it arose."""
    if not isinstance(error, LoraportError):
        lines = [line.rstrip("\n") for part in traceback.format_exception(error) for line in part.splitlines()]
        error = LoraportError(f"this is a bug of ours: {type(error).__name__}: {error}", "report it", tuple(lines))
    at_row = isinstance(error, DataError)
    return {
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
        "message": error.message,
        "hint": error.hint,
        "details": list(error.details),
        "file": (error.file or None) if isinstance(error, DataError) else None,
        "row": error.row if isinstance(error, DataError) else None,
        "param": None if at_row else param_of(error),
    }


def param_of(error: LoraportError) -> str | None:
    """The setting at fault: as the error says, else the first one whose flag its words name."""
    if not isinstance(error, UsageError):
        return None
    flags = re.findall(r"--([a-z][a-z-]*)", f"{error.message} {error.hint}")
    named = (flag.replace("-", "_") for flag in flags)
    return error.param or next((name for name in named if name in RunConfig.model_fields), None)
