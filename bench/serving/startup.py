"""`loraport bench startup`: how long a serve command takes until it is of use, and in which phase.

Milestones, in seconds from the spawn: the port is open, /health answers 200, the models are listed, the first token of
the base, the first of the adapter. What the engine says of its phases comes from its log, and from the document that
`loraport serve --json` prints.

    >>> run_once(Start(["vllm", "serve", "model", "--port", "8000"], "http://127.0.0.1:8000/v1"), {}, Path("log"))
    {'milestones': {'port': 21.4, 'health': 38.2, ...}, ...}
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from loraport.bench.environment import gpu_memory_used
from loraport.bench.load.prompts import Source
from loraport.bench.load.server import Server
from loraport.clients.engine_phases import durations
from loraport.clients.errors import EndpointError, os_errors
from loraport.clients.models import ModelCard

MILESTONES = ("port", "health", "models", "first base token", "first adapter token")
POLL_S = 0.05
GRACE_S = 60.0
LOG_LINES = 12


@dataclass(frozen=True)
class Start:
    """What is started, and where it will answer. `base`, `adapter`: models to ask; by default the first of each."""

    command: list[str]
    base_url: str
    base: str | None = None
    adapter: str | None = None
    timeout_s: float = 1800


@contextlib.contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back until `release` is called: a process begun but not known yet would stay for good.

    By handlers, because a mask would be inherited.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def release() -> None:
        restore()
        for number in came:
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield release
    finally:
        restore()


class Ended(Exception):
    """The command ended before it was of use, or took too long."""


Tell = Callable[[str, float], None]  # (milestone, seconds since the spawn)
# As `watch`: what is started, its process, when, what to fill in, whom to tell.
Wait = Callable[[Start, "subprocess.Popen[bytes]", float, dict[str, Any], Tell], None]


def run_once(
    start: Start,
    variables: dict[str, str],
    log: Path,
    tell: Tell = lambda name, at: None,
    wait: Wait | None = None,
) -> dict[str, Any]:
    """One start, from spawn to stop; `wait` says when, by default `watch`. Its process group is ended in any case."""
    before = gpu_memory_used()
    with log.open("wb") as errors, log.with_suffix(".out").open("wb") as out:
        begun = time.monotonic()
        found: dict[str, Any] = {"milestones": {}, "error": None}
        with held_signals() as release:
            with os_errors("starting", Path(start.command[0])):
                process = subprocess.Popen(
                    start.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    env=dict(os.environ) | variables,
                    start_new_session=True,
                )
            try:
                release()
                (wait or watch)(start, process, begun, found, tell)
                found["memory"] = memory(process, before)
            except Ended as ended:
                found["error"] = str(ended)
            finally:
                found["stop_s"], found["left_behind"] = stop(process)
    return found | read_log(log) | ({"log": last_lines(log)} if found["error"] else {})


def watch(
    start: Start,
    process: "subprocess.Popen[bytes]",
    begun: float,
    found: dict[str, Any],
    tell: Tell,
) -> None:
    """Fill in the milestones one after the other; Ended when one does not come."""
    reach = reacher(start, process, begun, found, tell)
    with Server(start.base_url) as server:
        server.http.timeout = httpx.Timeout(5)
        cards: list[ModelCard] = []
        reach("port", lambda: is_open(server))
        reach("health", lambda: answers(server, "/health"))
        reach("models", lambda: listed(server, cards, [name for name in (start.base, start.adapter) if name]))
        base = start.base or next((card.id for card in cards if not card.parent), cards[0].id)
        adapter = start.adapter or next((card.id for card in cards if card.parent and card.id != base), None)
        for name, model in (("base", base), ("adapter", adapter)):
            if model:
                reach(f"first {name} token", partial(first_token, server, model))
                found[f"second_{name}_token_s"] = second_token(server, model)
        found["models"] = {"base": base, "adapter": adapter}


def reacher(
    start: Start,
    process: "subprocess.Popen[bytes]",
    begun: float,
    found: dict[str, Any],
    tell: Tell,
) -> Callable[[str, Callable[[], Any]], Any]:
    """What waits for one milestone, notes when it came and returns what came; Ended when it does not."""

    def reach(name: str, is_there: Callable[[], Any]) -> Any:
        while not (seen := is_there()):
            if process.poll() is not None:
                raise Ended(f"it ended with status {process.returncode} before: {name}")
            if time.monotonic() - begun > start.timeout_s:
                raise Ended(f"it took longer than {start.timeout_s:.0f} s before: {name}")
            time.sleep(POLL_S)
        at = time.monotonic() - begun if seen is True else seen - begun
        found["milestones"][name] = round(at, 3)
        tell(name, at)
        return seen

    return reach


def is_open(server: Server) -> bool:
    """Whether the port, or the socket, takes connections."""
    address = server.address
    kind = socket.AF_UNIX if address.socket else socket.AF_INET
    target: Any = address.socket or (address.host, address.port)
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(target) == 0 if not address.socket or Path(address.socket).exists() else False


def answers(server: Server, route: str) -> bool:
    """Whether a route beside /v1 answers 200, or is not there while the models are."""
    with contextlib.suppress(httpx.HTTPError):
        status = server.http.get(server.beside(route)).status_code
        return status == 200 or (status == 404 and server.http.get(f"{server.root}/models").status_code == 200)
    return False


def listed(server: Server, cards: list[ModelCard], wanted: Sequence[str]) -> bool:
    """Whether all the wanted models are listed; fills in `cards`."""
    with contextlib.suppress(EndpointError):
        cards[:] = server.cards()
    return bool(cards) and set(wanted) <= {card.id for card in cards}


def first_token(server: Server, model: str) -> float | None:
    """When the first chunk of a short reply came, on the monotonic clock; None where it failed."""
    source = Source("words", "/completions", ["the"], (4, 4), (4, 4), seed=0)
    exchange = server.ask(source, 0, model)
    return exchange.first if exchange.first is not None and exchange.error in ("", "no usage") else None


def second_token(server: Server, model: str) -> float | None:
    """Seconds to the first token of the next request: what is left when nothing has to be made first."""
    asked = time.monotonic()
    at = first_token(server, model)
    return None if at is None else round(at - asked, 4)


def memory(process: "subprocess.Popen[bytes]", gpu_before: int | None) -> dict[str, int | None]:
    """Bytes that all processes of the command hold of their own (USS), and by how much the GPUs' use rose."""
    own = 0
    for one in family(process.pid):
        with contextlib.suppress(psutil.Error):
            own += int(one.memory_full_info().uss)
    now = gpu_memory_used()
    rose = now - gpu_before if now is not None and gpu_before is not None else None
    return {"processes": own, "gpus": rose}


