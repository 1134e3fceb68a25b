"""The loss: equal to the plain formula, indifferent to padding and to how a batch is cut into pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.clients.rows import Row
from loraport.train.base_model import resolve
from loraport.train.config import RunConfig
from loraport.train.golden import golden_replies, greedy_reply
from loraport.train.run import load_lora, micro_batch_rows, run_trainer
from loraport.train.tokens import IGNORED, Encoder, Example
from loraport.train.trainer import collate, summed_loss

ROWS = [
    Row([{"role": "user", "content": "count " + "on " * n}, {"role": "assistant", "content": "one two " * n}], n)
    for n in range(1, 9)
]


def config_for(base: Path, **settings: Any) -> RunConfig:
    return RunConfig.model_validate({"model": str(base), "data": "rows.jsonl", "dropout": 0.0} | settings)


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
    prompt = encoder.prompt(ROWS[3])
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
    (golden,) = golden_replies(model, encoder, [encoder.prompt(ROWS[0])])
    with model.disable_adapter():
        assert greedy_reply(model, encoder, golden.prompt_tokens, 32) == golden.base
    assert golden.adapter.tokens != golden.base.tokens
