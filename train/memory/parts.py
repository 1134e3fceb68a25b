"""The memory of a training step, part by part, in bytes. Pure arithmetic on a shape; no torch here.

    peak = weights + adapter + gradients + optimizer        what stays from step to step
         + activations                                      what all layers keep for the backward pass
         + largest of: the loss; one layer's backward pass
         + workspace + slack + context

T is the number of tokens of a micro-step, b the bytes of a number in the arithmetic, r the rank. H hidden size, Q and
KV the widths of all query and of all key heads, I the width of gate and up together halved. Everything that had to be
measured, or chosen in the loop, is a field of Coefficients; calibrate.py sets it against measured runs.

    >>> parts = memory(shape, load, Layout(tokens=4096, checkpointed=32))
    >>> parts.peak / 2**30
    7.6

Sources: QLoRA (Dettmers et al., 2023, arXiv:2305.14314) for NF4 and double quantisation; "Reducing Activation
Recomputation" (Korthikanti et al., 2022, arXiv:2205.05198) for the way of counting; bitsandbytes/functional.py
(`quantize_4bit`, `int8_vectorwise_quant`) and bitsandbytes/optim/optimizer.py (`min_8bit_size`, `get_state_buffer`);
train/loop/fused.py and kernels.py for what is kept.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from loraport.train.memory.machine import GIB, Types
from loraport.train.memory.shapes import Block, Linear, Shape, is_target

MIB = 1 << 20
LEAVING = {"o_proj", "down_proj"}  # linears that write to the residual stream; the others of a block read one input
Sharding = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class Coefficients:
    """What is not a matter of shapes. Those marked * are estimates that no measurement has confirmed yet."""

    chunk_logits: int = 2**26  # loss.py, CHUNK_LOGITS: logits that are made at once
    # cross_entropy in kernels.py writes the gradient over the logits, on a GPU. Elsewhere there are four more in
    # float32: the logits, their softmax, its logarithm, the gradient.
    logits_more: int = 0
    logits_more_plain: int = 4
    # * A head with a cap or a scale is left to transformers: the logits of all trained tokens, and as many more.
    logits_more_whole: int = 5
    # swiglu_backward overwrites gate and up; the product's gradient dh is the one temporary of width I (fused.py).
    mlp_temporaries: float = 1.0
    # Without the kernels: sigmoid, silu, and the three gradients.
    mlp_temporaries_plain: float = 6.0
    # A layer that transformers runs: norms keep a float32 copy, the MLP its product and activation. * Twice, roughly.
    unfused_factor: float = 2.0
    # Gradients of q, k, v and out, rotated back, and flash attention's float32 sum for dq: 4 B each, no b.
    attention_temporaries: float = 2.0
    padding: float = 0.25  # attention.py, DENSE_WASTE: most that padded copies of q, k, v and output are larger
    residual_temporaries: int = 3  # gradient of the residual stream, of a layer's input, of a norm's output
    # Inputs of checkpointed layers that are still, or again, on the GPU while they are offloaded: one run on an H200.
    offloaded_on_their_way: int = 6
    # groups.py makes one wide matrix in 16 bits at a time.
    dequantised_copies: float = 1.0
    # * int8: scales are float32, and so may be the product with them before it is stored.
    dequantised_copies_int8: float = 3.0
    # bitsandbytes: tensors below 4,096 elements keep float32 states; one float32 scale per 256 for each state.
    small_tensor: int = 4096
    state_block: int = 256
    # cuBLAS: 32 MiB a handle on Hopper, for the forward and the backward thread; * flash attention and bookkeeping.
    workspace: int = 128 * MIB
    # Reserved by torch's allocator and not used, as share of what comes and goes; up to 4.3% in runs on an H200.
    slack_share: float = 0.05
    slack_least: int = 192 * MIB
    # CUDA context and loaded kernels: outside of torch's figures, 0.5 to 1.4 GB by GPU and driver; nvidia-smi shows it.
    context: int = GIB
    process: int = 900 * MIB  # Python with torch and transformers, on a CPU


COEFFICIENTS = Coefficients()


@dataclass(frozen=True)
class Load:
    """What is trained and how it is held: all that memory depends on beside the shape and the layout.

    `attention`, as train/loop/attention.py chooses it: flash on all documents at once; padded, where documents of about
    equal length may be copied to one length (`dense`); joined, where each is computed by itself (`by_document`).
    """

    types: Types
    rank: int
    targets: tuple[str, ...]
    dropout: float
    double_quant: bool
    optimizer: Literal["adamw", "paged_adamw_8bit"]
    device: Literal["cuda", "cpu"] = "cuda"
    attention: Literal["flash", "padded", "joined"] = "flash"


@dataclass(frozen=True)
class Layout:
    """How a step is laid out: tokens of a micro-step, layers that are computed again, and the spread over GPUs.

    `trained`: tokens of the micro-step that carry loss; None, as before rows are read, counts them all.
    """

    tokens: int
    checkpointed: int = 0
    offload: bool = False
    sharding: Sharding = "none"
    gpus: int = 1
    trained: int | None = None


@dataclass(frozen=True)
class Parts:
    """Bytes on each GPU at the worst moment. `moment` names the largest one."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    largest_moment: int
    workspace: int
    slack: int
    context: int
    moment: str

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated is compared with."""
        return self.reserved - self.slack

    @property
    def reserved(self) -> int:
        """What torch.cuda.max_memory_reserved is compared with."""
        return self.peak - self.context

    @property
    def peak(self) -> int:
        """All of it: what nvidia-smi shows."""
        return sum(self.as_bytes().values())

    def as_bytes(self) -> dict[str, int]:
        """The parts by name."""
        return {name: size for name, size in asdict(self).items() if name != "moment"}


@dataclass(frozen=True)
class Counted:
    """A model that is held and trained in one way, counted once; `memory` is then quick for any layout."""

    shape: Shape
    load: Load
    known: Coefficients = COEFFICIENTS

    def memory(self, layout: Layout) -> Parts:
        """Peak memory of training, by part."""
        load, known, shards = self.load, self.known, shards_of(layout)
        activations = self.kept(layout)
        moment, largest = self.largest_moment(layout)
        workspace = known.workspace if load.device == "cuda" else 0
        if load.types.is_quantised:
            workspace += self.dequantised
        comes_and_goes = activations + largest + workspace
        return Parts(
            weights=self.weights(shards),
            # In float32, and in the type of the arithmetic as groups need them (groups.py, `Group.refresh`).
            adapter=4 * self.parameters + load.types.width * self.thin,
            gradients=4 * self.parameters,
            optimizer=self.optimizer,
            activations=activations,
            largest_moment=largest,
            workspace=workspace,
            slack=max(known.slack_least, int(known.slack_share * comes_and_goes)),
            context=known.context if load.device == "cuda" else known.process,
            moment=moment,
        )

    @cached_property
    def parameters(self) -> int:
        """Of the adapter."""
        return self.shape.trainable_parameters(self.load.rank, self.load.targets)

    @cached_property
    def groups(self) -> list[tuple[Linear, ...]]:
        """All groups of linears that have an adapter, or could have one where the base is not fused."""
        parts = (part for block in self.shape.blocks for part in (block.attention, block.mlp))
        return [group for part in parts for group in groups(part)]

    @cached_property
    def thin(self) -> int:
        """Elements of the thin matrices of all groups; those beside the weights of an unquantised base once more."""
        thin = sum(wide_numbers(group, self.load)[0] for group in self.groups)
        if not self.shape.is_fused or self.load.types.is_quantised:
            return thin
        wide = sum(wide_numbers(group, self.load)[1] for group in self.groups)
        return thin + wide - sum(linear.parameters for group in self.groups for linear in group)

    @cached_property
    def optimizer(self) -> int:
        """Bytes of the optimiser's states."""
        return optimizer_bytes(self.shape, self.load, self.known)

    @cached_property
    def linears(self) -> int:
        """Bytes of the linears as they are held."""
        return sum(linear_bytes(linear, self.load) for linear in self.shape.linears)

    @cached_property
    def largest_block(self) -> int:
        """Bytes of the linears of the largest layer."""
        return max(sum(linear_bytes(linear, self.load) for linear in block.linears) for block in self.shape.blocks)

    @cached_property
    def dequantised(self) -> int:
        """Weights brought to 16 bits for a product: copies of the largest group."""
        is_nf4 = self.load.types.held == "nf4"
        copies = self.known.dequantised_copies if is_nf4 else self.known.dequantised_copies_int8
        return int(copies * self.load.types.width * max(wide_numbers(group, self.load)[1] for group in self.groups))

    @cached_property
    def layers(self) -> list[int]:
        """Bytes a token that each layer keeps when it is not computed again."""
        return [layer_bytes(block, self.shape, self.load, self.known) for block in self.shape.blocks]

    @cached_property
    def backward(self) -> tuple[int, int]:
        """Bytes a token of the backward pass of the largest layer: one that was kept, one that is computed again."""
        kept, again = (
            max(backward_bytes(block, self.shape, self.load, again, self.known) for block in self.shape.blocks)
            for again in (False, True)
        )
        return kept, again

    def weights(self, shards: int) -> int:
        """The frozen base. In shares (train/loop/shards.py): a share of the layers' linears, the rest whole, and two
        layers gathered: the next one is on its way while one computes.
        """
        width = self.load.types.width if self.load.types.is_quantised else held_width(self.load.types)
        rest = width * self.shape.other
        if shards == 1:
            return self.linears + rest
        scratch = (
            0 if self.load.types.is_quantised else width * max(wide_numbers(each, self.load)[1] for each in self.groups)
        )
        return -(-self.linears // shards) + rest + 2 * self.largest_block + scratch

    def kept(self, layout: Layout) -> int:
        """What all layers keep for the backward pass.

        Of a layer that is computed again its input alone; offloading moves those to the host, a few aside.
        """
        shape, width = self.shape, self.load.types.width
        whole = sum(self.layers[: len(shape.blocks) - layout.checkpointed]) * layout.tokens
        again = min(layout.checkpointed, self.known.offloaded_on_their_way) if layout.offload else layout.checkpointed
        rotary = 2 * layout.tokens * shape.head_dim * width  # cos and sin, once for all layers
        return whole + again * layout.tokens * shape.hidden * width + rotary

    def largest_moment(self, layout: Layout) -> tuple[str, int]:
        """The largest of what is there for a moment only, and its name."""
        # The first layers are the checkpointed ones: when they are computed again, those that were kept whole are gone.
        every = layout.checkpointed == len(self.shape.blocks)
        trained = layout.tokens if layout.trained is None else layout.trained
        moments = {
            "the loss": loss_bytes(self.shape, self.load, layout.tokens, trained, self.known),
            "one layer's backward pass": self.backward[every] * layout.tokens,
        }
        name = max(moments, key=lambda each: moments[each])
        return name, moments[name]


def memory(shape: Shape, load: Load, layout: Layout, known: Coefficients = COEFFICIENTS) -> Parts:
    """Peak memory of training, by part."""
    return Counted(shape, load, known).memory(layout)


def shards_of(layout: Layout) -> int:
    """Into how many shares the base, gradients and states are cut."""
    return layout.gpus if layout.sharding == "fsdp" else 1


def held_width(types: Types) -> int:
    """Bytes of a weight that is not quantised; the arithmetic's where that is wider: it is cast as it is read."""
    return max(types.width, Types(types.held, types.held).width)


def linear_bytes(linear: Linear, load: Load) -> int:
    """The weight of one linear as it is held.

    NF4: 4 bits, and a scale per 64 in float32; with double quantisation in 8 bits, whose scales are float32 per 256,
    beside an offset and a table of 256. 4.127 or 4.5 bits in all. int8: a byte, and a float32 scale a row.
    """
    count = linear.parameters
    if load.types.held == "int8":
        return count + 4 * linear.outputs
    if load.types.held != "nf4":
        return held_width(load.types) * count
    scales = -(-count // 64)
    table = 4 * 16
    if not load.double_quant:
        return -(-count // 2) + 4 * scales + table
    return -(-count // 2) + scales + 4 * (-(-scales // 256)) + 4 + 4 * 256 + table


def optimizer_bytes(shape: Shape, load: Load, known: Coefficients = COEFFICIENTS) -> int:
    """States of AdamW: two of 4 B a parameter; in 8 bits two of 1 B with scales, but only for tensors large enough."""
    total = 0
    for linear in shape.targeted(load.targets):
        for size in (load.rank * linear.inputs, load.rank * linear.outputs):
            small = load.optimizer == "adamw" or size < known.small_tensor
            total += 8 * size if small else 2 * size + 8 * -(-size // known.state_block)
    return total


def layer_bytes(block: Block, shape: Shape, load: Load, known: Coefficients = COEFFICIENTS) -> int:
    """Bytes a token that a layer keeps when it is not computed again: attention's and the MLP's."""
    kept = attention_bytes(block, shape, load) + mlp_bytes(block, shape, load)
    return kept if shape.is_fused else int(known.unfused_factor * kept)


def attention_bytes(block: Block, shape: Shape, load: Load, known: Coefficients = COEFFICIENTS) -> int:
    """Bytes a token: b (2H + 2Q + 2KV) + 4 heads, and x·A, dropout masks and norms where there are.

    The layer's input and its norm (H each; q, k and v read the same), q, k and v as attention reads them, attention's
    output and its log-sum-exp in float32. Norms of q and k keep their inputs as well.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    numbers = 2 * shape.hidden + 2 * query + 2 * key
    if shape.has_qk_norm:
        numbers += query + key
    if load.attention != "flash":
        numbers += query  # the outputs of the documents once more, joined
    if load.attention == "padded":
        numbers += int(known.padding * 2 * (query + key))
    scales = 4 * (shape.heads * (2 if shape.has_qk_norm else 1) + shape.kv_heads * shape.has_qk_norm + 1)
    return numbers * load.types.width + scales + lora_bytes(block.attention, load)


def mlp_bytes(block: Block, shape: Shape, load: Load) -> int:
    """Bytes a token: b (2H + gate + up), and x·A and dropout masks where there are; the product is made again.

    The residual stream before the MLP, and its norm, which gate and up read.
    """
    entering = sum(linear.outputs for linear in block.mlp if linear.inputs == shape.hidden)
    numbers = 2 * shape.hidden + entering
    return numbers * load.types.width + 4 + lora_bytes(block.mlp, load)


def lora_bytes(linears: tuple[Linear, ...], load: Load) -> int:
    """x·A of each group, and with dropout a mask of each input in its type: q, k and v share one.

    Behind gate and up there is as much room once more, for their gradients' products.
    """
    numbers = 0
    for group in groups(linears):
        targeted = [linear for linear in group if is_target(linear, load.targets)]
        numbers += group_rank(group, load) * (2 if len(group) == 2 else 1)
        numbers += group[0].inputs if targeted and load.dropout else 0
    return load.types.width * numbers


def groups(linears: tuple[Linear, ...]) -> list[tuple[Linear, ...]]:
    """Linears that are computed as one (train/loop/groups.py): those that read a layer's norm, and each other one."""
    entering = tuple(linear for linear in linears if linear.name not in LEAVING)
    return [group for group in (entering, *((each,) for each in linears if each.name in LEAVING)) if group]


def group_rank(group: tuple[Linear, ...], load: Load) -> int:
    """The ranks of a group's adapters, rounded up to ALIGNED of train/loop/groups.py."""
    return -(-load.rank * sum(is_target(linear, load.targets) for linear in group) // 8) * 8


def wide_numbers(group: tuple[Linear, ...], load: Load) -> tuple[int, int]:
    """Elements of a group's thin matrices (s·A and B), and of the wide matrix that holds them beside the weights."""
    rank, outputs, inputs = group_rank(group, load), sum(each.outputs for each in group), group[0].inputs
    return rank * (outputs + inputs), (outputs + rank) * (inputs + rank)


def loss_bytes(shape: Shape, load: Load, tokens: int, trained: int, known: Coefficients = COEFFICIENTS) -> int:
    """The head: last hidden states, their norm and its gradient, the trained ones and theirs, and a chunk of logits."""
    more = known.logits_more if load.device == "cuda" else known.logits_more_plain
    rows = min(trained, max(1, known.chunk_logits // shape.vocabulary))
    if not shape.has_plain_head:
        rows, more = trained, known.logits_more_whole
    hidden = (3 * tokens + 2 * trained) * shape.hidden * load.types.width
    return hidden + rows * shape.vocabulary * (load.types.width + 4 * more)


def backward_bytes(block: Block, shape: Shape, load: Load, again: bool, known: Coefficients = COEFFICIENTS) -> int:
    """Bytes a token of one layer's backward pass: its temporaries, and what it makes again if it is checkpointed.

    The MLP's part comes first, when all of the layer is there; attention's follows, when the MLP's is gone.
    """
    b, query, key = load.types.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention, mlp = (part(block, shape, load) * again for part in (attention_bytes, mlp_bytes))
    inner = max((linear.inputs for linear in block.mlp if linear.outputs == shape.hidden), default=4 * shape.hidden)
    times = known.mlp_temporaries if load.device == "cuda" else known.mlp_temporaries_plain
    if load.dropout and any(is_target(linear, load.targets) for linear in block.mlp if linear.inputs == inner):
        times += 1  # the product under its mask
    residual = known.residual_temporaries * shape.hidden * b
    moments = (
        times * inner * b + residual + attention + mlp,
        known.attention_temporaries * (query + key) * b + 4 * query + residual + attention,
    )
    return int(max(moments) * (1.0 if shape.is_fused else known.unfused_factor))
