"""What vLLM can apply of an adapter, and the reason where it cannot; adapters that PEFT saved elsewhere."""

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.errors import AdapterError
from loraport.serve.adapters import accept, weights
from loraport.train.base_model import Base

V32, V25 = (0, 32), (0, 25)
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
HIDDEN, VOCABULARY, LAYERS = 16, 32, 2
Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
SHAPES = {
    Q.format(layer, part): shape for layer in range(LAYERS) for part, shape in (("A", (4, HIDDEN)), ("B", (HIDDEN, 4)))
}


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], fill: int = 1) -> None:
    """A safetensors file of float32, every byte of which is `fill`."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + 4 * prod(shape)]}
        end += 4 * prod(shape)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes([fill]) * end)


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]] | None = None, fill: int = 1, **config: Any) -> Path:
    """An adapter's folder as PEFT leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    write_tensors(folder / "adapter_model.safetensors", SHAPES if shapes is None else shapes, fill)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """A base of two layers, as far as its shapes go."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN) for layer in range(LAYERS)}
    write_tensors(folder / "model.safetensors", shapes)
    return Base(str(folder), folder)


def refusal(check: Callable[[], None]) -> str:
    """The message of a refusal, which has a hint."""
    with pytest.raises(AdapterError) as caught:
        check()
    assert caught.value.hint
    return caught.value.message


FINE: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"exclude_modules": ["lm_head"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": r".*\.q_proj"},
    {"fan_in_fan_out": True, "lora_dropout": 0.1},
    {"init_lora_weights": "gaussian"},
    {"target_modules": None},
    {"corda_config": None, "loftq_config": {}, "megatron_config": None},
]


@pytest.mark.parametrize("config", FINE)
def test_plain_lora_is_served(tmp_path: Path, base: Base, config: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path / "lora", **config)
    accept.check_servable(folder, V25)
    accept.check_fits(folder, "lora", base)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "VERA"}, "uses the PEFT type VERA"),
        ({"use_dora": True}, "uses DoRA"),
        ({"kasa_config": {"beta": 1}}, "uses KaSA"),
        ({"arrow_config": {"top_k": 3}}, "uses Arrow routing"),
        (
            {"bias": "lora_only", "modules_to_save": ["embed_tokens"]},
            "whole modules beside LoRA (modules_to_save) and ",
        ),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"init_lora_weights": "olora"}, "the initialisation olora, which changes the base's weights"),
        ({"r": 0}, "has rank 0; vLLM takes 1 to 512."),
        ({"r": "8"}, "has rank None; vLLM takes 1 to 512."),
        ({"lora_alpha": 0}, "has alpha 0: it changes nothing."),
        ({"lora_alpha": "16"}, "has an alpha that is no number."),
        ({"r": 8}, "has rank 4 and 4 in A and B of model.layers.0.self_attn.q_proj, and its configuration says 8."),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, "and its configuration says 2."),
    ],
)
def test_other_configurations_are_refused_with_a_reason(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    folder = write_adapter(tmp_path / "lora", **config)
    assert reason in refusal(lambda: accept.check_servable(folder, V32))


def test_what_vllm_cannot_do_without(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora")
    config = {key: value for key, value in CONFIG.items() if key not in ("lora_alpha", "target_modules")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    message = refusal(lambda: accept.check_servable(folder, V32))
    assert "does not say lora_alpha and target_modules, which vLLM needs." in message


def test_a_base_is_told_from_an_adapter_that_lacks_something(base: Base, tmp_path: Path) -> None:
    assert "is a base, not an adapter." in refusal(lambda: accept.check_servable(base.folder, V32))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no adapter_config.json." in refusal(lambda: accept.check_servable(empty, V32))


def test_patterns_count_where_vllm_honours_them(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", r=2, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1})
    accept.check_servable(folder, V32)
    assert accept.needed_rank(accept.read_peft_config(folder)) == 8
    assert "which vLLM 0.25 ignores" in refusal(lambda: accept.check_servable(folder, V25))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"base_model.model.lm_head.weight": (VOCABULARY, HIDDEN)}, "holds whole weights (base_model.model.lm_head.w"),
        ({Q.format(0, "magnitude_vector"): (HIDDEN,)}, "holds DoRA's magnitudes"),
        ({Q.format(0, "A.default"): (4, HIDDEN)}, "holds names that only an adapter inside a model has"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": (HIDDEN,)}, "holds a LoRA bias"),
        ({"x.lokr_w1": (4, 4)}, "holds weights of another PEFT type (x.lokr_w1)"),
        ({Q.format(5, "A"): (4, HIDDEN)}, "lacks A or B of model.layers.5.self_attn.q_proj."),
        (
            {Q.format(0, "B"): (0, 4)},
            "holds no whole matrices for model.layers.0.self_attn.q_proj, as after saving a sh",
        ),
    ],
)
def test_other_weights_are_refused_with_a_reason(tmp_path: Path, more: dict[str, tuple[int, ...]], reason: str) -> None:
    folder = write_adapter(tmp_path / "lora", SHAPES | more)
    assert reason in refusal(lambda: accept.check_servable(folder, V32))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", {})
    assert "holds no LoRA weights." in refusal(lambda: accept.check_servable(folder, V32))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "has its weights in adapter_model.bin" in refusal(lambda: accept.check_servable(folder, V32))


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (
            {Q.format(0, "A"): (4, 64), Q.format(0, "B"): (64, 4)},
            "is made for q_proj of 64 x 64, and the base's q_pr",
        ),
        (
            {Q.format(9, "A"): (4, HIDDEN), Q.format(9, "B"): (HIDDEN, 4)},
            "has weights for layer 9, and the base has 2 lay",
        ),
        (
            {name.replace("q_proj", "c_attn"): shape for name, shape in SHAPES.items()},
            "has weights for model.layers.0.self_attn.c_attn, which the base does not have.",
        ),
        (
            {
                "base_model.model.model.embed_tokens.lora_embedding_A": (4, 40),
                "base_model.model.model.embed_tokens.lora_embedding_B": (HIDDEN, 4),
            },
            "is made for embed_tokens of 40 x 16",
        ),
        (SHAPES | {"base_model.model.model.embed_tokens.base_layer.weight": (40, HIDDEN)}, "a vocabulary of 40, and"),
    ],
)
def test_another_base_is_refused_with_what_differs(
    tmp_path: Path, base: Base, shapes: dict[str, tuple[int, ...]], reason: str
) -> None:
    folder = write_adapter(tmp_path / "lora", shapes)
    accept.check_servable(folder, V32)
    message = refusal(lambda: accept.check_fits(folder, "lora", base))
    assert "the adapter lora was made for another base than" in message and reason in message


