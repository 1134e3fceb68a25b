"""`loraport jobs` against the API on a real server; nothing is trained, the test does what a queue would."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from loraport.clients.endpoint import EndpointRecord, process_identity
from loraport.clients.errors import ConfigError, EndpointError, Refused, Shortfall, UsageError
from loraport.clients.home import Home
from loraport.clients.models import ModelCard
from loraport.serve.finetuning.options import Options
from loraport.serve.gateway.cli import keys_create, keys_revoke
from loraport.serve.store.changes import move, tell
from loraport.serve.store.store import open_store
from loraport.serve.store.tables import Checkpoint, File, Job, Status
from loraport.serve.terminal import cli, submission
from loraport.serve.terminal.submission import Wish, key_for, settings_of
from tests.conftest import ROOT
from tests.finetuning import Api, jsonl, serving


@pytest.fixture
def api(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An API that every command finds."""
    away = EndpointError("the engine is away.")  # which it is; the client would ask it three times, for ten seconds

    def list_models(_: object) -> list[ModelCard]:
        raise away

    monkeypatch.setattr(submission, "list_models", list_models)
    with serving(home) as api:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
        yield api


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of rows."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl())
    return path


def created(api: Api, capsys: pytest.CaptureFixture[str], *given: Any, **more: Any) -> dict[str, Any]:
    """The job that `submit --json` prints."""
    cli.jobs_submit(*given, **more, json=True)
    return dict(json.loads(capsys.readouterr().out))


def test_flags_become_openais_words_and_ours(
    api: Api, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"epochs": 2, "rank": 8, "suffix": "support", "seed": 7, "metadata": ["team=docs"]}
    job = created(api, capsys, rows, **flags, setting=["save-steps=5", "target_modules=[q_proj, v_proj]"])
    assert (job["model"], job["suffix"], job["seed"], job["metadata"]) == ("base", "support", 7, {"team": "docs"})
    assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 2
    options = {"rank": 8, "save_steps": 5, "target_modules": ["q_proj", "v_proj"]}
    assert job["loraport"]["options"] == options and job["status"] == "validating_files"


