"""`loraport bench train`: what is measured, that a run that fails is a line, and that all measure the same thing."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraport.bench.training.cases import (
    CASES,
    SHAPES,
    default_cases,
    limit_tokens_per_second,
    parameters,
    row_lengths,
    step_rows,
)
from loraport.bench.training.report import print_report, summarize, to_json
from loraport.bench.training.runner import Comparison, Contender, Plan
from loraport.bench.training.worker import Worker
from loraport.clients.errors import UsageError

CASE = CASES["nf4-r16-4096-full"]
OURS, STOCK = Contender("ours"), Contender("stock")


def test_natural_rows_are_many_short_and_few_long_ones() -> None:
    lengths = row_lengths(CASE, "natural", 4000)
    assert lengths == row_lengths(CASE, "natural", 4000) != row_lengths(CASE, "natural", 4000, seed=1)
    assert 320 < statistics.median(lengths) < 380 and 450 < statistics.mean(lengths) < 510
    assert min(lengths) >= 16 and max(lengths) == CASE.row_tokens
    assert set(row_lengths(CASE, "full", 5)) == {CASE.row_tokens}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_whole_micro_batches_of_about_the_same_tokens(name: str) -> None:
    case = CASES[name]
    for rows in ("full", "natural"):
        count = step_rows(case, rows)  # type: ignore[arg-type]
        assert count % case.micro_rows == 0
        tokens = sum(row_lengths(case, rows, 100 * count)) / 100  # type: ignore[arg-type]
        assert tokens == pytest.approx(min(16_384, 16 * case.row_tokens), rel=0.3)


def test_shapes_have_the_parameters_of_their_models() -> None:
    published = {
        "mistral-7b": 7_241_732_096,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248,
        "qwen3-1.7b": 1_720_574_976,
        "qwen3-4b": 4_022_468_096,
        "qwen3-8b": 8_190_735_360,
        "qwen3-14b": 14_768_307_200,
        "mistral-small-24b": 23_572_403_200,
        "qwen3-32b": 32_762_123_264,
        "llama-65b": 65_285_660_672,
        "tiny": 106_816,
    }
    assert {name: parameters(shape) for name, shape in SHAPES.items()} == published


def test_the_limit_is_that_of_the_baselines() -> None:
    assert limit_tokens_per_second(SHAPES["mistral-7b"], 790e12) == pytest.approx(27_000, rel=0.02)
    assert limit_tokens_per_second(SHAPES["mistral-7b"], None) is None


def test_contenders_take_turns() -> None:
    plan = Plan("tiny", ["a", "b"], ["full"], [OURS, STOCK], repeats=2)
    order = [(repeat, case, contender.name) for repeat, case, _, contender in plan.runs()]
    assert order[:4] == [(0, "a", "ours"), (0, "a", "stock"), (0, "b", "ours"), (0, "b", "stock")]
    assert len(order) == 8


def test_all_contenders_are_told_the_same() -> None:
    plan = Plan("tiny", [CASE.name], ["natural"], [OURS, STOCK])
    ours, stock = (plan.spec(CASE.name, "natural", contender) for contender in plan.contenders)
    assert {key for key in ours if ours[key] != stock[key]} == {"contender"}


def test_contenders_are_read_from_words() -> None:
    ours = Contender.parse("ours:checkpointing=half,micro_batch_tokens=8192")
    assert ours.settings == (("checkpointing", "half"), ("micro_batch_tokens", 8192))
    assert ours.name == "ours:checkpointing=half,micro_batch_tokens=8192"
    for wrong, words in (("axolotl", "no contender"), ("stock:rank=8", "ours alone"), ("ours:half", "key=value")):
        with pytest.raises(UsageError, match=words):
            Contender.parse(wrong)


def test_a_process_that_crashes_is_a_result_with_its_last_words() -> None:
    result = Worker("loraport.train.loop.measure", {"nonsense": 1}).result(60)
    assert result["error"] == "ended with exit code 1"
    assert "KeyError" in result["log"][-1] and result["seconds"] >= 0


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module for workers to run; returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def write(code: str) -> str:
        (tmp_path / "program.py").write_text(code)
        return "program"

    return write


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import time; time.sleep(600)", "took longer than 0 s"),
        ("import signal; signal.raise_signal(9)", "ended by signal 9"),
        ("print('no result')", "ended with exit code 0"),
    ],
)
def test_a_process_without_a_result_is_ended_and_explained(program: Any, code: str, error: str) -> None:
    worker = Worker(program(code), {"a": 1})
    result = worker.result(0.3 if "longer" in error else 60)
    assert result["error"] == error and worker.process.returncode is not None
    assert not worker.log.exists()


WAITING = """
import json, sys
spec = json.load(open(sys.argv[1]))
word = sys.stdin.readline()
json.dump({"word": word}, open(spec["out"], "w"))
"""


def test_a_worker_that_waits_is_told_to_go(program: Any) -> None:
    worker = Worker(program(WAITING), {"a": 1}, waits=True)
    assert worker.process.poll() is None
    assert worker.result(60)["word"] == "go\n"
    ended = Worker(program(WAITING), {"a": 1}, waits=True)
    ended.end()
    assert ended.process.returncode == -15


def test_the_next_worker_is_started_early_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ended when it is not wanted any more."""
    log: list[str] = []

    class Fake:
        def __init__(self, module: str, spec: dict[str, Any], gpus: int, waits: bool, variables: Any) -> None:
            assert waits and bool(variables) == (spec["contender"] == "ours")
            self.name = f"{spec['contender']} {spec['load']}"
            log.append(f"start {self.name}")

        def result(self, longest: float) -> dict[str, Any]:
            log.append(f"result {self.name}")
            if "bf16" in self.name:
                raise KeyboardInterrupt
            return {"tokens_per_second": 1.0}

        def end(self) -> None:
            log.append(f"end {self.name}")

    monkeypatch.setattr("loraport.bench.training.runner.Worker", Fake)
    plan = Plan("tiny", ["nf4-r8-1024-off", "bf16-r16-4096-off"], ["full"], [OURS, Contender("trl"), STOCK], repeats=1)
    run = Comparison(plan, environment={"matmul_flops": 1e12, "versions": {}})
    with pytest.raises(KeyboardInterrupt):
        run.measure_all()
    assert log == [
        *("start ours nf4", "start stock nf4", "result ours nf4"),
        *("start ours bf16", "result stock nf4"),
        *("start stock bf16", "result ours bf16", "end stock bf16"),
    ]
    assert [result["contender"] for result in run.results] == ["ours", "trl", "stock"]


