"""`loraport bench report` and `compare`: pages of real and made documents, verdicts about changes, wrong files."""

import copy
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loraport.bench.serving.adapters_cli import bench_adapters
from loraport.bench.serving.comparable import figures_of, to_csv
from loraport.bench.serving.compare_runs import compare_runs, parse_limit
from loraport.bench.serving.documents import Part, read_parts
from loraport.bench.serving.kv_cli import bench_kv
from loraport.bench.serving.report_cli import bench_compare, bench_report
from loraport.bench.serving.report_html import render
from loraport.bench.serving.section import full_names, sheet
from loraport.clients.errors import DataError, ResourceError, Shortfall, UsageError
from tests.kv_server import Knobs, KvServer
from tests.test_bench_adapters import QUICK, fake_engine

BENCHMARKS = Path(__file__).parent.parent / "docs" / "benchmarks"
TAX = BENCHMARKS / "2026-11-22-h200-serving" / "tax64-8014.json"
PLAN = BENCHMARKS / "2026-11-22-h200-serving" / "plan-1.json"
TRAIN = BENCHMARKS / "2026-11-22-h200-training" / "full-bf16-full.json"
EVIL = '"><script>alert(1)</script>'
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Strict(HTMLParser):
    """Complains where tags do not match; `tags`: all that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def times(p50: float, count: int = 100) -> dict[str, float]:
    """Percentiles as documents have them."""
    return {"count": count, "mean": p50, "p50": p50, "p90": p50, "p95": p50, "p99": 2 * p50, "max": 3 * p50}


def make_figures(speed: float, ttft: float = 50.0, count: int = 100) -> dict[str, Any]:
    """Figures of a load."""
    return {
        "requests": count,
        "answered": count,
        "errors": {},
        "errors_said": {},
        "output_tokens_per_second": speed,
        "requests_per_second": speed / 100,
        "steady": {"output_tokens_per_second": speed, "requests_per_second": 1.0},
        "first_chunk_without_text": 0,
        "goodput": None,
    } | {name: times(ttft, count) for name in ("ttft_ms", "tpot_ms", "gap_ms", "e2e_ms")}


def make_stage(concurrency: int, speed: float, ttft: float = 50.0, reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    """A load of `bench throughput`."""
    return {
        "label": f"{concurrency} at once",
        "load": {"kind": "closed", "concurrency": concurrency, "rate": 0.0, "arrival": "poisson", "burstiness": 1.0},
        "complete": True,
        "believed": not reasons,
        "reasons": list(reasons),
        "figures": make_figures(speed, ttft),
        "by_model": {},
    }


def make_throughput(*stages: dict[str, Any], model: str = "base", **work: Any) -> dict[str, Any]:
    """A document of `bench throughput`."""
    taken = json.loads(TAX.read_text())
    server = {"version": "0.25.1", "models": [model], "context": 4096, "command": ["vllm", "serve", model]}
    return {
        "bench": "throughput",
        "complete": True,
        "definitions": {"ttft": "to the first chunk with text"},
        "environment": taken["environment"],
        "servers": {"http://127.0.0.1:8000/v1": server},
        "workload": taken["workload"] | work,
        "client": taken["client"],
        "stages": list(stages),
    }


def make_startup(*seconds: float) -> dict[str, Any]:
    """A document of `bench startup` with warm starts."""
    runs = [
        {"kind": "warm", "error": None, "milestones": {"port": at / 2, "health": at}, "stop_s": 1.0, "left_behind": 0}
        | {"memory": {"processes": 1 << 30}, "phases": None, "told": {"weights": 2.5}}
        for at in seconds
    ]
    medians = {"cold": {"median_s": {}}, "warm": {"median_s": {"port": 1.0, "health": 2.0}}}
    return {
        "bench": "startup",
        "complete": True,
        "command": ["vllm", "serve", "m"],
        "cold": {"folders": []},
        "summary": medians,
        "runs": runs,
    }


def page_of(*documents: dict[str, Any]) -> str:
    """The page, checked for what holds of every page."""
    page = render([Part(each["bench"], "done", each) for each in documents])
    parser = Strict()
    parser.feed(page)
    assert not parser.open
    assert not parser.tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    assert not re.search(r"\s(src|href|srcset|onload)=|url\(|@import", page)
    assert "default-src 'none'" in page
    return page


def save(folder: Path, name: str, document: dict[str, Any]) -> Path:
    """The document in a file."""
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def test_the_page_of_real_documents_has_all_parts(tmp_path: Path) -> None:
    bench_report([TAX, PLAN, TRAIN], tmp_path / "h200.html")
    page = (tmp_path / "h200.html").read_text()
    Strict().feed(page)
    for words in ("What adapters cost", "all mixed (8)", "0.711", "0.656 … 0.742", "NVIDIA H200", "580.", "0.25.1"):
        assert words in page
    for words in ("Predicted and reported memory", "4,113,248", "Training", "stock-liger", "not calibrated"):
        assert words in page
    assert [part["name"] for part in json.loads((tmp_path / "h200.json").read_text())["parts"]] == [
        "tax64-8014",
        "plan-1",
        "full-bf16-full",
    ]
    rows = list(csv.DictReader((tmp_path / "h200.csv").open()))
    ratio = next(row for row in rows if row["where"] == "64 at once, a0" and row["figure"] == "tokens/s × base")
    assert (ratio["low"], ratio["high"], ratio["better"]) == ("0.8335", "0.8577", "higher")


def test_curves_over_concurrency_and_what_is_withheld() -> None:
    stages = make_stage(1, 90.0), make_stage(8, 600.0), make_stage(64, 9876.5, reasons=("the client sent late",))
    page = page_of(make_throughput(*stages))
    assert re.findall(r"<h3>(.*?)</h3>", page)[:3] == [
        "Output tokens per second",
        "Time to first token",
        "Time per output token",
    ]
    assert "600 at requests at once 8" in page and "2 of 3 loads believed" in page
    assert "withheld: 64 at once: the client sent late" in page
    assert "9,876" not in page and "9876" not in page, "a figure that is withheld is nowhere"


def test_one_load_has_no_curve_and_no_load_is_no_error() -> None:
    assert "<svg" not in page_of(make_throughput(make_stage(8, 100.0)))
    assert "no load ran" in page_of(make_throughput())


def test_names_are_escaped_wherever_they_stand() -> None:
    document = make_throughput(make_stage(1, 9.0), make_stage(2, 9.0), model=EVIL)
    document["stages"][0]["by_model"] = {EVIL: make_figures(5.0)}
    document["stages"][0]["label"] = EVIL
    document["workload"]["notes"] = [EVIL]
    document["environment"] = document["environment"] | {"processor": EVIL, "gpus": []}
    page = page_of(document)
    assert EVIL not in page and "&lt;script&gt;" in page


def test_the_waterfall_of_a_start() -> None:
    page = page_of(make_startup(9.0, 10.0))
    assert "Warm start" in page and "left:50.0%;width:50.0%" in page and "5.00 s" in page


def test_adapters_under_load_have_ranks_a_knee_and_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraport.bench.serving.measurement.judge", lambda *_: [])
    with fake_engine(tmp_path, 4) as url:
        bench_adapters(url, **QUICK, out=tmp_path / "adapters.json")
    document = json.loads((tmp_path / "adapters.json").read_text())
    page = page_of(document)
    assert "another version" not in page
    for words in ("4 adapters, uniform", "Time to first token, by popularity", "over distinct adapters at once"):
        assert words in page
    for words in ("First token, by where the adapter is", "hot, in a slot", "By rank of popularity"):
        assert words in page
    found = {(each.where, each.name): each.value for each in figures_of(document)}
    assert found["4 distinct adapters, 4 at once", "output tokens/s"]


def test_the_cache_has_context_requests_and_lengths(tmp_path: Path) -> None:
    with KvServer(Knobs()) as server:
        bench_kv(server.base_url, deadline=10, repeats=1, out=tmp_path / "kv.json")
    document = json.loads((tmp_path / "kv.json").read_text())
    page = page_of(document)
    assert "another version" not in page and "Requests at once" in page and "300 tokens" in page
    assert "longest accepted context" in {each.name for each in figures_of(document)}


def test_a_part_that_did_not_run_says_why() -> None:
    page = render([Part("gateway", "skipped", None, "no way past it is known")])
    assert "What the gateway adds" in page and "not measured: no way past it is known" in page


@pytest.mark.parametrize(
    "document", [{"bench": "new", "a": {"b_ms": 3}}, {"bench": "throughput", "stages": [{"x": 1}]}]
)
def test_a_document_of_another_version_is_shown_as_numbers(document: dict[str, Any]) -> None:
    assert "Figures" in page_of(document)
    assert figures_of(document)


def test_reports_hold_reports(tmp_path: Path) -> None:
    first = save(tmp_path, "tp.json", make_throughput(make_stage(1, 9.0)))
    bench_report([first, first], tmp_path / "one.html")
    bench_report([tmp_path / "one.json", TAX], tmp_path / "two.html")
    assert [part.name for part in read_parts([tmp_path / "two.json"])] == ["tp (1)", "tp (2)", "tax64-8014"]


def test_a_report_never_overwrites_what_it_is_made_of(tmp_path: Path) -> None:
    before = save(tmp_path, "report.json", make_startup(1.0)).read_bytes()
    bench_report([tmp_path / "report.json"], tmp_path / "report.html")
    assert (tmp_path / "report.json").read_bytes() == before and (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, UsageError, "cannot be read"),
        ("{", DataError, "is no JSON document"),
        ("[1]", DataError, "is not of a bench"),
        ('{"bench": "report", "parts": [{}]}', DataError, "is a damaged report"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str | None, error: type[Exception], message: str) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message):
        bench_report([path], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_page_needs_a_name_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        bench_report([TAX], tmp_path / "nowhere" / "x.html")
    with pytest.raises(UsageError, match="is no name for a page"):
        bench_report([TAX], tmp_path / "x.json")


def test_cells_of_the_csv_are_no_formulas() -> None:
    document = make_throughput(make_stage(1, 9.0))
    document["stages"][0]["label"] = "=HYPERLINK(1)"
    assert "'=HYPERLINK(1)" in to_csv([Part("throughput", "done", document)])


def rows_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The figure of that name."""
    return next(dict(row) for row in found["figures"] if row["name"] == name)


