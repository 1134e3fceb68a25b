"""The figures of any bench's document under names that two documents share: for comparing, and as CSV.

Each figure says which way is better, whether it may decide about a build, and what it was averaged of: slices of a
LoRA tax, starts, repeats of a training. A figure that is withheld is there, without a value.

    >>> [(each.where, each.name, each.value) for each in figures_of(document)][0]
    ('8 at once', 'output tokens/s', 512.3)
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraport.bench.load.stage import Load
from loraport.bench.serving.documents import Part

HIGHER, LOWER = "higher", "lower"
RARE = 10  # values beyond a percentile that it takes to let it decide
TAIL = {"p50": 0.5, "p90": 0.1, "p95": 0.05, "p99": 0.01}
TIMES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("gap", "gap_ms"), ("E2E", "e2e_ms"))
NOT_FIGURES = {"environment", "definitions", "servers", "workload", "client", "load", "targets", "reasons", "rounds"}


@dataclass(frozen=True)
class Figure:
    """`better`: higher, lower, or nothing where neither is. `samples`: what `value` is the mean of (`centre`), if any.

    `decides`: whether it is steady enough to fail a build.
    """

    where: str
    name: str
    value: float | None
    unit: str
    better: str
    samples: tuple[float, ...] = ()
    centre: str = "geometric mean"
    decides: bool = True
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What it has in common with the same figure of another document."""
        return self.where, self.name


def figures_of(document: dict[str, Any]) -> list[Figure]:
    """All of a document's; of an unknown kind every number that it holds."""
    try:
        return list(READERS.get(document["bench"], any_figures)(document))
    except (LookupError, TypeError, ValueError, AttributeError):  # written by another version
        return list(any_figures(document))


def centre_of(samples: Any, centre: str) -> Any:
    """The geometric mean or the median along the last axis."""
    values = np.asarray(samples, dtype=np.float64)
    return np.median(values, axis=-1) if centre == "median" else np.exp(np.log(values).mean(axis=-1))


def throughput_figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Of each load, and of each model under it."""
    for stage in document["stages"]:
        yield from load_figures(stage["label"], stage["figures"], stage["believed"])
        for model, figures in stage["by_model"].items():
            yield from load_figures(f"{stage['label']}, {model}", figures, stage["believed"])


def load_figures(where: str, figures: dict[str, Any], believed: bool) -> Iterator[Figure]:
    """Rates and latencies of a load; all without a value where they are not believed."""
    steady = figures["steady"] or {}
    rates = (
        ("output tokens/s", figures["output_tokens_per_second"], not steady),
        ("output tokens/s, steady", steady.get("output_tokens_per_second"), True),
        ("requests/s", figures["requests_per_second"], False),
    )
    for name, value, decides in rates:
        if value is not None:
            yield Figure(where, name, value if believed else None, "", HIGHER, decides=decides)
    for name, key in TIMES:
        yield from latency_figures(where, name, figures[key], believed)
    if figures["goodput"]:
        share = figures["goodput"]["share"]
        yield Figure(where, "met all limits", share if believed else None, "", HIGHER)


def latency_figures(where: str, name: str, found: dict[str, Any] | None, believed: bool) -> Iterator[Figure]:
    """Median and p99; the latter decides only when enough lie beyond it. Gaps and E2E follow from the others."""
    for quantile in ("p50", "p99") if found else ():
        enough = quantile == "p50" or found["count"] * TAIL[quantile] >= RARE  # type: ignore[index]
        value = found[quantile] if believed else None  # type: ignore[index]
        yield Figure(where, f"{name} {quantile}", value, "ms", LOWER, decides=enough and name in ("TTFT", "TPOT"))


def comparison_figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Of each variant at each load: tokens/s and medians of its slices, its ratios to the references."""
    medians = slice_medians(document)
    for comparison in document["comparisons"]:
        load, believed = Load(**comparison["load"]), comparison["believed"]
        speeds = {one["label"]: one["slices_output_tokens_per_second"] for one in comparison["variants"]}
        for variant in comparison["variants"]:
            where, label = f"{load.words}, {variant['label']}", variant["label"]
            yield averaged(where, "output tokens/s", speeds[label], HIGHER, believed)
            for name, key in TIMES[:2]:
                samples = medians.get((load.concurrency, label, key), [])
                yield averaged(where, f"{name} p50", samples, LOWER, believed, "ms")
            for reference, related in variant["to"].items():
                ratios = [one / other for one, other in zip(speeds[label], speeds[reference], strict=True)]
                told = related["tokens_per_second"]
                name = f"tokens/s × {reference}"
                yield averaged(where, name, ratios, HIGHER, believed, low=told["low"], high=told["high"])


