"""What a run tells other programs, and the checkpoints that become adapters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.clients.errors import Shortfall, UsageError
from loraport.clients.home import Home
from loraport.train import run as run_module
from loraport.train.adapters import WEIGHTS, adapter_names, open_adapter
from loraport.train.base_model import resolve
from loraport.train.checkpoint_adapters import checkpoint_adapters, restored
from loraport.train.cli import train as command
from loraport.train.config import ResolvedConfig, RunConfig
from loraport.train.data.tokens import Encoder
from loraport.train.loop.checkpoints import is_whole
from loraport.train.loop.lora import load_lora, load_weights
from loraport.train.progress_file import ProgressFile
from loraport.train.proof.golden import greedy_reply
from loraport.train.run import train
from tests.loop import weights_of
from tests.loop_run import run as run_loop
from tests.test_train_run import write_rows
from tests.training import STEPS, Lines, Undisturbed, configure, of, read, stored, train_undisturbed


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return configure(tiny_base, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40))


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return train_undisturbed(config, tmp_path_factory.mktemp("undisturbed"))


def test_the_lines_tell_the_whole_run(config: RunConfig, undisturbed: Undisturbed) -> None:
    _, adapter, lines = undisturbed
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    (start,) = of(lines, "start")
    assert (start["steps"], start["first_step"], start["rows"], start["epochs"]) == (20, 0, 38, 4)
    assert start["run"] == adapter.manifest.run and start["run"]["warmup_steps"] == 1
    assert {"name": "warmup steps", "value": "1", "reason": "5% of 20 steps"} in start["derived"]

    history = json.loads((adapter.folder / "report.json").read_text())["history"]
    logged = [entry for entry in history if "loss" in entry]
    metrics = of(lines, "metrics")
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert [line["train_loss"] for line in metrics] == [entry["loss"] for entry in logged]
    assert [line["train_mean_token_accuracy"] for line in metrics] == [entry["token_accuracy"] for entry in logged]
    assert [line["tokens"] for line in metrics[4::5]] == [start["tokens_to_learn"] * epoch for epoch in (1, 2, 3, 4)]
    assert metrics[-1]["left_s"] == 0 < metrics[0]["left_s"] and metrics[4]["epoch"] == 1
    assert all(line["memory_bytes"] > 2**20 and line["tokens_per_second"] > 0 for line in metrics)
    assert {"learning_rate", "grad_norm", "steps"} <= metrics[0].keys()

    evaluations = of(lines, "evaluation")
    assert [line["step"] for line in evaluations] == STEPS
    assert evaluations[-1]["valid_loss"] == evaluations[-1]["full_valid_loss"] == adapter.manifest.metrics["eval_loss"]
    assert [line["step"] for line in of(lines, "checkpoint")] == STEPS
    assert Path(of(lines, "checkpoint")[0]["folder"]).name == "checkpoint-5"

    phases = of(lines, "phase")
    assert [line["name"] for line in phases[::2]] == [line["name"] for line in phases[1::2]]
    assert all("seconds" not in begun and over["seconds"] >= 0 for begun, over in zip(phases[::2], phases[1::2]))  # noqa: B905
    assert {"loading the base", "training", "golden replies"} <= {line["name"] for line in phases}

    last = lines[-1]
    assert (last["type"], last["name"], last["version"]) == ("adapter", "colours", "v1")
    assert (last["folder"], last["up_to_date"]) == (str(adapter.folder), False)
    assert last["trained_tokens"] == metrics[-1]["tokens"] and last["metrics"] == adapter.manifest.metrics


def test_a_steps_accuracy_is_that_of_the_evaluation_before_it(tmp_path: Path) -> None:
    """All rows in each step, the same rows to evaluate on: what a step sees are the weights of the step before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.loop_run.ToyRows", lambda *_: rows)
        from tests.loop import ToyRows

        rows = ToyRows(6)
        _, outcome = run_loop(
            tmp_path, batch_size=6, epochs=8, eval_steps=1, save_steps=8, dropout=0.0, learning_rate=0.1
        )
    seen = [entry["token_accuracy"] for entry in outcome.history if "token_accuracy" in entry]
    after = [entry["eval_token_accuracy"] for entry in outcome.history if "eval_token_accuracy" in entry]
    assert seen[1:] == pytest.approx(after[:-1]) and max(seen) > 0.05
    targets = sum(int((rows[row]["labels"][1:] != -100).sum()) for row in range(6))
    assert outcome.metrics["trained_tokens"] == 8 * targets


