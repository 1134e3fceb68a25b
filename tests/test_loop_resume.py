"""A run that is killed and continued gives the same bytes as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from loraport.train.loop import fit as fit_module
from loraport.train.loop.checkpoints import is_whole, step_of, whole
from tests.conftest import ROOT
from tests.loop import weights_of
from tests.loop_run import learned, run

PAUSE = "0.15"


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.loop_run", str(folder), *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Until it has happened; fails when the process ends before."""
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    words = process.communicate(timeout=120)[1]
    assert process.returncode == code, words
    return words


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder))
    return folder


@pytest.mark.parametrize("moment", ["in a step", "in a checkpoint"])
def test_a_killed_run_goes_on_to_the_same_bytes(moment: str, tmp_path: Path, whole_run: Path) -> None:
    if moment == "in a step":
        process = start(tmp_path, "--pause", PAUSE)
        wait_for(process, lambda: is_whole(tmp_path / "checkpoint-3"))
        time.sleep(random.uniform(0, 6 * float(PAUSE)))
        process.send_signal(signal.SIGKILL)
        finish(process, -signal.SIGKILL)
    else:
        finish(start(tmp_path, "--die-in-checkpoint", "9"), -signal.SIGKILL)
        assert [step_of(path) for path in whole(tmp_path)] == [3, 6]
        assert (tmp_path / "checkpoint-9/optimizer.pt").exists()
    assert not (tmp_path / "weights.safetensors").exists()

    finish(start(tmp_path, "--resume"))
    for file in ("weights.safetensors", "checkpoint-12/adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (whole_run / file).read_bytes()
    history = json.loads((tmp_path / "history.json").read_text())
    assert history == json.loads((whole_run / "history.json").read_text())
    assert len(history) == 12 + 4  # steps and evaluations


class Signal(TrainerCallback):
    """Sends this process a signal within a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_can_go_on(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "stopped", callbacks=(Signal(number, 5),))
    assert ended.value.code == 128 + number
    assert [step_of(path) for path in whole(tmp_path / "stopped")] == [3, 5]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "stopped after step 5; go on with --resume" in capsys.readouterr().err

    model, outcome = run(tmp_path / "stopped", resume=True)
    unhindered, expected = run(tmp_path / "whole")
    assert learned(outcome.history) == learned(expected.history)
    assert outcome.metrics["train_loss"] == expected.metrics["train_loss"]
    assert all(torch.equal(each, weights_of(unhindered)[name]) for name, each in weights_of(model).items())


class LateSignal(Signal):
    """Sends it when the step is nearly done."""

    on_step_begin = TrainerCallback.on_step_begin
    on_pre_optimizer_step = Signal.on_step_begin


def test_a_signal_late_in_a_step_ends_with_that_step(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, callbacks=(LateSignal(signal.SIGTERM, 5),))
    assert [step_of(path) for path in whole(tmp_path)] == [3, 5]


def test_the_checkpoint_of_a_signal_is_kept_beside_the_best(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, callbacks=(Signal(signal.SIGTERM, 5),), keep_checkpoints=1, learning_rate=1e-9)
    assert [step_of(path) for path in whole(tmp_path)][-1] == 5


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "--pause", "60")
    assert process.stderr is not None
    wait_for(process, tmp_path.joinpath("begun").exists)
    process.send_signal(signal.SIGINT)
    assert "once more to stop at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1] and process.returncode != 0
    assert not whole(tmp_path)


def test_a_signal_to_the_process_and_its_group_is_one(tmp_path: Path) -> None:
    """As `timeout` sends it; and on several GPUs it comes from the process that started this one as well."""
    with pytest.raises(SystemExit):
        run(tmp_path, callbacks=(Signal(signal.SIGTERM, 5), Signal(signal.SIGTERM, 5)))
    assert [step_of(path) for path in whole(tmp_path)] == [3, 5]


class LastSignal(Signal):
    """Sends it while the last weights are evaluated."""

    on_step_begin = TrainerCallback.on_step_begin
    on_evaluate = Signal.on_step_begin


def test_a_signal_behind_the_last_step_ends_the_run_too(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, callbacks=(LastSignal(signal.SIGTERM, 13),))
    _, outcome = run(tmp_path, resume=True)
    assert outcome.metrics["steps"] == 12 and len(learned(outcome.history)) == 12 + 4


def test_a_signal_before_the_first_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fit_module.make_trainer

    def make(*given: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return own(*given)

    monkeypatch.setattr(fit_module, "make_trainer", make)
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert [step_of(path) for path in whole(tmp_path)] == [1]


class Evaluated(TrainerCallback):
    """Notes how far evaluations are."""

    trainer: Any = None

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(self.trainer.evaluated)


def test_an_evaluation_tells_how_far_it_is(tmp_path: Path) -> None:
    watching = Evaluated()
    run(tmp_path, callbacks=(watching,), epochs=1)
    total = watching.seen[0][1]
    assert total > 1 and watching.seen[:total] == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize(("settings", "steps"), [({"epochs": 1}, 4), ({"max_steps": 6}, 6)])
def test_a_finished_run_is_not_trained_further(settings: dict[str, int], steps: int, tmp_path: Path) -> None:
    model, outcome = run(tmp_path, **settings)
    again, resumed = run(tmp_path, resume=True, **settings)
    assert resumed.metrics["steps"] == outcome.metrics["steps"] == steps
    for figure in ("train_loss", "eval_loss", "best_step"):
        assert resumed.metrics[figure] == outcome.metrics[figure]
    assert all(torch.equal(each, weights_of(model)[name]) for name, each in weights_of(again).items())
