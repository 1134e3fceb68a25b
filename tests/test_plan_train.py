"""What a run will need: exact counts, what fits, refusals. Shapes of real models, no weights, no GPU."""

import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraport.clients.errors import BaseModelError, ConfigError, ResourceError, UsageError
from loraport.train.config import ResolvedConfig, load_config
from loraport.train.defaults import Facts, resolve
from loraport.train.memory import machine as machines
from loraport.train.memory import shapes
from loraport.train.memory.load import Load
from loraport.train.memory.machine import GIB, GPUS, Machine, Types, choose_types, find_gpu, find_machine
from loraport.train.memory.parts import Counted, Layout, memory, optimizer_bytes
from loraport.train.memory.plan import Plan, load_of, plan, require_fit
from loraport.train.memory.shapes import Shape, read_shape
from loraport.train.memory.speed import adapter_bytes, estimate
from loraport.train.presets import PRESETS
from tests.shapes import LLAMA_65B, MISTRAL_7B, QWEN3_32B

SHAPES = {"mistral": MISTRAL_7B, "llama": LLAMA_65B, "qwen3": QWEN3_32B}
NF4 = Types("nf4", "bfloat16")


@lru_cache
def shape_of(name: str) -> Shape:
    return read_shape(SHAPES[name])


def config_of(**flags: Any) -> ResolvedConfig:
    given = load_config(None, {"model": "m", "data": "d", "rank": 16, "load": "nf4", "sequence_length": 2048} | flags)
    return resolve(given, Facts())[0]


def card(gib: float, gpus: int = 1) -> Machine:
    return Machine("cuda", f"a GPU of {gib:g} GiB", int(gib * GIB), gpus=gpus)


def planned(name: str, gib: float, gpus: int = 1, **flags: Any) -> Plan:
    return plan(config_of(**flags), shape_of(name), card(gib, gpus))


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("minimal_r4_qv", 32 * 4 * (8192 + 5120)),
        ("standard_r8_qkvo", 6_815_744),
        ("aggressive_r16_all", 41_943_040),
        ("high_capacity_r32_all", 83_886_080),
    ],
)
def test_presets_on_mistral_7b(preset: str, parameters: int) -> None:
    chosen = PRESETS[preset]
    assert chosen.rank is not None
    assert shape_of("mistral").trainable_parameters(chosen.rank, chosen.target_modules) == parameters


@pytest.mark.parametrize(
    ("name", "parameters", "adapter"),
    [
        ("mistral", 7_248_023_552, 41_943_040),
        ("llama", 65_285_660_672, 199_884_800),
        ("qwen3", 32_762_123_264, 134_217_728),
    ],
)
def test_parameters_of_well_known_models(name: str, parameters: int, adapter: int) -> None:
    shape = shape_of(name)
    assert shape.parameters == parameters
    assert shape.trainable_parameters(16, ("all-linear",)) == adapter


def test_nf4_takes_4_127_bits_a_weight_and_the_rest_16() -> None:
    shape = shape_of("mistral")
    load = Load(NF4, 16, ("all-linear",), 0.0, True, "paged_adamw_8bit")
    linears = Counted(shape, load).linears
    assert 8 * linears / shape.linear_parameters == pytest.approx(4.127, abs=0.001)
    plain = Counted(shape, replace(load, double_quant=False)).linears
    assert 8 * plain / shape.linear_parameters == pytest.approx(4.5, abs=0.001)
    assert Counted(shape, load).weights(1) == linears + 2 * shape.other


def test_small_tensors_keep_float32_states() -> None:
    tiny = read_shape(MISTRAL_7B | {"hidden_size": 128, "intermediate_size": 5120, "num_hidden_layers": 1})
    load = Load(NF4, 8, ("gate_proj",), 0.0, True, "paged_adamw_8bit")
    a, b = 8 * 128, 8 * 5120  # below and above 4,096 elements
    assert optimizer_bytes(tiny, load) == 8 * a + 2 * b + 8 * b // 256
    assert optimizer_bytes(tiny, replace(load, optimizer="adamw")) == 8 * (a + b)


