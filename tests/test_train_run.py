"""A whole run on the tiny base: what is stored, when nothing is done, and that failures leave nothing."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors

from loraport.clients import home as home_module
from loraport.clients.errors import AdapterError, BaseModelError, ConfigError, DataError, ResourceError, UsageError
from loraport.clients.home import Home
from loraport.train.adapters import (
    WEIGHTS,
    Adapter,
    PartialVersion,
    check_whole,
    find_adapter,
    open_adapter,
    publish,
    versions,
)
from loraport.train.base_model import resolve
from loraport.train.config import RunConfig
from loraport.train.defaults import Facts
from loraport.train.defaults import resolve as derive
from loraport.train.loop import checkpoints
from loraport.train.loop.checkpoints import held, run_folder
from loraport.train.manifest import Manifest
from loraport.train.run import count_gpus, train
from tests.models import make_tiny_base


def write_rows(path: Path, count: int = 12, word: str = "red") -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"colour {n}?"}, {"role": "assistant", "content": f"{word} {n % 3}"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configure(base: Path, data: Path, **settings: Any) -> RunConfig:
    plain = {"model": str(base), "data": data, "name": "colours", "preset": "aggressive_r16_all", "epochs": 1}
    plain |= {"batch_size": 4, "learning_rate": 1e-2}
    return RunConfig.model_validate(plain | settings)


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> RunConfig:
    return configure(tiny_base, write_rows(tmp_path / "rows.jsonl"))


@pytest.fixture
def adapter(config: RunConfig, home: Home) -> Adapter:
    return train(config, home)


def test_the_stored_version_is_whole_and_says_what_it_is(adapter: Adapter, config: RunConfig, home: Home) -> None:
    manifest = Manifest.read(adapter.folder)
    assert manifest == adapter.manifest == open_adapter(home, "colours@v1").manifest
    assert adapter.folder == home.adapters / "colours" / "v1"
    files = ["adapter_config.json", WEIGHTS, "loraport.json", "report.html", "report.json"]
    assert sorted(path.name for path in adapter.folder.iterdir()) == files
    assert not (home.root / "runs" / "colours").exists()
    # 2 layers, rank 16 on seven linears of the tiny Qwen3: 16 * sum(in + out)
    per_layer = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 128) + (128 + 64)
    assert manifest.trainable_parameters == 2 * 16 * per_layer
    assert manifest.max_lora_rank == 16
    assert (manifest.data.rows, manifest.data.eval_rows) == (11, 1)
    given = config.model_dump(mode="json", exclude_none=True)
    assert {key: manifest.run[key] for key in given} == given
    assert manifest.run["sequence_length"] == 64 and manifest.run["eval_steps"] == 3  # derived
    assert manifest.golden and set(manifest.metrics) >= {"train_loss", "eval_loss", "tokens_per_second"}
    assert (adapter.folder / WEIGHTS).stat().st_size < 4 * manifest.trainable_parameters + 10_000


def test_nothing_changed_means_nothing_to_do(adapter: Adapter, config: RunConfig, home: Home) -> None:
    before = (adapter.folder / WEIGHTS).stat()
    assert train(config, home).folder == adapter.folder
    assert (adapter.folder / WEIGHTS).stat() == before and len(versions(home, "colours")) == 1


@pytest.mark.parametrize("change", ["data", "configuration", "base", "stop tokens", "force", "damage"])
def test_a_change_makes_a_new_version(
    adapter: Adapter, config: RunConfig, home: Home, tmp_path: Path, change: str
) -> None:
    if change == "data":
        write_rows(config.data, word="blue")
    elif change == "configuration":
        config = config.model_copy(update={"learning_rate": 1e-3})
    elif change == "base":
        config = config.model_copy(update={"model": str(make_tiny_base(tmp_path / "other", seed=1))})
    elif change == "stop tokens":
        copy = Path(shutil.copytree(config.model, tmp_path / "copy"))
        settings = json.loads((copy / "generation_config.json").read_text())
        (copy / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2]}))
        config = config.model_copy(update={"model": str(copy)})
    elif change == "damage":
        (adapter.folder / WEIGHTS).write_bytes(b"")
    assert train(config, home, force=change == "force").folder.name == "v2"
    assert adapter.folder.is_dir()


def test_where_data_and_base_lie_does_not_matter(
    adapter: Adapter, config: RunConfig, home: Home, tmp_path: Path
) -> None:
    moved = config.data.rename(tmp_path / "moved.jsonl")
    assert train(config.model_copy(update={"data": moved}), home).folder == adapter.folder


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target_modules": ("nose_proj",)}, ConfigError, "no linear layers called nose_proj"),
        ({"sequence_length": 16}, DataError, "rows are longer than 16 tokens"),
        ({"load": "nf4"}, ConfigError, "nf4 needs an NVIDIA GPU"),
        ({"name": "a/b"}, Exception, "cannot be the name"),
        ({"name": "base"}, Exception, "cannot be the name"),
    ],
)
def test_a_refused_run_leaves_nothing(
    config: RunConfig, home: Home, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        train(config.model_copy(update=settings), home)
    left = {path.relative_to(home.root).parts[0] for path in home.root.rglob("*") if path.is_file()}
    assert left <= {"cache"}  # the tokens, which the next try uses


def test_no_disk_space_is_refused_and_leaves_nothing(
    config: RunConfig, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = home_module.shutil.disk_usage("/")
    monkeypatch.setattr(home_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="MiB on disk") as caught:
        train(config, home)
    assert "LORAPORT_HOME" in caught.value.hint
    assert versions(home, "colours") == []


def test_leftovers_of_a_killed_run_are_removed(config: RunConfig, home: Home) -> None:
    left = home.ensure(home.adapters / "colours") / ".partial-999999999-x"
    left.mkdir()
    train(config, home)
    assert [path.name for path in (home.adapters / "colours").iterdir()] == ["v1"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "is cut off"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 100), "is not a whole safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "is not a whole safetensors file"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "loraport.json").unlink(), "has no loraport.json"),
        (lambda f: (f / "loraport.json").write_text('{"format": 2}'), "cannot be read as a manifest"),
    ],
)
def test_damaged_adapters_are_refused(adapter: Adapter, home: Home, damage: Any, words: str) -> None:
    damage(adapter.folder)
    with pytest.raises(AdapterError, match=words):
        open_adapter(home, "colours")


def test_another_adapters_weights_are_noticed(adapter: Adapter, config: RunConfig, home: Home) -> None:
    other = train(config.model_copy(update={"name": "small", "rank": 8}), home)
    with pytest.raises(AdapterError, match="bytes, the manifest says"):
        check_whole(adapter.folder, other.manifest)


def test_an_unknown_adapter_lists_the_known(adapter: Adapter, home: Home) -> None:
    with pytest.raises(AdapterError) as caught:
        find_adapter(home, "colors")
    assert caught.value.hint == "there is: colours"
    with pytest.raises(AdapterError) as caught:
        find_adapter(home, "colours@v9")
    assert caught.value.hint == "there is: v1"


def test_the_data_may_change_while_it_trains(config: RunConfig, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraport.train.loop import fit

    own = fit.fit
    monkeypatch.setattr(fit, "fit", lambda *args, **kwargs: (own(*args, **kwargs), config.data.unlink())[0])
    assert len(train(config, home).manifest.data.sha256) == 64


def test_an_unfinished_run_is_not_thrown_away(
    config: RunConfig, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fall(*_: Any, **__: Any) -> None:
        raise ResourceError("the machine fell over.")

    with monkeypatch.context() as patch, pytest.raises(ResourceError):
        patch.setattr("loraport.train.proof.golden.golden_replies", fall)
        train(config, home)
    assert versions(home, "colours") == []
    with pytest.raises(UsageError, match="was ended after step 3") as caught:
        train(config, home)
    assert "--resume" in caught.value.hint and "--force" in caught.value.hint
    with pytest.raises(ConfigError, match=r"learning_rate \(0.01 to 0.001\) changed"):
        train(config.model_copy(update={"learning_rate": 1e-3}), home, resume=True)
    resumed = train(config, home, resume=True)
    assert "continuing after step 3" in capsys.readouterr().err
    again = train(config, home, force=True)
    assert (resumed.folder / WEIGHTS).read_bytes() == (again.folder / WEIGHTS).read_bytes()
    with pytest.raises(UsageError, match="no checkpoint"):
        train(config.model_copy(update={"name": "other"}), home, resume=True)


def test_a_signal_after_the_training_says_what_is_kept(
    config: RunConfig, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("loraport.train.proof.evaluate.compare", stop)
        train(config, home)
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped before the adapter was stored; its checkpoint of step 3 is kept: go on with --resume" in said
    assert versions(home, "colours") == []
    assert train(config, home, resume=True).manifest.version == "v1"
    assert "step 1/3" not in capsys.readouterr().err


def test_one_run_at_a_time_for_a_name(config: RunConfig, home: Home) -> None:
    with held(run_folder(home, "colours")), pytest.raises(ResourceError, match="another process is training colours"):
        train(config, home)


def test_the_lock_of_a_run_goes_with_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a run opened the file that the one before is about to remove: what it holds then is no lock."""
    folder, own, tries = run_folder(home, "colours.v2"), checkpoints.fcntl.flock, 0

    def late(lock: Any, how: int) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            Path(lock.name).unlink()
        own(lock, how)

    monkeypatch.setattr(checkpoints.fcntl, "flock", late)
    with held(folder):
        with pytest.raises(ResourceError, match=r"another process is training colours\.v2 right now"), held(folder):
            pass
        with held(run_folder(home, "colours.v3")), held(run_folder(home, "colours")):  # other names
            pass
    assert tries == 5 and list(folder.parent.iterdir()) == []
    with pytest.raises(OSError, match="of the run"), held(folder):  # not of the lock
        raise OSError("an error of the run")


