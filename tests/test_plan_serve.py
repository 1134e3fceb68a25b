"""The plan of an engine on a GPU, held against what vLLM reported on one; no engine, no GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.errors import ResourceError, UsageError
from loraport.clients.hardware import Device
from loraport.serve.engine.process import Launch, arguments
from loraport.serve.plan import gpus
from loraport.serve.plan.choose import plan
from loraport.serve.plan.flags import vllm_args
from loraport.serve.plan.memory import BLOCK, requests_that_fit
from loraport.serve.plan.on_gpu import DoesNotFit
from loraport.serve.plan.settings import Plan, Wanted
from loraport.serve.plan.shape import GIB, MIB, Shape, read_shape
from loraport.train.base_model import Base
from loraport.train.memory.shapes import read_shape as count_by_transformers
from tests.shapes import LLAMA_65B, MISTRAL_7B, QWEN3_32B

QWEN3_8B = QWEN3_32B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
QWEN2_1B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
READER_9M = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
MIXTRAL = MISTRAL_7B | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
# As NVIDIA's library counts it; torch: 150,109,880,320.
H200 = Device("cuda", "NVIDIA H200", 143_771 * MIB, 143_000 * MIB, 16)
H100 = gpus.named_device(80, None)


def shape_of(config: dict[str, Any], file_bytes: int = 0) -> Shape:
    shape = read_shape(config, file_bytes)
    assert shape is not None
    return shape


def planned(config: dict[str, Any], device: Device = H100, **wanted: Any) -> Plan:
    return plan(Wanted(**wanted), shape_of(config), [], device)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (QWEN3_8B, 8_190_735_360),
        (QWEN3_32B, 32_762_123_264),
        (MISTRAL_7B, 7_248_023_552),
        (LLAMA_65B, 65_285_660_672),
        (QWEN2_1B, 1_543_714_304),
    ],
)
def test_parameters_of_known_models(config: dict[str, Any], parameters: int) -> None:
    assert shape_of(config).parameters == parameters


@pytest.mark.parametrize(
    "changes",
    [
        QWEN2_1B,
        READER_9M,
        MISTRAL_7B,
        LLAMA_65B | {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_parameters_are_those_of_transformers(changes: dict[str, Any]) -> None:
    counted, known = shape_of(changes), count_by_transformers(changes)
    assert (counted.linear, counted.other) == (known.linear_parameters, known.other)


# (config, slots, GiB of KV cache that vLLM 0.25.1 reported on an H200 at 0.92). The constants of memory.py were chosen
# with these at hand. Which 1.5B model it was, and its slots, was not written down; nor was max_num_seqs of the 8B one.
MEASURED = [(QWEN3_8B, 8, 111.75), (QWEN2_1B, None, 125.0), (QWEN2_1B, 1, 125.0), (READER_9M, None, 128.24)]


@pytest.mark.parametrize(("config", "slots", "measured"), MEASURED)
def test_the_kv_cache_is_what_vllm_then_has_and_never_more(
    config: dict[str, Any], slots: int | None, measured: float
) -> None:
    chosen = planned(config, H200, max_loras=slots)
    predicted = chosen.memory["kv_cache"] / GIB
    assert 0.95 * measured <= predicted <= measured
    assert sum(chosen.memory.values()) == gpus.usable(H200) < 150_109_880_320


@pytest.mark.parametrize("requests", [256, 1024])
def test_kv_tokens_of_the_8b_model(requests: int) -> None:
    tokens = planned(QWEN3_8B, H200, max_loras=8, max_lora_rank=16, requests=requests).kv_tokens
    assert 0.95 * 813_696 <= tokens <= 813_696 and tokens % BLOCK == 0


def test_write_up_a() -> None:
    """Qwen3-32B on 80 GB with an adapter: 16 bits cannot hold the model's 40,960 tokens, FP8 holds several requests."""
    chosen = planned(QWEN3_32B, context=40_960, max_lora_rank=16)
    assert (chosen.quantization, chosen.kv_cache_dtype, chosen.context) == ("fp8", "auto", 40_960)
    bf16, fp8, both = chosen.variants[:3]
    assert not bf16.holds and (bf16.full, bf16.tokens) == (0, 39_120)
    assert (fp8.full, both.full) == (3, 7)
    assert "16-bit weights leave room for 39,120 tokens, of 40,960 wished" in chosen.choices[0].reason
    args = vllm_args(chosen)
    assert args[args.index("--quantization") + 1] == "fp8" and args[args.index("--max-model-len") + 1] == "40960"


def test_write_up_a_as_it_was_started() -> None:
    """16k failed, 10k started. A reconstruction: vLLM's share was 0.9 then, and the rank is a guess from 5.1 GB.

    With today's share and a slot of rank 16 the plan has room for 39,120 tokens in 16 bits, not for 10k.
    """
    asked: dict[str, Any] = {"share": 0.9, "max_lora_rank": 320, "quantization": "none", "kv_cache_dtype": "auto"}
    bf16 = planned(QWEN3_32B, context=10_240, **asked).variants[0]
    assert 10_240 <= bf16.tokens < 16_384


