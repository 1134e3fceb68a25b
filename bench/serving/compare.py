"""Variants of one load against each other, interleaved in short slices: the LoRA tax, and what a gateway adds.

A machine that slows down slows all variants of a round alike, so ratios are taken within a round and averaged over
rounds (geometric mean), with the 95% interval of a bootstrap over rounds.

    >>> variants = tax_variants(url, None, [], None, None, None)
    >>> plan = make_plan("lora-tax", variants, [8], rounds=8, requests=None, seed=1)
    >>> measure_plan(measurement, plan)
    >>> to_json(measurement, plan)["comparisons"][0]["variants"][1]["to"]["base"]["tokens_per_second"]["ratio"]
    0.76
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from loraport.bench.environment import describe_environment
from loraport.bench.load.figures import LEAST_ROUNDS, Records, paired_difference, paired_ratio, read_records, summarize
from loraport.bench.load.server import Server
from loraport.bench.load.stage import Load, Target
from loraport.bench.serving.measurement import Measurement
from loraport.bench.serving.throughput import DEFINITIONS, heading
from loraport.bench.tables import NOTHING, number, result_console, side_by_side
from loraport.clients.errors import EndpointError, UsageError
from loraport.clients.models import ModelCard, check_model

WAVES = 4  # requests of a slice, in times of those at once
PLAIN, MIXED = "without LoRA", "all mixed"
DIRECT, THROUGH = "direct", "through the gateway"


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: requests go to its targets in turn."""

    label: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Plan:
    """What is compared. The first of `references` is the one that matters; each is the label of a variant."""

    bench: str
    variants: list[Variant]
    references: list[str]
    levels: list[int]
    rounds: int
    requests: int | None
    seed: int

    @property
    def targets(self) -> list[Target]:
        """Of all variants."""
        return [target for variant in self.variants for target in variant.targets]

    def slice_requests(self, concurrency: int) -> int:
        """Requests of a slice; of at least two of each target."""
        widest = max(len(variant.targets) for variant in self.variants)
        return self.requests or max(WAVES * concurrency, 2 * widest)


def make_plan(
    bench: str, variants: list[Variant], levels: list[int], rounds: int, requests: int | None, seed: int
) -> Plan:
    """A plan; UsageError where there is nothing to compare."""
    if len(variants) < 2:
        raise UsageError(
            "there is only the base to measure.", "load an adapter: loraport bench make-adapters makes some"
        )
    known = [PLAIN, "base", DIRECT]
    references = [variant.label for variant in variants if variant.label in known]
    return Plan(bench, variants, references, levels, rounds, requests, seed)


def tax_variants(
    url: str,
    base: str | None,
    adapters: Sequence[str],
    each: int | None,
    plain_url: str | None,
    plain_model: str | None,
) -> list[Variant]:
    """The base without LoRA where there is such a server, the base, each adapter, all mixed."""
    with Server(url) as server:
        cards = server.cards()
    base = check_model(cards, base) if base else next((card.id for card in cards if not card.parent), cards[0].id)
    named = [check_model(cards, name) for name in adapters] or [
        card.id for card in cards if is_adapter(card, base, cards)
    ]
    found = []
    if plain_url:
        with Server(plain_url) as plain:
            there = plain.cards()
        name = check_model(there, plain_model) if plain_model else there[0].id
        found.append(Variant(PLAIN, (Target(plain_url, name),)))
    found.append(Variant("base", (Target(url, base),)))
    found += [Variant(name, (Target(url, name),)) for name in named[: len(named) if each is None else each]]
    if len(named) > 1:
        found.append(Variant(f"{MIXED} ({len(named)})", tuple(Target(url, name) for name in named)))
    return found


def is_adapter(card: ModelCard, base: str, cards: Sequence[ModelCard]) -> bool:
    """Whether a model is an adapter: it has a parent, and is no second name of the base."""
    root = next((other.root for other in cards if other.id == base), None)
    return card.id != base and bool(card.parent) and (root is None or card.root != root)


def gateway_variants(url: str, model: str | None, direct_url: str, direct_model: str | None) -> list[Variant]:
    """The same model past the gateway and through it."""
    with Server(url) as server:
        cards = server.cards()
        name = check_model(cards, model) if model else cards[0].id
    with Server(direct_url) as engine:
        there = engine.cards()
        known = [card.id for card in there]
        direct = check_model(there, direct_model) if direct_model else name if name in known else None
    if direct is None:
        raise UsageError(f"{direct_url} has no model {name!r}.", f"--direct-model names it: {', '.join(known[:20])}")
    return [Variant(DIRECT, (Target(direct_url, direct),)), Variant(THROUGH, (Target(url, name),))]