@pytest.mark.parametrize(
    ("speed", "ttft", "worse"),
    [
        (100.0, 50.0, []),
        (96.0, 52.0, []),  # within 5%
        (94.0, 50.0, ["output tokens/s, steady"]),
        (130.0, 40.0, []),  # better
        (100.0, 60.0, ["TTFT p50", "TPOT p50"]),
    ],
)
def test_what_got_worse_by_its_direction(speed: float, ttft: float, worse: list[str]) -> None:
    a, b = make_throughput(make_stage(8, 100.0)), make_throughput(make_stage(8, speed, ttft))
    assert [row["name"] for row in compare_runs(a, b, 0.05)["worse"]] == worse


def test_the_99th_percentile_of_few_requests_decides_nothing() -> None:
    document = make_throughput(make_stage(8, 100.0))
    many = copy.deepcopy(document)
    many["stages"][0]["figures"] = make_figures(100.0, count=5000)
    few, enough = (rows_of(compare_runs(each, each, None), "TTFT p99")["decides"] for each in (document, many))
    assert (few, enough) == (False, True)


def make_slices(*speeds: float) -> dict[str, Any]:
    """The real LoRA tax with other slices of its first adapter."""
    document = json.loads(TAX.read_text())
    for variant in document["comparisons"][0]["variants"]:
        if variant["label"] == "a0":
            variant["slices_output_tokens_per_second"] = list(speeds)
    return dict(document)


