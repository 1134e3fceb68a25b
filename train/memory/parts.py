"""The memory of a training step, part by part, in bytes. Pure arithmetic on a shape; no torch here.

    peak = weights + adapter + gradients + optimizer        what stays from step to step
         + activations                                      what all layers keep for the backward pass
         + largest of: the loss; one layer's backward pass
         + workspace + slack + context

What a layer keeps and needs is in activations.py. Everything that had to be measured, or chosen in the loop, is a field
of Coefficients (load.py); calibrate.py sets it against measured runs.

    >>> parts = memory(shape, load, Layout(tokens=4096, checkpointed=32))
    >>> parts.peak / 2**30
    7.6

Sources: QLoRA (Dettmers et al., 2023, arXiv:2305.14314) for NF4 and double quantisation; bitsandbytes/functional.py
(`quantize_4bit`, `int8_vectorwise_quant`) and bitsandbytes/optim/optimizer.py (`min_8bit_size`, `get_state_buffer`).
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from loraport.train.memory.activations import Moment, groups, layer_bytes, loss_bytes, moments, wide_numbers
from loraport.train.memory.load import COEFFICIENTS, Coefficients, Load
from loraport.train.memory.shapes import Linear, Shape

Sharding = Literal["none", "ddp", "fsdp"]


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
        comes_and_goes = activations + largest + workspace
        is_mixed = 0 < layout.checkpointed < len(self.shape.blocks)
        share = known.slack_share_mixed if is_mixed else known.slack_share
        return Parts(
            weights=self.weights(shards),
            # In float32, and in the type of the arithmetic as groups need them (groups.py, `Group.refresh`).
            adapter=4 * self.parameters + load.types.width * self.thin,
            # Several GPUs sum theirs in buckets, which are a copy (DistributedDataParallel).
            gradients=4 * self.parameters * (1 if layout.sharding == "none" else 2),
            optimizer=self.optimizer,
            activations=activations,
            largest_moment=largest,
            workspace=workspace,
            slack=max(known.slack_least, int(share * comes_and_goes)),
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
    def layers(self) -> list[int]:
        """Bytes a token that each layer keeps when it is not computed again."""
        return [layer_bytes(block, self.shape, self.load, self.known) for block in self.shape.blocks]

    @cached_property
    def backward(self) -> tuple[list[Moment], list[Moment]]:
        """Moments of the backward passes of all layers: of those that were kept, of those that are computed again."""
        kept, again = (
            sorted({m for block in self.shape.blocks for m in moments(block, self.shape, self.load, each, self.known)})
            for each in (False, True)
        )
        return kept, again

    @cached_property
    def copies(self) -> float:
        """Bytes for each weight that is brought to 16 bits for a product."""
        held = self.load.types.held
        copies = {"nf4": self.known.dequantised_copies, "int8": self.known.dequantised_copies_int8}.get(held, 0.0)
        return copies * self.load.types.width

    def weights(self, shards: int) -> int:
        """The frozen base. In shares (train/loop/shards.py): a share of the layers' linears, the rest whole, and two
        layers gathered: the next one is on its way while one computes.
        """
        width = self.load.types.width
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
        sizes = {
            "the loss": loss_bytes(self.shape, self.load, layout.tokens, trained, self.known),
            "one layer's backward pass": max(
                each * layout.tokens + int(self.copies * weights) for each, weights in self.backward[every]
            ),
        }
        name = max(sizes, key=lambda each: sizes[each])
        return name, sizes[name]


def memory(shape: Shape, load: Load, layout: Layout, known: Coefficients = COEFFICIENTS) -> Parts:
    """Peak memory of training, by part."""
    return Counted(shape, load, known).memory(layout)


def shards_of(layout: Layout) -> int:
    """Into how many shares the base, gradients and states are cut."""
    return layout.gpus if layout.sharding == "fsdp" else 1


def linear_bytes(linear: Linear, load: Load) -> int:
    """The weight of one linear as it is held.

    NF4: 4 bits, and a scale per 64 in float32; with double quantisation in 8 bits, whose scales are float32 per 256,
    beside an offset and a table of 256. 4.127 or 4.5 bits in all. int8: a byte, and a float32 scale a row.
    """
    count = linear.parameters
    if load.types.held == "int8":
        return count + 4 * linear.outputs
    if load.types.held != "nf4":
        return load.types.width * count
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
