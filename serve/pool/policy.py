"""Which GPUs a job gets, and what the serving engine does about it: one pure decision, with its reason in words.

A GPU that nobody has comes first, whatever the policy. The policy says what happens where the engine has the rest:

    auto      beside the engine where the plan shows that both fit, else as `yield`
    coexist   beside the engine, or the job waits
    yield     the engine is suspended while the job trains, and comes back with all its adapters verified
    wait      the job waits for a window such as 22:00-06:00, and trains in it as with `yield`

On a machine without GPUs the engine has nothing that a job could be given. There `auto` and `coexist` train beside it,
`yield` and `wait` free its cores and memory all the same, because they were asked for.

    >>> decide(Needs(), rooms, {0: 70 << 30}, Policy.YIELD, None, time.time())
    Yield(share=Share(gpus=(0,), gpu_bytes=None, node='box'), gpus=(0,), expected_s=None, until=None, reason='…')
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from loraport.clients.errors import UsageError
from loraport.serve.pool.pool import Room, Share

DAY_MINUTES = 24 * 60


class Policy(StrEnum):
    """What the engine does for a job that needs its GPU."""

    AUTO = "auto"
    COEXIST = "coexist"
    YIELD = "yield"
    WAIT = "wait"


@dataclass(frozen=True)
class Needs:
    """What a job needs: GPUs, bytes on each as planned (None: not known), and how long it will train, if known.

    `may_share`: a GPU with another job, which needs `gpu_bytes`.
    """

    gpus: int = 1
    gpu_bytes: int | None = None
    may_share: bool = False
    expected_s: float | None = None


@dataclass(frozen=True)
class Run:
    """Train there now."""

    share: Share
    reason: str


@dataclass(frozen=True)
class Yield:
    """Train there once the engine has left these GPUs (none on a CPU).

    `until`: when the engine should have them back, if the policy has an end; a job that is not done by then is best
    paused. Seconds since the epoch.
    """

    share: Share
    gpus: tuple[int, ...]
    expected_s: float | None
    until: float | None
    reason: str


@dataclass(frozen=True)
class Wait:
    """Not now. `until`: when to ask again at the latest, in seconds since the epoch; None: when a lease ends."""

    reason: str
    until: float | None = None


Decision = Run | Yield | Wait


@dataclass(frozen=True)
class Window:
    """A time of the day, in minutes since midnight of this machine's clock. One that ends before it begins passes
    midnight; one that ends when it begins is the whole day.
    """

    begins: int
    ends: int

    @classmethod
    def parse(cls, words: str) -> "Window":
        """`22:00-06:00`; UsageError where it is none."""
        try:
            begins, ends = (minutes_of(part) for part in words.split("-"))
        except ValueError:
            raise UsageError(f"{words!r} is no time of the day.", "write it as 22:00-06:00") from None
        return cls(begins, ends)

    def __str__(self) -> str:
        return f"{clock(self.begins)}-{clock(self.ends)}"

    def holds(self, now: float) -> bool:
        """Whether it is that time."""
        minute = minute_of_day(now)
        if self.begins < self.ends:
            return self.begins <= minute < self.ends
        return minute >= self.begins or minute < self.ends

    def next_begin(self, now: float) -> float:
        """When it begins the next time, in seconds since the epoch."""
        return next_time(self.begins, now)

    def next_end(self, now: float) -> float | None:
        """When it ends the next time; None of a whole day."""
        return None if self.begins == self.ends else next_time(self.ends, now)


def minutes_of(words: str) -> int:
    """`06:30` in minutes; 24:00 is midnight."""
    hours, minutes = words.strip().split(":")
    if not (hours.isdigit() and minutes.isdigit() and len(minutes) == 2 and int(minutes) < 60):
        raise ValueError
    found = int(hours) * 60 + int(minutes)
    if found > DAY_MINUTES:
        raise ValueError
    return found % DAY_MINUTES


def clock(minutes: int) -> str:
    """Minutes as `06:30`."""
    return f"{minutes // 60:02}:{minutes % 60:02}"


def minute_of_day(now: float) -> int:
    """The minute of the day of this machine's clock."""
    local = time.localtime(now)
    return local.tm_hour * 60 + local.tm_min


