"""What trainers say, told once; how they end, judged; and what is kept of it."""

import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from loraport.clients.errors import ResourceError
from loraport.clients.home import Home
from loraport.serve.jobs.follow import KEPT_METRICS, Follower, Line, all_lines, read_lines
from loraport.serve.jobs.outcome import Done, Fault, Outcome, Refused, Short, judge
from loraport.serve.jobs.results import metrics_csv
from loraport.serve.jobs.words import LONGEST, clean, failure, last_lines
from loraport.serve.runners.seams import Exit
from loraport.serve.store.store import Store, open_store
from loraport.serve.store.tables import Event
from tests.queue_kit import get, submit


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    """An empty one."""
    store = open_store(home)
    yield store
    store.close()


def write(path: Path, *lines: Any) -> None:
    """Append lines, each an object or raw text."""
    with path.open("ab") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps({"at": 1.0} | line).encode() + b"\n")


def metrics(step: int, steps: int = 9, **more: Any) -> dict[str, Any]:
    """A line of metrics."""
    return {"type": "metrics", "step": step, "steps": steps, "train_loss": 1.0 / step, "tokens": step * 10} | more


def told(store: Store, job_id: str) -> list[str]:
    """All events of a job."""
    with store.read() as session:
        return list(session.scalars(select(Event.message).where(Event.job_id == job_id).order_by(Event.seq)))


def test_lines_are_told_as_they_come_and_a_half_line_when_it_is_whole(store: Store, tmp_path: Path) -> None:
    path, job_id = tmp_path / "progress.jsonl", submit(store)
    follower = Follower(store, job_id, path)
    assert not follower.advance()
    whole = json.dumps(metrics(2)).encode() + b"\n"
    write(path, metrics(1, left_s=99.0), whole[:20])
    assert follower.advance() and told(store, job_id) == ["Step 1/9: training loss=1.00"]
    assert not follower.advance()
    write(path, whole[20:])
    assert follower.advance() and told(store, job_id)[1:] == ["Step 2/9: training loss=0.50"]
    job = get(store, job_id)
    assert job.trained_tokens == 20 and job.estimated_finish == 100.0 and job.progress_bytes == path.stat().st_size


def test_what_is_no_line_of_ours_is_passed_over(store: Store, tmp_path: Path) -> None:
    path, job_id = tmp_path / "progress.jsonl", submit(store)
    write(path, b'{"type": "met\n', b"\xff\xfe\n", b"[1]\n", b'{"type": 7}\n', {"type": "later"}, metrics(1))
    write(path, {"type": "metrics", "step": "x", "train_loss": "nan"})
    Follower(store, job_id, path).finish()
    assert told(store, job_id) == ["Step 1/9: training loss=1.00"]


def test_who_goes_on_reading_tells_nothing_twice(store: Store, tmp_path: Path) -> None:
    path, job_id = tmp_path / "progress.jsonl", submit(store)
    dice = random.Random(1)
    content = b"".join(json.dumps({"at": 1.0} | metrics(step, 40)).encode() + b"\n" for step in range(1, 41))
    follower = Follower(store, job_id, path)
    while content:
        cut = dice.randint(1, 300)
        write(path, content[:cut])
        content = content[cut:]
        if dice.random() < 0.5:
            follower = Follower(store, job_id, path)  # another server
        follower.advance()
    assert told(store, job_id) == [f"Step {step}/40: training loss={1 / step:.2f}" for step in range(1, 41)]


def test_a_store_that_fails_in_between_loses_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, job_id = tmp_path / "progress.jsonl", submit(store)
    write(path, metrics(1), metrics(2))
    follower = Follower(store, job_id, path)

    def fail(*_: object, **__: object) -> None:
        raise ResourceError("it is gone.")

    with monkeypatch.context() as patch, pytest.raises(ResourceError):
        patch.setattr("loraport.serve.jobs.follow.update", fail)
        follower.advance()
    assert told(store, job_id) == []
    follower.finish()
    assert len(told(store, job_id)) == 2


def test_steps_that_are_trained_again_are_not_told_again(store: Store, tmp_path: Path) -> None:
    path, job_id = tmp_path / "progress.jsonl", submit(store)
    write(path, metrics(1), metrics(2), metrics(3), {"type": "start", "steps": 9, "first_step": 2, "rows": 5})
    Follower(store, job_id, path).finish()
    write(path, metrics(3, train_loss=0.9), metrics(4))
    Follower(store, job_id, path).finish()
    assert [line for line in told(store, job_id) if line.startswith("Step 3")] == ["Step 3/9: training loss=0.33"]
    assert "Training goes on behind step 2 of 9." in told(store, job_id)
    rows = list(csv.DictReader(io.StringIO(metrics_csv(path).decode())))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and rows[2]["train_loss"] == "0.9"


def test_of_a_long_run_some_metrics_are_told_and_all_are_kept(store: Store, tmp_path: Path) -> None:
    path, job_id = tmp_path / "progress.jsonl", submit(store)
    write(path, *(metrics(step, 5000) for step in range(1, 5001)))
    Follower(store, job_id, path).finish()
    assert KEPT_METRICS <= len(told(store, job_id)) <= KEPT_METRICS + 2
    assert metrics_csv(path).count(b"\n") == 5001


