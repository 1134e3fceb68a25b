"""The bench commands of `loraport`: now `eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraport.clients.errors import LoraportError, UsageError
from loraport.clients.terminal import console, print_json, say

if TYPE_CHECKING:
    from loraport.bench.evaluate import Evaluation
    from loraport.bench.limit import ReplyLimit
    from loraport.clients.models import ModelCard
    from loraport.clients.rows import Row

MOST_MODELS = 8  # more are not meant when --model is left out


def eval(
    data: Annotated[Path, typer.Option(help="Chat rows (JSONL); the last assistant turn of each is the reference.")],
    model: Annotated[list[str] | None, typer.Option(help="A model; once for each. Default: all there are.")] = None,
    base_url: Annotated[str | None, typer.Option(help="The endpoint. Default: the one that serves here.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply in tokens. Default: from the longest reference.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at a time.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a reply.")] = 120,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="For models that can. Default: their template's.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Failing replies to print, for each model.")] = 0,
    min_success: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit code 4 when the last model's success is lower.")
    ] = None,
    min_stop_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit code 4 when the last model's stop rate is lower.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure success and stop rate of models on held-out rows.

    Success: the reply is the reference, blanks at both ends aside, and the model stopped by itself. A failed request is
    a row without success. Intervals are Wilson's, 95%. The key: LORAPORT_API_KEY or OPENAI_API_KEY.
    """
    from loraport.bench.evaluate import Evaluation, Request
    from loraport.bench.report import all_figures, check_answered, check_verdict, print_report, to_json
    from loraport.clients.endpoint import find_base_url
    from loraport.clients.home import Home
    from loraport.clients.rows import read_rows

    rows = read_rows(data)[:limit]
    url = find_base_url(base_url, Home.default())
    models, limit_of_reply = prepare(url, rows, model or [], max_tokens)
    say(f"asking {', '.join(models)} at {url}", "dim")
    say(f"replies of up to {limit_of_reply.tokens:,} tokens: {limit_of_reply.reason}", "dim")
    run = Evaluation(url, rows, models, Request(limit_of_reply.tokens, timeout, thinking), concurrency)
    problem = ask_with_progress(run)
    if run.answers and json:
        print_json(to_json(run, str(data), show) | {"max_tokens_from": limit_of_reply.reason})
    elif run.answers:
        print_report(run, show)
    if problem:
        say(f"ended after {len(run.answers)} of {len(rows) * len(models)} requests", "yellow")
        raise problem
    check_answered(run)
    check_verdict(all_figures(run)[-1], min_success, min_stop_rate)


def prepare(
    url: str, rows: "Sequence[Row]", wanted: list[str], max_tokens: int | None
) -> tuple[list[str], "ReplyLimit"]:
    """The models to ask, and how long their replies may be: `max_tokens`, or what their references need."""
    from loraport.bench.limit import ReplyLimit, choose_limit
    from loraport.clients.models import connect, context_length, list_models

    with connect(url, timeout_s=30, retries=1) as client:
        cards = list_models(client)
        models = choose_models(url, cards, wanted)
        if max_tokens:
            return models, ReplyLimit(max_tokens, "--max-tokens")
        return models, choose_limit(client, models[-1], rows, context_length(cards, models[-1]))


def choose_models(url: str, cards: "Sequence[ModelCard]", wanted: list[str]) -> list[str]:
    """The models to ask, each once; all of the endpoint's where none is wanted, a second name aside.

    Raises UsageError when one is not there.
    """
    from loraport.clients.models import check_model

    if wanted:
        return list(dict.fromkeys(check_model(cards, name) for name in wanted))
    all_models = list({card.root or card.id: card.id for card in reversed(cards)}.values())[::-1]
    if len(all_models) > MOST_MODELS:
        raise UsageError(f"{url} has {len(all_models)} models.", "choose: --model NAME, once for each")
    return all_models


def ask_with_progress(run: "Evaluation") -> LoraportError | KeyboardInterrupt | None:
    """Run all requests under a progress bar; return what ended it early, if anything."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"asking {', '.join(run.models)}", total=len(run.rows) * len(run.models))
        run.on_answer = lambda answer: progress.advance(task)
        try:
            run.ask_all()
        except (LoraportError, KeyboardInterrupt) as problem:
            return problem
    return None
