"""The loop computes the plain formula: on every architecture, whatever the memory settings."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.clients.errors import BaseModelError, Refused
from loraport.train.loop import mlp as mlp_module
from loraport.train.loop import ways as ways_module
from loraport.train.loop.fit import fit
from loraport.train.loop.fused import MADE, forget, fuse, unfuse
from loraport.train.loop.settings import Settings
from loraport.train.loop.ways import LADDER, Ways, agreeing, small_windows, trained
from tests.loop import SPECIAL, ToyRows, assert_same, base_of, config_for, lora_on, ours, plain, weights_of


@pytest.mark.parametrize("kind", SPECIAL)
def test_every_architecture_is_trained_right(kind: str) -> None:
    model, rows = lora_on(base_of(kind)), ToyRows(6)
    ways = agreeing(model)
    assert ways == SPECIAL[kind][2]
    wanted_loss, wanted = plain(model, rows)
    found_loss, found = ours(model, rows, ways, budget=60, layers=1)
    assert found_loss == pytest.approx(wanted_loss, rel=1e-5)
    assert len(wanted) >= 16
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", ["qwen3", "mistral-window", "gemma2"])
def test_the_choice_is_the_same_in_16_bits_and_with_weak_weights(kind: str) -> None:
    base = base_of(kind)
    for parameter in base.parameters():
        parameter.data *= 0.1 if parameter.dim() > 1 else 1.0
    assert agreeing(lora_on(base.to(torch.bfloat16))) == SPECIAL[kind][2]


@pytest.mark.parametrize("kind", ["qwen3", "llama-biases", "mistral-window", "qwen2"])
@pytest.mark.parametrize("ways", LADDER, ids=str)
def test_packing_and_checkpointing_change_nothing(kind: str, ways: Ways) -> None:
    model, rows = lora_on(base_of(kind)), ToyRows(4, seed=3)
    wanted_loss, wanted = plain(model, rows)
    for budget, layers, offload in ((1, 0, False), (10_000, 0, False), (60, 1, False), (10_000, 2, True)):
        found_loss, found = ours(model, rows, ways, budget, layers, offload)
        assert found_loss == pytest.approx(wanted_loss, rel=1e-5)
        assert_same(found, wanted)


SUBSETS: list[tuple[list[str], int, dict[str, Any]]] = [
    (["q_proj"], 3, {}),
    (["k_proj", "v_proj"], 9, {}),
    (["v_proj", "o_proj", "down_proj"], 3, {"use_rslora": True}),
    (["q_proj", "up_proj"], 9, {"layers_to_transform": [1]}),
    (["q_proj", "gate_proj", "down_proj"], 4, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"gate_proj": 1}}),
]


@pytest.mark.parametrize(("targets", "rank", "more"), SUBSETS, ids=str)
@pytest.mark.parametrize("kind", ["qwen3", "llama-biases"])
def test_adapters_on_some_linears_are_trained_right(
    kind: str, targets: list[str], rank: int, more: dict[str, Any]
) -> None:
    model, rows = lora_on(base_of(kind), rank=rank, targets=targets, **more), ToyRows(4, seed=3)
    wanted_loss, wanted = plain(model, rows)
    for layers in (0, 1, 2):
        found_loss, found = ours(model, rows, Ways(), 60, layers)
        assert found_loss == pytest.approx(wanted_loss, rel=1e-5)
        assert_same(found, wanted)


@pytest.mark.parametrize(
    ("kind", "ways"),
    [("qwen3", Ways()), ("qwen3", Ways(fused=False)), ("granite", Ways(own_head=False)), ("phi3", Ways())],
    ids=str,
)
def test_dropout_is_the_same_when_layers_are_computed_again(kind: str, ways: Ways) -> None:
    model, rows = lora_on(base_of(kind), dropout=0.3), ToyRows(4, seed=3)
    results = []
    for layers in (0, 1, 2):
        torch.manual_seed(4)
        results.append(ours(model, rows, ways, 60, layers))
    (loss, gradients), *others = results
    assert all(each[0] == loss for each in others)
    for _, found in others:
        assert_same(found, gradients, rtol=0, share=1e-6)
    assert abs(loss - plain(model.eval(), rows)[0]) > 1e-4  # it did drop something


class Leaking(torch.nn.Module):
    """What a model with a state across tokens does: each token sees the mean of all before it."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        return self.linear(x + 0.1 * x.cumsum(1) / count, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_state_across_documents_is_noticed(dtype: torch.dtype) -> None:
    model = lora_on(base_of("gpt-neox").to(dtype))
    for layer in model.get_base_model().gpt_neox.layers:
        layer.mlp = Leaking(layer.mlp)
    assert agreeing(model) == Ways(fused=False, packed=False)


