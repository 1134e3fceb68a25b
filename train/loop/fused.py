"""Decoder layers that keep less and move less: LoRA linears, the gated MLP, norms and rotary embeddings as autograd
functions of our own, put in place of the forwards of transformers and PEFT.

The modules, their parameters and what is saved stay PEFT's; `fuse` replaces instance methods and `unfuse` takes them
away again, so that golden replies come from PEFT's own code. Linears with the same input (q, k, v; gate, up) are one
group: their A matrices are one product, and their gradients of the input are summed by the matrix products themselves.
Kept for the backward pass: of a group its input and x·A; of the MLP its input, gate and up (the product is made
again). Quantised weights are brought to 16 bits for each use, one at a time.

Whatever is not recognised keeps its own forward. Before a run, `train/loop/ways.py` compares the whole with the forward
of transformers and PEFT on a few tokens.

    >>> fuse(model)       # a PeftModel; returns how many modules were replaced
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from loraport.train.loop.attention import Documents, packed_attention
from loraport.train.loop.kernels import RmsNorm, Rope, swiglu, swiglu_backward

# Attention modules that do nothing but project, normalise heads, rotate, attend and project.
PLAIN_ATTENTION = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
LINEARS = {"Linear", "Linear4bit", "Linear8bitLt"}
CODE = ("co_code", "co_consts", "co_names")


def fuse(model: Any) -> int:
    """Replace the forwards of what is recognised in a PeftModel; returns how many were."""
    replaced = 0
    for module in model.modules():
        forward = recognise(module)
        if forward:
            module.forward = MethodType(forward, module)
            replaced += 1
    return replaced


def unfuse(model: Any) -> None:
    """Give all modules their own forwards back."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) in FORWARDS:
            del module.forward
            module.__dict__.pop("groups", None)


def forget(model: Any) -> None:
    """Have the copies of the adapters made anew: optimisers outside of torch change them behind autograd's back."""
    for module in model.modules():
        for group in module.__dict__.get("groups", ()):
            group.fresh = None


def recognise(module: Any) -> Any:
    """The forward that can stand for that of `module`, or None."""
    if is_swiglu(module):
        return forward_mlp
    if type(module).__name__ in PLAIN_ATTENTION:
        return forward_attention
    if hasattr(module, "lora_A") and type(getattr(module, "base_layer", None)).__name__ in LINEARS:
        return forward_linear
    return forward_norm if same_code(module, LlamaRMSNorm) and not module.weight.requires_grad else None


def same_code(module: Any, known: type) -> bool:
    """Whether a module computes what a class of transformers computes, by the compiled code of its forward.

    Names and attributes do not tell: FalconH1MLP scales its gate, GptOssRMSNorm rounds elsewhere.
    """
    ours, theirs = (getattr(each.forward, "__code__", None) for each in (type(module), known))  # type: ignore[attr-defined]
    return ours is not None and all(getattr(ours, part) == getattr(theirs, part) for part in CODE)


def is_swiglu(module: Any) -> bool:
    """Whether it is Llama's MLP: down(silu(gate(x)) * up(x))."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(part is None for part in parts):
        return False
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    linears = all(type(getattr(part, "base_layer", part)).__name__ in LINEARS for part in parts)
    return silu and linears and same_code(module, LlamaMLP)


def dense(base: Any, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a linear layer in `dtype`, dequantised where it is held in 4 or 8 bits."""
    kind = type(base).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(base)  # FSDP hands the weight back without its scales
        weight: Tensor = dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)
        return weight
    if kind == "Linear8bitLt":
        scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB
        return (base.weight.data * (scales / 127.0)[:, None]).to(dtype)
    weight = base.weight
    return weight if weight.dtype == dtype else weight.to(dtype)


