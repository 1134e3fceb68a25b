"""Files and uploads of the fine-tuning API, asked by OpenAI's own client on a real server."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types import FileObject, Upload
from sqlalchemy import select, update

from loraport.clients.home import Home
from loraport.serve.finetuning import disk, lines, sweep
from loraport.serve.finetuning.service import Quotas
from loraport.serve.store.tables import File
from loraport.serve.store.tables import Upload as UploadRow
from tests.conftest import ROOT
from tests.finetuning import Api, Dropping, jsonl, send, serving
from tests.gateway import error_of
from tests.serving import wait_until


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One server for all tests that leave it as it was, or do not mind."""
    with serving(Home(tmp_path_factory.mktemp("files") / "home")) as running:
        yield running


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    """OpenAI's client of it."""
    return api.client()


def on_disk(api: Api) -> list[str]:
    """Names of all contents."""
    return sorted(path.name for folder in (api.service.files, api.service.uploads) for path in folder.rglob("*"))


def refused(call: Callable[[], Any]) -> openai.APIStatusError:
    """The error that a call of the client ends in."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


def test_a_file_is_stored_as_it_was_sent(api: Api, client: openai.OpenAI) -> None:
    content = jsonl(40)
    sent = client.files.with_raw_response.create(file=("tee é.jsonl", content), purpose="fine-tune")
    file = FileObject.model_validate_json(sent.content, strict=True)
    assert (file.bytes, file.filename, file.purpose, file.object) == (len(content), "tee é.jsonl", "fine-tune", "file")
    assert client.files.wait_for_processing(file.id, max_wait_seconds=5).status == "processed"
    assert client.files.content(file.id).read() == content == (api.service.files / file.id).read_bytes()
    assert (api.service.files / file.id).stat().st_mode & 0o777 == 0o600
    with api.service.store.read() as session:
        assert session.scalars(select(File.rows).where(File.id == file.id)).one() == 40


def test_a_file_is_gone_when_it_was_deleted(api: Api, client: openai.OpenAI) -> None:
    file = send(client)
    deleted = client.files.delete(file.id)
    assert deleted.deleted and deleted.object == "file" and file.id not in on_disk(api)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        assert isinstance(refused(lambda call=call: call(file.id)), openai.NotFoundError)
    sweep.sweep(api.service, time.time() + 2 * sweep.TOMBSTONE_S)
    with api.service.store.read() as session:
        assert session.scalars(select(File.id).where(File.id == file.id)).first() is None


def test_pages_of_files_end_also_while_they_are_deleted(client: openai.OpenAI) -> None:
    sent = [send(client, purpose="user_data").id for _ in range(5)]
    assert [file.id for file in client.files.list(purpose="user_data", limit=2)] == sent[::-1]
    assert [file.id for file in client.files.list(purpose="user_data", limit=2, order="asc")] == sent
    for file in client.files.list(purpose="user_data", limit=2):
        client.files.delete(file.id)
    assert client.files.list(purpose="user_data").data == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no line"),
        (b"\n\n", "no line"),
        (jsonl(3) + b"[1]\n", "line 4 is not a JSON object but a list"),
        (b'{"a": 1}\n{"a": \xff}\n', "line 2 .* not UTF-8"),
        (b'{"a": NaN}', "line 1 is not JSON"),
        (b'{"a": 1', "line 1 is not JSON"),
        (b'{"a": "' + b"x" * (lines.LINE_BYTES + 1) + b'"}\n', "line 1 is longer than 8 MiB"),
        (b"PK\x03\x04" + os.urandom(1000), "line 1"),
    ],
)
def test_what_is_no_jsonl_is_refused_with_its_line(api: Api, client: openai.OpenAI, content: bytes, words: str) -> None:
    before = on_disk(api)
    error = refused(lambda: send(client, content))
    assert isinstance(error, openai.BadRequestError) and (error.code, error.param) == ("invalid_file_format", "file")
    with pytest.raises(openai.BadRequestError, match=words):
        raise error
    assert on_disk(api) == before
    assert send(client, content, purpose="user_data").bytes == len(content)


def test_rows_are_told_apart_wherever_the_pieces_are_cut() -> None:
    content = b"\xef\xbb\xbf" + jsonl(5).replace(b"\n", b"\r\n") + b"\r\n" + jsonl(1)[:-1]
    for size in (1, 7, 100, 10_000):
        found = lines.Lines()
        for at in range(0, len(content), size):
            found.feed(content[at : at + size])
        found.end()
        assert (found.rows, found.fault) == (6, None)


def test_a_form_may_have_its_file_first_and_must_be_one(api: Api) -> None:
    http = api.http()
    parts = {"file": ("a.jsonl", b"[]"), "purpose": (None, "fine-tune")}
    assert error_of(http.post("/v1/files", files=parts))["code"] == "invalid_file_format"
    parts["purpose"] = (None, "user_data")
    assert http.post("/v1/files", files=parts).status_code == 200
    multipart = {"content-type": "multipart/form-data; boundary=b"}
    for body, headers, code in (
        (b"{}", {"content-type": "application/json"}, "unsupported_media_type"),
        (b"{}", {"content-type": "multipart/form-data"}, "unsupported_media_type"),
        (b"nothing of it", multipart, "invalid_form"),
        (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\r\n', multipart, "invalid_form"),
        (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\r\n--b--\r\n', multipart, "invalid_form"),
        (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n',
            multipart,
            "missing_required_parameter",
        ),
    ):
        response = http.post("/v1/files", content=body, headers=headers)
        assert response.status_code in (400, 415) and error_of(response)["code"] == code, body
    assert not [name for name in on_disk(api) if name.endswith(disk.PARTIAL)]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after[anchor]"),
        ({"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after[seconds]"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
def test_fields_that_cannot_be_are_named(client: openai.OpenAI, more: dict[str, Any], param: str) -> None:
    error = refused(lambda: send(client, **more))
    assert isinstance(error, openai.BadRequestError) and error.param == param


def test_a_file_vanishes_when_it_expires(api: Api, client: openai.OpenAI) -> None:
    file = send(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    with api.service.store.begin() as session:
        session.execute(update(File).where(File.id == file.id).values(expires_at=time.time() - 1))
    assert isinstance(refused(lambda: client.files.retrieve(file.id)), openai.NotFoundError)
    sweep.sweep(api.service)
    assert file.id not in on_disk(api)
    sweep.sweep(api.service, time.time() + 2 * sweep.TOMBSTONE_S)
    with api.service.store.read() as session:
        assert session.scalars(select(File.id).where(File.id == file.id)).first() is None


SENDER = """
import sys, httpx
files, fields = {"file": ("big.jsonl", open(sys.argv[2], "rb"))}, {"purpose": "fine-tune"}
print(httpx.post(sys.argv[1], files=files, data=fields, timeout=60, trust_env=False).text)
"""


def test_a_large_file_needs_no_more_memory_than_a_small_one(api: Api) -> None:
    row, client = jsonl(1), api.client()
    send(client, row * 1000)
    process, content = psutil.Process(), row * ((48 << 20) // len(row))
    path = api.service.home.root / "big.jsonl"
    path.write_bytes(content)
    size = len(content)
    del content
    body = subprocess.Popen([sys.executable, "-c", SENDER, f"{api.url}/v1/files", path], stdout=subprocess.PIPE)
    before, peak = process.memory_info().rss, 0
    while body.poll() is None:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.005)
    assert body.stdout is not None and json.loads(body.stdout.read())["bytes"] == size
    assert peak - before < 24 << 20


def test_what_is_too_large_is_refused_in_words(home: Home) -> None:
    with serving(home, quotas=Quotas(file_bytes=1 << 20, part_bytes=1000, upload_bytes=3000)) as api:
        client = api.client()
        for content in (b" " * (3 << 20), b" " * ((1 << 20) + 1)):
            error = refused(lambda content=content: send(client, content))
            assert (error.status_code, error.code) == (413, "file_too_large")
        assert refused(lambda: upload(client, b" " * 3001)).code == "file_too_large"
        assert refused(lambda: upload(client, b" " * 2000, part_size=1001)).status_code == 413
        assert [name for name in on_disk(api) if name.startswith(("file-", "part_"))] == []


def test_quotas_are_told_once_and_leave_nothing(home: Home) -> None:
    with serving(home, quotas=Quotas(disk_bytes=10_000, files=3, uploads=1)) as api:
        client = api.client(max_retries=2)
        first = send(client, jsonl(40))
        began = time.monotonic()
        error = refused(lambda: send(client, jsonl(60)))
        assert isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota"
        assert error.response.headers["x-should-retry"] == "false" and time.monotonic() - began < 5
        assert on_disk(api) == [first.id]
        client.files.delete(first.id)
        for _ in range(3):
            send(client, jsonl(2))
        assert "3 files" in refused(lambda: send(client, jsonl(2))).message
        client.uploads.create(bytes=10, filename="a", mime_type="text/jsonl", purpose="fine-tune")
        more = lambda: client.uploads.create(bytes=9, filename="a", mime_type="text/jsonl", purpose="fine-tune")  # noqa: E731
        assert refused(more).code == "insufficient_quota"


def test_a_full_disk_is_told_and_leaves_nothing(
    api: Api, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = on_disk(api)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, _: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    opened = os.fdopen
    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fdopen", lambda *given, **more: Full(opened(*given, **more)))
        error = refused(lambda: send(client))
    assert (error.status_code, error.code) == (507, "disk_full") and on_disk(api) == before
    usage = shutil.disk_usage(api.service.files)._replace(free=1000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    assert refused(lambda: send(client)).code == "disk_full"


def test_a_file_sent_again_after_a_lost_answer_is_there_once(api: Api) -> None:
    with Dropping(api.url) as proxy:
        client = api.client(max_retries=2).with_options(base_url=f"{proxy.url}/v1")
        content = jsonl(17)
        file = send(client, content, "again.jsonl")
        assert not proxy.lost
    assert [found.id for found in api.client().files.list() if found.filename == "again.jsonl"] == [file.id]
    other = send(api.client(), content, "again.jsonl")  # on purpose
    assert other.id != file.id
    keyed = [send(api.client(), content, extra_headers={"Idempotency-Key": key}).id for key in ("k1", "k1", "k2")]
    assert keyed[0] == keyed[1] != keyed[2]


def partial_request(api_url: str, sent: bytes = b'{"a": 1}\n' * 300_000) -> socket.socket:
    """A connection on which an upload has begun and does not go on."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    lines_of_head = [
        "POST /v1/files HTTP/1.1",
        "Host: localhost",
        "Content-Type: multipart/form-data; boundary=b",
        "Content-Length: 99000000",
    ]
    connection = socket.create_connection(("127.0.0.1", int(api_url.rpartition(":")[2])))
    connection.sendall("\r\n".join(lines_of_head).encode() + b"\r\n\r\n" + head + sent)
    return connection