def slice_medians(document: dict[str, Any]) -> dict[tuple[int, str, str], list[float]]:
    """Median TTFT and TPOT of the slices that are believed, by (concurrency, variant, figure)."""
    found: dict[tuple[int, str, str], list[float]] = {}
    for each in document["slices"]:
        if each["complete"] and each["believed"]:
            _, _, variant = each["label"].split("/", 2)
            for _, key in TIMES[:2]:
                value = (each["figures"][key] or {}).get("p50")
                if value:
                    found.setdefault((each["load"]["concurrency"], variant, key), []).append(value)
    return found


def averaged(
    where: str,
    name: str,
    samples: Sequence[float],
    better: str,
    believed: bool = True,
    unit: str = "",
    centre: str = "geometric mean",
    **more: Any,
) -> Figure:
    """A figure that is the mean of its samples; without a value where there are none."""
    known = tuple(samples) if believed else ()
    value = round(float(centre_of(known, centre)), 4) if known else None
    return Figure(where, name, value, unit, better, known, centre, **(more if known else {}))


def startup_figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Medians of the milestones, by cold and warm."""
    for kind in ("cold", "warm"):
        good = [run for run in document["runs"] if run["kind"] == kind and not run["error"]]
        for name in dict.fromkeys(name for run in good for name in run["milestones"]):
            times = [run["milestones"][name] for run in good if name in run["milestones"]]
            yield averaged(kind, name, times, LOWER, unit="s", centre="median")
        sizes = [size / 2**30 for run in good if (size := (run.get("memory") or {}).get("processes"))]
        if sizes:
            yield averaged(kind, "memory of the processes", sizes, LOWER, unit="GiB", centre="median", decides=False)


def train_figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Speed and peak memory of each contender."""
    for row in document["summary"]:
        key = row["case"], row["rows"], row["contender"]
        runs = [run for run in document["runs"] if (run["case"], run["rows"], run["contender"]) == key]
        speeds = [run["tokens_per_second"] for run in runs if run.get("tokens_per_second")]
        yield averaged(", ".join(key), "tokens/s", speeds, HIGHER, centre="median")
        if row["peak_reserved"]:
            yield Figure(", ".join(key), "peak reserved", row["peak_reserved"] / 2**30, "GiB", LOWER)


def plan_figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Tokens of KV cache that the engine reports, and what the plan said over it."""
    for row in document["cases"]:
        tokens = row.get("reported", {}).get("kv_cache_tokens")
        yield Figure(row["case"], "KV cache reported", tokens, "tokens", HIGHER)
        yield Figure(row["case"], "predicted / reported", row.get("ratio"), "", "", decides=False)


def kv_figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Context, cache, requests at once, first token by length."""
    context, capacity = document["context"] or {}, document["capacity"]
    yield Figure("", "longest accepted context", context.get("longest"), "tokens", HIGHER)
    yield Figure("", "KV cache reported", (capacity["reported"] or {}).get("tokens"), "tokens", HIGHER)
    yield Figure("", "KV cache observed", (capacity["observed"] or {}).get("tokens"), "tokens", HIGHER)
    for each in document["requests"] or ():
        yield Figure(f"requests of {each['context']:,}", "at once", each["at_once"], "", HIGHER)
    for each in document["lengths"] or ():
        value = (each["ttft_ms"] or {}).get("p50")
        yield Figure(f"prompts of {each['prompt']:,}", "TTFT p50", value, "ms", LOWER)


