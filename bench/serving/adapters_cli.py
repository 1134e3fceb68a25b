"""`loraport bench adapters`: options, adapters made for the run, and the parts one after the other."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from loraport.bench.serving.cli import (
    BaseUrl,
    Calibrate,
    Chat,
    Input,
    Json,
    Out,
    Output,
    Processes,
    RecordsOut,
    Seed,
    Timeout,
)
from loraport.clients.errors import UsageError
from loraport.clients.terminal import say

if TYPE_CHECKING:
    from loraport.bench.load.popularity import Popularity
    from loraport.bench.serving.adapters import Study
    from loraport.bench.serving.adapters_report import Parts
    from loraport.bench.serving.adapters_server import AdapterServer, Slots
    from loraport.bench.serving.measurement import Measurement
    from loraport.clients.models import ModelCard

TELL_S = 5.0
MOST_LEVELS = 64  # adapters at once, of the knee that is looked for by default


def bench_adapters(
    base_url: BaseUrl = None,
    base_model: Annotated[str | None, typer.Option(help="The base. Default: the first without a parent.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter; once for each, the most popular first. Default: all.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Only the first so many adapters.")] = None,
    zipf: Annotated[float | None, typer.Option(help="Popularity by Zipf's law: rank^-ALPHA. Default: uniform.")] = None,
    popularity: Annotated[Path | None, typer.Option(help="Popularity of a file of name,weight lines.")] = None,
    make: Annotated[int, typer.Option(min=0, max=10_000, help="Make so many random adapters and load them.")] = 0,
    base: Annotated[
        Path | None, typer.Option(help="For --make: the base's folder. Default: what the server names.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=512, help="For --make: of each.")] = 16,
    target: Annotated[list[str] | None, typer.Option(help="For --make: a linear; once for each. Default: all.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=100_000, help="Closed loop: requests at once.")] = 8,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Open loop instead: requests per second.")] = None,
    arrival: Annotated[str, typer.Option(help="Of an open loop: poisson, constant or gamma.")] = "poisson",
    burstiness: Annotated[float, typer.Option(min=0.01, help="Of gamma arrivals; less than 1 comes in bursts.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Slices of base and of adapters, in turn.")] = 8,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Of a slice. Default: 4 for each at once and each adapter.")
    ] = None,
    knee: Annotated[
        str | None, typer.Option(help="Distinct adapters at once: 1,2,4,8,16; or none. Default: 1,2,4,… up to all.")
    ] = None,
    knee_rounds: Annotated[int, typer.Option(min=1, help="Slices of each of them.")] = 3,
    fall: Annotated[float, typer.Option(min=0.01, max=0.99, help="Share of tokens/s that is lost at the knee.")] = 0.2,
    probes: Annotated[int, typer.Option(min=0, help="Of each tier: cold, warm, hot. 0: none.")] = 5,
    loads: Annotated[int, typer.Option(min=0, help="By the server's route, under names of ours. 0: none.")] = 3,
    max_loras: Annotated[int | None, typer.Option(min=1, help="Slots, where the server does not say.")] = None,
    max_cpu_loras: Annotated[int | None, typer.Option(min=1, help="In host memory, likewise.")] = None,
    input_tokens: Input = "512",
    output_tokens: Output = "128",
    chat: Chat = False,
    seed: Seed = None,
    processes: Processes = 1,
    timeout: Timeout = 600,
    calibrate: Calibrate = True,
    records: RecordsOut = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure many adapters at once: by popularity, cold, warm and hot, and where it tips.

    Latency by rank, fairness, tokens/s against the base; how long a load takes apart from the first token; tokens/s by
    the number of distinct adapters, beside the slots that the server has. --make loads random adapters for the run and
    unloads them after it: an endpoint of Loraport wants its admin key for that (LORAPORT_ADMIN_KEY, or its record on
    this machine), vLLM VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. What a server does not say or permit is not available.
    """
    from loraport.bench.load.arrivals import ARRIVALS
    from loraport.bench.load.stage import Load, Target
    from loraport.bench.serving.adapters import Study, slice_requests
    from loraport.bench.serving.adapters_report import Parts, print_report, to_json
    from loraport.bench.serving.adapters_server import Slots
    from loraport.bench.serving.cli import find_url, make_setting, make_wish, run
    from loraport.bench.tables import known

    kind = known("arrival", arrival, ARRIVALS)
    check_options(adapter or [], count, zipf, popularity, make, base)
    told = Slots(max_loras, max_cpu_loras)
    wish = make_wish(input_tokens, output_tokens, seed, chat)
    setting = make_setting(wish, processes, timeout, calibrate, out, {})
    load = Load("open", 0, rate, kind, burstiness) if rate else Load("closed", concurrency)  # type: ignore[arg-type]
    url, parts = find_url(base_url), Parts()
    with models_of(url, base_model, adapter or [], make, base, rank, target) as (base_name, names):
        asked = choose_popularity(names[:count], zipf, popularity)
        levels, note = parse_levels(knee, len(asked.models))
        parts.notes += [note] if note else []
        size = requests or slice_requests(load, len(asked.models))
        study = Study(Target(url, base_name), asked, load, rounds, size, levels, knee_rounds, fall, wish.seed)

        def measure(measurement: "Measurement") -> None:
            measurement.prepare(max(study.load.concurrency, study.knee_load.concurrency if levels else 1, 8))
            measure_all(measurement, study, parts, told, probes, loads)

        run(setting, study.targets, records, measure, lambda m: to_json(m, study, parts), print_report, out, json)


