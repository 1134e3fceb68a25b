"""`loraport bench compare`: two runs of one bench held against each other, figure by figure.

A change is B / A − 1. Where both runs have at least three slices, starts or repeats, it has the 95% interval of a
bootstrap over them, each run's resampled alone, for the runs are not paired. A regression is a change for the worse
beyond the limit whose interval, where there is one, lies on the worse side altogether. What A has and B does not
believe of itself falls short too: a server that fails its requests must not pass for lack of figures.

    >>> found = compare_runs(read_document(Path("a.json")), read_document(Path("b.json")), limit=0.05)
    >>> found["worse"]
    [{'where': '8 at once', 'name': 'TPOT p50', 'a': 9.1, 'b': 10.2, 'change': 0.121, ...}]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from loraport.bench.load.figures import LEAST_ROUNDS, RESAMPLES
from loraport.bench.serving.comparable import HIGHER, Figure, centre_of, figures_of
from loraport.bench.serving.documents import REPORT, Part, part_of, read_document, read_parts
from loraport.bench.tables import NOTHING, plain_table, result_console
from loraport.clients.errors import DataError, Shortfall, UsageError

# What makes a workload another one; the seed does not, nor do notes. `where` each stands in a document.
WORKLOAD = ("route", "prompts", "input_tokens", "output_tokens", "shared_prefix", "rows", "natural", "extra", "replays")
TRACE = ("requests", "seconds")
TRAINING = ("shape", "steps", "gpus", "gpu_memory")
NAMED = 5  # figures that an error names


def compare_files(a: Path, b: Path, limit: float | None, any_workload: bool) -> dict[str, Any]:
    """Two files; reports are compared part by part, as far as both have them. DataError for different kinds."""
    one, other = by_name(a), by_name(b)
    shared = [(one[name], other[name]) for name in one if name in other]
    if not shared:
        raise DataError(
            f"{a} is of {words(one)}, {b} of {words(other)}: they have nothing to compare.",
            "compare two documents of the same bench",
        )
    runs, refused = [], []
    for left, right in shared:
        try:
            runs.append(compare_runs(left, right, limit, any_workload))
        except DataError as error:
            if len(shared) == 1 or limit is not None:
                raise
            refused.append(error.message)
    if not runs:
        raise DataError(f"nothing can be compared: {' '.join(refused)}", "measure both with the same options")
    return {
        "bench": "compare",
        "a": str(a),
        "b": str(b),
        "max_regression": limit,
        "only_in_a": [name for name in one if name not in other],
        "only_in_b": [name for name in other if name not in one],
        "not_compared": refused,
        "runs": runs,
    }


def by_name(path: Path) -> dict[str, dict[str, Any]]:
    """Documents of a file by kind; of a report with several of a kind by name too."""
    document = read_document(path)
    parts: list[Part] = read_parts([path]) if document["bench"] == REPORT else [part_of("", document)]
    kinds = [part.kind for part in parts]
    return {
        part.kind if kinds.count(part.kind) == 1 else f"{part.kind} {part.name}": part.document
        for part in parts
        if part.document
    }


def words(documents: dict[str, Any]) -> str:
    """Kinds, in a row."""
    return ", ".join(documents) or "nothing"


def compare_runs(
    a: dict[str, Any], b: dict[str, Any], limit: float | None, any_workload: bool = False
) -> dict[str, Any]:
    """Two documents of one kind; DataError where their workloads differ, or they share no figure."""
    differences = other_workload(a, b)
    if differences and not any_workload:
        raise DataError(
            f"the two runs of {a['bench']} had different loads: {'; '.join(differences)}.",
            "measure both with the same options; --any-workload shows the differences all the same",
        )
    ours, theirs = ({each.key: each for each in figures_of(document)} for document in (a, b))
    rows = [compare_figures(ours[key], theirs[key], limit) for key in ours if key in theirs]
    if not rows:
        raise DataError(f"the two runs of {a['bench']} share no figure.", "measure the same loads and models in both")
    return {
        "bench": a["bench"],
        "workload_differs": differences,
        "notes": notes(a, b),
        "figures": rows,
        "worse": [row for row in rows if row["verdict"] == "regression"],
        "withheld": [row for row in rows if row["decides"] and row["a"] is not None and row["b"] is None],
        "only_in_a": [", ".join(key) for key in ours if key not in theirs],
        "only_in_b": [", ".join(key) for key in theirs if key not in ours],
    }


def other_workload(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What of the two workloads differs, in words."""
    pairs = [(name, *(each.get("workload", {}).get(name) or None for each in (a, b))) for name in WORKLOAD]
    pairs += [(f"trace {name}", *((each.get("trace") or {}).get(name) for each in (a, b))) for name in TRACE]
    if a["bench"] == "train":
        pairs += [(name, a.get(name), b.get(name)) for name in TRAINING]
    return [f"{name} {one} and {other}" for name, one, other in pairs if one != other]


def compare_figures(a: Figure, b: Figure, limit: float | None) -> dict[str, Any]:
    """One figure of both: its change, the interval of that, and what is to be said of it."""
    change, low, high = relate(a, b)
    row = {
        "where": a.where,
        "name": a.name,
        "unit": a.unit,
        "better": a.better,
        "decides": a.decides or b.decides,
        "a": a.value,
        "b": b.value,
        "change": change,
        "low": low,
        "high": high,
    }
    return row | {"verdict": verdict(row, limit)}


def relate(a: Figure, b: Figure, seed: int = 0) -> tuple[float | None, float | None, float | None]:
    """B / A − 1 with the 95% interval; None where there is none."""
    if a.value is None or b.value is None or a.value <= 0 or b.value <= 0:
        return None, None, None
    change = round(b.value / a.value - 1, 4)
    if min(len(a.samples), len(b.samples)) < LEAST_ROUNDS:
        return change, None, None
    draw = np.random.default_rng(seed)
    tops, bottoms = (resampled(each, draw) for each in (b, a))
    low, high = np.percentile(tops / bottoms - 1, (2.5, 97.5))
    return change, round(float(low), 4), round(float(high), 4)


