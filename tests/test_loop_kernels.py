"""Our autograd functions against autograd itself: norms, rotary embeddings, SwiGLU, the loss over the head, LoRA."""

from typing import Any

import pytest
import torch
from torch import Tensor

from loraport.train.loop.attention import Documents, attend, by_document, packed
from loraport.train.loop.fused import forget, fuse, unfuse
from loraport.train.loop.groups import Group, dense
from loraport.train.loop.kernels.cross_entropy import cross_entropy
from loraport.train.loop.kernels.dropout import add_dropped, draw_seed, drop
from loraport.train.loop.kernels.heads import Heads, join_heads, split_heads
from loraport.train.loop.kernels.mlp import swiglu, swiglu_backward
from loraport.train.loop.kernels.norm import RmsNorm, rms_norm, rms_norm_backward
from loraport.train.loop.loss import HeadLoss
from tests.loop import base_of, lora_on

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_swiglu_and_its_gradients() -> None:
    gate, up, dh = (torch.randn(5, 7, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    h = torch.nn.functional.silu(gate) * up
    wanted = torch.autograd.grad(h, (gate, up), dh)
    product = torch.empty(5, 9, dtype=DOUBLE)[:, :7]  # rows with room behind them
    swiglu(gate.detach(), up.detach(), product)
    torch.testing.assert_close(product, h.detach())
    both = torch.cat((gate, up), dim=1).detach()
    swiglu_backward(dh.data, both[:, :7], both[:, 7:])
    torch.testing.assert_close(both, torch.cat(wanted, dim=1))
    torch.testing.assert_close(dh.detach(), h.detach())


@pytest.mark.parametrize("shape", [(6, 16), (1, 6, 16), (3, 4, 16)], ids=str)
def test_rms_norm_and_its_gradient(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(16)
    y = RmsNorm.apply(x, weight, 1e-6)
    wanted = torch.nn.functional.rms_norm(x, (16,), weight, 1e-6)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn(shape)
    torch.testing.assert_close(*(torch.autograd.grad(each, x, dy)[0] for each in (y, wanted)))


def test_rms_norm_of_a_slice_of_a_wider_product() -> None:
    wide, weight = torch.randn(6, 40), torch.randn(16)
    x = wide[:, 8:24].requires_grad_()
    wanted = torch.nn.functional.rms_norm(x, (16,), weight, 1e-6)
    found = RmsNorm.apply(x, weight, 1e-6)
    torch.testing.assert_close(found, wanted)
    dy = torch.randn(6, 40)[:, 3:19]
    torch.testing.assert_close(*(torch.autograd.grad(each, x, dy)[0] for each in (found, wanted)))


def test_the_norm_of_a_residual_stream() -> None:
    """The way back adds what the stream brings, makes the output again, and leaves room behind its rows."""
    x, weight, residual = torch.randn(6, 16, requires_grad=True), torch.randn(16), torch.randn(6, 20)[:, 1:17]
    y, dy = rms_norm(x.detach(), weight, 1e-6, tail=3), torch.randn(6, 16)
    assert y.stride() == (64, 1)
    wanted = torch.nn.functional.rms_norm(x, (16,), weight, 1e-6)
    dx, again = rms_norm_backward(dy, x.detach(), weight, 1e-6, residual, tail=5, again=True)
    assert dx.stride() == (64, 1)
    torch.testing.assert_close(dx, torch.autograd.grad(wanted, x, dy)[0] + residual)
    torch.testing.assert_close(y, wanted.detach())
    assert again is not None
    torch.testing.assert_close(again, wanted.detach())


def angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    half = torch.outer(torch.arange(length), 10_000.0 ** -(torch.arange(0, size, 2) / size)).to(DOUBLE)
    both = torch.cat((half, half), dim=-1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "with norms"])
def test_heads_and_their_gradients(norms: bool) -> None:
    """Against transformers' rotation and torch's norm; rows of the product have something else behind them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = angles(5, 8)
    weights = [torch.randn(8, dtype=DOUBLE) for _ in range(2)] if norms else [None, None]
    heads = Heads(4, 2, 8, *weights, 1e-6)
    wide = torch.randn(5, 70, dtype=DOUBLE)
    qkv = wide[:, :64].clone().requires_grad_()
    parts = [part.view(5, -1, 8) for part in qkv.split([32, 16, 16], dim=1)]
    if norms:
        parts[:2] = [
            torch.nn.functional.rms_norm(part, (8,), weight, 1e-6)
            for part, weight in zip(parts[:2], weights, strict=True)
        ]
    turned = apply_rotary_pos_emb(*(each.transpose(0, 1)[None] for each in parts[:2]), cos[None], sin[None])
    wanted = [*(each[0].transpose(0, 1) for each in turned), parts[2]]
    dys = [torch.randn_like(each) for each in wanted]
    gradient = torch.autograd.grad(wanted, qkv, dys)[0]
    found = split_heads(wide, heads, cos, sin)
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain.detach())
    behind = wide[:, 64:].clone()
    join_heads(*dys, wide, heads, cos, sin, wide)
    torch.testing.assert_close(wide[:, :64], gradient)
    assert torch.equal(wide[:, 64:], behind)


def test_rope_over_a_part_of_the_head_is_refused() -> None:
    cos, sin = angles(5, 4)
    with pytest.raises(RuntimeError, match="size of tensor"):
        split_heads(torch.randn(5, 24, dtype=DOUBLE), Heads(1, 1, 8), cos, sin)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_cross_entropy_and_its_scaled_gradient(scale: float) -> None:
    logits = (torch.randn(9, 31) * 5).requires_grad_()
    targets = torch.randint(31, (9,))
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    losses, right, gradient = cross_entropy(logits.detach().clone(), targets, scale)
    torch.testing.assert_close(losses, wanted)
    assert right.tolist() == (logits.argmax(-1) == targets).tolist()
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum() * scale, logits)[0])


def head_of(bias: bool) -> Any:
    return torch.nn.Linear(8, 31, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [2, 1000], ids=["in chunks", "at once"])
def test_the_loss_over_the_head(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraport.train.loop.loss.CHUNK_LOGITS", rows * 31)
    head, hidden, targets = head_of(bias), torch.randn(9, 8, requires_grad=True), torch.randint(31, (9,))
    wanted = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum") / 9
    found, right = HeadLoss.apply(hidden, head, targets, 1 / 9, True)
    torch.testing.assert_close(found, wanted)
    assert int(right) == int((head(hidden).argmax(-1) == targets).sum())
    # What comes behind the loss, such as a loss scaler's power of two, multiplies the gradient.
    torch.testing.assert_close(*(torch.autograd.grad(each * 256, hidden)[0] for each in (found, wanted)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_small_gradients_survive_16_bits(dtype: torch.dtype, tolerance: float) -> None:
    """1 / 100,000 targets would vanish in float16 if it were rounded before its loss scaler comes."""
    head, targets = head_of(False).to(dtype), torch.randint(31, (9,))
    hidden = torch.randn(9, 8, dtype=dtype, requires_grad=True)
    loss, _ = HeadLoss.apply(hidden, head, targets, 1e-5, True)
    (found,) = torch.autograd.grad(loss * 65536, hidden)
    exact = hidden.detach().float().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact @ head.weight.float().T, targets, reduction="sum") * 1e-5 * 65536
    (expected,) = torch.autograd.grad(wanted, exact)
    assert float((found.float() - expected).norm() / expected.norm()) < tolerance


def test_a_micro_step_without_targets_has_gradients_of_zero() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    loss, right = HeadLoss.apply(hidden, head_of(False), torch.empty(0, dtype=torch.int64), 0.5, True)
    loss.backward()
    assert (loss.item(), right.item()) == (0, 0)
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)


def test_without_gradients_none_are_made() -> None:
    with torch.no_grad():
        loss, _ = HeadLoss.apply(torch.randn(3, 8), head_of(True), torch.randint(31, (3,)), 1.0, False)
    assert not loss.requires_grad


@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
def test_packed_attention_is_masked_attention(window: int | None) -> None:
    """transformers' convention: a window of w sees itself and the w - 1 tokens before."""
    lengths = (9, 1, 6)
    q, k, v = (torch.randn(16, heads, 8, dtype=DOUBLE, requires_grad=True) for heads in (4, 2, 2))
    found = by_document(q, k, v, Documents(torch.tensor([0, 9, 10, 16]), lengths), 0.3, window)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    distance = torch.arange(16)[:, None] - torch.arange(16)
    mask = (document[:, None] == document) & (distance >= 0) & (distance < (window or 99))
    wide = [each.repeat_interleave(2, dim=1) for each in (k, v)]
    scores = torch.einsum("tnd,snd->nts", q, wide[0]) * 0.3
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    wanted = torch.einsum("nts,snd->tnd", weights, wide[1])
    torch.testing.assert_close(found, wanted)
    dy = torch.randn_like(found)
    for ours, plain in zip(*(torch.autograd.grad(each, (q, k, v), dy) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    "asked", [{"softcap": 50.0}, {"s_aux": torch.ones(4)}, {"is_causal": False}, {"new": 1}], ids=str
)
def test_attention_refuses_what_it_cannot_do(asked: dict[str, Any]) -> None:
    x = torch.randn(1, 4, 6, 8)
    documents = Documents(torch.tensor([0, 6]), (6,)).kwargs()
    attend(torch.nn.Module(), x, x, x, None, dropout=0.0, position_ids=torch.arange(6), softcap=None, **documents)
    with pytest.raises(ValueError, match="packed attention cannot do"):
        attend(torch.nn.Module(), x, x, x, None, **documents, **asked)


# Whole layers; an MLP and linears by themselves.
@pytest.mark.parametrize(
    ("kind", "again"),
    [("llama-biases", False), ("llama-biases", True), ("qwen3", False), ("qwen3", True), ("granite", False)],
)
def test_the_gradients_of_fused_layers_are_those_of_finite_differences(kind: str, again: bool) -> None:
    """In float64 and with dropout that is the same each time: its gradient is that of its forward."""
    model = lora_on(base_of(kind), dropout=0.5).double().train()
    body = model.get_base_model().model
    layer = body.layers[0]
    learning = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(1, 7, 32, dtype=DOUBLE, requires_grad=True)
    angles_of = body.rotary_emb(x, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]))
    documents = Documents(torch.tensor([0, 4, 7]), (4, 3)).kwargs()

    def seeded(*_: Tensor) -> Tensor:
        torch.manual_seed(5)
        return layer(x, position_embeddings=angles_of, attention_mask=None, **documents)

    with packed(model):
        fuse(model)
        layer.__dict__["again"] = again
        torch.testing.assert_close(seeded(), seeded(), rtol=0, atol=0)
        dy = torch.randn(1, 7, 32, dtype=DOUBLE)
        found = torch.autograd.grad(seeded(), [x, *learning], dy)
        for tensor, gradient in zip([x, *learning], found, strict=True):
            direction = torch.randn_like(tensor)
            slope = 0.0
            for sign in (1, -1):
                tensor.data += sign * 1e-5 * direction
                forget(layer)
                slope += sign * (seeded() * dy).sum().item() / 2e-5
                tensor.data -= sign * 1e-5 * direction
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6)
        unfuse(model)