@pytest.mark.parametrize(
    ("name", "gib", "flags"),
    [
        ("mistral", 16, {"preset": "standard_r8_qkvo", "rank": 8, "batch_size": 4, "sequence_length": 1024}),
        ("llama", 48, {}),
        ("qwen3", 48, {"sequence_length": 4096}),
        ("qwen3", 24, {"sequence_length": 4096}),
    ],
)
def test_what_the_write_ups_asked_for_fits(name: str, gib: float, flags: dict[str, Any]) -> None:
    made = planned(name, gib, **flags)
    assert made.fits and made.parts.peak <= gib * GIB
    assert made.settings.micro_batch_tokens >= flags.get("sequence_length", 2048)
    require_fit(made)


def test_the_tutorials_recipe_stays_within_8_gib_with_full_checkpointing() -> None:
    flags = {"preset": "standard_r8_qkvo", "rank": 8, "batch_size": 4, "sequence_length": 1024}
    made = planned("mistral", 16, checkpointing="full", micro_batch_tokens=4096, **flags)
    assert made.parts.reserved < 8 * GIB


def test_the_limit_is_met_to_the_byte() -> None:
    config, shape = config_of(checkpointing="full", micro_batch_tokens=2048), shape_of("mistral")
    peak = plan(config, shape, card(100)).parts.peak
    assert plan(config, shape, replace(card(100), memory=peak)).fits
    assert not plan(config, shape, replace(card(100), memory=peak - 1)).fits


def test_less_memory_means_more_checkpoints_and_at_last_the_host() -> None:
    rooms = [planned("mistral", gib, sequence_length=1024, batch_size=4).settings for gib in (60, 9, 7, 5.8)]
    assert [room.checkpointing for room in rooms] == ["off", "auto", "auto", "offload"]
    numbers = [room.checkpointed_layers for room in rooms]
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] == 32


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ({"tokens": 1024}, {"tokens": 2048}),
        ({"tokens": 4096, "checkpointed": 20}, {"tokens": 4096, "checkpointed": 10}),
        ({"tokens": 4096, "checkpointed": 32, "offload": True}, {"tokens": 4096, "checkpointed": 32}),
        ({"tokens": 4096, "sharding": "fsdp", "gpus": 2}, {"tokens": 4096, "sharding": "ddp", "gpus": 2}),
        ({"tokens": 4096, "trained": 100}, {"tokens": 4096, "trained": 4096}),
    ],
)
def test_memory_grows_with_the_layout(smaller: dict[str, Any], larger: dict[str, Any]) -> None:
    counted = Counted(shape_of("mistral"), load_of(config_of(), shape_of("mistral"), card(80)))
    first, second = (counted.memory(Layout(**each)) for each in (smaller, larger))
    assert first.peak < second.peak or (first.moment != "the loss" and first.peak == second.peak)


def test_memory_grows_with_rank_and_dropout_and_width_of_the_weights() -> None:
    def peak(**flags: Any) -> int:
        return memory(
            shape_of("mistral"), load_of(config_of(**flags), shape_of("mistral"), card(80)), Layout(4096)
        ).peak

    assert peak(rank=8) < peak(rank=64)
    assert peak(dropout=0.0) <= peak(dropout=0.05)  # no masks are kept
    assert peak(load="nf4") < peak(load="nf4", double_quant=False) < peak(load="int8") < peak(load="bf16")


def test_when_the_first_layers_are_computed_again_the_others_are_gone() -> None:
    counted = Counted(shape_of("mistral"), load_of(config_of(), shape_of("mistral"), card(80)))
    most, all_layers = (counted.memory(Layout(4096, number)) for number in (31, 32))
    a_layer = counted.layers[0] * 4096
    assert most.activations - all_layers.activations < a_layer
    assert abs(most.peak - all_layers.peak) < a_layer / 3


