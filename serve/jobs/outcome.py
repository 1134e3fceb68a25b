"""How a trainer ended, by its exit code and its last words: done, refused, short of what was required, or a fault.

0            done: the adapter is there
2, 3         refused: bad rows, bad settings. What the machine lacked (disk, memory held by others, the hub) is a fault
4            the adapter is there and fell short of its requirements
1, signals   a fault of the machine, or a bug: worth another attempt
none seen    nobody saw the end (the machine went down): what the trainer has written counts

>>> judge(Exit(0), lines)
Done(trained=Trained(name='ftjob-1', version='v1', …))
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraport.serve.jobs.follow import Line, is_number
from loraport.serve.jobs.seams import Trained, TrainedCheckpoint
from loraport.serve.jobs.words import clean, failure
from loraport.serve.runners.seams import Exit

MACHINE = ("ResourceError", "EndpointError")  # classes of errors that are no matter of the job
ENDS = ("adapter", "error", "stopped")


@dataclass(frozen=True)
class Done:
    """There is an adapter."""

    trained: Trained


@dataclass(frozen=True)
class Refused:
    """The job cannot be done, however often it is tried."""

    error: dict[str, Any]


@dataclass(frozen=True)
class Short:
    """There is an adapter that fell short of its requirements. `folder` holds its report."""

    error: dict[str, Any]
    folder: str


@dataclass(frozen=True)
class Fault:
    """It may go well another time. `error` is what the job fails with when there is no other."""

    error: dict[str, Any]
    counts: bool = True


Outcome = Done | Refused | Short | Fault


def judge(
    exit: Exit | None, lines: Sequence[Line], names: Mapping[str, str] | None = None, log: Sequence[str] = ()
) -> Outcome:
    """What came of an attempt. `lines`: what it has said; `names`: what paths are called; `log`: its last lines."""
    said = {line.type: line.said for line in lines if line.type in ENDS}
    error, adapter = said.get("error"), said.get("adapter")
    code = exit.code if exit else None
    if code in (0, None) and adapter:
        return Done(read_trained(adapter))
    if code == 4 and adapter:
        return Short(describe(error, "requirements_not_met", names), str(adapter.get("folder") or ""))
    if error and code in (2, 3, None) and error.get("exit_code") in (2, 3):
        if error.get("kind") in MACHINE:
            return Fault(describe(error, "resources_lacking", names))
        return Refused(describe(error, code_of(error), names))
    if error:
        return Fault(describe(error, "training_failed", names))
    if code in (2, 3):
        return Refused(failure("training_failed", clean(unexplained(code, log), names)))
    is_stopped = "stopped" in said  # somebody has, not us, and it has kept its checkpoint
    return Fault(
        failure("training_failed", clean(unexplained(code, log), names)), counts=code is not None and not is_stopped
    )


def code_of(error: Mapping[str, Any]) -> str:
    """OpenAI's word for what was refused."""
    if error.get("kind") == "DataError":
        return "invalid_training_file"
    return "invalid_hyperparameters" if error.get("exit_code") == 2 else "training_refused"


def describe(error: Mapping[str, Any] | None, code: str, names: Mapping[str, str] | None) -> dict[str, Any]:
    """An `error` line as the error of a job; rows at fault are of the file whose name stands in `names`."""
    if error is None:
        return failure(code, "the adapter fell short of its requirements.")
    param = error.get("param")
    message = clean(str(error.get("message") or "it failed."), names)
    if error.get("kind") == "DataError":
        name = (names or {}).get(str(error.get("file")), "")
        is_held_out = name.startswith("validation_file")
        param = "validation_file" if is_held_out else "training_file"
        code = f"invalid_{param}"
        if error.get("row") and str(error["row"]) not in message:
            message = f"row {error['row']}: {message}"
    return failure(code, message, param, clean(str(error.get("hint") or ""), names))


def unexplained(code: int | None, log: Sequence[str]) -> str:
    """A trainer that ended without a word, in words; its log's last line is the best that there is."""
    last = f" Its last words: {log[-1]}" if log else ""
    if code is None:
        return f"The trainer is gone, and nobody saw its end.{last}"
    if code > 128:
        return f"The trainer was ended by {signal_name(code - 128)}.{last}"
    return f"The trainer ended with exit code {code}.{last}"


def signal_name(number: int) -> str:
    """`SIGKILL (out of memory, or somebody's kill -9)`."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (memory ran out, or somebody's kill -9)" if name == "SIGKILL" else name


def read_trained(adapter: Mapping[str, Any]) -> Trained:
    """An `adapter` line."""
    tokens = adapter.get("trained_tokens")
    return Trained(
        str(adapter["name"]),
        str(adapter["version"]),
        figures(adapter.get("metrics")),
        int(tokens) if tokens is not None else None,
        tuple(
            TrainedCheckpoint(int(each["step"]), str(each["name"]), str(each["version"]), figures(each.get("metrics")))
            for each in adapter.get("checkpoints") or ()
        ),
    )


def figures(metrics: Any) -> dict[str, float]:
    """Those metrics that are numbers."""
    return {name: value for name, value in (metrics or {}).items() if is_number(value)}
