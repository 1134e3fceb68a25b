"""Flags that make starts on a GPU fast: fewer graphs to capture, weights read ahead by several threads.

Compiled code comes from vLLM's own cache, which finds it as long as flags and environment stay the same; so a context
that vLLM chooses is left to it (`auto`), and nothing here depends on the adapters of the day.

    >>> capture_sizes(48)
    [1, 2, 4, 8, 16, 24, 32, 48]
"""

import json

import psutil

from loraport.serve.plan.settings import Plan
from loraport.train.base_model import Base

# Batches between two sizes are padded to the larger one. Decoding waits for weights, not for rows, so a few rows more
# are nearly free, while vLLM's own 51 sizes, captured twice with LoRA, took 34 s of a start (8B on an H200).
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512)
SHARE_OF_MEMORY = 0.7  # of the free memory that files read ahead may take
COMPILATION = (
    "-O",
    "-cc",
    "--compilation-config",
    "--cudagraph-capture-sizes",
    "--enforce-eager",
    "--cuda-graph-sizes",
)


def capture_sizes(requests: int) -> list[int]:
    """Batch sizes to capture graphs for, up to `requests` at once, which is one of them."""
    most = min(requests, SIZES[-1])
    return [size for size in SIZES if size < most] + [most]


def start_arguments(plan: Plan, base: Base, more: tuple[str, ...]) -> list[str]:
    """Flags for a fast start; none on a CPU, where vLLM neither compiles nor captures with LoRA.

    What the user's own flags decide is left to them: a compilation configuration would replace ours as a whole.
    """
    if plan.share is None:
        return []
    flags: list[str] = []
    if not any(flag.startswith(COMPILATION) for flag in more):
        flags += ["--compilation-config", json.dumps({"cudagraph_capture_sizes": capture_sizes(plan.requests)})]
    fits = base.weight_bytes <= SHARE_OF_MEMORY * psutil.virtual_memory().available
    if fits and plan.quantization != "bnb" and not any(flag.startswith("--safetensors-load") for flag in more):
        flags += ["--safetensors-load-strategy", "prefetch"]
    return flags
