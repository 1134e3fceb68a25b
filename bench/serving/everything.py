"""`loraport bench all`: a selection of the benches within a time budget, each as a command of its own.

Each part is the command that a person would type. It writes its JSON itself; when its share of the time is over it
gets the Ctrl-C that it answers with a report of what has run. The report is written anew after every part, so that an
interrupted run keeps all of it, and `--resume` goes on with the parts that are not done.

    >>> run_all(Settings("http://127.0.0.1:8000/v1"), Path("bench"), seconds=600)

A bench is added by a line in `PARTS`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from loraport.bench.load.server import Server
from loraport.bench.serving.compare import is_adapter
from loraport.bench.serving.documents import Part, part_of, read_document, read_parts
from loraport.bench.serving.report_html import write_report
from loraport.bench.serving.startup import Start, held_signals, is_open, run_once, watch
from loraport.clients.endpoint import find_record
from loraport.clients.errors import EngineError, LoraportError, Shortfall, UsageError, os_errors
from loraport.clients.home import Home

LORAPORT = (sys.executable, "-m", "loraport_cli", "bench")
LEAST_S = 20.0  # what a part needs to say anything
GRACE_S = 60.0  # to report after the Ctrl-C
OVERHEAD_S = 12.0  # of a load test: start, prompts, calibration, warm-up
PAGE = "report.html"
STARTUP = "startup"


@dataclass(frozen=True)
class Settings:
    """What is measured; kept in the report for --resume.

    `direct_url`: the engine behind the gateway, where known. `command`: what serves, where it is to be started.
    """

    base_url: str
    direct_url: str | None = None
    concurrency: tuple[int, ...] = (1, 8, 32)
    input_tokens: str = "512"
    output_tokens: str = "128"
    only: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What is there to measure: models as the server lists them, and the way past the gateway."""

    base: str
    adapters: list[str]
    direct_url: str | None = None


@dataclass(frozen=True)
class Bench:
    """A part: its share of the time, and the command, or the reason for which there is nothing to measure."""

    name: str
    weight: float
    command: Callable[[Settings, Seen, float], list[str] | str]


@dataclass
class Outcome:
    """How a command ended. `was_cut`: its time was over."""

    status: int
    seconds: float
    was_cut: bool = False


Run = Callable[[Sequence[str], float], Outcome]


@dataclass
class Going:
    """A run of all parts, as far as it came."""

    settings: Settings
    folder: Path
    parts: dict[str, Part] = field(default_factory=dict)
    on_part: Callable[[str], None] = lambda words: None

    def keep(self, part: Part) -> None:
        """Take a part and write the report anew."""
        self.parts[part.name] = part
        self.write()

    def write(self) -> None:
        """The report of what there is, in the order of PARTS."""
        order = [self.parts[bench.name] for bench in PARTS if bench.name in self.parts]
        write_report(self.folder / PAGE, order, settings=asdict(self.settings))


def startup_command(settings: Settings, seen: Seen, seconds: float) -> list[str] | str:
    """A cold and a warm start of the command that serves; before it serves for the rest."""
    if not settings.command:
        return "no command to start: loraport bench all ... -- vllm serve ..."
    starts = ["--cold", "1", "--warm", "1", "--timeout", f"{seconds:.0f}"]
    return ["startup", "--base-url", settings.base_url, *starts]


def throughput_command(settings: Settings, seen: Seen, seconds: float) -> list[str] | str:
    """The adapter, or the base without one, at a few concurrencies."""
    model = seen.adapters[0] if seen.adapters else seen.base
    each = max(2.0, (0.75 * seconds - OVERHEAD_S) / len(settings.concurrency))
    levels = ",".join(map(str, settings.concurrency))
    return ["throughput", *load(settings), "--model", model, "--concurrency", levels, "--seconds", f"{each:.1f}"]


def tax_command(settings: Settings, seen: Seen, seconds: float) -> list[str] | str:
    """Base, one adapter and all mixed, at the middle concurrency."""
    if not seen.adapters:
        return "the server has no adapter"
    return ["lora-tax", *load(settings), "--each", "1", "--concurrency", str(middle(settings)), "--base", seen.base]


