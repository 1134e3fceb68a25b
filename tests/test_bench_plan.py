"""`loraport bench plan`: cases, what is read from an engine's log, and the whole on the fake engine."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from loraport.bench.serving import plan_cases
from loraport.bench.serving.made import make_base
from loraport.bench.serving.plan_cases import SETS, Case, chosen_cases, engine_command
from loraport.bench.serving.plan_cli import bench_plan
from loraport.bench.serving.plan_measure import KV_TOKENS, Tail, memory_lines, read_report
from loraport.bench.serving.plan_report import check_verdict, parts, print_report, to_json
from loraport.bench.training.cases import SHAPES, parameters
from loraport.bench.training.cli import bench_train
from loraport.clients.errors import ResourceError, Shortfall, UsageError
from loraport.serve.plan.choose import require_shape

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_engine.py"))])
# Of an engine 0.25.1 that loads a 1.5B model on an H200; lines of DEBUG in the form of its sources.
TOLD_025 = """\
(EngineCore pid=1602) INFO 11-22 00:33:20 [gpu_worker.py:360] Using V2 Model Runner
(EngineCore pid=1602) DEBUG 11-22 00:33:20 [v1/worker/gpu_worker.py:372] worker init memory snapshot: \
torch_peak=0.0GiB, free_memory=139.27GiB, total_memory=139.8GiB, cuda_memory=0.53GiB, torch_memory=0.0GiB, \
non_torch_memory=0.53GiB, timestamp=1795307600.1, auto_measure=True
(EngineCore pid=1602) DEBUG 11-22 00:33:20 [v1/worker/gpu_worker.py:373] worker requested memory: 128.62GiB
(EngineCore pid=1602) INFO 11-22 00:33:26 [model_runner.py:302] Model loading took 2.92 GiB and 2.117122 seconds
(EngineCore pid=1602) DEBUG 11-22 00:34:02 [v1/worker/gpu_worker.py:537] Memory profiling takes 3.61 seconds. Total \
non KV cache memory: 3.62GiB; torch peak memory increase: 0.46GiB; non-torch forward increase memory: 0.24GiB; weights \
memory: 2.92GiB.
(EngineCore pid=1602) INFO 11-22 00:34:02 [gpu_worker.py:538] Available KV cache memory: 125.0 GiB
(EngineCore pid=1602) INFO 11-22 00:34:02 [kv_cache_utils.py:2146] GPU KV cache size: 1,170,304 tokens
(EngineCore pid=1602) INFO 11-22 00:34:21 [model_runner.py:722] Graph capturing finished in 19 secs, took 0.75 GiB
"""
TOLD_032 = """\
(Worker pid=9) INFO 11-22 00:33:26 [gpu_model_runner.py:5150] Model loading took 2.92 GiB memory and 2.117122 seconds
(Worker pid=9) DEBUG 11-22 00:34:02 [v1/worker/gpu_worker.py:758] Memory profiling takes 3.61 seconds. Total non KV \
cache memory: 3.62GiB; torch peak memory increase: 0.46GiB; total consumed (from mem_get_info): 3.16GiB; weights \
memory: 2.92GiB.
(EngineCore pid=9) INFO 11-22 00:34:03 [kv_cache_utils.py:2327] GPU KV cache size: 1,164,288 tokens, Maximum \
concurrency for 40,960 tokens per request: 28.43x
(Worker pid=9) INFO 11-22 00:34:21 [gpu_worker.py:971] CUDA graph pool memory: 0.75 GiB (actual), 0.71 GiB \
(estimated), difference: 0.04 GiB (5.3%).
"""


def fake_plan(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Let the planning command print a plan for a GPU that this machine does not have."""
    memory = {"weights": 15 << 30, "lora_slots": 1 << 29, "activations": 1 << 29, "graphs_and_libraries": 1 << 29}
    flags = ["--max-model-len", "1000", "--gpu-memory-utilization", "0.92"]
    plan = {"kv_cache_tokens": tokens, "memory": memory | {"kv_cache": 111 << 30, "left_free": 11 << 30}}
    monkeypatch.setattr(
        plan_cases, "PLAN", (sys.executable, "-c", f"print({json.dumps(plan | {'vllm_args': flags})!r})")
    )
    monkeypatch.setenv("FAKE_WORDING", "0.25")  # it reports 813,696 tokens


