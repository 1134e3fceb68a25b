"""What a trainer says while it runs, told as events of its job: nothing twice, and nothing lost, whoever is killed.

A trainer appends to progress.jsonl (`loraport train --progress`). How far it was read stands in the job's row and
changes in the same transaction as the events that were made of it. Metrics of a long run are thinned out; the file, and
the CSV made of it (results.py), have all. How a training ended is judged in outcome.py.

    >>> follower = Follower(store, job_id, folder / PROGRESS)
    >>> while runner.is_running(job_id):
    ...     follower.advance()
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from loraport.serve.jobs.words import clean
from loraport.serve.store.changes import tell
from loraport.serve.store.store import Store
from loraport.serve.store.tables import Job

PROGRESS = "progress.jsonl"
KEPT_METRICS = 1000  # events of metrics of a job, about
CHUNK_BYTES = 1 << 20  # read in one transaction
LONGEST_LINE = 1 << 24


@dataclass(frozen=True)
class Line:
    """What stands at `start` of the file; an empty `said` where that is no JSON object."""

    start: int
    said: Mapping[str, Any]

    @property
    def type(self) -> str:
        """Which line it is; empty where it is none of ours."""
        return str(self.said.get("type", ""))

    @property
    def step(self) -> int:
        """The training step that it speaks of; 0 where it speaks of none."""
        step = self.said.get("step")
        return step if isinstance(step, int) else 0


def read_lines(path: Path, start: int, most: int = CHUNK_BYTES) -> tuple[list[Line], int]:
    """(the whole lines from byte `start` on, the byte behind them); none of a missing file."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(most)
            while b"\n" not in data and len(data) == most < LONGEST_LINE:
                file.seek(start)
                data = file.read(most := 2 * most)
    except FileNotFoundError:
        return [], start
    whole = data[: data.rfind(b"\n") + 1]
    lines, at = [], start
    for raw in whole.splitlines(keepends=True):
        lines.append(Line(at, parse(raw)))
        at += len(raw)
    return lines, at


def parse(raw: bytes) -> Mapping[str, Any]:
    """A line as an object; empty for what was cut off."""
    try:
        said = json.loads(raw)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def all_lines(path: Path, until: int | None = None, start: int = 0) -> Iterator[Line]:
    """Every line of the file from byte `start` on, or those that begin before byte `until`."""
    while True:
        lines, end = read_lines(path, start)
        for line in lines:
            if until is not None and line.start >= until:
                return
            yield line
        if end == start:
            return
        start = end


class Follower:
    """One reader of a job's progress. ResourceError of the store passes through: the same is read again then."""

    def __init__(self, store: Store, job_id: str, path: Path) -> None:
        self.store, self.job_id, self.path = store, job_id, path
        with store.read() as session:
            self.at = session.execute(select(Job.progress_bytes).where(Job.id == job_id)).scalar_one()
        told = (line.step for line in all_lines(path, self.at) if line.type == "metrics")
        self.last_step = max(told, default=0)

    def advance(self) -> bool:
        """Tell what is new; whether there was anything."""
        lines, end = read_lines(self.path, self.at)
        if end == self.at:
            return False
        fresh = dict(news(lines))
        last_step = self.last_step
        with self.store.begin() as session:
            for line in lines:
                last_step = tell_line(session, self.job_id, line, last_step)
            session.execute(update(Job).where(Job.id == self.job_id).values(progress_bytes=end, **fresh))
        self.at, self.last_step = end, last_step
        return True

    def finish(self) -> None:
        """Tell all that is left."""
        while self.advance():
            pass


def news(lines: list[Line]) -> Iterator[tuple[str, float]]:
    """What lines say of the job itself: columns and their values."""
    for line in lines:
        said = line.said
        if line.type == "metrics" and is_number(said.get("tokens")):
            yield "trained_tokens", int(said["tokens"])
        if line.type == "metrics" and is_number(said.get("left_s")):
            yield "estimated_finish", said.get("at", time.time()) + said["left_s"]
        if line.type == "adapter" and is_number(said.get("trained_tokens")):
            yield "trained_tokens", int(said["trained_tokens"])


def tell_line(session: Session, job_id: str, line: Line, last_step: int) -> int:
    """Tell a line, if it is worth an event; the last step whose metrics were seen.

    A training that goes on from a checkpoint repeats steps: they were told.
    """
    at = line.said.get("at")
    when = float(at) if isinstance(at, int | float) else None
    source = str(line.start)
    if line.type == "metrics":
        if line.step > last_step and is_kept(line):
            words, data = describe_metrics(line.said)
            tell(session, job_id, words, data=data, source=source, is_metrics=True, at=when)
        return max(last_step, line.step)
    if line.type == "evaluation":
        words, data = describe_metrics(line.said)
        tell(session, job_id, words, data=data, source=source, is_metrics=True, at=when)
    elif words := describe(line):
        tell(session, job_id, words, data=details(line), source=source, at=when)
    return last_step


def is_kept(line: Line) -> bool:
    """Whether the metrics of a step become an event: all of a short run, every so many of a long one."""
    steps = line.said.get("steps")
    stride = math.ceil(steps / KEPT_METRICS) if isinstance(steps, int) and steps > 0 else 1
    return line.step % stride == 0 or line.step in (1, steps)


NAMES = {
    "train_loss": "training loss",
    "valid_loss": "validation loss",
    "full_valid_loss": "full validation loss",
}


def describe_metrics(said: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(the message, the data) of metrics, as OpenAI has them: `Step 10/120: training loss=1.23`."""
    data = {name: value for name, value in said.items() if name not in ("at", "type", "steps", "full")}
    if said.get("steps"):
        data["total_steps"] = said["steps"]
    shown = [f"{words}={said[name]:.2f}" for name, words in NAMES.items() if is_number(said.get(name))]
    of = f"/{said['steps']}" if said.get("steps") else ""
    return f"Step {said.get('step', '?')}{of}: {', '.join(shown) or 'done'}", data


def describe(line: Line) -> str:
    """A line of another kind in words; empty for what no client needs to hear."""
    said = line.said
    if line.type == "phase" and said.get("name") and said.get("seconds") is None:
        return clean(f"{said['name']}".capitalize())
    if line.type == "start":
        if said.get("first_step"):
            return f"Training goes on behind step {said['first_step']} of {said.get('steps')}."
        return f"Training starts: {said.get('steps')} steps on {said.get('rows')} examples."
    if line.type == "checkpoint":
        return f"Checkpoint kept at step {line.step}."
    if line.type == "adapter":
        return "Training is done: the adapter is stored."
    if line.type == "stopped":
        return f"Training stopped at step {line.step}; its checkpoint is kept." if line.step else "Training stopped."
    return ""


def details(line: Line) -> dict[str, Any] | None:
    """The data of such an event: figures and settings, no paths of this machine."""
    wanted = {
        "start": ("steps", "first_step", "rows", "tokens_to_learn", "epochs", "derived"),
        "checkpoint": ("step",),
        "adapter": ("metrics", "trained_tokens"),
    }.get(line.type, ())
    return {name: line.said[name] for name in wanted if name in line.said} or None


def is_number(value: Any) -> bool:
    """Whether it is a figure."""
    return isinstance(value, int | float) and not isinstance(value, bool)