def test_checkpoints_become_adapters_that_answer_by_themselves(config: RunConfig, undisturbed: Undisturbed) -> None:
    home, adapter, lines = undisturbed
    found = checkpoint_adapters(home, adapter)
    assert [(each.manifest.name, each.manifest.step) for each in found] == [
        ("colours.step-10", 10),
        ("colours.step-15", 15),
    ]
    told = lines[-1]["checkpoints"]
    assert [(each["name"], each["step"], each["folder"]) for each in told] == [
        (each.manifest.name, each.manifest.step, str(each.folder)) for each in found
    ]
    evaluated = {line["step"]: line for line in of(lines, "evaluation")}
    stepped = {line["step"]: line for line in of(lines, "metrics")}
    assert adapter.manifest.step is None and len({*stored(home).values()}) == 3
    model = load_lora(resolve(config.model), ResolvedConfig.model_validate(adapter.manifest.run))
    encoder = Encoder.load(resolve(config.model).folder)
    for each, document in zip(found, told, strict=True):
        manifest = open_adapter(home, each.manifest.name).manifest
        step = manifest.step
        assert manifest.metrics["eval_loss"] == document["metrics"]["eval_loss"] == evaluated[step]["valid_loss"]
        assert manifest.metrics["train_loss"] == stepped[step]["train_loss"]
        assert manifest.metrics["trained_tokens"] == stepped[step]["tokens"]
        assert manifest.golden != adapter.manifest.golden
        load_weights(model.eval(), each.folder)
        for golden in manifest.golden:
            assert greedy_reply(model, encoder, golden.prompt_tokens, len(golden.adapter.tokens)) == golden.adapter


def test_the_runs_own_adapter_does_not_depend_on_its_checkpoints(
    config: RunConfig, home: Home, undisturbed: Undisturbed
) -> None:
    """Its fingerprint is the same too: what is stored beside a version is no part of it."""
    alone = train(config.model_copy(update={"checkpoint_adapters": 0}), home)
    wanted = undisturbed[1]
    assert (alone.folder / WEIGHTS).read_bytes() == (wanted.folder / WEIGHTS).read_bytes()
    assert alone.manifest.golden == wanted.manifest.golden and alone.manifest.fingerprint == wanted.manifest.fingerprint
    assert adapter_names(home) == ["colours"] and checkpoint_adapters(home, alone) == []


def test_an_up_to_date_run_tells_the_same_again(config: RunConfig, undisturbed: Undisturbed, tmp_path: Path) -> None:
    home, _, lines = undisturbed
    path = tmp_path / "progress.jsonl"
    with pytest.raises(Shortfall):
        train(config.model_copy(update={"require": ("success>=1.1",)}), home, file=ProgressFile(path))
    (line,) = read(path)
    different = ("at", "up_to_date")
    assert line["up_to_date"] is True
    assert {k: v for k, v in line.items() if k not in different} == {
        k: v for k, v in lines[-1].items() if k not in different
    }