def gateway_command(settings: Settings, seen: Seen, seconds: float) -> list[str] | str:
    """Through the gateway and past it."""
    if not seen.direct_url:
        return "the way past the gateway is not known: --direct-url"
    levels = ",".join(map(str, dict.fromkeys((1, middle(settings)))))
    return ["gateway", *load(settings), "--direct-url", seen.direct_url, "--model", seen.base, "--concurrency", levels]


def load(settings: Settings) -> list[str]:
    """Options that the load tests share."""
    return ["--base-url", settings.base_url, "--input", settings.input_tokens, "--output", settings.output_tokens]


def middle(settings: Settings) -> int:
    """The middle one of the concurrencies, of two the larger."""
    return sorted(settings.concurrency)[len(settings.concurrency) // 2]


def kv_command(settings: Settings, seen: Seen, seconds: float) -> list[str] | str:
    """Context and cache of the base."""
    limit = ["--budget", f"{0.8 * seconds:.0f}", "--deadline", f"{max(5.0, seconds / 10):.0f}"]
    return ["kv", "--base-url", settings.base_url, "--model", seen.base, *limit]


def adapters_command(settings: Settings, seen: Seen, seconds: float) -> list[str] | str:
    """All adapters, as they are loaded; none are made, and none loaded or unloaded."""
    if len(seen.adapters) < 2:
        return "it takes two adapters"
    rest = ["--concurrency", str(middle(settings)), "--rounds", "4", "--loads", "0"]
    return ["adapters", *load(settings), "--base-model", seen.base, *rest]


PARTS = (
    Bench(STARTUP, 10, startup_command),
    Bench("throughput", 4, throughput_command),
    Bench("lora-tax", 3, tax_command),
    Bench("gateway", 2, gateway_command),
    Bench("adapters", 3, adapters_command),
    Bench("kv", 3, kv_command),
)


def look(settings: Settings) -> Seen:
    """What is there; EndpointError where nothing answers."""
    with Server(settings.base_url) as server:
        cards = server.cards()
    base = next((card.id for card in cards if not card.parent), cards[0].id)
    adapters = [card.id for card in cards if is_adapter(card, base, cards)]
    return Seen(base, adapters, settings.direct_url or engine_socket(settings.base_url))


def check_server(settings: Settings) -> None:
    """Refuse before anything is made: EndpointError where nothing answers, UsageError where what is to start does."""
    if not settings.command:
        look(settings)
        return
    with Server(settings.base_url) as server:
        if is_open(server):
            raise UsageError(
                f"something answers at {settings.base_url} already.", "stop it, or leave the command away to measure it"
            )


def engine_socket(base_url: str) -> str | None:
    """The socket of the one engine behind an endpoint of ours on this machine; None where there are none or several."""
    home = Home.default()
    record = find_record(base_url, home)
    if record is None:
        return None
    found = [*home.run.glob(f"{record.port}.sock"), *home.run.glob(f"{record.port}-*.sock")]
    return f"unix:{found[0]}" if len(found) == 1 else None


def run_all(
    settings: Settings, folder: Path, seconds: float, run: "Run | None" = None, going: Going | None = None
) -> Going:
    """Run the parts that are not done, each within its share of what is left of `seconds`.

    What a part leaves unused goes to the others. Ctrl-C stops the part that runs, keeps its report, and goes through.
    Where there is a command to start, its start is measured first, and it serves for the rest.
    """
    going, run, until = going or Going(settings, folder), run or run_command, monotonic() + seconds
    wanted = [bench for bench in PARTS if not settings.only or bench.name in settings.only]
    waiting = [bench for bench in wanted if not is_done(going.parts.get(bench.name))]
    first = [bench for bench in waiting if bench.name == STARTUP]
    rest = [bench for bench in waiting if bench.name != STARTUP]
    run_parts(first, rest, Seen("", []), until, going, run)
    if settings.command and rest and until - monotonic() > LEAST_S:
        serve_meanwhile(settings, folder, going, lambda: run_parts(rest, [], look(settings), until, going, run))
    elif not settings.command:
        run_parts(rest, [], look(settings), until, going, run)
    going.write()
    return going


def run_parts(
    benches: Sequence[Bench], later: Sequence[Bench], seen: Seen, until: float, going: Going, run: Run
) -> None:
    """Run these one after the other, with a thought for those that come `later`."""
    for at, bench in enumerate(benches):
        left, weights = until - monotonic(), [each.weight for each in (*benches[at:], *later)]
        share = max(LEAST_S, left * bench.weight / sum(weights))
        command = bench.command(going.settings, seen, share)
        if isinstance(command, str):
            going.keep(Part(bench.name, "skipped", None, command))
        elif left < LEAST_S:
            going.keep(going.parts.get(bench.name) or Part(bench.name, "skipped", None, "the time was over"))
        else:
            going.on_part(f"{bench.name}, at most {share:.0f} s")
            measure(bench.name, command, share, going, run)


def serve_meanwhile(settings: Settings, folder: Path, going: Going, body: Callable[[], None]) -> None:
    """Start the command, run `body` when its models answer, and stop it; EngineError where they never do."""

    def wait(start: Start, process: "subprocess.Popen[bytes]", begun: float, found: Any, tell: Any) -> None:
        watch(start, process, begun, found, tell)
        body()

    going.on_part("starting the server for the rest")
    log = folder / "server.log"
    found = run_once(Start([*settings.command], settings.base_url), {}, log, wait=wait)
    if found["error"]:
        raise EngineError(f"the server did not come up: {found['error']}.", f"see {log}", tuple(found["log"]))


def is_done(part: Part | None) -> bool:
    """Whether a part need not run again."""
    return part is not None and part.status == "done"


def measure(name: str, command: Sequence[str], seconds: float, going: Going, run: Run) -> None:
    """Run one part and keep what it wrote, also when it or we are interrupted."""
    out = going.folder / f"{name}.json"
    fresh = out.with_suffix(".new.json")
    fresh.unlink(missing_ok=True)
    outcome: Outcome | None = None
    try:
        behind = ["--", *going.settings.command] if name == STARTUP else []
        outcome = run([*LORAPORT, *command, "--out", str(fresh), *behind], seconds)
    finally:
        if fresh.exists():
            fresh.replace(out)
            going.keep(part_of(name, read_document(out)))
        elif outcome:
            why = "its time was over before it could say anything" if outcome.was_cut else "it failed, see above"
            going.keep(going.parts.get(name) or Part(name, "failed", None, f"{why} (status {outcome.status})"))


def run_command(command: Sequence[str], seconds: float) -> Outcome:
    """A command with a time limit: Ctrl-C when it is over, and the end of its processes when that does not help.

    In a session of its own, so that a Ctrl-C of the terminal's reaches it once, through us.
    """
    begun = monotonic()
    with held_signals() as release:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            release()
            with suppress(subprocess.TimeoutExpired):
                return Outcome(process.wait(seconds), monotonic() - begun)
            return Outcome(interrupt(process), monotonic() - begun, was_cut=True)
        finally:
            if process.poll() is None:
                interrupt(process)


def interrupt(process: "subprocess.Popen[bytes]") -> int:
    """Ctrl-C, a grace to report, SIGKILL to its group; its exit status."""
    try:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(GRACE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def begin(settings: Settings, folder: Path) -> Going:
    """A run in a new folder; UsageError where it holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty.", "choose a new folder for --out, or go on there with --resume")
    with os_errors("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return Going(settings, folder)


def go_on(folder: Path, given: dict[str, Any]) -> Going:
    """A run that was begun in `folder`, with the settings it had; UsageError where `given` says something else."""
    state = (folder / PAGE).with_suffix(".json")
    if not state.exists():
        raise UsageError(f"{folder} has no run to go on with.", "leave --resume away to begin one there")
    document = read_document(state)
    found = document.get("settings")
    if not isinstance(found, dict):
        raise UsageError(f"{state} is not of `bench all`.", "choose the folder of one")
    lists: Any = {name: tuple(each) if isinstance(each, list) else each for name, each in found.items()}
    settings = Settings(**lists)
    for name, value in given.items():
        if value is not None and value != getattr(settings, name):
            flag = "the command" if name == "command" else f"--{name.removesuffix('_tokens').replace('_', '-')}"
            raise UsageError(f"this run was begun with {flag} {getattr(settings, name)}.", f"leave {flag} away")
    return Going(settings, folder, {part.name: part for part in read_parts([state])})


def verdict(going: Going) -> LoraportError | None:
    """Why the run as a whole fell short: a part that failed; None where all ran, or had nothing to measure."""
    failed = [part.name for part in going.parts.values() if part.status == "failed"]
    if not failed:
        return None
    words = f"{', '.join(failed)} brought no figures."
    return Shortfall(words, f"loraport bench all --out {going.folder} --resume tries again")