def test_two_trainings_of_one_name_get_two_versions(config: RunConfig, home: Home) -> None:
    with PartialVersion(home, "colours") as folder:
        trained = train(config, home)
        assert folder.is_dir()
        shutil.copytree(trained.folder, folder, dirs_exist_ok=True)
        assert publish(home, folder, trained.manifest).folder.name == "v2"
    assert len(versions(home, "colours")) == 2


def test_a_disk_that_fills_up_while_saving_leaves_nothing(
    config: RunConfig, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("peft.PeftModel.save_pretrained", full)
    with pytest.raises(ResourceError, match="could not be written"):
        train(config, home)
    assert not list(home.root.rglob("*.safetensors")) and versions(home, "colours") == []


def test_a_base_with_an_index_counts_only_what_is_in_it(tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    shutil.copy(copy / "model.safetensors", copy / "consolidated.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert resolve(str(copy)).weight_bytes == resolve(str(tiny_base)).weight_bytes


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink() or (f / "tokenizer_config.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"has no \*.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "is cut off"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "lacks 1",
        ),
    ],
)
def test_damaged_bases_are_refused(tiny_base: Path, tmp_path: Path, damage: Any, words: str) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(BaseModelError, match=words) as caught:
        resolve(str(copy))
    assert caught.value.exit_code == 3 and caught.value.hint


def test_an_unknown_architecture_is_refused(tiny_base: Path, tmp_path: Path, config: RunConfig, home: Home) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    settings = json.loads((copy / "config.json").read_text()) | {"model_type": "nobody", "architectures": ["Nobody"]}
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BaseModelError):
        train(config.model_copy(update={"model": str(copy)}), home)


