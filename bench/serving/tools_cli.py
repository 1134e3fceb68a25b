"""`loraport bench startup`, `make-adapters` and `make-base`: what stands around a load test."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraport.clients.errors import UsageError
from loraport.clients.terminal import print_json, say

if TYPE_CHECKING:
    from loraport.bench.serving.startup import Start

DEFAULT_PORT = 8000


def bench_startup(
    command: Annotated[list[str], typer.Argument(help="The command that serves, behind `--`.")],
    base_url: Annotated[
        str | None, typer.Option(help="Where it will answer. Default: the --port of the command.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base to ask. Default: the first it lists.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="The adapter to ask. Default: the first it lists, if any.")
    ] = None,
    cold: Annotated[int, typer.Option(min=0, help="Starts without caches.")] = 1,
    warm: Annotated[int, typer.Option(min=0, help="Starts after those.")] = 2,
    drop: Annotated[
        list[Path] | None, typer.Option(help="A folder to drop from memory too before a cold start.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for a start.")] = 1800,
    logs: Annotated[Path | None, typer.Option(help="Keep what it said in this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON document here, anew after every start.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure how long a serve command takes to start, cold and warm.

    From spawn to port, health, models, the first token of the base and the first of the adapter; what the engine tells
    of its phases beside it. Any server: loraport bench startup -- vllm serve MODEL --port 8000. A cold start has empty
    compile caches (in a folder of their own) and the files of the folders that the command names dropped from memory.
    """
    from loraport.bench.serving.startup import Start
    from loraport.bench.tables import check_out

    check_out(out)
    start = Start(command, base_url or f"http://127.0.0.1:{port_of(command)}/v1", model, adapter, timeout)
    if cold + warm == 0:
        raise UsageError("there is no start to measure.", "--cold 1 --warm 2")
    with TemporaryDirectory(prefix="loraport-bench-") as name:
        folder = logs or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        measure(start, ["cold"] * cold + ["warm"] * warm, drop or [], Path(name), folder, out, json)


def measure(
    start: "Start", kinds: list[str], drop: list[Path], private: Path, logs: Path, out: Path | None, json: bool
) -> None:
    """All starts, then the report; Ctrl-C reports those that have run."""
    from loraport.bench.load.server import Server
    from loraport.bench.serving.caches import Caches, drop_files, folders_of
    from loraport.bench.serving.startup import is_open, run_once
    from loraport.bench.serving.startup_report import print_report, to_json
    from loraport.clients.home import write_json

    with Server(start.base_url) as server:
        if is_open(server):
            raise UsageError(f"something answers at {start.base_url} already.", "stop it, or choose another --port")
    caches, folders = Caches(private / "caches", start.command), [*folders_of(start.command), *drop]
    caches.clear()
    runs: list[dict[str, Any]] = []
    dropped: dict[str, Any] = {"folders": [str(folder) for folder in folders]}
    interrupted: BaseException | None = None
    for number, kind in enumerate(kinds):
        if kind == "cold":
            caches.clear()
            dropped["bytes"] = drop_files(folders)
        say(f"start {number + 1} of {len(kinds)}, {kind}", "dim")
        try:
            found = run_once(start, caches.environment(), logs / f"start-{number + 1}.log", tell)
        except (KeyboardInterrupt, SystemExit) as problem:
            interrupted = problem
            break
        runs.append({"kind": kind, **found})
        if out:
            write_json(out, to_json(start, runs, len(kinds), dropped))
    document = to_json(start, runs, len(kinds), dropped)
    if json:
        print_json(document)
    elif runs:
        print_report(document)
    if interrupted:
        raise interrupted


def tell(name: str, at: float) -> None:
    """A milestone, as it is reached."""
    say(f"  {at:7.2f} s  {name}", "dim")


def port_of(command: Sequence[str]) -> int:
    """The value of --port in a command, or what servers use without it."""
    words = [part for word in command for part in ((word,) if not word.startswith("--port=") else word.split("=", 1))]
    try:
        return int(words[words.index("--port") + 1])
    except (ValueError, IndexError):
        return DEFAULT_PORT


def bench_make_adapters(
    base: Annotated[Path, typer.Option(help="The folder of a base model; only its config.json is read.")],
    out: Annotated[Path, typer.Option(help="A new folder for them: a0, a1, …")],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 8,
    rank: Annotated[int, typer.Option(min=1, max=512, help="Of each.")] = 16,
    target: Annotated[list[str] | None, typer.Option(help="A linear; once for each. Default: all seven.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Make random adapters for a base, to load-test a server before anyone has trained.

    PEFT folders in 16 bits. They change replies a little and mean nothing.
    """
    from loraport.bench.serving.made import make_adapters
    from loraport.bench.training.cases import ALL

    made = make_adapters(base, out, count, rank, tuple(target or ALL))
    size = (made[0] / "adapter_model.safetensors").stat().st_size
    if json:
        print_json({"adapters": [str(path) for path in made], "rank": rank, "bytes": size})
        return
    say(f"{count} adapters of rank {rank}, {size / 2**20:.1f} MiB each, in {out}", "bold green")
    listed = " ".join(f"{path.name}={shlex.quote(str(path))}" for path in made[:3]) + (" …" if count > 3 else "")
    say(
        f"next: vllm serve {shlex.quote(str(base))} --enable-lora --max-loras {min(count, 8)} --max-lora-rank {rank} "
        f"--lora-modules {listed}"
    )


def bench_make_base(
    shape: Annotated[str, typer.Option(help="Such as llama-3.2-1b, qwen3-8b or tiny; see bench plan.")],
    out: Annotated[Path, typer.Option(help="A new folder for it.")],
    context: Annotated[int, typer.Option(min=16, help="Its longest context in tokens.")] = 32768,
    weights: Annotated[bool, typer.Option("--weights", help="With zeros, which take no room on disk.")] = False,
) -> None:
    """Make the folder of a base of a real shape, without weights.

    For engines that make up weights themselves, as vLLM does with --load-format dummy. Its tokenizer has a word for
    every token, so that lengths are exact. `loraport serve` asks for weights: give it --weights, and to the engine
    --load-format dummy.
    """
    from loraport.bench.serving.made import billions, make_base
    from loraport.bench.tables import known
    from loraport.bench.training.cases import SHAPES

    make_base(known("shape", shape, SHAPES), out, context, weights)
    say(f"{shape}, {billions(shape):.2f}B parameters, in {out}", "bold green")
    say(f"next: vllm serve {shlex.quote(str(out))} --load-format dummy")
