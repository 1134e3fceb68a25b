"""Whether the engine's Python can hold weights in 4 bits: a sentence before the start instead of a minute after it.

FP8 needs no package. Whether the GPU has it is the plan's affair: plan/variants.py, `why_impossible`.

    >>> require_packages(plan, DEFAULT_COMMAND, (0, 32), is_ours=True)
"""

import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from loraport.clients.errors import ResourceError
from loraport.serve.engine.versions import Version
from loraport.serve.plan.settings import Plan

ASK = "import importlib.util as u, sys\nprint(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
ASK_S = 10
PACKAGES = {"bitsandbytes": "bitsandbytes", "vllm_bnb_plugin": "vllm-bnb-plugin"}  # by module


def needed_modules(plan: Plan, version: Version) -> list[str]:
    """What the engine imports for the plan's weights. From 0.28 on vLLM's part of bitsandbytes is a plugin."""
    if plan.quantization not in ("bnb", "bitsandbytes"):
        return []
    return ["bitsandbytes", *(["vllm_bnb_plugin"] if version >= (0, 28) else [])]


def require_packages(plan: Plan, command: Sequence[str], version: Version, is_ours: bool) -> None:
    """ResourceError where the engine's Python lacks a package for the plan's weights.

    `is_ours`: the engine is this environment's. Of a command that is no Python nothing can be known beforehand.
    """
    needed = needed_modules(plan, version)
    missing = find_missing(needed, command, is_ours) if needed else []
    if missing:
        packages = " ".join(PACKAGES[module] for module in missing)
        where = "this environment" if is_ours else command[0]
        raise ResourceError(
            f"4-bit weights need {packages.replace(' ', ' and ')}, which {where} has not.",
            f"{'pip' if is_ours else f'{command[0]} -m pip'} install {packages}; or another --quantization",
        )


def find_missing(modules: list[str], command: Sequence[str], is_ours: bool) -> list[str]:
    """Those modules that the Python of the engine cannot find; nothing is imported."""
    if is_ours:
        return [module for module in modules if find_spec(module) is None]
    python = shutil.which(command[0])
    if python is None or not Path(command[0]).name.startswith("python"):
        return []
    with suppress(OSError, subprocess.TimeoutExpired):
        asked = [python, "-c", ASK, *modules]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_S, check=False)
        return done.stdout.split()
    return []
