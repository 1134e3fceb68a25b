"""An evaluation as a table for people, as one JSON document, and as a verdict."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraport.bench.evaluate import Evaluation
from loraport.bench.metrics import Answer, ModelFigures, summarize
from loraport.clients.errors import EndpointError, Shortfall
from loraport.clients.rates import Rate
from loraport.clients.terminal import printable


def all_figures(run: Evaluation) -> list[ModelFigures]:
    """The figures of every model, in the order asked for."""
    return [summarize(model, run.answers) for model in run.models]


def failures(run: Evaluation, model: str, count: int) -> list[Answer]:
    """The first `count` answers of `model`, by line, that are not the reference."""
    missed = [answer for answer in run.answers if answer.model == model and not answer.is_success]
    return sorted(missed, key=lambda answer: answer.line)[:count]


def to_json(run: Evaluation, data: str, show: int) -> dict[str, Any]:
    """The whole report as one document."""
    return {
        "base_url": run.base_url,
        "data": data,
        "complete": run.is_complete,
        "max_tokens": run.request.max_tokens,
        "concurrency": run.concurrency,
        "seconds": round(run.seconds, 2),
        "models": [figures.to_json() for figures in all_figures(run)],
        "failures": [describe(answer) for model in run.models for answer in failures(run, model, show)],
    }


def describe(answer: Answer) -> dict[str, Any]:
    """An answer as a JSON object."""
    keys = ("model", "line", "prompt", "reference", "reply", "finish_reason", "error")
    return {key: getattr(answer, key) for key in keys}


def print_report(run: Evaluation, show: int) -> None:
    """The table and, where asked for, failing replies, on standard output."""
    console = Console(file=sys.stdout, highlight=False)
    console.print(make_table(all_figures(run)))
    for model in run.models:
        for answer in failures(run, model, show):
            console.print(show_failure(answer), soft_wrap=True)


def make_table(figures: Sequence[ModelFigures]) -> Table:
    """Models as columns, figures as rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for one in figures:
        table.add_column(Text(one.model, overflow="fold"), justify="right", overflow="fold")
    table.add_row("rows", *(str(one.rows) for one in figures))
    table.add_row("success", *(share(one.success) for one in figures), style="bold")
    table.add_row("  95% interval", *(interval(one.success) for one in figures))
    table.add_row("stopped by itself", *(share(one.stopped) for one in figures), style="bold")
    table.add_row("  95% interval", *(interval(one.stopped) for one in figures))
    table.add_row("tokens a reply", *(number(one.mean_completion_tokens) for one in figures))
    table.add_row("tokens/s a request", *(number(one.tokens_per_second) for one in figures))
    for kind in dict.fromkeys(kind for one in figures for kind in one.errors):
        table.add_row(f"error: {kind}", *(str(one.errors.get(kind, 0)) for one in figures), style="red")
    return table


def share(rate: Rate) -> str:
    """`93.0% (93)`."""
    return f"{rate.rate:.1%} ({rate.count})"


def interval(rate: Rate) -> str:
    """`86.3–96.6%`."""
    return f"{100 * rate.low:.1f}–{rate.high:.1%}"


def number(value: float | None) -> str:
    """One decimal, or a dash where the server does not say."""
    return "–" if value is None else f"{value:.1f}"


def show_failure(answer: Answer) -> Text:
    """A failing reply under its reference. Several lines stay several lines; control characters are made visible."""
    got = answer.error or answer.reply.strip() or "(nothing)"
    cut = "" if answer.stopped or answer.error else f" [{answer.finish_reason}]"
    text = Text(f"\n{answer.model}, line {answer.line}\n", style="bold")
    for label, content in (("asked", answer.prompt), ("wanted", answer.reference), ("got", got + cut)):
        text.append(f"  {label + ':':<8}", style="dim").append(indent(content) + "\n", style="default")
    text.right_crop(1)
    return text


def indent(content: str) -> str:
    """`content` with its further lines under the first, and nothing in it that a terminal would obey."""
    return printable(content.strip()).replace("\n", "\n" + " " * 10)


def check_answered(run: Evaluation) -> None:
    """Raise EndpointError when a model was asked and never answered: figures of nothing are not figures."""
    for figures in all_figures(run):
        if figures.rows and sum(figures.errors.values()) == figures.rows:
            kinds = ", ".join(f"{count} × {kind}" for kind, count in figures.errors.items())
            raise EndpointError(
                f"none of {figures.rows} requests to {figures.model} was answered: {kinds}.",
                "the server's log says more",
            )


def check_verdict(figures: ModelFigures, min_success: float | None, min_stop_rate: float | None) -> None:
    """Raise Shortfall when `figures` are below what was asked for."""
    wanted = (("success", figures.success, min_success), ("stop rate", figures.stopped, min_stop_rate))
    short = [
        f"{name} {rate.rate:.1%} ({rate.count} of {rate.total}) instead of {least:.1%}"
        for name, rate, least in wanted
        if least is not None and rate.rate < least
    ]
    if short:
        hint = "`--show 5` prints replies beside their references"
        raise Shortfall(f"{figures.model} falls short: {' and '.join(short)}.", hint)
