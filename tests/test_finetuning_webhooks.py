"""Webhooks: real receivers on loopback, the openai client's own verifier, and addresses that must not be reached."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp.abc
import openai
import pytest
from sqlalchemy import select

from loraport.clients.errors import EndpointError, UsageError
from loraport.clients.home import Home
from loraport.serve.finetuning import sender as webhooks
from loraport.serve.finetuning.sender import Webhooks, check_url, headers_of, is_private, new_secret
from loraport.serve.store.changes import move
from loraport.serve.store.store import Store, open_store
from loraport.serve.store.tables import Delivery, Job, Status, Webhook
from tests.serving import wait_until

SUCCEEDED, FAILED = "fine_tuning.job.succeeded", "fine_tuning.job.failed"


class Receiver(ThreadingHTTPServer):
    """Keeps what it is sent, and answers as `statuses` say, the last for ever; it waits for `go` before."""

    daemon_threads = True

    def __init__(self, *statuses: int, go: threading.Event | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.statuses, self.go = list(statuses) or [200], go
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook?token=abc"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    """One delivery."""

    server: Receiver

    def do_POST(self) -> None:
        """Keep it and answer."""
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        if self.server.go:
            self.server.go.wait(60)
        status = self.server.statuses.pop(0) if len(self.server.statuses) > 1 else self.server.statuses[0]
        self.send_response(status)
        if status in (301, 307):
            self.send_header("location", self.server.url)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    """An empty store."""
    store = open_store(home)
    yield store
    store.close()


@pytest.fixture
def sender(store: Store) -> Iterator[Webhooks]:
    """Deliveries to loopback too, tried again soon."""
    sender = Webhooks(store, allows_private=True, retry_s=(0.01, 0.01, 0.01), look_s=0.05)
    sender.start()
    yield sender
    sender.stop()


def add(store: Store, url: str, *events: str, tenant: str = "ann") -> Webhook:
    """A webhook."""
    webhook = Webhook(tenant=tenant, url=url, secret=new_secret(), events=list(events or (SUCCEEDED,)))
    with store.begin() as session:
        session.add(webhook)
    return webhook


def end_job(store: Store, status: Status = Status.SUCCEEDED, tenant: str = "ann") -> str:
    """The id of a job that has just come to its end."""
    job = Job(tenant=tenant, model="base", training_file="file-1", seed=1, method={}, request_sha256="")
    job.status = Status.RUNNING
    with store.begin() as session:
        session.add(job)
        session.flush()
        assert move(session, job.id, {Status.RUNNING}, status)
    return job.id


def outbox(store: Store) -> list[Delivery]:
    """What is still to be said."""
    with store.read() as session:
        return list(session.scalars(select(Delivery)))


def test_the_openai_client_takes_a_delivery(store: Store, sender: Webhooks) -> None:
    receiver = Receiver()
    webhook = add(store, receiver.url)
    job_id = end_job(store)
    sender.wake()
    wait_until(lambda: not outbox(store), "the delivery")
    (headers, body), client = receiver.got[0], openai.OpenAI(api_key="x", webhook_secret=webhook.secret)
    event = client.webhooks.unwrap(body, headers)
    assert event.type == SUCCEEDED and event.data.id == job_id and event.object == "event"
    assert headers["webhook-id"] == event.id and abs(event.created_at - time.time()) < 60
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers)


def test_each_hears_of_what_it_asked_for_and_of_its_own(store: Store, sender: Webhooks) -> None:
    of_success, of_failure, of_bob = Receiver(), Receiver(), Receiver()
    add(store, of_success.url), add(store, of_failure.url, FAILED), add(store, of_bob.url, FAILED, tenant="bob")
    failed, succeeded = end_job(store, Status.FAILED), end_job(store)
    sender.wake()
    wait_until(lambda: not outbox(store), "the deliveries")
    assert [json.loads(body)["data"]["id"] for _, body in of_success.got] == [succeeded]
    assert [json.loads(body)["data"]["id"] for _, body in of_failure.got] == [failed]
    assert of_bob.got == []


def test_a_failed_delivery_is_tried_again_under_the_same_id(store: Store, sender: Webhooks) -> None:
    receiver = Receiver(500, 404, 200)
    add(store, receiver.url)
    end_job(store)
    wait_until(lambda: not outbox(store), "the delivery")
    assert len(receiver.got) == 3 and len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_after_the_last_try_it_is_given_up_and_no_address_logged(
    store: Store, sender: Webhooks, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver(500)
    webhook = add(store, receiver.url)
    end_job(store)
    with caplog.at_level("INFO"):
        wait_until(lambda: not outbox(store), "the end of the tries")
        wait_until(lambda: "given up" in caplog.text, "a line in the log")
    assert len(receiver.got) == 4
    assert webhook.id in caplog.text and "token=abc" not in caplog.text and webhook.secret not in caplog.text


def test_nobody_is_followed_elsewhere(store: Store, sender: Webhooks) -> None:
    receiver = Receiver(307)
    add(store, receiver.url)
    end_job(store)
    wait_until(lambda: not outbox(store), "the end of the tries")
    assert len(receiver.got) == 4  # one request a try


def test_a_slow_receiver_holds_nobody_up(store: Store, sender: Webhooks) -> None:
    go = threading.Event()
    slow, fast = Receiver(go=go), Receiver()
    add(store, slow.url), add(store, fast.url, FAILED)
    for _ in range(5):
        end_job(store)
    wait_until(lambda: len(slow.got) == 2, "the slow one is asked")
    end_job(store, Status.FAILED)
    wait_until(lambda: len(fast.got) == 1, "the fast one has its delivery")
    assert len(slow.got) == 2  # two at once, however many wait
    go.set()
    wait_until(lambda: not outbox(store), "all of them")
    assert len(slow.got) == 5


def test_one_tenant_leaves_room_for_the_others(store: Store, sender: Webhooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "ANSWER_S", 600.0)
    go = threading.Event()
    anns = [Receiver(go=go) for _ in range(webhooks.TENANTS_AT_ONCE)]
    bobs = Receiver()
    for receiver in anns:
        add(store, receiver.url)
    add(store, bobs.url, tenant="bob")
    for _ in range(webhooks.EACH_AT_ONCE):
        end_job(store)
    wait_until(lambda: len(sender.sending) == webhooks.TENANTS_AT_ONCE, "as many as one may have")
    end_job(store, tenant="bob")
    wait_until(lambda: len(bobs.got) == 1, "another's delivery")
    assert len(sender.sending) <= webhooks.TENANTS_AT_ONCE + 1
    assert sum(len(receiver.got) for receiver in anns) <= webhooks.TENANTS_AT_ONCE
    go.set()
    wait_until(lambda: not outbox(store), "all of them")
    assert sum(len(receiver.got) for receiver in anns) == webhooks.EACH_AT_ONCE * len(anns)


def test_what_a_killed_server_was_sending_is_sent_again(store: Store, home: Home) -> None:
    go = threading.Event()
    receiver = Receiver(go=go)
    add(store, receiver.url)
    end_job(store)
    code = (
        "import time; from loraport.clients.home import Home; from loraport.serve.finetuning.sender import Webhooks; "
        "from loraport.serve.store.store import open_store; "
        "Webhooks(open_store(Home.default()), allows_private=True).start(); time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"LORAPORT_HOME": str(home.root)})
    try:
        wait_until(lambda: len(receiver.got) == 1, "the first try")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    go.set()
    assert len(outbox(store)) == 1
    second = Webhooks(store, allows_private=True)
    second.start()
    wait_until(lambda: not outbox(store), "the second try")
    second.stop()
    assert len(receiver.got) == 2 and receiver.got[0][0]["webhook-id"] == receiver.got[1][0]["webhook-id"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/x",
        "https://",
        "no url",
        "https://ann:secret@example.com/",
        "http://127.0.0.1:8000/admin",
        "http://[::1]/",
        "http://localhost/x",
        "http://box.localhost./x",
        "http://10.1.2.3/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:192.168.0.1]/",
        "http://[64:ff9b::a00:1]/",
        "http://①②⑦.0.0.1:9000/",
        "http://１６９.２５４.１６９.２５４/",
        "http://example.com:99999/",
        "https://example.com/" + "x" * 2100,
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_url(url)
    assert "secret" not in caught.value.message


def test_addresses_that_are_fine() -> None:
    check_url("https://example.com:8443/hooks?x=1")
    check_url("http://127.0.0.1:8000/", allows_private=True)
    assert not is_private("93.184.215.14") and not is_private("example.com")


def test_a_name_that_means_this_machine_is_not_reached(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver()
    port = receiver.server_address[1]
    asked: list[str] = []

    def resolve(name: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    sender = Webhooks(store)
    sender.start()
    with pytest.raises(EndpointError) as caught:
        asyncio.run(sender.test(add(store, f"http://rebound.example:{port}/"), SUCCEEDED))
    sender.stop()
    assert "private" in caught.value.message and asked == ["rebound.example"] and receiver.got == []


def test_the_resolver_keeps_public_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(webhooks.Public, aiohttp.abc.AbstractResolver)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 443)) for host in ("10.0.0.1", "93.184.215.14")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    runner = webhooks.asyncio.Runner()
    with runner:
        kept = runner.run(webhooks.Public().resolve("example.com", 443))
    assert [each["host"] for each in kept] == ["93.184.215.14"]


def test_a_sample_says_what_the_receiver_answered(store: Store, sender: Webhooks) -> None:
    receiver = Receiver(418)
    assert asyncio.run(sender.test(add(store, receiver.url), FAILED)) == 418
    assert json.loads(receiver.got[0][1])["type"] == FAILED and outbox(store) == []


def test_an_old_secret_signs_too_for_a_while(store: Store, sender: Webhooks) -> None:
    receiver = Receiver()
    webhook = add(store, receiver.url)
    old, webhook.secret = webhook.secret, new_secret()
    webhook.old_secret, webhook.old_secret_until = old, time.time() + 60
    asyncio.run(sender.test(webhook, SUCCEEDED))
    headers, body = receiver.got[0]
    for secret in (old, webhook.secret):
        openai.OpenAI(api_key="x", webhook_secret=secret).webhooks.verify_signature(body, headers)
    webhook.old_secret_until = time.time() - 1
    asyncio.run(sender.test(webhook, SUCCEEDED))
    assert len(receiver.got[1][0]["webhook-signature"].split()) == 1


def test_the_signature_is_that_of_the_standard() -> None:
    # The example of Standard Webhooks' own libraries.
    headers = headers_of(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        now=1614265330,
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
