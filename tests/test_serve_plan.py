"""Choices of the plan, from the numbers of real models; no engine, no GPU."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraport.clients.errors import ResourceError, UsageError
from loraport.clients.hardware import Device, read_cgroup, read_gpu
from loraport.serve.cli import check_engine_flags, check_port, split_arguments
from loraport.serve.engine import versions
from loraport.serve.plan import hardware
from loraport.serve.plan.choose import plan
from loraport.serve.plan.flags import vllm_args
from loraport.serve.plan.settings import ASSISTANT_CONTEXT, Plan, Wanted, choose_targets
from loraport.serve.plan.shape import GIB, MIB, find, read_shape
from loraport.serve.plan.wish import check_share, parse_context
from loraport.train.manifest import BaseIdentity, DataCounts, Manifest

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
QWEN_32B = LLAMA_8B | {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
TINY = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "dtype": "bfloat16",
}
H100 = Device("cuda", "H100", 80 * GIB, 79 * GIB, 16)
LAPTOP = Device("cpu", "CPU, 2 cores", 24 * GIB, 20 * GIB, 2)


def manifest(rank: int, name: str = "demo", dtype: str = "float32", targets: Sequence[str] = ()) -> Manifest:
    hashes = dict.fromkeys(("config_sha256", "tokenizer_sha256", "chat_template_sha256", "weights_sha256"), "")
    return Manifest(
        name=name,
        version="v1",
        created="",
        fingerprint="",
        base=BaseIdentity(model="m", revision=None, path="/m", **hashes),
        base_dtype=dtype,
        rank=rank,
        alpha=1,
        target_modules=list(targets),
        trainable_parameters=1,
        adapter_bytes=1,
        max_lora_rank=max(8, rank),
        stop_tokens=[],
        chat_template_kwargs={},
        data=DataCounts(files=[], sha256="", rows=0, tokens=0, trained_tokens=0, eval_rows=0),
        run={},
        metrics={},
        versions={},
        golden=[],
    )


def planned(config: dict[str, Any], gib: float, device: Device, ranks: tuple[int, ...] = (), **wanted: Any) -> Plan:
    shape = read_shape(config, int(gib * GIB))
    assert shape is not None
    manifests = [manifest(rank, f"a{number}") for number, rank in enumerate(ranks)]
    return plan(Wanted(**wanted), shape, manifests, device)


def test_sizes_of_a_known_model() -> None:
    shape = read_shape(LLAMA_8B, 0)
    assert shape is not None
    assert shape.kv_bytes_per_token(2) == 128 * 1024
    assert shape.lora_bytes_per_slot(16, 2) / MIB == pytest.approx(88, abs=1)


@pytest.mark.parametrize(
    ("targets", "wanted", "slots_for"),
    [
        ([["q_proj"], ["v_proj", "q_proj"]], {}, ("k_proj", "q_proj", "v_proj")),
        ([["model.layers.0.mlp.up_proj", "o_proj"]], {}, ("gate_proj", "o_proj", "up_proj")),
        ([["q_proj"]], {"max_loras": 2}, tuple(sorted(ALL_LINEAR))),  # others are to be loaded later
        ([["q_proj", "lm_head"]], {}, ()),
        ([["c_attn"]], {}, ()),
        ([[]], {}, ()),
        ([], {"max_loras": 2}, ()),
    ],
)
def test_slots_are_made_for_the_linears_that_adapters_use(
    targets: list[list[str]], wanted: dict[str, int], slots_for: tuple[str, ...]
) -> None:
    shape = read_shape(LLAMA_8B, 0)
    assert shape is not None
    adapters = [manifest(16, f"a{at}", targets=names) for at, names in enumerate(targets)]
    for device in (H100, replace(LAPTOP, free=64 * GIB, total=64 * GIB)):
        made = plan(Wanted(context=2048, **wanted), shape, adapters, device)
        assert made.targets == slots_for
        assert made.memory["lora_slots"] == made.slots * shape.lora_bytes_per_slot(16, 2, targets=slots_for)
        flags = vllm_args(made)
        if slots_for:
            begin = flags.index("--lora-target-modules") + 1
            assert flags[begin : begin + len(slots_for)] == list(slots_for)
        else:
            assert "--lora-target-modules" not in flags


def test_replicas_that_do_not_fit_are_named() -> None:
    shape = read_shape(LLAMA_8B, 0)
    assert shape is not None
    with pytest.raises(ResourceError, match="for each of 40 replicas") as caught:
        plan(Wanted(replicas=40), shape, [], replace(LAPTOP, free=GIB // 2))
    assert caught.value.hint.startswith("use fewer --replicas; or end other programs")


def test_slots_are_made_for_whole_groups_of_linears() -> None:
    shape = read_shape(LLAMA_8B, 0)
    assert shape is not None
    of_q, of_qkv = (shape.lora_bytes_per_slot(16, 2, targets=names) for names in (["q_proj"], ["q_proj", "k_proj"]))
    assert of_q == of_qkv == 16 * 2 * 32 * (3 * 4096 + 4096 + 2 * 1024)
    assert of_q < shape.lora_bytes_per_slot(16, 2, targets=ALL_LINEAR) < shape.lora_bytes_per_slot(16, 2)


def test_experts_have_slots_for_all() -> None:
    shape = read_shape(LLAMA_8B | {"num_local_experts": 8, "num_experts_per_tok": 2}, 0)
    assert shape is not None
    assert choose_targets(Wanted(), shape, [manifest(16, targets=["gate_proj"])]) == ()


def test_nested_and_unusual_configurations() -> None:
    assert read_shape({"text_config": LLAMA_8B, "hidden_size": 1}, 9) == read_shape(LLAMA_8B, 9)
    assert read_shape({"model_type": "mystery"}, 0) is None
    latent = read_shape(LLAMA_8B | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 0)
    assert latent is not None and latent.kv_bytes_per_token(2) == 32 * 576 * 2
    assert find({"a": 0, "b": "4", "c": 7}, "a", "b", "c") == 7


def test_adapters_keep_16_bit_weights_while_there_is_room_for_work() -> None:
    """Their recorded replies are those of 16-bit weights; a wish that these cannot hold comes first, though."""
    chosen = planned(QWEN_32B, 61, H100, (16,))
    assert (chosen.quantization, chosen.share, chosen.is_auto) == ("none", 0.92, True)
    assert ASSISTANT_CONTEXT < chosen.context < 40_960
    assert planned(QWEN_32B, 61, H100, (16,), context=40_960).quantization == "fp8"
    with pytest.raises(ResourceError, match=r"--context 40960 does not fit: 16-bit weights .* leave room for"):
        planned(QWEN_32B | {"max_position_embeddings": 131_072}, 67, H100, (16,), context=40_960, quantization="none")


def test_a_model_with_room_gets_its_own_limit() -> None:
    chosen = planned(LLAMA_8B, 15, H100)
    assert (chosen.context, chosen.dtype, chosen.kv_bytes, chosen.slots) == (131_072, "bfloat16", None, 0)
    assert chosen.choices[1].reason == "the model's own limit, and it fits; 3 such requests fit at once"


def test_memory_that_others_use_is_left_to_them() -> None:
    chosen = planned(LLAMA_8B, 15, replace(H100, free=40 * GIB))
    assert chosen.share == 0.49


def test_what_cannot_hold_a_request_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"the model does not fit: 15\.0 GiB of weights"):
        planned(LLAMA_8B, 15, replace(LAPTOP, free=12 * GIB))
    with pytest.raises(ResourceError, match="not enough for one request"):
        planned(LLAMA_8B, 15, replace(LAPTOP, free=int(27.3 * GIB)))


def test_a_cpu_takes_a_cache_for_its_requests_and_no_more() -> None:
    chosen = planned(TINY, 0.001, LAPTOP, (8,))
    assert (chosen.context, chosen.requests, chosen.dtype) == (1024, 16, "float32")
    assert chosen.kv_bytes == 3 * MIB and chosen.share is None
    assert chosen.warnings == ("note: the model's own limit is 1,024 tokens; coding assistants need 16,384.",)


def test_a_short_context_warns_of_coding_assistants() -> None:
    chosen = planned(LLAMA_8B, 15, H100, context=8192)
    assert "coding assistants such as Aider will not work" in chosen.warnings[0]
    assert planned(LLAMA_8B, 15, H100, context=16_384).warnings == ()


def test_a_long_context_on_a_cpu_is_capped_with_a_reason() -> None:
    chosen = planned(TINY | {"max_position_embeddings": 131_072}, 0.001, LAPTOP)
    assert chosen.context == 32_768 and "raise it with --context" in chosen.choices[0].reason


def test_context_beyond_the_model_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="more than the 1,024 tokens"):
        planned(TINY, 0.001, LAPTOP, context=2048)


def test_slots_are_as_small_as_the_adapters_need() -> None:
    chosen = planned(LLAMA_8B, 15, H100, (8, 64, 16))
    assert (chosen.slots, chosen.rank) == (3, 64)
    assert planned(LLAMA_8B, 15, H100, (8,) * 20).slots == 8


def test_a_cpu_gets_a_slot_that_stays_empty_and_says_why() -> None:
    assert (versions.spare_slots((0, 32), "cpu"), versions.spare_slots((0, 32), "cuda")) == (1, 0)
    shape = read_shape(TINY, 1000)
    assert shape is not None
    for count in (1, 12):
        chosen = plan(Wanted(), shape, [manifest(8, f"a{number}") for number in range(count)], LAPTOP, 1)
        assert chosen.slots == count + 2
        assert "the last stays empty, because vLLM on a CPU mixes it into the base's" in chosen.choices[-1].reason
    assert plan(Wanted(), shape, [], LAPTOP, 1).slots == 0


def test_what_the_chat_template_is_told_is_said() -> None:
    shape = read_shape(TINY, 1000)
    assert shape is not None
    told = manifest(8).model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    choice = plan(Wanted(), shape, [told], LAPTOP).choices[-1]
    words = f"thinking off for {told.name}"
    assert (choice.name, choice.value, choice.reason) == ("chat template", words, "as in training")


@pytest.mark.parametrize(
    ("device", "base_dtypes", "chosen"),
    [
        (LAPTOP, ("float32",), "float32"),
        (LAPTOP, ("bfloat16",), "bfloat16"),
        (LAPTOP, (), "bfloat16"),
        (replace(LAPTOP, has_bf16=False), (), "float32"),
        (H100, ("float32",), "bfloat16"),
        (replace(H100, has_bf16=False), (), "float16"),
    ],
)
def test_dtype(device: Device, base_dtypes: tuple[str, ...], chosen: str) -> None:
    shape = read_shape(TINY, 1000)
    assert shape is not None
    manifests = [manifest(8, dtype=dtype) for dtype in base_dtypes]
    assert plan(Wanted(), shape, manifests, device).dtype == chosen


def test_flags() -> None:
    assert (parse_context(None), parse_context("40960"), parse_context("40k")) == (None, 40_960, 40_960)
    for wrong in ("0", "-1", "many", "4m"):
        with pytest.raises(UsageError):
            parse_context(wrong)
    for port in (0, 70_000):
        with pytest.raises(UsageError):
            check_port(port)
    for share in (1.5, 0.0):
        with pytest.raises(UsageError):
            check_share(share)
    assert split_arguments(["a", "b", "--seed", "3"]) == (["a", "b"], ["--seed", "3"])


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--port", "9000"], "--port"),
        (["--por=9000"], "--port"),
        (["--max_model_len", "100"], "--context"),
        (["--seed", "3", "--served-model-name", "x"], "an adapter to the name it was trained under"),
        (["--enable-lora"], "before `--`"),
        (["--lora-modules", "{}"], "before `--`"),
        (["--api-key", "k"], "loraport keys create"),
        (["--ssl-keyfile", "k"], "TLS"),
        (["--disable-log-stats"], "from one that hangs"),
        *([[flag, "x"], ""] for flag in ("--host", "--model", "--dtype", "--root-path", "--uds")),
    ],
)
def test_flags_that_are_ours_are_refused_after_the_dashes(flags: list[str], hint: str) -> None:
    with pytest.raises(UsageError, match="cannot be given to the engine") as caught:
        check_engine_flags(flags)
    assert caught.value.hint and hint in caught.value.hint


def test_other_flags_are_the_users() -> None:
    check_engine_flags(["--max-loras", "1", "--seed=3", "--", "port", "--max-num-batched-tokens", "10", "-tp", "2"])


class NVMLError(Exception):
    """What NVML raises for everything."""


def fake_nvml(monkeypatch: pytest.MonkeyPatch, name: str | bytes = "NVIDIA H200", capability: int = 9) -> list[object]:
    """Stand in for pynvml with one GPU; returns the list of what GPUs were asked for."""
    asked: list[object] = []

    def handle(which: object) -> str:
        asked.append(which)
        if which in (7, "GPU-gone"):
            raise NVMLError
        return "handle"

    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=140 * GIB, free=139 * GIB),
        nvmlDeviceGetName=lambda _: name,
        nvmlDeviceGetCudaComputeCapability=lambda _: (capability, 0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(hardware, "is_cpu_build", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return asked


@pytest.mark.parametrize(("name", "capability"), [("NVIDIA H200", 9), (b"Tesla T4", 7)])
def test_a_gpu_is_read(monkeypatch: pytest.MonkeyPatch, name: str | bytes, capability: int) -> None:
    fake_nvml(monkeypatch, name, capability)
    device = hardware.read_device()
    text = name if isinstance(name, str) else name.decode()
    assert (device.kind, device.name, device.total, device.free) == ("cuda", text, 140 * GIB, 139 * GIB)
    assert device.has_bf16 == (capability >= 8) and device.cores >= 1


@pytest.mark.parametrize(
    ("visible", "asked", "kind"),
    [
        (None, [0], "cuda"),
        ("3,1", [3], "cuda"),
        ("GPU-ab12", ["GPU-ab12"], "cuda"),
        ("MIG-ab12", ["MIG-ab12"], "cuda"),
        ("", [], "cpu"),
        ("-1", [], "cpu"),
        ("-1,0", [], "cpu"),
        ("7", [7], "cpu"),
        ("GPU-gone", ["GPU-gone"], "cpu"),
    ],
)
def test_the_first_visible_gpu_counts(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: list[object], kind: str
) -> None:
    found = fake_nvml(monkeypatch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.read_device().kind == kind and found == asked


def test_no_driver_and_a_cpu_build_mean_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_nvml(monkeypatch)
    monkeypatch.setattr(hardware, "is_cpu_build", lambda: True)
    assert hardware.read_device().kind == "cpu" and asked == []
    fake_nvml(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpu() is None


def test_cgroup_limits_are_respected(tmp_path: Path) -> None:
    assert read_cgroup(tmp_path) is None
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 1\ninactive_file 200\n"),
    ):
        (tmp_path / name).write_text(text)
    assert read_cgroup(tmp_path) == (1000, 500)
    (tmp_path / "memory.max").write_text("max\n")
    assert read_cgroup(tmp_path) is None


def test_this_machine_can_be_read() -> None:
    device = hardware.read_device()
    assert 0 < device.free <= device.total and device.cores >= 1
