"""Requests that are sent again: what was lost is there once, what is wanted twice is there twice."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import select, update

from loraport.clients.home import Home
from loraport.serve.finetuning.guard import REMEMBERED, Answers
from loraport.serve.gateway import keys
from loraport.serve.store.tables import Upload, Webhook
from tests.finetuning import Api, send, serving

RETRY = "x-stainless-retry-count"
KINDS: Any = ["fine_tuning.job.failed"]


@pytest.fixture
def api(home: Home) -> Iterator[Api]:
    """An API with keys."""
    with serving(home, has_keys=True) as api:
        yield api


def creating(client: openai.OpenAI, file: str) -> Callable[[int], str]:
    """What sends the same request for a job, saying how often it was sent before; the id of the job."""
    create = client.fine_tuning.jobs.create
    return lambda tries: create(model="base", training_file=file, extra_headers={RETRY: str(tries)}).id


def test_a_job_whose_answer_was_lost_is_there_once(api: Api) -> None:
    client = api.client(api.key("ann"))
    create = creating(client, send(client).id)
    assert create(0) == (second := create(1)) == create(2)
    third = create(0)  # on purpose
    assert third != second and create(1) == third


def test_a_job_that_was_refused_before_is_made(api: Api) -> None:
    client = api.client(api.key("ann", requests_per_minute=2))
    create = creating(client, send(client).id)
    first = create(0)
    for tries in (0, 1):  # neither makes anything
        with pytest.raises(openai.RateLimitError):
            create(tries)
    assert api.keys_path
    keys.revoke(api.keys_path, "ann")
    client.api_key = api.key("ann")  # the same tenant, without the limit
    second = create(2)
    assert second != first and create(3) == second


def test_a_job_that_its_client_knows_is_not_the_answer(api: Api) -> None:
    client = api.client(api.key("ann"))
    create = creating(client, send(client).id)
    first = create(0)
    client.fine_tuning.jobs.retrieve(first)
    assert (second := create(1)) != first and create(2) == second


def test_a_file_that_a_job_names_is_not_the_answer(api: Api) -> None:
    client = api.client(api.key("ann"))
    first = send(client)
    assert send(client, extra_headers={RETRY: "1"}).id == first.id
    client.fine_tuning.jobs.create(model="base", training_file=first.id)
    assert send(client, extra_headers={RETRY: "1"}).id != first.id


def test_an_upload_that_is_over_is_not_the_answer(api: Api) -> None:
    client = api.client(api.key("ann"))
    given: Any = {"bytes": 9, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    first = client.uploads.create(**given)
    again: Any = given | {"extra_headers": {RETRY: "1"}}
    assert client.uploads.create(**again).id == first.id
    with api.service.store.begin() as session:
        session.execute(update(Upload).values(status="expired"))
    second = client.uploads.create(**again)
    assert (second.id, second.status) != (first.id, "expired")
    with api.service.store.begin() as session:
        session.execute(update(Upload).where(Upload.id == second.id).values(expires_at=1.0))
    assert client.uploads.create(**again).id not in (first.id, second.id)


def test_a_webhook_of_others_or_of_other_events_is_not_the_answer(api: Api) -> None:
    ann, boss = api.client(api.key("ann")), api.client(api.key("boss", is_admin=True))
    given: Any = {"name": "n", "url": "https://a.example/h", "extra_headers": {RETRY: "1"}}
    first = ann.webhooks.create(event_types=KINDS, **given)
    assert ann.webhooks.create(event_types=KINDS, **given).signing_secret == first.signing_secret
    other = ann.webhooks.create(event_types=["fine_tuning.job.succeeded"], **given)
    assert other.id != first.id and other.event_types == ["fine_tuning.job.succeeded"]
    assert boss.webhooks.create(event_types=KINDS, **given).signing_secret != first.signing_secret
    with api.service.store.read() as session:
        assert list(session.scalars(select(Webhook.tenant).order_by(Webhook.seq))) == ["ann", "ann", "boss"]


def test_a_refusal_counts_for_one_try_of_that_request() -> None:
    answers, key = Answers(), ("ann", "POST", "/v1/files", "10", 1)
    answers.refuse(key)
    answers.refuse(key)
    assert not answers.was_refused(("bob", *key[1:]))
    assert [answers.was_refused(key) for _ in range(3)] == [True, True, False]


def test_what_is_remembered_is_bounded() -> None:
    answers = Answers()
    for number in range(REMEMBERED + 5):
        answers.hear(f"id-{number}", None)
        answers.refuse(("ann", "POST", "/", str(number), 1))
    assert len(answers.heard) == len(answers.refused) == REMEMBERED and f"id-{number}" in answers.heard


def test_who_never_says_how_often_makes_what_is_asked(api: Api) -> None:
    client = api.client(api.key("ann"))
    body = {"model": "base", "training_file": send(client).id}
    http: httpx.Client = api.http(client.api_key)
    made = {http.post("/v1/fine_tuning/jobs", json=body).json()["id"] for _ in range(3)}
    assert len(made) == 3
