"""Which GPUs a job gets, and what the engine does about it: every policy on every kind of machine, as a table."""

import time
from datetime import datetime
from typing import Any

import pytest

from loraport.clients.errors import UsageError
from loraport.serve.pool.policy import Needs, Policy, Run, Wait, Window, Yield, decide, impossible
from loraport.serve.pool.pool import Gpu, Machine, Room, Share, room_of

GIB = 1 << 30
AUTO, COEXIST, YIELD, WAIT = Policy
NIGHT = Window.parse("22:00-06:00")
ENGINE = {0: 60 * GIB}


def at(words: str) -> float:
    """That time of a day, on this machine's clock."""
    return datetime.fromisoformat(f"2026-11-20T{words}").timestamp()


NOON, MIDNIGHT = at("12:00"), at("23:59")


def rooms(*held: dict[str, int | None], node: str = "box") -> list[Room]:
    """GPUs of 80 GiB with who has how many GiB of each; None: all."""
    gpus = tuple(Gpu(number, 80 * GIB) for number in range(len(held)))
    machine = Machine(node, gpus)
    return [
        room_of(machine, gpu, {holder: gib and gib * GIB for holder, gib in holders.items()})
        for gpu, holders in zip(gpus, held, strict=True)
    ]


def needs(gpus: int = 1, gib: int | None = None, shares: bool = False) -> Needs:
    """What a job needs."""
    return Needs(gpus, gib and gib * GIB, shares, 1200)


SERVED = {"engine:8000": 60}
TAKEN: dict[str, int | None] = {"ftjob-a": None}


@pytest.mark.parametrize(
    ("wanted", "machine", "policy", "gpus", "gib"),
    [
        # A GPU that nobody has comes first, whatever the policy.
        *((needs(), rooms(SERVED, {}), policy, (1,), None) for policy in Policy),
        (needs(gib=10), rooms(SERVED, {}), AUTO, (1,), None),
        (needs(gib=10, shares=True), rooms(SERVED, {}), AUTO, (1,), 10),
        (needs(2), rooms(SERVED, {}, TAKEN, {}), AUTO, (1, 3), None),
        # Then one with other jobs, where all of them share.
        (needs(gib=10, shares=True), rooms(SERVED, {"ftjob-a": 50}), AUTO, (1,), 10),
        (needs(gib=10, shares=True), rooms(SERVED, {"ftjob-a": 50}, {}), AUTO, (2,), 10),
        (needs(2, gib=10, shares=True), rooms(SERVED, {"ftjob-a": 50}, {}), AUTO, (1, 2), 10),
        # Then one with the engine, where the plan shows that both fit; all that is left, so that nobody else joins.
        (needs(gib=20), rooms(SERVED), AUTO, (0,), 20),
        (needs(gib=15), rooms(SERVED), COEXIST, (0,), 20),
        (needs(gib=15, shares=True), rooms(SERVED), COEXIST, (0,), 15),
        (needs(gib=5, shares=True), rooms({**SERVED, "ftjob-a": 15}), COEXIST, (0,), 5),
        (needs(2, gib=15), rooms(SERVED, {}), COEXIST, (0, 1), 20),
        (needs(gib=15), rooms({}), COEXIST, (0,), 20),  # it is away and will come back
    ],
)
def test_it_trains_at_once(
    wanted: Needs, machine: list[Room], policy: Policy, gpus: tuple[int, ...], gib: int | None
) -> None:
    found = decide(wanted, machine, ENGINE, policy, NIGHT, NOON)
    assert isinstance(found, Run) and found.share == Share(gpus, gib and gib * GIB, "box")
    assert found.reason.startswith("it trains on GPU")


@pytest.mark.parametrize(
    ("wanted", "machine", "policy", "now", "gpus", "left", "until"),
    [
        (needs(), rooms(SERVED), AUTO, NOON, (0,), (0,), None),
        (needs(gib=21), rooms(SERVED), AUTO, NOON, (0,), (0,), None),
        (needs(gib=5), rooms(SERVED), YIELD, NOON, (0,), (0,), None),
        (needs(), rooms(SERVED, TAKEN), YIELD, NOON, (0,), (0,), None),
        (needs(2), rooms(SERVED, {}), YIELD, NOON, (0, 1), (0,), None),
        (needs(2), rooms(SERVED, {}), AUTO, NOON, (0, 1), (0,), None),
        (needs(), rooms(SERVED), WAIT, MIDNIGHT, (0,), (0,), "06:00"),
        (needs(), rooms(SERVED), WAIT, at("05:59"), (0,), (0,), "06:00"),
        (needs(), rooms({}), YIELD, NOON, (0,), (0,), None),  # it is away already
        (needs(gib=10, shares=True), rooms({"ftjob-a": 30}), YIELD, NOON, (0,), (0,), None),
    ],
)
def test_the_engine_leaves(
    wanted: Needs,
    machine: list[Room],
    policy: Policy,
    now: float,
    gpus: tuple[int, ...],
    left: tuple[int, ...],
    until: str | None,
) -> None:
    found = decide(wanted, machine, ENGINE, policy, NIGHT, now)
    assert isinstance(found, Yield) and (found.share.gpus, found.gpus, found.expected_s) == (gpus, left, 1200)
    assert found.reason == "the engine leaves GPU 0 while it trains, about 20 min"
    assert (found.until and time.strftime("%H:%M", time.localtime(found.until))) == until


