"""From spawn to ready: which phase the engine is in, for how long, and what it died of.

Ready means that /health answers 200 and that every model is listed. vLLM lists all of them from its first answer on:
an engine that is healthy and does not is the wrong one, and waiting would not end. The engine's own lines say which
phase it is in (clients/engine_phases.py); a terminal shows one live line, anything else gets a line for each phase that
took a second.
"""

import contextlib
import queue
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import httpx
from rich.status import Status

from loraport.clients.engine_phases import Timeline
from loraport.clients.errors import EngineError
from loraport.clients.redact import hide_in_text
from loraport.clients.terminal import console, say
from loraport.serve.engine import versions
from loraport.serve.engine.process import Engine

Tell = Callable[[str, float], None]  # (phase, seconds since the start)

POLL_S = 0.2
ANSWER_S = 2.0
SILENT_S = 1800.0  # of a start, without a line in the log: weights of a large model from a slow disk take that long
LISTING_S = 8.0  # for a healthy engine to list its models
# A line is worth a line of its own in a log file when it took this long.
WORTH_A_LINE_S = 1.0
SHOWN_LINES = 12
PREFIX = re.compile(
    r"^(?:\([\w-]+(?: pid=\d+)?\) )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d:-]+ [\d:]+ )?(?:\[[\w.]+:\d+\] )?"
)
EXCEPTION = re.compile(r"^\s*(?:[\w.]+\.)?\w*(?:Error|Exception|Exit|Interrupt|Killed)\b(?::|$)")
NOISE = re.compile(
    r"resource_tracker|warnings\.warn|\[shutdown\]|Engine core initialization failed"
    r"|^\s*(?:File \"|\^+|~+|raise |return )|^Traceback|^\s*$|^Route: |Loading safetensors checkpoint shards|WARNING"
)


def wait_ready(
    engine: Engine, client: httpx.Client, models: list[str], timeline: Timeline, tell: Tell, is_shown: bool = True
) -> None:
    """Wait until the engine answers with all `models`; EngineError when it dies (with its last words) or never will.

    `timeline` is filled; `tell` hears of each phase as it begins; people see it if `is_shown`.
    """
    told = ""
    healthy_since: float | None = None
    with live_line() if is_shown else nullcontext() as status:
        while True:
            read_lines(engine, timeline, lambda name, spent: report_phase(status, name, spent) if is_shown else None)
            if timeline.phase != told:
                told = timeline.phase
                tell(told, time.monotonic() - engine.started)
            if status is not None:
                status.update(f"starting the engine: {timeline.phase} · {time.monotonic() - engine.started:.0f} s")
            if engine.status is not None:
                engine.drain.join(2)
                raise explain_death(engine, f"during start-up ({timeline.phase})")
            if time.monotonic() - engine.heard > SILENT_S:
                raise EngineError(
                    f"the engine has said nothing for {SILENT_S / 60:.0f} minutes while it starts ({timeline.phase}).",
                    f"all it said is in {engine.log_path}; is the disk of the model there?",
                    tuple(last_words(list(engine.last))),
                )
            if is_healthy(client):
                listed, answer = list_models(client)
                if set(models) <= listed:
                    break
                healthy_since = healthy_since or time.monotonic()
                if time.monotonic() - healthy_since > LISTING_S:
                    raise never_ready(engine, models, answer)
    is_told = is_shown and status is None
    read_lines(engine, timeline, lambda name, spent: report_phase(None, name, spent) if is_told else None)
    timeline.finish(time.monotonic() - engine.started)


def live_line() -> AbstractContextManager[Status | None]:
    """A spinner on a terminal, nothing elsewhere."""
    return console.status("starting the engine") if console.is_terminal else nullcontext()


def report_phase(status: Status | None, name: str, spent: float) -> None:
    """A finished phase, where there is no live line to show it."""
    if status is None and spent >= WORTH_A_LINE_S:
        say(f"  {name}: {spent:.1f} s")


def read_lines(engine: Engine, timeline: Timeline, report: Callable[[str, float], None]) -> None:
    """Take what the engine has logged; wait a moment for the first line."""
    wait = POLL_S
    while True:
        try:
            entry = engine.lines.get(timeout=wait)
        except queue.Empty:
            return
        if entry is None:
            engine.wait(POLL_S)
            return
        before = timeline.phase
        if timeline.see(*entry):
            report(before, timeline.seconds[before])
        wait = 0.0001


def is_healthy(client: httpx.Client) -> bool:
    """Whether /health answers 200."""
    try:
        return client.get("/health", timeout=ANSWER_S).status_code == 200
    except httpx.HTTPError:
        return False


def list_models(client: httpx.Client) -> tuple[set[str], str]:
    """(names of the models, the answer in words)."""
    answer = "nothing"
    try:
        response = client.get("/v1/models", timeout=ANSWER_S)
        answer = f"status {response.status_code}"
        listed = {str(entry["id"]) for entry in response.json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return set(), answer
    return listed, ", ".join(sorted(listed)) or "no model"


def served_context(client: httpx.Client) -> int | None:
    """The context length that the engine lists with its base; None where it lists none."""
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
        listed = client.get("/v1/models", timeout=LISTING_S).json()["data"]
        lengths = [entry["max_model_len"] for entry in listed if entry.get("max_model_len")]
        return int(lengths[0]) if lengths else None
    return None


def never_ready(engine: Engine, models: list[str], answer: str) -> EngineError:
    """The error for an engine that is healthy and does not list what it was started with."""
    return EngineError(
        f"the engine is up, but lists {answer} instead of {', '.join(models)}.",
        f"check the flags after `--`; all it said is in {engine.log_path}",
        tuple(last_words(list(engine.last))),
    )


def explain_death(engine: Engine, when: str) -> EngineError:
    """The error for an engine that ended by itself: advice where its words are known, and its last lines."""
    lines = list(engine.last)
    evidence = tuple(last_words(lines))
    known = versions.explain(lines)
    if known:
        return EngineError(f"the engine stopped {when}: {known.message}", known.hint, evidence)
    status = engine.status or 0
    how = f"was killed by signal {status - 128}" if status > 128 else f"stopped with status {status}"
    how = f"lost its guard, which was killed by signal {-status}," if status < 0 else how
    killed = "it may have run out of memory: `dmesg` says so; " if status == 137 else ""
    return EngineError(f"the engine {how} {when}.", f"{killed}all it said is in {engine.log_path}", evidence)


def last_words(lines: list[str]) -> list[str]:
    """The lines that tell why an engine ended: its exceptions, then its last lines; no tracebacks, no noise."""
    plain = [hide_in_text(PREFIX.sub("", line)).rstrip() for line in lines]
    telling = [line for line in plain if not NOISE.search(line)]
    exceptions = [line for line in telling if EXCEPTION.match(line)]
    chosen = list(dict.fromkeys(exceptions))[-4:] or list(dict.fromkeys(telling))[-SHOWN_LINES:]
    return [line[:300] for line in chosen]
