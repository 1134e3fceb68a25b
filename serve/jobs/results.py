"""What a job leaves for its owner: the metrics of each step as a CSV file, and the report of what fell short.

Both are files like those that were uploaded, with OpenAI's purpose `fine-tune-results`. Their ids follow from the job,
so that a result that is written again after a kill -9 is the same file.

    >>> with store.begin() as session:
    ...     file_id = keep_metrics(session, home, job, folder / PROGRESS)
"""

import csv
import hashlib
import io
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from loraport.clients.home import Home, write_whole
from loraport.serve.jobs.follow import all_lines
from loraport.serve.store.tables import File, Job

PURPOSE = "fine-tune-results"
# The columns of OpenAI's file, and what our trainer calls them; further ones stand behind them.
COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
MORE = {
    "full_valid_loss": "full_valid_loss",
    "full_valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
    "learning_rate": "learning_rate",
}


def metrics_by_step(path: Path) -> dict[int, dict[str, Any]]:
    """All metrics of a progress file; of steps that were repeated, the last."""
    found: dict[int, dict[str, Any]] = {}
    for line in all_lines(path):
        if line.type in ("metrics", "evaluation") and line.step:
            found.setdefault(line.step, {}).update(line.said)
    return dict(sorted(found.items()))


def metrics_csv(path: Path) -> bytes:
    """The CSV of a progress file; empty where there are no metrics."""
    steps = metrics_by_step(path)
    columns = COLUMNS | {name: key for name, key in MORE.items() if any(key in row for row in steps.values())}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in steps.values():
        writer.writerow("" if (value := row.get(key)) is None else value for key in columns.values())
    return text.getvalue().encode() if steps else b""


def keep_metrics(session: Session, home: Home, job: Job, path: Path) -> str | None:
    """Store the CSV of a job; the file's id, None where there are no metrics."""
    content = metrics_csv(path)
    return keep(session, home, job, "step_metrics.csv", content) if content else None


def keep_report(session: Session, home: Home, job: Job, path: Path) -> str | None:
    """Store a report.html for the owner of a job; None where there is none."""
    try:
        return keep(session, home, job, "report.html", path.read_bytes())
    except FileNotFoundError:
        return None


def keep(session: Session, home: Home, job: Job, name: str, content: bytes) -> str:
    """Store a file of a job under an id that follows from both."""
    file_id = "file-" + hashlib.sha256(f"{job.id}/{name}".encode()).hexdigest()[:24]
    write_whole(home.ensure(home.root / "files") / file_id, content, is_private=True)
    row = session.scalars(select(File).where(File.id == file_id)).first() or File(id=file_id)
    row.tenant, row.filename, row.purpose = job.tenant, name, PURPOSE
    row.bytes, row.sha256, row.status = len(content), hashlib.sha256(content).hexdigest(), "processed"
    session.add(row)
    return file_id
