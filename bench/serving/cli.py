"""`loraport bench throughput`, `lora-tax` and `gateway`: options, progress, and what happens at Ctrl-C."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraport.clients.errors import LoraportError, ResourceError, UsageError
from loraport.clients.terminal import console, print_json, say

if TYPE_CHECKING:
    from loraport.bench.load.stage import Target
    from loraport.bench.load.workload import Wish
    from loraport.bench.serving.measurement import Measurement, Setting

BaseUrl = Annotated[
    str | None, typer.Option(help="http://…/v1, or unix:/path of a socket. Default: the endpoint that serves here.")
]
Models = Annotated[list[str] | None, typer.Option(help="A model; once for each. Requests take turns.")]
Input = Annotated[str, typer.Option("--input", help="Tokens of a prompt: 512, or from:to.")]
Output = Annotated[str, typer.Option("--output", help="Tokens of a reply: 128, or from:to.")]
Chat = Annotated[bool, typer.Option("--chat/--completions", help="Which API.")]
Natural = Annotated[
    bool | None,
    typer.Option(
        "--natural/--fixed", help="Where replies end: by the model, or at --output. Default: natural for --data."
    ),
]
Prefix = Annotated[int, typer.Option("--shared-prefix", min=0, help="Tokens at the front that all prompts share.")]
Seed = Annotated[int | None, typer.Option(help="Of prompts and arrivals. Default: another each time.")]
Processes = Annotated[int, typer.Option(min=1, max=64, help="Processes that send requests.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for a request, to its end.")]
SliceRequests = Annotated[int | None, typer.Option(min=1, help="Requests of a slice. Default: 4 × those at once.")]
Calibrate = Annotated[bool, typer.Option("--calibrate/--no-calibrate", help="Measure the client first (3 s).")]
RecordsOut = Annotated[Path | None, typer.Option(help="Keep a line for each request in this new folder.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON document here.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def bench_throughput(
    base_url: BaseUrl = None,
    model: Models = None,
    concurrency: Annotated[str, typer.Option(help="Closed loop: requests at once, as a list: 1,8,64.")] = "",
    rate: Annotated[str, typer.Option(help="Open loop: requests per second, as a list: 2,4,8.")] = "",
    arrival: Annotated[str, typer.Option(help="Of an open loop: poisson, constant or gamma.")] = "poisson",
    burstiness: Annotated[float, typer.Option(min=0.01, help="Of gamma arrivals; less than 1 comes in bursts.")] = 0.5,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests of each load.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.5, help="Seconds of each load. Default: 30.")] = None,
    ramp: Annotated[str, typer.Option(help="Open loop whose rate goes FROM:TO:SECONDS: 1:20:60.")] = "",
    trace: Annotated[Path | None, typer.Option(help="Open loop at recorded times: CSV or JSONL; see below.")] = None,
    time_scale: Annotated[
        float, typer.Option(min=1e-6, help="Seconds for a second of --trace; 0.5: twice as fast.")
    ] = 1,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Raise --rate, else --concurrency, from there to the saturation point.")
    ] = False,
    gain: Annotated[float, typer.Option(min=0, help="Of --sweep: percent that twice the load must bring.")] = 10,
    budget: Annotated[float, typer.Option(min=10, help="Of --sweep: seconds for all of it.")] = 300,
    input_tokens: Input = "512",
    output_tokens: Output = "128",
    data: Annotated[Path | None, typer.Option(help="Chat rows of your own instead of random prompts.")] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Ask all turns of --data, one after the other, with the server's replies.")
    ] = False,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Send --data unmarked: what came before is then in the prefix cache.")
    ] = False,
    natural: Natural = None,
    chat: Chat = False,
    shared_prefix: Prefix = 0,
    slo: Annotated[str, typer.Option(help="Limits for goodput: ttft=500ms,tpot=30ms; or a preset.")] = "",
    seed: Seed = None,
    processes: Processes = 1,
    timeout: Timeout = 600,
    calibrate: Calibrate = True,
    records: RecordsOut = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the loads that --out has, measure the others.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure tokens per second and latencies of a server under load.

    Any OpenAI-compatible server; the key is taken from OPENAI_API_KEY. Prompts are unique and random, lengths exact
    where the server has /tokenize and ignore_eos. Figures of a client that was too slow itself are withheld. Presets of
    --slo: mlperf-llama-3.1-8b, mlperf-llama-3.1-8b-interactive, mlperf-llama-2-70b, mlperf-llama-2-70b-interactive.

    A trace has a time for each request and may have tokens of prompt and reply: the Azure LLM inference traces
    (TIMESTAMP, ContextTokens, GeneratedTokens), BurstGPT, Mooncake, or columns of such names; numbers are seconds.
    """
    from loraport.bench.load.arrivals import ARRIVALS
    from loraport.bench.load.verdict import parse_limits
    from loraport.bench.serving.earlier import Earlier, plan_of, read_earlier
    from loraport.bench.serving.loads import Series, Ways, choose
    from loraport.bench.serving.throughput import print_report, to_json
    from loraport.bench.tables import known
    from loraport.clients.home import write_json

    known("arrival", arrival, ARRIVALS)
    if resume and not out:
        raise UsageError("--resume has nothing to go on with.", "--out names the result to go on with")
    if (replay or as_is) and not data:
        raise UsageError(f"{'--replay' if replay else '--as-is'} is about rows of yours.", "--data names them")
    ways = Ways(concurrency, rate, ramp, trace, time_scale, sweep, gain / 100, budget, arrival, burstiness, replay)
    chosen = choose(ways, requests, seconds)
    earlier = read_earlier(out) if resume and out else Earlier()
    seed = earlier.seed if seed is None else seed
    wish = make_wish(input_tokens, output_tokens, seed, chat, shared_prefix, data, natural, replay, as_is)
    setting = make_setting(wish, processes, timeout, calibrate, out, parse_limits(slo) if slo else {})
    targets = find_targets(base_url, model or [])
    plan = plan_of(setting, targets, chosen.amount, trace, time_scale)
    earlier.check_plan(plan)
    if earlier.has(chosen):
        say(f"nothing is missing in {out}")
        print_json(earlier.document) if json else print_report(earlier.document)
        return
    begun: list[Series] = []

    def save(series: Series) -> None:
        if out:
            write_json(out, to_json(series, plan))

    def measure(measurement: "Measurement") -> None:
        begun.append(Series(measurement, chosen, earlier, save))
        begun[0].prepare()
        begun[0].run()

    run(setting, targets, records, measure, lambda m: to_json(begun[0], plan), print_report, out, json, resume)


