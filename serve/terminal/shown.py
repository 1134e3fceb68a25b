"""Fine-tuning jobs as people read them in a terminal: a table of many, the lines of one.

>>> print_table([job])
 job                             status     base       created  left  model
 ftjob-9f086d081884c7d659a2feaa  running    reader-9m  16:45    3:53
"""

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from loraport.clients.terminal import console, printable

if TYPE_CHECKING:
    from rich.table import Table

ENDED = ("succeeded", "failed", "cancelled")
WIDE = 200  # characters of a table that goes into a file
COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "bold", "paused": "yellow"}


def ours(job: Any) -> dict[str, Any]:
    """What this endpoint says of a job beyond OpenAI's fields; nothing at another's."""
    found = (job.model_extra or {}).get("loraport")
    return found if isinstance(found, dict) else {}


def print_table(jobs: list[Any]) -> None:
    """The table, as wide as it has to be where no terminal bounds it."""
    from rich.console import Console

    (console if console.is_terminal else Console(stderr=True, width=WIDE)).print(table_of(jobs))


def table_of(jobs: list[Any]) -> "Table":
    """A line for each job."""
    from rich.table import Column, Table

    are_many = len({job.organization_id for job in jobs}) > 1
    names = ["job", "status", "base", *(["owner"] if are_many else []), "created", "left"]
    table = Table(*(Column(name, no_wrap=True) for name in names), Column("model", overflow="fold"), box=None)
    for job in jobs:
        table.add_row(
            job.id,
            f"[{COLOURS.get(job.status, 'default')}]{job.status}[/]",
            printable(job.model),
            *([printable(job.organization_id)] if are_many else []),
            lately(job.created_at),
            left(job),
            printable(job.fine_tuned_model or (job.error.message if job.error and job.error.message else ""))[:90],
        )
    return table


def describe(job: Any) -> Iterator[tuple[str, str]]:
    """A job in words: (what, value)."""
    more = ours(job)
    yield "job", job.id
    yield "status", job.status + (f" ({more['wanted']} is wanted)" if more.get("wanted") else "")
    if job.error and job.error.message:
        yield "error", job.error.message
    if job.fine_tuned_model:
        yield "model", job.fine_tuned_model
    yield "base", job.model
    yield "rows", f"{job.training_file}{f', evaluated on {job.validation_file}' if job.validation_file else ''}"
    said = job.method.model_dump(exclude_none=True) if job.method else {}
    kind = str(said.get("type", "supervised"))
    settings = (said.get(kind) or {}).get("hyperparameters") or {}
    chosen = {**{name: value for name, value in settings.items() if value != "auto"}, **(more.get("options") or {})}
    yield "settings", ", ".join([kind, *(f"{name} {value}" for name, value in chosen.items())])
    if job.metadata:
        yield "metadata", ", ".join(f"{name}={value}" for name, value in job.metadata.items())
    yield "created", f"{when(job.created_at)}, by {job.organization_id}"
    if job.finished_at:
        yield "finished", when(job.finished_at)
    elif left(job):
        yield "left", left(job)
    if more.get("attempt"):
        yield "trainer", "started once" if more["attempt"] == 1 else f"started {more['attempt']} times"
    if job.trained_tokens:
        yield "trained", f"{job.trained_tokens:,} tokens"
    if job.result_files:
        yield "results", ", ".join(job.result_files)


def describe_cost(cost: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The same in words: what was spent, and what is estimated in all."""
    for name, before in (("", ""), ("estimated_", "about ")):
        hours, money = cost.get(f"{name}gpu_hours"), cost.get(f"{name}cost")
        if hours:
            price = f", which costs {money:,.2f}" if money is not None else ""
            yield ("will use" if name else "GPU-hours"), f"{before}{hours:.3f}{price}"


def when(at: float) -> str:
    """A time as people read it here."""
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


def lately(at: float) -> str:
    """The same, short: the time of today, else the day."""
    day, now = datetime.fromtimestamp(at), datetime.now()
    return day.strftime("%H:%M" if day.date() == now.date() else "%Y-%m-%d")


def left(job: Any) -> str:
    """How long a job will train, as far as that is known."""
    if job.status in ENDED or not job.estimated_finish:
        seconds = ours(job).get("estimated_seconds") if job.status == "queued" else None
        return f"{span(seconds)} of training" if seconds else ""
    return span(max(0, job.estimated_finish - time.time()))


def span(seconds: float) -> str:
    """`1:05:09`, `5:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
