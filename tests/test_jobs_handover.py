"""What jobs have trained, served: public names, tenants, loads on demand, deletion. The engine is the fake one."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import select

from loraport.clients.errors import AdapterError, EngineError, VerificationError
from loraport.clients.home import Home
from loraport.serve.gateway import keys, tuned
from loraport.serve.gateway.metrics import without_names
from loraport.serve.gateway.state import Phase
from loraport.serve.gateway.upstream import Renamed
from loraport.serve.jobs.handover import Models, unservable
from loraport.serve.jobs.names import checkpoint_adapter, checkpoint_name, model_name
from loraport.serve.jobs.seams import Trained
from loraport.serve.jobs.settings import QueueSettings
from loraport.serve.jobs.validate import Fit, Unfit, Validator
from loraport.serve.store.store import Store, open_store
from loraport.serve.store.tables import Checkpoint, File, Job, Permission, Status, new_id
from loraport.train.base_model import Base
from loraport.train.config import RunConfig
from tests.gateway import CHAT, asking, error_of
from tests.postgres import Postgres
from tests.serving import wait_until
from tests.test_adapters_accept import base
from tests.test_adapters_live import ON_GPU, PLAN, Bench, bench, write_version

__all__ = ["base"]  # a fixture


@dataclass
class Tuning:
    """A gateway whose engine serves what jobs have trained; and keys of its users."""

    at: Bench
    home: Home
    base: Base
    store: Store
    models: Models
    users: dict[str, str]
    tokens: int = 10

    def train(self, tenant: str = "ann", steps: tuple[int, ...] = (), **fields: Any) -> Job:
        """A job whose adapter is in the home, and not handed over."""
        job = Job(tenant=tenant, model="base", training_file="file-1", seed=1, method={}, request_sha256="")
        job.status = Status.RUNNING
        for name, value in fields.items():
            setattr(job, name, value)
        with self.store.begin() as session:
            session.add(job)
        for name in (job.id, *(checkpoint_adapter(job.id, step) for step in steps)):
            self.tokens += 1
            write_version(self.home, self.base, "v1", name, self.tokens)
        return job

    def succeed(self, tenant: str = "ann", steps: tuple[int, ...] = (), **fields: Any) -> str:
        """The public name of what a job has trained, handed over as the queue does."""
        job = self.train(tenant, steps, **fields)
        name = self.models.accept(job, trained(job))
        self.finish(job, name, steps)
        return name

    def finish(self, job: Job, name: str, steps: tuple[int, ...] = ()) -> None:
        """Write down that a job has succeeded."""
        with self.store.begin() as session:
            job = session.merge(job)
            job.status, job.fine_tuned_model, job.adapter = Status.SUCCEEDED, name, f"{job.id}@v1"
            for step in steps:
                adapter = f"{checkpoint_adapter(job.id, step)}@v1"
                session.add(
                    Checkpoint(job_id=job.id, step=step, model=checkpoint_name(job, step), adapter=adapter, metrics={})
                )

    def ask(self, user: str, model: str, **more: Any) -> httpx.Response:
        """A chat request of a user."""
        return self.at.client.post(CHAT, json=asking(model=model, **more), headers=self.headers(user))

    def headers(self, user: str) -> dict[str, str]:
        """A user's key."""
        return {"authorization": f"Bearer {self.users[user]}"}

    def listed(self, user: str) -> list[str]:
        """GET /v1/models of a user, without the base."""
        cards = self.at.client.get("/v1/models", headers=self.headers(user)).json()["data"]
        return [card["id"] for card in cards if card["kind"] == "adapter"]

    def share(self, model: str, tenant: str) -> None:
        """Let another tenant use a model."""
        with self.store.begin() as session:
            session.add(Permission(model=model, tenant=tenant, granted_by="ann"))


def trained(job: Job) -> Trained:
    """What the trainer of a job says."""
    return Trained(job.id, "v1", {}, 100)


@contextlib.contextmanager
def tuning(home: Home, base: Base, plan: Any = PLAN, url: str | None = None, **knobs: str) -> Iterator[Tuning]:
    """Keys, store, engine and gateway."""
    users = {name: keys.create(home.keys, name, is_admin=name == "root")[0] for name in ("ann", "bob", "root")}
    store = open_store(home, url)
    with bench(home, base, plan, **knobs) as at:
        models = Models(store, home, at.live)
        at.running.gateway.tuned = models
        yield Tuning(at, home, base, store, models, users)
    store.close()


