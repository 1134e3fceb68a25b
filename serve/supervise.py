"""Keeps an engine alive: started, watched, started again when it crashes or hangs, left down when that does not help.

The gateway in front of it goes on answering: its state (gateway/state.py) says which phase the engine is in, why, and
for how long. What an engine needs before it takes requests (adapters loaded, replies verified) is `bring_up`. Several
engines are kept by as many keepers, each in a thread of its own: fleet.py.

    >>> keeper = Keeper(launch, home, state, bring_up)
    >>> keeper.start()
    >>> keeper.watch()                       # until `close`, or until it stays down, which is an EngineError

An engine may be sent away for a while, because somebody else needs its GPU: then its keeper waits, and what happens to
the engine meanwhile is no crash (`leave`, `come_back`; for all engines of an endpoint at once: fleet.py).
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import httpx

from loraport.clients.engine_phases import Timeline
from loraport.clients.errors import EngineError, LoraportError, UsageError
from loraport.clients.home import Home
from loraport.clients.terminal import say
from loraport.serve import checks
from loraport.serve.engine import versions
from loraport.serve.engine.connect import connect
from loraport.serve.engine.process import Engine, Launch, arguments
from loraport.serve.engine.pulse import counters, give_token
from loraport.serve.engine.starts import Start, expected_seconds
from loraport.serve.engine.startup import explain_death, served_context, wait_ready
from loraport.serve.gateway.state import EngineState, Phase
from loraport.serve.plan.on_cpu import BLOCK

GATEWAY_PHASES = {
    "weights": Phase.LOADING,
    "LoRA slots": Phase.LOADING,
    "compilation": Phase.COMPILING,
    "profiling": Phase.COMPILING,
    "graph capture": Phase.COMPILING,
}
DYING_S = 2.0  # between the last answer of an engine that dies and its end
AWAY = "the job that had its place has ended"
SILENT_GPU_S, SILENT_CPU_S = 90.0, 300.0  # one step of a large model over a long prompt takes minutes on a CPU


@dataclass(frozen=True)
class Patience:
    """Seconds. `silent_s`: how long an engine that was asked for a token may do nothing at all until it counts as hung.

    After `most` crashes without `window_s` of service in between the engine stays down. Before each restart it waits:
    `pause_s`, then twice that, at most `longest_pause_s`.
    """

    silent_s: float
    look_s: float = 1.0
    probe_s: float = 15.0
    window_s: float = 600.0
    most: int = 3
    pause_s: float = 1.0
    longest_pause_s: float = 30.0

    @classmethod
    def on(cls, kind: str) -> "Patience":
        """For a device of that kind."""
        return cls(silent_s=SILENT_CPU_S if kind == "cpu" else SILENT_GPU_S)


@dataclass
class Running:
    """An engine that answers, the client that reaches it, its start, and what its counters said last."""

    engine: Engine
    client: httpx.Client
    launch: Launch
    timeline: Timeline
    counters: str = ""
    ready_at: float | None = None
    asked: float = field(default_factory=time.monotonic)
    is_shown: bool = True  # to people, as it starts


BringUp = Callable[[Running], None]


class Keeper:
    """One engine after the other. `launch` is as planned, and then as it was found to start.

    `bring_up` does what is left to do, and tells the state that the engine is ready.
    """

    def __init__(
        self, launch: Launch, home: Home, state: EngineState, bring_up: BringUp, patience: Patience | None = None
    ) -> None:
        self.launch, self.home, self.state, self.bring_up = launch, home, state, bring_up
        self.patience = patience or Patience.on(launch.device.kind)
        self.running: Running | None = None
        self.crashes: list[float] = []
        self.is_changing: Callable[[], bool] = lambda: False  # whether the engine is loading an adapter
        self.spoiled = ""  # why the engine must be replaced though it runs; written by other threads
        self.cause = ""  # of the restart that is under way
        self.is_restart = False
        self.lock = threading.RLock()  # for the one moment when an engine is started or ended
        self.over = threading.Event()  # somebody else has ended it: nothing is started any more
        self.present = threading.Event()  # not set: it is sent away, and nothing is started until it may come back
        self.present.set()
        self.departures = 0  # how often: what breaks while that changes is no crash

    @property
    def is_shown(self) -> bool:
        """Whether people see how it starts: of replicas, which start all alike, the first alone is looked at."""
        return self.launch.replicas == 1 or (self.launch.replica == 0 and not self.is_restart)

    def say(self, message: str, style: str = "") -> None:
        """Print a line; of replicas it says which."""
        say(f"{self.launch.name}: {message}" if self.launch.replicas > 1 else message, style)

    def start(self) -> Running:
        """Start an engine and bring it up, once it may be there. Any LoraportError ends it again.

        One that refuses its context is started once more with the context that vLLM names.
        """
        while True:
            self.present.wait()
            before = self.departures
            try:
                return self.try_to_start()
            except Exception:
                if self.departures == before or self.over.is_set():
                    raise
            self.end()  # it was sent away, which breaks whatever was under way
            self.is_restart, self.cause = True, AWAY

    def try_to_start(self) -> Running:
        """The start, once or twice."""
        try:
            return self.attempt()
        except EngineError as error:
            lines = list(self.running.engine.last) if self.running else []
            other = with_context_that_fits(self.launch, lines) or with_slots_for_all(self.launch, lines)
            other = other or without_slots(self.launch, lines)
            self.end()
            if other is None:
                raise error
            self.launch = other
            return self.attempt()

    def attempt(self) -> Running:
        """One try; the engine is left as it is where that fails, for its words to be read."""
        launch, kind = self.launch, kind_of(self.launch)
        with self.lock:
            if self.over.is_set() or not self.present.is_set():
                raise EngineError("the engine was ended before it was started.")
            client, timeline = connect(launch.socket), Timeline(has_lora=launch.plan.slots > 0)
            engine = Engine(launch, self.home)
            running = self.running = Running(engine, client, launch, timeline, is_shown=self.is_shown)
        say(f"  log         {engine.log_path}{f'  ({launch.name})' if launch.replicas > 1 else ''}")
        version, command = ".".join(map(str, launch.version)), arguments(launch)
        start = Start(
            kind, launch.port, list(launch.base_names), version, command, self.is_restart, replica=launch.replica
        )
        expected = expected_seconds(self.home, kind)
        outcome = "interrupted"
        try:
            names = list(launch.base_names)
            heard = partial(self.tell, expected=expected)
            wait_ready(engine, running.client, names, running.timeline, heard, running.is_shown)
            running.launch = self.launch = with_context_found(launch, running.client)
            self.tell("verifying", time.monotonic() - engine.started, expected)
            self.bring_up(running)
            outcome = "ready"
        except LoraportError as error:
            outcome = outcome if self.over.is_set() or not self.present.is_set() else error.message
            raise
        finally:
            start.models += [adapter.manifest.name for adapter in launch.adapters]
            with suppress(LoraportError):  # a full disk ends no engine
                start.finish(self.home, running.timeline.seconds, outcome)
        running.ready_at = time.monotonic()
        return running

    def tell(self, phase: str, at: float, expected: float | None) -> None:
        """The gateway's clients hear of a phase of the start."""
        known = Phase.VERIFYING if phase == "verifying" else GATEWAY_PHASES.get(phase, Phase.STARTING)
        if self.is_restart:
            known, phase = Phase.RESTARTING, f"{self.cause} ({phase})"
        self.begin(known, phase, expected - at if expected else None)

    def begin(self, phase: Phase, reason: str, expected_s: float | None = None) -> None:
        """Tell the state of a phase of this engine."""
        self.state.begin(phase, reason, expected_s, self.launch.replica)

    def watch(self) -> None:
        """Look after the engine until `close`; EngineError once it stays down."""
        while not self.over.is_set():
            running, before, cause = self.running, self.departures, None
            if running is None:
                self.start_again()
                continue
            try:
                cause = self.trouble(running)
            except Exception:
                if self.departures == before:  # else it was sent away while it was looked at
                    raise
            if cause and self.departures == before:
                self.recover(cause)

    def start_again(self) -> None:
        """Start it as soon as it may be there again. One that fails is tried again as after a crash."""
        self.is_restart, self.cause, self.spoiled = True, AWAY, ""
        try:
            running = self.start()
        except LoraportError as error:
            if not self.over.is_set():
                self.recover(error)
        else:
            self.say_ready(running)

    def leave(self) -> None:
        """End the engine, and start none until it may come back. From any thread; twice is fine."""
        self.departures += 1
        self.present.clear()
        self.end()

    def come_back(self) -> None:
        """Let the engine be started again. From any thread; twice is fine."""
        self.present.set()

    def let_be(self) -> None:
        """Look after it no longer: what ends now stays so. From any thread."""
        self.over.set()
        self.present.set()

    def spoil(self, reason: str) -> None:
        """Have the engine replaced: what it holds is wrong. From any thread."""
        self.spoiled = reason

    def trouble(self, running: Running) -> EngineError | None:
        """What is wrong with the engine, after at most a second; None where all is well."""
        engine = running.engine
        if engine.wait(self.patience.look_s) is not None:
            return death(engine)
        if self.spoiled:
            reason, self.spoiled = self.spoiled, ""
            return EngineError(f"the engine is replaced: {reason}", f"all it said is in {engine.log_path}")
        if self.is_changing():  # while vLLM reads an adapter it computes nothing else
            running.asked = time.monotonic()
        while not engine.lines.empty():  # the log file has them; this queue must not grow
            engine.lines.get()
        if time.monotonic() - running.asked < self.patience.probe_s:
            return None
        return self.probe(running)

    def probe(self, running: Running) -> EngineError | None:
        """Whether the engine still computes: its counters move, or it gives a token to who asks for one.

        A busy engine lets a new request wait, and a long prompt takes its time: only where nothing at all happens
        meanwhile does it hang.
        """
        before, running.counters = running.counters, counters(running.client)
        if running.counters and running.counters != before:
            running.asked = time.monotonic()
            return None
        began = time.monotonic()
        while not give_token(running.client, running.launch.base_names[0], self.patience.silent_s):
            if running.engine.wait(min(DYING_S, self.patience.silent_s)) is not None:
                return death(running.engine)
            now = counters(running.client)
            if now and now != running.counters:
                running.counters, began = now, time.monotonic()
            elif time.monotonic() - began >= self.patience.silent_s:  # a refused connection is no silence of its own
                hint = f"all it said is in {running.engine.log_path}"
                return EngineError(f"the engine hangs: it gave no token for {self.patience.silent_s:g} s.", hint)
        running.counters, running.asked = counters(running.client), time.monotonic()
        return None

    def recover(self, cause: LoraportError) -> None:
        """Start the engine again, until it runs or has ended too often, which is an EngineError."""
        self.is_restart = True
        while not self.over.is_set():
            now, ready_at = time.monotonic(), self.running.ready_at if self.running else None
            if ready_at is not None and now - ready_at >= self.patience.window_s:
                self.crashes = []
            self.crashes.append(now)
            if len(self.crashes) >= self.patience.most:
                self.stay_down(cause)
            self.cause = cause.message.rstrip(".")
            self.begin(Phase.RESTARTING, self.cause, expected_seconds(self.home, kind_of(self.launch)))
            self.say(
                f"{cause.message} It is started again ({len(self.crashes)} of {self.patience.most - 1}).", "yellow"
            )
            for line in cause.details:
                say(f"  {line}")
            self.end()
            self.spoiled = ""
            doubled = self.patience.pause_s * 2 ** (len(self.crashes) - 1)
            self.over.wait(min(doubled, self.patience.longest_pause_s))
            try:
                running = self.start()
            except LoraportError as error:
                cause = error
            else:
                self.say_ready(running)
                return

    def say_ready(self, running: Running) -> None:
        """Tell people that it is back."""
        say(f"{self.launch.name} is ready again, after {sum(running.timeline.seconds.values()):.1f} s.", "green")

    def stay_down(self, cause: LoraportError) -> None:
        """Give up, in words that every client gets."""
        minutes = self.patience.window_s / 60
        often = f"it ended {len(self.crashes)} times without {minutes:.0f} minutes of service in between"
        words = f"{cause.message.rstrip('.')}; {often} and stays down"
        self.begin(Phase.DOWN, words)
        self.end()
        raise EngineError(f"{words}.", cause.hint, cause.details)

    def end(self) -> None:
        """End the engine. Twice is fine."""
        with self.lock:
            running, self.running = self.running, None
            if running:
                running.engine.stop()
                running.client.close()

    def close(self) -> None:
        """End the engine, and start none again. From any thread."""
        self.let_be()
        self.end()


