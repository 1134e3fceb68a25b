"""Checkpoints: whole or not there, of this run or refused, and a full disk takes none away."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from loraport.clients.errors import ConfigError, ResourceError
from loraport.train.checkpoint_adapters import choose
from loraport.train.loop import trainer as trainer_module
from loraport.train.loop.checkpoints import SEAL, clear, is_whole, newest, seal, step_of, unwritten, whole
from loraport.train.loop.trainer import is_write_error
from tests.loop import assert_same, files_of, weights_of
from tests.loop_run import run

IDENTITY = {"rows": "abc", "base": "def", "settings": {"rank": 16, "learning_rate": 2e-4}}


def make(folder: Path, step: int, sealed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        (checkpoint / name).write_bytes(b"x" * 100)
    if sealed:
        seal(checkpoint, IDENTITY)
    return checkpoint


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        make(tmp_path, step)
    assert newest(tmp_path, IDENTITY) == tmp_path / "checkpoint-100"


def cut(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"x" * 50)


def lose(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()


def unseal(checkpoint: Path) -> None:
    (checkpoint / SEAL).unlink()


def half_a_seal(checkpoint: Path) -> None:
    text = (checkpoint / SEAL).read_text()
    (checkpoint / SEAL).write_text(text[: len(text) // 2])


def another_seal(checkpoint: Path) -> None:
    (checkpoint / SEAL).write_text('["files"]')


def odd_files(checkpoint: Path) -> None:
    (checkpoint / SEAL).write_text('{"files": [1], "identity": {}}')


@pytest.mark.parametrize("damage", [cut, lose, unseal, half_a_seal, another_seal, odd_files])
def test_a_damaged_one_is_passed_over(damage: Any, tmp_path: Path) -> None:
    make(tmp_path, 5)
    last = make(tmp_path, 10)
    damage(last)
    assert not is_whole(last)
    assert newest(tmp_path, IDENTITY) == tmp_path / "checkpoint-5"


def test_strange_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert newest(tmp_path, IDENTITY) is None
    assert newest(tmp_path / "nowhere", IDENTITY) is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"rows": "other"}, "rows changed"),
        ({"base": "other"}, "base changed"),
        ({"settings": IDENTITY["settings"] | {"rank": 8}}, r"rank \(16 to 8\) changed"),  # type: ignore[operator]
        ({"settings": IDENTITY["settings"] | {"dropout": 0.1}}, r"dropout \(None to 0.1\) changed"),  # type: ignore[operator]
        ({"base": "x", "rows": "y"}, "base, rows changed"),
    ],
    ids=str,
)
def test_another_run_is_refused_by_what_differs(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    make(tmp_path, 5)
    with pytest.raises(ConfigError, match=named) as refused:
        newest(tmp_path, IDENTITY | changed)
    assert "--resume" in refused.value.hint


def test_a_seal_of_another_version_is_refused(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 5)
    document = json.loads((checkpoint / SEAL).read_text())
    (checkpoint / SEAL).write_text(json.dumps({"files": document["files"]}))
    with pytest.raises(ConfigError, match="base, rows, "):
        newest(tmp_path, IDENTITY)


def test_clearing_takes_all_of_a_run(tmp_path: Path) -> None:
    make(tmp_path / "run", 5)
    clear(tmp_path / "run")
    clear(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_file_holds_its_parameters_and_nothing_else(tmp_path: Path) -> None:
    model, _ = run(tmp_path, epochs=1)
    file = tmp_path / "checkpoint-4/adapter_model.safetensors"
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(names) == len(learning) and all("lora_" in name for name in names)
    assert file.stat().st_size == header + 4 * sum(parameter.numel() for parameter in learning)
    assert header < 200 * len(names)


def test_kept_are_the_last_ones_and_the_best(tmp_path: Path) -> None:
    _, outcome = run(tmp_path, keep_checkpoints=2, save_steps=1, eval_steps=1, learning_rate=0.1)
    best = f"checkpoint-{outcome.metrics['best_step']}"
    assert best != "checkpoint-12"  # such a rate makes it worse
    assert set(files_of(tmp_path)) == {best, "checkpoint-12"}
    assert all(is_whole(path) for path in tmp_path.glob("checkpoint-*"))


def test_those_that_become_adapters_are_kept_beside_the_best(tmp_path: Path) -> None:
    settings = {"save_steps": 1, "eval_steps": 1, "learning_rate": 0.1}
    _, outcome = run(tmp_path, keep_checkpoints=1, checkpoint_adapters=2, **settings)
    assert {f"checkpoint-{step}" for step in (10, 11, 12, int(outcome.metrics["best_step"]))} <= set(files_of(tmp_path))
    assert [step_of(path) for path in choose(tmp_path, outcome.history, 2)] == [10, 11]


def test_the_last_one_goes_when_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(checkpoint: Path, identity: dict[str, Any]) -> None:
        if step_of(checkpoint) > 3:
            raise KeyboardInterrupt  # not an error of ours to be handled: the process is gone
        seal(checkpoint, identity)

    monkeypatch.setattr(trainer_module, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, keep_checkpoints=1)
    assert [step_of(path) for path in whole(tmp_path)] == [3]


def test_an_old_seal_does_not_vouch_for_a_checkpoint_that_is_written_again(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    cut(tmp_path / "checkpoint-4")
    seen = []

    own = trainer_module.Trainer._save_checkpoint

    def look(self: Any, *args: Any) -> None:
        seen.append((tmp_path / "checkpoint-4" / SEAL).exists())
        own(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_save_checkpoint", look)
        run(tmp_path, resume=True, epochs=1)
    assert seen == [False]
    assert is_whole(tmp_path / "checkpoint-4")


def test_a_half_of_a_later_step_does_not_pass_for_the_newest(tmp_path: Path) -> None:
    """As a kill leaves it while the checkpoint of a signal is written, when the run goes on from an earlier one."""
    make(tmp_path, 11, sealed=False)
    run(tmp_path, keep_checkpoints=1, epochs=2)
    assert [step_of(path) for path in whole(tmp_path)][-1] == 8 and not (tmp_path / "checkpoint-11").exists()


def test_the_best_weights_are_kept_though_no_checkpoint_was_due(tmp_path: Path) -> None:
    model, outcome = run(tmp_path, eval_steps=1, save_steps=12, learning_rate=0.1)
    best = int(outcome.metrics["best_step"])
    assert 0 < best < 12 and outcome.metrics["eval_loss"] < outcome.metrics["last_eval_loss"]
    with safe_open(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors", "pt") as stored:
        found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    wanted = {name.replace(".default", ""): each for name, each in weights_of(model).items()}
    assert_same(found, wanted)


@pytest.fixture
def limited() -> Any:
    """A function that keeps this process from writing files beyond a size, as a full disk would."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, limited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the sixth step no file may be larger than 8 kB: the real writers of safetensors and torch fail."""

    def sealed(checkpoint: Path, identity: dict[str, Any]) -> None:
        seal(checkpoint, identity)
        if step_of(checkpoint) == 6:
            limited(8_000)

    monkeypatch.setattr(trainer_module, "seal", sealed)
    with pytest.raises(ResourceError, match=r"step 9 could not be written .*the one of step 6 is whole") as full:
        run(tmp_path)
    assert "--resume" in full.value.hint
    assert files_of(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert [step_of(path) for path in whole(tmp_path)] == [3, 6]


def test_a_full_disk_before_the_first_checkpoint(tmp_path: Path, limited: Any) -> None:
    limited(8_000)
    with pytest.raises(ResourceError, match=r"step 3 could not be written .*there is none before it") as full:
        run(tmp_path)
    assert "LORAPORT_HOME" in full.value.hint
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth"])
def test_torchs_own_words_for_a_full_disk_are_known(file: str, tmp_path: Path, limited: Any) -> None:
    import torch

    limited(1000)
    with pytest.raises(Exception) as raised:  # a RuntimeError today, perhaps an OSError tomorrow
        torch.save(torch.zeros(10_000), tmp_path / file)
    limited(-1)
    assert is_write_error(raised.value)


def test_an_error_without_words_is_named(tmp_path: Path) -> None:
    assert "(OSError)" in unwritten(make(tmp_path, 3), OSError()).message