def test_a_change_within_the_noise_of_its_slices_is_no_regression() -> None:
    before = make_slices(3800, 3810, 3790)
    noisy, clear = (
        next(
            row
            for row in compare_runs(before, make_slices(*speeds), 0.05)["figures"]
            if (row["where"], row["name"]) == ("64 at once, a0", "output tokens/s")
        )
        for speeds in ((3900, 3900, 2500), (3400, 3410, 3390))
    )
    assert noisy["change"] < -0.05 and noisy["low"] < 0 < noisy["high"] and noisy["verdict"] == "same"
    assert clear["high"] < 0 and clear["verdict"] == "regression"
    assert clear["low"] <= clear["change"] <= clear["high"]


def test_starts_are_compared_by_their_medians() -> None:
    found = compare_runs(make_startup(10, 10, 10), make_startup(12, 12, 90), 0.05)
    health = rows_of(found, "health")
    assert (health["a"], health["b"], health["verdict"]) == (10.0, 12.0, "regression")


def test_a_regression_ends_with_4_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path, "a.json", make_throughput(make_stage(8, 100.0)))
    b = save(tmp_path, "b.json", make_throughput(make_stage(8, 80.0)))
    with pytest.raises(Shortfall, match=r"b\.json falls short.*8 at once: output tokens/s, steady -20\.0%") as caught:
        bench_compare(a, b, "5%", out=tmp_path / "c.json")
    assert caught.value.exit_code == 4
    assert "regression" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["runs"][0]["worse"]
    bench_compare(a, b, "25%")
    bench_compare(a, b)


