"""`loraport bench startup` on the fake engine, and models made to measure with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.numpy import load_file

from loraport.bench.serving.caches import Caches, drop_files, folders_of, is_ours
from loraport.bench.serving.made import make_adapters, make_base
from loraport.bench.serving.startup import read_phases
from loraport.bench.serving.tools_cli import bench_make_adapters, bench_startup, port_of
from loraport.bench.training.cases import SHAPES
from loraport.clients.errors import BaseModelError, UsageError
from tests.conftest import free_port
from tests.misbehaving import Misbehaving

FAKE = Path(__file__).with_name("fake_engine.py")


def fake_command(folder: Path, port: int) -> list[str]:
    """A fake vLLM with a base and an adapter."""
    adapter = folder / "demo"
    adapter.mkdir(exist_ok=True)
    (adapter / "loraport.json").write_text('{"golden": []}')
    module = json.dumps({"name": "demo", "path": str(adapter)})
    known = ["--model", "m", "--served-model-name", "base", "--host", "127.0.0.1", "--max-model-len", "1000"]
    return [sys.executable, str(FAKE), *known, "--port", str(port), "--lora-modules", module]


def document_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON document on standard output."""
    return dict(json.loads(capsys.readouterr().out))


def test_milestones_from_spawn_to_the_first_token_of_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WORDING", "0.25")
    out = tmp_path / "out.json"
    bench_startup(fake_command(tmp_path, free_port()), cold=1, warm=1, timeout=60, out=out, json=True)
    found = document_of(capsys)
    assert found == json.loads(out.read_text()) | {"environment": found["environment"]} and found["complete"]
    assert [run["kind"] for run in found["runs"]] == ["cold", "warm"]
    for run in found["runs"]:
        assert list(run["milestones"]) == ["port", "health", "models", "first base token", "first adapter token"]
        assert list(run["milestones"].values()) == sorted(run["milestones"].values())
        assert run["models"] == {"base": "base", "adapter": "demo"}
        assert (run["error"], run["left_behind"]) == (None, 0) and run["memory"]["processes"] > 1e6
        assert run["told"] | {"weights": 2.59, "graph capture": 34.0, "engine in all": 110.2} == run["told"]
    assert found["summary"]["cold"]["median_s"] == found["runs"][0]["milestones"]


def test_the_table_and_the_waterfall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_startup(fake_command(tmp_path, free_port()), cold=0, warm=1, timeout=60)
    out = capsys.readouterr().out
    assert "first adapter token" in out and "█" in out and "told in its log: weights 0.0" in out


def test_a_command_that_dies_is_told_with_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CRASH", "weights")
    monkeypatch.setenv("FAKE_LAST_WORDS", "CUDA out of memory")
    bench_startup(fake_command(tmp_path, free_port()), cold=0, warm=1, timeout=60)
    out = capsys.readouterr().out
    assert "it ended with status 1 before: port" in out and "CUDA out of memory" in out


def test_one_that_never_answers_is_ended_in_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_START_S", "600")
    bench_startup(fake_command(tmp_path, free_port()), cold=0, warm=1, timeout=1, json=True)
    (run,) = document_of(capsys)["runs"]
    assert run["error"] == "it took longer than 1 s before: port" and run["left_behind"] == 0


def test_what_outlives_the_command_is_told_and_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GRANDCHILD", "1")
    bench_startup(fake_command(tmp_path, free_port()), cold=0, warm=1, timeout=60)
    assert "warm: 1 processes outlived it" in capsys.readouterr().out


def test_what_answers_already_is_not_measured(tmp_path: Path) -> None:
    with Misbehaving(["good"]) as server, pytest.raises(UsageError, match="something answers"):
        bench_startup(["true"], server.base_url)


