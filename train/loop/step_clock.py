"""Times the steps of any transformers Trainer and reads its peak memory, for `loraport bench train`.

Every contender is measured by this, in a process of its own: steps behind the warm-up, each ended by a synchronisation;
tokens of rows, without padding; memory that torch allocated and reserved since the model stood.

    >>> clock = StepClock(warmup=3)
    >>> clock.reset()
    >>> fit(model, rows, eval_rows, config, settings, folder, {}, callbacks=(clock,))
    >>> clock.figures()["tokens_per_second"]
    11873.2
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from loraport.clients.errors import LoraportError
from loraport.train.loop.gpu_memory import limit_memory


class StepClock(TrainerCallback):
    """Notes time and tokens after each optimiser step. `trainer` tells its `tokens_seen`: int, or a tensor of one."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.trainer: Any = None
        self.marks: list[tuple[float, int]] = []

    def reset(self) -> None:
        """Count memory from here on: what making the model needed is given back."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The mark before the first step."""
        self.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The mark after each step."""
        self.mark()

    def mark(self) -> None:
        """Wait for the device, then note time and tokens."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), int(self.trainer.tokens_seen)))

    def figures(self) -> dict[str, Any]:
        """Speed over all steps behind the warm-up, each of them, peak memory in bytes, and the losses.

        All contenders start with the same weights, so their first losses are alike.
        """
        pairs = list(zip(self.marks[self.warmup :], self.marks[self.warmup + 1 :], strict=False))
        seconds = [after[0] - before[0] for before, after in pairs]
        tokens = [after[1] - before[1] for before, after in pairs]
        logged = [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        return {
            "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
            "step_seconds": [round(each, 4) for each in seconds],
            "step_tokens": tokens,
            "median_step_seconds": round(statistics.median(seconds), 4),
            "losses": [round(float(loss), 4) for loss in logged],
        } | peaks()


def peaks() -> dict[str, int | None]:
    """Peak bytes of this process on the GPU since the last reset; None on a CPU, where torch does not count."""
    if not torch.cuda.is_available():
        return {"peak_allocated": None, "peak_reserved": None}
    return {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}


def run_worker(spec_file: str, measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read a spec, measure, and write the figures or the reason why there are none to the spec's `out`.

    A worker that `waits` does so for the line "go", and ends without it: then nobody wants its figures any more. Of
    several processes the first writes: its own memory, and tokens of all.
    """
    spec = json.loads(Path(spec_file).read_text())
    if spec["waits"] and sys.stdin.readline() != "go\n":
        return
    limit_memory(spec["gpu_memory"])
    out = Path(spec["out"] if os.environ.get("RANK", "0") == "0" else os.devnull)
    try:
        out.write_text(json.dumps(measure(spec)))
    except Exception as error:
        out.write_text(json.dumps({"error": explain(error)} | peaks()))
        raise


def explain(error: Exception) -> str:
    """In a line why a run ended; running out of memory in the same words for all."""
    if torch.OutOfMemoryError in (type(error), type(error.__cause__)):
        return "out of memory"
    return error.message if isinstance(error, LoraportError) else f"{type(error).__name__}: {error}".splitlines()[0]