def next_time(minutes: int, now: float) -> float:
    """When it is that minute of the day again, in seconds since the epoch: by the calendar, not by 24 hours."""
    today = datetime.fromtimestamp(now).replace(hour=minutes // 60, minute=minutes % 60, second=0, microsecond=0)
    found = today.timestamp()
    return found if found > now else (today + timedelta(days=1)).timestamp()


def decide(
    needs: Needs,
    rooms: Sequence[Room],
    engine: Mapping[int, int],
    policy: Policy,
    window: Window | None,
    now: float,
    engine_node: str | None = None,
) -> Decision:
    """What is to be done for a job, given what is free (Pool.free) and what the engine holds or will hold
    (Serving.gpus, of `engine_node`, else of the first node).

    Leave out rooms that are kept for somebody else. A job that no machine can hold waits for ever: see `impossible`.
    """
    home = engine_node or (rooms[0].node if rooms else "")
    nodes = list(dict.fromkeys(room.node for room in rooms))
    places = [Place(needs, [room for room in rooms if room.node == n], engine if n == home else {}) for n in nodes]
    if any(room.is_cpu for room in rooms):
        return on_cpu(needs, rooms, policy, window, now)
    for place in places:
        if found := place.free() or place.shared():
            return found
    if policy in (Policy.AUTO, Policy.COEXIST):
        for place in places:
            if beside := place.beside():
                return beside
    if policy is Policy.COEXIST:
        return Wait(next((why for place in places if (why := place.why_not_beside())), busy(needs, rooms)))
    left = next((given for place in places if (given := place.left_by_engine())), None)
    return by_window(left, policy, window, now) if left else Wait(busy(needs, rooms))


def on_cpu(needs: Needs, rooms: Sequence[Room], policy: Policy, window: Window | None, now: float) -> Decision:
    """The same on machines that are one slot each."""
    room = next((room for room in rooms if room.is_empty), None)
    if room is None:
        return Wait("another job trains on the CPU")
    share = Share(node=room.node)
    if policy in (Policy.AUTO, Policy.COEXIST):
        return Run(share, "it trains on the CPU")
    words = f"the engine is suspended while it trains on the CPU{lasting(needs.expected_s)}"
    return by_window(Yield(share, (), needs.expected_s, None, words), policy, window, now)


def by_window(found: Yield, policy: Policy, window: Window | None, now: float) -> Decision:
    """The decision as it is, or to wait until the window begins."""
    if policy is not Policy.WAIT or window is None:
        return found
    if window.holds(now):
        return Yield(found.share, found.gpus, found.expected_s, window.next_end(now), found.reason)
    return Wait(f"it waits for {clock(window.begins)}: the engine serves until then", window.next_begin(now))


@dataclass(frozen=True)
class Place:
    """One node, for one job."""

    needs: Needs
    rooms: Sequence[Room]
    engine: Mapping[int, int]

    def left(self, room: Room) -> int:
        """Bytes of a GPU that neither jobs nor the engine have; also of an engine that is away and will be back."""
        is_here = len(room.jobs) < len(room.holders)
        return max(0, room.free - (0 if is_here else self.engine.get(room.gpu, 0)))

    def without_engine(self, room: Room) -> int:
        """Bytes of a GPU once the engine is gone."""
        held = [room.holders[holder] for holder in room.jobs]
        return 0 if None in held else room.total - sum(bytes_held or 0 for bytes_held in held)

    def may_join(self, room: Room) -> bool:
        """Whether the job may be on a GPU with the jobs that are there."""
        return not room.jobs or (self.needs.may_share and self.needs.gpu_bytes is not None)

    def first(self, found: list[Room]) -> list[Room]:
        """As many of them as the job needs; none where there are fewer."""
        return found[: self.needs.gpus] if len(found) >= self.needs.gpus else []

    def share(self, found: list[Room], gpu_bytes: int | None) -> Share:
        """A share of these GPUs."""
        return Share(tuple(sorted(room.gpu for room in found)), gpu_bytes, found[0].node)

    @property
    def empty(self) -> list[Room]:
        """GPUs that nobody has, and no engine will want back."""
        return [room for room in self.rooms if room.is_empty and room.gpu not in self.engine]

    def free(self) -> Run | None:
        """GPUs of its own."""
        found = self.first(self.empty)
        if not found:
            return None
        share = self.share(found, self.needs.gpu_bytes if self.needs.may_share else None)
        return Run(share, f"it trains on {named(share)}")

    def shared(self) -> Run | None:
        """GPUs together with other jobs that may share too."""
        wanted = self.needs.gpu_bytes
        if not self.needs.may_share or wanted is None:
            return None
        fitting = [room for room in self.rooms if room.gpu not in self.engine and room.free >= wanted]
        found = self.first(sorted(fitting, key=lambda room: (not room.is_empty, room.free)))
        if not found:
            return None
        share = self.share(found, wanted)
        return Run(share, f"it trains on {named(share)}, with {gib(wanted)} of its memory beside another job")

    def beside(self) -> Run | None:
        """GPUs together with the engine, where the plan shows that both fit."""
        wanted = self.needs.gpu_bytes
        if wanted is None:
            return None
        fitting = [room for room in self.rooms if self.may_join(room) and self.left(room) >= wanted]
        found = self.first(sorted(fitting, key=lambda room: room.gpu in self.engine))
        if not found:
            return None
        left = min(map(self.left, found))
        share = self.share(found, wanted if self.needs.may_share else left)  # the rest, so that nobody else joins
        return Run(share, f"it trains on {named(share)} beside the engine, which leaves {gib(left)} of {gib(wanted)}")

    def why_not_beside(self) -> str:
        """Why the job cannot train beside the engine; empty where there is none."""
        with_engine = [room for room in self.rooms if room.gpu in self.engine]
        if not with_engine:
            return ""
        if self.needs.gpu_bytes is None:
            return "what it needs is not known, so that it cannot train beside the engine"
        left = max(map(self.left, with_engine))
        many = "" if self.needs.gpus == 1 else f" on each of {self.needs.gpus} GPUs"
        return f"it needs {gib(self.needs.gpu_bytes)}{many}, and the engine and other jobs leave {gib(left)}"

    def left_by_engine(self) -> Yield | None:
        """GPUs that the engine leaves, as few of them as will do."""
        wanted = self.needs.gpu_bytes or 0
        fitting = [
            room
            for room in self.rooms
            if room.gpu in self.engine and self.may_join(room) and self.without_engine(room) >= max(1, wanted)
        ]
        found = self.first([*self.empty, *fitting])
        if not found:
            return None
        share = self.share(found, self.needs.gpu_bytes if self.needs.may_share else None)
        gpus = tuple(sorted(room.gpu for room in found if room.gpu in self.engine))
        words = f"the engine leaves {named(Share(gpus))} while it trains{lasting(self.needs.expected_s)}"
        return Yield(share, gpus, self.needs.expected_s, None, words)


def impossible(needs: Needs, rooms: Sequence[Room]) -> str | None:
    """Why no machine can ever hold a job, in words; None where one can."""
    if any(room.is_cpu for room in rooms):
        return None if needs.gpus <= 1 else f"it needs {needs.gpus} GPUs, and there are none here"
    nodes = [[room for room in rooms if room.node == node] for node in dict.fromkeys(room.node for room in rooms)]
    most = max(map(len, nodes), default=0)
    if most < needs.gpus:
        return f"it needs {needs.gpus} GPUs, and no machine has more than {most}"
    wanted = needs.gpu_bytes or 0
    if not any(sum(room.total >= wanted for room in node) >= needs.gpus for node in nodes):
        largest = max(room.total for node in nodes for room in node)
        return f"it needs {gib(wanted)} of GPU memory, and the largest GPU has {gib(largest)}"
    return None


def busy(needs: Needs, rooms: Sequence[Room]) -> str:
    """Why there is no GPU, without saying whose jobs have them."""
    train = sum(bool(room.jobs) for room in rooms)
    wanted = "a GPU" if needs.gpus == 1 else f"{needs.gpus} GPUs"
    return f"it waits for {wanted}: of {len(rooms)}, other jobs train on {train}"


def named(share: Share) -> str:
    """`GPU 0` or `GPUs 0 and 1`."""
    numbers = [str(gpu) for gpu in share.gpus]
    return f"GPU {numbers[0]}" if len(numbers) == 1 else f"GPUs {', '.join(numbers[:-1])} and {numbers[-1]}"


def lasting(expected_s: float | None) -> str:
    """How long it will train, as the end of a sentence."""
    if expected_s is None:
        return ""
    minutes = max(1, round(expected_s / 60))
    return f", about {minutes} min" if minutes < 90 else f", about {expected_s / 3600:.1f} h"


def gib(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.1f} GiB"
