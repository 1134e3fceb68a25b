"""The search for LoRA kernels: what is tried, what vLLM reads of it, and that a search that fails leaves nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.errors import EngineError, UsageError
from loraport.clients.hardware import Device
from loraport.clients.home import Home
from loraport.serve.plan.settings import Plan
from loraport.serve.plan.shape import GIB, Shape, read_shape
from loraport.serve.tuning import tune
from loraport.serve.tuning.files import write
from loraport.serve.tuning.space import TOKENS, Group, candidates, groups, power_of_two

H200 = Device("cuda", "NVIDIA H200", 140 * GIB, 139 * GIB, 16)
CPU = Device("cpu", "CPU", 24 * GIB, 20 * GIB, 2)
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
QKV = Group("qkv", 4096, (4096, 1024, 1024))
# Plays the search: a line that is not JSON, two calls, the file; fails where it is told so.
SEARCH = """
import json, pathlib, sys
asked = json.loads(sys.argv[1])
print("Triton says hello")
for op in ("shrink", "expand"):
    print(json.dumps({"op": op, "group": "qkv", "tokens": 64, "own_us": 10.0, "us": 6.0, "config": {}}), flush=True)
pathlib.Path(asked["out"], "NVIDIA_H200_SHRINK.json").write_text(json.dumps(asked))
sys.exit(ENDS)
"""


def shape_of(config: dict[str, Any]) -> Shape:
    shape = read_shape(config)
    assert shape is not None
    return shape


def planned(**more: Any) -> Plan:
    chosen: dict[str, Any] = {"context": 8192, "slots": 8, "rank": 16, "dtype": "bfloat16", "share": 0.9}
    return Plan(requests=256, kv_bytes=None, **chosen | more)


def play(monkeypatch: pytest.MonkeyPatch, ends: int) -> None:
    monkeypatch.setattr(tune, "SEARCH", (sys.executable, "-c", SEARCH.replace("ENDS", str(ends))))


def test_groups_are_those_that_adapters_use_cut_among_gpus() -> None:
    sizes = {"hidden": 4096, "q": 4096, "kv": 1024, "inner": 12288}
    assert groups(sizes, ("k_proj",)) == [QKV]
    assert [group.name for group in groups(sizes, ())] == ["qkv", "o", "gate_up", "down"]
    two = {group.name: group for group in groups(sizes, (), tensor_parallel=2)}
    assert two["qkv"] == Group("qkv", 4096, (2048, 512, 512)) and two["down"] == Group("down", 6144, (4096,))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rank", [8, 16, 256])
@pytest.mark.parametrize("op", ["shrink", "expand"])
def test_what_is_tried_can_run(op: str, rank: int, tokens: int) -> None:
    tried = list(candidates(op, QKV, rank, tokens))
    assert tried and len({str(config) for config in tried}) == len(tried)
    for config in tried:
        numbers = {name: value or 0 for name, value in config.items()}
        assert numbers["block_m"] <= power_of_two(tokens) and numbers["block_k"] >= 16
        if op == "shrink":
            assert numbers["block_k"] * numbers["split_k"] <= QKV.inner and numbers["block_n"] >= 16


def test_vllm_finds_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("vllm.lora.ops.triton_ops.utils")
    config = next(candidates("shrink", QKV, 16, 64))
    found = {op: {"3": {"64": {"4096": {"16": config}, "16": {"4096": config}}}} for op in ("shrink", "expand")}
    write(found, "NVIDIA H200-X", 8, tmp_path)
    monkeypatch.setattr(utils.envs, "VLLM_TUNED_CONFIG_FOLDER", str(tmp_path), raising=False)
    monkeypatch.setattr(utils.torch.cuda, "get_device_name", lambda: "NVIDIA H200-X")
    utils.load_lora_op_config.cache_clear()
    utils.get_lora_op_configs.cache_clear()
    about = {"max_loras": 9, "batch": 64, "rank": 16, "num_slices": 3}
    assert utils.get_lora_op_configs("shrink", hidden_size=4096, **about) == config
    assert utils.get_lora_op_configs("expand", hidden_size=4096, add_inputs=True, **about) == config
    assert utils.get_lora_op_configs("shrink", hidden_size=4096, **about | {"batch": 70}) == config
    # Of a group that nobody searched for, of a head, of experts: vLLM must not end for want of a configuration.
    for slices, size in ((1, 151936), (2, 4096), (4, 2048)):
        other = about | {"num_slices": slices}
        assert utils.get_lora_op_configs("expand", hidden_size=size, add_inputs=True, **other) == config
    utils.load_lora_op_config.cache_clear()
    utils.get_lora_op_configs.cache_clear()


def test_a_subject_is_known_by_gpu_engine_and_shapes(home: Home) -> None:
    shape = shape_of(CONFIG)
    subject = tune.find_subject(planned(), shape, H200, "0.25")
    assert subject and subject.folder(home).name.startswith("nvidia-h200-vllm0.25-")
    others = [
        tune.find_subject(planned(rank=32), shape, H200, "0.25"),
        tune.find_subject(planned(slots=1), shape, H200, "0.25"),
        tune.find_subject(planned(targets=("q_proj",)), shape, H200, "0.25"),
        tune.find_subject(planned(), shape, H200, "0.32"),
    ]
    folders = {other.folder(home) for other in others if other}
    assert len(folders) == 4 and subject.folder(home) not in folders
    assert subject == tune.find_subject(planned(context=1024), shape, H200, "0.25")


def test_experts_are_left_out() -> None:
    shape = shape_of(CONFIG | {"num_experts": 8, "num_experts_per_tok": 2})
    subject = tune.find_subject(planned(), shape, H200, "0.25")
    assert subject and [group.name for group in subject.groups] == ["qkv", "o"]


def test_where_there_is_nothing_to_tune() -> None:
    shape = shape_of(CONFIG)
    assert tune.find_subject(planned(), shape, CPU, "0.32") is None
    assert tune.find_subject(planned(slots=0), shape, H200, "0.25") is None
    with pytest.raises(UsageError, match="there is none here"):
        tune.require_subject(None, CPU)
    with pytest.raises(UsageError, match="none are used"):
        tune.require_subject(None, H200)
    tune.require_subject(tune.find_subject(planned(), shape, H200, "0.25"), H200)


def test_what_is_found_is_kept(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, ends=0)
    subject = tune.find_subject(planned(), shape_of(CONFIG), H200, "0.25")
    assert subject and not subject.is_tuned(home)
    told: list[dict[str, Any]] = []
    tune.tune(subject, home, dict(os.environ), told.append)
    assert [line["op"] for line in told] == ["shrink", "expand"] and subject.is_tuned(home)
    asked = json.loads((subject.folder(home) / "NVIDIA_H200_SHRINK.json").read_text())
    assert asked["groups"][0] == ["qkv", 4096, [4096, 1024, 1024]] and (asked["rank"], asked["slots"]) == (16, 8)
    assert subject.gain(home) == "40% less time at 64 tokens"
    assert [path.name for path in subject.folder(home).parent.iterdir()] == [subject.folder(home).name]


def test_a_search_that_fails_leaves_nothing_and_says_its_last_words(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, ends=1)
    subject = tune.find_subject(planned(), shape_of(CONFIG), H200, "0.25")
    assert subject
    with pytest.raises(EngineError) as caught:
        tune.tune(subject, home, dict(os.environ), lambda line: None)
    assert caught.value.details == ("Triton says hello",)
    assert not subject.is_tuned(home) and not list(subject.folder(home).parent.iterdir())


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"calls": []}'])
def test_a_damaged_report_is_no_report(home: Home, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    play(monkeypatch, ends=0)
    subject = tune.find_subject(planned(), shape_of(CONFIG), H200, "0.25")
    assert subject
    (home.ensure(subject.folder(home)) / tune.REPORT).write_text(damage)
    assert not subject.is_tuned(home)
    tune.tune(subject, home, dict(os.environ), lambda line: None)
    assert subject.is_tuned(home)


def test_kernels_that_do_not_run_are_not_kept(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SEARCH", (sys.executable, "-c", SEARCH.replace("ENDS", "0").replace("10.0", "1e999")))
    subject = tune.find_subject(planned(), shape_of(CONFIG), H200, "0.25")
    assert subject
    with pytest.raises(EngineError, match="does not run"):
        tune.tune(subject, home, dict(os.environ), lambda line: None)
    assert not list(subject.folder(home).parent.iterdir())


def test_another_search_that_came_first_is_kept(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, ends=0)
    subject = tune.find_subject(planned(), shape_of(CONFIG), H200, "0.25")
    assert subject
    theirs = {"calls": [{"op": "shrink", "tokens": 64, "own_us": 1.0, "us": 0.5}]}

    def come_first(line: dict[str, Any]) -> None:
        (home.ensure(subject.folder(home)) / tune.REPORT).write_text(json.dumps(theirs))

    tune.tune(subject, home, dict(os.environ), come_first)
    assert subject.calls(home) == theirs["calls"]


def test_what_a_killed_search_left_is_swept(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, ends=0)
    subject = tune.find_subject(planned(), shape_of(CONFIG), H200, "0.25")
    assert subject
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    parent = home.ensure(subject.folder(home).parent)
    (parent / f".{subject.folder(home).name}-{done.pid}").mkdir()
    tune.tune(subject, home, dict(os.environ), lambda line: None)
    assert [path.name for path in parent.iterdir()] == [subject.folder(home).name]


def test_a_search_that_says_nothing_is_ended(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SEARCH", (sys.executable, "-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(tune, "SILENT_S", 0.5)
    subject = tune.find_subject(planned(), shape_of(CONFIG), H200, "0.25")
    assert subject
    with pytest.raises(EngineError, match="ended before its time"):
        tune.tune(subject, home, dict(os.environ), lambda line: None)


def test_ctrl_c_ends_the_search(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, ends=0)
    subject = tune.find_subject(planned(), shape_of(CONFIG), H200, "0.25")
    assert subject

    def interrupt(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune(subject, home, dict(os.environ), interrupt)
    assert not list(subject.folder(home).parent.iterdir())
