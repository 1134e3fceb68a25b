"""One case of `loraport bench plan`: the plan, then the engine until it says how large its KV cache is.

What it says of the parts of its memory is read from its log, at the level DEBUG, where vLLM 0.25 to 0.32 name more of
them; GiB with two decimals, as it prints them. How it is started and ended: startup.py.

    >>> measure_case(Case.parse("qwen3-8b,rank=16,loras=8"), Path("case-1"), Way())["ratio"]
    0.99652
"""

import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from loraport.bench.load.server import Server
from loraport.bench.serving.plan_cases import Case, PlanRefused, ask_plan, engine_command
from loraport.bench.serving.startup import Start, Tell, Wait, answers, reacher, read_words, run_once
from loraport.clients.redact import hide_in_text, hide_secrets

if TYPE_CHECKING:
    import subprocess

DEFAULT_COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
# Nothing is asked of a hub, nothing is reported, and the log names all parts of the memory.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CONFIGURE_LOGGING": "1",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "PYTHONUNBUFFERED": "1",
}
KV_TOKENS = re.compile(r"\bKV cache size: ([\d,]+) tokens")
# GiB that vLLM tells in its log (v1/worker/gpu_worker.py, gpu_model_runner.py, utils/mem_utils.py), 0.25 to 0.32.
PARTS = {
    "total": re.compile(r"worker init memory snapshot: .*\btotal_memory=([\d.]+)GiB"),
    "free_at_start": re.compile(r"worker init memory snapshot: .*\bfree_memory=([\d.]+)GiB"),
    "requested": re.compile(r"worker requested memory: ([\d.]+) ?GiB"),
    "model": re.compile(r"Model loading took ([\d.]+) GiB"),  # weights and LoRA slots
    "peak_activations": re.compile(r"torch peak memory increase: ([\d.]+)GiB"),
    "non_torch": re.compile(r"non-torch forward increase memory: ([\d.]+)GiB"),
    "all_but_kv_cache": re.compile(r"Total non KV cache memory: ([\d.]+)GiB"),
    "consumed": re.compile(r"total consumed \(from mem_get_info\): ([\d.]+)GiB"),
    "graphs_estimated": re.compile(r"Estimated CUDA graph memory: ([\d.]+) GiB total|, ([\d.]+) GiB \(estimated\)"),
    "kv_cache": re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
    "graphs": re.compile(r"Graph capturing finished in [\d.]+ secs?, took ([\d.]+) GiB"),
}
SIZE = re.compile(r"\d ?[GM]i?B\b")
MOST_LINES = 80


@dataclass(frozen=True)
class Way:
    """How an engine is started, and how long is waited. `until_report`: not until it is healthy."""

    command: tuple[str, ...] = DEFAULT_COMMAND
    more: tuple[str, ...] = ()
    timeout_s: float = 900
    until_report: bool = False


def measure_case(case: Case, folder: Path, way: Way, tell: Tell = lambda name, at: None) -> dict[str, Any]:
    """The document of a case; `folder` is made, and holds its base and what the engine said. `error`: why it failed."""
    found: dict[str, Any] = {"case": case.name, "shape": case.shape, "settings": dict(case.settings), "error": None}
    base = folder / "base"
    case.make(base)
    try:
        plan = ask_plan(case, base)
    except PlanRefused as refused:
        return found | {"error": f"no plan: {refused}"}
    found["plan"] = {key: value for key, value in plan.items() if key not in ("variants", "reasons")}
    port = free_port()
    command = engine_command(list(way.command), base, port, plan, list(way.more))
    start = Start(command, f"http://127.0.0.1:{port}/v1", timeout_s=way.timeout_s)
    log = folder / "engine.log"
    engine = run_once(start, ENVIRONMENT, log, tell, until_told(log, way.until_report))
    words = read_words(log)
    lines = [hide_in_text(line) for line in memory_lines(words)]
    engine |= {"log": [hide_in_text(line) for line in engine["log"]]} if engine.get("log") else {}
    found |= {"command": hide_secrets(command), "engine": engine, "reported": read_report(words), "lines": lines}
    return found | {"ratio": ratio(found), "error": engine["error"]}


def until_told(log: Path, is_enough: bool) -> Wait:
    """Wait until the engine has said how large its KV cache is; and until it is healthy, if that is not enough."""

    def wait(start: Start, process: "subprocess.Popen[bytes]", begun: float, found: dict[str, Any], tell: Tell) -> None:
        reach = reacher(start, process, begun, found, tell)
        said = Tail(log)
        reach("KV cache size", lambda: said.has(KV_TOKENS))
        if is_enough:
            return
        with Server(start.base_url) as server:
            server.http.timeout = httpx.Timeout(5)
            reach("health", lambda: answers(server, "/health"))

    return wait


class Tail:
    """What an engine says, read on from where it was read to: a log at DEBUG is long."""

    def __init__(self, log: Path) -> None:
        self.files = dict.fromkeys((log, log.with_suffix(".out")), 0)

    def has(self, pattern: re.Pattern[str]) -> bool:
        """Whether one of the whole lines that came since the last call matches."""
        return any(pattern.search(self.read(path)) for path in self.files)

    def read(self, path: Path) -> str:
        """The lines of a file that are new and have their end."""
        with path.open("rb") as file:
            file.seek(self.files[path])
            lines, end, _ = file.read().rpartition(b"\n")
        self.files[path] += len(lines) + len(end)
        return lines.decode(errors="replace")


def read_report(words: str) -> dict[str, Any]:
    """`kv_cache_tokens`, and `gib` by part as far as the log tells; of several workers the last counts.

    `rest`: of what was requested neither model, peak nor cache. Graphs are part of it, except with the runner V2 of
    0.25, which captures them beyond what was requested.
    """
    tokens = KV_TOKENS.findall(words)
    gib = {name: last(pattern, words) for name, pattern in PARTS.items() if pattern.search(words)}
    if {"requested", "model", "peak_activations", "kv_cache"} <= set(gib):
        gib["rest"] = round(gib["requested"] - gib["model"] - gib["peak_activations"] - gib["kv_cache"], 2)
    runner = "V2" if "Using V2 Model Runner" in words else "V1"
    return {"kv_cache_tokens": int(tokens[-1].replace(",", "")) if tokens else None, "runner": runner, "gib": gib}


def last(pattern: re.Pattern[str], words: str) -> float:
    """The figure of the last match."""
    *_, match = pattern.finditer(words)
    return float(next(filter(None, match.groups())))


def memory_lines(words: str) -> list[str]:
    """The lines that name a size, each once: what PARTS does not know may be there."""
    return list(dict.fromkeys(line.strip() for line in words.splitlines() if SIZE.search(line)))[:MOST_LINES]


def ratio(found: dict[str, Any]) -> float | None:
    """Predicted over reported tokens, to less than a block; None where the engine has not told them."""
    reported = found["reported"]["kv_cache_tokens"]
    return round(found["plan"]["kv_cache_tokens"] / reported, 6) if reported else None


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
