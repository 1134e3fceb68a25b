"""LoRA kernels for a start: those that were tuned for it, tuned now where that was asked for, or else vLLM's own.

>>> launch = find(launch, is_wanted=True, home=home, state=state)
LoRA kernels: 24 of 64 calls tried
>>> launch.kernels.name
'nvidia-h200-vllm0.25-5f0c2a91'
"""

import os
import time
from dataclasses import replace
from typing import Any

from loraport.clients.endpoint import process_identity
from loraport.clients.errors import LoraportError, UsageError
from loraport.clients.hardware import Device
from loraport.clients.home import Home
from loraport.clients.terminal import console, say
from loraport.serve.engine import versions
from loraport.serve.engine.process import Launch, environment
from loraport.serve.gateway.state import EngineState, Phase
from loraport.serve.plan.choose import require_shape
from loraport.serve.plan.settings import Plan
from loraport.serve.tuning.tune import Subject, count_calls, find_subject, require_subject, tune
from loraport.train.base_model import Base

FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
USUAL_S = 200.0  # 159 s on an H200 with 32 cores, for 6 sizes of batches instead of 8


def subject_of(plan: Plan, base: Base, device: Device, version: versions.Version) -> Subject | None:
    """What could be tuned for this plan."""
    shape = require_shape(base.config, base.weight_bytes, base.folder / "config.json")
    return find_subject(plan, shape, device, ".".join(map(str, version)))


def require_search(plan: Plan, base: Base, device: Device, version: versions.Version, is_ours: bool) -> None:
    """UsageError where `--tune` makes no sense."""
    if not is_ours:
        raise UsageError(
            "--tune searches in Loraport's own environment, and --engine-command starts a vLLM elsewhere.",
            "leave one of the two away",
        )
    if os.environ.get(FOLDER):
        raise UsageError(f"--tune, and {FOLDER} names a folder of other LoRA kernels.", f"unset {FOLDER}")
    require_subject(subject_of(plan, base, device, version), device)


def find(launch: Launch, is_wanted: bool, home: Home, state: EngineState) -> Launch:
    """The launch with tuned kernels, if there are any; what is used is said. A search that fails ends no start."""
    subject = subject_of(launch.plan, launch.base, launch.device, launch.version)
    if subject is None or os.environ.get(FOLDER):
        return launch
    if is_wanted and not subject.is_tuned(home):
        try:
            search(launch, subject, home, state)
        except LoraportError as error:
            say(f"warning: {error.message} vLLM's own are used. {error.hint}", "yellow")
            for line in error.details:
                say(f"  {line}")
    if not subject.is_tuned(home):
        say("  LoRA kernels: vLLM's own; `loraport serve --tune` searches for faster ones, once.")
        return launch
    say(f"  LoRA kernels: tuned for this GPU; {subject.gain(home)} than vLLM's own.")
    return replace(launch, kernels=subject.folder(home))


def search(launch: Launch, subject: Subject, home: Home, state: EngineState) -> None:
    """The search, with progress for whoever watches and whoever asks."""
    state.begin(Phase.STARTING, "searching for LoRA kernels", USUAL_S)
    began, tried, count = time.monotonic(), 0, count_calls(subject)
    with console.status("LoRA kernels: compiling") as status:

        def tell(line: dict[str, Any]) -> None:
            nonlocal tried
            if "op" in line:
                tried += 1
                status.update(f"LoRA kernels: {tried} of {count} calls tried")

        tune(subject, home, environment(launch, home, process_identity(os.getpid())), tell)
    say(f"LoRA kernels searched in {time.monotonic() - began:.0f} s.")