def measured(contender: str, speed: float, repeat: int = 0, **more: Any) -> dict[str, Any]:
    known = {"repeat": repeat, "case": CASE.name, "rows": "full", "contender": contender}
    return known | {"tokens_per_second": speed, "peak_allocated": 2**30, "peak_reserved": 2**31, "seconds": 1.0} | more


@pytest.fixture
def comparison() -> Comparison:
    """Two repeats of which one ran out of memory, and a contender that is not installed."""
    contenders = [STOCK, OURS, Contender("trl")]
    run = Comparison(Plan("mistral-7b", [CASE.name], ["full"], contenders, repeats=3))
    run.environment = {"device": "H200", "matmul_flops": 790e12, "versions": {"torch": "2.11.0"}}
    known = {"case": CASE.name, "rows": "full"}
    run.results = [
        *(measured("stock", speed) for speed in (6900.0, 7000.0, 7100.0)),
        measured("ours", 14000.0, peak_reserved=3 * 2**30, planned_reserved=3.2 * 2**30),
        measured("ours", 14200.0),
        known | {"contender": "ours", "repeat": 2, "error": "out of memory"},
        known | {"contender": "trl", "repeat": 0, "skipped": "trl is not installed"},
    ]
    return run


def test_figures_are_medians_and_the_largest_peak(comparison: Comparison) -> None:
    stock, ours, trl = summarize(comparison)[CASE.name, "full"]
    assert (stock.tokens_per_second, stock.slowest, stock.fastest, stock.repeats) == (7000, 6900, 7100, 3)
    assert (ours.tokens_per_second, ours.repeats, ours.reason) == (14100, 2, "out of memory")
    assert ours.peak_reserved == 3 * 2**30
    assert (trl.tokens_per_second, trl.reason) == (None, "trl is not installed")


