"""What one tenant may take of disk, threads and time: bytes that jobs hold, parts, copies, slow senders."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from sqlalchemy import select

from loraport.clients.home import Home
from loraport.serve.finetuning import guard, multipart, sweep, uploads
from loraport.serve.finetuning.multipart import Pieces
from loraport.serve.finetuning.service import Quotas, Room
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.store.tables import File, Part
from tests.finetuning import jsonl, send, serving
from tests.serving import wait_until


def refused(call: Callable[[], Any]) -> openai.APIStatusError:
    """The error that a call of the client ends in."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


def pending(client: openai.OpenAI, size: int) -> str:
    """An upload of so many bytes that is to come."""
    made = client.uploads.create(bytes=size, filename="a", mime_type="text/jsonl", purpose="user_data")
    return made.id


def test_bytes_that_a_job_holds_count_though_their_file_is_deleted(home: Home) -> None:
    content = jsonl(40)
    with serving(home, quotas=Quotas(disk_bytes=len(content) + 100)) as api:
        client = api.client()
        first = send(client, content)
        job = client.fine_tuning.jobs.create(model="base", training_file=first.id)
        client.files.delete(first.id)
        assert refused(lambda: send(client, content)).code == "insufficient_quota"
        sweep.sweep(api.service, time.time() + 2 * sweep.TOMBSTONE_S)
        assert refused(lambda: send(client, content)).code == "insufficient_quota"
        client.fine_tuning.jobs.cancel(job.id)
        second = send(client, content)
        sweep.sweep(api.service, time.time() + 2 * sweep.TOMBSTONE_S)
        with api.service.store.read() as session:
            assert list(session.scalars(select(File.id))) == [second.id]


def test_expired_bytes_that_a_job_holds_count(home: Home) -> None:
    content = jsonl(40)
    with serving(home, quotas=Quotas(disk_bytes=len(content) + 100)) as api:
        client = api.client()
        first = send(client, content, expires_after={"anchor": "created_at", "seconds": 3600})
        client.fine_tuning.jobs.create(model="base", training_file=first.id, validation_file=first.id)
        sweep.sweep(api.service, time.time() + 3601)
        assert refused(lambda: client.files.retrieve(first.id)).status_code == 404
        assert refused(lambda: send(client, content)).code == "insufficient_quota"


