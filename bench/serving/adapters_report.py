"""What `loraport bench adapters` found, as one document and as tables.

>>> print_report(to_json(measurement, study, parts))
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from loraport.bench.environment import describe_environment
from loraport.bench.load.figures import LEAST_ROUNDS
from loraport.bench.load.record import ERRORS
from loraport.bench.load.stage import Load
from loraport.bench.serving.adapters import ALONE, Study, describe_knee, describe_load
from loraport.bench.serving.adapters_server import Slots
from loraport.bench.serving.adapters_tiers import TIERS, Loads, Tiers
from loraport.bench.serving.compare import spread
from loraport.bench.serving.measurement import Measurement
from loraport.bench.serving.throughput import DEFINITIONS, heading
from loraport.bench.tables import NOTHING, number, plain_table, result_console, side_by_side

OWN_DEFINITIONS = {
    "ratio": "geometric mean over rounds; bootstrap over rounds, 95%",
    "jain": "(Σx)² / (n Σx²): 1 is equal, 1/n is one adapter for all",
    "jain_request_speed": "x: mean over an adapter's requests of tokens / E2E",
    "jain_tokens_per_share": "x: tokens of an adapter / its share; as drawn: its requests / its share",
    "tiers": "others are asked until the adapter must have left, by vLLM's rule: that asked least recently goes",
    "added": "TTFT of the adapter less that of the base beside it, one request at a time, mean over probes",
    "load": "TTFT of the adapter less its own when it is in a slot, in the same probe",
    "route": "seconds of POST /v1/load_lora_adapter; an endpoint of Loraport proves the adapter in it",
    "knee": "the first number of distinct adapters with less than 1 − fall of the tokens/s of the first",
}
SECTION = "bold"
MOST_REASONS = 3
MOST_MODELS = 5
LATENCIES = ("TTFT p50", "     p99", "TPOT p50", "     p99", "E2E  p50")
RATIOS = (("tokens/s × base", "tokens_per_second"), ("TTFT × base", "ttft"), ("TPOT × base", "tpot"))


@dataclass
class Parts:
    """What was found beside the slices; grows while the command runs."""

    slots: Slots = field(default_factory=Slots)
    tiers: Tiers | None = None
    loads: Loads | None = None
    notes: list[str] = field(default_factory=list)
    is_whole: bool = False


def to_json(measurement: Measurement, study: Study, parts: Parts) -> dict[str, Any]:
    """The whole run as a document, as far as it came."""
    slices = {result["label"]: result for result in measurement.results()}
    kept = ("label", "stage", "complete", "believed", "reasons", "headline", "figures", "client", "server")
    whole = len(slices) == study.slices and all(each["complete"] for each in slices.values())
    document = {
        "bench": "adapters",
        "complete": whole and parts.is_whole,
        "definitions": DEFINITIONS | OWN_DEFINITIONS,
        "environment": describe_environment(),
        **measurement.describe(),
        "base": study.base.model,
        "adapters": study.popularity.models,
        "slots": {"max_loras": parts.slots.max_loras, "max_cpu_loras": parts.slots.max_cpu_loras}
        | {"sources": parts.slots.sources},
        "load": describe_load(measurement, study, slices),
        "knee": describe_knee(measurement, study, slices, parts.slots),
        "tiers": parts.tiers.describe() if parts.tiers else None,
        "loads": parts.loads.describe() if parts.loads else None,
        "slices": [{name: each[name] for name in kept} for each in slices.values()],
    }
    document["workload"]["notes"] = [*document["workload"]["notes"], *parts.notes]
    return document


def print_report(document: dict[str, Any]) -> None:
    """Tables, on standard output."""
    console = result_console()
    for line in [*heading(document), slots_line(document["slots"])]:
        console.print(Text(line, style="dim"))
    print_load(console, document["load"])
    print_fairness(console, document["load"])
    if document["knee"]:
        print_knee(console, document["knee"])
    if document["tiers"]:
        print_tiers(console, document["tiers"])
    if document["loads"]:
        print_loads(console, document["loads"])
    for line in remarks(document):
        console.print(Text(line, style="yellow"))


def slots_line(slots: dict[str, Any]) -> str:
    """`slots: max_loras 4 (metrics), max_cpu_loras 8 (command line)`."""
    told = [
        f"{name} {slots[name]} ({slots['sources'][name]})" if slots[name] is not None else f"{name} not available"
        for name in ("max_loras", "max_cpu_loras")
    ]
    return f"slots: {', '.join(told)}"


def print_load(console: Console, load: dict[str, Any]) -> None:
    """Base and adapters beside each other, then the adapters by rank."""
    count, kind = load["popularity"]["adapters"], load["popularity"]["kind"]
    size = f"{plural(load['rounds'], 'round')} of slices of {load['slice_requests']} requests"
    words = f"\n{plural(count, 'adapter')}, {kind}, {Load(**load['load']).words}, {size}"
    console.print(Text(words, style=SECTION))
    believed, means = load["believed"], load["slices_output_tokens_per_second"]
    names = [
        "requests",
        "failed",
        "output tokens/s",
        *LATENCIES,
        *(line for row in RATIOS for line in (row[0], "  95%")),
    ]
    columns = []
    for label, name in (("base", "base"), ("all adapters", "adapters")):
        figures, slices = load[name], means[name]
        mean = sum(slices) / len(slices) if slices and believed else None
        cells = [*counts(figures), number(mean, "{:,.1f}", NOTHING), *latency_cells(figures, believed)]
        for _, key in RATIOS:
            ratio = load["to_base"][key] if name == "adapters" and load["to_base"] and believed else None
            cells += [number(ratio and ratio["ratio"], "{:.3f}"), spread(ratio, "{:.3f}")]
        columns.append((label, cells))
    show(console, names, columns)
    names = ["share", "requests", "failed", *LATENCIES]
    columns = [
        (title(group), [f"{group['share']:.1%}", *counts(group), *latency_cells(group, believed)])
        for group in load["rank_groups"]
    ]
    by = "by rank" if count <= ALONE else "by rank, neighbours together (each one in --json)"
    console.print(Text(f"\nlatency {by}", style=SECTION))
    show(console, names, columns)


def latency_cells(figures: dict[str, Any], believed: bool) -> list[str]:
    """Of LATENCIES, in milliseconds."""
    wanted = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("tpot_ms", "p99"), ("e2e_ms", "p50"))
    return [
        number((figures[name] or {}).get(quantile) if believed else None, "{:,.1f}", NOTHING)
        for name, quantile in wanted
    ]


def counts(figures: dict[str, Any]) -> list[str]:
    """Requests, and those that failed."""
    failed = sum(figures["errors"].values())
    return [f"{figures['requests']:,}", f"{failed:,}" if failed else ""]


def title(group: dict[str, Any]) -> str:
    """`3 – 4`, or `1` with the adapter's name."""
    if group["models"]:
        return f"{group['first']}\n{group['models'][0]}"
    return f"{group['first']} – {group['last']}"