def check_options(
    adapters: list[str],
    count: int | None,
    zipf: float | None,
    popularity: Path | None,
    make: int,
    base: Path | None,
) -> None:
    """UsageError for options that contradict each other, before anything is asked."""
    if zipf is not None and popularity:
        raise UsageError("--zipf and --popularity say two things.", "give one of them")
    if popularity and (adapters or make or count):
        raise UsageError("--popularity names the adapters itself.", "leave --adapter, --count and --make away")
    if make and adapters:
        raise UsageError("--make measures the adapters that it makes.", "leave --adapter away")
    if base and not make:
        raise UsageError("--base is the folder of a base to make adapters for.", "--make 8 makes some")


@contextmanager
def models_of(
    url: str,
    base_model: str | None,
    adapters: list[str],
    make: int,
    base: Path | None,
    rank: int,
    targets: list[str] | None,
) -> Iterator[tuple[str, list[str]]]:
    """The base and the adapters to measure, as they are named or as they are made now; those go in the end."""
    from loraport.bench.load.server import Server
    from loraport.bench.serving.adapters_server import AdapterServer, registered
    from loraport.bench.serving.compare import is_adapter
    from loraport.bench.serving.made import make_adapters
    from loraport.bench.training.cases import ALL
    from loraport.clients.models import check_model

    with ExitStack() as stack:
        server = stack.enter_context(Server(url))
        cards = server.cards()
        name = check_model(cards, base_model) if base_model else base_of(cards)
        if not make:
            found = [check_model(cards, one) for one in adapters] or [
                card.id for card in cards if is_adapter(card, name, cards)
            ]
            if not found:
                raise UsageError(f"{url} has no adapters.", "--make 8 makes some and loads them, where it lets you")
            yield name, list(dict.fromkeys(found))
            return
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="loraport-adapters-"))) / "made"
        admin = AdapterServer(server)
        made = make_adapters(base or folder_of(admin, cards, name), folder, make, rank, tuple(targets or ALL))
        say(f"loading {make} random adapters of rank {rank}", "dim")
        yield name, stack.enter_context(registered(admin, made, now_and_then(make)))