def test_a_cap_too_high_to_show_is_noticed() -> None:
    base = base_of("gemma2")
    base.config.attn_logit_softcapping, base.config.final_logit_softcapping = 5000.0, 3000.0
    for layer in base.model.layers:
        layer.self_attn.attn_logit_softcapping = 5000.0
    assert agreeing(lora_on(base)) == Ways(False, False, False)


def test_dropout_in_the_base_itself_is_left_to_it() -> None:
    base = base_of("llama")
    base.config.attention_dropout = 0.1
    assert agreeing(lora_on(base)) == Ways(fused=False, packed=False)


def test_windows_longer_than_the_documents_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("mistral-window")
    base.config.sliding_window = 1000
    model = lora_on(base)
    assert agreeing(model) == Ways()
    assert base.config.sliding_window == 1000
    own = ways_module.packed

    @contextlib.contextmanager
    def without_windows(model: Any) -> Iterator[None]:
        small, base.config.sliding_window = base.config.sliding_window, 1000
        with own(model):
            yield
        base.config.sliding_window = small

    monkeypatch.setattr(ways_module, "packed", without_windows)
    assert not agreeing(model).packed


def test_windows_of_layers_become_small_and_come_back() -> None:
    model = base_of("qwen2-window")
    attention = model.model.layers[1].self_attn
    attention.sliding_window = 4096
    with small_windows(model):
        assert (attention.sliding_window, model.config.sliding_window) == (5, 5)
    assert (attention.sliding_window, model.config.sliding_window) == (4096, 6)


def test_a_model_without_finite_loss_is_refused() -> None:
    model = lora_on(base_of("llama"))
    [p for p in model.parameters() if p.requires_grad][-1].data.fill_(float("nan"))
    with pytest.raises(Refused, match="loss is not finite before the first step"):
        agreeing(model)


def test_a_model_that_no_way_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways_module, "is_right", lambda *_: False)
    with pytest.raises(BaseModelError, match="LlamaForCausalLM does not compute the same in training"):
        agreeing(lora_on(base_of("llama")))


