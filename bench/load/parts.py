"""Figures of parts of a stage: turn by turn of conversations, along a ramp, with a prefix cache and without it.

>>> along_ramp(records, Load("open", rate=1, rate_to=9, ramp_s=60), start, {"ttft": 0.5})["kept_up_to"]
5.8
"""

from itertools import pairwise
from typing import Any

import numpy as np

from loraport.bench.load.figures import Numbers, Records, cached_share, latencies, percentiles
from loraport.bench.load.stage import Load

WINDOWS = 12  # of a ramp
KEPT_UP = 0.9  # of what was due in a window: so much must be answered in it
MET = 0.99  # of requests must meet the limits, as MLPerf has it of its 99th percentile


def by_turn(turns: dict[int, Records]) -> dict[str, Any]:
    """Figures of each turn of conversations, by its number from 1."""
    found = {}
    for turn in sorted(turns):
        records = turns[turn]
        prompts = records.column("prompt")
        times = latencies(records)
        found[str(turn)] = {
            "requests": records.requests,
            "answered": len(prompts),
            "mean_input_tokens": round(float(np.nanmean(prompts)), 1) if np.isfinite(prompts).any() else None,
            "cached_share": cached_share(records),
            "ttft_ms": percentiles(times["ttft"]),
            "tpot_ms": percentiles(times["tpot"]),
        }
    return found


def by_cache(records: Records) -> dict[str, Any] | None:
    """TTFT of requests that the prefix cache had a part of, and of those it had none of; None where it is not told."""
    cached, ttft = records.column("cached"), latencies(records)["ttft"]
    known = ~np.isnan(cached)
    if not known.any():
        return None
    parts = {"hit": known & (cached > 0), "missed": known & (cached == 0)}
    return {name: {"requests": int(part.sum()), "ttft_ms": percentiles(ttft[part])} for name, part in parts.items()}


def along_ramp(records: Records, load: Load, start: float, limits: dict[str, float]) -> dict[str, Any]:
    """Windows of equal length along a ramp, and the highest rate before it went wrong, at the middle of a window.

    `kept_up_to`: until less than KEPT_UP of what was due was answered; `met_up_to`: until less than MET of the requests
    met the limits. None where the first window already fails, the last one's where none does. `start`: of the stage.
    """
    due, last = (records.column(name) - start for name in ("due", "last"))
    times = latencies(records)
    good = np.ones(len(due), dtype=bool)
    for name, limit in limits.items():
        good &= ~(times[name] > limit)
    edges = np.linspace(0, load.ramp_s, WINDOWS + 1)
    windows = [
        window(load, float(begin), float(end), due, last, times["ttft"], good if limits else None)
        for begin, end in pairwise(edges)
    ]
    kept = [each["ended_per_second"] >= KEPT_UP * each["due_per_second"] for each in windows]
    met = [each["met"] is None or each["met"] >= MET for each in windows]
    return {
        "windows": windows,
        "kept_up_to": highest(windows, kept),
        "met_up_to": highest(windows, met) if limits else None,
    }


def window(
    load: Load, begin: float, end: float, due: Numbers, last: Numbers, ttft: Numbers, good: Numbers | None
) -> dict[str, Any]:
    """The requests that were due between two times, in seconds."""
    inside = (due >= begin) & (due < end)
    ended = ((last >= begin) & (last < end)).sum()
    return {
        "from_s": round(begin, 3),
        "rate": round(load.rate_at((begin + end) / 2), 3),
        "due_per_second": round(float(inside.sum()) / (end - begin), 3),
        "ended_per_second": round(float(ended) / (end - begin), 3),
        "ttft_ms": percentiles(ttft[inside]),
        "met": round(float(good[inside].mean()), 4) if good is not None and inside.any() else None,
    }


def highest(windows: list[dict[str, Any]], fine: list[bool]) -> float | None:
    """The rate of the last window before two that are not fine one after the other; one alone may be chance."""
    for at, is_fine in enumerate(fine):
        if not is_fine and not any(fine[at + 1 : at + 2]):
            return float(windows[at - 1]["rate"]) if at else None
    return float(windows[-1]["rate"])
