"""A run that is killed at any moment, and called again with the same command, makes one version: the same bytes."""

import json
import os
import random
import signal
import time
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.clients.errors import ConfigError, ResourceError, UsageError
from loraport.clients.home import Home
from loraport.train import checkpoint_adapters as checkpoint_adapters_module
from loraport.train import run as run_module
from loraport.train.adapters import Adapter, publish
from loraport.train.checkpoint_adapters import checkpoint_adapters, choose
from loraport.train.cli import train as command
from loraport.train.config import RunConfig
from loraport.train.loop.checkpoints import run_folder, seal, step_of, whole
from loraport.train.progress_file import ProgressFile
from loraport.train.run import train
from tests.loop_run import learned
from tests.test_train_run import write_rows
from tests.training import STEPS, Undisturbed, configure, of, read, stored, train_undisturbed


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return configure(tiny_base, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40))


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return train_undisturbed(config, tmp_path_factory.mktemp("undisturbed"))


CHILDREN = get_context("forkserver")  # processes that need no seconds to import torch
CHILDREN.set_forkserver_preload(["tests.test_train_killed", "loraport.train.loop.launch", "peft"])


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def then_kill(*given: Any) -> None:
    publish(*given)
    kill()


def seal_then_ask(checkpoint: Path, identity: dict[str, Any]) -> None:
    """A SIGTERM when the first checkpoint is whole: the next is that of the signal."""
    seal(checkpoint, identity)
    if step_of(checkpoint) == 5:
        os.kill(os.getpid(), signal.SIGTERM)


def seal_one(second: signal.Signals, checkpoint: Path, identity: dict[str, Any]) -> None:
    """As before, and the second signal when all but the seal of that one is written."""
    if step_of(checkpoint) > 5:
        os.kill(os.getpid(), second)
    seal_then_ask(checkpoint, identity)


# What a child does otherwise: (module, name, instead).
Patch = tuple[str, str, Any]
RUN, STORE, TRAINER = "loraport.train.run", "loraport.train.checkpoint_adapters", "loraport.train.loop.trainer"
STOPPED: Patch = (TRAINER, "seal", seal_then_ask)


def train_patched(config: RunConfig, home: Home, *patches: Patch) -> None:
    torch.set_num_threads(1)
    for module, name, instead in patches:
        setattr(import_module(module), name, instead)
    train(config, home, resume_or_start=True)


def start(config: RunConfig, home: Home, *patches: Patch) -> BaseProcess:
    """A run in a process of its own."""
    process = CHILDREN.Process(target=train_patched, args=(config, home, *patches))
    process.start()
    return process


def end_of(process: BaseProcess) -> int:
    """Its exit code; -n where signal n ended it."""
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def assert_as_undisturbed(home: Home, adapter: Adapter, undisturbed: Undisturbed) -> None:
    """One version of each adapter, of the same bytes, with the same history; and nothing is left over."""
    wanted = undisturbed[1]
    assert stored(home) == stored(undisturbed[0])
    histories = [json.loads((each.folder / "report.json").read_text())["history"] for each in (adapter, wanted)]
    assert learned(histories[0]) == learned(histories[1])
    assert adapter.manifest.golden == wanted.manifest.golden
    for found, expected in zip(checkpoint_adapters(home, adapter), checkpoint_adapters(*undisturbed[:2]), strict=True):
        assert found.manifest.golden == expected.manifest.golden
        assert found.manifest.metrics == expected.manifest.metrics
    assert not list(home.adapters.rglob(".partial-*")) and not list((home.root / "runs").iterdir())


