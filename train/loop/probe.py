"""What `loraport bench train` runs on: device, driver, versions, what is installed, and how fast it multiplies.

python -m loraport.train.loop.probe out.json
"""

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "liger-kernel",
    "trl",
    "flash-attn",
    "triton",
)
SIZE, WARMUP, TIMES = 8192, 5, 20  # of the matrix product


def probe() -> dict[str, Any]:
    """Device and versions; `matmul_flops` is the measured speed of a bf16 matrix product, None on a CPU."""
    gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if gpu else None
    return {
        "device": properties.name if properties else f"CPU, {torch.get_num_threads()} threads",
        "memory_bytes": properties.total_memory if properties else None,
        "driver": driver() if gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "matmul_flops": matmul_flops() if gpu else None,
    }


def installed(package: str) -> str | None:
    """Its version; None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The driver's version as nvidia-smi tells it."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def matmul_flops() -> float:
    """FLOP/s of a square bf16 matrix product, the best of some runs: what no training step can exceed."""
    a, b = (torch.randn(SIZE, SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    best = float("inf")
    for attempt in range(WARMUP + TIMES):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started) if attempt >= WARMUP else best
    return float(2 * SIZE**3 / best)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(probe()))