def test_a_line_of_many_megabytes_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    write(path, {"type": "start", "derived": "x" * 3_000_000}, metrics(1))
    assert [line.type for line in all_lines(path)] == ["start", "metrics"]
    assert read_lines(tmp_path / "none", 5) == ([], 5)


ADAPTER = {
    "type": "adapter",
    "name": "ftjob-1",
    "version": "v1",
    "folder": "/home/me/adapters/ftjob-1/v1",
    "metrics": {"eval_loss": 0.5, "note": "x"},
    "trained_tokens": 90.0,
    "checkpoints": [{"name": "ftjob-1.step-2", "version": "v1", "step": 2, "metrics": None}],
}
NAMES = {"/jobs/1/training.jsonl": "training_file", "/jobs/1/validation.jsonl": "validation_file", "/jobs/1": "ftjob-1"}


def error(kind: str, exit_code: int, message: str = "it is wrong.", **more: Any) -> dict[str, Any]:
    """The last words of a trainer."""
    return {"type": "error", "kind": kind, "exit_code": exit_code, "message": message, "hint": ""} | more


def end(code: int | None, *said: dict[str, Any], log: tuple[str, ...] = ()) -> Outcome:
    """What is made of an end."""
    return judge(Exit(code), [Line(0, each) for each in said], NAMES, log)


def test_an_end_with_an_adapter_is_done() -> None:
    for code in (0, None):  # None: the machine went down behind the last line
        found = end(code, metrics(1), ADAPTER)
        assert isinstance(found, Done) and found.trained.trained_tokens == 90
        assert found.trained.metrics == {"eval_loss": 0.5} and found.trained.checkpoints[0].step == 2


@pytest.mark.parametrize(
    ("said", "code", "param"),
    [
        (error("DataError", 3, file="/jobs/1/training.jsonl", row=4), "invalid_training_file", "training_file"),
        (error("DataError", 3, file="/jobs/1/validation.jsonl", row=4), "invalid_validation_file", "validation_file"),
        (error("ConfigError", 2, param="rank"), "invalid_hyperparameters", "rank"),
        (error("BaseModelError", 3), "training_refused", None),
    ],
)
def test_what_is_refused_names_what_is_at_fault(said: dict[str, Any], code: str, param: str | None) -> None:
    for exit_code in (said["exit_code"], None):
        found = end(exit_code, said)
        assert isinstance(found, Refused) and (found.error["code"], found.error["param"]) == (code, param)


def test_a_row_is_named_and_no_path_of_the_machine() -> None:
    said = error("DataError", 3, "/jobs/1/training.jsonl, line 7: empty.", file="/jobs/1/training.jsonl", row=7)
    found = end(3, said | {"hint": "correct the row"})
    assert isinstance(found, Refused)
    assert found.error["message"] == "training_file, line 7: empty. Correct the row."


def test_requirements_that_were_missed_are_no_fault() -> None:
    found = end(4, ADAPTER, error("Shortfall", 4, "success is 0.1, not 0.9."))
    assert isinstance(found, Short) and found.folder == "/home/me/adapters/ftjob-1/v1"
    assert found.error["code"] == "requirements_not_met" and "0.1" in found.error["message"]


@pytest.mark.parametrize(
    ("code", "said", "words", "counts"),
    [
        (3, [error("ResourceError", 3, "no disk space left.")], "no disk space", True),
        (3, [error("EndpointError", 3, "the hub does not answer.")], "the hub", True),
        (1, [error("LoraportError", 1, "this is a bug of ours: KeyError")], "a bug of ours", True),
        (137, [], "SIGKILL (memory ran out", True),
        (163, [], "signal 35", True),
        (143, [{"type": "stopped", "step": 4}], "SIGTERM", False),
        (None, [], "nobody saw its end", False),
        (0, [], "exit code 0", True),
    ],
)
def test_what_the_machine_did_is_a_fault(code: int | None, said: list[Any], words: str, counts: bool) -> None:
    found = end(code, *said, log=("a", "the last line"))
    assert isinstance(found, Fault) and words in found.error["message"] and found.counts == counts


def test_a_refusal_without_words_is_not_tried_again() -> None:
    found = end(3, log=("Traceback", "KeyError: 7"))
    assert isinstance(found, Refused) and "KeyError: 7" in found.error["message"]


def test_words_for_clients_are_short_and_safe(tmp_path: Path) -> None:
    assert clean("a\x1b[31mb") == r"a\x1b[31mb" and len(clean("x" * 9999)) == LONGEST
    assert failure("c", "It is so. ", hint="do this.")["message"] == "It is so. Do this."
    log = tmp_path / "log"
    log.write_bytes(b"\xffone\n\n  \ntwo\n" * 9999)
    assert last_lines(log, 1) == ["two"] and last_lines(tmp_path / "none") == []