def test_the_table(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(comparison)
    told = capsys.readouterr().out
    assert "mistral-7b, 7.24B parameters, on H200" in told and "limit 27,272 tokens/s" in told
    assert "not complete" in told  # of three repeats of trl two were not started
    row = next(line for line in told.splitlines() if line.startswith("ours"))
    assert row.split() == ["ours", "14,100", "14,000–14,200", "2.01", "52%", "1.0", "3.0", "3.2"]
    assert "  ours: out of memory" in told and "  trl: trl is not installed" in told
    assert max(map(len, told.splitlines())) <= 110


def test_the_document(comparison: Comparison) -> None:
    document = json.loads(json.dumps(to_json(comparison)))
    ours = next(entry for entry in document["summary"] if entry["contender"] == "ours")
    assert (ours["times_stock"], ours["share_of_limit"]) == (2.014, 0.517)
    assert document["shape"]["parameters"] == 7_241_732_096 and not document["complete"]
    assert document["runs"] == comparison.results and document["environment"]["device"] == "H200"


def test_ours_and_stock_train_the_same_thing_on_a_cpu(tmp_path: Path) -> None:
    """The real programs on the tiny shape: same weights, rows and steps, so the same losses."""
    line = [sys.executable, "-m", "loraport_cli", "bench", "train", "--json", "--shape", "tiny", "--rows", "natural"]
    line += ["--contender", "stock", "--contender", "ours", "--contender", "stock-liger", "--repeats", "1"]
    line += ["--steps", "2", "--warmup", "1", "--case", "fp32-r8-64-full", "--case", "nf4-r8-1024-off"]
    done = subprocess.run([*line, "--out", tmp_path / "out.json"], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "out.json").read_text()) and document["complete"]
    assert document["bench"] == "train" and document["definitions"]
    assert {"at", "processor", "cores", "gpus", "command"} <= document["environment"].keys()  # as of all benches
    stock, ours, liger, *nf4 = document["runs"]
    assert ours["losses"] == pytest.approx(stock["losses"], abs=2e-3) and len(ours["losses"]) == 3
    assert ours["step_tokens"] == stock["step_tokens"] and len(ours["step_tokens"]) == 2
    assert ours["trainable_parameters"] == stock["trainable_parameters"]
    assert ours["settings"] == {"micro_batch_tokens": 256, "checkpointed_layers": 2, "offload": False, "sharded": False}
    assert ours["planned_reserved"] > ours["planned_allocated"] > 0
    assert liger["skipped"].startswith("liger-kernel")
    assert {run["skipped"] for run in nf4} == {"nf4 needs a GPU"}
    assert "ours: " in done.stderr


def test_ours_on_two_gpus_takes_twice_the_rows(tmp_path: Path) -> None:
    """Here two processes on a CPU, as torchrun starts them; the losses are those of one with as many rows a step."""
    plan = Plan("tiny", ["fp32-r8-64-full"], ["natural"], [OURS, STOCK], repeats=1, warmup=1, steps=1, gpus=2)
    run = Comparison(plan, environment={"device": "CPU", "matmul_flops": None, "versions": {}})
    spec, one = (replace(plan, gpus=gpus).spec("fp32-r8-64-full", "natural", OURS) for gpus in (2, 1))
    assert spec["step_rows"] == 2 * one["step_rows"] and len(spec["lengths"]) == 2 * len(one["lengths"])
    run.measure_all()
    both, stock = run.results
    alone = Worker("loraport.train.loop.measure", spec).result(600)
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-4) and both["step_tokens"] == alone["step_tokens"]
    assert stock["skipped"] == "peers are measured on one GPU"


@pytest.mark.parametrize("flags", [["--shape", "gpt-5"], ["--case", "int3"], ["--rows", "few"], ["--contender", "me"]])
def test_what_is_not_there_is_told_with_what_is(flags: list[str]) -> None:
    line = [sys.executable, "-m", "loraport_cli", "bench", "train", *flags]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and "error: there is no " in done.stderr and "hint: there are " in done.stderr


def test_the_random_base_is_whole() -> None:
    import torch

    from loraport.train.loop.random_base import random_base

    base, again = (random_base(SHAPES["tiny"], "fp32", "cpu") for _ in range(2))
    assert sum(p.numel() for p in base.parameters()) == parameters(SHAPES["tiny"])
    assert not any(tensor.is_meta for tensor in [*base.parameters(), *base.buffers()])
    assert not any(parameter.requires_grad for parameter in base.parameters())
    ids = torch.arange(8)[None]
    torch.testing.assert_close(base(input_ids=ids).logits, again(input_ids=ids).logits)


def test_a_random_base_in_nf4_is_quantised_layer_by_layer() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from loraport.train.loop.random_base import random_base

    base = random_base(SHAPES["tiny"], "nf4", "cpu")
    linear = base.model.layers[0].mlp.down_proj
    assert isinstance(linear, bitsandbytes.nn.Linear4bit) and linear.weight.quant_state.nested
    assert not isinstance(base.lm_head, bitsandbytes.nn.Linear4bit)
    assert linear.weight.numel() == 64 * 128 // 2 and base.is_loaded_in_4bit


def test_a_gpu_and_a_cpu_have_their_own_cases() -> None:
    assert set(default_cases(True)) | set(default_cases(False)) == set(CASES)
    assert len(default_cases(True)) == 6