def test_figures_that_b_withholds_do_not_pass(tmp_path: Path) -> None:
    a = save(tmp_path, "a.json", make_throughput(make_stage(8, 100.0)))
    b = save(tmp_path, "b.json", make_throughput(make_stage(8, 100.0, reasons=("30 of 100 requests failed",))))
    with pytest.raises(Shortfall, match="is withheld or missing in B"):
        bench_compare(a, b, "5%")
    with pytest.raises(UsageError, match="no figure could decide"):
        bench_compare(b, b, "5%")


def test_reports_are_compared_part_by_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    throughput = save(tmp_path, "tp.json", make_throughput(make_stage(8, 100.0)))
    bench_report([throughput, TAX], tmp_path / "a.html")
    bench_report([TAX], tmp_path / "b.html")
    bench_compare(tmp_path / "a.json", tmp_path / "b.json", json=True)
    found = json.loads(capsys.readouterr().out)
    assert [run["bench"] for run in found["runs"]] == ["lora-tax"] and found["only_in_a"] == ["throughput"]
    bench_compare(tmp_path / "a.json", throughput)
    with pytest.raises(Shortfall, match="throughput is missing in B"):
        bench_compare(tmp_path / "a.json", tmp_path / "b.json", "5%")


def test_different_benches_and_loads_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        bench_compare(TAX, PLAN)
    a = save(tmp_path, "a.json", make_throughput(make_stage(8, 100.0)))
    b = save(tmp_path, "b.json", make_throughput(make_stage(8, 80.0), input_tokens=[2048, 2048], seed=7))
    with pytest.raises(DataError, match=r"different loads: input_tokens \[512, 512\] and \[2048, 2048\]\.") as caught:
        bench_compare(a, b)
    assert "--any-workload" in caught.value.hint
    bench_compare(a, b, any_workload=True)
    assert "not the same load" in capsys.readouterr().out
    with pytest.raises(UsageError, match="decides nothing about different loads"):
        bench_compare(a, b, "5%", any_workload=True)
    other = save(tmp_path, "o.json", make_throughput(make_stage(16, 100.0)))
    with pytest.raises(DataError, match="share no figure"):
        bench_compare(a, other)


def test_a_part_of_a_report_that_cannot_be_compared_is_told_and_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, concurrency in (("a", 8), ("b", 16)):
        run = save(tmp_path, f"tp-{name}.json", make_throughput(make_stage(concurrency, 100.0)))
        bench_report([run, TAX], tmp_path / f"{name}.html")
    reports = tmp_path / "a.json", tmp_path / "b.json"
    bench_compare(*reports)
    out = capsys.readouterr().out
    assert "the two runs of throughput share no figure" in out and "lora-tax" in out
    with pytest.raises(DataError, match="share no figure"):
        bench_compare(*reports, "5%")


def test_other_hardware_is_told_not_refused() -> None:
    a, b = make_throughput(make_stage(8, 100.0)), make_throughput(make_stage(8, 100.0))
    b["environment"] = b["environment"] | {"gpus": [], "versions": {"vllm": "0.32.0"}}
    notes = " ".join(compare_runs(a, b, None)["notes"])
    assert "gpus: ['NVIDIA H200'" in notes and "vllm 0.25.1 and 0.32.0" in notes


@pytest.mark.parametrize(("text", "limit"), [("5%", 0.05), ("0.1", 0.1), ("0", 0.0), ("", None)])
def test_limits(text: str, limit: float | None) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["5", "-1%", "much", "nan", "100%"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no share"):
        parse_limit(text)


def test_a_disk_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(ResourceError, match="no disk space left"):
        bench_report([TAX], tmp_path / "x.html")


def test_tables_turn_where_there_are_many_columns() -> None:
    names = full_names(["TTFT p50", "     p99", "× base", "  95%", "  TTFT added", "  95%"])
    assert names == ["TTFT p50", "TTFT p99", "× base", "× base 95%", "TTFT added", "TTFT added 95%"]
    few, many = (sheet("", ["a", "b"], [(str(n), ["1", ""]) for n in range(count)], "") for count in (2, 9))
    assert (few.head, few.rows) == (["", "0", "1"], [["a", "1", "1"]])
    assert (many.head, many.rows[0], len(many.rows)) == (["", "a"], ["0", "1"], 9)
