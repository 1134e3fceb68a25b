"""The formula counts what the loop keeps: bytes that a real forward pass keeps, layer by layer."""

from typing import Any

import pytest
import torch

from loraport.train.loop import layer as layer_module
from loraport.train.loop.attention import Documents, packed
from loraport.train.loop.fused import fuse
from loraport.train.loop.loss import with_loss
from loraport.train.memory.activations import layer_bytes
from loraport.train.memory.load import Load
from loraport.train.memory.machine import Types
from loraport.train.memory.shapes import read_shape
from loraport.train.presets import ATTENTION, SEVEN

TOKENS = 96
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


def saved_by_layer(
    kind: str, dropout: float, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> dict[int, int]:
    """Bytes that a forward pass is the first to keep in each decoder layer, parameters aside."""
    from peft import LoraConfig, get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(dict(SIZES)))
    model.requires_grad_(False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, target_modules=list(targets))
    model = get_peft_model(model, lora).train()
    fuse(model)
    with_loss(model)
    seen: set[int] = set()
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no address is used twice
    at = -1

    def enter(layer: int) -> None:
        nonlocal at
        at = layer

    def count_all(*given: Any) -> layer_module.Kept:
        made = layer_module_kept(*given)
        for holder in (made, made.attended, made.inside):
            for value in vars(holder).values():
                if isinstance(value, torch.Tensor):
                    count(value)
        assert made.attended.graph is not None
        count(made.attended.graph[0].detach())
        return made

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)
            saved[at] = saved.get(at, 0) + storage.nbytes()
        return tensor

    layer_module_kept = layer_module.Kept
    monkeypatch.setattr(layer_module, "Kept", count_all)
    body = model.get_base_model().model
    for number, layer in enumerate([*body.layers, body.norm]):
        layer.register_forward_pre_hook(lambda *_, number=number: enter(number))
    documents = Documents(torch.tensor([0, TOKENS], dtype=torch.int32), (TOKENS,))
    ids, at_T = torch.randint(0, 128, (1, TOKENS)), torch.arange(TOKENS)
    given = {"input_ids": ids, "position_ids": at_T[None], "positions": at_T, "targets": ids[0]} | documents.kwargs()
    with packed(model):
        model(**given)  # the base's weights have moved into the wide matrices
        seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(**given)
    return saved


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ATTENTION, SEVEN], ids=["qv", "qkvo", "all"])
def test_a_layer_keeps_what_the_formula_says(
    kind: str, dropout: float, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    saved = saved_by_layer(kind, dropout, targets, monkeypatch)[1]  # the first layer's input needs no gradient
    shape = read_shape(SIZES | {"model_type": kind})
    load = Load(Types("float32", "float32"), 4, targets, dropout, True, "adamw", "cpu", "joined")
    assert layer_bytes(shape.blocks[1], shape, load) * TOKENS == saved