@pytest.mark.parametrize(("gpu", "way"), [("H200", "flash"), ("A100", "flash"), ("T4", "joined")])
def test_attention_copies_what_its_kernels_need(gpu: str, way: str) -> None:
    assert load_of(config_of(), shape_of("mistral"), find_machine(None, gpu)).attention == way


@pytest.mark.parametrize(
    ("rank", "load", "kind"), [(16, "nf4", "adamw"), (64, "nf4", "paged_adamw_8bit"), (64, "bf16", "adamw")]
)
def test_states_are_in_8_bits_for_large_adapters_on_quantised_bases(rank: int, load: str, kind: str) -> None:
    assert load_of(config_of(rank=rank, load=load), shape_of("mistral"), card(80)).optimizer == kind


def test_what_is_given_is_kept() -> None:
    made = planned("mistral", 80, checkpointing="half", micro_batch_tokens=4096)
    assert (made.settings.checkpointed_layers, made.settings.micro_batch_tokens) == (16, 4096)
    made = planned("mistral", 80, micro_batch_tokens=100)
    assert made.settings.micro_batch_tokens == 2048  # a row cannot be cut
    assert any("cannot be cut" in choice.reason for choice in made.choices)


def test_rows_that_were_read_are_shorter_than_the_limit() -> None:
    config, shape = config_of(sequence_length=8192), shape_of("mistral")
    assert plan(config, shape, card(8), longest=512).fits
    assert not plan(config, shape, card(5)).fits


def test_what_does_not_fit_is_told_with_what_would() -> None:
    made = planned("mistral", 10, load="bf16", sequence_length=4096)
    assert not made.fits and "does not fit" in made.verdict
    changes = [each.change for each in made.alternatives]
    assert changes[0] == "--load nf4"
    assert all(each.peak <= 10 * GIB for each in made.alternatives[:-1])
    assert changes[-1].startswith("a GPU with ")
    with pytest.raises(ResourceError) as caught:
        require_fit(made)
    assert caught.value.exit_code == 3 and "--load nf4" in caught.value.hint


def test_several_gpus_share_a_base_that_one_cannot_hold() -> None:
    alone, shared = planned("llama", 30), planned("llama", 30, gpus=2)
    assert not alone.fits and any("--gpus 2" in each.change for each in alone.alternatives)
    assert shared.fits and shared.settings.sharding == "fsdp"
    copies = planned("mistral", 30, gpus=2)
    assert copies.settings.sharding == "ddp"
    assert copies.parts.weights == planned("mistral", 30).parts.weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nonsense"}, "does not know: 'nonsense'"),
        ({"model_type": "mixtral", "num_hidden_layers": 1}, "cannot be counted: it is a mixture of experts"),
        ({"model_type": "qwen3_5_text", "num_hidden_layers": 4}, "without softmax attention (linear_attention)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "stored quantised (fp8)"),
        ({"num_attention_heads": 0}, "cannot be built"),
        ({"model_type": "gpt2"}, "no linear layers"),
    ],
)
def test_bases_that_cannot_be_planned_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        read_shape(MISTRAL_7B | changes, "org/model")
    assert message in caught.value.message and caught.value.hint


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "embed_tokens")])
def test_targets_that_vllm_serves_no_adapter_on(targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="vLLM serves no adapter on"):
        planned("mistral", 80, target_modules=targets)


def test_targets_that_the_base_lacks() -> None:
    with pytest.raises(ConfigError) as caught:
        planned("mistral", 80, target_modules=("c_attn",))
    assert "no linear layers called c_attn" in caught.value.message and "q_proj" in caught.value.hint


def test_a_rank_that_vllm_cannot_hold() -> None:
    with pytest.raises(ConfigError):
        config_of(rank=1024)


