"""A base in shares: each GPU keeps a part of every decoder layer and gathers a layer whole while it computes.

This is the idea of FSDP and ZeRO-3, for weights that never change: nothing is reduced or written back, so a layer is
one all-gather of bytes, in whatever form its weights are held (NF4 with its scales, bf16). Adapters stay whole on every
GPU, in float32, under DistributedDataParallel: the result is that of one GPU. The next layer is on its way while one
computes.

    >>> shards = share(model, device)   # a PeftModel; frees what other GPUs keep
    >>> loss.backward(); shards.release()
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from loraport.train.loop.checkpointing import decoder_layers
from loraport.train.loop.groups import LINEARS

ALIGNED = 256  # bytes at which each tensor begins in a layer's buffer


@dataclass
class Slot:
    """One tensor of a layer: where it belongs, what it is, and its first byte in the layer's buffer."""

    owner: Any
    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int

    def fill(self, buffer: Tensor | None) -> None:
        """Make it a part of the gathered buffer, or empty."""
        if buffer is None:
            value = torch.empty(0, dtype=self.dtype, device=self.old.device)
        else:
            size = self.shape.numel() * self.dtype.itemsize
            value = buffer[self.start : self.start + size].view(self.dtype).view(self.shape)
        if isinstance(self.old, torch.nn.Parameter):
            self.old.data = value
        else:
            setattr(self.owner, self.name, value)

    @property
    def old(self) -> Tensor:
        """What stands in its place now."""
        return getattr(self.owner, self.name)


class Shard:
    """This GPU's share of one decoder layer."""

    def __init__(self, layer: Any, rank: int, world: int, device: torch.device) -> None:
        self.world = world
        self.slots: list[Slot] = []
        end = 0
        for owner, name in frozen_tensors(layer):
            tensor = getattr(owner, name)
            self.slots.append(Slot(owner, name, tensor.shape, tensor.dtype, end))
            end += -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
        self.size = -(-end // (ALIGNED * world)) * ALIGNED  # bytes of each share
        whole = torch.zeros(self.size * world, dtype=torch.uint8, device=device)
        for slot in self.slots:
            flat = slot.old.data.contiguous().view(-1).view(torch.uint8).to(device)
            whole[slot.start : slot.start + flat.numel()] = flat
        self.part = whole[rank * self.size : (rank + 1) * self.size].clone()
        self.users = 0
        self.arriving: tuple[Tensor, Any] | None = None
        self.fill(None)

    def fill(self, buffer: Tensor | None) -> None:
        """Give the layer its weights, or take them away."""
        for slot in self.slots:
            slot.fill(buffer)

    def order(self) -> None:
        """Have the whole layer sent here; it may take its time."""
        if self.arriving is None and not self.users:
            buffer = torch.empty(self.size * self.world, dtype=torch.uint8, device=self.part.device)
            work = torch.distributed.all_gather_into_tensor(buffer, self.part, async_op=True)
            self.arriving = buffer, work

    def take(self) -> None:
        """One more user of the layer's weights: they are here when this returns."""
        self.order()
        if self.arriving is not None:
            buffer, work = self.arriving
            work.wait()
            self.arriving = None
            self.fill(buffer)
        self.users += 1

    def leave(self, all_users: bool = False) -> None:
        """One user less; without any the weights go."""
        self.users = 0 if all_users else max(0, self.users - 1)
        if not self.users:
            self.fill(None)


class Shards:
    """All layers of a PeftModel in shares, on `device` whatever it was on. Hooks gather a layer for its forward and for
    its backward pass.
    """

    def __init__(self, model: Any, rank: int, world: int, device: torch.device) -> None:
        self.shards = [Shard(layer, rank, world, device) for layer in decoder_layers(model)]
        model.to(device)  # what is left of it
        for index, layer in enumerate(decoder_layers(model)):
            layer.register_forward_pre_hook(lambda *_, at=index: self.take(at, at + 1))
            layer.register_forward_hook(lambda *_, at=index: self.shards[at].leave())
            layer.register_full_backward_pre_hook(lambda *_, at=index: self.take(at, at - 1))
            # A layer whose input needs no gradient, the first one, is told of its end at its beginning: see `release`.
            if index:
                layer.register_full_backward_hook(lambda *_, at=index: self.shards[at].leave())

    def take(self, index: int, following: int) -> None:
        """Gather a layer, and order the one that comes next."""
        self.shards[index].take()
        if 0 <= following < len(self.shards):
            self.shards[following].order()

    def release(self) -> None:
        """After a backward pass: no layer is in use any more."""
        for shard in self.shards:
            if shard.arriving is not None:  # ordered and not needed: in a pass without gradients
                shard.arriving[1].wait()
                shard.arriving = None
            shard.leave(all_users=True)


def share(model: Any, device: torch.device) -> Shards:
    """A PeftModel in shares among the processes that torchrun's variables tell of; all of them have to call this."""
    state = PartialState(cpu=device.type == "cpu")  # the processes meet: the first layer needs all of them
    return Shards(model, state.process_index, state.num_processes, device)


def frozen_tensors(layer: Any) -> list[tuple[Any, str]]:
    """Weights of the base's linears in a layer, with the scales of quantised ones, as (owner, attribute)."""
    found: list[tuple[Any, str]] = []
    for module in layer.modules():
        # PEFT's layers bear the names of those they wrap, and show their weights.
        if type(module).__name__ not in LINEARS or hasattr(module, "base_layer") or module.weight.requires_grad:
            continue
        module.__dict__["sharded"] = True
        found.append((module, "weight"))
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            found.append((state, "absmax"))
    return found
