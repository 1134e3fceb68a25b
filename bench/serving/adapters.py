"""Many adapters of a server at once: latency by popularity, fairness, speed against the base, and the knee.

Slices of requests to the base and to all adapters take turns, so that the ratio of both is one of the same moment; the
adapter of a request is drawn by popularity. The knee: at the same number of requests at once, how many distinct
adapters they may name before tokens/s fall. How long a load takes is in adapters_tiers.py.

    >>> study = Study(base, zipf(names, 1), Load("closed", 8), rounds=8, requests=64, levels=[1, 2, 4, 8])
    >>> measure_study(measurement, study)
    >>> describe_load(measurement, study, slices)["to_base"]["tokens_per_second"]["ratio"]
    0.81
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from loraport.bench.load.figures import Records, latencies, paired_ratio, read_records, summarize
from loraport.bench.load.popularity import Popularity
from loraport.bench.load.record import Record
from loraport.bench.load.stage import Load, Target
from loraport.bench.serving.adapters_server import Slots
from loraport.bench.serving.compare import is_whole, relate, speed
from loraport.bench.serving.measurement import Measurement
from loraport.bench.tables import rounded
from loraport.clients.errors import EndpointError

WAVES = 4  # requests of a slice, in times of those at once
EACH = 4  # and of the adapters
LEAST_ANSWERS = 5  # of an adapter, below which its median says nothing
ALONE = 8  # ranks that the table shows one by one
BASE, ADAPTERS = "base", "adapters"


@dataclass(frozen=True)
class Study:
    """What is measured. `requests`: of a slice. `levels`: distinct adapters at once, for the knee; `fall`: as a share
    of tokens/s with the first of them."""

    base: Target
    popularity: Popularity
    load: Load
    rounds: int
    requests: int
    levels: list[int] = field(default_factory=list)
    knee_rounds: int = 3
    fall: float = 0.2
    seed: int = 0

    @property
    def adapters(self) -> list[Target]:
        """The most popular first."""
        return [Target(self.base.url, name) for name in self.popularity.models]

    @property
    def targets(self) -> list[Target]:
        """All that is asked."""
        return [self.base, *self.adapters]

    @property
    def knee_load(self) -> Load:
        """The same at every level: as many at once as the load, and at least one for each adapter."""
        return Load("closed", max([self.load.concurrency or 8, *self.levels]))

    @property
    def slices(self) -> int:
        """How many there are."""
        return 2 * self.rounds + self.knee_rounds * len(self.levels)


def slice_requests(load: Load, adapters: int) -> int:
    """Enough for each adapter to be asked, on average, a few times."""
    return max(WAVES * load.concurrency, EACH * adapters, 8)


def measure_study(measurement: Measurement, study: Study) -> None:
    """All slices: popularity round by round, then the knee. EndpointError when nothing answers any more."""
    shuffle = random.Random(study.seed).shuffle
    for turn in range(study.rounds):
        order = [BASE, ADAPTERS]
        shuffle(order)
        for name in order:
            targets = [study.base] if name == BASE else study.adapters
            weights = study.popularity.shares if name == ADAPTERS else None
            say = f"{study.load.words}, round {turn + 1} of {study.rounds}: {name}"
            run_slice(measurement, say, f"popularity/{turn}/{name}", targets, study.load, study.requests, weights)
    for turn in range(study.knee_rounds if study.levels else 0):
        levels = list(study.levels)
        shuffle(levels)
        for level in levels:
            targets, load = study.adapters[:level], study.knee_load
            say = f"knee, round {turn + 1} of {study.knee_rounds}: {level} adapter{'s' if level > 1 else ''}"
            # What the slots hold shall be what this level needs; nothing of it is counted.
            measurement.run("warm-up", targets, Load("closed", level), level)
            run_slice(measurement, say, f"knee/{turn}/{level}", targets, load, WAVES * load.concurrency)


def run_slice(
    measurement: Measurement,
    words: str,
    label: str,
    targets: Sequence[Target],
    load: Load,
    requests: int,
    weights: list[float] | None = None,
) -> None:
    """One slice; EndpointError when it was given up, or nothing of it was answered."""
    measurement.on_step(words)
    ran = measurement.run(label, targets, load, requests, weights=weights)
    if any(effort.gave_up for effort in ran.efforts) or not any(effort.answered for effort in ran.efforts):
        raise EndpointError(
            f"{targets[0].url} stopped answering ({words}).", "its log says more; what has run stands above"
        )


@dataclass
class Rounds:
    """Slices of the rounds that count, by name. A round counts when all of it is whole and believed."""

    turns: list[int]
    groups: dict[str, list[dict[str, Any]]]
    left_out: int
    reasons: list[str]

    @property
    def believed(self) -> bool:
        """Half of what ran at least."""
        return len(self.turns) >= max(self.left_out, 1)

    @property
    def window(self) -> str:
        """`steady` where each slice has such a window."""
        has_all = all(one["figures"]["steady"] for group in self.groups.values() for one in group)
        return "steady" if self.turns and has_all else "whole"

    def describe(self) -> dict[str, Any]:
        """For the document."""
        return {
            "rounds": len(self.turns),
            "left_out": self.left_out,
            "believed": self.believed,
            "reasons": self.reasons,
            "window": self.window,
        }


def count_rounds(part: str, names: Sequence[str], rounds: int, slices: dict[str, Any]) -> Rounds:
    """Those of a part of the study."""
    turns = {turn: [slices.get(f"{part}/{turn}/{name}") for name in names] for turn in range(rounds)}
    whole = {turn: [one for one in each if one] for turn, each in turns.items() if all(map(is_whole, each))}
    # Of a round that nothing answered there are reasons too.
    reasons = dict.fromkeys(why for each in turns.values() for one in each if one for why in one["reasons"])
    good = [turn for turn, each in whole.items() if all(one["believed"] for one in each)]
    groups = {name: [whole[turn][at] for turn in good] for at, name in enumerate(names)}
    ran = sum(all(one and one["complete"] for one in each) for each in turns.values())
    return Rounds(good, groups, ran - len(good), list(reasons))


def describe_load(measurement: Measurement, study: Study, slices: dict[str, Any]) -> dict[str, Any]:
    """Base and adapters under the popularity: figures, ratios, ranks, fairness."""
    counted = count_rounds("popularity", [BASE, ADAPTERS], study.rounds, slices)
    found = pool(measurement, "popularity", range(study.rounds))

    def of(name: str, model: str) -> Records:
        return join([found[name, model, turn] for turn in counted.turns if (name, model, turn) in found])

    each = [of(ADAPTERS, name) for name in study.popularity.models]
    ranks = [
        describe_rank(rank, name, share, records, study.load)
        for rank, (name, share, records) in enumerate(
            zip(study.popularity.models, study.popularity.shares, each, strict=True), 1
        )
    ]
    together = join(each)
    return {
        "popularity": {"kind": study.popularity.words, "adapters": len(study.popularity.models)},
        "load": asdict(study.load),
        "slice_requests": study.requests,
        **counted.describe(),
        "base": summarize(of(BASE, study.base.model), study.load, measurement.setting.limits),
        "adapters": summarize(together, study.load, measurement.setting.limits),
        "slices_output_tokens_per_second": {
            name: [speed(one, counted.window) for one in group] for name, group in counted.groups.items()
        },
        "to_base": to_base(counted, study.load),
        "ranks": ranks,
        "rank_groups": [
            describe_group(first, last, each[first - 1 : last], study) for first, last in rank_groups(len(each))
        ],
        "fairness": fairness(ranks),
        "errors": count_errors(found),
    }


def count_errors(found: dict[Any, Records]) -> dict[str, Any]:
    """What failed in all rounds, those that do not count too: kinds by model, and what the server said of each."""
    by_model: dict[str, Counter[str]] = {}
    said: dict[str, str] = {}
    answered: Counter[str] = Counter()
    for (_, model, _), records in found.items():
        kinds = Counter({kind: count for kind, count in records.errors.items() if kind != "stopped"})
        answered[model] += records.requests - sum(records.errors.values())
        by_model[model] = by_model.get(model, Counter()) + kinds
        said |= {kind: words for kind, words in records.said.items() if words and kind != "stopped"}
    return {
        "by_model": {model: dict(kinds) for model, kinds in by_model.items() if kinds},
        "said": said,
        "never_answered": [model for model, kinds in by_model.items() if kinds and not answered[model]],
    }


def to_base(counted: Rounds, load: Load) -> dict[str, Any] | None:
    """Ratios of the adapters' slices to those of the base. In an open loop tokens/s are those that were asked for."""
    if not counted.turns:
        return None
    found = relate(counted.groups[ADAPTERS], counted.groups[BASE], counted.window)
    return found | ({"tokens_per_second": None} if load.kind == "open" else {})