def document_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON document on standard output."""
    return dict(json.loads(capsys.readouterr().out))


def test_a_case_is_what_the_plan_is_asked() -> None:
    case = Case.parse("qwen3-8b, rank=16,loras=8,quantization=fp8,share=0.5,context=8192")
    assert case.name == "qwen3-8b,rank=16,loras=8,quantization=fp8,share=0.5,context=8192"
    assert case.flags()[:4] == ["--max-lora-rank", "16", "--max-loras", "8"]
    assert case.flags()[-4:] == ["--gpu-memory-utilization", "0.5", "--context", "8192"]
    assert Case.parse("tiny").flags() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("qwen9", "no shape 'qwen9'"),
        ("tiny,ranks=8", "no key of a case 'ranks'"),
        ("tiny,rank=many", "'rank=many' of the case"),
        ("tiny,rank", "'rank' of the case"),
        ("tiny,kv=", "'kv=' of the case"),
    ],
)
def test_what_is_no_case(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Case.parse(text)


def test_cases_are_taken_once_and_in_parts() -> None:
    cases = chosen_cases(["tiny,rank=8,loras=1", "llama-3.2-1b"], "cpu", None)
    assert [case.name for case in cases] == ["tiny,rank=8,loras=1", "llama-3.2-1b", SETS["cpu"][0], SETS["cpu"][2]]
    for name, texts in SETS.items():
        shares = [chosen_cases([], name, f"{number}/4") for number in range(1, min(5, len(texts) + 1))]
        assert sorted(case.name for share in shares for case in share) == sorted(texts)


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "a/b", "/"])
def test_what_is_no_part(part: str) -> None:
    with pytest.raises(UsageError, match="is no part"):
        chosen_cases([], "h200", part)


def test_without_a_case_there_is_nothing_to_measure() -> None:
    with pytest.raises(UsageError, match="no case to measure") as caught:
        bench_plan()
    assert "h200" in caught.value.hint
    with pytest.raises(UsageError, match="--command is empty"):
        bench_plan(case=["tiny"], command="")


@pytest.mark.parametrize("name", SHAPES)
def test_a_made_base_is_read_as_what_it_is(tmp_path: Path, name: str) -> None:
    make_base(name, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert require_shape(config, 0, "it").parameters == parameters(SHAPES[name])


@pytest.mark.parametrize("command", [["vllm", "serve"], ["python", "-m", "server"]])
def test_the_engine_is_told_what_the_plan_says(command: list[str]) -> None:
    found = engine_command(command, Path("base"), 8001, {"vllm_args": ["--dtype", "float16"]}, ["--enforce-eager"])
    assert found[: len(command)] == command and found[found.index("base") - 1] == (
        "serve" if "vllm" in command else "--model"
    )
    assert found[-5:] == ["--dtype", "float16", "--load-format", "dummy", "--enforce-eager"]


def test_the_parts_of_memory_in_the_log_of_025() -> None:
    found = read_report(TOLD_025)
    assert (found["kv_cache_tokens"], found["runner"]) == (1_170_304, "V2")
    expected = {"total": 139.8, "free_at_start": 139.27, "requested": 128.62, "model": 2.92, "peak_activations": 0.46}
    expected |= {"non_torch": 0.24, "all_but_kv_cache": 3.62, "kv_cache": 125.0, "graphs": 0.75, "rest": 0.24}
    assert found["gib"] == expected
    assert len(memory_lines(TOLD_025 + TOLD_025)) == 6


def test_the_parts_of_memory_in_the_log_of_032() -> None:
    found = read_report(TOLD_032)
    assert (found["kv_cache_tokens"], found["runner"]) == (1_164_288, "V1")
    expected = {"model": 2.92, "all_but_kv_cache": 3.62, "peak_activations": 0.46, "consumed": 3.16}
    assert found["gib"] == expected | {"graphs_estimated": 0.71}
    assert read_report("nothing") == {"kv_cache_tokens": None, "runner": "V1", "gib": {}}


def test_a_log_is_read_on_by_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("")
    with log.with_suffix(".out").open("w", buffering=1) as out:
        said = Tail(log)
        out.write("GPU KV cache ")
        assert not said.has(KV_TOKENS)
        out.write("size: 1,024 tokens")
        assert not said.has(KV_TOKENS), "the line has not ended"
        out.write("\n")
        assert said.has(KV_TOKENS) and not said.has(KV_TOKENS)


def row(case: str, **more: Any) -> dict[str, Any]:
    """The document of a case."""
    plan = {"kv_cache_tokens": 900, "memory": {"weights": 2 << 30, "lora_slots": 1 << 30, "kv_cache": 5 << 30}}
    reported = {"kv_cache_tokens": 1000, "gib": {"model": 3.02, "kv_cache": 5.5, "graphs": 0.75}}
    return {"case": case, "error": None, "plan": plan, "reported": reported, "ratio": 0.9} | more


def test_parts_stand_side_by_side() -> None:
    assert parts(row("a")) == ["3.00/3.02", "–/–", "–/–", "5.00/5.50", "–/0.75"]
    assert parts({"case": "b"}) == ["–/–"] * 5


@pytest.mark.parametrize(("ratio", "holds"), [(0.9499, False), (0.95, True), (1.0, True), (1.0001, False)])
def test_the_verdict(ratio: float, holds: bool) -> None:
    document = to_json([row("a", ratio=ratio), row("b", ratio=0.97)], 2)
    assert document["summary"]["outside"] == ([] if holds else ["a"]) and document["complete"]
    with nullcontext() if holds else pytest.raises(Shortfall, match="1 of 2 predictions"):
        check_verdict(document)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(to_json([row("a", ratio=0.98), {"case": "b", "error": "no plan: it does not fit"}], 3))
    out = capsys.readouterr().out
    assert "900" in out and "1,000" in out and "0.9800" in out and "3.00/3.02" in out
    assert "b: no plan: it does not fit" in out and "it was interrupted" in out


def test_a_plan_that_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_plan(monkeypatch, 810_864)
    keep = tmp_path / "keep"
    bench_plan(
        case=["tiny,rank=8"], command=FAKE, timeout=60, keep=keep, json=True, engine_args=["--max-num-seqs", "9"]
    )
    (found,) = document_of(capsys)["cases"]
    assert (found["ratio"], found["error"]) == (0.99652, None)
    assert found["reported"]["gib"] == {"model": 15.3, "kv_cache": 111.75}
    assert list(found["engine"]["milestones"]) == ["KV cache size", "health"]
    assert found["command"][-6:] == [
        "--gpu-memory-utilization",
        "0.92",
        "--load-format",
        "dummy",
        "--max-num-seqs",
        "9",
    ]
    assert "KV cache size" in (keep / "case-1/engine.out").read_text() and (keep / "case-1/base/config.json").is_file()
    with pytest.raises(UsageError, match="is not empty"):
        bench_plan(case=["tiny"], keep=keep)


def test_the_report_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_plan(monkeypatch, 810_864)
    bench_plan(case=["tiny"], command=FAKE, timeout=60, until_report=True, json=True)
    (found,) = document_of(capsys)["cases"]
    assert list(found["engine"]["milestones"]) == ["KV cache size"] and found["engine"]["left_behind"] == 0


def test_a_promise_that_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_plan(monkeypatch, 813_712)
    out = tmp_path / "out.json"
    with pytest.raises(Shortfall, match="1 of 1 predictions are not") as caught:
        bench_plan(case=["tiny,rank=8"], command=FAKE, timeout=60, out=out)
    assert caught.value.exit_code == 4 and "tiny,rank=8" in caught.value.hint
    assert json.loads(out.read_text())["summary"]["outside"] == ["tiny,rank=8"]
    assert "813,712" in capsys.readouterr().out


def test_an_engine_that_dies_is_told_and_the_next_case_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CRASH", "weights")
    monkeypatch.setenv("FAKE_LAST_WORDS", "CUDA out of memory")
    with pytest.raises(Shortfall, match="2 of 2 cases could not be measured"):
        bench_plan(case=["tiny", "tiny,rank=8"], command=FAKE, timeout=60)
    out = capsys.readouterr().out
    assert out.count("it ended with status 1 before: KV cache size") == 2 == out.count("| CUDA out of memory")


def test_what_the_plan_refuses_is_not_started(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Shortfall, match="1 of 1 cases could not"):
        bench_plan(case=["tiny,rank=9999"], command="false", json=True)
    (found,) = document_of(capsys)["cases"]
    assert "9999 is more than vLLM takes" in found["error"] and "engine" not in found


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(ResourceError, match="starting") as caught:
        bench_plan(case=["tiny"], command="no-such-program")
    assert "no-such-program" in caught.value.message


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "loraport_cli", "bench", "plan", "--set", "cpu", "--out", str(out), "--json"]
    slow = f"{sys.executable} {Path(__file__).with_name('fake_engine.py')}"
    process = subprocess.Popen(
        [*command, "--command", slow], env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not out.exists() and process.poll() is None:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    found, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    document = json.loads(found)
    assert not document["complete"] and document["cases"][0]["case"] == "tiny"
    assert not [child for child in children if child.is_running()]


@pytest.mark.engine
def test_the_real_engine_reports_what_was_planned(capsys: pytest.CaptureFixture[str]) -> None:
    bench_plan(case=["tiny,rank=8,loras=1"], json=True)
    (found,) = document_of(capsys)["cases"]
    assert found["error"] is None and 0.95 <= found["ratio"] <= 1.0
    assert list(found["engine"]["milestones"]) == ["KV cache size", "health"] and found["engine"]["left_behind"] == 0


def test_the_help_names_all_shapes_and_keys() -> None:
    words = set(re.findall(r"[\w.-]*\w", str(bench_plan.__doc__)))
    assert words >= {*SHAPES, *plan_cases.KEYS}
    assert set(re.findall(r"[\w.-]*\w", str(bench_train.__doc__))) >= {*SHAPES}