@pytest.mark.parametrize("path", ["/dev/full", "{}/no folder/progress.jsonl"])
def test_a_file_that_cannot_be_written_costs_a_warning(
    path: str, config: RunConfig, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = config.model_copy(update={"epochs": 1, "checkpoint_adapters": 0})
    assert train(short, home, file=ProgressFile(Path(path.format(tmp_path)))).manifest.version == "v1"
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_line_that_was_cut_off_takes_none_with_it(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text('{"at": 1, "type": "metr')
    ProgressFile(path).write("metrics", train_loss=float("nan"), grad_norm=float("inf"), text="\udc80 …")
    ProgressFile(path).write("checkpoint", step=3, folder=tmp_path)
    cut, first, second = path.read_text().splitlines()
    assert cut == '{"at": 1, "type": "metr'
    assert json.loads(first) | {"at": 0} == {
        "at": 0,
        "type": "metrics",
        "train_loss": None,
        "grad_norm": None,
        "text": "\udc80 …",
    }
    assert json.loads(second)["folder"] == str(tmp_path)


def test_a_pipe_that_nobody_empties_does_not_hold_the_run_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    file = ProgressFile(tmp_path / "pipe")
    for _ in range(200):
        file.write("phase", name="x" * 1000)
    assert json.loads(os.read(reader, 2000).splitlines()[0])["name"] == "x" * 1000
    assert "cannot be written" in capsys.readouterr().err
    os.close(reader)


def test_names_of_checkpoints_must_fit(config: RunConfig, home: Home) -> None:
    with pytest.raises(UsageError, match="too long for --checkpoint-adapters"):
        train(config.model_copy(update={"name": "n" * 52}), home)


def start_command(config: RunConfig, path: Path, *more: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "loraport_cli", "train", "--model", config.model, "--data", str(config.data)]
    line += ["--name", "colours", "--batch-size", "8", "--resume-or-start", "--json", "--progress", str(path), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_sigterm_leaves_a_checkpoint_and_says_so(config: RunConfig, home: Home, tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    process = start_command(config, path, "--epochs", "100000")
    while process.poll() is None and not (path.exists() and of(read_whole(path), "checkpoint")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    *_, checkpoint, stopped = read(path)
    assert out == "" and (stopped["type"], stopped["signal"], stopped["step"]) == (
        "stopped",
        "SIGTERM",
        checkpoint["step"],
    )
    assert checkpoint["type"] == "checkpoint" and is_whole(Path(checkpoint["folder"]))
    assert not list(home.adapters.rglob("*"))


def read_whole(path: Path) -> Lines:
    """The lines that are there already."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


BAD_ROW = {"messages": [{"role": "user", "content": "a?"}, {"role": "nobody", "content": "b"}]}


@pytest.mark.parametrize(
    ("settings", "bad_row", "expected"),
    [
        ({}, 7, {"kind": "DataError", "exit_code": 3, "row": 7, "param": None}),
        ({"sequence_length": 16}, None, {"kind": "DataError", "row": 1}),
        ({"rank": 1000}, None, {"kind": "ConfigError", "exit_code": 2, "param": "rank", "row": None}),
        ({"target_modules": ["nose"]}, None, {"kind": "ConfigError", "param": "target_modules"}),
        ({"eval_steps": 2, "save_steps": 3}, None, {"kind": "ConfigError", "param": "save_steps"}),
        ({"data": "/nowhere.jsonl"}, None, {"kind": "UsageError", "param": None}),
        ({"model": "/nowhere"}, None, {"kind": "BaseModelError", "exit_code": 3}),
        ({"require": ["success>=1.1"]}, None, {"kind": "Shortfall", "exit_code": 4}),
        ({"force": True}, None, {"kind": "UsageError", "exit_code": 2}),
    ],
    ids=str,
)
def test_an_error_is_told_with_all_that_is_known(
    settings: dict[str, Any], bad_row: int | None, expected: dict[str, Any], config: RunConfig, tmp_path: Path
) -> None:
    path, data = tmp_path / "progress.jsonl", write_rows(tmp_path / "rows.jsonl")
    if bad_row:
        lines = data.read_text().splitlines()
        lines[bad_row - 1] = json.dumps(BAD_ROW)
        data.write_text("\n".join(lines))
    given: dict[str, Any] = {"model": config.model, "data": str(data), "epochs": 1, "force": False} | settings
    with pytest.raises(Exception) as raised:  # its class is what the line says
        command(None, resume=False, json=True, resume_or_start=True, progress=path, **given)
    line = read(path)[-1]
    assert line["type"] == "error" and line["message"] == str(raised.value) and "hint" in line
    assert type(raised.value).__name__ == line["kind"]
    assert {key: line[key] for key in expected} == expected
    assert line["file"] == (str(data) if line["row"] else None)
    if expected["kind"] == "Shortfall":
        assert read(path)[-2]["type"] == "adapter"


def test_a_bug_is_told_with_where_it_arose(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("oh")

    monkeypatch.setattr(run_module, "resolve", broken)
    with pytest.raises(KeyError):
        command(None, False, False, True, progress=tmp_path / "p.jsonl", model=config.model, data=str(config.data))
    (line,) = read(tmp_path / "p.jsonl")
    assert (line["kind"], line["exit_code"]) == ("LoraportError", 1) and "KeyError: 'oh'" in line["message"]
    assert any("in broken" in detail for detail in line["details"])


def test_ctrl_c_before_the_training_is_told(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "resolve", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        command(None, False, False, True, progress=tmp_path / "p.jsonl", model=config.model, data=str(config.data))
    (line,) = read(tmp_path / "p.jsonl")
    assert (line["type"], line["signal"], line["step"]) == ("stopped", "SIGINT", None)


def test_the_document_lists_the_checkpoints(
    config: RunConfig, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    home, _, lines = undisturbed
    monkeypatch.setenv("LORAPORT_HOME", str(home.root))
    given = config.model_dump(mode="json", exclude_defaults=True) | {"data": str(config.data)}
    command(None, False, False, True, resume_or_start=True, **given)
    document = json.loads(capsys.readouterr().out)
    assert document["checkpoints"] == lines[-1]["checkpoints"] and document["name"] == "colours"
    command(None, False, False, False, resume_or_start=True, **given)
    assert "colours.step-10 v1  eval loss" in capsys.readouterr().err


def test_weights_are_exchanged_in_place_and_put_back(config: RunConfig, undisturbed: Undisturbed) -> None:
    """No second set of parameters on the device: those of the model keep their memory."""
    home, adapter, _ = undisturbed
    model = load_lora(resolve(config.model), ResolvedConfig.model_validate(adapter.manifest.run))
    load_weights(model, adapter.folder)
    places, final = {name: each.data_ptr() for name, each in model.named_parameters()}, weights_of(model)
    with restored(model, adapter.folder):
        load_weights(model, checkpoint_adapters(home, adapter)[0].folder)
        assert any(not torch.equal(each, final[name]) for name, each in weights_of(model).items())
    assert all(torch.equal(each, final[name]) for name, each in weights_of(model).items())
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == places
