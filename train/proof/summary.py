"""The result of a run in the terminal: a table of both models, a few replies, and the verdicts in words.

>>> say_comparison("demo", compared)
>>> say_verdicts(verdicts)
"""

from collections.abc import Sequence

from loraport.clients.terminal import console, printable, say
from loraport.train.proof.evaluate import Comparison, Sample
from loraport.train.proof.scores import Scores
from loraport.train.proof.verdict import Verdict

SHOWN, LONGEST = 3, 160  # samples, and characters of each text
STYLES = {"good": "green", "note": "", "warning": "yellow"}


def say_comparison(name: str, compared: Comparison) -> None:
    """The figures of adapter and base, and samples: those that fail first."""
    from rich.table import Table

    table = Table("", "base", name, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in figures(compared.base, compared.adapter):
        table.add_row(*row)
    say(f"{compared.adapter.replies} held-out prompts, answered greedily")
    console.print(table)
    for sample in sorted(compared.samples, key=lambda sample: sample.adapter.success)[:SHOWN]:
        say(f"  {describe(sample)}", "dim")


def figures(base: Scores, adapter: Scores) -> list[tuple[str, str, str]]:
    """Rows of the table: a name, the base's figure and the adapter's."""
    return [
        ("success", share(base, "success"), share(adapter, "success")),
        ("ROUGE-L", f"{base.rouge_l:.2f}", f"{adapter.rouge_l:.2f}"),
        ("BLEU", f"{base.bleu:.1f}", f"{adapter.bleu:.1f}"),
        ("stopped by itself", share(base, "stop_rate"), share(adapter, "stop_rate")),
        ("in a loop", share(base, "repetition"), share(adapter, "repetition")),
        ("tokens a reply", f"{base.reply_tokens:.1f}", f"{adapter.reply_tokens:.1f}"),
    ]


def share(model: Scores, key: str) -> str:
    """`95% (19)`; without the number where a check gave shares of a success."""
    value = getattr(model, key)
    count = value * model.replies
    return f"{value:.0%} ({count:.0f})" if abs(count - round(count)) < 1e-6 else f"{value:.0%}"


def describe(sample: Sample) -> str:
    """What the adapter replied and what was wanted, in one line."""
    ending = "" if sample.adapter.stopped else " (never stops)"
    reply, wanted = shorten(sample.adapter.text), shorten(sample.asked.reference)
    return f"line {sample.asked.line}: reply {reply}{ending}  wanted {wanted}"


def shorten(text: str) -> str:
    """A text in quotes on one line, its end left out where it is long."""
    text = text.strip()
    return repr(printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"))


def say_verdicts(verdicts: Sequence[Verdict]) -> None:
    """A line each, warnings marked as such."""
    for verdict in verdicts:
        mark = "warning: " if verdict.level == "warning" else ""
        say(f"{mark}{verdict}", STYLES[verdict.level])