def print_fairness(console: Console, load: dict[str, Any]) -> None:
    """Indices, where figures are believed."""
    fair = load["fairness"]
    if not load["believed"] or len(load["ranks"]) < 2:
        return
    worst = fair["ttft_p50_worst_to_best"]
    extremes = f"{worst['ratio']:.2f} ({worst['worst']} to {worst['best']})" if worst else NOTHING
    rows = (
        ("Jain's index of a request's tokens/s", number(fair["jain_request_speed"], "{:.3f}", NOTHING)),
        ("  of tokens per share", number(fair["jain_tokens_per_share"], "{:.3f}", NOTHING)),
        ("  as requests were drawn", number(fair["jain_tokens_per_share_as_drawn"], "{:.3f}", NOTHING)),
        ("TTFT p50, worst to best", extremes),
    )
    answered = f"adapters with {fair['least_answers']} replies or more: {fair['adapters_counted']}"
    console.print(Text(f"\nfairness ({answered})", style=SECTION))
    for name, value in rows:
        console.print(Text(f"{name:38}{value}"))


def print_knee(console: Console, knee: dict[str, Any]) -> None:
    """Levels beside each other, and what it comes to."""
    size = f"slices of {knee['slice_requests']} requests"
    console.print(Text(f"\ndistinct adapters, always {Load(**knee['load']).words}, {size}", style=SECTION))
    names = ["rounds", "output tokens/s", "  × first", "  95%", *LATENCIES]
    columns = []
    for level in knee["levels"]:
        known = level["believed"]
        speed, ratio = (level[name] if known else None for name in ("output_tokens_per_second", "to_first"))
        cells = [
            str(level["rounds"]),
            number(speed, "{:,.1f}", NOTHING),
            number(ratio and ratio["ratio"], "{:.3f}"),
            spread(ratio if level["adapters"] > knee["levels"][0]["adapters"] else None, "{:.3f}"),
        ]
        columns.append((str(level["adapters"]), [*cells, *latency_cells(level["figures"], known)]))
    show(console, names, columns)
    console.print(Text(knee_words(knee)))


def knee_words(knee: dict[str, Any]) -> str:
    """One line."""
    slots = knee["slots"]
    said = [f"{name} {slots[name]}" for name in ("max_loras", "max_cpu_loras") if slots[name] is not None]
    beside = f"; the server has {', '.join(said)}" if said else "; the server does not say how many slots it has"
    if not knee["knee"] and not knee["believed"]:
        return f"knee: withheld{beside}"
    if not knee["knee"] and knee.get("unsure"):
        fell = ", ".join(map(str, knee["unsure"]))
        return f"no knee for sure: with {fell} tokens/s fell, but intervals reach further: more --knee-rounds{beside}"
    if not knee["knee"]:
        return f"no knee up to {knee['levels'][-1]['adapters']}: tokens/s never fall by {knee['fall']:.0%}{beside}"
    at = knee["knee"]
    lost = f"tokens/s fall by {1 - at['ratio']:.0%}"
    return f"knee: above {plural(at['above'], 'adapter')} at once; with {at['at']}, {lost}{beside}"


