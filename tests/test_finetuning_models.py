"""Fine-tuned models between tenants: nobody waits for another's removals and loads, and errors name only one's own."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import delete

from loraport.clients.errors import EndpointError, EngineError, LoraportError, ResourceError, VerificationError
from loraport.clients.home import Home
from loraport.serve.gateway import tuned
from loraport.serve.gateway.access import ANYONE
from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.metrics import without_keys
from loraport.serve.jobs.watching import page
from loraport.serve.store.tables import Permission
from loraport.train.base_model import Base
from tests.gateway import error_of
from tests.serving import wait_until
from tests.test_adapters_accept import base
from tests.test_jobs_handover import Tuning, trained, tuning

__all__ = ["base"]  # a fixture
OTHER = "ftjob-0123456789abcdef01234567@v1"
MIXED = VerificationError(
    f"requests for {OTHER} get the weights of another model.", "report it", ("alone: 'hers'", "together: 'his'")
)


@pytest.fixture
def box(home: Home, base: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tuning]:
    """Ann, Bob and an engine; what is known of a model is looked up each time."""
    monkeypatch.setattr("loraport.serve.jobs.names.FRESH_S", 0.0)
    with tuning(home, base) as box:
        yield box


@contextmanager
def busy(box: Tuning) -> Iterator[Any]:
    """Loads wait meanwhile, as behind a long one; gives those that do."""
    go, loads = threading.Event(), box.at.running.gateway.loads
    loads.thread.submit(go.wait, 120)
    try:
        yield loads.pending
    finally:
        go.set()


def path_of(model: str) -> str:
    """Where a model is shown and deleted."""
    return f"/v1/models/{quote(model, safe='')}"


def raising(error: LoraportError) -> Callable[..., Any]:
    """A function that ends so."""

    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_removals_and_loads_hold_up_nobody(box: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    name, go = box.succeed(), threading.Event()
    monkeypatch.setattr(box.models, "delete", lambda _: go.wait(120))
    count = min(32, (os.cpu_count() or 1) + 4) + 1  # as many as the event loop has threads by itself, and one more

    def remove() -> int:
        url = f"{box.at.running.url}{path_of(name)}"
        return httpx.delete(url, headers=box.headers("ann"), timeout=120, trust_env=False).status_code

    with ThreadPoolExecutor(count) as pool:
        try:
            removed = [pool.submit(remove) for _ in range(count)]
            with busy(box):
                removals = box.at.running.gateway.loads.removals
                wait_until(lambda: removals._work_queue.qsize() == count - 1, "all removals wait")  # type: ignore[attr-defined]
                assert box.listed("ann") == [name] and box.ask("ann", name).status_code == 200
                assert box.at.client.get("/metrics", headers=box.headers("root")).status_code == 200
        finally:
            go.set()
        assert {each.result() for each in removed} == {200}


def ask_beside(box: Tuning, user: str, model: str) -> tuple[threading.Thread, list[httpx.Response]]:
    """A request that may wait, and its answer."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(box.ask(user, model)))
    thread.start()
    return thread, answers


def test_what_is_deleted_while_it_waits_is_not_loaded(box: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{box.succeed(steps=(5,))}:ckpt-step-5"
    loads: list[str] = []
    monkeypatch.setattr(box.at.live, "load", loads.append)
    with busy(box) as pending:
        thread, answers = ask_beside(box, "ann", name)
        wait_until(lambda: bool(pending), "the request waits")
        assert box.at.client.delete(path_of(name), headers=box.headers("ann")).status_code == 200
    thread.join(60)
    assert answers[0].status_code == 404 and loads == []


def test_what_is_shared_no_longer_while_it_waits_is_not_loaded(box: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{box.succeed(steps=(5,))}:ckpt-step-5"
    box.share(name, "bob")
    loads: list[str] = []
    monkeypatch.setattr(box.at.live, "load", loads.append)
    with busy(box) as pending:
        thread, answers = ask_beside(box, "bob", name)
        wait_until(lambda: bool(pending), "the request waits")
        with box.store.begin() as session:
            session.execute(delete(Permission))
    thread.join(60)
    assert answers[0].status_code == 404 and loads == []


def test_what_is_deleted_while_its_load_waits_for_another_change_is_not_loaded(
    box: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, models = box.models.find(f"{box.succeed(steps=(5,))}:ckpt-step-5"), box.models
    assert found
    loads: list[str] = []
    looked = threading.Event()
    monkeypatch.setattr(box.at.live, "load", loads.append)

    def find(_: str) -> tuned.Tuned:
        looked.set()
        return found

    monkeypatch.setattr(models, "find", find)
    with box.at.live.lock:
        load = threading.Thread(target=models.load, args=(found, Key("ann", "", 0.0)))
        load.start()
        assert looked.wait(60)
        removal = threading.Thread(target=models.delete, args=(found,))
        removal.start()
        wait_until(lambda: found.served in models.removed, "the removal")
    load.join(60)
    removal.join(60)
    assert loads == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MIXED, "does not answer with it as it did"),
        (EndpointError(f"the engine answered 500 for {OTHER}: oh."), "try again"),
        (ResourceError("no disk space left while writing /home/me/x."), "slots are in use"),
    ],
)
def test_a_request_is_told_of_no_other_model(
    box: Tuning, monkeypatch: pytest.MonkeyPatch, error: LoraportError, words: str
) -> None:
    name = f"{box.succeed(steps=(5,))}:ckpt-step-5"
    monkeypatch.setattr(box.at.live, "load", raising(error))
    refused = box.ask("ann", name)
    assert refused.status_code == 503 and words in error_of(refused)["message"] and name in refused.text
    assert not any(each in refused.text for each in ("ftjob-", "/home/me", "'hers'", "report it"))


