"""What is refused before anything trains: with the real `loraport data check` and `plan train`, as processes."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from loraport.clients.home import Home
from loraport.serve.jobs.process import Bounds, Ran, run
from loraport.serve.jobs.recipe import job_folder
from loraport.serve.jobs.settings import QueueSettings
from loraport.serve.jobs.validate import Fit, Found, Later, Unfit, Validator, judge_plan
from loraport.serve.store.store import Store, open_store
from loraport.serve.store.tables import File, Job
from tests.queue_kit import wait_for

GIB = 1 << 30
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n}."}]}
    for n in range(12)
]


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    """An empty one."""
    store = open_store(home)
    yield store
    store.close()


def upload(store: Store, home: Home, rows: list[Any]) -> str:
    """A file as the API keeps it; text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file = File(tenant="ann", filename="rows.jsonl", purpose="fine-tune", bytes=1, sha256="")
    with store.begin() as session:
        session.add(file)
    (home.ensure(home.root / "files") / file.id).write_text("\n".join(lines) + "\n")
    return file.id


def job_of(training: str, validation: str | None = None, **options: Any) -> Job:
    """A job that is in no table."""
    return Job(
        id="ftjob-1",
        tenant="ann",
        model="base",
        training_file=training,
        validation_file=validation,
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        options=options,
        request_sha256="",
    )


def check(store: Store, home: Home, base: Path, job: Job, settings: QueueSettings | None = None) -> Found:
    """What is found."""
    return Validator(store, home, base, settings or QueueSettings()).check(job, lambda: False)


def test_good_rows_fit_and_are_linked(store: Store, home: Home, tiny_base: Path) -> None:
    file_id = upload(store, home, ROWS)
    found = check(store, home, tiny_base, job_of(file_id, rank=4))
    assert isinstance(found, Fit), found
    assert (found.gpus, found.gpu_bytes, found.config["rank"], found.config["epochs"]) == (1, None, 4, 2)
    folder = job_folder(home, "ftjob-1")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == found.config and config["name"] == "ftjob-1"
    (home.root / "files" / file_id).unlink()  # its owner deletes it: the job has its own
    assert len(Path(config["data"]).read_text().splitlines()) == 12
    assert (folder / "config.yaml").stat().st_mode & 0o777 == 0o600


def test_rows_at_fault_are_named(store: Store, home: Home, tiny_base: Path) -> None:
    bad = [*ROWS, {"messages": [{"role": "user", "content": "a"}]}, "not json", *ROWS]
    found = check(store, home, tiny_base, job_of(upload(store, home, bad)))
    assert isinstance(found, Unfit)
    assert (found.error["code"], found.error["param"]) == ("invalid_training_file", "training_file")
    assert "Line 13: no assistant turn" in found.error["message"] and "Line 14: not JSON" in found.error["message"]
    assert str(home.root) not in found.error["message"] and "--fix" not in found.error["message"]


def says(out: dict[str, Any], code: int) -> tuple[str, ...]:
    """A program that prints a document and ends with that code."""
    return (sys.executable, "-c", f"import sys; sys.stdout.write({json.dumps(out)!r}); sys.exit({code})")


def test_the_validation_file_is_named_where_it_is_at_fault(store: Store, home: Home) -> None:
    rows = [{"data": "eval", "file": "x", "row": 0, "detail": "line 1: no key 'messages'"}]
    found = {"kind": "file", "level": "error", "count": 1, "message": "1 file holds no rows.", "rows": rows}
    warned = {"kind": "few", "level": "warning", "count": 0, "message": "few.", "rows": []}
    job = job_of(upload(store, home, ROWS), upload(store, home, ROWS))
    unfit = Validator(store, home, "base", QueueSettings(), program=says({"findings": [found, warned]}, 3)).check(
        job, lambda: False
    )
    assert unfit == Unfit(
        {
            "code": "invalid_validation_file",
            "message": "1 file holds no rows. Line 1: no key 'messages'",
            "param": "validation_file",
        }
    )


def test_settings_that_contradict_each_other_are_refused_in_words(store: Store, home: Home, tiny_base: Path) -> None:
    found = check(store, home, tiny_base, job_of(upload(store, home, ROWS), rank=0))
    assert isinstance(found, Unfit) and found.error["code"] == "invalid_hyperparameters"
    assert "rank" in found.error["message"]


def test_what_does_not_fit_is_refused() -> None:
    verdict = "It does not fit: 30.1 GiB of 23.5 GiB."
    found = judge_plan(Ran(3, json.dumps({"fits": False, "verdict": verdict}), ()), {})
    assert found == Unfit({"code": "insufficient_memory", "message": verdict, "param": None})


def test_a_file_that_is_gone_is_a_reason(store: Store, home: Home, tiny_base: Path) -> None:
    found = check(store, home, tiny_base, job_of("file-none"))
    assert isinstance(found, Unfit) and "file-none is not there any more" in found.error["message"]


def test_a_machine_that_lacks_disk_is_asked_again(store: Store, home: Home) -> None:
    huge = says({"adapter_bytes": 1 << 60}, 0)
    found = Validator(store, home, "base", QueueSettings(), program=huge).check(
        job_of(upload(store, home, ROWS)), lambda: False
    )
    assert isinstance(found, Later) and found.error["code"] == "resources_lacking"
    assert str(home.root) not in found.error["message"]