def print_tiers(console: Console, tiers: dict[str, Any]) -> None:
    """A row for each tier."""
    words = f"{plural(tiers['probes'], 'probe')}, one request at a time, one token"
    console.print(Text(f"\nfirst token by where the adapter is (ms; {words})", style=SECTION))
    table = plain_table("", ["probes", "TTFT p50", "base", "added", "95%", "load", "95%"])
    for tier, name in TIERS.items():
        one = tiers["tiers"][tier]
        if not one["available"] or not tiers["believed"]:
            table.add_row(Text(name), "", *[NOTHING] * 3)
            continue
        load = one["load_ms"]
        table.add_row(
            Text(name),
            str(one["added_ms"]["rounds"]),
            f"{one['ttft_ms']['p50']:,.1f}",
            f"{one['base_ttft_ms']['p50']:,.1f}",
            f"{one['added_ms']['difference']:+,.1f}",
            spread(one["added_ms"], "{:+,.1f}"),
            number(load and load["difference"], "{:,.1f}"),
            spread(load, "{:,.1f}"),
        )
    console.print(table)


def print_loads(console: Console, loads: dict[str, Any]) -> None:
    """The server's route, in a line or two."""
    console.print(Text("\nloads by POST /v1/load_lora_adapter", style=SECTION))
    if not loads["available"]:
        console.print(Text(f"not available: {(loads['reason'] or 'none was tried').rstrip('.')}"))
        return
    took, added = loads["load_ms"], loads["first_token_added_ms"]
    dropped = f"files dropped from the page cache before {loads['files_dropped']}"
    dropped += ", the adapter's proof included" if loads["with_proof"] else ""
    console.print(
        Text(f"{plural(loads['loads'], 'load')}, {dropped}: p50 {took['p50']:,.1f} ms, max {took['max']:,.1f} ms")
    )
    if added:
        console.print(Text(f"first token after it: {added['difference']:+,.1f} ms against the base"))


def show(console: Console, names: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Tables of the console's width."""
    for table in side_by_side(names, columns, console.width):
        console.print(table)


def plural(count: int, word: str) -> str:
    """`1 round`, `8 rounds`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def remarks(document: dict[str, Any]) -> list[str]:
    """What must be known to read the tables."""
    found = [f"note: {note}" for note in document["workload"]["notes"]]
    load = document["load"]
    found += part_remarks("popularity", load)
    for level in document["knee"]["levels"] if document["knee"] else ():
        found += part_remarks(f"knee, {plural(level['adapters'], 'adapter')}", level)
    found += error_remarks(load["errors"])
    never = load["fairness"]["never_asked"]
    if never and load["rounds"]:
        found.append(f"{plural(never, 'adapter')} never asked: more --requests or --rounds")
    tiers = document["tiers"]
    if tiers:
        found += [f"{TIERS[tier]}: not available: {one['reason']}" for tier, one in missing(tiers)]
        found += [f"first token: {line}" for line in left_out(tiers, "probe")]
    if document["loads"] and document["loads"]["available"] and document["loads"]["reason"]:
        found.append(f"loads ended early: {document['loads']['reason']}")
    if not document["complete"]:
        found.append("not complete: it was interrupted or the server stopped answering")
    return found


def error_remarks(errors: dict[str, Any]) -> list[str]:
    """Kinds of errors by model, in all rounds."""
    found = []
    for model, kinds in list(errors["by_model"].items())[:MOST_MODELS]:
        words = ", ".join(f"{count} × {ERRORS.get(kind, kind)}" for kind, count in kinds.items())
        found.append(f"{model}: {words}" + ("; never answered" if model in errors["never_answered"] else ""))
    more = len(errors["by_model"]) - len(found)
    found += [f"and errors of {more} more (--json)"] if more > 0 else []
    return found + [f"  {ERRORS.get(kind, kind)}: {said}" for kind, said in errors["said"].items()]


def missing(tiers: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Tiers that are not there."""
    return [(tier, one) for tier, one in tiers["tiers"].items() if not one["available"]]


def part_remarks(name: str, part: dict[str, Any]) -> list[str]:
    """Rounds that do not count, and intervals that are not there."""
    found = [f"{name}: {line}" for line in left_out(part, "round")]
    if part["believed"] and part["rounds"] < LEAST_ROUNDS:
        found.append(f"{name}: too few rounds for an interval: at least {LEAST_ROUNDS}")
    return found


def left_out(part: dict[str, Any], word: str) -> list[str]:
    """Rounds or probes that are not believed, with the reasons."""
    if not part["left_out"]:
        return []
    what = "left out" if part["believed"] else "too many, so all is withheld"
    verb = "is" if part["left_out"] == 1 else "are"
    reasons = [f"  {why}" for why in part["reasons"][:MOST_REASONS]]
    more = len(part["reasons"]) - len(reasons)
    reasons += [f"  and {more} more (--json)"] if more > 0 else []
    return [f"{plural(part['left_out'], word)} {verb} not believed and {what}:", *reasons]
