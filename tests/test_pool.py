"""Whose the GPUs are: leases taken, given back, shared and swept, on both databases; and the machine that is here."""

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from loraport.clients.hardware import Device
from loraport.clients.home import Home
from loraport.serve.pool import pool as pool_module
from loraport.serve.pool.pool import Gpu, Machine, Pool, Share, engine_holder, this_machine
from loraport.serve.store.store import Store, open_store

GIB = 1 << 30
BOX = Machine("box", (Gpu(0, 80 * GIB, "0"), Gpu(1, 80 * GIB, "1")))


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    """An empty store."""
    store = open_store(home)
    yield store
    store.close()


def free(store: Store, pool: Pool) -> dict[int, int]:
    """GiB that are free, by GPU."""
    with store.read() as session:
        return {room.gpu: room.free // GIB for room in pool.free(session)}


def take(store: Store, pool: Pool, holder: str, *gpus: int, gib: int | None = None, node: str = "") -> bool:
    """Lease in a transaction of its own."""
    with store.begin() as session:
        return pool.take(session, holder, Share(gpus, gib and gib * GIB, node))


def test_a_gpu_is_one_jobs_until_it_is_given_back(store: Store) -> None:
    pool = Pool([BOX])
    assert free(store, pool) == {0: 80, 1: 80}
    assert take(store, pool, "a", 0) and not take(store, pool, "b", 0) and not take(store, pool, "b", 0, 1)
    assert free(store, pool) == {0: 0, 1: 80} and take(store, pool, "b", 1)
    assert take(store, pool, "a", 0), "twice is fine"
    with store.begin() as session:
        assert pool.share_of(session, "a") == Share((0,), None, "box")
        assert pool.give_back(session, "a") and not pool.give_back(session, "a") and not pool.share_of(session, "a")
    assert take(store, pool, "c", 0)


def test_those_who_lease_bytes_share(store: Store) -> None:
    pool = Pool([BOX])
    assert take(store, pool, "a", 0, gib=30) and take(store, pool, "b", 0, gib=40)
    assert not take(store, pool, "c", 0, gib=11) and not take(store, pool, "d", 0) and free(store, pool)[0] == 10
    assert take(store, pool, "c", 0, gib=10) and take(store, pool, "a", 0, gib=20)
    with store.read() as session:
        room = pool.free(session)[0]
    assert room.free == 10 * GIB and list(room.holders) == ["b", "c", "a"] and not room.is_empty
    assert not take(store, pool, "e", 1, gib=81), "no GPU is so large"


def test_the_engine_is_a_tenant(store: Store) -> None:
    pool = Pool([BOX])
    with store.begin() as session:
        assert pool.seat(session, 8000, {0: 60 * GIB, 1: 70 * GIB})
    assert free(store, pool) == {0: 20, 1: 10} and take(store, pool, "a", 0, gib=20) and not take(store, pool, "b", 1)
    with store.begin() as session:
        assert pool.free(session)[0].jobs == ["a"]
        assert pool.give_back(session, engine_holder(8000)) and pool.take(session, "b", Share((1,)))
        assert not pool.seat(session, 8000, {0: 60 * GIB, 1: 70 * GIB}), "a job has its GPU"
        assert pool.give_back(session, "b") and pool.seat(session, 8000, {0: 60 * GIB, 1: 70 * GIB})
        assert pool.seat(session, 8001, {}), "one on a CPU needs nothing"


def test_a_machine_without_gpus_is_one_slot(store: Store) -> None:
    pool = Pool([Machine("box", (Gpu(0, 16 * GIB),), is_cpu=True)])
    assert take(store, pool, "a") and not take(store, pool, "b") and not take(store, pool, "b", gib=1)
    with store.begin() as session:
        assert pool.share_of(session, "a") == Share((), None, "box") and pool.seat(session, 8000, {})
        pool.give_back(session, "a")
    assert take(store, pool, "b")


def test_nodes_have_gpus_of_the_same_numbers(store: Store) -> None:
    pool = Pool([BOX, Machine("other", BOX.gpus)])
    assert take(store, pool, "a", 0) and take(store, pool, "b", 0, 1, node="other")
    with store.read() as session:
        assert [(room.node, room.gpu, room.is_empty) for room in pool.free(session)] == [
            ("box", 0, False),
            ("box", 1, True),
            ("other", 0, False),
            ("other", 1, False),
        ]
        assert pool.share_of(session, "b") == Share((0, 1), None, "other")
    assert not take(store, pool, "c", 0, node="unknown") and not take(store, pool, "c", 7)


def test_leases_of_those_who_are_gone_are_swept(store: Store) -> None:
    pool = Pool([BOX])
    assert take(store, pool, "a", 0) and take(store, pool, "b", 1, gib=10)
    with store.begin() as session:
        pool.seat(session, 8000, {1: 10 * GIB})
        assert pool.sweep(session, lambda holder: holder == "b") == ["a", "engine:8000"]
    assert free(store, pool) == {0: 80, 1: 70}


def test_a_lease_goes_with_what_it_is_for(store: Store) -> None:
    pool = Pool([BOX])
    with pytest.raises(RuntimeError), store.begin() as session:
        assert pool.take(session, "a", Share((0,)))
        raise RuntimeError
    assert free(store, pool) == {0: 80, 1: 80}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_of_many_at_once_as_many_get_a_gpu_as_fit(kind: str, home: Home, request: pytest.FixtureRequest) -> None:
    store = open_store(home, request.getfixturevalue("postgres").fresh() if kind == "postgresql" else None)
    pool, got = Pool([BOX]), []
    begin = threading.Barrier(8)

    def one(number: int) -> None:
        begin.wait()
        if take(store, pool, f"job-{number}", 1, gib=30):
            got.append(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2 and free(store, pool) == {0: 80, 1: 20}
    store.close()


def test_here_there_is_one_slot() -> None:
    here = this_machine()
    assert here.is_cpu and [gpu.number for gpu in here.gpus] == [0] and here.node and here.names == {}


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [(0, "0"), (1, "1"), (2, "2")]),
        ("2,0", [(2, "2"), (0, "0")]),
        ("GPU-b,MIG-x", [(1, "GPU-b"), (4, "MIG-x")]),
    ],
)
def test_gpus_have_the_numbers_of_the_driver(
    visible: str | None, found: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(Exception):
        pass

    def by_uuid(uuid: str) -> int:
        if uuid.startswith("MIG"):
            raise Missing
        return {"GPU-a": 0, "GPU-b": 1}[uuid]

    nvml = SimpleNamespace(
        NVMLError=Missing,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetIndex=lambda handle: handle,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(pool_module, "read_one", lambda gpu: Device("cuda", "H100", 80 * GIB, 79 * GIB, 8))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here = this_machine()
    assert [(gpu.number, gpu.name) for gpu in here.gpus] == found and not here.is_cpu
    assert here.numbers == {name: number for number, name in found}