def family(pid: int) -> list[psutil.Process]:
    """A process and all under it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def stop(process: "subprocess.Popen[bytes]") -> tuple[float, int]:
    """End the process group: SIGTERM, then SIGKILL. (seconds until it was gone, processes that outlived it)."""
    begun, members = time.monotonic(), family(process.pid)
    try:
        end_group(process)
        took = time.monotonic() - begun
        _, alive = psutil.wait_procs(members, timeout=5)
    finally:  # also when a second Ctrl-C interrupts the wait; and what of the group outlived its leader
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return round(took, 3), len(alive)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, a grace, SIGKILL."""
    for number, grace in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if process.poll() is None or number == signal.SIGKILL:
                os.killpg(process.pid, number)
            process.wait(grace)
            break


def read_log(log: Path) -> dict[str, Any]:
    """What the engine told of its phases: `told` in its log; `phases` in the document of `loraport serve --json`."""
    words = log.read_text(errors="replace") + log.with_suffix(".out").read_text(errors="replace")
    return {"told": durations(words), "phases": read_phases(log.with_suffix(".out"))}


def read_words(log: Path) -> str:
    """All that it said, on standard error and standard output."""
    return log.read_text(errors="replace") + log.with_suffix(".out").read_text(errors="replace")


def read_phases(out: Path) -> dict[str, float] | None:
    """`phases` of the first JSON document on standard output; None where there is none."""
    text = out.read_text(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        document, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
        phases = document.get("phases")
        return dict(phases) if isinstance(phases, dict) else None
    return None


def last_lines(log: Path) -> list[str]:
    """The end of what it said, on standard output and standard error."""
    paths = log.with_suffix(".out"), log
    return [line for path in paths for line in path.read_text(errors="replace").splitlines()[-LOG_LINES:]]
