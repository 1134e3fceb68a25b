"""`loraport bench kv`: options, progress, and what happens at Ctrl-C."""

import re
import secrets
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraport.clients.errors import LoraportError, ResourceError, UsageError
from loraport.clients.terminal import console, print_json, say

if TYPE_CHECKING:
    from loraport.bench.serving.kv import Run


def bench_kv(
    base_url: Annotated[
        str | None, typer.Option(help="http://…/v1, or unix:/path of a socket. Default: the endpoint that serves here.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model. Default: the first.")] = None,
    context: Annotated[
        str,
        typer.Option(help="Of requests at once, as a list: 8k,32k. Default: a quarter of the longest, the longest."),
    ] = "",
    part: Annotated[
        list[str] | None, typer.Option(help="Only context, lengths, prefix or requests; once for each. Default: all.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=10_000, help="Try no more requests at once.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Of each length, and of prompts with a prefix.")] = 3,
    deadline: Annotated[float, typer.Option(min=0.5, help="Seconds for one probe.")] = 60,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for everything; what is left over is told.")] = 600,
    chat: Annotated[bool, typer.Option("--chat/--completions", help="Which API.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the prompts. Default: another each time.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON document here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure how much context a server takes, and how many requests its KV cache holds.

    The longest context that is accepted, by bisection; TTFT by length of the prompt; what the prefix cache saves; how
    many requests of a context run at once, and the tokens they hold. Any OpenAI-compatible server; the key is taken
    from OPENAI_API_KEY. What a server does not tell is not available, what follows from times alone is marked. It puts
    the server under full load, and leaves it with nothing under way. Exit code 3 when it does not answer any more.
    """
    if not find_spec("httptools"):
        raise ResourceError("load tests need httptools.", "pip install httptools")
    from loraport.bench.load.server import Server
    from loraport.bench.serving.kv import PARTS, Options, Run
    from loraport.bench.serving.kv_probe import Pace
    from loraport.bench.tables import check_out, known
    from loraport.clients.endpoint import find_base_url
    from loraport.clients.home import Home
    from loraport.clients.models import check_model

    check_out(out)
    parts = tuple(known("part", name, PARTS) for name in part or PARTS)
    chosen = secrets.randbits(31) if seed is None else seed
    options = Options(parse_contexts(context), parts, most, repeats, Pace(deadline, budget), chat, chosen)
    with Server(find_base_url(base_url, Home.default()), deadline) as server:
        cards = server.cards()
        run = Run(server, check_model(cards, model) if model else cards[0].id, options)
        measure(run, out, json)


def parse_contexts(text: str) -> tuple[int, ...]:
    """Tokens of `8k,32768`; UsageError for what is no length."""
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)([kK]?)", word)
        size = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if size < 16:
            raise UsageError(
                f"--context {word!r} is no number of tokens, 16 or more.",
                "for example --context 8k, or --context 8k,32k",
            )
        found.append(size)
    return tuple(dict.fromkeys(found))


def measure(run: "Run", out: Path | None, json: bool) -> None:
    """Measure, then tell; what ends it early is told after what has run."""
    from loraport.bench.serving.kv_report import print_report
    from loraport.clients.home import write_json

    problem: BaseException | None = None
    with console.status("") if console.is_terminal else nullcontext() as status:
        run.on_step = (lambda words: status.update(words)) if status else (lambda words: say(words, "dim"))
        try:
            run.measure()
        except (LoraportError, KeyboardInterrupt, SystemExit) as error:
            problem = error
    if run.prober:
        document = run.document()
        print_json(document) if json else print_report(document)
        if out:
            write_json(out, document)
    if problem:
        raise problem