def now_and_then(wanted: int) -> Callable[[int], None]:
    """Says how many adapters are loaded, every few seconds: an endpoint of Loraport proves each."""
    told = time.monotonic()

    def tell(count: int) -> None:
        nonlocal told
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            say(f"  {count} of {wanted}", "dim")

    return tell


def base_of(cards: "list[ModelCard]") -> str:
    """The first model without a parent."""
    return next((card.id for card in cards if not card.parent), cards[0].id)


def folder_of(server: "AdapterServer", cards: "list[ModelCard]", name: str) -> Path:
    """Where the base lies on this machine; UsageError where neither model nor command line of the server says it."""
    found = server.base_folder(next((card.root for card in cards if card.id == name), None))
    if found:
        return found
    raise UsageError(f"where the model {name} lies is not known here.", "--base DIR: its config.json is read")


def choose_popularity(names: list[str], zipf: float | None, path: Path | None) -> "Popularity":
    """How often each is asked; UsageError for a file that names others than there are."""
    from loraport.bench.load import popularity

    if path:
        found = popularity.from_file(path)
        unknown = [name for name in found.models if name not in names]
        if unknown:
            raise UsageError(
                f"{path} names {', '.join(unknown[:5])}, which the server has no adapter of.",
                f"it has: {', '.join(names[:20])}",
            )
        return found
    return popularity.uniform(names) if zipf is None else popularity.zipf(names, zipf)


def parse_levels(text: str | None, adapters: int) -> tuple[list[int], str]:
    """Rising numbers of `1,2,4`, none above the adapters that there are; and a note where some were."""
    from loraport.bench.serving.throughput import numbers

    most = min(adapters, MOST_LEVELS)
    if text is None:
        powers = [2**power for power in range(most.bit_length()) if 2**power < most]
        return ([*powers, most] if most > 1 else []), ""
    if text.strip() in ("none", "0", ""):
        return [], ""
    try:
        wanted = sorted({int(one) for one in numbers(text, "--concurrency")})
    except UsageError:
        raise UsageError(f"--knee {text!r} is no list of numbers.", "for example --knee 1,2,4,8,16, or none") from None
    levels = [level for level in wanted if level <= adapters]
    if not levels:
        raise UsageError(f"--knee {text} asks for more than the {adapters} adapters.", "--make makes some")
    left = [str(level) for level in wanted if level > adapters]
    return levels, f"--knee {', '.join(left)} left out: there are {adapters} adapters" if left else ""


def measure_all(
    measurement: "Measurement", study: "Study", parts: "Parts", told: "Slots", probes: int, loads: int
) -> None:
    """Popularity, the knee, the tiers, then loads by the server's route."""
    from loraport.bench.load.server import Server
    from loraport.bench.serving.adapters import measure_study
    from loraport.bench.serving.adapters_server import AdapterServer
    from loraport.bench.serving.adapters_tiers import Loads, Tiers
    from loraport.bench.serving.measurement import Measurement

    with Server(study.base.url) as plain:
        server = AdapterServer(plain)
        parts.slots = server.slots(told)  # after the warm-up: vLLM says it when an adapter was asked
        measure_study(measurement, study)
        if probes or loads:
            folder = measurement.folder / "tokens"
            folder.mkdir()
            short = replace(measurement.setting, wish=replace(measurement.setting.wish, output=(1, 1)), processes=1)
            short = replace(short, calibrates=False)
            with Measurement(short, [study.base, study.adapters[0]], folder) as single:
                single.on_step, single.on_progress = measurement.on_step, measurement.on_progress
                single.prepare(1)
                single.calibration = measurement.calibration
                folders = server.folders()
                if probes:
                    parts.tiers = Tiers(
                        single, study.base, study.adapters, parts.slots, folders, probes, server.engines()
                    )
                    parts.tiers.measure()
                if loads:
                    own = {name: folders[name] for name in study.popularity.models if name in folders}
                    parts.loads = Loads(server, single, study.base, own, loads)
                    parts.loads.measure()
    parts.is_whole = True