def test_a_model_whose_files_are_gone_tells_no_place_and_no_names(box: Tuning) -> None:
    name = f"{box.succeed(steps=(5,))}:ckpt-step-5"
    found = box.models.find(name)
    assert found
    (box.home.adapters / found.served).rename(box.home.root / "away")
    refused = box.ask("ann", name)
    assert refused.status_code == 503 and name in refused.text
    assert "ftjob-" not in refused.text and str(box.home.root) not in refused.text


def test_a_store_that_is_away_is_told_without_its_address(box: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    away = raising(ResourceError("the database of jobs at postgresql://me@box/jobs cannot be used.", "check box"))
    monkeypatch.setattr(box.models, "listing", away)
    refused = box.at.client.get("/v1/models", headers=box.headers("ann"))
    assert refused.status_code == 503 and "postgresql" not in refused.text and "box" not in refused.text


@pytest.mark.parametrize("error", [MIXED, EndpointError(f"the engine answered 500 for {OTHER}: oh.")])
def test_what_is_wrong_with_another_model_fails_no_job(
    box: Tuning, monkeypatch: pytest.MonkeyPatch, error: LoraportError
) -> None:
    job = box.train()
    monkeypatch.setattr(box.at.live, "load", raising(error))
    with pytest.raises(EngineError) as caught:
        box.models.accept(job, trained(job))
    told = f"{caught.value.message} {caught.value.hint} {caught.value.details}"
    assert "ftjob-" not in told and "'hers'" not in told


def test_a_job_whose_adapter_is_missing_is_told_no_names_of_others(box: Tuning) -> None:
    box.succeed("bob")
    job = box.train()
    (box.home.adapters / job.id).rename(box.home.root / "away")
    with pytest.raises(LoraportError, match=f"there is no adapter {job.id}@v1 in the home") as caught:
        box.models.accept(job, trained(job))
    assert caught.value.hint == ""


def test_one_tenant_leaves_room_among_the_loads_that_wait(box: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "LOAD_WAIT_S", 0.1)
    steps = (5, 10, 15)
    anns, bobs = ([f"{box.succeed(who, steps)}:ckpt-step-{step}" for step in steps] for who in ("ann", "bob"))
    with busy(box) as pending:
        said = [error_of(box.ask("ann", name))["message"] for name in (*anns, anns[0])]
        assert ["Other fine-tuned" in words for words in said] == [False, False, True, False]
        assert "is being loaded" in error_of(box.ask("bob", bobs[0]))["message"]
        assert len(pending) == 3
    wait_until(lambda: box.ask("ann", anns[2]).status_code == 200, "room again")


def test_a_load_that_failed_is_not_tried_again_at_once(box: Tuning) -> None:
    name = f"{box.succeed(steps=(5,))}:ckpt-step-5"
    found, failed = box.models.find(name), box.at.running.gateway.loads.failed
    assert found
    box.at.knob(wrong=found.reference)
    first = box.ask("ann", name)
    assert first.status_code == 503 and failed[found.served].wait_s == tuned.FAILED_S
    box.at.knob(wrong="")
    assert box.ask("ann", name).json() == first.json()  # nobody is asked, nothing evicted
    box.at.knob(wrong=found.reference)
    failed[found.served].until = 0.0
    assert box.ask("ann", name).status_code == 503 and failed[found.served].wait_s == 2 * tuned.FAILED_S
    box.at.knob(wrong="")
    failed[found.served].until = 0.0
    assert box.ask("ann", name).status_code == 200 and failed == {}


def test_a_model_is_not_barred_for_what_another_does(box: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{box.succeed(steps=(5,))}:ckpt-step-5"
    with monkeypatch.context() as patched:
        patched.setattr(box.at.live, "load", raising(MIXED))
        assert box.ask("ann", name).status_code == 503
    assert box.at.running.gateway.loads.failed == {} and box.ask("ann", name).status_code == 200


def test_where_there_are_no_keys_nobody_leaves_room() -> None:
    loads = tuned.Loads(thread=ThreadPoolExecutor(1))
    go = threading.Event()

    def load(*_: object) -> None:
        go.wait(60)

    async def begin() -> int:
        for number in range(tuned.EACH_WAITED_FOR + 1):
            each = tuned.Tuned(f"ft:{number}", f"ftjob-{number}@v1", "-")
            loads.begin(each, ANYONE, load)
        count = len(loads.pending)
        go.set()
        await tuned.asyncio.wait({task for task, _ in loads.pending.values()})
        return count

    assert tuned.asyncio.run(begin()) == tuned.EACH_WAITED_FOR + 1


def test_figures_name_keys_to_administrators_alone(box: Tuning) -> None:
    box.at.running.gateway.figures = page(box.store)
    box.train("ann", estimated_s=3600.0)
    box.ask("ann", "base")
    pages = {user: box.at.client.get("/metrics", headers=box.headers(user)).text for user in ("root", "ann")}
    pages["nobody"] = box.at.client.get("/metrics").text
    assert 'key="ann"' in pages["root"] and 'tenant="ann"' in pages["root"]
    for user in ("ann", "nobody"):
        assert '"ann"' not in pages[user]
        assert "loraport_gateway_requests_total{" in pages[user] and "loraport_jobs{" in pages[user]


def test_what_names_a_key_is_found_by_its_label() -> None:
    kept = b'# HELP x key="a"\nx 1\nx{a="tenant=\\"b\\",key=\\"c\\""} 1\nx{monkey="a"} 2\n'
    gone = b'x{key="a"} 1\nx{kind="a,b",tenant="b"} 2\nx{a="\\\\",key="c"} 3\n'
    assert without_keys(kept + gone) == kept
