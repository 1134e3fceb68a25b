"""A whole decoder layer of the Llama family as one autograd function: x + attention(norm(x)), then h + mlp(norm(h)).

In one piece, because most of what a layer keeps and copies lies between its modules. Sums of the residual stream happen
inside the products and the norms; norms are made again in the backward pass, in passing; gradients are written where
the next product reads them. A layer keeps, in numbers a token: its input and h (2H), q, k, v and attention's output
(2Q + 2KV), gate and up (2I). One that is computed again keeps its input alone, and stops before down, whose product
nobody needs twice.

    >>> y_1TH = LoraLayer.apply(x_1TH, layer, call, *layer.pairs)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraport.train.loop.attention import Documents, packed_attention
from loraport.train.loop.groups import Group, beside, with_room
from loraport.train.loop.kernels.heads import Heads, join_heads, split_heads
from loraport.train.loop.kernels.norm import rms_norm, rms_norm_backward
from loraport.train.loop.mlp import Inside, Mlp, Seeds

ROOM = "loraport_room"  # on a gradient: how much room there is behind its rows


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Call:
    """What a forward pass gives a layer. `learning`: a backward pass follows; `again`: keep the input alone."""

    cos_TD: Tensor
    sin_TD: Tensor
    documents: Documents
    window: int | None
    learning: bool
    again: bool


@dataclass
class Attended:
    """What attention keeps: q | k | v (T, Q + 2KV + R); its output with its own graph, and what that begins at; x·A."""

    qkv_TW: Tensor
    graph: tuple[Tensor, tuple[Tensor, ...]] | None
    thin_in: Tensor | None
    thin_out: Tensor | None


@dataclass(frozen=True)
class Attention:
    """Norm, projections, attention, projection back; `scale` of the scores."""

    norm: Norm
    entering: Group
    leaving: Group
    heads: Heads
    scale: float

    def forward(self, x_TH: Tensor, call: Call, seeds: Seeds, keep: bool) -> tuple[Tensor, Attended | None]:
        """x + attention(norm(x)), shape (T, H), and what the backward pass needs if it is to `keep` that."""
        n_TH = rms_norm(x_TH, self.norm.weight, self.norm.eps, self.entering.rank)
        qkv_TW = self.entering.room(len(x_TH), x_TH)
        thin_in = self.entering.forward(n_TH, seeds[0], qkv_TW[:, : self.entering.outputs], has_room=True)[1]
        thin_in = thin_in.clone() if keep and thin_in is not None else None  # it stands behind the rows of n
        del n_TH
        sources = split_heads(qkv_TW, self.heads, call.cos_TD, call.sin_TD)
        with torch.set_grad_enabled(keep):
            sources = tuple(each.detach().requires_grad_(keep) for each in sources)
            out_TND = packed_attention(*sources, call.documents, self.scale, call.window)
        with torch.no_grad():
            h_TH, thin_out = self.leaving.forward(out_TND.detach().reshape(len(x_TH), -1), seeds[1], residual_TO=x_TH)
        return h_TH, Attended(qkv_TW, (out_TND, sources), thin_in, thin_out) if keep else None

    def backward(
        self,
        dh_TW: Tensor,
        x_TH: Tensor,
        kept: Attended,
        call: Call,
        seeds: Seeds,
        tail: int | None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, with room for `tail` numbers behind its rows (None: not wanted), and the adapters'.

        `dh_TW`: that of the output, with room behind it.
        """
        assert kept.graph is not None
        (out_TND, sources), kept.graph = kept.graph, None
        self.leaving.thin_gradient(dh_TW)
        dout_TND = self.leaving.input_gradient(dh_TW, seeds[1]).view(out_TND.shape)
        out_TQ = out_TND.detach().reshape(len(x_TH), -1)
        leaving = self.leaving.weight_gradients(dh_TW, out_TQ, kept.thin_out, seeds[1])
        dq_TND, dk_TMD, dv_TMD = torch.autograd.grad(out_TND, sources, dout_TND)
        del out_TND, out_TQ, dout_TND, sources
        dqkv_TW = kept.qkv_TW  # nobody reads q, k and v any more: their gradients take their places
        join_heads(dq_TND, dk_TMD, dv_TMD, kept.qkv_TW, self.heads, call.cos_TD, call.sin_TD, dqkv_TW)
        del dq_TND, dk_TMD, dv_TMD
        self.entering.thin_gradient(dqkv_TW)
        again = bool(self.entering.rank)
        if tail is None:
            dx_TH, n_TH = None, rms_norm(x_TH, self.norm.weight, self.norm.eps)
        else:
            dn_TH = self.entering.input_gradient(dqkv_TW, seeds[0])
            residual_TH = dh_TW[:, : x_TH.shape[1]]
            dx_TH, n_TH = rms_norm_backward(dn_TH, x_TH, self.norm.weight, self.norm.eps, residual_TH, tail, again)
        entering = self.entering.weight_gradients(dqkv_TW, n_TH, kept.thin_in, seeds[0])
        return dx_TH, [*entering, *leaving]