def bench_lora_tax(
    base_url: BaseUrl = None,
    base: Annotated[str | None, typer.Option(help="The base model. Default: the first without a parent.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="An adapter; once for each. Default: all.")] = None,
    each: Annotated[int | None, typer.Option(min=0, help="Measure only so many adapters alone. Default: all.")] = None,
    plain_url: Annotated[str | None, typer.Option(help="The same base on a server without LoRA.")] = None,
    plain_model: Annotated[str | None, typer.Option(help="Its name there. Default: its first model.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, as a list: 1,64.")] = "8",
    rounds: Annotated[int, typer.Option(min=1, help="Slices of each; ratios are of slices of one round.")] = 8,
    requests: SliceRequests = None,
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
    """Measure what adapters cost against their base, interleaved in one run.

    Base, each adapter alone, and all adapters mixed take turns in short slices, in another order each round; with
    --plain-url the base on a server without LoRA too. Ratios are of slices of the same round, with the 95% interval of
    a bootstrap over rounds.
    """
    from loraport.bench.serving.compare import make_plan, measure_plan, print_report, tax_variants, to_json
    from loraport.bench.serving.throughput import numbers

    levels = [int(one) for one in numbers(concurrency, "--concurrency")]
    wish = make_wish(input_tokens, output_tokens, seed, chat)
    setting = make_setting(wish, processes, timeout, calibrate, out, {})
    variants = tax_variants(find_url(base_url), base, adapter or [], each, plain_url, plain_model)
    plan = make_plan("lora-tax", variants, levels, rounds, requests, wish.seed)

    def measure(measurement: "Measurement") -> None:
        measurement.prepare(max(levels))
        measure_plan(measurement, plan)

    run(setting, plan.targets, records, measure, lambda m: to_json(m, plan), print_report, out, json)


def bench_gateway(
    direct_url: Annotated[str, typer.Option(help="The engine itself: http://…/v1, or unix:/path of its socket.")],
    base_url: BaseUrl = None,
    model: Annotated[str | None, typer.Option(help="The model behind the gateway. Default: its first.")] = None,
    direct_model: Annotated[str | None, typer.Option(help="Its name at the engine. Default: the same.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, as a list: 1,64.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Slices of each.")] = 8,
    requests: SliceRequests = None,
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
    """Measure what a gateway adds: the same load through it and past it.

    Slices of both take turns. Told are the ratio of tokens per second and the milliseconds that the median TTFT grows
    by, with 95% intervals.
    """
    from loraport.bench.serving.compare import gateway_variants, make_plan, measure_plan, print_report, to_json
    from loraport.bench.serving.throughput import numbers

    levels = [int(one) for one in numbers(concurrency, "--concurrency")]
    wish = make_wish(input_tokens, output_tokens, seed, chat)
    setting = make_setting(wish, processes, timeout, calibrate, out, {})
    variants = gateway_variants(find_url(base_url), model, direct_url, direct_model)
    plan = make_plan("gateway", variants, levels, rounds, requests, wish.seed)

    def measure(measurement: "Measurement") -> None:
        measurement.prepare(max(levels))
        measure_plan(measurement, plan)

    run(setting, plan.targets, records, measure, lambda m: to_json(m, plan), print_report, out, json)


def make_wish(
    input_tokens: str,
    output_tokens: str,
    seed: int | None,
    chat: bool,
    prefix: int = 0,
    data: Path | None = None,
    natural: bool | None = None,
    replays: bool = False,
    as_is: bool = False,
) -> "Wish":
    """The load as the options have it."""
    from loraport.bench.load.workload import Wish, parse_lengths, read_messages, read_talks

    lengths = parse_lengths(input_tokens, "--input"), parse_lengths(output_tokens, "--output")
    if prefix >= lengths[0][0]:
        raise UsageError(
            f"--shared-prefix {prefix} leaves nothing of prompts of {lengths[0][0]} tokens.", "make it shorter"
        )
    rows = (read_talks if replays else read_messages)(data) if data else []
    ends = bool(rows) if natural is None else natural
    number = secrets.randbits(31) if seed is None else seed
    return Wish(*lengths, number, chat, prefix, rows, ends, replays, as_is)


def make_setting(
    wish: "Wish", processes: int, timeout: float, calibrate: bool, out: Path | None, limits: dict[str, float]
) -> "Setting":
    """How to measure; ResourceError where a library is missing, UsageError where `out` cannot be written."""
    for library in ("httptools", "numpy"):
        if not find_spec(library):
            raise ResourceError(f"load tests need {library}.", f"pip install {library}")
    from loraport.bench.serving.measurement import Setting
    from loraport.bench.tables import check_out

    check_out(out)
    return Setting(wish, processes, timeout, calibrate, limits)


def find_url(base_url: str | None) -> str:
    """The URL to measure, as given or of the endpoint that serves here."""
    from loraport.clients.endpoint import find_base_url
    from loraport.clients.home import Home

    return find_base_url(base_url, Home.default())


def find_targets(base_url: str | None, models: list[str]) -> "list[Target]":
    """The models at the URL; the first it has where none is named. UsageError for one it does not have."""
    from loraport.bench.load.server import Server
    from loraport.bench.load.stage import Target
    from loraport.clients.models import check_model

    url = find_url(base_url)
    with Server(url) as server:
        cards = server.cards()
    return [Target(url, check_model(cards, name)) for name in models or [cards[0].id]]


def run(
    setting: "Setting",
    targets: "Sequence[Target]",
    records: Path | None,
    measure: "Callable[[Measurement], None]",
    to_json: "Callable[[Measurement], dict[str, Any]]",
    print_report: Callable[[dict[str, Any]], None],
    out: Path | None,
    json: bool,
    resumes: bool = False,
) -> None:
    """Measure with progress, then tell; what ends it early is told after what has run."""
    from loraport.bench.serving.measurement import Measurement
    from loraport.clients.home import write_json

    with records_folder(records, resumes) as folder, Measurement(setting, targets, folder) as measurement:
        problem: BaseException | None = None
        try:
            with progress(measurement):
                measure(measurement)
        except (LoraportError, KeyboardInterrupt, SystemExit) as error:
            problem = error
        if any(ran.stage.label != "warm-up" for ran in measurement.stages):
            document = to_json(measurement)
            if out:  # first: printing may end in a pipe that nobody reads to its end
                write_json(out, document)
            print_json(document) if json else print_report(document)
        if problem:
            raise problem


@contextmanager
def records_folder(wanted: Path | None, resumes: bool = False) -> Iterator[Path]:
    """The folder of the records: one that stays, or one that goes with the command. `resumes`: it may hold earlier."""
    if wanted is None:
        with TemporaryDirectory(prefix="loraport-bench-") as name:
            yield Path(name)
        return
    if wanted.exists() and any(wanted.iterdir()) and not resumes:
        raise UsageError(f"{wanted} is not empty.", "choose a new folder for --records")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{wanted} cannot be made: {error.strerror}.", "choose another folder for --records"
        ) from error
    yield wanted


@contextmanager
def progress(measurement: "Measurement") -> Iterator[None]:
    """A live line on a terminal; elsewhere a line for each step."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        measurement.on_step = lambda words: say(words, "dim")
        yield
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[sums]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", sums="")

        def show_sums(sums: dict[str, int]) -> None:
            failed = f", {sums['failed']} failed" if sums["failed"] else ""
            bar.update(
                task, sums=f"{sums['answered']:,} of {sums['sent']:,} answered{failed}, {sums['tokens']:,} tokens"
            )

        measurement.on_step = lambda words: bar.update(task, description=words)
        measurement.on_progress = show_sums
        yield
