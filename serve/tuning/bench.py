"""vLLM's LoRA kernels by themselves: run with any configuration, checked against the plain formula, timed.

Runs inside the engine's Python with a GPU, and is the only module here that imports torch and vLLM. What is timed is
what decoding does: a CUDA graph of one call for each of several layers, so that weights come from memory and not from
a cache that the last call has filled.

    >>> bench = Bench(Group("qkv", 4096, (4096, 1024, 1024)), rank=16, slots=8, tokens=64, active=1)
    >>> bench.microseconds("shrink", {"block_m": 16, "block_n": 16, "block_k": 128, "split_k": 8, ...})
    3.9
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand_op, lora_shrink_op
from vllm.lora.ops.triton_ops.utils import get_lora_op_configs

from loraport.serve.tuning.space import Config, Group

# Layers whose weights take turns: 24 x 128 KiB of A at rank 16 and 4,096 inputs, of each slice.
LAYERS = 24
REPLAYS = 12
MOST_BYTES = 2**31  # of all layers' weights
# Of the largest value: 16-bit products summed in another order.
TOLERANCE = 2e-2


@dataclass
class Failed(Exception):
    """A configuration that does not run, or gives something else."""

    why: str


class Bench:
    """Tensors of one group of linears for one batch. `active`: adapters that the tokens are divided among."""

    def __init__(self, group: Group, rank: int, slots: int, tokens: int, active: int, layers: int = LAYERS) -> None:
        dtype = torch.bfloat16
        draw = torch.Generator("cuda").manual_seed(0)
        self.group, self.rank, self.slots, self.tokens = group, rank, slots, tokens
        layer_bytes = 2 * slots * rank * (group.inner * len(group.outers) + sum(group.outers))
        layers = max(2, min(layers, MOST_BYTES // layer_bytes))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, device="cuda", dtype=dtype)

        self.x = random(tokens, group.inner)
        self.a = [[random(slots, 1, rank, group.inner) for _ in group.outers] for _ in range(layers)]
        self.b = [[random(slots, 1, outer, rank) for outer in group.outers] for _ in range(layers)]
        self.y = torch.zeros(tokens, sum(group.outers), device="cuda", dtype=dtype)
        self.hidden = torch.randn(len(group.outers), tokens, rank, generator=draw, device="cuda", dtype=torch.float32)
        self.mapping = (torch.arange(tokens) * active // tokens).to(torch.int32)
        self.meta = LoRAKernelMeta.make(slots, tokens, device="cuda")
        self.meta.prepare_tensors(self.mapping.cuda())
        self.arguments = self.meta.meta_args(tokens, False)

    def call(self, op: str, layer: int) -> None:
        """One launch, as vLLM makes it."""
        if op == "shrink":
            lora_shrink_op._lora_shrink(self.x, self.a[layer], self.hidden, *self.arguments, 1.0)
        else:
            lora_expand_op._lora_expand(self.hidden, self.b[layer], self.y, *self.arguments, add_inputs=True)

    def check(self, op: str) -> None:
        """Failed unless the kernel gives what the formula gives, for the first layer."""
        rows, mapping = torch.arange(self.tokens, device="cuda"), self.mapping.cuda().long()
        sample = rows[:: max(1, self.tokens // 64)]
        if op == "shrink":
            self.call(op, 0)
            pairs = []
            for index, weight in enumerate(self.a[0]):
                chosen = weight[mapping[sample], 0].float()
                pairs.append((self.hidden[index, sample], torch.einsum("th,trh->tr", self.x[sample].float(), chosen)))
        else:
            self.hidden.normal_()
            self.y.zero_()
            self.call(op, 0)
            pairs, at = [], 0
            for index, weight in enumerate(self.b[0]):
                outer = weight.shape[2]
                chosen = weight[mapping[sample], 0].float()
                wanted = torch.einsum("tr,tor->to", self.hidden[index, sample].to(weight.dtype).float(), chosen)
                pairs.append((self.y[sample, at : at + outer].float(), wanted))
                at += outer
        for got, wanted in pairs:
            if not (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
                raise Failed("other values than the formula")

    def run(self, op: str, config: Config | None, check: bool = False) -> None:
        """One call with a configuration, or vLLM's own where it is None; Failed where it does not run."""
        with using(config):
            try:
                if check:
                    self.check(op)
                self.y.zero_()
                self.call(op, 0)
                torch.cuda.synchronize()
            except Failed:
                raise
            except Exception as error:  # whatever Triton, its compiler or the driver says
                raise Failed(f"{type(error).__name__}: {str(error)[:200]}") from error

    def microseconds(self, op: str, config: Config | None, check: bool = False) -> float:
        """Time of one call; Failed where it does not run."""
        self.run(op, config, check)
        graph = torch.cuda.CUDAGraph()
        with using(config), torch.cuda.graph(graph):
            for layer in range(len(self.a)):
                self.call(op, layer)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / (REPLAYS * len(self.a))

    def own(self, op: str) -> Config:
        """vLLM's own configuration."""
        outer = max(self.group.outers)
        sizes = {"hidden_size": self.group.inner if op == "shrink" else outer, "rank": self.rank}
        more = {} if op == "shrink" else {"add_inputs": True}
        slices = len(self.group.outers)
        own = get_lora_op_configs(op, self.slots + 1, self.tokens, num_slices=slices, **sizes, **more)
        return dict(own)


def gpu_name() -> str:
    """As torch and vLLM have it."""
    return str(torch.cuda.get_device_name())


class using:
    """vLLM's kernels with one configuration, whatever the batch."""

    MODULES: tuple[Any, ...] = (lora_shrink_op, lora_expand_op)

    def __init__(self, config: Config | None) -> None:
        self.config = config
        self.before = [module.get_lora_op_configs for module in self.MODULES]

    def __enter__(self) -> None:
        if self.config is not None:
            for module in self.MODULES:
                module.get_lora_op_configs = lambda *_, **__: self.config

    def __exit__(self, *_: object) -> None:
        for module, before in zip(self.MODULES, self.before, strict=True):
            module.get_lora_op_configs = before