@pytest.mark.parametrize(
    ("wanted", "machine", "policy", "now", "reason"),
    [
        (needs(), rooms(SERVED), WAIT, NOON, "it waits for 22:00: the engine serves until then"),
        (needs(), rooms({}), WAIT, NOON, "it waits for 22:00: the engine serves until then"),
        (needs(), rooms(SERVED), COEXIST, NOON, "what it needs is not known, so that it cannot train beside"),
        (needs(gib=30), rooms(SERVED), COEXIST, NOON, "it needs 30.0 GiB, and the engine and other jobs leave 20.0"),
        (needs(gib=5), rooms({**SERVED, "ftjob-a": 20}), COEXIST, NOON, "it needs 5.0 GiB, and the engine and other"),
        (needs(), rooms(TAKEN), YIELD, NOON, "it waits for a GPU: of 1, other jobs train on 1"),
        (needs(2), rooms(SERVED, TAKEN), AUTO, NOON, "it waits for 2 GPUs: of 2, other jobs train on 1"),
        (needs(gib=10), rooms(SERVED, {"ftjob-a": 30}), WAIT, NOON, "it waits for 22:00"),
        (needs(gib=70, shares=True), rooms({"ftjob-a": 30}), YIELD, NOON, "it waits for a GPU"),
        (needs(gib=10), rooms({"ftjob-a": 30}), YIELD, NOON, "it waits for a GPU"),
    ],
)
def test_it_waits(wanted: Needs, machine: list[Room], policy: Policy, now: float, reason: str) -> None:
    found = decide(wanted, machine, ENGINE, policy, NIGHT, now)
    assert isinstance(found, Wait) and found.reason.startswith(reason) and "ftjob" not in found.reason
    assert (found.until == at("22:00")) == ("22:00" in reason)


@pytest.mark.parametrize("policy", Policy)
def test_without_engine_no_policy_matters(policy: Policy) -> None:
    assert isinstance(decide(needs(), rooms({}), {}, policy, NIGHT, NOON), Run)
    assert isinstance(decide(needs(), rooms(TAKEN), {}, policy, NIGHT, NOON), Wait)


def test_the_engine_is_on_its_own_node_alone() -> None:
    cluster = [*rooms(SERVED), *rooms({}, node="other")]
    found = decide(needs(), cluster, ENGINE, YIELD, None, NOON)
    assert isinstance(found, Run) and found.share == Share((0,), None, "other")


@pytest.mark.parametrize(
    ("policy", "now", "kind"),
    [(AUTO, NOON, Run), (COEXIST, NOON, Run), (YIELD, NOON, Yield), (WAIT, NOON, Wait), (WAIT, MIDNIGHT, Yield)],
)
def test_a_cpu_is_one_slot(policy: Policy, now: float, kind: type[Any]) -> None:
    machine = Machine("box", (Gpu(0, 16 * GIB),), is_cpu=True)
    found = decide(needs(gib=8), [room_of(machine, machine.gpus[0], {})], {}, policy, NIGHT, now)
    assert isinstance(found, kind)
    if isinstance(found, Run | Yield):
        assert found.share == Share((), None, "box") and getattr(found, "gpus", ()) == ()
    taken = decide(needs(), [room_of(machine, machine.gpus[0], TAKEN)], {}, policy, NIGHT, now)
    assert taken == Wait("another job trains on the CPU")


@pytest.mark.parametrize(
    ("wanted", "machine", "why"),
    [
        (needs(2, gib=80), rooms(TAKEN, SERVED), None),
        (needs(3), rooms({}, {}), "it needs 3 GPUs, and no machine has more than 2"),
        (needs(3), [*rooms({}, {}), *rooms({}, node="other")], "it needs 3 GPUs, and no machine has more than 2"),
        (needs(gib=81), rooms({}), "it needs 81.0 GiB of GPU memory, and the largest GPU has 80.0 GiB"),
        (needs(2), [Room("box", 0, GIB, GIB, {}, True)], "it needs 2 GPUs, and there are none here"),
        (needs(1, gib=99), [Room("box", 0, GIB, GIB, {}, True)], None),
    ],
)
def test_what_no_machine_can_hold(wanted: Needs, machine: list[Room], why: str | None) -> None:
    assert impossible(wanted, machine) == why


@pytest.mark.parametrize(
    ("words", "inside", "outside"),
    [
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "21:59"]),
        ("09:30-17:00", ["09:30", "16:59"], ["09:29", "17:00", "00:00"]),
        ("00:00-24:00", ["00:00", "12:00", "23:59"], []),
        ("22:00 - 24:00", ["22:00", "23:59"], ["00:00", "21:59"]),
    ],
)
def test_a_window(words: str, inside: list[str], outside: list[str]) -> None:
    window = Window.parse(words)
    assert all(window.holds(at(time)) for time in inside) and not any(window.holds(at(time)) for time in outside)
    for time_of_day in outside:
        assert window.holds(window.next_begin(at(time_of_day)))
        assert not window.holds(window.next_begin(at(time_of_day)) - 60)


def test_a_window_passes_midnight_and_the_change_of_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert NIGHT.next_end(at("23:00")) == at("23:00") + 7 * 3600 and NIGHT.next_end(at("01:00")) == at("06:00")
        before = datetime.fromisoformat("2026-10-24T23:00").timestamp()  # an hour comes twice that night
        assert NIGHT.next_end(before) == before + 8 * 3600 and str(NIGHT) == "22:00-06:00"
        assert Window.parse("8:00-8:00").next_end(at("12:00")) is None
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("wrong", ["", "22-6", "22:00", "25:00-06:00", "22:60-06:00", "a:b-c:d", "1:0-2:00", "-"])
def test_what_is_no_window(wrong: str) -> None:
    with pytest.raises(UsageError, match="is no time of the day"):
        Window.parse(wrong)
