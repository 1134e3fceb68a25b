"""What a run brought, for people and for machines: `report.html` and `report.json` beside the adapter's weights.

The page is one file without scripts and without anything from the network; its policy forbids both, because replies
of a model stand in it. Everything it shows is in the JSON document too.

    >>> document = describe_run(manifest, trainer.state.log_history, compared, verdicts, requirements, choices, phases)
    >>> write_report(folder, document)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from loraport.clients.charts import Series, line_chart
from loraport.clients.errors import os_errors
from loraport.clients.home import write_json
from loraport.clients.page import render_page
from loraport.train.defaults import Choice
from loraport.train.manifest import Manifest
from loraport.train.proof.evaluate import Comparison, Sample
from loraport.train.proof.gate import Requirement
from loraport.train.proof.scores import Scored, Scores
from loraport.train.proof.verdict import History, Verdict, evaluations

HTML, JSON = "report.html", "report.json"
TEMPLATE = Path(__file__).parent / "report.html.jinja"
# Title, unit, and the keys of the history that are drawn, each with its name.
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "nats a {unit}", (("loss", "training"), ("eval_loss", "evaluation"))),
    ("Reward margin", "beta × nats", (("reward_margin", "training"), ("eval_reward_margin", "evaluation"))),
    ("Reward accuracy", "share of pairs", (("reward_accuracy", "training"), ("eval_reward_accuracy", "evaluation"))),
    ("Preferred outputs", "nats", (("chosen_logps", "training"), ("eval_chosen_logps", "evaluation"))),
    ("Non-preferred outputs", "nats", (("rejected_logps", "training"), ("eval_rejected_logps", "evaluation"))),
    ("Token accuracy", "share of held-out tokens guessed right", (("eval_token_accuracy", "evaluation"),)),
    ("Learning rate", "", (("learning_rate", "learning rate"),)),
    ("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),)),
    ("Speed", "tokens/s", (("tokens_per_second", "tokens/s"),)),
    ("Memory", "GiB, peak", (("memory_gib", "memory"),)),
)
SMOOTHED = {"loss", "grad_norm", "tokens_per_second"}
SMOOTHED |= {"reward_margin", "reward_accuracy", "chosen_logps", "rejected_logps"}
SHARES = (("success", "Success"), ("exact_match", "Exact match"), ("rouge_l", "ROUGE-L"), ("bleu", "BLEU"))
BEHAVIOUR = (("stop_rate", "Stops by itself"), ("repetition", "Falls into a loop"))
# Where small differences matter; the rest begin at 0.
ZOOMED = {"Loss", "Token accuracy", "Reward margin", "Preferred outputs", "Non-preferred outputs"}
OPEN_SAMPLES = 5


def describe_run(
    manifest: Manifest,
    history: History,
    compared: Comparison | None,
    verdicts: Sequence[Verdict],
    requirements: Sequence[Requirement] = (),
    choices: Sequence[Choice] = (),
    phases: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Everything a report shows, as one JSON document. `phases`: seconds of each part of the run."""
    metrics = manifest.metrics
    reasons = {choice.name.replace(" ", "_"): choice.reason for choice in choices}
    return {
        "format": 1,
        "adapter": manifest.model_dump(mode="json", exclude={"golden", "run", "data", "metrics", "versions"}),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "requirements": [
            {"text": str(each), "found": metrics.get(each.metric), "met": met(each, metrics)} for each in requirements
        ],
        "metrics": dict(metrics),
        "scores": {"adapter": asdict(compared.adapter), "base": asdict(compared.base)} if compared else {},
        "samples": [describe_sample(sample) for sample in compared.samples] if compared else [],
        "settings": [
            {"name": name, "value": value, "reason": reasons.get(name, "")} for name, value in manifest.run.items()
        ],
        "data": manifest.data.model_dump(mode="json"),
        "phases": dict(phases or {}),
        "versions": manifest.versions,
        "history": [dict(entry) for entry in history],
    }


def met(requirement: Requirement, metrics: Mapping[str, float]) -> bool:
    """Whether a requirement is met; not, where its metric was not measured."""
    found = metrics.get(requirement.metric)
    return found is not None and requirement.is_met(found)


def describe_sample(sample: Sample) -> dict[str, Any]:
    """A sample as JSON: the prompt as messages, and what became of it."""
    asked = sample.asked
    replies = {name: describe_reply(reply) for name, reply in (("adapter", sample.adapter), ("base", sample.base))}
    return {"line": asked.line, "messages": asked.messages, "reference": asked.reference, **replies}


def describe_reply(reply: Scored) -> dict[str, Any]:
    """A reply as JSON."""
    return asdict(reply) | {"success": reply.success}