def test_names_are_compared_from_the_layer_on(tmp_path: Path, base: Base) -> None:
    """transformers has moved what stands before the layers more than once; vLLM maps the names."""
    nested = {name.replace("model.model.layers", "model.model.language_model.layers"): SHAPES[name] for name in SHAPES}
    head = {
        "base_model.model.lm_head.lora_A.weight": (4, HIDDEN),
        "base_model.model.lm_head.lora_B.weight": (VOCABULARY, 4),
    }
    folder = write_adapter(tmp_path / "lora", nested | head)
    accept.check_fits(folder, "lora", base)  # the head is tied: its weight is stored as the embedding


def test_a_quantised_base_is_compared_by_names_alone(tmp_path: Path, base: Base) -> None:
    (base.folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"bits": 4}}))
    packed = {f"model.layers.{layer}.self_attn.q_proj.qweight": (2, HIDDEN) for layer in range(LAYERS)}
    write_tensors(base.folder / "model.safetensors", packed)
    accept.check_fits(write_adapter(tmp_path / "lora"), "lora", base)
    other = write_adapter(tmp_path / "other", {name.replace("q_proj", "x_proj"): SHAPES[name] for name in SHAPES})
    assert "x_proj, which the base does not have." in refusal(lambda: accept.check_fits(other, "other", base))


def test_modules_that_the_engine_was_told_to_leave_out(tmp_path: Path, base: Base) -> None:
    folder = write_adapter(tmp_path / "lora")
    accept.check_fits(folder, "lora", base, ["q_proj", "v_proj"])
    message = refusal(lambda: accept.check_fits(folder, "lora", base, ["v_proj"]))
    assert message == "the adapter lora has weights for q_proj, and this engine has no slots for them."


def test_an_adapter_whose_b_is_zero_is_untrained(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "lora", fill=0) / "adapter_model.safetensors"
    assert weights.is_untrained(path)
    data = bytearray(path.read_bytes())
    data[-1] = 0x80  # the sign alone: still zero
    path.write_bytes(data)
    assert weights.is_untrained(path)
    data[-1] = 1  # in the last B
    path.write_bytes(data)
    assert not weights.is_untrained(path)
