"""The sections of `bench kv` and `bench adapters` in a report: what an engine holds, and what many adapters cost it."""

from collections.abc import Sequence
from typing import Any

from loraport.bench.load.stage import Load
from loraport.bench.serving import adapters_report, kv_report
from loraport.bench.serving.adapters_tiers import TIERS
from loraport.bench.serving.compare import spread
from loraport.bench.serving.kv_fill import ENDINGS
from loraport.bench.serving.section import (
    Bar,
    Bars,
    Section,
    Table,
    count_believed,
    curve,
    estimates,
    full_names,
    percent,
    sheet,
)
from loraport.bench.tables import NOTHING, number
from loraport.clients.charts import Point, Series


def kv_section(document: dict[str, Any]) -> Section:
    """The cache as reported and as observed, requests by context, the first token by length."""
    section = Section("", [*kv_report.heading(document), kv_report.ending(document)])
    told = [*kv_report.context_facts(document), *kv_report.capacity_facts(document), *kv_report.prefix_facts(document)]
    section.tables.append(
        Table("Context and cache", [], [[name.strip(), words] for name, words in told], is_words=True)
    )
    section.remarks = [*kv_report.remarks(document)]
    found, observed = document["context"], document["capacity"]["observed"]
    if found and found["longest"]:
        section.facts.append(("longest accepted context", kv_report.tokens(found["longest"])))
    if observed:
        least = "at least " if observed["at_least"] else ""
        section.facts.append(("KV cache observed", f"{least}{kv_report.tokens(observed['tokens'])}"))
    fillings, lengths = document["requests"] or [], document["lengths"] or []
    if fillings:
        section.bars.append(requests_bars(fillings))
        section.tables.append(requests_table(fillings))
    points = [(float(each["prompt"]), each["ttft_ms"]["p50"]) for each in lengths if each["ttft_ms"]]
    section.charts += curve("Time to first token", "ms", "tokens of the prompt", [Series("median", points)])
    if lengths:
        section.tables.append(lengths_table(lengths))
    return section


def requests_bars(fillings: Sequence[dict[str, Any]]) -> Bars:
    """Requests at once for each context."""
    most = max(each["at_once"] for each in fillings) or 1
    bars = []
    for each in fillings:
        name, count = f"{each['context']:,} tokens", each["at_once"]
        bars.append(Bar(name, 0.0, percent(count, most), f"{count:,}", note=ended(each)))
    return Bars("Requests at once", "by tokens of each, until one waits, is preempted or is refused", bars)


def ended(filling: dict[str, Any]) -> str:
    """What ended the filling."""
    return ENDINGS.get(filling["ended_by"], "interrupted")


def requests_table(fillings: Sequence[dict[str, Any]]) -> Table:
    """A row for each context."""
    rows = [
        [
            f"{each['context']:,}",
            f"{each['at_once']:,}",
            f"{each['tokens_in_flight']:,}",
            number(each["cache_used"], "{:.1%}", NOTHING),
            number(each["preemptions"], "{:.0f}", NOTHING),
            ended(each) + (" (estimated)" if each["estimated"] else ""),
        ]
        for each in fillings
    ]
    head = ["tokens of a request", "at once", "tokens in flight", "cache used", "preempted", "ended by"]
    return Table("Requests by context", head, rows)


def lengths_table(lengths: Sequence[dict[str, Any]]) -> Table:
    """A row for each length of the prompt."""
    rows = []
    for each in lengths:
        times = [number((each["ttft_ms"] or {}).get(name), "{:,.1f}", NOTHING) for name in ("p50", "min", "max")]
        speed = number(each["tokens_per_second"], "{:,.0f}", NOTHING)
        rows.append([f"{each['prompt']:,}", *times, speed, str(len(each["errors"]) or "")])
    head = ["tokens of the prompt", "TTFT p50", "min", "max", "prompt tokens/s", "failed"]
    return Table("First token by length", head, rows, "Times in ms, one request at a time.")


