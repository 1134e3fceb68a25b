"""Fine-tuning in `loraport serve`: who has the queue of a home, and what is answered meanwhile; on the fake engine."""

import contextlib
import json
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import psycopg
import pytest
from sqlalchemy.orm import Session

from loraport.clients.errors import ResourceError, UsageError
from loraport.clients.hardware import Device
from loraport.clients.home import Home
from loraport.serve.checks import open_adapters
from loraport.serve.finetuning import jobs
from loraport.serve.finetuning.guard import Caller
from loraport.serve.finetuning.host import Host
from loraport.serve.finetuning.options import Options
from loraport.serve.finetuning.service import Service
from loraport.serve.gateway.access import ANYONE
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.jobs.settings import QueueSettings
from loraport.serve.plan.choose import NO_SLOTS, plan
from loraport.serve.plan.settings import Plan, Wanted, choose_slots
from loraport.serve.plan.shape import read_shape
from loraport.serve.serve import Request, prepare
from loraport.serve.store.ownership import QUEUE, Ownership
from loraport.serve.store.store import open_store
from loraport.serve.store.tables import Job, Status
from loraport.serve.supervise import without_slots
from loraport.train.base_model import Base
from tests.conftest import ROOT
from tests.finetuning import Queue, send
from tests.postgres import Postgres
from tests.serving import FAKE, Serving, serving, wait_until
from tests.test_adapters_accept import base
from tests.test_adapters_live import write_version

__all__ = ["base"]  # a fixture
FILES = "/v1/files"


def get(running: Serving, path: str = FILES) -> httpx.Response:
    """A question to an endpoint."""
    return httpx.get(f"http://127.0.0.1:{running.port}{path}", trust_env=False)


def code_of(running: Serving) -> str | None:
    """The code of what it refuses; None where it does not."""
    answer = get(running)
    return None if answer.status_code == 200 else str(answer.json()["error"]["code"])


def test_one_server_of_a_home_has_the_jobs_and_the_next_takes_them_over(home: Home, tiny_base: Path) -> None:
    given = ("--model", str(tiny_base), "--engine-command", FAKE)
    with serving(home, *given) as first:
        assert first.ready()["plan"]["LoRA"]["value"].endswith("of rank 16")
        wait_until(lambda: "tuning    POST http://127.0.0.1" in first.text, "what a person is told")
        wait_until(lambda: code_of(first) is None, "the routes")
        assert 'loraport_jobs{status="queued"} 0.0' in get(first, "/metrics").text
        assert get(first, "/v1/fine_tuning/jobs").json()["data"] == []
        with serving(home, *given) as second:
            second.ready()
            wait_until(lambda: code_of(second) == "jobs_elsewhere", "the lock of the first")
            assert f"http://127.0.0.1:{first.port}/v1" in get(second).json()["error"]["message"]
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{first.port}/v1", api_key="x")
            file = send(client)
            first.process.send_signal(signal.SIGTERM)
            assert first.end() == 0
            wait_until(lambda: code_of(second) is None, "the turn of the second")
            assert [each["id"] for each in get(second).json()["data"]] == [file.id]


def test_without_jobs_there_are_no_routes_and_no_slots(home: Home, tiny_base: Path) -> None:
    with serving(home, "--model", str(tiny_base), "--engine-command", FAKE, "--no-jobs") as running:
        assert running.ready()["plan"]["LoRA"]["value"] == "off"
        assert get(running).status_code == 404 and "tuning " not in running.text
        assert not (home.root / "jobs.sqlite").exists()


def test_a_refusal_that_lasts_keeps_nothing_of_the_requests(home: Home) -> None:
    host, depths = Host(Options.of(), home, 8000, "http://127.0.0.1:8000/v1"), []
    for _ in range(3):
        with pytest.raises(Refusal) as caught:
            host.find()
        depths.append(len(caught.traceback))
    assert caught.value.code == "jobs_starting" and depths[0] == depths[-1]