def test_nothing_is_left_of_an_upload_whose_client_goes_or_stalls(home: Home) -> None:
    with serving(home, body_s=1.0) as api:
        connection = partial_request(api.url)
        wait_until(lambda: bool(on_disk(api)), "the first bytes")
        connection.close()
        wait_until(lambda: not on_disk(api), "the end of what was cut off")
        connection = partial_request(api.url)
        answer = connection.makefile("rb").read()
        assert b"408" in answer and b"body_timeout" in answer and on_disk(api) == []
        assert api.service.room.arriving == {}


def test_what_a_killed_server_was_doing_is_undone_or_finished(home: Home) -> None:
    command = [sys.executable, "-m", "tests.finetuning", str(home.root)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        kept, half = send(client), send(client)
        pending = client.uploads.create(bytes=9, filename="a", mime_type="text/jsonl", purpose="fine-tune")
        part = client.uploads.parts.create(pending.id, data=b"{}")
    connection = partial_request(url)
    files = home.root / "files"
    wait_until(lambda: any(files.glob("*.partial")), "the first bytes")
    process.kill()
    process.wait()
    connection.close()
    (files / half.id).rename(files / f"{half.id}.partial")  # as if killed between the row and the name
    (files / "file-of-another-store").write_bytes(b"kept")
    for orphan in ("uploads/upload_never", "jobs/ftjob-never", "jobs/ftjob-elsewhere"):
        (home.root / orphan).mkdir()
    os.link(files / kept.id, home.root / "jobs/ftjob-never/training.jsonl")
    (home.root / "jobs/ftjob-elsewhere/training.jsonl").write_bytes(b"the last of it")
    with serving(home) as api:
        assert on_disk(api) == sorted([kept.id, half.id, "file-of-another-store", pending.id, part.id])
        assert [file.id for file in api.client().files.list()] == [half.id, kept.id]
        assert api.client().files.content(half.id).read() == jsonl()
        assert [path.name for path in (home.root / "jobs").iterdir()] == ["ftjob-elsewhere"]


def upload(client: openai.OpenAI, content: bytes, **more: Any) -> Upload:
    """A file in parts, by the client's own way."""
    given: dict[str, Any] = {"part_size": 1000, "purpose": "fine-tune"} | more
    return client.uploads.upload_file_chunked(
        file=content, filename="rows.jsonl", bytes=len(content), mime_type="text/jsonl", **given
    )


def test_a_file_in_parts_is_the_same_file(api: Api, client: openai.OpenAI, tmp_path: Path) -> None:
    content, path = jsonl(100), tmp_path / "rows.jsonl"
    path.write_bytes(content)
    done = client.uploads.upload_file_chunked(file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=3000)
    assert done.status == "completed" and done.file and done.file.bytes == len(content)
    assert client.files.content(done.file.id).read() == content
    assert not (api.service.uploads / done.id).exists()
    assert isinstance(refused(lambda: client.uploads.parts.create(done.id, data=b"1")), openai.BadRequestError)


def test_parts_that_are_not_the_file_are_refused_and_may_be_sent_again(client: openai.OpenAI) -> None:
    content = jsonl(10)
    begun = client.uploads.with_raw_response.create(
        bytes=len(content), filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    pending = Upload.model_validate_json(begun.content, strict=True)
    first = client.uploads.parts.create(pending.id, data=content[:500])
    second = client.uploads.parts.create(pending.id, data=content[500:])
    for ids, more, code in (
        ([first.id], {}, "wrong_size"),
        ([first.id, second.id, first.id], {}, "invalid_value"),
        ([first.id, "part_unknown"], {}, "invalid_value"),
        ([second.id, first.id], {}, "invalid_file_format"),
        ([first.id, second.id], {"md5": "0" * 32}, "md5_mismatch"),
    ):
        call = lambda ids=ids, more=more: client.uploads.complete(pending.id, part_ids=ids, **more)  # noqa: E731
        assert refused(call).code == code
    done = client.uploads.complete(pending.id, part_ids=[first.id, second.id])
    assert done.file and client.files.content(done.file.id).read() == content
    error = refused(lambda: client.uploads.complete(pending.id, part_ids=[first.id]))
    assert isinstance(error, openai.BadRequestError) and "completed already" in error.message


def test_lost_answers_of_an_upload_do_no_harm(api: Api) -> None:
    content = jsonl(3)
    with Dropping(api.url, 0, 2, 4) as proxy:
        client = api.client(max_retries=5).with_options(base_url=f"{proxy.url}/v1")
        done = upload(client, content)
        assert not proxy.lost
    assert done.file and api.client().files.content(done.file.id).read() == content


def test_uploads_end_by_cancel_and_by_time(api: Api, client: openai.OpenAI) -> None:
    made = [
        client.uploads.create(bytes=9, filename=f"{n}", mime_type="text/jsonl", purpose="fine-tune") for n in range(2)
    ]
    for each in made:
        client.uploads.parts.create(each.id, data=b"{}")
    assert client.uploads.cancel(made[0].id).status == "cancelled"
    assert isinstance(refused(lambda: client.uploads.cancel(made[0].id)), openai.BadRequestError)
    with api.service.store.begin() as session:
        session.execute(update(UploadRow).where(UploadRow.id == made[1].id).values(expires_at=time.time() - 1))
    assert "expired" in refused(lambda: client.uploads.parts.create(made[1].id, data=b"{}")).message
    sweep.sweep(api.service)
    assert not any(each.id in on_disk(api) for each in made)
