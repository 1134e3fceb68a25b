"""A disk that is really full, under the API and the queue: words for everybody, nothing half-written, then all goes on.

A small tmpfs holds the home; to mount one takes root, so that elsewhere this is skipped.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import select

from loraport.clients.home import Home
from loraport.serve.finetuning import disk
from loraport.serve.jobs import attempt
from loraport.serve.store.tables import File, Job, Status
from tests.finetuning import Api, jsonl, send
from tests.finetuning import serving as answering
from tests.queue_kit import get, journal, messages, serving, submit, wait, wait_for, want

MIB = 1 << 20
STEP = re.compile(r"step \d+")  # whole: the disk may have been full in the middle of a line
SPARE = 2 * MIB  # below which nothing is begun; in earnest it is more than this disk has


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home on a disk of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk that is full takes a mount: {mounted.stderr.strip()}")
    monkeypatch.setattr(disk, "SPARE_BYTES", SPARE)
    monkeypatch.setattr(attempt, "SPARE_DISK", SPARE)
    yield Home(folder / "home")
    subprocess.run(["umount", "-l", folder], check=True)


def fill(home: Home, but: int = 0) -> Path:
    """Fill the disk to its last page, or to so many bytes."""
    path = home.root.parent / "filler"
    try:
        with path.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size - but)
    return path


def refused(call: Callable[[], Any]) -> openai.APIStatusError:
    """How a request is refused."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


def contents(api: Api) -> dict[str, int]:
    """What lies in the folder of files."""
    return {path.name: path.stat().st_size for path in api.service.files.iterdir()}


def rows(api: Api) -> dict[str, int]:
    """What the table says of them."""
    with api.service.store.read() as session:
        return {file.id: file.bytes for file in session.scalars(select(File))}


def test_what_does_not_fit_is_refused_and_leaves_nothing(small: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(small) as api:
        client = api.client()
        kept = send(client)
        filler = fill(small, but=MIB)
        assert refused(lambda: send(client)).code == "disk_full"  # before a byte of it is written
        monkeypatch.setattr(disk, "SPARE_BYTES", 0)
        large = jsonl(2) + b'{"messages": "' + bytes(3 * MIB).replace(b"\0", b"a") + b'"}\n'
        error = refused(lambda: send(client, large))  # the disk is full when a part of it is there
        assert (error.status_code, error.code) == (507, "disk_full") and "disk" in str(error)
        assert contents(api) == rows(api) == {kept.id: kept.bytes}
        filler.unlink()
        again = send(client, large)
        assert contents(api) == rows(api) == {kept.id: kept.bytes, again.id: len(large)}
        assert client.files.content(again.id).read() == large


def test_on_a_full_disk_jobs_wait_and_then_go_on(small: Home) -> None:
    with answering(small) as api, serving(small, attempts=1000) as queue:
        client = api.client()
        file = send(client)
        first = submit(queue, "-", steps=100_000, step_s=0.01)
        wait_for(lambda: is_training(small, first))
        filler = fill(small)
        wait_for(lambda: not queue.parts.runner.is_running(first))  # it could not keep its checkpoint
        assert refused(lambda: send(client)).code == "disk_full"
        made = client.fine_tuning.jobs.list().data  # who only reads is answered
        assert [job.id for job in made] == [first]
        second = attempt_job(client, file.id)
        assert get(queue, first).status in (Status.RUNNING, Status.QUEUED)
        assert second is None or get(queue, second).status in (Status.VALIDATING, Status.QUEUED, Status.RUNNING)
        before = journal(small, first)
        filler.unlink()
        wait_for(lambda: len(journal(small, first)) > len(before) + 3)
        want(queue, first, "cancel")
        assert wait(queue, first).status == Status.CANCELLED
        steps = [int(line.split()[1]) for line in journal(small, first) if STEP.fullmatch(line)]
        assert steps[-1] == len(set(steps))  # it went on from its checkpoint, without a gap
        second = second or attempt_job(client, file.id)
        assert second and wait(queue, second).status == Status.SUCCEEDED
        assert "New fine-tuned model created" in " ".join(messages(queue, second))
        assert {path.suffix for path in api.service.files.iterdir()} == {""}
        with api.service.store.read() as session:
            assert session.connection().exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            assert len(session.scalars(select(Job)).all()) == 2


def is_training(home: Home, job_id: str) -> bool:
    """Whether it has kept checkpoints."""
    return (home.root / "jobs" / job_id / "checkpoint").exists() and "step 3" in journal(home, job_id)


def attempt_job(client: openai.OpenAI, file_id: str) -> str | None:
    """A job; None where it is refused in words, because the database has no room for it."""
    try:
        return client.fine_tuning.jobs.create(model="base", training_file=file_id).id
    except openai.APIStatusError as error:
        assert error.status_code in (503, 507) and ("disk" in str(error) or "nothing was changed" in str(error))
        return None