def failing(error: dict[str, Any], code: int) -> tuple[str, ...]:
    """A program that ends as ours do with an error, and --json."""
    words = f"error: {error['message']}\nhint: {error['hint']}\n"
    script = (
        f"import sys; sys.stdout.write({json.dumps({'error': error})!r}); sys.stderr.write({words!r}); sys.exit({code})"
    )
    return (sys.executable, "-c", script)


def test_a_check_for_which_the_machine_lacks_something_is_done_again(store: Store, home: Home) -> None:
    error = {"kind": "ResourceError", "message": f"no disk space left while writing {home.root}/cache.", "hint": "free"}
    job = job_of(upload(store, home, ROWS))
    found = Validator(store, home, "base", QueueSettings(), program=failing(error, 3)).check(job, lambda: False)
    assert isinstance(found, Later) and found.error["code"] == "resources_lacking"
    assert found.error["message"] == "no disk space left while writing the home/cache."
    error["kind"] = "DataError"
    found = Validator(store, home, "base", QueueSettings(), program=failing(error, 3)).check(job, lambda: False)
    assert isinstance(found, Unfit) and found.error["code"] == "invalid_training_file"


@pytest.mark.parametrize("code", [1, 2, 3])
def test_no_path_of_this_machine_reaches_a_client(store: Store, home: Home, tmp_path: Path, code: int) -> None:
    folder = job_folder(home, "ftjob-1")
    words = f"{folder}/training.jsonl, {folder}, {home.root}/x and {tmp_path}/bases/model."
    program = failing({"kind": "DataError", "message": words, "hint": f"look at {home.root}"}, code)
    validator = Validator(store, home, tmp_path / "bases" / "model", QueueSettings(), program=program)
    found = validator.check(job_of(upload(store, home, ROWS)), lambda: False)
    assert isinstance(found, Unfit | Later) and "/" not in found.error["message"].replace("the home/x", "")


@pytest.mark.parametrize(
    ("command", "kind"),
    [(("plan", "train", "--model", "/none"), "BaseModelError"), (("data", "check", "/none.jsonl"), "ConfigError")],
)
def test_an_error_of_a_check_is_its_document(command: tuple[str, ...], kind: str, home: Home) -> None:
    words = [sys.executable, "-m", "loraport_cli", *command, "--json"]
    ran = run(words, home.ensure(home.root), "check", Bounds(120.0, 16 * GIB), lambda: False)
    error = json.loads(ran.out)["error"]
    assert error["exit_code"] == ran.code and error["kind"] == kind
    assert f"error: {error['message']}" in ran.said and f"hint: {error['hint']}" in ran.said


def test_a_gpu_and_hours_of_a_plan_are_what_the_queue_goes_by(store: Store, home: Home) -> None:
    plan = {"gpu": {"kind": "cuda"}, "peak_memory_bytes": 7 * GIB, "hours": 0.5, "adapter_bytes": 10}
    found = Validator(store, home, "base", QueueSettings(), 80 * GIB, says(plan, 0)).check(
        job_of(upload(store, home, ROWS), gpus=2), lambda: False
    )
    assert isinstance(found, Fit) and (found.gpu_bytes, found.estimated_s, found.gpus) == (7 * GIB, 1800.0, 2)


@pytest.mark.parametrize(
    ("program", "settings", "words"),
    [
        ("x = bytearray(1 << 30)", QueueSettings(check_bytes=1 << 28), "more memory than it may take"),
        ("import time; time.sleep(60)", QueueSettings(check_s=0.5), "took too long"),
    ],
)
def test_a_check_is_bounded(store: Store, home: Home, program: str, settings: QueueSettings, words: str) -> None:
    validator = Validator(store, home, "base", settings, program=(sys.executable, "-c", program))
    found = validator.check(job_of(upload(store, home, ROWS)), lambda: False)
    assert isinstance(found, Unfit) and words in found.error["message"]


def test_a_check_that_crashes_is_asked_again(store: Store, home: Home) -> None:
    crash = (sys.executable, "-c", "import os; os.kill(os.getpid(), 11)")
    found = Validator(store, home, "base", QueueSettings(), program=crash).check(
        job_of(upload(store, home, ROWS)), lambda: False
    )
    assert isinstance(found, Later) and "139" in found.error["message"]


def test_a_check_that_nobody_wants_ends(store: Store, home: Home) -> None:
    wait = (sys.executable, "-c", "import time; time.sleep(60)")
    began = time.monotonic()
    validator = Validator(store, home, "base", QueueSettings(), program=wait)
    assert validator.check(job_of(upload(store, home, ROWS)), lambda: time.monotonic() - began > 0.3) is None


def test_a_process_ends_with_its_server(tmp_path: Path) -> None:
    program = """
from pathlib import Path
from loraport.serve.jobs.process import Bounds, Ran, run
import sys
words = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
run([sys.executable, "-c", words], Path("."), "check", Bounds(60.0, 1 << 30), lambda: False)
"""
    server = psutil.Popen([sys.executable, "-c", program], cwd=tmp_path, env=dict(os.environ))
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert psutil.Process(pid).nice() >= 10
    server.kill()
    server.wait()
    wait_for(lambda: not psutil.pid_exists(pid))


def test_a_process_knows_none_of_the_servers_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPORT_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    words = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    ran = run(words, tmp_path, "check", Bounds(60.0, GIB), lambda: False)
    assert ran.code == 0 and "secret" not in json.loads(ran.out).values()
