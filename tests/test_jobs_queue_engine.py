"""Jobs and the engine on one machine: who leaves for whom, also through a restart; and what is cleaned up."""

import time
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import select

from loraport.clients.errors import EngineError
from loraport.clients.home import Home
from loraport.serve.jobs.housekeeping import Housekeeping
from loraport.serve.jobs.service import Queue
from loraport.serve.pool.policy import Policy, Window
from loraport.serve.store.changes import move
from loraport.serve.store.tables import Lease, Status
from tests.queue_kit import Engine, get, journal, make_queue, serving, submit, wait, wait_for, want


def is_training(home: Home, job_id: str, count: int = 1) -> bool:
    """Whether a trainer was started so often."""
    path = home.root / "jobs" / job_id / "journal.txt"
    return path.exists() and path.read_text().count("start") == count


def holders(queue: Queue) -> list[str]:
    """Who has leases."""
    with queue.parts.store.read() as session:
        return sorted(session.scalars(select(Lease.holder)))


def test_the_engine_stays_away_where_a_survivor_has_its_gpu(home: Home) -> None:
    first = make_queue(home, gpus=1, engine=Engine({0: 9}), policy=Policy.YIELD)
    first.start()
    job_id = submit(first, steps=200, step_s=0.02)
    wait_for(lambda: is_training(home, job_id))
    first.close(stop_trainers=False)
    first.parts.store.close()
    engine = Engine({0: 9})
    with serving(home, gpus=1, engine=engine, policy=Policy.YIELD) as queue:
        assert engine.told == ["suspend"] and holders(queue) == [job_id]  # before anything else happens
        want(queue, job_id, "cancel")
        wait(queue, job_id)
        wait_for(lambda: engine.told == ["suspend", "resume"])
        wait_for(lambda: holders(queue) == ["engine:0"])


def test_leases_of_an_endpoint_that_is_gone_are_not_kept(home: Home) -> None:
    with serving(home, gpus=1) as queue, queue.parts.store.begin() as session:
        session.add(Lease(holder="engine:4711", node="box", gpu=0))
    with serving(home, gpus=1) as queue:
        assert wait(queue, submit(queue, steps=1)).status == Status.SUCCEEDED


def test_on_a_cpu_the_engine_leaves_when_it_is_asked_to(home: Home) -> None:
    engine = Engine()
    with serving(home, gpus=1, is_cpu=True, engine=engine, policy=Policy.YIELD) as queue:
        assert wait(queue, submit(queue, steps=1)).status == Status.SUCCEEDED
        wait_for(lambda: engine.told == ["suspend", "resume"])
    engine = Engine()
    with serving(home, gpus=1, is_cpu=True, engine=engine, policy=Policy.AUTO) as queue:
        assert wait(queue, submit(queue, steps=1)).status == Status.SUCCEEDED
    assert engine.told == []


def test_an_engine_that_cannot_leave_is_a_fault_of_the_machine(home: Home) -> None:
    class Stuck(Engine):
        def suspend(self, reason: str, expected_s: float | None) -> None:
            super().suspend(reason, expected_s)
            if self.told.count("suspend") == 1:
                raise EngineError("it does not end.", "kill it")

    with serving(home, gpus=1, engine=Stuck({0: 9}), policy=Policy.YIELD) as queue:
        job = wait(queue, submit(queue, steps=1))
    assert (job.status, job.attempt, job.faults) == (Status.SUCCEEDED, 2, 1)


def test_an_engine_that_does_not_come_back_at_once_is_tried_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Engine):
        def resume(self) -> None:
            if self.told.count("resume") < 2:
                self.told.append("resume")
                raise EngineError("it died.", "look at its log")
            super().resume()

    monkeypatch.setattr("loraport.serve.pool.placing.AGAIN_S", 0.1)
    engine = Slow({0: 9})
    with serving(home, gpus=1, engine=engine, policy=Policy.YIELD) as queue:
        assert wait(queue, submit(queue, steps=1)).status == Status.SUCCEEDED
    assert engine.told == ["suspend", "resume", "resume", "resume"]