def test_parts_that_arrive_at_once_stay_within_the_quota(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(home, quotas=Quotas(disk_bytes=1500)) as api, ThreadPoolExecutor(2) as pool:
        client = api.client()
        upload = pending(client, 2000)
        monkeypatch.setattr(Room, "take", lambda *_: True)  # as if each had asked before the other had begun
        parts = [pool.submit(client.uploads.parts.create, upload, data=b"x" * 1000) for _ in range(2)]
        errors = [each.exception() for each in parts]
        (refusal,) = [error for error in errors if error]
        assert isinstance(refusal, openai.RateLimitError) and refusal.code == "insufficient_quota"
        with api.service.store.read() as session:
            assert list(session.scalars(select(Part.bytes))) == [1000]


def test_an_administrators_part_counts_for_the_owner_of_the_upload(home: Home) -> None:
    with serving(home, has_keys=True, quotas=Quotas(disk_bytes=1500)) as api:
        ann, boss = api.client(api.key("ann")), api.client(api.key("boss", is_admin=True))
        upload = pending(ann, 2000)
        send(boss, b"x" * 1400, purpose="user_data")
        boss.uploads.parts.create(upload, data=b"x" * 1000)
        assert refused(lambda: boss.uploads.parts.create(upload, data=b"x" * 1000)).code == "insufficient_quota"


def held_copies(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
    """Copies wait for the event; the uploads that are copied so far."""
    go, begun, copy = threading.Event(), list[str](), uploads.copy

    def wait(service: Any, parts: Any, id: str, arriving: Any) -> None:
        begun.append(id)
        go.wait(120)
        copy(service, parts, id, arriving)

    monkeypatch.setattr(uploads, "copy", wait)
    return go, begun


def test_an_upload_is_put_together_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = held_copies(monkeypatch)
    with serving(home) as api, ThreadPoolExecutor(4) as pool:
        client = api.client()
        upload = pending(client, 9)
        part = client.uploads.parts.create(upload, data=b"x" * 9).id
        given: Any = {"part_ids": [part]}
        first = pool.submit(client.uploads.complete, upload, **given)
        wait_until(lambda: begun == [upload], "the first copy")
        more = [pool.submit(client.uploads.complete, upload, **given) for _ in range(2)]
        again = pool.submit(client.uploads.complete, upload, **given, extra_headers={"x-stainless-retry-count": "1"})
        wait_until(lambda: len(api.service.completing) == 1 and client.files.list().data == [], "nothing else")
        go.set()
        assert first.result().status == "completed" and first.result().file == again.result().file
        assert [type(each.exception()) for each in more] == [openai.BadRequestError] * 2
        assert begun == [upload] and len(client.files.list().data) == 1


def test_few_uploads_are_copied_at_once_and_one_of_each_tenant(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = held_copies(monkeypatch)
    with serving(home, has_keys=True) as api, ThreadPoolExecutor(6) as pool:
        done, owners = [], dict[str, str]()
        for name in ("ann", "bob", "carl"):
            client = api.client(api.key(name))
            for _ in range(2):
                owners[upload := pending(client, 9)] = name
                part = client.uploads.parts.create(upload, data=b"x" * 9).id
                done.append(pool.submit(client.uploads.complete, upload, part_ids=[part]))
        wait_until(lambda: len(begun) == 2 and len(api.service.completing) == 3, "two copies, and one that waits")
        assert len({owners[upload] for upload in begun}) == 2
        go.set()
        assert {each.result().status for each in done} == {"completed"}


def test_an_upload_beyond_the_quota_is_not_copied(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = held_copies(monkeypatch)
    go.set()
    with serving(home, quotas=Quotas(files=1, disk_bytes=1000)) as api:
        client = api.client()
        upload = pending(client, 600)
        part = client.uploads.parts.create(upload, data=b"x" * 600).id
        other = send(client, b"x", purpose="user_data")
        assert refused(lambda: client.uploads.complete(upload, part_ids=[part])).code == "insufficient_quota"
        assert begun == []
        client.files.delete(other.id)
        assert client.uploads.complete(upload, part_ids=[part]).status == "completed"  # its parts make room for it
        assert api.service.room.arriving == {}


def test_an_upload_whose_file_is_gone_says_so(home: Home) -> None:
    with serving(home) as api:
        client = api.client()
        upload = pending(client, 9)
        part = client.uploads.parts.create(upload, data=b"x" * 9).id
        done = client.uploads.complete(upload, part_ids=[part])
        assert done.file
        client.files.delete(done.file.id)
        for tries in ("0", "1"):
            headers = {"x-stainless-retry-count": tries}
            complete = lambda: client.uploads.complete(upload, part_ids=[part], extra_headers=headers)  # noqa: B023, E731
            error = refused(complete)
            assert isinstance(error, openai.BadRequestError)
        assert "has been deleted since" in error.message


def test_uploads_wait_for_nobody_elsewhere(home: Home) -> None:
    with serving(home) as api, ThreadPoolExecutor(64) as pool:
        client, go = api.client(), threading.Event()
        loop = api.loop
        assert loop
        count = min(32, (os.cpu_count() or 1) + 4) + 1  # as many as the event loop has threads by itself, and one more
        for _ in range(count):
            loop.call_soon_threadsafe(loop.run_in_executor, None, go.wait, 120)
        try:
            assert pool.submit(send, client).result(60).bytes > 0
        finally:
            go.set()


class Slow:
    """A request whose body comes in small pieces, each as late as it may."""

    headers: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, count: int, wait_s: float) -> None:
        self.left, self.wait_s = count, wait_s

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.wait_s)
        self.left -= 1
        return {"type": "http.request", "body": b"x", "more_body": self.left > 0}


def test_a_body_that_trickles_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "GRACE_S", 0.5)
    endless: Any = Slow(1 << 30, 0.01)  # never as late as a pause may be
    with pytest.raises(Refusal) as caught:
        asyncio.run(Pieces(endless, 60.0).next())
    assert (caught.value.status, caught.value.code) == (408, "body_timeout")
    monkeypatch.setattr(multipart, "LEAST_RATE", 1e-6)  # a byte buys a long time
    short: Any = Slow(100, 0.01)
    pieces = Pieces(short, 60.0)
    pieces.count = 1
    assert asyncio.run(pieces.next()) == b"x" * 100


def test_what_is_read_on_for_nothing_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "DRAIN_S", 0.1)
    silent: Any = Slow(2, 3600.0)
    pieces = Pieces(silent, 7200.0)
    pieces.is_begun = True
    monkeypatch.setattr(multipart, "GRACE_S", 7200.0)
    assert asyncio.run(asyncio.wait_for(pieces.drain(), 60)) is False


def test_a_small_body_has_its_time_too(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GRACE_S", 0.5)
    monkeypatch.setattr(guard, "LEAST_RATE", 1 << 30)
    head = (
        "POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99"
    )
    with serving(home, body_s=600.0) as api:
        with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), timeout=60) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n{")
            answer = connection.makefile("rb").read()
        assert b"408" in answer and b"body_timeout" in answer
