"""LoRA kernels tuned for a GPU: made once by `loraport serve --tune`, kept, and used by every start after that.

vLLM's kernels have one set of tiles for all GPUs and shapes. It takes others from the folder that
VLLM_TUNED_CONFIG_FOLDER names; the search for them runs as a process of its own, before the engine takes the memory.
What is found holds for one GPU, one version of vLLM (0.25, say) and one set of shapes, which name the folder.

    >>> subject = find_subject(launch.plan, shape, launch.device, "0.25")
    >>> subject.is_tuned(home), subject.folder(home).name
    (False, 'nvidia-h200-vllm0.25-5f0c2a91')
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from loraport.clients.errors import EngineError, UsageError, os_errors
from loraport.clients.hardware import Device
from loraport.clients.home import Home, write_json
from loraport.serve.engine.process import start_guarded
from loraport.serve.plan.settings import Plan
from loraport.serve.plan.shape import Shape
from loraport.serve.tuning.space import TOKENS, Group, groups

SEARCH = (sys.executable, "-m", "loraport.serve.tuning")
REPORT = "report.json"
LAST_LINES = 8
FORMAT = 2  # of the folder: others are searched anew
SILENT_S = 900.0  # compiling says nothing for a minute or two
# Rows of the report for people: a batch that decodes, and one of prompts.
SHOWN = (64, 8192)


@dataclass(frozen=True)
class Subject:
    """What kernels are tuned for. `slots` as vLLM is told them."""

    gpu: str
    version: str
    groups: tuple[Group, ...]
    rank: int
    slots: int

    def folder(self, home: Home) -> Path:
        """Where its files are, or would be."""
        gpu = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        shapes = json.dumps([[group.inner, group.outers] for group in self.groups])
        digest = hashlib.sha256(f"{FORMAT} {shapes} {self.rank} {self.slots} {TOKENS}".encode()).hexdigest()[:8]
        return home.cache / "lora-kernels" / f"{gpu}-vllm{self.version}-{digest}"

    def is_tuned(self, home: Home) -> bool:
        """Whether the search has run to its end here."""
        return bool(self.calls(home))

    def calls(self, home: Home) -> list[dict[str, Any]]:
        """Its results by call; none where it has not been, or its report is damaged."""
        try:
            return list(json.loads((self.folder(home) / REPORT).read_text(encoding="utf-8"))["calls"])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def gain(self, home: Home) -> str:
        """What tuning gave, in words: `46% less time at 64 tokens, 46% less time at 8,192 tokens`."""
        calls, found = self.calls(home), []
        for tokens in SHOWN:
            own, ours = (sum(call[key] for call in calls if call["tokens"] == tokens) for key in ("own_us", "us"))
            if own:
                found.append(f"{1 - ours / own:.0%} less time at {tokens:,} tokens")
        return ", ".join(found)


def find_subject(plan: Plan, shape: Shape, device: Device, version: str) -> Subject | None:
    """What could be tuned; None where nothing can: without LoRA, on a CPU, or where no linear is of the usual kind."""
    if not plan.slots or device.kind != "cuda" or shape.latent:
        return None
    sizes = {"hidden": shape.hidden, "q": shape.heads * shape.head_dim, "kv": shape.kv_heads * shape.head_dim}
    found = groups(sizes | {"inner": shape.intermediate}, plan.targets, plan.tensor_parallel)
    if shape.experts > 1:  # experts have kernels of their own
        found = [group for group in found if group.name in ("qkv", "o")]
    return Subject(device.name, version, tuple(found), plan.rank, plan.slots) if found else None


def count_calls(subject: Subject) -> int:
    """Lines with results that a search tells: shrink and expand of each group and batch."""
    return 2 * len(TOKENS) * len(subject.groups)


def require_subject(subject: Subject | None, device: Device) -> None:
    """UsageError where `--tune` was asked for and there is nothing to tune."""
    if subject:
        return
    if device.kind != "cuda":
        raise UsageError("--tune makes LoRA kernels faster on GPUs, and there is none here.", "leave --tune away")
    raise UsageError("--tune is about LoRA kernels, and none are used.", "name an adapter, or leave --tune away")


def tune(subject: Subject, home: Home, environment: dict[str, str], tell: Callable[[dict[str, Any]], None]) -> None:
    """Search, which takes a minute or some, and keep what was found; EngineError where it cannot.

    `environment`: the engine's, so that the kernels that are compiled here are those that it finds in its cache.
    `tell`: called with each line of the search. What was begun and not ended leaves nothing.
    """
    folder = subject.folder(home)
    partial = home.ensure(folder.parent) / f".{folder.name}-{os.getpid()}"
    sweep(folder)
    asked = {
        "groups": [[group.name, group.inner, group.outers] for group in subject.groups],
        "rank": subject.rank,
        "slots": subject.slots,
        "out": str(partial),
    }
    calls = []
    try:
        with os_errors("making", partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
        for line in run_search(asked, environment):
            tell(line)
            if "op" in line:
                calls.append(line)
        if not all(math.isfinite(call["own_us"]) for call in calls):
            raise EngineError("the search found a kernel of vLLM's own that does not run.", "is the GPU free?")
        write_json(partial / REPORT, {"gpu": subject.gpu, "vllm": subject.version, "asked": asked, "calls": calls})
        with os_errors("writing", folder):
            if not subject.is_tuned(home):  # or another search came first, and an engine may be reading it
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what searches left behind that were killed."""
    for path in folder.parent.glob(f".{folder.name}-*"):
        owner = path.name.rpartition("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def run_search(asked: dict[str, Any], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Lines of the search as they come; EngineError with its last words where it fails.

    It runs under the engine's guard, so that none of its processes outlives us, however we end.
    """
    with os_errors("starting", Path(sys.executable), "end other programs, or look at ulimit -a"):
        process, pipe = start_guarded([*SEARCH, json.dumps(asked)], environment)
    assert process.stdout
    said: deque[str] = deque(maxlen=LAST_LINES)
    ends = [pipe]

    def end() -> None:
        while ends:
            os.close(ends.pop())

    def start_watch() -> threading.Timer:
        watch = threading.Timer(SILENT_S, end)
        watch.daemon = True
        watch.start()
        return watch

    watch = start_watch()
    try:
        for text in process.stdout:
            watch.cancel()
            watch = start_watch()
            try:
                line = json.loads(text)
            except ValueError:
                said.append(text.rstrip())
                continue
            if isinstance(line, dict):
                yield line
        if process.wait() or not ends:
            hint = "is the GPU free, and is this vLLM's Python? Without --tune vLLM's own are used"
            raise EngineError("the search for LoRA kernels ended before its time.", hint, tuple(said))
    finally:
        watch.cancel()
        end()
        process.wait()
        process.stdout.close()
