"""What a report shows of each kind of document: facts, curves, bars with intervals, tables and what must be known.

A kind that has no function here is shown as a table of its numbers. `SECTIONS` at the end is where a bench is added.

    >>> section_of(Part("throughput", "done", document)).facts
    [('most tokens/s', '4,947 (64 at once)')]
"""

from collections.abc import Callable, Sequence
from typing import Any

import rich.table

from loraport.bench.load.stage import Load
from loraport.bench.serving import compare, throughput
from loraport.bench.serving.comparable import figures_of
from loraport.bench.serving.compare_runs import figure
from loraport.bench.serving.documents import Part
from loraport.bench.serving.section import (
    GIB,
    Bar,
    Bars,
    Chart,
    Section,
    Table,
    count_believed,
    curve,
    estimates,
    full_names,
    percent,
    sheet,
)
from loraport.bench.serving.sections_engine import adapters_section, kv_section
from loraport.bench.serving.startup import MILESTONES
from loraport.bench.tables import NOTHING, number
from loraport.clients.charts import Point, Series

MOST_ROWS = 200  # of a table of plain numbers
# Curves over the load: title, unit, and (name, figure, part of it).
CURVES = (
    ("Output tokens per second", "tokens/s", (("tokens/s", "", ""),)),
    ("Time to first token", "ms", (("median", "ttft_ms", "p50"), ("p99", "ttft_ms", "p99"))),
    ("Time per output token", "ms", (("median", "tpot_ms", "p50"), ("p99", "tpot_ms", "p99"))),
)


def section_of(part: Part) -> Section:
    """A part's section; one that did not run has only the reason."""
    title = TITLES.get(part.kind, part.kind.capitalize())
    title = title if part.name in (part.kind, "") else f"{title} · {part.name}"
    if part.document is None:
        return Section(title, remarks=[f"not measured: {part.reason}"])
    try:
        section = SECTIONS.get(part.kind, any_section)(part.document)
    except (LookupError, TypeError, ValueError, AttributeError):
        section = any_section(part.document)
        section.remarks.append("another version of Loraport wrote this: only its plain numbers are shown")
    section.title = title
    if part.status == "cut" and not any("not complete" in each for each in section.remarks):
        section.remarks.append("not complete: it was interrupted, or its time was over")
    return section


def throughput_section(document: dict[str, Any]) -> Section:
    """Curves over concurrency and over rate, and the table of the terminal."""
    stages = document["stages"]
    section = Section("", about(document), believed=count_believed(stages, "load"))
    section.reasons = [f"{stage['label']}: {reason}" for stage in stages for reason in stage["reasons"]]
    section.remarks = [each for each in throughput.remarks(document) if "withheld: " not in each]
    for kind, key, word in (("closed", "concurrency", "requests at once"), ("open", "rate", "requests per second")):
        section.charts += curves([stage for stage in stages if is_even(stage, kind)], key, word)
    models = dict.fromkeys(target["model"] for stage in stages for target in stage.get("targets", ()))
    section.about += [f"asked: {', '.join(models)}"] if models else []
    section.about += throughput.knee(document["sweep"]) if document.get("sweep") else []
    best = max((stage for stage in stages if is_even(stage, stage["load"]["kind"])), key=speed, default=None)
    if best:
        section.facts.append(("most tokens/s", f"{speed(best):,.0f} ({best['label']})"))
    columns = [(stage["label"], throughput.cells(stage["figures"], stage["believed"])) for stage in stages]
    columns += [
        (f"{stage['label']}, {model}", throughput.cells(each, stage["believed"]))
        for stage in stages
        for model, each in stage["by_model"].items()
    ]
    note = "Times in ms, from the moment a request was due. A dash: withheld, or not measured; then no curve has it."
    section.tables = [sheet("Loads", full_names(throughput.row_names(document)), columns, note)]
    section.tables += [printed(title, table) for stage in stages for title, table in throughput.parts(stage)]
    return section


def about(document: dict[str, Any]) -> list[str]:
    """The heading of the terminal; that times are in ms stands below the table."""
    return [line for line in throughput.heading(document) if not line.startswith("times in ms")]