def test_a_database_that_is_away_keeps_nobody_from_chatting(
    home: Home, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPORT_JOBS_DATABASE", "postgresql://me:secret@127.0.0.1:1/jobs")
    with serving(home, "--model", str(tiny_base), "--engine-command", FAKE) as running:
        running.ready()
        answer = get(running)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "jobs_store"
        asked: Any = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        url = f"http://127.0.0.1:{running.port}/v1/chat/completions"
        assert httpx.post(url, json=asked, trust_env=False).status_code == 200
        wait_until(lambda: "warning: fine-tuning waits" in running.text, "what people are told")
        assert "secret" not in running.text


def test_one_server_of_a_postgresql_has_the_jobs(
    home: Home, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, postgres: Postgres, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAPORT_JOBS_DATABASE", postgres.fresh())
    given = ("--model", str(tiny_base), "--engine-command", FAKE)
    with serving(home, *given) as first:
        first.ready()
        wait_until(lambda: code_of(first) is None, "the routes")
        with serving(Home(tmp_path / "other"), *given) as second:
            second.ready()
            wait_until(lambda: code_of(second) == "jobs_elsewhere", "the lock of the first")
            assert "of this database" in get(second).json()["error"]["message"]
    assert not (home.root / "jobs.sqlite").exists()


def test_who_loses_the_queue_of_a_postgresql_hands_over_and_has_it_again(
    home: Home, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, postgres: Postgres
) -> None:
    url = postgres.fresh()
    monkeypatch.setenv("LORAPORT_JOBS_DATABASE", url)
    with serving(home, "--model", str(tiny_base), "--engine-command", FAKE) as running:
        running.ready()
        wait_until(lambda: code_of(running) is None, "the routes")
        end_owner(url)  # as a network does that gives up
        wait_until(lambda: owner(url) is not None, "the lock, taken again")
        assert code_of(running) is None
        with psycopg.connect(url, autocommit=True) as other:
            waiting = threading.Thread(target=other.execute, args=(f"SELECT pg_advisory_lock({QUEUE})".encode(),))
            waiting.start()
            wait_until(lambda: count_waiting(url) == 1, "another server, which is next")
            end_owner(url)
            waiting.join()
            wait_until(lambda: code_of(running) == "jobs_elsewhere", "the hand-over")
            wait_until(lambda: "another server has the queue" in running.text, "what people are told")
        wait_until(lambda: code_of(running) is None, "its turn again")
        assert get(running, "/v1/fine_tuning/jobs").json()["data"] == []


def locks(url: str, granted: bool) -> list[int]:
    """The processes of PostgreSQL that have the lock of the queue, or wait for it."""
    asked = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND granted = %s"
    with psycopg.connect(url) as connection:
        return [pid for (pid,) in connection.execute(asked, (QUEUE, granted))]


def owner(url: str) -> int | None:
    """Who has the lock; None where nobody does."""
    return next(iter(locks(url, True)), None)


def count_waiting(url: str) -> int:
    """How many wait for it."""
    return len(locks(url, False))


def end_owner(url: str) -> None:
    """End the connection that has the lock."""
    pid = owner(url)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT pg_terminate_backend(%s)", (pid,)).fetchone() == (True,)
    wait_until(lambda: owner(url) != pid, "its end")


def test_a_database_that_goes_away_at_the_start_is_waited_for(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def lack(_: Ownership) -> bool:
        tried.append("")
        if len(tried) == 3:
            host.over.set()
        raise ResourceError("the database of jobs cannot be used: it is gone.", "see whether it runs")

    monkeypatch.setattr(Ownership, "take", lack)
    monkeypatch.setattr("loraport.serve.finetuning.host.AGAIN_S", 0.01)
    host = Host(Options.of(), home, 8000, "http://127.0.0.1:8000/v1")
    host.run()
    assert len(tried) == 3 and host.why_not.code == "jobs_store" and host.settled.is_set()
    assert capsys.readouterr().err.count("warning") == 1
    host.stop()


def test_a_stop_leaves_no_service_that_was_being_made(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(Options.of(), home, 8000, "http://127.0.0.1:8000/v1")

    def make_late() -> bool:
        host.over.wait()
        host.service = cast(Any, "made while the server ends")
        return False

    monkeypatch.setattr(host, "take_turn", make_late)
    host.begin(cast(Any, None))
    host.tried.wait()
    host.stop()
    with pytest.raises(Refusal) as caught:
        host.find()
    assert caught.value.code == "jobs_stopping"


def test_a_database_that_cannot_be_is_said_before_the_engine_starts(
    home: Home, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPORT_JOBS_DATABASE", "mysql://box/jobs")
    running = Serving(home, "--model", str(tiny_base), "--engine-command", FAKE)
    assert running.end() == 2 and "jobs cannot be kept in mysql" in running.text


def test_a_result_of_an_earlier_server_is_listed_by_the_next(home: Home, tiny_base: Path) -> None:
    store = open_store(home)
    with store.begin() as session:
        job = Job(tenant="-", model="base", training_file="file-1", seed=1, method={}, request_sha256="")
        job.status, job.fine_tuned_model, job.adapter = Status.SUCCEEDED, "ft:base:loraport::1", f"{job.id}@v1"
        session.add(job)
    store.close()
    (home.root / "serving").mkdir()
    with serving(home, "--model", str(tiny_base), "--engine-command", FAKE) as running:
        running.ready()
        assert "ft:base:loraport::1" in [card["id"] for card in get(running, "/v1/models").json()["data"]]
    assert (home.root / "jobs.lock").exists()


@pytest.mark.parametrize(("words", "seconds"), [("90s", 90.0), ("1.5h", 5400.0), (" 7d ", 604800.0), ("30m", 1800.0)])
def test_limits_of_jobs_are_said_at_the_start(words: str, seconds: float) -> None:
    made = Options.of(per_key=2, time_limit=words)
    settings = made.queue_settings()
    assert (settings.rules.per_tenant, settings.time_limit_s) == (2, seconds)
    assert Options.of().queue_settings() == QueueSettings() == Options().queue_settings()


@pytest.mark.parametrize("words", ["", "h", "0h", "12", "1h30m", "-1h", "1e3s", "nanh", "²h"])
def test_a_time_limit_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match="is no length of time"):
        Options.of(time_limit=words)


def test_who_stops_a_job_sees_its_status_stay(home: Home, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    url, refused = postgres.fresh(), list[str]()
    store = open_store(home, url)
    job = Job(tenant="-", model="base", training_file="file-1", seed=1, method={}, request_sha256="")
    job.status = Status.RUNNING
    with store.begin() as session:
        session.add(job)
    wanted = jobs.want

    def end_meanwhile(session: Session, id: str, what: str) -> bool:
        with psycopg.connect(url) as other, contextlib.suppress(psycopg.errors.LockNotAvailable):
            other.execute("SET lock_timeout = '50ms'")
            other.execute("UPDATE jobs SET status = 'queued' WHERE id = %s", (id,))
            refused.append("it was changed")
        return wanted(session, id, what)

    monkeypatch.setattr(jobs, "want", end_meanwhile)
    service = Service(home, store, Queue(), bases=lambda: ["base"])
    assert jobs.ask_to_stop(service, Caller(ANYONE, "-"), job.id, "pause").wanted == "pause" and not refused
    store.close()


def test_slots_are_kept_for_what_will_be_trained(home: Home, tiny_base: Path) -> None:
    request = Request([], str(tiny_base), "127.0.0.1", 1, Wanted(), FAKE, [], json=False, drain_s=0, jobs=Options())
    launch = prepare(request, home)
    assert (launch.plan.tuned, launch.plan.rank) == (2, 16)
    lora = next(choice for choice in launch.plan.choices if choice.name == "LoRA")
    assert "for fine-tuned models" in lora.reason and "--no-jobs" in lora.reason
    refused = without_slots(launch, ["ValueError: FooForCausalLM does not support LoRA yet."])
    assert refused and (refused.plan.slots, refused.plan.tuned) == (0, 0)
    assert without_slots(launch, ["ValueError: something else"]) is None
    assert without_slots(replace(launch, plan=replace(launch.plan, tuned=0)), ["does not support LoRA"]) is None


def test_how_many_slots_and_of_which_rank() -> None:
    assert choose_slots(Wanted(tuned=2), [], 0) == (16, 2)
    assert choose_slots(Wanted(tuned=2), [], 1) == (16, 4)  # one to replace, one that stays empty
    assert choose_slots(Wanted(tuned=2, max_lora_rank=8), [], 0) == (8, 2)
    assert choose_slots(Wanted(tuned=2, max_lora_rank=64, max_loras=4), [], 0) == (64, 4)
    assert choose_slots(Wanted(), [], 0) == (0, 0)


def test_slots_that_do_not_fit_are_left_out() -> None:
    config = json.loads((ROOT / "examples/reader-9m/config.json").read_text())
    shape = read_shape(config, 18 << 20)
    assert shape

    def made(free: int, tuned: int) -> Plan | None:
        with contextlib.suppress(ResourceError):
            return plan(Wanted(tuned=tuned, context=8192), shape, [], Device("cpu", "CPU", free, free, 2))
        return None

    least = next(free for free in range(2 << 30, 4 << 30, 1 << 20) if made(free, 0))
    without = made(least, 2)
    assert without and without.slots == 0 and NO_SLOTS in without.warnings
    plenty = made(least + (1 << 30), 2)
    assert plenty and plenty.slots == 2 and NO_SLOTS not in plenty.warnings


def test_what_a_job_has_trained_is_served_by_no_other_name(home: Home, base: Base) -> None:
    write_version(home, base, "v1", "ftjob-1")
    with pytest.raises(UsageError, match="clients know it by its `ft:` name alone"):
        open_adapters(home, ["ftjob-1"], (0, 32))
    [named] = open_adapters(home, [f"mine={home.adapters}/ftjob-1/v1"], (0, 32))
    assert named.manifest.name == "mine"