def write_report(folder: Path, document: dict[str, Any]) -> Path:
    """Write both files into an adapter folder; the path of the page. ResourceError when the disk refuses."""
    write_json(folder / JSON, document)
    path = folder / HTML
    with os_errors("writing", path):
        path.write_text(render(document), encoding="utf-8")
    return path


def render(document: dict[str, Any]) -> str:
    """The page of a document."""
    check = next((each["value"] for each in document["settings"] if each["name"] == "check"), None)
    return render_page(
        TEMPLATE,
        FILTERS,
        **document,
        charts=list(draw_charts(document["history"], "pair" if method_of(document) == "dpo" else "token")),
        method=method_of(document),
        base_name=document["adapter"]["base"]["model"].rstrip("/").rsplit("/", 1)[-1],
        score_rows=score_rows(document["scores"], with_check=bool(check)),
        check=check,
        evaluated=evaluations(document["history"]),
        open_samples=OPEN_SAMPLES,
    )


def method_of(document: dict[str, Any]) -> str:
    """How it was trained: sft or dpo."""
    return next((str(each["value"]) for each in document["settings"] if each["name"] == "method"), "sft")


def draw_charts(history: History, unit_of_loss: str = "token") -> list[dict[str, Any]]:
    """Those of CHARTS for which the history has values."""
    charts = []
    for title, words, keys in CHARTS:
        unit = words.format(unit=unit_of_loss)
        series = [Series(name, points_of(history, key), smooth=key in SMOOTHED) for key, name in keys]
        drawn = [each for each in series if each.points]
        if drawn and max(len(each.points) for each in drawn) > 1:
            svg = line_chart(drawn, unit, from_zero=title not in ZOOMED)
            charts.append({"title": title, "unit": unit, "names": [each.name for each in drawn], "svg": svg})
    return charts


def points_of(history: History, key: str) -> list[tuple[float, float]]:
    """Steps and values of one key, the summary at the end of the run aside."""
    entries = (entry for entry in history if key in entry and "train_runtime" not in entry)
    return [(float(entry["step"]), float(entry[key])) for entry in entries]


def score_rows(scores: Mapping[str, Any], with_check: bool) -> list[dict[str, Any]]:
    """Rows of the table of scores: name, and for each model the words, the length of its bar, the interval."""
    if not scores:
        return []
    models = {name: Scores(**figures) for name, figures in scores.items()}
    rows = [score_row(key, title, models) for key, title in (*SHARES, *BEHAVIOUR) if with_check or key != "exact_match"]
    lengths = {
        name: {"words": f"{model.reply_tokens:.1f}", "bar": None, "interval": f"longest {model.longest_reply:,}"}
        for name, model in models.items()
    }
    return [*rows, {"title": "Tokens a reply", **lengths}]


def score_row(key: str, title: str, models: Mapping[str, Scores]) -> dict[str, Any]:
    """One row: shares as percentages with their interval where they count replies, BLEU and ROUGE-L as numbers."""
    row: dict[str, Any] = {"title": title}
    for name, model in models.items():
        value = getattr(model, key)
        counted = key in ("exact_match", "stop_rate", "repetition", "success")
        rate = model.rate(key) if counted else None
        interval = f"{rate.low:.0%}–{rate.high:.0%}" if rate else ""
        words = f"{value:.0%}" if counted else f"{value:.1f}" if key == "bleu" else f"{value:.2f}"
        row[name] = {"words": words, "bar": value / 100 if key == "bleu" else value, "interval": interval}
    return row


def mark_differences(text: str, reference: str) -> Markup:
    """`text` escaped, with what is not in `reference` marked."""
    own, wanted = re.split(r"(\s+)", text), re.split(r"(\s+)", reference)
    parts = []
    for kind, start, end, _, _ in SequenceMatcher(None, own, wanted, autojunk=False).get_opcodes():
        piece = escape("".join(own[start:end]))
        parts.append(piece if kind == "equal" or not piece.strip() else Markup("<mark>{}</mark>").format(piece))
    return Markup("").join(parts)


def figure(value: Any) -> str:
    """A number in four digits, thousands separated."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def plain(value: Any) -> str:
    """A setting as a person would write it."""
    if value is None or value in ([], ""):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return figure(value) if isinstance(value, float) else str(value)


def sentence(text: str) -> str:
    """`text` with a capital letter."""
    return text[:1].upper() + text[1:]


def duration(seconds: float) -> str:
    """`0.4 s`, `12 min`, `3.2 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


FILTERS: dict[str, Callable[..., Any]] = {
    "figure": figure,
    "marked": mark_differences,
    "plain": plain,
    "duration": duration,
    "sentence": sentence,
}
