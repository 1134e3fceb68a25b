"""Jobs of the fine-tuning API, asked by OpenAI's own client on a real server with a queue that does nothing."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from sqlalchemy import func, select

from loraport.clients.home import Home
from loraport.serve.finetuning import sweep
from loraport.serve.finetuning.service import Quotas
from loraport.serve.jobs.recipe import TRAINING, VALIDATION, job_folder
from loraport.serve.store.changes import move, tell
from loraport.serve.store.tables import Checkpoint, Job, Status
from tests.finetuning import Api, Dropping, jsonl, send, serving
from tests.gateway import error_of


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One server for all tests that do not mind the jobs of others."""
    with serving(Home(tmp_path_factory.mktemp("jobs") / "home")) as running:
        yield running


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    """OpenAI's client of it."""
    return api.client()


@pytest.fixture(scope="module")
def rows(api: Api) -> str:
    """A file to train on."""
    return str(send(api.client()).id)


def refused(call: Callable[[], Any]) -> openai.APIStatusError:
    """The error that a call of the client ends in."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


def put(api: Api, job_id: str, before: Status, after: Status, **fields: Any) -> None:
    """Move a job, as the queue does."""
    with api.service.store.begin() as session:
        assert move(session, job_id, {before}, after, **fields)


def running(api: Api, client: openai.OpenAI, rows: str) -> str:
    """A job that runs."""
    job = client.fine_tuning.jobs.create(model="base", training_file=rows)
    put(api, job.id, Status.VALIDATING, Status.QUEUED, config={"epochs": 1})
    put(api, job.id, Status.QUEUED, Status.RUNNING, started_at=time.time())
    return job.id


def test_a_job_is_made_as_it_was_said(api: Api, client: openai.OpenAI, rows: str) -> None:
    woken, held_out = api.queue.woken, send(client, jsonl(3)).id
    made = client.fine_tuning.jobs.with_raw_response.create(
        model="reader-9m",
        training_file=rows,
        validation_file=held_out,
        suffix="tea-shop",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["t"]}}],
        extra_body={"loraport": {"rank": 8, "target_modules": ["q_proj"], "require": ["success>=0.9"]}},
    )
    job = FineTuningJob.model_validate_json(made.content, strict=True)
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", "reader-9m", 7)
    assert job.hyperparameters.to_dict() == {
        "n_epochs": 3,
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
    }
    assert job.method and job.method.supervised and job.method.supervised.hyperparameters
    assert (job.method.supervised.hyperparameters.n_epochs, job.metadata) == (3, {"team": "a"})
    assert (job.training_file, job.validation_file, job.result_files) == (rows, held_out, [])
    assert (job.error, job.fine_tuned_model, job.finished_at, job.trained_tokens) == (None, None, None, None)
    assert job.integrations and job.integrations[0].wandb.project == "p"
    assert (job.organization_id, job.model_extra and job.model_extra["suffix"]) == ("loraport", "tea-shop")
    assert api.queue.woken > woken
    folder = job_folder(api.service.home, job.id)
    client.files.delete(held_out)
    assert (folder / TRAINING).read_bytes() == jsonl() and (folder / VALIDATION).read_bytes() == jsonl(3)
    sweep.sweep(api.service)
    assert (folder / VALIDATION).exists()
    client.fine_tuning.jobs.cancel(job.id)
    sweep.sweep(api.service)
    assert not (folder / VALIDATION).exists()


def test_the_deprecated_form_means_the_same(client: openai.OpenAI, rows: str) -> None:
    job = client.fine_tuning.jobs.create(model="base", training_file=rows, hyperparameters={"n_epochs": 2})
    assert job.method and job.method.type == "supervised" and job.hyperparameters.n_epochs == 2


def test_preferences_are_trained_by_dpo(client: openai.OpenAI, rows: str) -> None:
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    job = client.fine_tuning.jobs.create(model="base", training_file=rows, method=method)
    assert job.method and job.method.dpo and job.method.dpo.hyperparameters
    assert job.method.dpo.hyperparameters.beta == 0.2


OURS = "loraport."


@pytest.mark.parametrize(
    ("said", "param", "words"),
    [
        ({"model": None}, "model", "valid string"),
        ({"training_file": "file-none"}, "training_file", "no file"),
        ({"validation_file": "file-none"}, "validation_file", "no file"),
        ({"method": {"type": "reinforcement"}}, "method.type", "not offered here"),
        ({"method": {"type": "magic"}}, "method.type", "'supervised', 'dpo' or 'reinforcement'"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "'supervised' is given"),
        ({"method": {"type": "supervised"}, "hyperparameters": {}}, "hyperparameters", "old form"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "at least 1"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs", "whole number"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters.learning_rate_multiplier", "above 0"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "Unknown parameter"),
        ({"suffix": "a:b"}, "suffix", "letters, digits"),
        ({"suffix": "a" * 65}, "suffix", "64"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"metadata": {"a" * 65: ""}}, "metadata", "64"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "512"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16 pairs"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations.0.wandb.project", "Missing"),
        ({"modle": "x"}, "modle", "Unknown parameter"),
        ({"loraport": {"rnk": 8}}, OURS + "rnk", "Did you mean 'rank'"),
        ({"loraport": {"rank": 0}}, OURS + "rank", "greater than or equal to 1"),
        ({"loraport": {"load": "int3"}}, OURS + "load", "nf4"),
        ({"loraport": {"preset": "huge"}}, "loraport", "there are minimal_r4_qv"),
        ({"loraport": {"data": "/etc/passwd"}}, OURS + "data", "Unknown parameter"),
        ({"loraport": {"check": "python:/x.py:f"}}, OURS + "check", "regex"),
        ({"loraport": {"check": "regex:("}}, OURS + "check", "no regular expression"),
        ({"loraport": {"require": ["sucess>=0.9"]}}, OURS + "require", "did you mean success"),
        ({"loraport": {"priority": 5}}, OURS + "priority", "admin key"),
        ({"loraport": {"priority": 1.5}}, OURS + "priority", "whole number"),
        ({"loraport": {"may_share": 1}}, OURS + "may_share", "true or false"),
        ({"loraport": {"gpus": 5000}}, OURS + "gpus", "1,024 GPUs"),
        ({"loraport": {"learning_rate": 1e-4}, "hyperparameters": {"learning_rate_multiplier": 2.0}}, "loraport", "'l"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(
    api: Api, rows: str, said: dict[str, Any], param: str, words: str
) -> None:
    response = api.http().post("/v1/fine_tuning/jobs", json={"model": "base", "training_file": rows} | said)
    error = error_of(response)
    assert response.status_code in (400, 403) and error["param"] == param and words in error["message"], error


def test_bodies_that_are_none_are_refused_in_openais_shape(api: Api) -> None:
    http = api.http()
    for body, kind in (
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b'{"model": "a", "model": "b"}', "application/json"),
        (b'{"suffix": "\\u0000"}', "application/json"),
        (b'{"suffix": "\\ud800"}', "application/json"),
        (b'{"loraport": {"alpha": 1e999}}', "application/json"),
        (b"{}", "text/plain"),
        (b"{" + b" " * (2 << 20) + b"}", "application/json"),
    ):
        response = http.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": kind})
        assert response.status_code in (400, 413, 415) and error_of(response)["code"] != "gateway_error", body[:40]


def test_only_the_base_that_is_served_is_trained(api: Api, client: openai.OpenAI, rows: str) -> None:
    create = client.fine_tuning.jobs.create
    error = refused(lambda: create(model="reader-9", training_file=rows))
    assert isinstance(error, openai.NotFoundError) and error.code == "model_not_found" and "reader-9m?" in error.message
    put(api, running(api, client, rows), Status.RUNNING, Status.SUCCEEDED, fine_tuned_model="ft:base:loraport::1")
    error = refused(lambda: create(model="ft:base:loraport::1", training_file=rows))
    assert isinstance(error, openai.BadRequestError) and "fine-tuned itself" in error.message
    other = send(client, purpose="user_data").id
    assert refused(lambda: create(model="base", training_file=other)).code == "invalid_file_purpose"


def test_a_job_sent_again_after_a_lost_answer_is_made_once(api: Api, rows: str) -> None:
    with Dropping(api.url) as proxy:
        client = api.client(max_retries=2).with_options(base_url=f"{proxy.url}/v1")
        job = client.fine_tuning.jobs.create(model="base", training_file=rows, metadata={"only": "once"})
        assert not proxy.lost
    again = api.client().fine_tuning.jobs
    assert [found.id for found in again.list(metadata={"only": "once"})] == [job.id]
    said: dict[str, Any] = {"model": "base", "training_file": rows, "metadata": {"only": "once"}}
    assert again.create(**said).id != job.id  # on purpose
    keyed = [again.create(**said, extra_headers={"Idempotency-Key": key}).id for key in ("k1", "k1", "k2")]
    assert keyed[0] == keyed[1] != keyed[2]
    reused = refused(lambda: again.create(**said, seed=1, extra_headers={"Idempotency-Key": "k1"}))
    assert reused.code == "idempotency_key_reused"


def test_a_job_that_waits_is_paused_resumed_and_cancelled_at_once(client: openai.OpenAI, rows: str) -> None:
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="base", training_file=rows)
    assert jobs.pause(job.id).to_dict()["status"] == "paused"
    assert "paused already" in refused(lambda: jobs.pause(job.id)).message
    assert jobs.resume(job.id).status == "validating_files"  # nobody has looked at its rows yet
    assert isinstance(refused(lambda: jobs.resume(job.id)), openai.BadRequestError)
    cancelled = jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at
    for call in (jobs.cancel, jobs.pause, jobs.resume):
        error = refused(lambda call=call: call(job.id))
        assert isinstance(error, openai.BadRequestError) and error.response.headers["x-should-retry"] == "false"
    assert jobs.list_events(job.id).data[0].message == "The job was cancelled."


def test_a_queued_job_that_was_paused_is_queued_again(api: Api, client: openai.OpenAI, rows: str) -> None:
    job = client.fine_tuning.jobs.create(model="base", training_file=rows)
    put(api, job.id, Status.VALIDATING, Status.QUEUED, config={"epochs": 1})
    client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"


def test_of_a_job_that_runs_it_is_said_what_is_wanted(api: Api, client: openai.OpenAI, rows: str) -> None:
    job_id, woken = running(api, client, rows), api.queue.woken
    paused = client.fine_tuning.jobs.pause(job_id).to_dict()
    assert (paused["status"], paused["loraport"]["wanted"]) == ("running", "pause")  # type: ignore[index]
    assert "being paused" in refused(lambda: client.fine_tuning.jobs.resume(job_id)).message
    cancelled = client.fine_tuning.jobs.cancel(job_id).to_dict()
    assert cancelled["loraport"]["wanted"] == "cancel" and api.queue.woken > woken  # type: ignore[index]
    assert "being cancelled" in refused(lambda: client.fine_tuning.jobs.pause(job_id)).message
    put(api, job_id, Status.RUNNING, Status.CANCELLED)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"


def test_a_request_to_cancel_waits_until_the_trainer_is_gone(api: Api, client: openai.OpenAI, rows: str) -> None:
    job_id = running(api, client, rows)
    wake = api.queue.wake
    api.queue.wake = lambda: put(api, job_id, Status.RUNNING, Status.CANCELLED)  # type: ignore[method-assign]
    try:
        assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    finally:
        api.queue.wake = wake  # type: ignore[method-assign]


def test_a_lost_answer_to_a_cancel_is_given_again(api: Api, rows: str) -> None:
    job = api.client().fine_tuning.jobs.create(model="base", training_file=rows)
    with Dropping(api.url) as proxy:
        client = api.client(max_retries=2).with_options(base_url=f"{proxy.url}/v1")
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_events_and_checkpoints_are_openais_objects(api: Api, client: openai.OpenAI, rows: str) -> None:
    job_id = running(api, client, rows)
    metrics = {"step": 40, "train_loss": 0.5, "full_valid_loss": 0.4, "learning_rate": 1e-4}
    with api.service.store.begin() as session:
        for step in range(1, 8):
            tell(session, job_id, f"Step {step}", data={"step": step, "train_loss": 1 / step}, is_metrics=True)
        for step in (20, 40):
            name = f"ft:base:loraport::{job_id}:ckpt-step-{step}"
            session.add(Checkpoint(job_id=job_id, step=step, model=name, adapter="a@v1", metrics=metrics))
    raw = client.fine_tuning.jobs.with_raw_response.list_events(job_id, limit=1)
    event = FineTuningJobEvent.model_validate(raw.http_response.json()["data"][0], strict=True)
    assert (event.type, event.message, event.level) == ("metrics", "Step 7", "info")
    assert isinstance(event.data, dict) and event.data["step"] == 7
    messages = [each.message for each in client.fine_tuning.jobs.list_events(job_id, limit=3)]
    assert len(messages) == len(set(messages)) == 11 and messages[-1] == f"Created fine-tuning job: {job_id}"
    found = client.fine_tuning.jobs.checkpoints.with_raw_response.list(job_id, limit=1)
    newest = FineTuningJobCheckpoint.model_validate(found.http_response.json()["data"][0], strict=True)
    assert (newest.step_number, newest.metrics.train_loss, newest.metrics.full_valid_loss) == (40, 0.5, 0.4)
    assert newest.fine_tuned_model_checkpoint.endswith(":ckpt-step-40")
    assert [each.step_number for each in client.fine_tuning.jobs.checkpoints.list(job_id, limit=1)] == [40, 20]


def test_a_job_that_failed_says_why(api: Api, client: openai.OpenAI, rows: str) -> None:
    job_id = running(api, client, rows)
    error = {"code": "invalid_training_file", "message": "row 3 is empty.", "param": "training_file"}
    put(api, job_id, Status.RUNNING, Status.FAILED, error=error, result_file="file-1", report_file="file-2")
    raw = client.fine_tuning.jobs.with_raw_response.retrieve(job_id)
    job = FineTuningJob.model_validate_json(raw.content, strict=True)
    assert job.error and job.error.to_dict() == error
    assert job.finished_at and job.result_files == ["file-1", "file-2"]


def test_pages_of_jobs_are_whole_and_filtered_by_metadata(home: Home) -> None:
    with serving(home) as api:
        client, jobs = api.client(), api.client().fine_tuning.jobs
        rows, odd = send(client).id, 'a"b].c$'
        labels = [{odd: "x"}, {odd: "y", "b": ""}, {}, {odd: "x", "b": "z"}, {"b": "'; --"}]
        made = [jobs.create(model="base", training_file=rows, metadata=each).id for each in labels]
        assert [job.id for job in jobs.list(limit=2)] == made[::-1]
        assert [job.id for job in jobs.list(limit=1, metadata={odd: "x"})] == [made[3], made[0]]
        assert [job.id for job in jobs.list(metadata={"b": ""})] == [made[1]]
        assert [job.id for job in jobs.list(metadata={odd: "x", "b": "z"})] == [made[3]]
        assert [job.id for job in jobs.list(metadata={"b": "'; --"})] == [made[4]]
        assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [made[2]]
        assert jobs.list(metadata={"c": "x"}).data == []
        for bad in ({"after": "ftjob-none"}, {"limit": 0}, {"limit": 1001}, {"extra_query": {"metadata": "x"}}):
            assert refused(lambda bad=bad: jobs.list(**bad)).status_code in (400, 404)
        job = jobs.retrieve(made[0])
        assert refused(lambda: jobs.list_events(job.id, after="ftevent-none")).code == "invalid_cursor"


def test_a_tenant_has_so_many_jobs_at_once(home: Home) -> None:
    with serving(home, quotas=Quotas(jobs=2)) as api:
        client = api.client(max_retries=2)
        rows = send(client).id
        made = [client.fine_tuning.jobs.create(model="base", training_file=rows).id for _ in range(2)]
        error = refused(lambda: client.fine_tuning.jobs.create(model="base", training_file=rows))
        assert isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota"
        assert sorted(path.name for path in (home.root / "jobs").iterdir()) == sorted(made)
        client.fine_tuning.jobs.pause(made[1])  # it still holds its rows
        assert refused(lambda: client.fine_tuning.jobs.create(model="base", training_file=rows)).status_code == 429
        client.fine_tuning.jobs.cancel(made[0])
        client.fine_tuning.jobs.create(model="base", training_file=rows)
        with api.service.store.read() as session:
            assert session.scalar(select(func.count()).select_from(Job)) == 3


def test_the_same_on_postgresql(home: Home, request: pytest.FixtureRequest) -> None:
    with serving(home, url=request.getfixturevalue("postgres").fresh()) as api:
        client, key = api.client(), 'a"b].c$'
        rows = send(client).id
        job = client.fine_tuning.jobs.create(model="base", training_file=rows, metadata={key: "x"})
        client.fine_tuning.jobs.create(model="base", training_file=rows)
        assert [found.id for found in client.fine_tuning.jobs.list(metadata={key: "x"})] == [job.id]
        assert len(client.fine_tuning.jobs.list(extra_query={"metadata": "null"}).data) == 1
        again = {"Idempotency-Key": "k"}
        twice = [client.fine_tuning.jobs.create(model="base", training_file=rows, extra_headers=again) for _ in "ab"]
        assert twice[0].id == twice[1].id
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert client.files.delete(rows).deleted and client.files.list().data == []
