"""Recorded arrivals: files of all kinds, what is wrong with them, and a server that is asked at their times."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraport.bench.load.fleet import NullServer
from loraport.bench.load.trace import Trace, read_due, read_trace
from loraport.bench.serving.cli import bench_throughput
from loraport.clients.errors import DataError, UsageError
from tests.misbehaving import Misbehaving

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:46.9305900,9,0
2023-11-16 18:15:46.8055900,12,3
"""
SMALL: dict[str, Any] = {"calibrate": False, "timeout": 20.0, "json": True}


def save(folder: Path, name: str, text: str) -> Path:
    """A file of this text."""
    path = folder / name
    path.write_text(text)
    return path


def test_a_trace_of_azure_is_put_in_order_and_begins_at_zero(tmp_path: Path) -> None:
    trace = read_trace(save(tmp_path, "azure.csv", AZURE))
    assert list(trace.times) == pytest.approx([0, 0.125, 0.25], abs=1e-5)
    assert (list(trace.inputs), list(trace.outputs)) == ([374, 12, 9], [44, 3, 1]), "no request is without a token"
    assert trace.rate == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "times"),
    [
        ("burst.csv", "Timestamp,Model,Request tokens,Response tokens\n5,a,472,18\n45.5,b,1087,230\n", [0, 40.5]),
        (
            "mooncake.jsonl",
            '{"timestamp": 0, "input_length": 6955, "output_length": 52, "hash_ids": [1]}\n'
            '{"timestamp": 3000, "input_length": 6955, "output_length": 52, "hash_ids": [1]}\n',
            [0, 3.0],
        ),
        ("zone.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:01+00:00,1,1\n", [0]),
        ("array.json", '[{"ts": 7.5}, {"ts": 9}]', [0, 1.5]),
    ],
)
def test_traces_of_other_kinds(tmp_path: Path, name: str, text: str, times: list[float]) -> None:
    trace = read_trace(save(tmp_path, name, text))
    assert list(trace.times) == pytest.approx(times)
    assert bool(trace.inputs) == (name != "array.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("when,what\n1,2\n", "has no column of times (it has when, what)"),
        ("timestamp,ContextTokens\n1,2\n", "has no column of output tokens, but the other"),
        ("timestamp\n1\nsoon\n", "row 2: 'soon' is no time"),
        ("timestamp\n1\nnan\n", "row 2: 'nan' is no time"),
        ("timestamp,input_length,output_length\n1,2,-3\n", "row 1: output_length '-3' is no number of tokens"),
        ("timestamp,input_length,output_length\n1,,3\n", "row 1: input_length None is no number of tokens"),
        ("timestamp\n", "has no requests"),
    ],
)
def test_what_is_wrong_with_a_trace_is_told_with_its_row(tmp_path: Path, text: str, message: str) -> None:
    path = save(tmp_path, "bad.csv", text)
    if message.startswith("row 1: input"):
        path.write_text("timestamp,input_length,output_length\n0,1,1\n" + text.partition("\n")[2])
        message = message.replace("row 1", "row 2")
    with pytest.raises(DataError) as caught:
        read_trace(path)
    assert message in caught.value.message and caught.value.hint


def test_a_trace_is_scaled_cut_and_fitted_to_a_context() -> None:
    trace = Trace([0.0, 1.0, 2.0, 3.0], [100, 50, 900, 10], [20, 60, 200, 2000])
    assert list(trace.scaled(0.5).times) == [0, 0.5, 1, 1.5]
    assert (len(trace.cut(3, None).times), len(trace.cut(None, 2.0).inputs), len(trace.cut(9, 0.5).times)) == (3, 2, 1)
    fitted = trace.fit(1000)
    assert (list(fitted.inputs), list(fitted.outputs)) == ([100, 50, 800, 1], [20, 60, 200, 999])
    assert fitted.shortened == 2 and trace.fit(None) is trace


def test_processes_read_what_was_written(tmp_path: Path) -> None:
    Trace([0.0, 1.5], [3, 4], [5, 6]).write(tmp_path / "due")
    assert list(read_due(tmp_path / "due")) == [(0.0, (3, 5)), (1.5, (4, 6))]
    Trace([0.0, 1.5], [], []).write(tmp_path / "due")
    assert list(read_due(tmp_path / "due")) == [(0.0, None), (1.5, None)]


def test_a_server_is_asked_at_the_times_and_lengths_of_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, "azure.csv", AZURE)
    with NullServer() as server:
        bench_throughput(server.base_url, trace=path, time_scale=0.5, processes=2, records=tmp_path / "r", **SMALL)
    found = json.loads(capsys.readouterr().out)
    (stage,) = found["stages"]
    figures = stage["figures"]
    assert (figures["answered"], figures["output_tokens"], figures["input_tokens"]) == (3, 48, 395)
    assert found["trace"] == {"requests": 3, "seconds": 0.125, "requests_per_second": 16.0, "shortened": 0,
                              "mean_input_tokens": 131.7, "mean_output_tokens": 16.0}  # fmt: skip
    lines = [json.loads(line) for file in (tmp_path / "r").glob("*.jsonl") for line in file.read_text().splitlines()]
    due = sorted(line["due"] for line in lines if line["stage"] == stage["stage"])
    assert [one - due[0] for one in due] == pytest.approx([0, 0.0625, 0.125], abs=1e-5)


def test_what_is_longer_than_the_context_is_shortened_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, "long.csv", "ts,input_length,output_length\n0,90,10\n0,80,4\n0,20,4\n")
    with Misbehaving(["good"], context=50) as server:
        bench_throughput(server.base_url, trace=path, **SMALL)
        assert max(len(body["prompt"].split()) + body["max_tokens"] for body in server.seen) <= 50
    found = json.loads(capsys.readouterr().out)
    assert found["trace"]["shortened"] == 2 and "2 requests of the trace" in found["workload"]["notes"][-1]


@pytest.mark.parametrize(
    "options", [{"concurrency": "4"}, {"rate": "1"}, {"ramp": "1:2:3"}, {"sweep": True}, {"time_scale": 0.0}]
)
def test_a_trace_is_a_load_of_its_own(tmp_path: Path, options: dict[str, Any]) -> None:
    path = None if "time_scale" in options else save(tmp_path, "azure.csv", AZURE)
    with pytest.raises(UsageError) as caught:
        bench_throughput("http://127.0.0.1:1/v1", trace=path, **SMALL | options)
    assert caught.value.hint