def test_a_command_that_is_killed_at_any_moment_makes_one_version(
    config: RunConfig, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """SIGKILL and SIGTERM at random moments, several times a run; then the same command comes to its end."""
    lines, moments, ended = undisturbed[2], [], set()
    seconds = lines[-1]["at"] - lines[0]["at"]
    dice = random.Random()  # a run seeds the usual one
    for number in range(3):
        home = Home(tmp_path / f"home-{number}")
        for _ in range(3):
            process = start(config, home)
            how, moment = dice.choice([signal.SIGKILL, signal.SIGTERM]), dice.uniform(0, seconds)
            moments.append((how.name, round(moment, 2)))
            time.sleep(moment)
            process.kill() if how == signal.SIGKILL else process.terminate()
            ended.add(end_of(process))
        adapter = train(config, home, resume_or_start=True)
        try:
            assert_as_undisturbed(home, adapter, undisturbed)
        except AssertionError as error:
            raise AssertionError(f"killed at {moments}") from error
    assert ended <= {0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM}


MOMENTS: dict[str, tuple[Patch, list[str]]] = {
    "between two checkpoints": ((STORE, "publish", then_kill), ["colours.step-10@v1"]),
    "before the version": ((RUN, "publish", kill), ["colours.step-10@v1", "colours.step-15@v1"]),
    "behind the version": ((RUN, "publish", then_kill), ["colours.step-10@v1", "colours.step-15@v1", "colours@v1"]),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_while_it_stores_ends_as_one_that_was_not(
    moment: str, config: RunConfig, home: Home, undisturbed: Undisturbed
) -> None:
    patch, there = MOMENTS[moment]
    assert end_of(start(config, home, patch)) == -signal.SIGKILL
    assert sorted(stored(home)) == there and whole(run_folder(home, "colours"))
    assert_as_undisturbed(home, train(config, home, resume_or_start=True), undisturbed)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_signal_while_the_checkpoint_is_written_leaves_the_last_one(
    second: signal.Signals, config: RunConfig, home: Home, undisturbed: Undisturbed
) -> None:
    patches = (TRAINER, "seal", partial(seal_one, second)), ("loraport.train.loop.fit", "SAME_SIGNAL_S", 0.0)
    assert end_of(start(config, home, *patches)) == -second
    runs = run_folder(home, "colours")
    assert [step_of(path) for path in whole(runs)] == [5] and (runs / "checkpoint-6").exists()
    assert_as_undisturbed(home, train(config, home, resume_or_start=True), undisturbed)


def test_a_signals_checkpoint_is_none_of_those_that_are_kept(config: RunConfig, home: Home) -> None:
    """It goes when the next is whole, so that what becomes an adapter does not depend on it."""
    assert end_of(start(config, home, STOPPED)) == 128 + signal.SIGTERM
    runs = run_folder(home, "colours")
    history = json.loads((runs / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert [step_of(path) for path in choose(runs, history, 3)] == [5]
    kept = []

    def removed(folder: Path) -> None:
        kept.extend(step_of(path) for path in whole(folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "clear", removed)
        train(config, home, resume=True)
    assert kept == STEPS


def test_resume_or_start_begins_anew_where_the_settings_are_others(
    config: RunConfig, home: Home, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert end_of(start(config, home, STOPPED)) == 128 + signal.SIGTERM
    other = config.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(ConfigError):
        train(other, home, resume=True)
    with pytest.raises(UsageError, match="was ended after step 6"):
        train(config, home)
    path = tmp_path / "progress.jsonl"
    adapter = train(other, home, resume_or_start=True, file=ProgressFile(path))
    said = " ".join(capsys.readouterr().err.split())
    assert "learning_rate (0.01 to 0.001) changed since. It begins anew." in said and "continuing" not in said
    assert of(read(path), "start")[0]["first_step"] == 0 and adapter.manifest.run["learning_rate"] == 1e-3


def test_another_process_may_have_made_it_meanwhile(
    config: RunConfig, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended between the first look and the lock."""
    own = run_module.say_inputs

    def said(*given: Any) -> None:
        own(*given)
        monkeypatch.setattr(run_module, "say_inputs", own)
        train(config, home)

    monkeypatch.setattr(run_module, "say_inputs", said)
    assert train(config, home, resume_or_start=True).manifest.version == "v1"


def test_a_disk_that_fills_up_while_a_checkpoint_is_stored_keeps_the_run(
    config: RunConfig, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise ResourceError("no disk space left.")

    with monkeypatch.context() as patch, pytest.raises(ResourceError):
        patch.setattr(checkpoint_adapters_module, "publish", full)
        train(config, home)
    assert stored(home) == {} and not list(home.adapters.rglob(".partial-*"))
    assert train(config, home, resume_or_start=True).manifest.version == "v1"


def test_resume_or_start_stands_alone() -> None:
    for other in ({"force": True, "resume": False}, {"force": False, "resume": True}):
        with pytest.raises(UsageError, match="--resume-or-start chooses by itself"):
            command(None, json=False, resume_or_start=True, **other)
