"""Linear layers that share an input, with their adapters, as one matrix product each way.

The adapter of a linear is a product with a thin matrix in between. Computed by itself it costs little arithmetic and
much memory traffic: every output is written twice. Here the thin matrices stand beside the weight, in one wide matrix

    wide = | W      s·B |      W of all members one below the other (out x in), s·B (out x R) with a block for each,
           | A          |      A (R x in) of all one below the other; R is the sum of their ranks, rounded up to 8

and x·Aᵀ beside the input: y = [x, x·Aᵀ] · [W, sB]ᵀ and dx = [dy, dy·sB] · [W; A] are then one product each, which
reads and writes everything once. An unquantised base keeps its weights in such matrices (its own become views of
them); quantised weights are brought to 16 bits in one that lasts for a product.

    >>> group = Group([attention.q_proj, attention.k_proj, attention.v_proj])
    >>> y_TO, thin_TR = group.forward(x_TI, None)
"""

from typing import Any

import torch
from torch import Tensor

from loraport.train.loop.kernels.dropout import add_dropped, draw_seed, drop
from loraport.train.loop.kernels.gpu import on_gpu, roomy, stride_of
from loraport.train.loop.kernels.nf4 import fill_nf4

LINEARS = {"Linear", "Linear4bit", "Linear8bitLt"}
ALIGNED = 8  # numbers of 16 bits that make the 16 bytes on which rows of a matrix must begin for tensor cores


def active(module: Any) -> str | None:
    """Name of the adapter that works in a layer; None for a plain one."""
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return None
    return next((name for name in module.active_adapters if name in module.lora_A), None)


def mm32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32; 16-bit arguments are summed and returned in float32 without a copy of them."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def dense(base: Any, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a linear layer in `dtype`, dequantised where it is held in 4 or 8 bits."""
    if type(base).__name__ in ("Linear4bit", "Linear8bitLt"):
        weight_OI = torch.empty(base.out_features, base.in_features, device=base.weight.device, dtype=dtype)
        fill(weight_OI, base)
        return weight_OI
    weight = base.weight
    return weight if weight.dtype == dtype else weight.to(dtype)


def fill(out_OI: Tensor, base: Any) -> None:
    """Write the weight of a linear layer into `out`, whose rows may be parts of longer ones."""
    kind = type(base).__name__
    if kind == "Linear8bitLt":
        scales_O = base.state.SCB if base.state.SCB is not None else base.weight.SCB
        torch.mul(base.weight.data, (scales_O / 127.0)[:, None], out=out_OI)
    elif kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(base)  # FSDP hands the weight back without its scales
        if on_gpu(out_OI) and base.weight.dtype == torch.uint8 and base.weight.quant_state.quant_type == "nf4":
            fill_nf4(out_OI, base.weight.data, base.weight.quant_state)
        else:
            out_OI.copy_(dequantize_4bit(base.weight.data, base.weight.quant_state))
    else:
        out_OI.copy_(base.weight)