def adapters_section(document: dict[str, Any]) -> Section:
    """Base and adapters together, latency by rank, the knee, where adapters are when they are asked for."""
    load, knee, tiers = document["load"], document["knee"], document["tiers"]
    parts = [part for part in (load, knee, tiers) if part]
    section = Section("", [adapters_report.slots_line(document["slots"])], believed=count_believed(parts, "part"))
    judged = [*parts, *(knee["levels"] if knee else ())]
    section.reasons = list(dict.fromkeys(reason for part in judged for reason in part.get("reasons", ())))
    shown = [each.strip() for each in adapters_report.remarks(document)]
    section.remarks = [each for each in shown if each not in section.reasons]
    words = f"{load['popularity']['adapters']} adapters, {load['popularity']['kind']}, {Load(**load['load']).words}"
    ratio = (load["to_base"] or {}).get("tokens_per_second")  # in an open loop there is none
    if load["believed"] and ratio:
        note = f"{words}; tokens/s as a share of the base"
        section.bars += estimates("All adapters, against base", note, [("adapters", ratio)])
        section.facts.append((f"{load['popularity']['adapters']} adapters", f"{ratio['ratio']:.3f} × base"))
    section.charts += by_rank(load) if load["believed"] else []
    section.tables.append(rank_table(load, words))
    if knee:
        add_knee(section, knee)
    if tiers:
        add_tiers(section, tiers)
    return section


def by_rank(load: dict[str, Any]) -> list[Any]:
    """TTFT over the rank of popularity."""
    series = []
    for name, part in (("median", "p50"), ("p99", "p99")):
        points: list[Point] = [
            (float(each["first"]), float(each["ttft_ms"][part])) for each in load["rank_groups"] if each["ttft_ms"]
        ]
        series.append(Series(name, points))
    return curve("Time to first token, by popularity", "ms", "rank", series)


def rank_table(load: dict[str, Any], words: str) -> Table:
    """Base, all adapters, and ranks."""
    each = [("base", load["base"], ""), ("all adapters", load["adapters"], "")]
    each += [(rank_name(group), group, f"{group['share']:.1%}") for group in load["rank_groups"]]
    columns = [
        (name, [share, *adapters_report.counts(figures), *adapters_report.latency_cells(figures, load["believed"])])
        for name, figures, share in each
    ]
    names = full_names(["share", "requests", "failed", *adapters_report.LATENCIES])
    return sheet("By rank of popularity", names, columns, f"{words}. Times in ms.")


def rank_name(group: dict[str, Any]) -> str:
    """`1 a0`, or `3 to 4`."""
    if group["models"]:
        return f"{group['first']} {group['models'][0]}"
    return f"{group['first']} to {group['last']}"


def add_knee(section: Section, knee: dict[str, Any]) -> None:
    """Tokens/s and TTFT over the number of distinct adapters."""
    levels = [each for each in knee["levels"] if each["believed"] and knee["believed"]]
    speeds = [(float(each["adapters"]), each["output_tokens_per_second"]) for each in levels if each["to_first"]]
    firsts = [(float(each["adapters"]), each["figures"]["ttft_ms"]["p50"]) for each in levels if each["to_first"]]
    over = "distinct adapters at once"
    section.charts += curve("Output tokens per second", "tokens/s", over, [Series("tokens/s", speeds)])
    section.charts += curve("Time to first token", "ms", over, [Series("median", firsts)])
    section.about.append(adapters_report.knee_words(knee))
    section.facts += [("knee", f"above {knee['knee']['above']} adapters")] if knee["knee"] and knee["believed"] else []


def add_tiers(section: Section, tiers: dict[str, Any]) -> None:
    """What the first token costs more, by where the adapter is."""
    there = {name: one for name, one in tiers["tiers"].items() if one["available"] and tiers["believed"]}
    times = [max(one["added_ms"]["difference"], 0.0) for one in there.values()]
    times += [one["added_ms"]["high"] or 0.0 for one in there.values()]
    longest = max([*times, *(one["base_ttft_ms"]["p50"] for one in there.values())], default=0.0) or 1.0
    bars = []
    for name, one in there.items():
        added = one["added_ms"]
        low, high = (None if added[end] is None else percent(max(added[end], 0.0), longest) for end in ("low", "high"))
        end = percent(max(added["difference"], 0.0), longest)
        note = spread(added, "{:+,.1f}") or "no interval"
        bars.append(Bar(TIERS[name], 0.0, end, f"{added['difference']:+,.1f} ms", low, high, note))
    if bars:
        section.bars.append(Bars("First token, by where the adapter is", "ms more than the base beside it", bars))