def test_a_base_on_which_vllm_takes_no_adapters() -> None:
    falcon = read_shape({"model_type": "falcon", "architectures": ["FalconForCausalLM"], "num_hidden_layers": 1})
    with pytest.raises(BaseModelError, match="vLLM takes no LoRA adapters on m: its FalconForCausalLM"):
        plan(config_of(), falcon, card(80))


def test_layers_that_are_not_ours_are_counted_twice_and_said() -> None:
    phi = read_shape({"model_type": "phi3", "num_hidden_layers": 2})
    assert not phi.is_fused
    assert any("phi3" in note for note in plan(config_of(), phi, card(80)).notes)


def test_which_layers_are_ours_is_what_the_loop_says() -> None:
    from loraport.train.loop import fused

    assert shapes.PLAIN_ATTENTION == fused.PLAIN_ATTENTION
    gemma = read_shape({"model_type": "gemma2", "num_hidden_layers": 1})
    assert not gemma.is_fused and not gemma.has_plain_head
    assert all(shape_of(name).is_fused and shape_of(name).has_plain_head for name in SHAPES)


def test_adapter_bytes_are_four_a_parameter_and_a_header() -> None:
    shape = shape_of("mistral")
    size = adapter_bytes(shape, 8, PRESETS["standard_r8_qkvo"].target_modules)
    assert 0 < size - 4 * 6_815_744 < 50_000 and size % 8 == 0


def test_speed_is_known_for_known_gpus_alone() -> None:
    shape, load, layout = shape_of("mistral"), load_of(config_of(), shape_of("mistral"), card(80)), Layout(4096)
    known = find_machine(None, "H200")
    fast = estimate(shape, load, layout, known, 4096)
    assert fast and fast.low < fast.tokens_per_second < fast.high
    slow = estimate(shape, load, replace(layout, checkpointed=32), known, 4096)
    assert slow and slow.tokens_per_second < fast.tokens_per_second
    assert estimate(shape, load, layout, card(80), 4096) is None
    assert estimate(shape, load, layout, Machine("cpu", "CPU", 8 * GIB), 4096) is None


@pytest.mark.parametrize(
    ("name", "tokens", "checkpointed", "load", "measured"),
    [
        ("mistral", 4096, 0, "bf16", 16163),
        ("mistral", 8192, 0, "bf16", 16677),
        ("mistral", 4096, 10, "bf16", 13534),
        ("mistral", 8192, 0, "nf4", 15931),
    ],
)
def test_speed_agrees_with_what_was_measured(
    name: str, tokens: int, checkpointed: int, load: str, measured: int
) -> None:
    machine = find_machine(None, "H200")
    speed = estimate(
        shape_of(name),
        load_of(config_of(load=load), shape_of(name), machine),
        Layout(tokens, checkpointed),
        machine,
        4096,
    )
    assert speed and speed.low < measured < speed.high


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("rtx 3090", "3090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("Radeon", None),
    ],
)
def test_gpus_by_the_names_that_drivers_give(said: str, known: str | None) -> None:
    found = find_gpu(said)
    assert (found.name if found else None) == known


def test_layers_of_an_image_encoder_are_no_decoder_layers() -> None:
    """Though there are as many of them, and they come first."""
    layers = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    text = layers | {"hidden_size": 64, "vocab_size": 256, "num_key_value_heads": 1, "head_dim": 32}
    images = layers | {"model_type": "siglip_vision_model", "hidden_size": 32, "image_size": 28, "patch_size": 14}
    gemma = {"model_type": "gemma3", "text_config": text | {"model_type": "gemma3_text"}, "vision_config": images}
    shape = read_shape(gemma | {"mm_tokens_per_image": 4})
    assert len(shape.blocks) == 4 and shape.blocks[0].linears[0].inputs == 64
    assert len(shape.outside) >= 4 * 6 and all("vision" in linear.path for linear in shape.outside)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.language = torch.nn.Module(), torch.nn.Module()
            for part in (self.visual, self.language):
                part.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))

        def get_decoder(self) -> torch.nn.Module:
            return self.language

    assert shapes.find_layers(Both(), 4, "both")[1] == "language.layers"