def test_dropout_is_that_of_peft() -> None:
    """Over many draws the same mean and the same variance of a layer's output as PEFT's own forward."""
    linear = lora_on(base_of("llama"), dropout=0.25).get_base_model().model.layers[0].self_attn.q_proj.train()
    x = torch.randn(32).expand(20_000, 32)

    def moments() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = linear(x)
        return y.mean(0), y.var(0)

    wanted = moments()
    fuse(linear)
    found = moments()
    unfuse(linear)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=float(4 * (wanted[1].max() / 10_000).sqrt()))
    torch.testing.assert_close(found[1], wanted[1], rtol=0.1, atol=1e-4)
    assert float(wanted[1].min()) > 0


def test_dropout_keeps_the_share_that_it_should() -> None:
    seed = draw_seed()
    dropped = drop(torch.ones(400, 500), 0.25, seed)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert float((dropped > 0).float().mean()) == pytest.approx(0.75, abs=0.005)
    assert len({drop(torch.ones(8, 9), 0.25, draw_seed()).numpy().tobytes() for _ in range(50)}) == 50
    x, y = torch.randn(400, 500), torch.randn(400, 500)
    torch.testing.assert_close(add_dropped(y.clone(), x, 0.25, seed), y + x * dropped)


def test_nothing_is_dropped_in_an_evaluation() -> None:
    linear = lora_on(base_of("llama"), dropout=0.25).get_base_model().model.layers[0].self_attn.q_proj
    group = Group([linear.train()])
    assert group.seed() is not None
    linear.eval()
    assert group.seed() is None


def test_a_weight_is_cast_for_the_arithmetic_alone() -> None:
    linear = torch.nn.Linear(4, 3).to(torch.bfloat16)
    assert dense(linear, torch.bfloat16) is linear.weight
    assert dense(linear, torch.float32).dtype == torch.float32


def test_what_others_call_groups_is_none_of_ours() -> None:
    forget(torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1)))  # of an image encoder, or a convolution before attention
