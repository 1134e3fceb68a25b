"""Figures of load tests: exact arithmetic on requests of known times, intervals, and when a client is not believed."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraport.bench.load.figures import (
    Records,
    cached_share,
    gap_percentiles,
    merge_lags,
    paired_difference,
    paired_ratio,
    percentiles,
    read_records,
    summarize,
)
from loraport.bench.load.record import Record, bucket_of
from loraport.bench.load.stage import Effort, Load
from loraport.bench.load.verdict import Calibration, describe_client, judge, parse_limits
from loraport.clients.errors import UsageError

CLOSED = Load("closed", 2)


def record(due: float, first: float, last: float, tokens: int, **more: Any) -> Record:
    """An answered request."""
    return Record(0, 0, "m", due, **({"sent": due, "first_text": first, "prompt_tokens": 10} | more), first=first,
                  last=last, completion_tokens=tokens)  # fmt: skip


def collect(*records: Record) -> Records:
    """Records of a stage."""
    found = Records()
    for one in records:
        found.add(one)
    return found


def test_times_tokens_and_rates() -> None:
    records = collect(record(10.0, 10.5, 12.5, 5), record(11.0, 11.2, 11.2, 1, sent=11.1), record(10.0, 10.1, 14.1, 9))
    figures = summarize(records, CLOSED, {})
    assert figures["seconds"] == pytest.approx(4.1)
    assert (figures["answered"], figures["output_tokens"], figures["input_tokens"]) == (3, 15, 30)
    assert figures["output_tokens_per_second"] == pytest.approx(15 / 4.1, abs=1e-3)
    assert figures["total_tokens_per_second"] == pytest.approx(45 / 4.1, abs=1e-3)
    assert figures["ttft_ms"]["p50"] == pytest.approx(200)
    assert figures["tpot_ms"] == {"count": 2, "mean": 500, "p50": 500, "p90": 500, "p95": 500, "p99": 500, "max": 500}
    assert figures["e2e_ms"]["max"] == pytest.approx(4100)
    assert figures["late_ms"]["max"] == pytest.approx(100)


def test_percentiles_are_numpys_linear_ones_with_their_count() -> None:
    found = percentiles(np.array([0.001, 0.002, 0.003, 0.004, np.nan]))
    assert found == {"count": 4, "mean": 2.5, "p50": 2.5, "p90": 3.7, "p95": 3.85, "p99": 3.97, "max": 4.0}
    assert percentiles(np.array([np.nan])) is None


def test_gaps_come_out_of_their_buckets() -> None:
    found = gap_percentiles(Counter({bucket_of(0.010): 98, bucket_of(0.5): 2}))
    assert found is not None and found["count"] == 100
    assert (found["p50"], found["p99"]) == (pytest.approx(10, rel=0.005), pytest.approx(500, rel=0.005))
    assert found["mean"] == pytest.approx(19.8, rel=0.005)
    assert gap_percentiles(Counter()) is None
    late = merge_lags([{bucket_of(0.001): 1}, {bucket_of(0.001): 1}])
    assert late is not None and late["count"] == 2


def test_the_steady_window_leaves_ramp_and_drain_out() -> None:
    """Two at once, four waves of a second: 10 tokens each, the first half a second after it was sent."""
    waves = [record(at, at + 0.5, at + 1.0, 10) for at in (0.0, 1.0, 2.0, 3.0) for _ in range(2)]
    steady = summarize(collect(*waves), CLOSED, {})["steady"]
    assert steady == {"from_s": 1.0, "seconds": 2.0, "output_tokens_per_second": 20.0, "requests_per_second": 3.0}
    half = summarize(collect(*waves[:2]), CLOSED, {})
    assert half["steady"] is None, "one wave has a ramp and a drain and nothing between them"
    with_long = summarize(collect(*waves, record(2.5, 2.5, 4.5, 21)), Load("closed", 3), {})
    assert with_long["steady"]["seconds"] == pytest.approx(1.0)


def test_an_open_loop_is_steady_from_a_median_reply_on() -> None:
    even = [record(at / 2, at / 2 + 0.1, at / 2 + 1.0, 10) for at in range(41)]
    steady = summarize(collect(*even), Load("open", rate=2), {})["steady"]
    assert (steady["from_s"], steady["seconds"]) == (1.0, 19.0)
    assert steady["output_tokens_per_second"] == pytest.approx(20, rel=0.02)


def test_goodput_is_of_requests_that_meet_all_limits_and_one_token_misses_no_tpot() -> None:
    records = collect(record(0, 0.4, 1.0, 11), record(0, 0.6, 1.0, 11), record(0, 0.4, 2.4, 11), record(0, 0.4, 0.4, 1))
    found = summarize(records, CLOSED, {"ttft": 0.5, "tpot": 0.1})["goodput"]
    assert (found["share"], found["met"]) == (0.5, {"ttft": 0.75, "tpot": 0.75})
    assert found["requests_per_second"] == pytest.approx(2 / 2.4, abs=1e-3)


def test_failed_requests_are_counted_by_kind_and_in_no_time() -> None:
    failed = Record(0, 1, "m", 0.0, 0.0, first=0.1, first_text=0.1, last=9.0, error="cut", said="gone")
    figures = summarize(collect(record(0, 0.5, 1.0, 6), failed), CLOSED, {})
    assert (figures["requests"], figures["answered"], figures["errors"]) == (2, 1, {"cut": 1})
    assert figures["e2e_ms"]["max"] == 1000 and figures["errors_said"] == {"cut": "gone"}
    nothing = summarize(collect(failed), CLOSED, {"ttft": 1})
    assert nothing["output_tokens_per_second"] is None and nothing["ttft_ms"] is None and nothing["goodput"] is None


def test_a_reply_without_text_is_timed_by_its_first_chunk() -> None:
    figures = summarize(
        collect(record(0, 0.5, 1.0, 6, first_text=None), record(0, 0.1, 1, 6, first_text=0.7)), CLOSED, {}
    )
    assert figures["ttft_ms"]["max"] == 700 and figures["first_chunk_ms"]["max"] == 500
    assert figures["first_chunk_without_text"] == 2


def test_the_cached_share_is_of_what_the_server_tells() -> None:
    assert cached_share(collect(record(0, 1, 2, 2, cached_tokens=5), record(0, 1, 2, 2))) == 0.5
    assert cached_share(collect(record(0, 1, 2, 2))) is None


def test_ratios_are_of_the_same_round() -> None:
    drift = [100.0, 50.0, 200.0, 80.0, 120.0]  # a machine that is now fast, now slow
    found = paired_ratio([0.8 * speed for speed in drift], drift)
    assert found == {"rounds": 5, "ratio": 0.8, "low": 0.8, "high": 0.8}
    noisy = paired_ratio([70.0, 90.0, 80.0, 75.0, 85.0], [100.0] * 5)
    assert 0.70 < noisy["low"] < noisy["ratio"] < noisy["high"] < 0.90
    assert noisy["ratio"] == pytest.approx((0.7 * 0.9 * 0.8 * 0.75 * 0.85) ** 0.2, abs=1e-4)
    assert paired_ratio([1.0, 2.0], [1.0, 1.0])["low"] is None, "two rounds have no interval"
    assert paired_difference([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]) == {"rounds": 3, "difference": 2, "low": 2, "high": 2}


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        found = paired_ratio(list(np.exp(draw.normal(-0.2, 0.05, 20))), [1.0] * 20)
        held += found["low"] <= np.exp(-0.2) <= found["high"]
    assert 175 <= held <= 199


def figures_of(**more: Any) -> dict[str, Any]:
    """Figures of a stage without fault."""
    times = {"p50": 100.0, "p99": 1.0}
    return {"answered": 100, "requests": 100, "errors": {}, "seconds": 10.0, "ttft_ms": times, "late_ms": times,
            "gap_ms": {"count": 900}} | more  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "cpu", "lag", "cached", "reason"),
    [
        ({}, 0.5, 0.001, 0.0, None),
        ({}, 0.5, 0.001, None, None),
        ({"errors": {"stopped": 20}}, 0.5, 0.001, 0.0, None),
        ({}, 0.5, 0.05, 0.0, "ms (bound 10.0 ms)"),
        ({"late_ms": {"p99": 11.0}}, 0.5, 0.001, 0.0, "the client sent requests late: p99 11.0 ms"),
        ({}, 0.97, 0.001, 0.0, "used 97% of a core (bound 90%)"),
        ({}, 0.5, 0.001, 0.3, "30% of the prompts' tokens came from the prefix cache"),
        ({"errors": {"5xx": 2}}, 0.5, 0.001, 0.0, "2 of 100 requests failed (bound 1%): 2 × 5xx"),
        ({"gap_ms": {"count": 7000}}, 0.5, 0.001, 0.0, "710 chunks/s, more than 60% of the 1,000"),
        ({"answered": 0}, 0.5, 0.001, 0.0, "no request was answered"),
    ],
)
def test_a_client_that_was_the_bottleneck_is_not_believed(
    figures: dict[str, Any], cpu: float, lag: float, cached: float | None, reason: str | None
) -> None:
    client = describe_client([Effort(0, 10.0, 20.0, 10 * cpu, 100, {bucket_of(lag): 50})])
    found = judge(figures_of(**figures), client, Calibration(62.5, 1000.0, 0.5, 1, 256), cached)
    assert (found == []) if reason is None else (len(found) == 1 and reason in found[0])


def test_limits() -> None:
    assert parse_limits("ttft=500ms,tpot=30ms, e2e=2s") == {"ttft": 0.5, "tpot": 0.03, "e2e": 2.0}
    assert parse_limits("mlperf-llama-3.1-8b-interactive") == {"ttft": 0.5, "tpot": 0.03}


@pytest.mark.parametrize("text", ["ttft", "ttft=fast", "itl=3ms", "tpot=-1ms", "tpot=nan", "mlperf"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(UsageError, match="is no limit"):
        parse_limits(text)


def test_records_survive_the_disk(tmp_path: Path) -> None:
    one = record(0, 0.5, 1.0, 6, gaps=[3, 2, 9, 1], cached_tokens=4)
    (tmp_path / "records-0.jsonl").write_text(one.line())
    (tmp_path / "records-1.jsonl").write_text(one.line())
    found = read_records(tmp_path, lambda record: record.model)["m"]
    assert (found.requests, found.gaps) == (2, Counter({3: 4, 9: 2}))
    assert list(found.column("cached")) == [4, 4]