def resampled(figure: Figure, draw: np.random.Generator) -> Any:
    """Means of RESAMPLES draws of a figure's samples."""
    values = np.asarray(figure.samples, dtype=np.float64)
    return centre_of(values[draw.integers(0, len(values), (RESAMPLES, len(values)))], figure.centre)


def verdict(row: dict[str, Any], limit: float | None) -> str:
    """Of a change: better, worse or same by its interval; regression beyond the limit; or nothing to tell."""
    change, low, high = row["change"], row["low"], row["high"]
    if change is None or not row["better"]:
        return ""
    worse_by = -change if row["better"] == HIGHER else change
    is_clear = low is None or low > 0 or high < 0
    if limit is not None and row["decides"] and worse_by > limit and is_clear:
        return "regression"
    if not is_clear:
        return "same"
    return "" if low is None else "worse" if worse_by > 0 else "better"


def notes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs around the two runs, and may be why their figures do."""
    found = []
    for name in ("processor", "cores", "gpus", "versions"):
        one, other = (document.get("environment", {}).get(name) for document in (a, b))
        if one != other:
            found.append(f"{name}: {brief(one, other)}")
    for name in ("version", "models", "context"):
        one, other = ([server.get(name) for server in document.get("servers", {}).values()] for document in (a, b))
        if one != other:
            found.append(f"the server's {name}: {one} and {other}")
    found += [f"{name} is not complete" for name, each in (("A", a), ("B", b)) if not each.get("complete", True)]
    return found


def brief(one: Any, other: Any) -> str:
    """Both; of versions those that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        return ", ".join(f"{name} {one.get(name, NOTHING)} and {other.get(name, NOTHING)}" for name in names)
    if isinstance(one, list) and isinstance(other, list):
        one, other = (
            [each.get("name") if isinstance(each, dict) else each for each in found] for found in (one, other)
        )
    return f"{one or 'none'} and {other or 'none'}"


def print_comparison(document: dict[str, Any]) -> None:
    """A table for each pair of runs, on standard output."""
    console = result_console()
    console.print(Text(f"A  {document['a']}\nB  {document['b']}", style="dim"), soft_wrap=True)
    for run in document["runs"]:
        for line in run["notes"] + [f"not the same load: {each}" for each in run["workload_differs"]]:
            console.print(Text(f"note: {line}", style="yellow"), soft_wrap=True)
        table = plain_table(run["bench"], ["A", "B", "change", "95%", "better is", ""])
        place = None
        for row in run["figures"]:
            if row["where"] != place:
                place = row["where"]
                table.add_row(Text(place, style="bold"))
            table.add_row(*cells(row))
        console.print(table)
    for line in document["not_compared"]:
        console.print(Text(f"note: {line}", style="yellow"), soft_wrap=True)
    for name in ("a", "b"):
        if document[f"only_in_{name}"]:
            console.print(Text(f"only in {name.upper()}: {', '.join(document[f'only_in_{name}'])}", style="yellow"))
    if not any(row["low"] is not None for run in document["runs"] for row in run["figures"]):
        words = f"no intervals: neither has {LEAST_ROUNDS} slices, starts or repeats of a figure"
        console.print(Text(words, style="dim"), soft_wrap=True)


def cells(row: dict[str, Any]) -> list[Text]:
    """A row of the table."""
    name = f"  {row['name']}" + (f", {row['unit']}" if row["unit"] else "")
    values = [figure(row[side]) for side in ("a", "b")]
    change = NOTHING if row["change"] is None else f"{row['change']:+.1%}"
    spread = "" if row["low"] is None else f"{row['low']:+.1%} … {row['high']:+.1%}"
    said = {"same": "no difference shown"}.get(row["verdict"], row["verdict"])
    style = {"better": "green", "worse": "yellow", "regression": "bold red"}.get(row["verdict"], "")
    plain = [Text(each) for each in (name, *values, change, spread, row["better"])]
    return [*plain, Text(said, style=style)]


def figure(value: float | None) -> str:
    """Four digits; a dash for a figure that is withheld or was not measured."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def check_regression(document: dict[str, Any]) -> None:
    """Shortfall that names what got worse than the limit, or is withheld in B; UsageError where nothing could tell."""
    limit = document["max_regression"]
    if limit is None:
        return
    worse = [row for run in document["runs"] for row in run["worse"]]
    gone = [row for run in document["runs"] for row in run["withheld"]]
    found = [f"{row['where']}: {row['name']} {row['change']:+.1%}" for row in worst_first(worse)]
    found += [f"{row['where']}: {row['name']} is withheld or missing in B" for row in gone]
    found += [f"{name} is missing in B" for name in document["only_in_a"]]
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise Shortfall(
            f"{document['b']} falls short by more than {limit:.0%}: {'; '.join(found[:NAMED])}{more}.",
            "the table above has all figures; a change within the noise of its rounds does not count",
        )
    if not any(row["decides"] and row["change"] is not None for run in document["runs"] for row in run["figures"]):
        raise UsageError(
            "no figure could decide: all are withheld in A, or of a kind that does not.", "measure A again"
        )


def worst_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how much worse they got."""
    return sorted(rows, key=lambda row: -abs(row["change"]))


def parse_limit(text: str) -> float | None:
    """0.05 of `5%` or `0.05`; None of nothing. UsageError for what is no share."""
    if not text:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UsageError(f"--max-regression {text!r} is no share.", "for example --max-regression 5%")
    return value