def pool(measurement: Measurement, part: str, turns: Iterable[int]) -> dict[Any, Records]:
    """Records of these rounds by (name of the slice, model, round)."""
    wanted, kept = set(turns), {}
    for ran in measurement.stages:
        kind, _, rest = ran.stage.label.partition("/")
        turn, _, name = rest.partition("/")
        if kind == part and int(turn) in wanted:
            kept[ran.stage.id] = name, int(turn)
    nothing = "", 0

    def key(record: Record) -> tuple[str, str, int]:
        name, turn = kept.get(record.stage, nothing)
        return name, record.model, turn

    return {found: records for found, records in read_records(measurement.folder, key).items() if found[0]}


def join(each: Sequence[Records]) -> Records:
    """All of them as one, in the order in which requests were due."""
    together = Records()
    for records in each:
        together.joined(records)
    return together


def describe_rank(rank: int, name: str, share: float, records: Records, load: Load) -> dict[str, Any]:
    """One adapter."""
    figures = summarize(records, load, {})
    tokens, e2e = records.column("tokens"), latencies(records)["e2e"]
    each = tokens[e2e > 0] / e2e[e2e > 0]
    kept = ("requests", "answered", "errors", "output_tokens", "ttft_ms", "tpot_ms", "e2e_ms")
    speed_each = float(each.mean()) if len(each) else None
    return {"rank": rank, "model": name, "share": round(share, 6), **{key: figures[key] for key in kept}} | {
        "tokens_per_second_of_a_request": rounded(speed_each)
    }