def measure_plan(measurement: Measurement, plan: Plan) -> None:
    """All slices, round by round, variants in another order each time."""
    shuffle = random.Random(plan.seed).shuffle
    for concurrency in plan.levels:
        load = Load("closed", concurrency)
        for turn in range(plan.rounds):
            order = list(plan.variants)
            shuffle(order)
            for variant in order:
                measurement.on_step(f"{load.words}, round {turn + 1} of {plan.rounds}: {variant.label}")
                label = slice_label(concurrency, turn, variant)
                ran = measurement.run(label, variant.targets, load, plan.slice_requests(concurrency))
                if any(effort.gave_up for effort in ran.efforts):
                    raise EndpointError(f"{variant.label} stopped answering under {load.words}.", "its log says more")


def slice_label(concurrency: int, turn: int, variant: Variant) -> str:
    """Of the stage that is this slice."""
    return f"{concurrency}/{turn}/{variant.label}"


def to_json(measurement: Measurement, plan: Plan) -> dict[str, Any]:
    """The whole run as a document."""
    slices = {result["label"]: result for result in measurement.results()}
    planned = len(plan.levels) * plan.rounds * len(plan.variants)
    return {
        "bench": plan.bench,
        "complete": len(slices) == planned and all(each["complete"] for each in slices.values()),
        "definitions": DEFINITIONS | {"ratio": "geometric mean over rounds; bootstrap over rounds, 95%"},
        "environment": describe_environment(),
        **measurement.describe(),
        "rounds": plan.rounds,
        "comparisons": [compare(measurement, plan, concurrency, slices) for concurrency in plan.levels],
        "slices": list(slices.values()),
    }


def compare(measurement: Measurement, plan: Plan, concurrency: int, slices: dict[str, Any]) -> dict[str, Any]:
    """All variants at one concurrency: figures of all their slices together, ratios of slices to those of references.

    A round counts when each of its slices is whole and believed; if more than half do not, nothing is believed.
    """
    rounds = [
        [slices.get(slice_label(concurrency, turn, variant)) for variant in plan.variants]
        for turn in range(plan.rounds)
    ]
    whole = {turn: [one for one in round_ if one] for turn, round_ in enumerate(rounds) if all(map(is_whole, round_))}
    good = [turn for turn, round_ in whole.items() if all(one["believed"] for one in round_)]
    reasons = dict.fromkeys(reason for round_ in whole.values() for one in round_ for reason in one["reasons"])
    window = "steady" if all(one["figures"]["steady"] for turn in good for one in whole[turn]) else "whole"
    groups = {variant.label: [whole[turn][at] for turn in good] for at, variant in enumerate(plan.variants)}
    pooled = pool_records(measurement, plan, concurrency, good)
    return {
        "load": asdict(Load("closed", concurrency)),
        "rounds": len(good),
        "left_out": len(whole) - len(good),
        "believed": 2 * len(good) >= len(whole) > 0,
        "reasons": list(reasons),
        "slice_requests": plan.slice_requests(concurrency),
        "window": window,
        "variants": [describe(variant, plan, groups, pooled, concurrency, window) for variant in plan.variants],
    }


def describe(
    variant: Variant,
    plan: Plan,
    groups: dict[str, list[dict[str, Any]]],
    pooled: dict[str, Records],
    concurrency: int,
    window: str,
) -> dict[str, Any]:
    """A variant's figures, and its ratios to the references. `groups`: slices of the rounds that count, by label."""
    group = groups[variant.label]
    others = [name for name in plan.references if name != variant.label]
    return {
        "label": variant.label,
        "models": [target.model for target in variant.targets],
        "slices_output_tokens_per_second": [speed(one, window) for one in group],
        "figures": summarize(pooled.get(variant.label, Records()), Load("closed", concurrency), {}),
        "to": {name: relate(group, groups[name], window) for name in others} if group else {},
    }


def is_whole(result: dict[str, Any] | None) -> bool:
    """Whether a slice ran to its end and was answered."""
    return bool(result and result["complete"] and result["figures"]["output_tokens_per_second"])


def pool_records(measurement: Measurement, plan: Plan, concurrency: int, turns: Sequence[int]) -> dict[str, Records]:
    """Records of each variant at one concurrency in these rounds, by its label."""
    names = {ran.stage.id: ran.stage.label for ran in measurement.stages}
    found = read_records(measurement.folder, lambda record: names.get(record.stage, ""))
    pooled: dict[str, Records] = {}
    for variant in plan.variants:
        for turn in turns:
            records = found.get(slice_label(concurrency, turn, variant))
            if records:
                pooled[variant.label] = records.joined(pooled.get(variant.label))
    return pooled


