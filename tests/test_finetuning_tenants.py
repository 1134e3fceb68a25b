"""Whose things are whose: two keys and an admin's, permissions, webhooks, and what faces a network."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai.types.webhooks import WebhookEndpoint, WebhookEndpointWithSecret
from sqlalchemy import select, update

from loraport.clients.errors import EndpointError
from loraport.clients.home import Home
from loraport.serve.finetuning.api import routes
from loraport.serve.finetuning.service import Quotas, no_queue
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.server import run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState
from loraport.serve.store.changes import move
from loraport.serve.store.tables import Checkpoint, Job, Status, Webhook
from tests.finetuning import Api, Dropping, send, serving
from tests.gateway import error_of

MODEL = "ft:org/base:ann:tea:9f86d081884c"
KINDS = ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]


@dataclass
class Two:
    """Ann, who has things; Bob, who has none; and an administrator."""

    api: Api
    ann: openai.OpenAI
    bob: openai.OpenAI
    boss: openai.OpenAI
    keys: dict[str, str]
    file: str
    job: str
    upload: str
    webhook: str


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """An endpoint with keys, and Ann's things."""
    with serving(Home(tmp_path_factory.mktemp("tenants") / "home"), has_keys=True) as api:
        keys = {name: api.key(name, is_admin=name == "boss") for name in ("ann", "bob", "boss")}
        ann, bob, boss = (api.client(key) for key in keys.values())
        file = send(ann).id
        job = ann.fine_tuning.jobs.create(model="base", training_file=file).id
        with api.service.store.begin() as session:
            move(session, job, {Status.VALIDATING}, Status.RUNNING)
            move(session, job, {Status.RUNNING}, Status.SUCCEEDED, fine_tuned_model=MODEL, adapter="a@v1")
            step = f"{MODEL}:ckpt-step-40"
            session.add(Checkpoint(job_id=job, step=40, model=step, adapter="b@v1", metrics={}))
        upload = ann.uploads.create(bytes=9, filename="a", mime_type="text/jsonl", purpose="fine-tune").id
        webhook = ann.webhooks.create(name="mine", url="https://ann.example/hook", event_types=KINDS).id  # type: ignore[arg-type]
        yield Two(api, ann, bob, boss, keys, file, job, upload, webhook)