def mm32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32; 16-bit arguments are summed and returned in float32 without a copy of them."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class Group:
    """Linear layers with one input, n of them, with or without adapters; R is the sum of their ranks.

    `pairs`: A and B of each in turn, the parameters, as autograd has to see them. `a_RI` (scale·A of all, R × in) and
    `b` (B of each, out × r, or None) are copies in the type of the arithmetic, made anew after `forget`.
    """

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        self.bases = [getattr(module, "base_layer", module) for module in modules]
        self.biases = [base.bias for base in self.bases]
        self.names = [active(module) for module in modules]
        named = list(zip(modules, self.names, strict=True))
        ranks = [0 if name is None else module.r[name] for module, name in named]
        starts = [sum(ranks[:index]) for index in range(len(ranks))]
        self.slices = [slice(start, start + rank) for start, rank in zip(starts, ranks, strict=True)]
        self.scales = [0.0 if name is None else float(module.scaling[name]) for module, name in named]
        drops = [module.lora_dropout[name] for module, name in named if name is not None]
        self.dropout = max((drop.p for drop in drops if isinstance(drop, torch.nn.Dropout)), default=0.0)
        # Reading them from their modules takes longer than launching a kernel.
        self.pairs: list[Tensor | None] = []
        for module, name in named:
            self.pairs += [None, None] if name is None else [module.lora_A[name].weight, module.lora_B[name].weight]
        self.fresh: torch.dtype | None = None
        self.a_RI: Tensor | None = None
        self.b: list[Tensor | None] = [None] * len(modules)

    def refresh(self, dtype: torch.dtype) -> None:
        """Make the copies, unless they are there."""
        if self.fresh == dtype:
            return
        self.fresh = dtype
        pairs = self.pairs
        self.b = [None if each is None else each.detach().to(dtype) for each in pairs[1::2]]
        scaled = [each.detach() * self.scales[index] for index, each in enumerate(pairs[::2]) if each is not None]
        self.a_RI = torch.cat(scaled).to(dtype) if scaled else None

    def mask(self, x_TI: Tensor) -> Tensor | None:
        """Dropout before A, one for all of the group: 0 or 1 / (1 - p); None where nothing is dropped."""
        if not self.dropout or not self.modules[0].training:
            return None
        return torch.empty_like(x_TI).bernoulli_(1 - self.dropout).div_(1 - self.dropout)

    def forward(self, x_TI: Tensor, mask_TI: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """x·W + b + scale·dropout(x)·A·B of each (T, out), and x·A of all (T, R)."""
        self.refresh(x_TI.dtype)
        xa_TR = None if self.a_RI is None else (x_TI if mask_TI is None else x_TI * mask_TI) @ self.a_RI.T
        return [self.one(index, x_TI, xa_TR) for index in range(len(self.modules))], xa_TR

    def one(self, index: int, x_TI: Tensor, xa_TR: Tensor | None) -> Tensor:
        """The adapter's part first: the large product then adds to it while it writes, which costs nothing."""
        b, bias = self.b[index], self.biases[index]
        weight_OI = dense(self.bases[index], x_TI.dtype)
        if b is None or xa_TR is None:
            return linear(x_TI, weight_OI, bias)
        y_TO = xa_TR[:, self.slices[index]] @ b.T
        if bias is not None:
            y_TO += bias.to(y_TO.dtype)
        return y_TO.addmm_(x_TI, weight_OI.T)

    def backward(
        self, dys: list[Tensor], x_TI: Tensor, xa_TR: Tensor | None, mask_TI: Tensor | None, wanted: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, where it is `wanted`, and of each A and B in turn, in float32."""
        dxa_TR = self.adapter_gradient(dys)
        dx_TI = self.input_gradient(dys, dxa_TR, mask_TI) if wanted else None
        return dx_TI, self.weight_gradients(dys, dxa_TR, x_TI, xa_TR, mask_TI)

    def adapter_gradient(self, dys: list[Tensor]) -> Tensor | None:
        """dy·B of all, shape (T, R)."""
        parts = [dy_TO @ b for dy_TO, b in zip(dys, self.b, strict=True) if b is not None]
        return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def input_gradient(self, dys: list[Tensor], dxa_TR: Tensor | None, mask_TI: Tensor | None) -> Tensor:
        """The gradient of x (T, in)."""
        dx_TI = None
        if dxa_TR is not None and self.a_RI is not None:
            dx_TI = dxa_TR @ self.a_RI
            if mask_TI is not None:
                dx_TI *= mask_TI
        for base, dy_TO in zip(self.bases, dys, strict=True):
            weight_OI = dense(base, dy_TO.dtype)
            dx_TI = dy_TO @ weight_OI if dx_TI is None else dx_TI.addmm_(dy_TO, weight_OI)
        assert dx_TI is not None
        return dx_TI

    def weight_gradients(
        self, dys: list[Tensor], dxa_TR: Tensor | None, x_TI: Tensor, xa_TR: Tensor | None, mask_TI: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of A (r, in) and B (out, r) of each in turn; None where there is no adapter."""
        if dxa_TR is None or xa_TR is None:
            return [None, None] * len(dys)
        da_RI = mm32(dxa_TR.T, x_TI if mask_TI is None else x_TI * mask_TI)
        grads: list[Tensor | None] = []
        for index, dy_TO in enumerate(dys):
            part = self.slices[index]
            if self.b[index] is None:
                grads += [None, None]
            else:
                grads += [da_RI[part].mul_(self.scales[index]), mm32(dy_TO.T, xa_TR[:, part])]
        return grads


def active(module: Any) -> str | None:
    """Name of the adapter that works in a layer; None for a plain one."""
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return None
    return next((name for name in module.active_adapters if name in module.lora_A), None)


class LoraLinears(torch.autograd.Function):
    """A group on one input. Saves the input, x·A and, with dropout, its mask."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, group: Group, *_: Tensor | None) -> tuple[Tensor, ...]:
        """x (T, in) to n times y (T, out). `group.pairs` come as arguments too, for autograd to see them."""
        mask_TI = group.mask(x_TI)
        ys, xa_TR = group.forward(x_TI, mask_TI)
        ctx.save_for_backward(x_TI, xa_TR, mask_TI)
        ctx.group = group
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, and of each A and B."""
        x_TI, xa_TR, mask_TI = ctx.saved_tensors
        dx_TI, grads = ctx.group.backward(list(dys), x_TI, xa_TR, mask_TI, ctx.needs_input_grad[0])
        return dx_TI, None, *grads


class LoraSwiglu(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with adapters on any of the three. Saves x, gate, up and the x·A."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, wide: Group, down: Group, *_: Tensor | None) -> Tensor:
        """x (T, H) to y (T, H); `wide` holds gate and up."""
        mask_TH = wide.mask(x_TH)
        (gate_TI, up_TI), wide_xa = wide.forward(x_TH, mask_TH)
        h_TI = swiglu(gate_TI, up_TI)
        mask_TI = down.mask(h_TI)
        (y_TH,), down_xa = down.forward(h_TI, mask_TI)
        ctx.save_for_backward(x_TH, gate_TI, up_TI, wide_xa, down_xa, mask_TH, mask_TI)
        ctx.groups = wide, down
        return y_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the six matrices."""
        x_TH, gate_TI, up_TI, wide_xa, down_xa, mask_TH, mask_TI = ctx.saved_tensors
        wide, down = ctx.groups
        dys = [grads[0]]
        dxa_TR = down.adapter_gradient(dys)
        dh_TI = down.input_gradient(dys, dxa_TR, mask_TI)
        # On a GPU the three results lie where the arguments lay.
        dgate_TI, dup_TI, h_TI = swiglu_backward(dh_TI, gate_TI, up_TI)
        down_grads = down.weight_gradients(dys, dxa_TR, h_TI, down_xa, mask_TI)
        del dh_TI, h_TI
        dx_TH, wide_grads = wide.backward([dgate_TI, dup_TI], x_TH, wide_xa, mask_TH, ctx.needs_input_grad[0])
        return dx_TH, None, None, *wide_grads, *down_grads


def groups_of(module: Any, *members: tuple[str, ...]) -> list[Group]:
    """The groups of a module, made at the first call; `members` are names of its linears, or of none: itself."""
    if "groups" not in module.__dict__:
        module.__dict__["groups"] = [
            Group([getattr(module, name) if name else module for name in names]) for names in members
        ]
    return list(module.__dict__["groups"])


def forward_linear(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for the forward of PEFT's lora.Linear."""
    (group,) = groups_of(self, ("",))
    (y_TO,) = LoraLinears.apply(x.reshape(-1, x.shape[-1]), group, *group.pairs)
    return y_TO.view(*x.shape[:-1], -1)


def forward_mlp(self: Any, x: Tensor) -> Tensor:
    """Stands for the forward of LlamaMLP and its like."""
    wide, down = groups_of(self, ("gate_proj", "up_proj"), ("down_proj",))
    y_TH = LoraSwiglu.apply(x.reshape(-1, x.shape[-1]), wide, down, *wide.pairs, *down.pairs)
    return y_TH.view(x.shape)


def forward_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands for the forward of LlamaAttention and its like, on one packed sequence (1, T, H) without a cache."""
    length = hidden_states.shape[1]
    inner, outer = groups_of(self, ("q_proj", "k_proj", "v_proj"), ("o_proj",))
    projected = LoraLinears.apply(hidden_states[0], inner, *inner.pairs)
    q_TND, k_TND, v_TND = (each.view(length, -1, self.head_dim) for each in projected)
    if hasattr(self, "q_norm"):
        q_TND, k_TND = self.q_norm(q_TND), self.k_norm(k_TND)
    cos_TD, sin_TD = (each[0] for each in position_embeddings)
    q_TND, k_TND = Rope.apply(q_TND, cos_TD, sin_TD), Rope.apply(k_TND, cos_TD, sin_TD)
    # Mistral's windows are the configuration's; Qwen's are each layer's; Llama has none, whatever its config.json says.
    windowed = self.config if type(self).__name__ == "MistralAttention" else self
    window = getattr(windowed, "sliding_window", None)
    out_TND = packed_attention(q_TND, k_TND, v_TND, Documents.of(kwargs), self.scaling, window)
    (y_TH,) = LoraLinears.apply(out_TND.reshape(length, -1), outer, *outer.pairs)
    return y_TH[None], None


def forward_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Stands for the forward of LlamaRMSNorm and its like."""
    return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


FORWARDS = {forward_linear, forward_mlp, forward_attention, forward_norm}