def test_a_wish_for_more_requests_takes_what_holds_them() -> None:
    found = {
        many: planned(QWEN3_32B, context=40_960, concurrency=many, max_loras=1).chosen for many in (1, 3, 4, 7, 8, 10)
    }
    pairs = {many: (each.quantization, each.kv_cache_dtype) for many, each in found.items() if each}
    assert pairs == {
        1: ("fp8", "auto"),
        3: ("fp8", "auto"),
        4: ("fp8", "fp8"),
        7: ("fp8", "fp8"),
        8: ("bnb", "fp8"),
        10: ("bnb", "fp8"),
    }


def test_requests_share_the_cache_where_no_context_was_asked_for() -> None:
    chosen = planned(LLAMA_65B | {"max_position_embeddings": 65_536}, H200, concurrency=2, quantization="fp8")
    assert chosen.context % 128 == 0 and 2 * chosen.context <= chosen.kv_tokens and not chosen.is_auto
    assert "for each of 2 requests" in chosen.choices[1].reason


def test_auto_is_left_to_vllm_only_where_nothing_was_wished_and_the_limit_does_not_fit() -> None:
    long = QWEN3_32B | {"max_position_embeddings": 262_144}
    alone, wished = planned(long), planned(long, context=20_000)
    assert alone.is_auto and alone.context <= alone.kv_tokens < 262_144
    assert vllm_args(alone)[:2] == ["--max-model-len", "auto"]
    assert vllm_args(wished)[:2] == ["--max-model-len", "20000"]
    assert vllm_args(planned(QWEN3_8B, H200))[:2] == ["--max-model-len", "40960"]


def test_what_nothing_holds_is_refused_with_what_would() -> None:
    with pytest.raises(DoesNotFit, match="--context 40960 for 40 requests at once does not fit") as caught:
        planned(QWEN3_32B, context=40_960, concurrency=40, max_loras=8, max_lora_rank=256)
    assert caught.value.exit_code == 3
    for change in ("--concurrency ", "--context ", "--tensor-parallel "):
        assert change in caught.value.hint
    with pytest.raises(DoesNotFit, match=r"the model does not fit: .* of 16-bit weights") as caught:
        planned(QWEN3_32B, gpus.named_device(None, "4090"), quantization="none")
    assert caught.value.changes == (
        "--quantization auto --kv-cache-dtype auto",
        "4 such GPUs: --tensor-parallel 4",
        "a larger GPU, such as H100",
    )


def test_what_is_proposed_fits() -> None:
    wish: dict[str, Any] = {"context": 40_960, "concurrency": 8, "max_loras": 8, "max_lora_rank": 256}
    with pytest.raises(DoesNotFit) as caught:
        planned(QWEN3_32B, **wish)
    names = {"--concurrency": "concurrency", "--context": "context", "--max-loras": "max_loras"}
    tried = [each.split() for each in caught.value.changes if each.split()[0] in names]
    assert len(tried) == 3
    for flag, value in tried:
        assert planned(QWEN3_32B, **wish | {names[flag]: int(value)}).context
    assert "adapters of rank 64 (--max-lora-rank 64)" in caught.value.changes
    assert planned(QWEN3_32B, **wish | {"max_lora_rank": 64}).context


@pytest.mark.parametrize(
    ("name", "allowed", "warning"),
    [
        ("T4", {("none", "auto"), ("bnb", "auto")}, ""),
        ("A100", {("none", "auto"), ("fp8", "auto"), ("bnb", "auto")}, "no FP8 arithmetic: Marlin"),
        ("L40S", {(weights, cache) for weights in ("none", "fp8", "bnb") for cache in ("auto", "fp8")}, ""),
    ],
)
def test_what_a_gpu_can_do(name: str, allowed: set[tuple[str, str]], warning: str) -> None:
    made = planned(QWEN2_1B, gpus.named_device(None, name))
    assert {(each.quantization, each.kv_cache_dtype) for each in made.variants if not each.why_not} == allowed
    if warning:
        told = planned(QWEN2_1B, gpus.named_device(None, name), quantization="fp8").warnings
        assert any(warning in each for each in told)


def test_a_gpu_that_cannot_do_what_is_asked_says_why() -> None:
    with pytest.raises(ResourceError, match="FP8 weights need Ampere or later"):
        planned(QWEN2_1B, gpus.named_device(None, "T4"), quantization="fp8")


def test_4_bit_weights_name_the_plugin() -> None:
    assert any("vllm-bnb-plugin" in each for each in planned(QWEN3_32B, quantization="bnb").warnings)


@pytest.mark.parametrize(
    ("declared", "method", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq", 4.16),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq", 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", 4.5),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            "compressed-tensors",
            8,
        ),
        ({"quant_method": "mystery"}, "mystery", 16),
    ],
)
def test_ready_quantised_models_are_served_as_they_are(declared: dict[str, Any], method: str, bits: float) -> None:
    config = QWEN3_32B | {"quantization_config": declared}
    shape = shape_of(config)
    assert shape.stored and shape.stored.method == method
    assert shape.weights("none", 2) == pytest.approx(shape.linear * bits / 8 + shape.other * 2, rel=0.001)
    made = planned(config, H200, context=16_384)
    assert made.quantization == method and "--quantization" not in vllm_args(made)
    assert {each.quantization for each in made.variants} == {method}
    with pytest.raises(UsageError, match="stored in"):
        planned(config, H200, quantization="fp8")