def speed(result: dict[str, Any], window: str) -> float:
    """Output tokens/s of a slice."""
    figures = result["figures"]
    return float((figures["steady"] if window == "steady" else figures)["output_tokens_per_second"])


def relate(group: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], window: str) -> dict[str, Any]:
    """Ratios of a variant's slices to those of another, round by round."""

    def pairs(read: Callable[[dict[str, Any]], float | None]) -> tuple[list[float], list[float]]:
        both = [(read(one), read(other)) for one, other in zip(group, others, strict=True)]
        kept = [(one, other) for one, other in both if one is not None and other is not None]
        return [one for one, _ in kept], [other for _, other in kept]

    def median_of(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda result: (result["figures"][name] or {}).get("p50")

    found: dict[str, Any] = {"tokens_per_second": paired_ratio(*pairs(lambda result: speed(result, window)))}
    for name in ("ttft", "tpot"):
        values = pairs(median_of(f"{name}_ms"))
        found[name] = paired_ratio(*values) if values[0] and min(*values[0], *values[1]) > 0 else None
        found[f"{name}_added_ms"] = paired_difference(*values) if values[0] else None
    return found


def print_report(document: dict[str, Any]) -> None:
    """A table for each concurrency, on standard output."""
    console = result_console()
    for line in heading(document):
        console.print(Text(line, style="dim"))
    for comparison in document["comparisons"]:
        load = f"{comparison['load']['concurrency']} at once"
        size = f"{comparison['rounds']} rounds of slices of {comparison['slice_requests']} requests"
        console.print(Text(f"\n{load}, {size}, tokens/s of the {comparison['window']} slice", style="bold"))
        references = references_of(comparison)
        names = row_names(references)
        columns = [(one["label"], cells(one, references, comparison["believed"])) for one in comparison["variants"]]
        for table in side_by_side(names, columns, console.width):
            console.print(table)
    for line in remarks(document):
        console.print(Text(line, style="yellow"))


def references_of(comparison: dict[str, Any]) -> list[str]:
    """Labels of the variants that others are held against, in their order."""
    return list(dict.fromkeys(name for variant in comparison["variants"] for name in variant["to"]))


def row_names(references: Sequence[str]) -> list[str]:
    """What `cells` gives, in words."""
    names = ["output tokens/s", "TTFT p50", "     p99", "TPOT p50", "     p99"]
    for name in references:
        names += [f"× {name}", "  95%", "  TTFT added", "  95%", "  TPOT added", "  95%"]
    return names


def cells(variant: dict[str, Any], references: Sequence[str], believed: bool) -> list[str]:
    """A variant's figures and its ratios; nothing where they are not believed. Times in milliseconds."""
    slices = variant["slices_output_tokens_per_second"]
    found = [number(sum(slices) / len(slices) if slices and believed else None, "{:,.1f}", NOTHING)]
    for name, form in (("ttft_ms", "{:,.1f}"), ("tpot_ms", "{:,.2f}")):
        for quantile in ("p50", "p99"):
            value = (variant["figures"][name] or {}).get(quantile)
            found.append(number(value if believed else None, form, NOTHING))
    for name in references:
        related = variant["to"].get(name) if believed else None
        ratio = related["tokens_per_second"] if related else None
        found += [number(ratio and ratio["ratio"], "{:.3f}"), spread(ratio, "{:.3f}")]
        for key in ("ttft_added_ms", "tpot_added_ms"):
            added = related[key] if related else None
            found += [number(added and added["difference"], "{:+.2f}"), spread(added, "{:+.2f}")]
    return found


def spread(estimate: dict[str, Any] | None, form: str) -> str:
    """`0.741 … 0.779`; nothing where there is no interval."""
    if not estimate or estimate["low"] is None:
        return ""
    return f"{form.format(estimate['low'])} … {form.format(estimate['high'])}"


def remarks(document: dict[str, Any]) -> list[str]:
    """What must be known to read the tables."""
    found = [f"note: {note}" for note in document["workload"]["notes"]]
    for comparison in document["comparisons"]:
        load = Load(**comparison["load"]).words
        what = "left out of it" if comparison["believed"] else "too many, so all is withheld"
        if comparison["left_out"]:
            rounds = "round is" if comparison["left_out"] == 1 else "rounds are"
            found.append(f"{load}: {comparison['left_out']} {rounds} not believed and {what}:")
            found += [f"  {reason}" for reason in comparison["reasons"]]
        if comparison["believed"] and comparison["rounds"] < LEAST_ROUNDS:
            found.append(f"{load}: too few rounds for an interval: at least {LEAST_ROUNDS}")
    if not document["complete"]:
        found.append("not complete: it was interrupted or the server stopped answering")
    return found