def test_when_its_window_is_over_a_job_makes_room_and_goes_on_in_the_next(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = datetime.now().hour * 60 + datetime.now().minute
    engine = Engine({0: 9})
    is_open = [True]
    monkeypatch.setattr(Window, "holds", lambda *_: is_open[0])
    window = Window(minute, (minute + 60) % 1440)
    with serving(home, gpus=1, engine=engine, policy=Policy.WAIT, window=window) as queue:
        job_id = submit(queue, steps=60, step_s=0.02)
        wait_for(lambda: is_training(home, job_id))
        is_open[0] = False
        wait(queue, job_id, Status.QUEUED)
        wait_for(lambda: engine.told == ["suspend", "resume"])
        time.sleep(0.3)
        assert get(queue, job_id).status == Status.QUEUED and journal(home, job_id)[-1] == "end"
        is_open[0] = True
        job = wait(queue, job_id)
    assert (job.status, job.attempt, job.faults) == (Status.SUCCEEDED, 2, 0)
    assert [line for line in journal(home, job_id) if line.startswith("step")] == [f"step {n}" for n in range(1, 61)]


def is_forgotten(queue: Queue) -> bool:
    """Have DBOS forget what is over; whether it knows of nothing then."""
    from dbos import DBOS

    queue.durable.forget(time.time() + 60.0)
    return DBOS.list_workflows() == []


def test_what_is_over_leaves_nothing_behind(home: Home) -> None:
    done: list[str] = []
    with serving(home) as queue:
        job_id = submit(queue, steps=1)
        wait(queue, job_id)
        cancelled = submit(queue, steps=1, check_s=60.0)
        with queue.parts.store.begin() as session:  # as the API cancels a job that waits
            assert move(session, cancelled, {Status.VALIDATING}, Status.CANCELLED)
            session.add(Lease(holder=job_id, node="box", gpu=0))
        alive = submit(queue, check_s=60.0)
        for name in (cancelled, alive, "ftjob-unknown"):
            (home.root / "runs" / name).mkdir(parents=True)
        keeper = Housekeeping(queue.parts, queue.durable, [lambda: 1 / 0, lambda: done.append("chore")])
        keeper.clean_up()
        kept = {path.name for path in (home.root / "runs").iterdir()}
        assert holders(queue) == [] and kept == {alive, "ftjob-unknown"}  # which may be another database's
        assert done == ["chore"]
        wait_for(lambda: is_forgotten(queue))
        with queue.parts.store.begin() as session:
            assert move(session, alive, {Status.VALIDATING}, Status.CANCELLED)


def test_a_job_that_dbos_has_lost_is_followed_again(home: Home) -> None:
    """Killed between the table and DBOS, or its thread ended by trouble of DBOS's own."""
    with serving(home) as queue:
        job_id = submit(queue, steps=1, check_s=60.0)
        with queue.parts.store.begin() as session:
            fields = {"config": {"knobs": {"steps": 2}}, "attempt": 1, "started_at": time.time()}
            assert move(session, job_id, {Status.VALIDATING}, Status.RUNNING, **fields)
            session.add(Lease(holder=job_id, node="box", gpu=0))
        queue.next_at = 0.0
        assert wait(queue, job_id).status == Status.SUCCEEDED
        queue.durable.ensure(job_id, 1)  # over for both
    assert Path(home.root / "jobs" / job_id / "journal.txt").read_text().count("start") == 1


def test_jobs_that_another_server_has_are_left_to_it(home: Home) -> None:
    engine = Engine({0: 9})
    queue = make_queue(home, gpus=1, engine=engine, policy=Policy.YIELD)
    queue.start()
    job_id = submit(queue, steps=500, step_s=0.02)
    wait_for(lambda: is_training(home, job_id))
    queue.abandon()
    assert journal(home, job_id)[-1] == "end" and engine.told == ["suspend", "resume"]
    job = get(queue, job_id)
    assert (job.status, job.attempt) == (Status.RUNNING, 1)  # nothing is written of what is another's
    queue.parts.store.close()
    with serving(home, gpus=1) as queue:
        assert wait(queue, job_id).status == Status.SUCCEEDED


def test_an_engine_that_could_not_come_back_is_asked_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine({0: 9})
    queue = make_queue(home, gpus=1, engine=engine, policy=Policy.YIELD)
    placer = queue.parts.placer
    placer.is_away = True
    with monkeypatch.context() as patched:
        patched.setattr(engine, "resume", raise_engine_error)
        placer.let_back()
    assert placer.is_away
    placer.let_back()
    assert not placer.is_away and engine.told == ["resume"]
    with queue.parts.store.begin() as session:
        session.add(Lease(holder="ftjob-1", node="box", gpu=0))
    placer.make_room(None)
    assert engine.told == ["resume"], "it leaves for nobody: the queue is another's"
    queue.parts.store.close()


def raise_engine_error() -> None:
    """As an engine that does not start."""
    raise EngineError("it does not start.")


def test_a_result_that_is_taken_when_the_queue_is_anothers_is_left_to_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(home)

    def accept(*_: object) -> str:
        queue.parts.leaving.set()  # meanwhile
        return "ft:base:ann::1"

    monkeypatch.setattr(queue.parts.hand_over, "accept", accept)
    queue.start()
    job_id = submit(queue, steps=1)
    wait_for(lambda: queue.parts.leaving.is_set() and not queue.durable.under_way.jobs)
    job = get(queue, job_id)
    assert (job.status, job.fine_tuned_model) == (Status.RUNNING, None)
    queue.close()
    queue.parts.store.close()


def test_nothing_is_begun_by_who_may_have_lost_the_queue(home: Home) -> None:
    queue = make_queue(home)
    asked: list[bool] = []
    is_sure = False

    def is_owner() -> bool:
        asked.append(is_sure)
        return is_sure

    queue.is_owner = is_owner
    queue.start()
    job_id = submit(queue, steps=1)
    wait_for(lambda: len(asked) > 3)
    assert get(queue, job_id).status == Status.VALIDATING
    is_sure = True
    assert wait(queue, job_id).status == Status.SUCCEEDED
    queue.close()
    queue.parts.store.close()