def test_files_count_where_they_are() -> None:
    counted, known = shape_of(QWEN3_8B), shape_of(QWEN3_8B, 20 * GIB)
    assert known.weights("none", 2) == 20 * GIB and counted.weights("none", 2) == 2 * counted.parameters
    assert known.weights("fp8", 2) == 20 * GIB - known.linear
    assert counted.weights("fp8", 2) == counted.linear + 2 * counted.other


def test_gpus_share_weights_and_kv_heads_but_cut_no_head() -> None:
    one, two = planned(QWEN3_8B, H200), planned(QWEN3_8B, H200, tensor_parallel=2)
    assert two.memory["weights"] == one.memory["weights"] // 2
    assert 2 * one.kv_tokens < two.kv_tokens < 2.5 * one.kv_tokens
    shape = shape_of(QWEN3_8B)
    assert shape.kv_bytes_per_token(2, 16) == shape.kv_bytes_per_token(2, 8)
    halves = shape.lora_bytes_per_slot(16, 2, 2) / shape.lora_bytes_per_slot(16, 2)
    assert 0.5 < halves < 1
    assert vllm_args(two)[-2:] == ["--tensor-parallel-size", "2"]


@pytest.mark.parametrize(("given", "rank"), [(5, 8), (24, 32), (300, 320), (None, 16)])
def test_ranks_are_rounded_up_to_those_that_vllm_takes(given: int | None, rank: int) -> None:
    made = planned(QWEN3_8B, H200, max_loras=2, max_lora_rank=given)
    assert (made.slots, made.rank) == (2, rank)
    assert made.memory["lora_slots"] == 2 * shape_of(QWEN3_8B).lora_bytes_per_slot(rank, 2)


def test_a_rank_that_vllm_does_not_take() -> None:
    with pytest.raises(UsageError, match="more than vLLM takes"):
        planned(QWEN3_8B, H200, max_lora_rank=513)


def test_what_is_not_counted_is_said() -> None:
    assert any("as those of a Llama" in each for each in planned(MIXTRAL, H200).warnings)
    windowed = MISTRAL_7B | {"sliding_window": 4096}
    assert any("more tokens will fit" in each for each in planned(windowed, H200).warnings)
    assert planned(MISTRAL_7B, H200).warnings == ()
    assert shape_of(MIXTRAL).parameters == pytest.approx(46.7e9, rel=0.01)


def test_a_cpu_has_no_variants_and_says_so() -> None:
    cpu = Device("cpu", "CPU, 2 cores", 24 * GIB, 20 * GIB, 2)
    made = planned(READER_9M, cpu)
    assert made.variants == () and made.quantization == "none" and "--gpu-memory-utilization" not in vllm_args(made)
    for wanted in ({"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}, {"tensor_parallel": 2}):
        with pytest.raises(UsageError, match="needs an NVIDIA GPU"):
            planned(READER_9M, cpu, **wanted)


def test_memory_that_the_driver_keeps_is_not_promised() -> None:
    assert gpus.usable(H200) == int(139.8 * GIB)
    assert gpus.usable(gpus.named_device(None, "H100")) == int(79.2 * GIB)
    assert gpus.usable(Device("cuda", "NVIDIA Mystery", 100 * GIB, 100 * GIB, 1)) == 99 * GIB
    assert gpus.usable(Device("cuda", "NVIDIA H200 MIG 1g.18gb", 18 * GIB, 18 * GIB, 1)) < 18 * GIB


@pytest.mark.parametrize(
    ("name", "gib", "tokens"),
    [("B200", 179, 16_384), ("NVIDIA H200", 140, 8192), ("NVIDIA A100-SXM4-80GB", 80, 2048), ("L4", 22, 2048)],
)
def test_vllms_batches_on_a_gpu(name: str, gib: int, tokens: int) -> None:
    assert gpus.batched_tokens(Device("cuda", name, gib * GIB, gib * GIB, 1)) == tokens


def test_requests_are_counted_in_whole_blocks() -> None:
    assert (requests_that_fit(32, 17), requests_that_fit(64, 17), requests_that_fit(15, 16)) == (1, 2, 0)


def test_the_engine_is_started_with_the_plan() -> None:
    """One code path: the flags that `plan serve` prints are those of `serve`."""
    made = planned(QWEN3_32B, context=40_960, max_loras=2)
    launch = Launch(("vllm",), (0, 25), Base("m", Path("/m")), ("base",), (), made, H100, "127.0.0.1", 8000)
    words = " ".join(arguments(launch))
    assert " ".join(vllm_args(made)) in words and words.count("--gpu-memory-utilization") == 1
    assert words.count("--enable-lora") == 1
    shorter = replace(launch, plan=replace(made, context=1024))
    assert "--max-model-len 1024" in " ".join(arguments(shorter))
