"""The model that is trained: types, targets, what learns; and the replies that prove it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.clients.errors import BaseModelError, ConfigError, Refused
from loraport.clients.rows import Row
from loraport.train.base_model import resolve
from loraport.train.data.tokens import Encoder
from loraport.train.loop.lora import Device, load_lora, with_lora
from loraport.train.memory.machine import Types, choose_types
from loraport.train.proof.golden import golden_replies, greedy_reply
from loraport.train.storing import save_weights
from tests.loop import config_for

ROWS = [
    Row([{"role": "user", "content": "count " + "on " * n}, {"role": "assistant", "content": "one two " * n}], n)
    for n in range(1, 5)
]


@pytest.fixture
def encoder(tiny_base: Path) -> Encoder:
    return Encoder.load(tiny_base)


@pytest.fixture
def model(tiny_base: Path) -> Any:
    """A PeftModel whose adapter is not the zero that it starts as."""
    lora = load_lora(resolve(str(tiny_base)), config_for(str(tiny_base)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return lora.eval()


def test_only_the_adapter_learns(model: Any) -> None:
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and all("lora_" in name for name in learning)


def test_greedy_replies_are_those_of_generate(model: Any, encoder: Encoder) -> None:
    prompt = encoder.prompt(ROWS[3].prompt)
    reply = greedy_reply(model, encoder, prompt, 12)
    generated = model.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=sorted(encoder.stop_tokens),
        pad_token_id=0,
    )
    assert reply.tokens == generated.sequences[0, len(prompt) :].tolist()
    expected = [scores.float().log_softmax(-1).max().item() for scores in generated.scores]
    assert reply.logprobs == pytest.approx(expected, abs=1e-4)
    assert all(margin >= 0 for margin in reply.margins)


def test_golden_replies_tell_adapter_and_base_apart(model: Any, encoder: Encoder) -> None:
    (golden,) = golden_replies(model, encoder, [ROWS[0].prompt])
    with model.disable_adapter():
        assert greedy_reply(model, encoder, golden.prompt_tokens, 32) == golden.base
    assert golden.adapter.tokens != golden.base.tokens


@pytest.mark.parametrize(
    ("load", "device", "expected"),
    [
        ("auto", Device("cuda", True), Types("bfloat16", "bfloat16")),
        ("auto", Device("cuda", False), Types("float16", "float16")),
        ("auto", Device("cpu", False), Types("float32", "float32")),
        ("nf4", Device("cuda", True), Types("nf4", "bfloat16")),
        ("nf4", Device("cuda", False), Types("nf4", "float16")),
        ("fp32", Device("cuda", True), Types("float32", "float32")),
        ("nf4 fp32", Device("cuda", True), Types("nf4", "float32")),
        ("int8 fp16", Device("cuda", True), Types("int8", "float16")),
        ("bf16 bf16", Device("cpu", False), Types("bfloat16", "bfloat16")),
        ("auto fp16", Device("cuda", True), Types("float16", "float16")),
    ],
)
def test_types_follow_the_device(tiny_base: Path, load: str, device: Device, expected: Types) -> None:
    """`load`, and behind it a compute type that it may have."""
    held, _, computed = load.partition(" ")
    config = config_for(str(tiny_base), load=held, compute_dtype=computed or "auto")
    assert choose_types(config, device) == expected


def test_a_base_is_held_in_the_type_of_the_arithmetic(tiny_base: Path) -> None:
    config = config_for(str(tiny_base), load="auto", compute_dtype="bf16")
    linear = load_lora(resolve(str(tiny_base)), config).get_base_model().model.layers[0].mlp.up_proj
    assert choose_types(config, Device.here()).held == str(linear.base_layer.weight.dtype).removeprefix("torch.")


def test_weights_that_are_not_finite_are_not_stored(model: Any, tmp_path: Path) -> None:
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(Refused, match="not finite"):
        save_weights(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_linears_that_peft_refuses_are_named() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    base = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(BaseModelError, match=r"PEFT puts no adapter on out_proj of tiny: .* incompatible with Mamba"):
        with_lora(base, config_for(), ["out_proj"])


def test_the_head_is_no_target(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="no linear layers called lm_head"):
        load_lora(resolve(str(tiny_base)), config_for(str(tiny_base), target_modules=["q_proj", "lm_head"]))
