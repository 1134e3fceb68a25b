"""Which kernels there are for a model, and which configurations of them are worth trying. No torch.

vLLM computes linears with the same input as one: a group has one input size and an output size for each of its
slices. Shrink is x·A, expand adds its product with B (vllm/lora/ops/triton_ops).

    >>> groups({"hidden": 4096, "q": 4096, "kv": 1024, "inner": 14336}, {"q_proj", "v_proj"})
    [Group(name='qkv', inner=4096, outers=(4096, 1024, 1024))]
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product

from loraport.serve.plan.shape import LINEARS

Config = dict[str, int | None]
# Tokens of a batch: decoding, where graphs are captured, and prefill up to vLLM's usual batch of 8,192.
TOKENS = (1, 8, 32, 64, 128, 256, 1024, 8192)
DECODING = 512  # tokens of a batch up to which there are too few of them to fill a GPU, so that K is split
FIXED: Config = {"num_ctas": 1, "max_nreg": None}
# (block_k, split_k) of shrink. Splitting K needs atomic sums: worth it where there are few tokens.
SPLITS = ((128, 8), (128, 16), (128, 32), (256, 4), (256, 8), (256, 16), (512, 4), (512, 8), (64, 32))
WHOLE = ((64, 1), (128, 1), (256, 1), (64, 4), (128, 2), (128, 4))
MOST_TILE = 32768  # elements of a product that a program holds at once


@dataclass(frozen=True)
class Group:
    """Linears with one input: `inner` inputs, `outers` outputs."""

    name: str
    inner: int
    outers: tuple[int, ...]


def groups(sizes: dict[str, int], targets: Collection[str], tensor_parallel: int = 1) -> list[Group]:
    """The groups that adapters on `targets` use, on each of `tensor_parallel` GPUs.

    `sizes`: "hidden", and the outputs "q", "kv" and "inner" of q_proj, k_proj and gate_proj.
    """
    cut = tensor_parallel
    hidden, q, kv = sizes["hidden"], sizes["q"] // cut, max(1, sizes["kv"] // cut)
    inner = sizes["inner"] // cut
    every = [
        Group("qkv", hidden, (q, kv, kv)),
        Group("o", q, (hidden,)),
        Group("gate_up", hidden, (inner, inner)),
        Group("down", inner, (hidden,)),
    ]
    return [group for group in every if not targets or LINEARS[group.name] & set(targets)]


def power_of_two(number: int) -> int:
    """The next one, 16 at least: what a product of tiles takes."""
    return max(16, 1 << (number - 1).bit_length())


def candidates(op: str, group: Group, rank: int, tokens: int) -> Iterator[Config]:
    """Configurations worth trying: tiles of at most the batch, in decoding small ones, in prefill large ones."""
    is_decoding, most = tokens <= DECODING, power_of_two(tokens)
    sizes = [size for size in ((16, 32, 64) if is_decoding else (32, 64, 128)) if size <= most]
    if op == "shrink":
        splits = [each for each in (SPLITS if is_decoding else WHOLE) if each[0] * each[1] <= group.inner]
        for block_m, (block_k, split_k), warps, stages in product(sizes, splits, (4, 8), (2, 4)):
            if block_m * block_k * stages <= 2 * MOST_TILE:
                shape: Config = {"block_m": block_m, "block_n": min(64, power_of_two(rank)), "block_k": block_k}
                more: Config = {"split_k": split_k, "group_size_m": 8, "num_warps": warps, "num_stages": stages}
                yield shape | more | FIXED
        return
    for block_m, block_n, warps, stages in product(sizes, (64, 128, 256, 512), (4, 8), (1, 2)):
        if block_m * block_n <= MOST_TILE and block_n <= power_of_two(max(group.outers)):
            config: Config = {"block_m": block_m, "block_n": block_n, "block_k": min(64, power_of_two(rank))}
            yield config | {"num_warps": warps, "num_stages": stages} | FIXED