def refused(call: Callable[[], Any]) -> openai.APIStatusError:
    """The error that a call of the client ends in."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


def test_what_is_anothers_is_answered_as_what_is_not_there(two: Two) -> None:
    http = two.api.http(two.keys["bob"])
    complete, grant = {"part_ids": ["x"]}, {"project_ids": ["x"]}
    for method, path, id, body in (
        ("GET", "/files/{}", two.file, None),
        ("GET", "/files/{}/content", two.file, None),
        ("DELETE", "/files/{}", two.file, None),
        ("GET", "/fine_tuning/jobs/{}", two.job, None),
        ("GET", "/fine_tuning/jobs/{}/events", two.job, None),
        ("GET", "/fine_tuning/jobs/{}/checkpoints", two.job, None),
        ("POST", "/fine_tuning/jobs/{}/cancel", two.job, None),
        ("POST", "/fine_tuning/jobs/{}/pause", two.job, None),
        ("POST", "/fine_tuning/jobs/{}/resume", two.job, None),
        ("POST", "/uploads/{}/cancel", two.upload, None),
        ("POST", "/uploads/{}/complete", two.upload, complete),
        ("GET", "/fine_tuning/checkpoints/{}/permissions", MODEL, None),
        ("POST", "/fine_tuning/checkpoints/{}/permissions", MODEL, grant),
        ("GET", "/webhook_endpoints/{}", two.webhook, None),
        ("POST", "/webhook_endpoints/{}", two.webhook, {"name": "x"}),
        ("POST", "/webhook_endpoints/{}/rotate_secret", two.webhook, {}),
        ("DELETE", "/webhook_endpoints/{}", two.webhook, None),
        ("GET", "/files?after={}", two.file, None),
        ("GET", "/fine_tuning/jobs?after={}", two.job, None),
    ):
        none = id[:-1] + ("0" if id[-1] != "0" else "1")
        answers = [http.request(method, "/v1" + path.format(each), json=body) for each in (id, none)]
        assert [answer.status_code for answer in answers] == [404, 404], path
        assert answers[0].text.replace(id, none) == answers[1].text, path
    part = http.post(f"/v1/uploads/{two.upload}/parts", files={"data": b"{}"})
    assert part.status_code == 404
    create = two.bob.fine_tuning.jobs.create
    assert "no file" in refused(lambda: create(model="base", training_file=two.file)).message
    assert refused(lambda: create(model=MODEL, training_file=two.file)).code == "model_not_found"


def test_lists_hold_ones_own(two: Two) -> None:
    for client, count in ((two.ann, 1), (two.bob, 0), (two.boss, 1)):
        assert len(client.files.list().data) == count
        assert len(client.fine_tuning.jobs.list().data) == count
        assert len(client.webhooks.list().data) == count


def test_an_admin_sees_and_changes_everybodys(two: Two) -> None:
    assert two.boss.fine_tuning.jobs.retrieve(two.job).organization_id == "ann"
    other = send(two.ann).id
    assert two.boss.files.delete(other).deleted
    job = two.boss.fine_tuning.jobs.create(
        model="base", training_file=two.file, extra_body={"loraport": {"priority": 9}}
    )
    assert job.to_dict()["loraport"]["priority"] == 9  # type: ignore[index]
    assert isinstance(refused(lambda: two.ann.fine_tuning.jobs.retrieve(job.id)), openai.NotFoundError)
    two.boss.fine_tuning.jobs.cancel(job.id)


def test_a_quota_is_each_tenants_own(home: Home) -> None:
    with serving(home, has_keys=True, quotas=Quotas(files=1)) as api:
        ann, bob = api.client(api.key("ann")), api.client(api.key("bob"))
        send(ann)
        assert refused(lambda: send(ann)).code == "insufficient_quota"
        send(bob)


def test_a_model_is_shared_and_no_longer(two: Two) -> None:
    permissions = two.ann.fine_tuning.checkpoints.permissions
    for model in (MODEL, f"{MODEL}:ckpt-step-40"):
        made = list(permissions.create(model, project_ids=["bob", "carl", "bob"]))
        assert [each.project_id for each in made] == ["bob", "carl"]
        assert [each.id for each in permissions.create(model, project_ids=["carl"])] == [made[1].id]
        assert [each.project_id for each in permissions.list(model, limit=1)] == ["carl", "bob"]
        assert [each.project_id for each in permissions.list(model, limit=1, order="ascending")] == ["bob", "carl"]
        assert [each.id for each in permissions.list(model, project_id="bob")] == [made[0].id]
        assert isinstance(
            refused(lambda model=model: two.bob.fine_tuning.checkpoints.permissions.list(model)), openai.NotFoundError
        )
        deleted = permissions.delete(made[0].id, fine_tuned_model_checkpoint=model)
        assert deleted.deleted and deleted.object == "checkpoint.permission"
        gone = lambda model=model, id=made[0].id: permissions.delete(id, fine_tuned_model_checkpoint=model)  # noqa: E731
        assert isinstance(refused(gone), openai.NotFoundError)
    assert refused(lambda: permissions.create(MODEL, project_ids=["a b"])).param == "project_ids.0"


def test_a_key_for_some_adapters_trains_no_base(two: Two) -> None:
    narrow = two.api.client(two.api.key("narrow", adapters=["support"]))
    file = send(narrow).id
    error = refused(lambda: narrow.fine_tuning.jobs.create(model="base", training_file=file))
    assert error.code == "model_not_found" and "reader" not in error.message


def test_without_a_key_nothing_is_told(two: Two) -> None:
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/openapi.json", "/v1/webhook_event_types"):
        response = two.api.http().get(path)
        assert response.status_code == 401 and error_of(response)["code"] == "missing_api_key"
    big = two.api.http().post("/v1/files", files={"file": b"x" * 1000})
    assert big.status_code == 401


def test_requests_count_against_the_limits_of_their_key(home: Home) -> None:
    with serving(home, has_keys=True) as api:
        http = api.http(api.key("slow", requests_per_minute=2))
        assert [http.get("/v1/files").status_code for _ in range(3)] == [200, 200, 429]


def test_a_web_page_elsewhere_changes_nothing_where_there_are_no_keys(home: Home) -> None:
    with serving(home, origins=("https://chat.example",)) as api:
        page = {"origin": "https://evil.example"}
        files = {"file": ("a.jsonl", b"{}"), "purpose": (None, "user_data")}
        response = api.http().post("/v1/files", files=files, headers=page)
        assert response.status_code == 403 and error_of(response)["code"] == "wrong_origin"
        assert api.http().post("/v1/files", files=files, headers={"origin": "https://chat.example"}).status_code == 200


def test_an_endpoint_without_jobs_says_so() -> None:
    app = create_app(EngineState(), GatewaySettings("127.0.0.1", 0), more=[lambda gateway: routes(gateway, no_queue)])
    with (
        run_in_thread(app, "127.0.0.1", 0) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client,
    ):
        for call in (client.fine_tuning.jobs.list, client.files.list, client.webhooks.event_types.list):
            error = refused(call)
            assert (error.status_code, error.code) == (501, "no_jobs")


def test_a_webhook_shows_its_secret_once(two: Two) -> None:
    raw = two.bob.webhooks.with_raw_response.create(name="n", url="https://bob.example/h", event_types=KINDS)  # type: ignore[arg-type]
    made = WebhookEndpointWithSecret.model_validate_json(raw.content, strict=True)
    assert made.signing_secret.startswith("whsec_") and made.url == "https://bob.example/h"
    shown = two.bob.webhooks.with_raw_response.retrieve(made.id)
    webhook = WebhookEndpoint.model_validate_json(shown.content, strict=True)
    assert webhook.signing_secret_hint and made.signing_secret not in shown.text
    assert [each.id for each in two.bob.webhooks.list(limit=1)] == [made.id]
    changed = two.bob.webhooks.update(made.id, name="m", event_types=["fine_tuning.job.failed"])
    assert (changed.name, changed.url, changed.event_types) == ("m", made.url, ["fine_tuning.job.failed"])
    rotated = two.bob.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != made.signing_secret
    with two.api.service.store.read() as session:
        row = session.get_one(Webhook, 2)
        assert (row.old_secret, row.secret) == (made.signing_secret, rotated.signing_secret)
    assert two.bob.webhooks.delete(made.id).deleted
    assert isinstance(refused(lambda: two.bob.webhooks.retrieve(made.id)), openai.NotFoundError)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://127.0.0.1/h",
            "https://localhost/h",
            "https://[::1]/h",
            "http://10.0.0.8/",
            "https://a@bob.example/",
        ),
        *("https://169.254.169.254/latest", "ftp://bob.example/", "https://bob.example:99999/", "bob.example"),
        *("https://[::ffff:127.0.0.1]/", "https://b\nob.example/"),
    ],
)
def test_a_tenant_has_nothing_told_to_the_inside(two: Two, url: str) -> None:
    error = refused(lambda: two.bob.webhooks.create(name="n", url=url, event_types=KINDS))  # type: ignore[arg-type]
    assert isinstance(error, openai.BadRequestError) and error.param == "url"


def test_who_runs_the_endpoint_may_let_it_be_told_to_the_inside(home: Home) -> None:
    with serving(home, has_keys=True) as api:
        object.__setattr__(api.service, "private_webhooks", True)
        client = api.client(api.key("ann"))
        made = client.webhooks.create(name="n", url="http://127.0.0.1:9/h", event_types=["fine_tuning.job.failed"])
        assert client.webhooks.delete(made.id).deleted


def test_lost_answers_about_webhooks_and_permissions_do_no_harm(two: Two) -> None:
    kinds: Any = KINDS
    with Dropping(two.api.url, 0, 2, 4, 6, 8) as proxy:
        client = two.api.client(two.keys["ann"], max_retries=2).with_options(base_url=f"{proxy.url}/v1")
        made = client.webhooks.create(name="lost", url="https://ann.example/lost", event_types=kinds)
        rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        with two.api.service.store.read() as session:
            (row,) = session.scalars(select(Webhook).where(Webhook.name == "lost"))
            assert (row.id, row.old_secret, row.secret) == (made.id, made.signing_secret, rotated.signing_secret)
        assert client.webhooks.delete(made.id).deleted
        permissions = client.fine_tuning.checkpoints.permissions
        (granted,) = permissions.create(MODEL, project_ids=["dora"])
        assert permissions.delete(granted.id, fine_tuned_model_checkpoint=MODEL).deleted
        assert not proxy.lost


def test_a_sample_is_sent_by_who_sends(home: Home) -> None:
    told: list[str] = []

    async def deliver(webhook: Webhook, kind: str) -> int:
        if told:
            raise EndpointError("nobody answers.")
        told.append(f"{kind} to {webhook.url}")
        return 204

    with serving(home) as api:
        client = api.client()
        made = client.webhooks.create(name="n", url="http://127.0.0.1:9/h", event_types=["fine_tuning.job.failed"])
        assert refused(lambda: client.webhooks.test(made.id, event_type="fine_tuning.job.failed")).status_code == 501
        object.__setattr__(api.service, "test_webhook", deliver)
        assert client.webhooks.test(made.id, event_type="fine_tuning.job.failed").status_code == 204
        assert told == ["fine_tuning.job.failed to http://127.0.0.1:9/h"]
        assert refused(lambda: client.webhooks.test(made.id, event_type="fine_tuning.job.failed")).status_code == 502


def test_samples_hold_up_nobody_and_go_one_by_one(home: Home) -> None:
    go, under_way = threading.Event(), threading.Semaphore(0)

    async def deliver(webhook: Webhook, kind: str) -> int:
        under_way.release()
        while not go.is_set():
            await asyncio.sleep(0.01)
        return 204

    kind: Any = "fine_tuning.job.failed"
    with serving(home, has_keys=True) as api, ThreadPoolExecutor(8) as pool:
        object.__setattr__(api.service, "test_webhook", deliver)
        clients = {name: api.client(api.key(name)) for name in ("ann", "bob")}
        hooks = {
            name: client.webhooks.create(name="n", url="https://a.example/h", event_types=[kind]).id
            for name, client in clients.items()
        }
        try:
            samples = [
                pool.submit(client.webhooks.test, hooks[name], event_type=kind) for name, client in clients.items()
            ]
            for _ in samples:
                assert under_way.acquire(timeout=60)
            error = refused(lambda: clients["ann"].webhooks.test(hooks["ann"], event_type=kind))
            assert (error.status_code, error.code) == (429, "sample_under_way")
        finally:
            go.set()
        assert [sample.result().status_code for sample in samples] == [204, 204]
        assert clients["ann"].webhooks.test(hooks["ann"], event_type=kind).status_code == 204


def test_what_a_deleted_model_was_shared_with_is_gone_with_it(home: Home) -> None:
    with serving(home, has_keys=True) as api:
        ann = api.client(api.key("ann"))
        job = ann.fine_tuning.jobs.create(model="base", training_file=send(ann).id).id
        with api.service.store.begin() as session:
            move(session, job, {Status.VALIDATING}, Status.RUNNING)
            move(session, job, {Status.RUNNING}, Status.SUCCEEDED, fine_tuned_model=MODEL, adapter="a@v1")
        permissions = ann.fine_tuning.checkpoints.permissions
        permissions.create(MODEL, project_ids=["bob"])
        with api.service.store.begin() as session:
            session.execute(update(Job).values(adapter=None))  # what DELETE /v1/models does
        for call in (lambda: permissions.list(MODEL), lambda: permissions.create(MODEL, project_ids=["bob"])):
            assert isinstance(refused(call), openai.NotFoundError)


def test_the_description_covers_the_routes_and_promises_no_422(two: Two) -> None:
    document = two.api.http(two.keys["bob"]).get("/v1/openapi.json").json()
    assert "422" not in json.dumps(document) and "/v1/fine_tuning/jobs/{job_id}/cancel" in document["paths"]
    knobs = document["components"]["schemas"]["NewJob"]["properties"]["loraport"]["anyOf"][0]["properties"]
    assert {"rank", "priority", "sequence_length", "require"} <= set(knobs) and "model" not in knobs