@dataclass(frozen=True)
class Layer:
    """A decoder layer: attention, and the MLP behind its norm."""

    attention: Attention
    norm: Norm
    mlp: Mlp

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of it."""
        return self.attention.entering, self.attention.leaving, *self.mlp.groups

    @property
    def pairs(self) -> list[Tensor | None]:
        """The parameters, in the order of the gradients."""
        return [pair for group in self.groups for pair in group.pairs]

    def seeds(self) -> tuple[Seeds, Seeds]:
        """For the dropouts of a call: before q, k and v, and o; before gate and up, and down."""
        return (self.attention.entering.seed(), self.attention.leaving.seed()), self.mlp.seeds()

    def enter_mlp(self, h_TH: Tensor, seed: int | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Gate and up of norm(h), and x·A where it is kept."""
        n_TH = rms_norm(h_TH, self.norm.weight, self.norm.eps, self.mlp.wide.rank)
        both_TW, thin_TR = self.mlp.enter(n_TH, seed, has_room=True)
        return both_TW, thin_TR.clone() if keep and thin_TR is not None else None


@dataclass
class Kept:
    """What a layer keeps beside its input."""

    h_TH: Tensor
    attended: Attended
    inside: Inside


class LoraLayer(torch.autograd.Function):
    """A decoder layer on one packed sequence. Saves its input, and what `Kept` holds if it is not computed again."""

    @staticmethod
    def forward(ctx: Any, x_1TH: Tensor, layer: Layer, call: Call, *_: Tensor | None) -> Tensor:
        """x (1, T, H) to y (1, T, H). `layer.pairs` come as arguments too, for autograd to see them."""
        x_TH, seeds, keep = x_1TH[0], layer.seeds(), call.learning and not call.again
        h_TH, attended = layer.attention.forward(x_TH, call, seeds[0], keep)
        both_TW, wide_thin = layer.enter_mlp(h_TH, seeds[1][0], keep)
        y_TH, down_thin = layer.mlp.leave(both_TW, seeds[1][1], h_TH)
        if call.learning:
            ctx.save_for_backward(x_1TH)
            ctx.layer, ctx.call, ctx.seeds = layer, call, seeds
            # Not with `save_for_backward`, which would hold all of it to the end of the backward pass.
            ctx.kept = Kept(h_TH, attended, Inside(both_TW, wide_thin, down_thin, seeds[1])) if attended else None
        return y_TH[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the adapters."""
        layer, call, seeds = ctx.layer, ctx.call, ctx.seeds
        x_TH = ctx.saved_tensors[0][0]
        kept, ctx.kept = ctx.kept or make_again(layer, call, seeds, x_TH), None
        h_TH, attended, inside = kept.h_TH, kept.attended, kept.inside
        del kept
        rank = layer.mlp.down.rank
        is_ours = getattr(grads[0], ROOM, None) == rank  # the next layer's; of anything else only a copy is
        dy_TW = with_room(grads[0][0], rank) if is_ours else beside(grads[0][0], layer.mlp.down)
        down = layer.mlp.backward(dy_TW, inside)
        dn_TH = layer.mlp.wide.input_gradient(inside.both_TW, seeds[1][0])
        dh_TH, n_TH = rms_norm_backward(
            dn_TH,
            h_TH,
            layer.norm.weight,
            layer.norm.eps,
            dy_TW[:, : x_TH.shape[1]],
            layer.attention.leaving.rank,
            again=bool(layer.mlp.wide.rank),
        )
        del dn_TH, h_TH
        wide = layer.mlp.wide.weight_gradients(inside.both_TW, n_TH, inside.wide_thin, seeds[1][0])
        del inside, n_TH
        tail = rank if ctx.needs_input_grad[0] else None
        dh_TW = with_room(dh_TH, layer.attention.leaving.rank)
        dx_TH, attention = layer.attention.backward(dh_TW, x_TH, attended, call, seeds[0], tail)
        if dx_TH is None:
            return None, None, None, *attention, *wide, *down
        dx_1TH = dx_TH[None]
        # The layer before reads its gradient as this one does: with room for what its down makes of it.
        setattr(dx_1TH, ROOM, rank)
        return dx_1TH, None, None, *attention, *wide, *down


def make_again(layer: Layer, call: Call, seeds: tuple[Seeds, Seeds], x_TH: Tensor) -> Kept:
    """The forward pass once more, as far as the backward pass needs it."""
    h_TH, attended = layer.attention.forward(x_TH, call, seeds[0], True)
    both_TW, wide_thin = layer.enter_mlp(h_TH, seeds[1][0], True)
    assert attended is not None
    return Kept(h_TH, attended, Inside(both_TW, wide_thin, None, seeds[1]))
