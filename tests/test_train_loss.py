"""The loss: equal to the plain formula, indifferent to padding and to how a batch is cut into pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.clients.errors import ConfigError, Refused
from loraport.clients.rows import Row
from loraport.train.base_model import resolve
from loraport.train.config import ResolvedConfig, RunConfig
from loraport.train.data.tokens import IGNORED, Encoder, Example
from loraport.train.defaults import Facts
from loraport.train.defaults import resolve as resolve_config
from loraport.train.loop.lora import Device, Types, choose_types, load_lora
from loraport.train.loop.trainer import collate, micro_batch_rows, run_trainer, summed_loss
from loraport.train.proof.golden import golden_replies, greedy_reply
from loraport.train.run import save_weights

ROWS = [
    Row([{"role": "user", "content": "count " + "on " * n}, {"role": "assistant", "content": "one two " * n}], n)
    for n in range(1, 9)
]


def config_for(base: Path, **settings: Any) -> ResolvedConfig:
    given = {"model": str(base), "data": "rows.jsonl", "dropout": 0.0, "preset": "aggressive_r16_all"} | settings
    return resolve_config(RunConfig.model_validate(given), Facts())[0]


@pytest.fixture
def encoder(tiny_base: Path) -> Encoder:
    return Encoder.load(tiny_base)


@pytest.fixture
def model(tiny_base: Path) -> Any:
    """A PeftModel whose adapter is not the zero that it starts as."""
    lora = load_lora(resolve(str(tiny_base)), config_for(tiny_base))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return lora.eval()


def batch_of(examples: list[Example]) -> dict[str, torch.Tensor]:
    return collate([example.features for example in examples], pad_token=0)


def test_it_equals_cross_entropy_over_all_logits(model: Any, encoder: Encoder) -> None:
    batch = batch_of([encoder.encode(row) for row in ROWS])
    ours, count = summed_loss(model, batch)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
    plain = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert int(count) == sum(encoder.encode(row).trained_tokens for row in ROWS)
    torch.testing.assert_close(ours, plain)


def test_padding_changes_nothing(model: Any, encoder: Encoder) -> None:
    examples = [encoder.encode(row) for row in ROWS]
    together, _ = summed_loss(model, batch_of(examples))
    alone = sum(summed_loss(model, batch_of([example]))[0] for example in examples)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("micro_batch_tokens", [16, 200], ids=["one row at once", "some rows at once"])
def test_accumulation_gives_the_same_adapter(
    tiny_base: Path, tmp_path: Path, encoder: Encoder, micro_batch_tokens: int
) -> None:
    examples = [encoder.encode(row) for row in ROWS]

    def trained(tokens: int) -> dict[str, torch.Tensor]:
        config = config_for(tiny_base, batch_size=8, epochs=3, learning_rate=1e-3, micro_batch_tokens=tokens)
        lora = load_lora(resolve(str(tiny_base)), config)
        run_trainer(lora, encoder, examples, examples[:2], config, tmp_path)
        return {name: p.detach() for name, p in lora.named_parameters() if p.requires_grad}

    whole, pieces = trained(100_000), trained(micro_batch_tokens)
    for name, parameter in whole.items():
        torch.testing.assert_close(pieces[name], parameter, rtol=1e-3, atol=1e-5, msg=name)


def test_the_evaluation_loss_is_a_mean_over_tokens(tiny_base: Path, tmp_path: Path, encoder: Encoder) -> None:
    examples = [encoder.encode(row) for row in ROWS]
    config = config_for(tiny_base, epochs=1, batch_size=8, micro_batch_tokens=64)
    lora = load_lora(resolve(str(tiny_base)), config)
    metrics = run_trainer(lora, encoder, examples, examples, config, tmp_path)
    with torch.no_grad():
        total, count = summed_loss(lora.eval(), batch_of(examples))
    assert metrics["eval_loss"] == pytest.approx(float(total / count), rel=1e-4)


def test_only_the_adapter_learns(model: Any) -> None:
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and all("lora_" in name for name in learning)


@pytest.mark.parametrize(("tokens", "longest", "rows"), [(4096, 100, 16), (500, 100, 4), (50, 100, 1), (800, 100, 8)])
def test_rows_at_once_divide_the_batch(tiny_base: Path, tokens: int, longest: int, rows: int) -> None:
    assert micro_batch_rows(config_for(tiny_base, batch_size=16, micro_batch_tokens=tokens), longest) == rows


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
    ],
)
def test_types_follow_the_device(tiny_base: Path, load: str, device: Device, expected: Types) -> None:
    assert choose_types(config_for(tiny_base, load=load), device) == expected


def test_a_run_that_diverges_is_ended(tiny_base: Path, tmp_path: Path, encoder: Encoder) -> None:
    lora = load_lora(resolve(str(tiny_base)), config_for(tiny_base))
    next(p for name, p in lora.named_parameters() if "lora_A" in name).data.fill_(float("inf"))
    examples = [encoder.encode(row) for row in ROWS]
    with pytest.raises(Refused, match=r"the run diverged: (loss|grad_norm) is"):
        run_trainer(lora, encoder, examples, examples, config_for(tiny_base), tmp_path)


def test_weights_that_are_not_finite_are_not_stored(model: Any, tmp_path: Path) -> None:
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(Refused, match="not finite"):
        save_weights(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_head_is_no_target(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="no linear layers called lm_head"):
        load_lora(resolve(str(tiny_base)), config_for(tiny_base, target_modules=["q_proj", "lm_head"]))