def test_the_model_is_itself_again_afterwards() -> None:
    model = lora_on(base_of("qwen3"))
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids).logits
    with trained(model, Ways()):
        assert model.config._attn_implementation == "loraport"
    assert model.config._attn_implementation == "sdpa"
    ours_alone = {"forward", MADE, "again", "to_host"}
    assert not any(ours_alone & set(vars(module)) for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_change_between_two_uses_is_seen() -> None:
    model, rows = lora_on(base_of("qwen3")), ToyRows(3)
    ours(model, rows, Ways(), 60)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(3)
    loss, _ = ours(model, rows, Ways(), 60)
    assert loss == pytest.approx(plain(model, rows)[0], rel=1e-5)


def test_inputs_of_layers_may_be_kept_elsewhere() -> None:
    """As offloading keeps them; on a CPU there is nowhere to go, and no memory to pin."""
    model, rows = lora_on(base_of("qwen3"), dropout=0.3), ToyRows(3)
    results = []
    for to_host in (False, True):
        torch.manual_seed(4)
        hooks = torch.autograd.graph.save_on_cpu() if to_host else contextlib.nullcontext()
        with hooks:
            results.append(ours(model, rows, Ways(), 60, 2))
    assert results[0][0] == results[1][0]
    assert_same(results[1][1], results[0][1], rtol=0, share=0)


@pytest.mark.parametrize("where", ["swiglu", "swiglu_backward"])
def test_a_step_that_ran_out_of_memory_is_made_again(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = lora_on(base_of("qwen3")), ToyRows(3)
    wanted = ours(model, rows, Ways(), 60, 1)
    own, calls = getattr(mlp_module, where), 0

    def second_fails(*given: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        own(*given)

    monkeypatch.setattr(mlp_module, where, second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        ours(model, rows, Ways(), 60, 1)
    model.zero_grad()
    found = ours(model, rows, Ways(), 60, 1)
    assert calls > 2 and found[0] == wanted[0]
    assert_same(found[1], wanted[1], rtol=0, share=0)


class TwoOutputs(torch.nn.Module):
    """Two linears side by side; the other one's gradients stand where the first could take room to be."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(32, 96, bias=False), torch.nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def test_gradients_beside_others_are_left_alone() -> None:
    model = lora_on(TwoOutputs(), rank=8, targets=["a", "b"], task_type=None)
    x, dy = torch.randn(20, 32, requires_grad=True), torch.randn(20, 128)
    learning = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((model.get_base_model()(x) * dy).sum(), learning)

    wanted = gradients()
    fuse(model)
    found = gradients()
    unfuse(model)
    for ours_, plain_ in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_, plain_)


def test_what_stands_behind_an_input_is_left_alone() -> None:
    model = lora_on(torch.nn.Sequential(torch.nn.Linear(96, 16, bias=False)), rank=8, targets=["0"], task_type=None)
    wide = torch.randn(20, 128)
    before, wanted = wide.clone(), model.get_base_model()(wide[:, :96])
    fuse(model)
    torch.testing.assert_close(model.get_base_model()(wide[:, :96]), wanted)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("changed", ["lora_A", "lora_B"])
def test_copies_of_the_adapter_follow_an_optimiser_outside_of_torch(changed: str) -> None:
    model = lora_on(base_of("llama"))
    linear = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    fuse(model)
    linear(x)
    weight = getattr(linear, changed)["default"].weight
    version = weight._version
    weight.data.mul_(3)  # as bitsandbytes does: autograd's counter does not move
    assert weight._version == version
    forget(model)
    fused = linear(x)
    unfuse(model)
    torch.testing.assert_close(fused, linear(x))


@pytest.mark.parametrize(
    "settings", [Settings(1), Settings(80, 1), Settings(10_000, 2, True)], ids=["alone", "half", "offload"]
)
def test_a_run_ends_with_the_same_weights(tmp_path: Path, settings: Settings) -> None:
    """Batches of 8 rows in 8, about 3 and 1 micro-steps: accumulation is not seen in the result."""

    def after(chosen: Settings, folder: Path) -> dict[str, torch.Tensor]:
        model = lora_on(base_of("qwen3"))
        fit(model, ToyRows(17), ToyRows(5, 1), config_for(batch_size=8, epochs=2), chosen, folder, {})
        return weights_of(model)

    whole = after(Settings(10_000), tmp_path / "whole")
    assert_same(after(settings, tmp_path / "other"), whole, rtol=1e-3, share=1e-4)


def test_the_evaluation_is_a_mean_over_targets(tmp_path: Path) -> None:
    model, rows = lora_on(base_of("qwen3")), ToyRows(7, 1)
    config = config_for(epochs=1, learning_rate=1e-9)
    outcome = fit(model, ToyRows(4), rows, config, Settings(50), tmp_path, {})
    loss, _ = plain(model, rows)
    assert outcome.metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert outcome.metrics["eval_perplexity"] == pytest.approx(2.718281828**loss, rel=1e-3)
    assert outcome.metrics["steps"] == 1