def test_a_run_configuration_becomes_the_same_job(
    api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [ModelCard("base", root="reader-9m"), ModelCard("ft:x", parent="base")]
    monkeypatch.setattr(submission, "list_models", lambda _: cards)
    job = created(api, capsys, config=ROOT / "examples/demo/train.yaml", epochs=3)
    said = job["method"]["supervised"]["hyperparameters"]
    assert (job["model"], job["suffix"], said["n_epochs"], said["batch_size"]) == ("reader-9m", "demo", 3, 16)
    assert job["loraport"]["options"]["learning_rate"] == 1e-3 and job["validation_file"]


def test_preferences_are_told_by_their_method(rows: Path) -> None:
    wish = Wish.of(None, {"data": rows, "method": "dpo", "beta": 0.2, "epochs": 1.0}, {})
    assert wish.body["method"] == {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "beta": 0.2}}}


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({}, ConfigError, "there are no rows to train on"),
        ({"data": Path("nowhere.jsonl")}, UsageError, "there is no file nowhere.jsonl"),
        ({"data": Path("rows"), "setting": ["rank"]}, UsageError, "--set rank is no KEY=VALUE"),
        ({"data": Path("rows"), "setting": ["rank=["]}, UsageError, "no YAML"),
        ({"data": Path("rows"), "metadata": ["=x"]}, UsageError, "--metadata =x is no KEY=VALUE"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_sent(api: Api, given: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words.replace("[", r"\[")):
        cli.jobs_submit(**given)
    assert settings_of(["a-b=1"]) == {"a_b": 1}


def test_what_is_refused_leaves_no_file_behind(api: Api, rows: Path) -> None:
    with pytest.raises(Refused, match=r"Unknown parameter: 'loraport.rnk'\. Did you mean 'rank'"):
        cli.jobs_submit(rows, setting=["rnk=8"])
    with pytest.raises(Refused, match=r"There is no model 'gpt' to fine-tune\. This endpoint trains reader-9m"):
        cli.jobs_submit(rows, model="gpt")
    with api.service.store.read() as session:
        assert [file.status for file in session.scalars(select(File))] in ([], ["deleted"] * 2)


def test_jobs_are_listed_shown_paused_and_cancelled(api: Api, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.jobs_list()
    assert "no jobs yet; create one" in capsys.readouterr().err
    first, second = (created(api, capsys, rows, suffix=name)["id"] for name in ("one", "two"))
    cli.jobs_list(json=True)
    assert [job["id"] for job in json.loads(capsys.readouterr().out)] == [second, first]
    cli.jobs_list()
    assert first in capsys.readouterr().err
    cli.jobs_pause(first)
    assert f"{first} is paused." in capsys.readouterr().err
    cli.jobs_resume(first)
    assert f"{first} is validating_files." in capsys.readouterr().err
    cli.jobs_cancel(first, json=True)
    assert json.loads(capsys.readouterr().out)["status"] == "cancelled"
    with pytest.raises(Refused, match="The job has already been cancelled"):
        cli.jobs_cancel(first)
    with pytest.raises(Refused, match="There is no fine-tuning job 'ftjob-none'"):
        cli.jobs_show("ftjob-none")


def run(api: Api, job_id: str, after: Status, **fields: Any) -> None:
    """What a queue does with a job."""
    with api.service.store.begin() as session:
        assert move(session, job_id, {Status.VALIDATING}, Status.QUEUED)
        assert move(session, job_id, {Status.QUEUED}, Status.RUNNING, attempt=1)
        tell(session, job_id, "Step 1/2: training loss=2.50", is_metrics=True)
        session.add(
            Checkpoint(job_id=job_id, step=1, model="ft:x:ckpt-step-1", adapter="a@v1", metrics={"train_loss": 2.5})
        )
        assert move(session, job_id, {Status.RUNNING}, after, **fields)


def test_a_job_is_followed_to_its_end(
    api: Api, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "LOOK_S", 0.05)
    job_id = created(api, capsys, rows)["id"]
    queue = threading.Timer(0.3, run, (api, job_id, Status.SUCCEEDED), {"fine_tuned_model": "ft:x"})
    queue.start()
    cli.jobs_watch(job_id)
    said = capsys.readouterr().err
    order = ["Created fine-tuning job", "Step 1/2: training loss=2.50", "successfully completed", "ft:x answers"]
    assert [said.count(words) for words in order] == [1] * 4
    assert sorted(order, key=said.index) == order
    object.__setattr__(api.service, "gpu_price", 2.0)
    with api.service.store.begin() as session:
        session.scalars(select(Job)).one().gpu_s = 5400.0
    cli.jobs_show(job_id)
    shown = capsys.readouterr().err
    assert "GPU-hours  1.500, which costs 3.00" in shown
    assert "ft:x:ckpt-step-1  train_loss 2.500" in shown and "succeeded" in shown
    cli.jobs_show(job_id, json=True)
    assert json.loads(capsys.readouterr().out)["checkpoints"][0]["step_number"] == 1


@pytest.mark.parametrize(("code", "kind"), [("invalid_training_file", Refused), ("requirements_not_met", Shortfall)])
def test_the_end_of_a_failed_job_is_the_commands(
    api: Api, rows: Path, capsys: pytest.CaptureFixture[str], code: str, kind: type[Exception]
) -> None:
    job_id = created(api, capsys, rows)["id"]
    run(api, job_id, Status.FAILED, error={"code": code, "message": "row 3 has no answer.", "param": None})
    with pytest.raises(kind, match="has failed: row 3 has no answer"):
        cli.jobs_watch(job_id)
    assert "The job has failed: row 3 has no answer." in capsys.readouterr().err


def test_all_that_a_trainer_says_is_printed(
    api: Api, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "LOOK_S", 0.05)
    monkeypatch.setattr("loraport.serve.finetuning.own.MOST_BYTES", 40)
    job_id = created(api, capsys, rows)["id"]
    cli.jobs_logs(job_id)
    assert capsys.readouterr().out == ""
    log = api.service.home.root / "jobs" / job_id / "train.log"
    text = "".join(f"line {number} – of the log\n" for number in range(20))
    log.write_text(text)
    cli.jobs_logs(job_id)
    assert capsys.readouterr().out == text

    def end() -> None:
        with log.open("a") as file:
            file.write("the end\n")
        run(api, job_id, Status.SUCCEEDED, fine_tuned_model="ft:x")

    threading.Timer(0.3, end).start()
    cli.jobs_logs(job_id, follow_it=True)
    assert capsys.readouterr().out == f"{text}the end\n"


def test_a_trainer_does_not_steer_the_terminal_and_tells_no_places(
    api: Api, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraport.serve.finetuning.own.MOST_BYTES", 200)
    job_id = created(api, capsys, rows)["id"]
    root, user = api.service.home.root, Path.home()
    lines = [f"{root}/jobs/{job_id}/training.jsonl", f"{user}/lib/x.py", "\x1b]0;owned\x07\x1b[2J", " 10%\r 20%"]
    (root / "jobs" / job_id / "train.log").write_text("".join(f"{line}\n" for line in [*lines, *map(str, range(100))]))
    cli.jobs_logs(job_id)
    shown = [f"$LORAPORT_HOME/jobs/{job_id}/training.jsonl", "~/lib/x.py", r"\x1b]0;owned\x07\x1b[2J", " 10%", " 20%"]
    assert capsys.readouterr().out.split("\n") == [*shown, *map(str, range(100)), ""]
    answer = api.http().get(f"/v1/fine_tuning/jobs/{job_id}/log")
    assert str(root) not in answer.text and int(answer.headers["x-log-end"]) > len(answer.content)


def test_another_tenant_reads_no_log(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(home, has_keys=True) as api:
        job = Job(tenant="ann", model="base", training_file="file-1", seed=1, method={}, request_sha256="")
        with api.service.store.begin() as session:
            session.add(job)
        log = api.service.home.ensure(home.root / "jobs" / job.id) / "train.log"
        log.write_text("secret\n")
        path = f"/v1/fine_tuning/jobs/{job.id}/log"
        answers = {name: api.http(api.key(name, is_admin=name == "root")).get(path) for name in ("ann", "bob", "root")}
        assert {name: answer.status_code for name, answer in answers.items()} == {"ann": 200, "bob": 404, "root": 200}
        assert answers["ann"].text == "secret\n" and answers["ann"].headers["x-log-end"] == "7"


def test_a_table_of_all_jobs_where_nobody_looks(api: Api, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = created(api, capsys, rows)["id"]
    cli.jobs_watch()
    assert job_id in capsys.readouterr().err


def test_without_an_endpoint_it_says_how_to_start_one(home: Home) -> None:
    with pytest.raises(EndpointError, match="no endpoint of Loraport runs on this machine"):
        cli.jobs_list()


def test_the_owners_key_is_sent_where_none_is_set(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    record = EndpointRecord("http://x/v1", 1, ["base"], [], None, process_identity(1), None, "lp-own")
    assert key_for(record) == "lp-own" and key_for(None) == "loraport"
    monkeypatch.setenv("LORAPORT_API_KEY", "lp-mine")
    assert key_for(record) == "lp-mine"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"policy": "never"}, "--jobs-policy never is not known"),
        ({"policy": "wait"}, "needs to know when"),
        ({"policy": "wait", "window": "night"}, "--jobs-window night is no time"),
        ({"window": "22:00-06:00"}, "is for --jobs-policy wait"),
        ({"database": "postgresql://me:secret@box/jobs"}, "holds a password"),
        ({"database": "postgresql://box/jobs?user=me&password=secret"}, "holds a password"),
    ],
)
def test_options_of_serve_that_cannot_be(given: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Options.of(**given)
    assert "secret" not in caught.value.message + caught.value.hint


def test_the_database_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPORT_JOBS_DATABASE", "postgresql://me:secret@box/jobs")
    options = Options.of()
    assert options.database == "postgresql://me:secret@box/jobs" and "secret" not in repr(options)
    assert Options.of(database="postgresql://box/jobs").database == "postgresql://box/jobs"


def test_a_key_that_inherits_is_told_so(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    keys_create("first")
    assert "earlier key" not in capsys.readouterr().err  # there is no database
    store = open_store(home)
    with store.begin() as session:
        session.add(Job(tenant="ann", model="base", training_file="f", seed=1, method={}, request_sha256=""))
        for status in ("processed", "processed", "deleted"):
            session.add(File(tenant="ann", filename="", purpose="", bytes=1, sha256="", status=status))
    keys_create("ann")
    assert "2 files and 1 job of an earlier key named ann" in capsys.readouterr().err
    store.close()
    keys_revoke("ann")
    code = "import sys; from loraport.serve.gateway.cli import keys_create as create; create('ann'); create('bob'); "
    code += "assert 'sqlalchemy' not in sys.modules"
    given = {"env": os.environ | {"LORAPORT_HOME": str(home.root)}, "capture_output": True, "text": True}
    said: Any = subprocess.run([sys.executable, "-c", code], **given)  # type: ignore[call-overload]
    assert said.returncode == 0 and said.stderr.count("earlier key named ann") == 1 == said.stderr.count("earlier key")