def test_a_result_is_asked_by_its_public_name_alone(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        job = box.train(suffix="support")
        name = box.models.accept(job, trained(job))
        assert name == f"ft:base:ann:support:{job.id[6:18]}" and box.listed("ann") == []
        box.finish(job, name)
        assert box.listed("ann") == [name]
        answer = box.ask("ann", name)
        assert answer.status_code == 200 and answer.json()["model"] == name
        assert f'"model":"{job.id}@v1"' in box.at.engine.bodies()[-1].replace(" ", "")
        for internal in (job.id, f"{job.id}@v1", f"{job.id}:latest"):
            refused = box.ask("ann", internal)
            assert refused.status_code == 404 and error_of(refused)["models"] == ["base"]
        card = box.at.client.get(f"/v1/models/{quote(name, safe='')}", headers=box.headers("ann")).json()
        assert (card["id"], card["parent"], card["verified"], card["owned_by"]) == (name, "base", True, "ann")
        assert job.id not in str(card)


def test_handing_over_twice_is_fine(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        job = box.train()
        assert box.models.accept(job, trained(job)) == box.models.accept(job, trained(job)) == model_name(job)
        assert box.at.loaded() == [f"{job.id}@v1"]


def test_another_tenant_gets_the_answer_of_a_name_that_is_none(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        name = box.succeed("ann")
        nothing = name[:-2] + "zz"
        for model in (name, nothing):
            refused = error_of(box.ask("bob", model))
            assert refused["message"] == f"There is no model {model!r}. There is: base."
        for method, path in (("GET", "/v1/models/"), ("DELETE", "/v1/models/")):
            answers = [
                box.at.client.request(method, path + quote(model, safe=""), headers=box.headers("bob"))
                for model in (name, nothing)
            ]
            assert [answer.status_code for answer in answers] == [404, 404]
            assert answers[0].text.replace(name, "") == answers[1].text.replace(nothing, "")
        assert box.listed("bob") == [] and box.listed("root") == [name]
        assert box.ask("root", name).status_code == 200
        near = error_of(box.ask("ann", nothing))
        assert f"Did you mean {name}?" in near["message"]


def test_a_model_is_shared_and_shared_no_longer(home: Home, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraport.serve.jobs.names.FRESH_S", 0.0)
    with tuning(home, base) as box:
        name = box.succeed("ann", steps=(5,))
        assert box.ask("bob", name).status_code == 404
        box.share(name, "bob")
        assert box.ask("bob", name).json()["model"] == name and box.listed("bob") == [name]
        assert box.ask("bob", f"{name}:ckpt-step-5").status_code == 404
        path = f"/v1/models/{quote(name, safe='')}"
        refused = box.at.client.delete(path, headers=box.headers("bob"))
        assert refused.status_code == 403 and error_of(refused)["code"] == "not_owner"
        with box.store.begin() as session:
            session.delete(session.scalars(select(Permission)).one())
        assert box.ask("bob", name).status_code == 404 and box.listed("bob") == []


def test_streams_and_errors_name_the_model_as_it_was_asked(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        name = box.succeed()
        streamed = box.ask("ann", name, stream=True, max_tokens=5).text
        assert streamed.count(f'"model": "{name}"') + streamed.count(f'"model":"{name}"') >= 5
        assert "ftjob-" not in streamed
        box.at.live.holders.slots[0].post("/v1/unload_lora_adapter", {"lora_name": box.at.loaded()[0]}, 5)
        refused = box.ask("ann", name)  # the engine has lost it behind our back, and says so
        assert refused.status_code >= 400 and "ftjob-" not in refused.text


def test_what_a_text_quotes_stays() -> None:
    names = Renamed("ftjob-1@v1", "ft:base:é:x")
    said = b'data: {"model": "ftjob-1@v1", "content": "{\\"model\\": \\"ftjob-1@v1\\"}"}\n\n'
    pieces = b"".join(names.take(said[at : at + 7]) for at in range(0, len(said), 7)) + names.end()
    assert pieces == said.replace(b'"model": "ftjob-1@v1", ', b'"model": "ft:base:\\u00e9:x", ')
    assert names.whole(b'{"model":"ftjob-12@v1"}') == b'{"model":"ftjob-12@v1"}'


def test_figures_name_no_model(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        name = box.succeed()
        box.ask("ann", name)
        page = box.at.client.get("/metrics", headers=box.headers("root")).text
        assert 'model="fine-tuned"' in page and "ft:" not in page and "ftjob-" not in page
    told = b'a{names="ftjob-1@v1,ftjob-2.step-5@v1"} 1\na{names="ftjob-3@v1,ftjob-4@v1"} 2\nb 3\nb 3\n'
    assert without_names(told) == b'a{names="fine-tuned,fine-tuned"} 2\nb 3\nb 3\n'


def test_a_checkpoint_is_loaded_when_it_is_asked_for(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        name = box.succeed(steps=(5, 10))
        assert box.listed("ann") == [name, f"{name}:ckpt-step-5", f"{name}:ckpt-step-10"]
        assert len(box.at.loaded()) == 1
        assert box.ask("ann", f"{name}:ckpt-step-5").json()["model"] == f"{name}:ckpt-step-5"
        assert any(".step-5@" in loaded for loaded in box.at.loaded())


@pytest.mark.parametrize("plan", [PLAN, ON_GPU])
def test_every_model_that_is_listed_answers(home: Home, base: Base, plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraport.serve.jobs.handover.MOST_HELD", 4)
    with tuning(home, base, plan) as box:
        names = [box.succeed() for _ in range(8)]
        most = 2 if plan is PLAN else 4
        assert len(box.models.held()) == most == len(box.at.loaded())
        for name in [*names, names[0]]:
            assert box.ask("ann", name).json()["model"] == name
        assert len(box.models.held()) == most
        kept = {box.models.find(name).served for name in (names[0], names[-1])}  # type: ignore[union-attr]
        assert kept <= set(box.models.held())  # who was asked last


def test_other_adapters_get_room_and_keep_it(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        first, second = box.succeed(), box.succeed()
        for adapter in ("one", "two"):
            write_version(home, base, "v1", adapter)
            box.at.live.load(adapter)
        assert sorted(box.at.loaded()) == ["one@v1", "two@v1"]
        refused = box.ask("ann", first)  # they are there because somebody named them
        assert refused.status_code == 503 and refused.headers["x-should-retry"] == "false"
        assert first in error_of(refused)["message"] and "slots are in use" in error_of(refused)["message"]
        box.at.live.unload("one")
        assert box.ask("ann", second).json()["model"] == second


def test_a_model_that_answers_now_is_let_go_when_it_has_answered(home: Home, base: Base) -> None:
    with tuning(home, base, token_s="0.02") as box:
        busy, other = box.succeed(), box.succeed()
        ended: list[str] = []

        def read() -> None:
            answer = box.ask("ann", busy, max_tokens=60, stream=True)
            ended.append(answer.text)

        reader = threading.Thread(target=read)
        reader.start()
        served = box.models.find(busy)
        assert served
        wait_until(lambda: box.at.running.in_flight(served.reference) == 1, "the stream")
        third = box.succeed()  # `other` gives way, for it is asked by nobody
        assert served.served in box.models.held() and other in box.listed("ann")
        assert box.ask("ann", third).status_code == 200
        reader.join(60)
        assert ended[0].rstrip().endswith("data: [DONE]")


def test_after_a_restart_all_are_there_again(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        name = box.succeed(steps=(5,))
        users = box.users
    store = open_store(home)
    with bench(home, base) as at:
        at.running.gateway.tuned = models = Models(store, home, at.live)
        box = Tuning(at, home, base, store, models, users)
        assert box.listed("ann") == [name, f"{name}:ckpt-step-5"] and at.loaded() == []
        assert box.ask("ann", name).json()["model"] == name and len(at.loaded()) == 1
    store.close()


def test_what_is_deleted_is_gone_for_good(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        kept, name = box.succeed(), box.succeed(steps=(5,))
        box.share(name, "bob")
        box.ask("ann", f"{name}:ckpt-step-5")
        path = f"/v1/models/{quote(name, safe='')}"
        gone = box.at.client.delete(path, headers=box.headers("ann"))
        assert gone.json() == {"id": name, "object": "model", "deleted": True}
        assert box.listed("ann") == [kept] and box.listed("bob") == []
        for asked in (name, f"{name}:ckpt-step-5"):
            assert box.ask("ann", asked).status_code == 404
        assert box.at.client.delete(path, headers=box.headers("ann")).status_code == 404
        left = [folder.name for folder in home.adapters.iterdir() if any(folder.iterdir())]
        found = box.models.find(kept)
        assert found and left == [found.served]
        with box.store.read() as session:
            assert list(session.scalars(select(Permission))) == [] == list(session.scalars(select(Checkpoint)))


def test_names_on_postgresql(home: Home, base: Base, postgres: Postgres) -> None:
    with tuning(home, base, url=postgres.fresh()) as box:
        name = box.succeed(steps=(5,))
        box.share(f"{name}:ckpt-step-5", "bob")
        assert box.listed("ann") == [name, f"{name}:ckpt-step-5"] and box.listed("bob") == [f"{name}:ckpt-step-5"]
        assert box.ask("bob", f"{name}:ckpt-step-5").status_code == 200 and box.ask("bob", name).status_code == 404
        box.at.client.delete(f"/v1/models/{quote(name, safe='')}", headers=box.headers("ann"))
        assert box.listed("root") == []
        box.models.bury_left()


def test_a_checkpoint_is_deleted_alone(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        name = box.succeed(steps=(5, 10))
        path = f"/v1/models/{quote(name + ':ckpt-step-5', safe='')}"
        assert box.at.client.delete(path, headers=box.headers("ann")).status_code == 200
        assert box.listed("ann") == [name, f"{name}:ckpt-step-10"]


def test_requests_that_run_end_before_the_files_go(home: Home, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraport.serve.jobs.handover.DELETE_WAIT_S", 0.1)
    with tuning(home, base, token_s="0.02") as box:
        name = box.succeed()
        found = box.models.find(name)
        assert found
        ended: list[str] = []
        reader = threading.Thread(target=lambda: ended.append(box.ask("ann", name, max_tokens=60, stream=True).text))
        reader.start()
        wait_until(lambda: box.at.running.in_flight(found.reference) == 1, "the stream")
        box.at.client.delete(f"/v1/models/{quote(name, safe='')}", headers=box.headers("ann"))
        assert reader.is_alive() and (home.adapters / found.served / "v1").is_dir()
        reader.join(60)
        assert ended[0].rstrip().endswith("data: [DONE]")
        wait_until(lambda: not (home.adapters / found.served).exists(), "the files")


def test_what_a_killed_server_was_deleting_is_deleted_by_the_next(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        kept, name = box.succeed(), box.succeed(steps=(5,))
        found = box.models.find(name)
        assert found
        box.models.forget_rows(found)  # and then it was killed
        box.models.bury_left()
        still = box.models.find(kept)
        assert still and [folder.name for folder in home.adapters.iterdir()] == [still.served]


def test_the_base_and_other_adapters_are_not_deleted(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        refused = box.at.client.delete("/v1/models/base", headers=box.headers("ann"))
        assert refused.status_code == 403 and error_of(refused)["code"] == "not_deletable"


def test_an_adapter_that_is_not_applied_is_refused(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        job = box.train()
        box.at.knob(wrong=f"{job.id}@v1")
        with pytest.raises(VerificationError, match="is loaded but not applied"):
            box.models.accept(job, trained(job))
        assert box.at.loaded() == []


def test_an_engine_that_cannot_say_now_is_asked_again(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        job = box.train()
        box.at.state.begin(Phase.RESTARTING, "it crashed")
        with pytest.raises(EngineError):
            box.models.accept(job, trained(job))
        box.at.state.ready()
        assert box.models.accept(job, trained(job))


def test_a_rank_without_slots_is_no_matter_of_time(home: Home, base: Base) -> None:
    with tuning(home, base, replace(PLAN, rank=1)) as box:
        job = box.train()
        with pytest.raises(AdapterError, match="slots of this endpoint hold 1"):
            box.models.accept(job, trained(job))


def test_a_model_that_cannot_be_loaded_any_more_is_told_of_by_its_public_name(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        name, _ = box.succeed(steps=(5,)), box.succeed()
        found = box.models.find(f"{name}:ckpt-step-5")
        assert found
        (home.adapters / found.served / "v1" / "adapter_model.safetensors").unlink()
        refused = box.ask("ann", f"{name}:ckpt-step-5")
        assert refused.status_code == 503 and error_of(refused)["code"] == "model_not_served"
        assert f"{name}:ckpt-step-5" in error_of(refused)["message"]


def test_a_request_waits_for_its_model_and_then_is_told_when_to_come_back(
    home: Home, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "LOAD_WAIT_S", 0.1)
    with tuning(home, base) as box:
        name = box.succeed(steps=(5,))
        go, loads = threading.Event(), []

        def load(wanted: tuned.Tuned, key: keys.Key) -> None:
            loads.append(wanted.name)
            go.wait(60)
            Models.load(box.models, wanted, key)

        monkeypatch.setattr(box.models, "load", load)
        for _ in range(2):  # the second waits for the same load
            answer = box.ask("ann", f"{name}:ckpt-step-5")
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            assert error_of(answer)["code"] == "model_loading"
        go.set()
        wait_until(lambda: box.ask("ann", f"{name}:ckpt-step-5").status_code == 200, "the load")
        assert loads.count(f"{name}:ckpt-step-5") == 1


def test_what_the_store_said_last_counts_while_it_is_away(home: Home, base: Base) -> None:
    with tuning(home, base) as box:
        name = box.succeed()
        assert box.ask("ann", name).status_code == 200
        box.store.engine.dispose()
        path = home.root / "jobs.sqlite"
        path.rename(path.with_suffix(".away"))
        path.mkdir()
        box.models.found = {known: (found, 0.0) for known, (found, _) in box.models.found.items()}
        assert box.ask("ann", name).status_code == 200
        path.rmdir()
        path.with_suffix(".away").rename(path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preset": "high_capacity_r32_all"}, "--max-lora-rank 32"),
        ({"rank": 8, "target_modules": ("q_proj", "lm_head")}, "no slots for lm_head"),
        ({"rank": 8, "target_modules": ("q_proj",)}, None),
        ({"rank": 16}, None),
        ({}, None),  # the data decide
    ],
)
def test_what_could_not_be_served_is_known_before_it_is_trained(
    home: Home, base: Base, fields: dict[str, Any], words: str | None
) -> None:
    plan = replace(PLAN, rank=16, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    with tuning(home, base, plan) as box:
        reason = box.models.servable(RunConfig(model="base", data="rows.jsonl", **fields))
        assert (reason is None) == (words is None) and (words or "") in (reason or "")
    assert "without LoRA slots" in (unservable(8, (), replace(PLAN, slots=0, rank=0)) or "")


@pytest.mark.parametrize(("said", "trained_with"), [({}, 8), ({"rank": 16}, None)])
def test_a_rank_that_the_data_choose_is_one_that_can_be_served(
    home: Home, base: Base, said: dict[str, Any], trained_with: int | None
) -> None:
    program = (
        "import json, sys, yaml; config = yaml.safe_load(open(sys.argv[sys.argv.index('--config') + 1])); "
        "rank = config.get('rank', 32); print(json.dumps({'max_lora_rank': rank, 'target_modules': ['q_proj']}))"
    )
    with tuning(home, base, replace(PLAN, rank=8)) as box:
        file = File(tenant="ann", filename="rows.jsonl", purpose="fine-tune", bytes=1, sha256="")
        with box.store.begin() as session:
            session.add(file)
        (home.ensure(home.root / "files") / file.id).write_text("{}\n")
        job = Job(tenant="ann", model="base", training_file=file.id, seed=1, method={}, request_sha256="")
        job.id, job.options = new_id("ftjob-"), said
        models = box.models
        validator = Validator(
            *(box.store, home, "base", QueueSettings()),
            program=(sys.executable, "-c", program),
            servable=models.holds,
            most_rank=models.most_rank,
        )
        found = validator.check(job, lambda: False)
        if trained_with:
            assert isinstance(found, Fit) and found.config["rank"] == trained_with
        else:
            assert isinstance(found, Unfit) and "rank 16 is more than the LoRA slots" in found.error["message"]
