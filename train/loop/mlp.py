"""The gated MLP, down(silu(gate(x)) * up(x)), with adapters on any of the three.

Kept for the backward pass: gate and up side by side, in rows with room for their gradients, and x·A. The product of the
two is made again.

    >>> mlp = Mlp(Group([module.gate_proj, module.up_proj]), Group([module.down_proj]))
    >>> both_TW, thin_TR = mlp.enter(x_TH, seed)
    >>> y_TH, _ = mlp.leave(both_TW, None)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraport.train.loop.groups import Group, beside
from loraport.train.loop.kernels.gpu import roomy
from loraport.train.loop.kernels.mlp import swiglu, swiglu_backward

Seeds = tuple[int | None, int | None]  # for two dropouts; None where nothing is dropped


@dataclass
class Inside:
    """What an MLP keeps of a call: gate and up (T, 2I + R), x·A of them and of down, the seeds of both dropouts."""

    both_TW: Tensor
    wide_thin: Tensor | None
    down_thin: Tensor | None
    seeds: Seeds


@dataclass(frozen=True)
class Mlp:
    """`wide` holds gate and up, `down` what leaves."""

    wide: Group
    down: Group

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of it."""
        return self.wide, self.down

    @property
    def pairs(self) -> list[Tensor | None]:
        """The parameters, in the order of the gradients."""
        return [pair for group in self.groups for pair in group.pairs]

    def seeds(self) -> Seeds:
        """For the dropouts of a call."""
        return self.wide.seed(), self.down.seed()

    def enter(self, x_TH: Tensor, seed: int | None, has_room: bool = False) -> tuple[Tensor, Tensor | None]:
        """Gate and up, and x·A, which stands behind the rows of x where it `has_room`."""
        both_TW = self.wide.room(len(x_TH), x_TH)
        return both_TW, self.wide.forward(x_TH, seed, both_TW[:, : self.wide.outputs], has_room=has_room)[1]

    def leave(
        self, both_TW: Tensor, seed: int | None, residual_TH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The output (T, H), `residual_TH` added, and h·A of what leaves, which does not hold on to h."""
        inner = self.down.inputs
        h_TI = roomy(len(both_TW), inner, self.down.rank, both_TW)[:, :inner]
        swiglu(both_TW[:, :inner], both_TW[:, inner : 2 * inner], h_TI)
        y_TH, thin_TR = self.down.forward(h_TI, seed, residual_TO=residual_TH, has_room=True)
        return y_TH, None if thin_TR is None else thin_TR.clone()

    def backward(self, dy_TW: Tensor, kept: Inside) -> list[Tensor | None]:
        """Gradients of down's adapter. Those of gate and up take the places of these.

        `dy_TW` (T, H + R): the gradient of the output, with room behind it.
        """
        inner, both_TW = self.down.inputs, kept.both_TW
        self.down.thin_gradient(dy_TW)
        h_TI = self.down.input_gradient(dy_TW, kept.seeds[1])
        # The gradient of h becomes h.
        swiglu_backward(h_TI, both_TW[:, :inner], both_TW[:, inner : 2 * inner])
        if self.down.rank and kept.down_thin is None:  # computed again, and not this far
            kept.down_thin = torch.mm(self.down.dropped(h_TI, kept.seeds[1]), self.down.thin_matrices(h_TI.dtype)[0].T)
        grads = self.down.weight_gradients(dy_TW, h_TI, kept.down_thin, kept.seeds[1])
        del h_TI
        self.wide.thin_gradient(both_TW)
        return grads


class LoraSwiglu(torch.autograd.Function):
    """An MLP by itself. Saves its input, and what `Inside` holds."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, mlp: Mlp, *_: Tensor | None) -> Tensor:
        """x (T, H) to y (T, H)."""
        seeds = mlp.seeds()
        both_TW, wide_thin = mlp.enter(x_TH, seeds[0])
        y_TH, down_thin = mlp.leave(both_TW, seeds[1])
        ctx.save_for_backward(x_TH, both_TW, wide_thin, down_thin)
        ctx.mlp, ctx.seeds = mlp, seeds
        return y_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the six matrices."""
        x_TH, both_TW, wide_thin, down_thin = ctx.saved_tensors
        mlp, kept = ctx.mlp, Inside(both_TW, wide_thin, down_thin, ctx.seeds)
        down_grads = mlp.backward(beside(grads[0], mlp.down), kept)
        dx_TH = mlp.wide.input_gradient(both_TW, ctx.seeds[0]) if ctx.needs_input_grad[0] else None
        wide_grads = mlp.wide.weight_gradients(both_TW, x_TH, wide_thin, ctx.seeds[0])
        return dx_TH, None, *wide_grads, *down_grads