def adapters_figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Base and adapters under the popularity, levels of the knee, tiers."""
    load, knee, tiers = document["load"], document["knee"], document["tiers"]
    asked = f"{load['popularity']['adapters']} adapters, {load['popularity']['kind']}, {Load(**load['load']).words}"
    for name in ("base", "adapters"):
        where, speeds = f"{asked}: {name}", load["slices_output_tokens_per_second"].get(name, ())
        yield averaged(where, "output tokens/s", speeds, HIGHER, load["believed"])
        for what, key in TIMES[:2]:
            yield from latency_figures(where, what, load[name][key], load["believed"])
    for each in knee["levels"] if knee else ():
        value = each["output_tokens_per_second"] if each["believed"] and knee["believed"] else None
        where = f"{each['adapters']} distinct adapters, {Load(**knee['load']).words}"
        yield Figure(where, "output tokens/s", value, "", HIGHER)
    for name, one in tiers["tiers"].items() if tiers else ():
        added = one["added_ms"] if one["available"] and tiers["believed"] else {}
        low, high = added.get("low"), added.get("high")
        where = f"adapter {name}"
        yield Figure(where, "TTFT added", added.get("difference"), "ms", LOWER, decides=False, low=low, high=high)


def clients_figures(document: dict[str, Any]) -> Iterator[Figure]:
    """What each load client measured in its rounds, and its ratios to the first of them."""
    for client in document["clients"]:
        found = [one["clients"][client] for one in document["rounds"] if client in one["clients"]]
        speeds = [one["output_tokens_per_second"] for one in found]
        yield averaged(client, "output tokens/s", speeds, HIGHER, decides=False)
        for name, key in TIMES[:2]:
            yield averaged(client, f"{name} p50", [one[key]["p50"] for one in found], LOWER, unit="ms", decides=False)
        for name, told in ((n, one) for n, one in document["ratios"].get(client, {}).items() if one):
            yield Figure(
                client, f"{name}, ratio", told["ratio"], "", "", decides=False, low=told["low"], high=told["high"]
            )


def any_figures(document: dict[str, Any], where: str = "") -> Iterator[Figure]:
    """Every number of a document of another kind, its place as its name; none decides."""
    for key, value in document.items():
        if isinstance(value, dict) and key not in NOT_FIGURES:
            yield from any_figures(value, f"{where}, {key}" if where else key)
        elif isinstance(value, list) and key not in NOT_FIGURES:
            for at, each in enumerate(value, 1):
                if isinstance(each, dict):
                    name = str(each.get("label") or each.get("name") or f"{key} {at}")
                    yield from any_figures(each, f"{where}, {name}" if where else name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield Figure(where, key, float(value), "", direction(key), decides=False)


def direction(key: str) -> str:
    """Which way is better, as far as a name tells."""
    if key.endswith(("per_second", "tokens_per_s")):
        return HIGHER
    return LOWER if key.endswith(("_ms", "_s", "seconds")) else ""


Reader = Callable[[dict[str, Any]], Iterator[Figure]]
READERS: dict[str, Reader] = {  # a bench that is not here is read by `any_figures`
    "throughput": throughput_figures,
    "lora-tax": comparison_figures,
    "gateway": comparison_figures,
    "startup": startup_figures,
    "train": train_figures,
    "plan": plan_figures,
    "kv": kv_figures,
    "adapters": adapters_figures,
    "clients": clients_figures,
}


def to_csv(parts: Sequence[Part]) -> str:
    """All figures of all parts, one a line; an empty value is one that was withheld or not measured."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["part", "bench", "where", "figure", "value", "unit", "low", "high", "better", "samples"])
    for part in parts:
        for each in figures_of(part.document) if part.document else ():
            numbers = ["" if one is None else one for one in (each.value, each.low, each.high)]
            words = [part.name, part.kind, each.where, each.name]
            lines.writerow(
                [
                    *map(safe, words),
                    numbers[0],
                    each.unit,
                    *numbers[1:],
                    each.better,
                    " ".join(f"{one:.6g}" for one in each.samples),
                ]
            )
    return text.getvalue()


def safe(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: names of models are whatever a server says."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