@pytest.mark.parametrize(
    ("visible", "gpus", "free", "counted"),
    [
        (None, 1, 70, 1),
        (None, None, 20, 3),
        ("0,1", None, 60, 2),
        ("GPU-c,0", 2, 20, 2),
        ("GPU-c,0", 1, 20, 1),
        ("1,-1,2", None, 60, 1),
        (None, 8, 20, 8),  # eight such: they need not be here for a plan
    ],
)
def test_the_least_free_of_the_gpus_that_a_run_uses_counts(
    visible: str | None, gpus: int | None, free: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {0: 70, 1: 60, 2: 20, "GPU-c": 20}

    class NVMLError(Exception):
        pass

    def handle(gpu: int | str) -> int:
        if gpu not in memory:
            raise NVMLError
        return memory[gpu]

    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda gib: SimpleNamespace(total=80 * GIB, free=gib * GIB),
        nvmlDeviceGetName=lambda _: "NVIDIA H100",
        nvmlDeviceGetCudaComputeCapability=lambda _: (9, 0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(machines, "torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here = machines.read_here(gpus)
    assert (here.memory, here.gpus) == (free * GIB, counted)
    assert find_machine(None, None, gpus) == here


def test_machines_by_name_by_memory_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_machine(None, "T4").has_bf16 is False
    assert find_machine(10, "T4").memory == 10 * GIB
    with pytest.raises(UsageError, match="no figures are known for a GPU called 'Radeon'"):
        find_machine(None, "Radeon")
    assert find_machine(48, "Radeon").memory == 48 * GIB
    here = Machine("cuda", "NVIDIA L4", 20 * GIB, gpu=GPUS[0])
    monkeypatch.setattr(machines, "read_here", lambda gpus=1: here)
    assert find_machine(None, None) == here
    assert find_machine(10, None) == replace(here, memory=10 * GIB)
    assert find_machine(80, None).gpu is None  # larger than what is here: another GPU
    assert machines.machine_for_run(80) == here
    assert machines.machine_for_run(10).memory == 10 * GIB


def test_types_follow_the_machine() -> None:
    assert choose_types(config_of(load="auto"), card(80)) == Types("bfloat16", "bfloat16")
    assert choose_types(config_of(load="auto"), find_machine(None, "T4")) == Types("float16", "float16")
    assert choose_types(config_of(load="auto"), Machine("cpu", "CPU", GIB)) == Types("float32", "float32")
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        choose_types(config_of(load="nf4"), Machine("cpu", "CPU", GIB))
    with pytest.raises(ConfigError, match="paged_adamw_8bit needs an NVIDIA GPU"):
        load_of(config_of(load="auto", optimizer="paged_adamw_8bit"), shape_of("mistral"), Machine("cpu", "CPU", GIB))


def test_shapes_match_a_real_model_and_a_real_adapter(tiny_base: Path, tmp_path: Path) -> None:
    import json

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shape = read_shape(json.loads((tiny_base / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="float32")
    assert shape.parameters == model.num_parameters() and shape.is_tied
    load = Load(Types("float32", "float32"), 3, ("q_proj", "down_proj"), 0.0, True, "adamw", "cpu")
    assert Counted(shape, load).weights(1) == sum(each.numel() * each.element_size() for each in model.parameters())
    for targets in (("q_proj", "down_proj"), ("all-linear",)):
        names = list(targets) if targets != ("all-linear",) else "all-linear"
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=names))
        learning = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
        assert shape.trainable_parameters(3, targets) == learning
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        assert adapter_bytes(shape, 3, targets) == (tmp_path / "adapter_model.safetensors").stat().st_size
        model = adapted.unload()