class Group:
    """Members with one input (T, in): their outputs side by side (T, out), in the order of `modules`.

    `pairs`: A and B of each in turn, the parameters, as autograd has to see them; None for a member without adapter.
    The matrices made of them are kept until `forget`.
    """

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        self.bases = [getattr(module, "base_layer", module) for module in modules]
        self.names = [active(module) for module in modules]
        named = list(zip(modules, self.names, strict=True))
        self.inputs = int(self.bases[0].in_features)
        self.rows = slices([int(base.out_features) for base in self.bases])
        self.outputs = self.rows[-1].stop
        self.parts = slices([0 if name is None else int(module.r[name]) for module, name in named])
        self.rank = -(-self.parts[-1].stop // ALIGNED) * ALIGNED
        self.scales = [0.0 if name is None else float(module.scaling[name]) for module, name in named]
        drops = [module.lora_dropout[name] for module, name in named if name is not None]
        self.dropout = max((drop.p for drop in drops if isinstance(drop, torch.nn.Dropout)), default=0.0)
        # Reading them from their modules takes longer than launching a kernel.
        self.pairs: list[Tensor | None] = []
        for module, name in named:
            self.pairs += [None, None] if name is None else [module.lora_A[name].weight, module.lora_B[name].weight]
        self.bias = self.join_biases()
        self.fresh = False  # whether the thin matrices hold what the adapters hold
        self.a_RI: Tensor | None = None
        self.b_OR: Tensor | None = None
        self.kept: Tensor | None = None
        sharded = any("sharded" in base.__dict__ for base in self.bases)  # weights that come and go: see shards.py
        if not sharded and {type(base).__name__ for base in self.bases} == {"Linear"}:
            self.kept = self.keep_weights()

    @property
    def groups(self) -> tuple["Group", ...]:
        """Itself, as the parts of a layer have it."""
        return (self,)

    def join_biases(self) -> Tensor | None:
        """The biases side by side, zero for a member without; None where no member has one."""
        if all(base.bias is None for base in self.bases):
            return None
        weight = self.bases[0].weight
        like = next(base.bias for base in self.bases if base.bias is not None)
        return torch.cat(
            [
                torch.zeros(base.out_features, device=weight.device, dtype=like.dtype)
                if base.bias is None
                else base.bias
                for base in self.bases
            ]
        ).detach()

    def keep_weights(self) -> Tensor:
        """The wide matrix for good: the members' weights move into it."""
        weight = self.bases[0].weight
        wide = self.empty_wide(weight).zero_()
        for base, row in zip(self.bases, self.rows, strict=True):
            wide[row, : self.inputs] = base.weight.data
            base.weight.data = wide[row, : self.inputs]
        return wide

    def empty_wide(self, like: Tensor) -> Tensor:
        """A wide matrix without numbers."""
        return roomy(self.outputs + self.rank, self.inputs, self.rank, like)

    def forget(self) -> None:
        """Have what is made of the adapters made anew."""
        self.fresh = False

    def refresh(self, dtype: torch.dtype) -> None:
        """Bring A of all (R, in) and s·B of all (out, R) up to date."""
        if self.fresh or not self.rank:
            return
        a_RI, b_OR = self.thin_matrices(dtype)
        used = [a.detach() for a in self.pairs[::2] if a is not None]
        a_RI[: self.parts[-1].stop] = used[0] if len(used) == 1 else torch.cat(used)
        for b, scale, row, part in zip(self.pairs[1::2], self.scales, self.rows, self.parts, strict=True):
            if b is not None:
                torch.mul(b.detach(), scale, out=b_OR[row, part])
        self.fresh = True

    def thin_matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where A and s·B of all stand: in the wide matrix, where that is kept."""
        if self.a_RI is None or self.b_OR is None or self.a_RI.dtype != dtype:
            if self.kept is not None:
                self.a_RI, self.b_OR = (
                    self.kept[self.outputs :, : self.inputs],
                    self.kept[: self.outputs, self.inputs :],
                )
            else:
                device = self.bases[0].weight.device
                self.a_RI = torch.zeros(self.rank, self.inputs, device=device, dtype=dtype)
                self.b_OR = torch.zeros(self.outputs, self.rank, device=device, dtype=dtype)
        return self.a_RI, self.b_OR

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The wide matrix (out + R, in + R); its corner is never read."""
        self.refresh(dtype)
        if self.kept is not None:
            return self.kept
        wide = self.empty_wide(torch.empty(0, device=self.bases[0].weight.device, dtype=dtype))
        for base, row in zip(self.bases, self.rows, strict=True):
            fill(wide[row, : self.inputs], base)
        if self.a_RI is not None and self.b_OR is not None:
            wide[: self.outputs, self.inputs :] = self.b_OR
            wide[self.outputs :, : self.inputs] = self.a_RI
        return wide

    def seed(self) -> int | None:
        """For the dropout before A of one call, the same for all members; None where nothing is dropped."""
        return draw_seed() if self.dropout and self.modules[0].training else None

    def dropped(self, x_TI: Tensor, seed: int | None) -> Tensor:
        """What A reads."""
        return x_TI if seed is None else drop(x_TI, self.dropout, seed)

    def room(self, length: int, like: Tensor) -> Tensor:
        """An empty tensor for the outputs, (T, out + R): there is room behind them for what their gradients need."""
        return roomy(length, self.outputs, self.rank, like)

    def forward(
        self,
        x_TI: Tensor,
        seed: int | None,
        out_TO: Tensor | None = None,
        residual_TO: Tensor | None = None,
        has_room: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs of all members (T, out), `residual_TO` added, and dropout(x)·Aᵀ (T, R), None without adapters.

        One product where x `has_room` for the latter behind its rows, as `roomy` makes it: only who made x knows that
        nobody's numbers are there. Else the adapter's part comes first, and the weight's is added to it.
        """
        wide = self.wide(x_TI.dtype)
        if out_TO is None:
            out_TO = torch.empty(x_TI.shape[0], self.outputs, device=x_TI.device, dtype=x_TI.dtype)
        x_TW = with_room(x_TI, self.rank) if has_room else None if self.rank else x_TI
        thin_TR = None
        if self.a_RI is not None:
            room_TR = None if x_TW is None else x_TW[:, self.inputs :]
            thin_TR = torch.mm(self.dropped(x_TI, seed), self.a_RI.T, out=room_TR)
        if x_TW is not None:
            product(x_TW, wide[: self.outputs].T, out_TO, residual_TO)
        else:
            product(thin_TR, wide[: self.outputs, self.inputs :].T, out_TO, residual_TO)
            out_TO.addmm_(x_TI, wide[: self.outputs, : self.inputs].T)
        if self.bias is not None:
            out_TO += self.bias.to(x_TI.dtype)
        return out_TO, thin_TR

    def backward(
        self, dy_TW: Tensor, x_TI: Tensor, thin_TR: Tensor | None, seed: int | None, wanted: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, where it is `wanted`, and of each A and B in turn, in float32.

        `dy_TW` (T, out + R) holds the gradients of the outputs; behind them there is room. `thin_TR` as from `forward`.
        """
        self.thin_gradient(dy_TW)
        dx_TI = self.input_gradient(dy_TW, seed) if wanted else None
        return dx_TI, self.weight_gradients(dy_TW, x_TI, thin_TR, seed)

    def thin_gradient(self, dy_TW: Tensor) -> None:
        """dy·sB to its place behind dy."""
        if self.b_OR is not None:
            torch.mm(dy_TW[:, : self.outputs], self.b_OR, out=dy_TW[:, self.outputs :])

    def input_gradient(self, dy_TW: Tensor, seed: int | None) -> Tensor:
        """The gradient of x (T, in), of dy with dy·sB behind it."""
        wide = self.wide(dy_TW.dtype)
        if seed is None or self.a_RI is None:
            return dy_TW @ wide[:, : self.inputs]
        dx_TI = dy_TW[:, : self.outputs] @ wide[: self.outputs, : self.inputs]
        return add_dropped(dx_TI, dy_TW[:, self.outputs :] @ self.a_RI, self.dropout, seed)

    def weight_gradients(
        self, dy_TW: Tensor, x_TI: Tensor, thin_TR: Tensor | None, seed: int | None
    ) -> list[Tensor | None]:
        """Gradients of A (r, in) and B (out, r) of each member in turn; None where there is no adapter."""
        if thin_TR is None:
            return [None] * len(self.pairs)
        da_RI = mm32(dy_TW[:, self.outputs :].T, self.dropped(x_TI, seed))
        db_OR = mm32(dy_TW[:, : self.outputs].T, thin_TR)
        grads: list[Tensor | None] = []
        for row, part, scale, name in zip(self.rows, self.parts, self.scales, self.names, strict=True):
            grads += [None, None] if name is None else [da_RI[part], db_OR[row, part] * scale]
        return grads


def product(left: Tensor | None, right: Tensor, out: Tensor, residual: Tensor | None) -> None:
    """left @ right into `out`, `residual` added in the same pass."""
    if residual is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(residual, left, right, out=out)


def with_room(x_TI: Tensor, more: int) -> Tensor:
    """x with what lies behind each of its rows (T, in + more). It was made with that room, by `roomy`."""
    length, n = x_TI.shape
    stride = stride_of(n, more)
    assert x_TI.stride(0) == stride, f"rows of {n} numbers every {x_TI.stride(0)}, not {stride}"
    # `data`: autograd need not know of what is written behind the rows.
    return x_TI.data.as_strided((length, n + more), (stride, 1))


def beside(dy_TO: Tensor, group: Group) -> Tensor:
    """A copy of the gradient of a group's outputs, with room behind its rows: (T, out + R)."""
    dy_TW = group.room(len(dy_TO), dy_TO)
    dy_TW[:, : group.outputs] = dy_TO
    return dy_TW


def slices(sizes: list[int]) -> list[slice]:
    """Parts of these sizes, one behind the other."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