def printed(title: str, table: rich.table.Table) -> Table:
    """A table of the terminal."""
    rows = [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    return Table(title, [str(column.header) for column in table.columns], rows)


def is_even(stage: dict[str, Any], kind: str) -> bool:
    """Whether a load is believed, of this kind, and the same from its front to its end."""
    load = stage["load"]
    return load["kind"] == kind and stage["believed"] and not load.get("ramp_s") and not load.get("trace")


def speed(stage: dict[str, Any]) -> float:
    """Output tokens/s of a load, of its steady window where it has one."""
    figures = stage["figures"]
    return float((figures["steady"] or figures)["output_tokens_per_second"] or 0)


def curves(stages: Sequence[dict[str, Any]], key: str, over: str) -> list[Chart]:
    """CURVES over a load's `key`."""
    return [
        each
        for title, unit, lines in CURVES
        for each in curve(title, unit, over, [Series(*line_of(stages, key, *line)) for line in lines])
    ]


def line_of(stages: Sequence[dict[str, Any]], key: str, name: str, figure: str, part: str) -> tuple[str, list[Point]]:
    """A curve: its name and points; of several loads with the same `key` (other arrivals) all."""
    points = []
    for stage in stages:
        value = speed(stage) if not figure else (stage["figures"][figure] or {}).get(part)
        if value is not None:
            points.append((float(stage["load"][key]), float(value)))
    return name, sorted(points)


def comparison_section(document: dict[str, Any]) -> Section:
    """Bars of the ratios with their intervals, and the table of the terminal, for each load."""
    section = Section("", about(document), believed=count_believed(document["comparisons"], "comparison"))
    shown = [each.strip() for each in compare.remarks(document)]
    section.reasons = [reason for one in document["comparisons"] for reason in withheld(one)]
    section.remarks = [each for each in shown if not any(each in reason for reason in section.reasons)]
    for comparison in document["comparisons"]:
        references = compare.references_of(comparison)
        load = Load(**comparison["load"]).words
        believed = comparison["believed"]
        if references and believed:
            section.bars += ratio_bars(comparison, load, references)
            section.facts += ratio_facts(comparison, load, references)
        columns = [(one["label"], compare.cells(one, references, believed)) for one in comparison["variants"]]
        size = f"{comparison['rounds']} rounds of slices of {comparison['slice_requests']} requests"
        section.tables.append(sheet(load, full_names(compare.row_names(references)), columns, f"{size}. Times in ms."))
    return section


def withheld(comparison: dict[str, Any]) -> list[str]:
    """Why nothing of a comparison is believed; single rounds that are left out stand among the remarks."""
    if comparison["believed"]:
        return []
    return [f"{Load(**comparison['load']).words}: {reason}" for reason in comparison["reasons"]]


def ratio_bars(comparison: dict[str, Any], load: str, references: Sequence[str]) -> list[Bars]:
    """Tokens/s of each variant over those of each reference."""
    found = []
    for reference in references:
        pairs = [(one["label"], one["to"].get(reference)) for one in comparison["variants"]]
        ratios = [(label, each["tokens_per_second"]) for label, each in pairs if each]
        note = f"tokens/s as a share of {reference}; the line is {reference} itself, brackets are 95% intervals"
        found += estimates(f"{load}, against {reference}", note, ratios)
    return found


def ratio_facts(comparison: dict[str, Any], load: str, references: Sequence[str]) -> list[tuple[str, str]]:
    """The last variant over the base, or else over the first reference: all adapters, or the gateway."""
    reference = "base" if "base" in references else references[0]
    last = comparison["variants"][-1]
    if reference not in last["to"]:
        return []
    ratio = last["to"][reference]["tokens_per_second"]["ratio"]
    return [(f"{last['label']}, {load}", f"{ratio:.3f} × {reference}")]


def startup_section(document: dict[str, Any]) -> Section:
    """A waterfall for each kind of start, and the table of all starts."""
    section = Section("", [" ".join(document["command"])])
    good = [run for run in document["runs"] if not run["error"]]
    for kind in ("cold", "warm"):
        last = next((run for run in reversed(good) if run["kind"] == kind), None)
        if last:
            section.bars.append(waterfall(kind, last))
            longest = max(last["milestones"], key=last["milestones"].get)
            median = document["summary"][kind]["median_s"].get(longest)
            section.facts.append((f"{kind} start to {longest}", f"{number(median, '{:.1f}', NOTHING)} s"))
        if last and (last["phases"] or last["told"]):
            section.bars.append(phases(kind, last))
    head = ["start", *MILESTONES, "stopped in", "memory, GiB"]
    section.tables = [Table("Starts", head, [start_row(run) for run in document["runs"]], "Seconds from the spawn.")]
    section.remarks = [f"{run['kind']} start: {run['error']}" for run in document["runs"] if run["error"]]
    section.remarks += [
        f"{run['kind']} start: {run['left_behind']} processes outlived it"
        for run in document["runs"]
        if run["left_behind"]
    ]
    dropped = document["cold"].get("bytes")
    if dropped is not None:
        what = f"cold: {dropped / GIB:.1f} GiB of files dropped from memory, compile caches empty"
        section.about.append(f"{what}; {document['cold']['not_dropped']}")
    return section


def waterfall(kind: str, run: dict[str, Any]) -> Bars:
    """A bar for each milestone, from the one before."""
    longest, at, bars = max(run["milestones"].values()), 0.0, []
    for name, until in run["milestones"].items():
        words = f"{until - at:.2f} s"
        bars.append(Bar(name, percent(at, longest), percent(until, longest), words, note=f"at {until:.2f} s"))
        at = until
    return Bars(f"{kind.capitalize()} start", "from the spawn; each bar begins where the one before ended", bars)


def phases(kind: str, run: dict[str, Any]) -> Bars:
    """How long each phase took that the engine tells of; when it began is not told."""
    told = run["phases"] or run["told"]
    longest = max(told.values()) or 1.0
    bars = [Bar(name, 0.0, percent(spent, longest), f"{spent:.1f} s") for name, spent in told.items()]
    return Bars(f"{kind.capitalize()} start, phases", "as the engine tells them; some lie within others", bars)


def start_row(run: dict[str, Any]) -> list[str]:
    """A start in the table."""
    times = [number(run["milestones"].get(name), "{:.2f}", NOTHING) for name in MILESTONES]
    held = (run.get("memory") or {}).get("processes")
    return [
        run["kind"],
        *times,
        number(run["stop_s"], "{:.1f}", NOTHING),
        number(held and held / GIB, "{:.1f}", NOTHING),
    ]


def plan_section(document: dict[str, Any]) -> Section:
    """Predicted and reported KV cache."""
    rows = []
    for row in document["cases"]:
        tokens = row.get("plan", {}).get("kv_cache_tokens"), row.get("reported", {}).get("kv_cache_tokens")
        cells = [number(each, "{:,}", NOTHING) for each in tokens]
        rows.append([row["case"], *cells, number(row.get("ratio"), "{:.4f}", NOTHING)])
    section = Section("", tables=[Table("KV cache in tokens", ["case", "predicted", "reported", "ratio"], rows)])
    section.remarks = [f"{row['case']}: {row['error']}" for row in document["cases"] if row["error"]]
    return section


def train_section(document: dict[str, Any]) -> Section:
    """Contenders in each case: bars of speed and a table."""
    section = Section("", [f"{document['shape']['name']}, {document['shape']['parameters'] / 1e9:.2f}B parameters"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in document["summary"]:
        groups.setdefault(f"{row['case']}, {row['rows']} rows", []).append(row)
    for name, rows in groups.items():
        speeds = [(row["contender"], row["tokens_per_second"]) for row in rows if row["tokens_per_second"]]
        longest = max((speed for _, speed in speeds), default=1.0)
        bars = [Bar(who, 0.0, percent(one, longest), f"{one:,.0f}") for who, one in speeds]
        section.bars.append(Bars(name, "tokens/s, median of the repeats", bars))
        head = ["contender", "tokens/s", "× stock", "of limit", "reserved, GiB"]
        section.tables.append(Table(name, head, [train_row(row) for row in rows]))
        section.remarks += [f"{row['contender']}: {row['reason']}" for row in rows if row["reason"]]
    return section


def train_row(row: dict[str, Any]) -> list[str]:
    """A contender in the table."""
    forms = (("tokens_per_second", "{:,.0f}", 1), ("times_stock", "{:.2f}", 1), ("share_of_limit", "{:.0%}", 1))
    found = [number(row[name], form, NOTHING) for name, form, _ in forms]
    held = row["peak_reserved"]
    return [row["contender"], *found, number(held and held / GIB, "{:.1f}", NOTHING)]


def any_section(document: dict[str, Any]) -> Section:
    """Every number of a document, as the comparison reads it."""
    found = figures_of(document)
    rows = [[f"{each.where} · {each.name}".strip(" ·").replace("_", " "), figure(each.value)] for each in found]
    more = f"The first {MOST_ROWS} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    return Section("", tables=[Table("Figures", ["", ""], rows[:MOST_ROWS], more)])


TITLES = {
    "throughput": "Throughput and latency",
    "lora-tax": "What adapters cost",
    "gateway": "What the gateway adds",
    "startup": "Start-up",
    "plan": "Predicted and reported memory",
    "train": "Training",
    "kv": "KV cache",
    "adapters": "Adapters under load",
}
SECTIONS: dict[str, Callable[[dict[str, Any]], Section]] = {
    "throughput": throughput_section,
    "lora-tax": comparison_section,
    "gateway": comparison_section,
    "startup": startup_section,
    "plan": plan_section,
    "train": train_section,
    "kv": kv_section,
    "adapters": adapters_section,
}