def test_ctrl_c_ends_the_command_that_is_being_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loraport_cli", "bench", "startup", "--json", "--warm", "1", "--cold", "0", "--"]
    environment = dict(os.environ) | {"FAKE_START_S": "600"}
    process = subprocess.Popen(
        [*command, *fake_command(tmp_path, free_port())],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    parent = psutil.Process(process.pid)
    while not (children := parent.children()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and not json.loads(out)["complete"]
    assert children and not [child for child in children if child.is_running()]


def test_phases_of_our_own_document(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text('{\n  "phases": {"imports": 10.2},\n  "seconds": 11\n}\nmore')
    assert read_phases(path) == {"imports": 10.2}
    path.write_text("INFO: started")
    assert read_phases(path) is None


def test_a_cold_start_has_caches_of_its_own_and_leaves_the_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "adapters/demo").mkdir(parents=True)
    (home / "cache/vllm").mkdir(parents=True)
    monkeypatch.setenv("LORAPORT_HOME", str(home))
    caches = Caches(tmp_path / "bench", ["loraport", "serve", "demo"])
    caches.clear()
    own = Path(caches.environment()["LORAPORT_HOME"])
    assert (own / "adapters/demo").is_dir() and not (own / "cache").exists()
    (own / "cache").mkdir()
    caches.clear()
    assert not (own / "cache").exists() and (home / "cache/vllm").is_dir() and (home / "adapters/demo").is_dir()
    assert "LORAPORT_HOME" not in Caches(tmp_path / "other", ["vllm", "serve", "m"]).environment()


def test_what_a_command_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes(b"{}".ljust(5000))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "serve").mkdir()
    command = ["vllm", "serve", str(tmp_path / "model"), "--lora-modules", f"a={tmp_path}/model", "--port", "9"]
    assert folders_of(command) == [tmp_path / "model"] and drop_files(folders_of(command)) == 5000
    assert (port_of(command), port_of(["serve", "--port=7"]), port_of(["serve"])) == (9, 7, 8000)
    assert is_ours(["x/loraport", "serve"]) and is_ours(["python", "-m", "loraport_cli", "serve"])
    assert not is_ours(["vllm", "serve", "loraport"][:2])


def test_random_adapters_load_in_peft(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = make_adapters(tiny_base, tmp_path / "out", count=2, rank=4)
    assert [path.name for path in made] == ["a0", "a1"]
    first, second = (load_file(path / "adapter_model.safetensors") for path in made)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert (first[name] != second[name]).any() and first[name].any()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), made[0])
    own = {key.replace(".default", ""): value for key, value in model.named_parameters() if "lora_" in key}
    assert {key: tuple(value.shape) for key, value in own.items()} == {key: each.shape for key, each in first.items()}
    assert all((own[key].detach().numpy() == each).all() for key, each in first.items())


@pytest.mark.parametrize("shape", ["tiny", "qwen3-1.7b"])
def test_weights_are_those_of_transformers_and_take_no_room(shape: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    make_base(shape, tmp_path / "base", has_weights=True)
    path = tmp_path / "base" / "model.safetensors"
    assert path.stat().st_blocks * 512 < 2**20
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "base"))
    tied = set(wanted.all_tied_weights_keys or ())
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.state_dict().items() if name not in tied}
    with safe_open(path, "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes  # noqa: SIM118
    if shape == "tiny":
        assert not any(p.any() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "base").parameters())


def test_a_base_of_a_shape_has_a_word_for_every_token(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    make_base("tiny", tmp_path / "tiny", context=512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    config = AutoConfig.from_pretrained(tmp_path / "tiny")
    assert len(tokenizer) == config.vocab_size == SHAPES["tiny"]["vocab_size"]
    assert len(tokenizer("the of and w3").input_ids) == 4 and tokenizer.decode([2, 3]) == "user assistant"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the time"}], add_generation_prompt=True)
    assert len(chat["input_ids"]) == 4
    assert (config.model_type, config.max_position_embeddings) == ("llama", 512)


def test_refusals(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        make_adapters(tmp_path, tmp_path / "out", 1, 4)
    with pytest.raises(UsageError, match="there is no linear lm_head"):
        make_adapters(tiny_base, tmp_path / "out", 1, 4, ("lm_head",))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(BaseModelError, match="'gpt2'"):
        make_adapters(tmp_path, tmp_path / "out", 1, 4)
    with pytest.raises(UsageError, match="is not empty"):
        make_base("tiny", tmp_path)


def test_the_command_says_what_it_made(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_make_adapters(tiny_base, tmp_path / "out", count=1, rank=2, target=["q_proj"], json=True)
    found = document_of(capsys)
    assert found["adapters"] == [str(tmp_path / "out/a0")] and found["rank"] == 2
    config = json.loads((tmp_path / "out/a0/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"] and config["peft_type"] == "LORA"