def death(engine: Engine) -> EngineError:
    """Why an engine that served has ended."""
    engine.drain.join(2)
    return explain_death(engine, "while serving")


def kind_of(launch: Launch) -> str:
    """What decides how long a start takes."""
    plan = launch.plan
    lora = f", LoRA rank {plan.rank} × {plan.slots}" if plan.slots else ""
    others = f", {launch.replicas} replicas" if launch.replicas > 1 else ""
    return f"{launch.base.folder} on {launch.device.name}, {plan.quantization}{lora}{others}"


def with_slots_for_all(launch: Launch, lines: list[str]) -> Launch | None:
    """The launch with LoRA slots for all linears, where vLLM ended over one of those that were named; else None.

    It ends where a linear that is named cannot have slots, and leaves it out where none is named.
    """
    if not launch.plan.targets or not versions.is_linear_without_slots(lines):
        return None
    say(
        "warning: vLLM cannot make LoRA slots for those linears alone; it is started again with slots for all.",
        "yellow",
    )
    return replace(launch, plan=replace(launch.plan, targets=()))


def without_slots(launch: Launch, lines: list[str]) -> Launch | None:
    """The launch without LoRA slots, where vLLM has none for this model and nobody asked for any; else None."""
    if not launch.plan.tuned or launch.adapters or not versions.is_without_lora(lines):
        return None
    say("warning: vLLM has no LoRA for this model; it is started again without: jobs cannot be served.", "yellow")
    return replace(launch, plan=replace(launch.plan, slots=0, rank=0, targets=(), tuned=0))


def with_context_that_fits(launch: Launch, lines: list[str]) -> Launch | None:
    """The launch with the context that vLLM said would fit, in whole blocks, where it refused to start with ours.

    None where it said nothing of it, or nothing shorter, or too little to replay the adapters' recorded replies.
    """
    named = versions.named_context(lines)
    context = (named or 0) // BLOCK * BLOCK
    if not 0 < context < launch.plan.context:
        return None
    with suppress(UsageError):
        checks.check_golden_fit([*launch.adapters, *([launch.merged] if launch.merged else [])], context)
        say(
            f"warning: vLLM has no room for a context of {launch.plan.context:,} tokens; it is started again with "
            f"{context:,}, which it says will fit.",
            "yellow",
        )
        return replace(launch, plan=replace(launch.plan, context=context, is_auto=False))
    return None


def with_context_found(launch: Launch, client: httpx.Client) -> Launch:
    """The launch with the context that vLLM has found by itself, where that was left to it."""
    found = served_context(client) if launch.plan.is_auto else None
    return replace(launch, plan=replace(launch.plan, context=found)) if found else launch