def rank_groups(count: int) -> list[tuple[int, int]]:
    """(first, last) ranks of the table's columns: one by one where they are few, else 1, 2, 3–4, 5–8, 9–16, …"""
    if count <= ALONE:
        return [(rank, rank) for rank in range(1, count + 1)]
    found, first = [(1, 1)], 2
    while first <= count:
        last = min(count, 2 * (first - 1))
        found.append((first, last))
        first = last + 1
    return found


def describe_group(first: int, last: int, each: Sequence[Records], study: Study) -> dict[str, Any]:
    """Adapters of neighbouring ranks together."""
    figures = summarize(join(each), study.load, {})
    kept = ("requests", "answered", "errors", "ttft_ms", "tpot_ms", "e2e_ms")
    shares = study.popularity.shares[first - 1 : last]
    found = {"first": first, "last": last, "share": round(sum(shares), 6), **{key: figures[key] for key in kept}}
    return found | {"models": study.popularity.models[first - 1 : last] if first == last else []}


def fairness(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether adapters are served alike.

    `jain_request_speed`: Jain's index, (Σx)² / (n Σx²), of the mean tokens/s of a request; 1 is equal, 1/n is one for
    all. `jain_tokens_per_share`: the same of the tokens that an adapter got over its share; `as_drawn` is what the
    random draw of requests alone makes of it. Adapters with fewer than LEAST_ANSWERS replies are left out of medians.
    """
    enough = [one for one in ranks if one["answered"] >= LEAST_ANSWERS]
    slowest = max(enough, key=lambda one: one["ttft_ms"]["p50"], default=None)
    fastest = min(enough, key=lambda one: one["ttft_ms"]["p50"], default=None)
    ratio = None
    if slowest and fastest and len(enough) > 1 and fastest["ttft_ms"]["p50"] > 0:
        ratio = {
            "ratio": round(slowest["ttft_ms"]["p50"] / fastest["ttft_ms"]["p50"], 3),
            "worst": slowest["model"],
            "best": fastest["model"],
        }
    return {
        "adapters_counted": len(enough),
        "least_answers": LEAST_ANSWERS,
        "jain_request_speed": jain([one["tokens_per_second_of_a_request"] for one in enough]),
        "jain_tokens_per_share": jain([one["output_tokens"] / one["share"] for one in ranks if one["share"]]),
        "jain_tokens_per_share_as_drawn": jain([one["requests"] / one["share"] for one in ranks if one["share"]]),
        "ttft_p50_worst_to_best": ratio,
        "never_asked": sum(not one["requests"] for one in ranks),
    }


def jain(values: Sequence[float | None]) -> float | None:
    """Jain's index; None of fewer than two values, or of zeros."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    squares = float((known**2).sum())
    return round(float(known.sum()) ** 2 / (len(known) * squares), 4) if len(known) > 1 and squares else None


def describe_knee(
    measurement: Measurement, study: Study, slices: dict[str, Any], slots: Slots
) -> dict[str, Any] | None:
    """Tokens/s and TTFT by the number of distinct adapters at once; where tokens/s fall. None where it is not asked."""
    if not study.levels:
        return None
    found = pool(measurement, "knee", range(study.knee_rounds))
    levels = [describe_level(level, study, slices, found) for level in study.levels]
    knee, unsure = find_knee([level for level in levels if level["believed"]], study.fall)
    return {
        "load": asdict(study.knee_load),
        "slice_requests": WAVES * study.knee_load.concurrency,
        "believed": all(level["believed"] for level in levels),
        "levels": levels,
        "fall": study.fall,
        "knee": knee,
        "unsure": unsure,
        "slots": asdict(slots),
    }


def describe_level(level: int, study: Study, slices: dict[str, Any], found: dict[Any, Records]) -> dict[str, Any]:
    """So many distinct adapters at once, against the first level in the same rounds."""
    first, name = str(study.levels[0]), str(level)
    counted = count_rounds("knee", list(dict.fromkeys([first, name])), study.knee_rounds, slices)
    speeds, firsts = ([speed(one, counted.window) for one in counted.groups[which]] for which in (name, first))
    records = [
        found[name, target.model, turn]
        for target in study.adapters[:level]
        for turn in counted.turns
        if (name, target.model, turn) in found
    ]
    return {
        "adapters": level,
        **counted.describe(),
        "output_tokens_per_second": rounded(float(np.mean(speeds))) if speeds else None,
        "to_first": paired_ratio(speeds, firsts) if speeds else None,
        "figures": summarize(join(records), study.knee_load, {}),
    }


def find_knee(levels: Sequence[dict[str, Any]], fall: float) -> tuple[dict[str, Any] | None, list[int]]:
    """The first level that surely has less than 1 − `fall` of the tokens/s of the first, and the one before it.

    Surely: all of its interval, where there is one. Beside it the levels whose intervals reach further.
    """
    found, unsure = None, []
    for before, level in pairwise(levels):
        ratio = level["to_first"]
        if not ratio or ratio["ratio"] >= 1 - fall:
            continue
        if ratio["high"] is not None and ratio["high"] >= 1 - fall:
            unsure.append(level["adapters"])
        elif found is None:
            found = {"above": before["adapters"], "at": level["adapters"], "ratio": ratio["ratio"]}
    return found, unsure