def as_kind(base: Path, folder: Path, kind: str, **special: Any) -> Path:
    """A random model of another architecture with the tokenizer and the shape of `base`."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    shape = json.loads((folder / "config.json").read_text())
    for key in ("model_type", "architectures", "layer_types", "rope_parameters"):
        shape.pop(key, None)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape | special)).save_pretrained(folder)
    return folder


HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR = {"num_experts": 0, "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8} | HEADS


@pytest.mark.parametrize(
    ("kind", "special", "says"),
    [
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, "mixture of experts"),
        ("qwen3_next", LINEAR, "without softmax attention (linear_attention)"),
    ],
)
def test_a_base_that_cannot_be_planned_for_is_trained_if_it_can_be(
    kind: str,
    special: dict[str, Any],
    says: str,
    tiny_base: Path,
    tmp_path: Path,
    config: RunConfig,
    home: Home,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config.model_copy(update={"target_modules": ("all-linear",)})
    config = config.model_copy(update={"model": str(as_kind(tiny_base, tmp_path / kind, kind, **special))})
    assert {"k_proj", "o_proj", "q_proj", "v_proj"} <= set(train(config, home).manifest.target_modules)
    said = " ".join(capsys.readouterr().err.split())
    assert says in said and "a row at a time with full checkpointing" in said


def test_gpus_that_a_step_has_no_rows_for_are_said(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    resolved, _ = derive(config.model_copy(update={"gpus": 8, "batch_size": 2}), Facts(rows=12))
    assert count_gpus(resolved) == 2
    assert "2 of 8 GPUs are used" in capsys.readouterr().err


def test_force_and_resume_contradict() -> None:
    from loraport.train.cli import train as command

    with pytest.raises(UsageError, match="--force begins anew, and --resume goes on"):
        command(None, force=True, resume=True, json=False)
