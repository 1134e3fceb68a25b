"""What was found, in files as vLLM reads them (vllm/lora/ops/triton_ops/utils.py, `load_lora_op_config`).

>>> write({"shrink": ..., "expand": ...}, "NVIDIA H200", slots=8, folder=Path("found"))
"""

import json
from pathlib import Path
from typing import Any

# vLLM's names of files: expand has one for results that are added to the output, and one for those that are not.
FILES = {"SHRINK": "shrink", "EXPAND_TRUE": "expand", "EXPAND_FALSE": "expand"}


# Slices that a group may have in any model. vLLM knows no "nearest" here, and ends where the number is missing.
MOST_SLICES = 8


def fill(by_slices: dict[str, Any]) -> dict[str, Any]:
    """Configurations for every number of slices: those of the nearest number where none were searched for."""
    return {
        str(count): by_slices[min(by_slices, key=lambda known: abs(int(known) - count))]
        for count in range(1, MOST_SLICES + 1)
    }


def write(found: dict[str, Any], gpu: str, slots: int, folder: Path) -> None:
    """The files that vLLM looks for in VLLM_TUNED_CONFIG_FOLDER; it counts a slot more, for requests of the base."""
    gpu = gpu.replace(" ", "_").replace("-", "_")
    for name, op in FILES.items():
        (folder / f"{gpu}_{name}.json").write_text(json.dumps({str(slots + 1): fill(found[op])}), encoding="utf-8")
