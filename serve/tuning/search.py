"""Find the fastest configuration of each kernel for each batch size, among those of space.py.

Kernels are compiled first, by as many processes as there are cores (Triton keeps them on disk), then timed one after
the other, because timings that overlap are worth nothing.

    >>> found = search(groups, rank=16, slots=8, tell=print)
    >>> found["shrink"]["3"]["64"]["4096"]["16"]["split_k"]
    8
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil

from loraport.serve.tuning.bench import Bench, Failed
from loraport.serve.tuning.space import TOKENS, Config, Group, candidates

OPS = ("shrink", "expand")
# A configuration of ours must beat vLLM's own by more than timing is uncertain by.
BETTER = 0.98
REPEATS = 3  # of the best few, before one of them is chosen
FINALISTS = 4

MOST_PROCESSES, PROCESS_BYTES = 16, 3 << 30
Work = tuple[str, Group, int, int, int, Config]


def count_processes() -> int:
    """As many as there are cores, and as the memory takes: each holds torch, vLLM and a CUDA context."""
    fit = psutil.virtual_memory().available // PROCESS_BYTES
    return int(max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)), fit)))


def compile_all(work: Sequence[Work]) -> None:
    """Compile the kernels of `work` into Triton's cache. What fails will fail again when it is timed.

    BrokenProcessPool where a process was killed, for want of memory say; a multiprocessing.Pool would wait for ever.
    """
    processes = count_processes()
    shares = [list(work[start::processes]) for start in range(min(processes, len(work)))]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_some, shares))


def compile_some(work: Sequence[Work]) -> None:
    """Those of one process. The batch is the same for all of a group: code depends on the tiles alone."""
    benches: dict[tuple[Group, int], Bench] = {}
    for op, group, rank, slots, tokens, config in work:
        if (group, tokens) not in benches:
            benches.clear()
            benches[group, tokens] = Bench(group, rank, slots, tokens, 1, layers=2)
        with contextlib.suppress(Failed):
            benches[group, tokens].run(op, config)


def plan_compiling(groups: Sequence[Group], rank: int, slots: int, tokens: Sequence[int]) -> list[Work]:
    """One of each kernel: those that differ in slices, tiles or whether K is divided evenly."""
    found: dict[Any, Work] = {}
    for size in tokens:
        for group in groups:
            for op in OPS:
                for config in candidates(op, group, rank, size):
                    even = group.inner % ((config["block_k"] or 1) * (config.get("split_k") or 1)) == 0
                    key = (op, len(group.outers), even if op == "shrink" else group.outers, tuple(config.values()))
                    found.setdefault((*key, size == 1), (op, group, rank, slots, size, config))
    return sorted(found.values(), key=lambda work: (work[1].name, work[4]))


def choose(benches: Sequence[Bench], op: str, rank: int) -> tuple[Config | None, float, float]:
    """(the fastest configuration, its microseconds, those of vLLM's own), summed over the benches."""

    def cost(config: Config | None, check: bool = False) -> float:
        try:
            return sum(bench.microseconds(op, config, check) for bench in benches)
        except Failed:
            return float("inf")

    group, tokens = benches[0].group, benches[0].tokens
    timed = sorted(((cost(config), config) for config in candidates(op, group, rank, tokens)), key=lambda one: one[0])
    finals = [
        (min([took, *(cost(config, check=True) for _ in range(REPEATS))]), config)
        for took, config in timed[:FINALISTS]
        if cost(config, check=True) < float("inf")
    ]
    own = min(cost(None) for _ in range(REPEATS + 1))
    took, config = min(finals, key=lambda one: one[0], default=(float("inf"), None))
    return (config, took, own) if took < own * BETTER else (None, own, own)


def search(
    groups: Sequence[Group],
    rank: int,
    slots: int,
    tokens: Sequence[int] = TOKENS,
    tell: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Configurations by kernel, number of slices, tokens, and the two sizes of the product, as vLLM reads them."""
    found: dict[str, Any] = {op: {} for op in OPS}
    uneven: list[Work] = []
    for size in tokens:
        for group in groups:
            benches = [Bench(group, rank, slots, size, active) for active in sorted({1, min(slots, size)})]
            for op in OPS:
                config, took, own = choose(benches, op, rank)
                used = config or benches[0].own(op)
                uneven.append((op, group, rank, slots, not_by_sixteen(size), used))
                outer = max(group.outers)
                k, n = (group.inner, rank) if op == "shrink" else (rank, outer)
                by_tokens = found[op].setdefault(str(len(group.outers)), {}).setdefault(str(size), {})
                by_tokens.setdefault(str(k), {})[str(n)] = used
                line = {"op": op, "group": group.name, "tokens": size, "own_us": round(own, 2), "us": round(took, 2)}
                tell(line | {"config": config})
    compile_all(uneven)
    return found


def not_by_sixteen(tokens: int) -> int:
    """A batch beside that one for which Triton makes other code: it has one for sizes that 16 divides, one for others.

    Most prompts are of the others, and would be compiled for in front of users.
    """
    return tokens + 1 if tokens == 1 else tokens - 1
