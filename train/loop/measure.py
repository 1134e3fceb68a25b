"""Ours in `loraport bench train`: the product's own loop on a random base, timed as its peers are.

Nothing is left out: the plan of its memory, the check of the fused layers, the rehearsal of the largest micro-step, the
ladder, and at the end an evaluation and a checkpoint, which fall behind the last mark of the clock.

    python -m loraport.train.loop.measure spec.json
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from loraport.train.config import ResolvedConfig, RunConfig, explain_invalid
from loraport.train.defaults import Facts, resolve
from loraport.train.loop.fit import fit
from loraport.train.loop.gpu_memory import limit_memory
from loraport.train.loop.lora import count_trainable, with_lora
from loraport.train.loop.random_base import random_base, random_rows
from loraport.train.loop.settings import Settings
from loraport.train.loop.shards import share
from loraport.train.loop.step_clock import StepClock, run_worker
from loraport.train.memory.machine import machine_for_run
from loraport.train.memory.plan import Plan, plan
from loraport.train.memory.shapes import read_shape


class RandomRows:
    """Rows as the loop wants them: `lengths` (rows,) int32, items with `input_ids` and `labels` (T,) int32."""

    def __init__(self, lengths: list[int], vocabulary: int, seed: int) -> None:
        self.rows = random_rows(lengths, vocabulary, seed)
        self.lengths = np.array(lengths, np.int32)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Tokens and labels of a row."""
        return {key: np.array(values, np.int32) for key, values in self.rows[row].items()}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Figures of our loop for a spec of bench/training/runner.py."""
    device = use_device()
    config = configure(spec)
    made = planned(config, spec)
    settings = Settings.of_plan(made.settings)
    limit_memory(config.gpu_memory)
    waiting = "cpu" if settings.sharded else None
    base = random_base(spec["shape"], spec["load"], device, seed=spec["seed"], linears_on=waiting)
    model = with_lora(base, config, list(config.target_modules))
    shards = share(model, torch.device(device)) if settings.sharded else None
    vocabulary = spec["shape"]["vocab_size"]
    rows = RandomRows(spec["lengths"], vocabulary, spec["seed"])
    eval_rows = RandomRows(spec["lengths"][:1], vocabulary, spec["seed"] + 1)
    clock = StepClock(spec["warmup"])
    clock.reset()
    folder = Path(spec["out"]).parent / "run"  # one for all processes; it goes with the spec
    outcome = fit(model, rows, eval_rows, config, settings, folder, {}, callbacks=(clock,), shards=shards)
    return clock.figures() | {
        "trainable_parameters": count_trainable(model),
        "settings": vars(outcome.settings),
        "planned": made.parts.as_bytes(),
        "planned_allocated": made.parts.allocated,
        "planned_reserved": made.parts.reserved,
        "notes": []
        if outcome.settings == settings
        else ["stepped down the ladder: out of memory with " + str(settings)],
    }


def use_device() -> str:
    """This process's GPU, where there are several processes one each; or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return f"cuda:{torch.cuda.current_device()}"


def planned(config: ResolvedConfig, spec: dict[str, Any]) -> Plan:
    """What `loraport train` would plan for this run: settings where the spec leaves them open, and the memory."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    machine = machine_for_run(config.gpu_memory, processes)
    return plan(config, read_shape(spec["shape"], "random"), machine, max(spec["lengths"]))


def configure(spec: dict[str, Any]) -> ResolvedConfig:
    """The spec as a run configuration; its `settings` win over what the case says."""
    steps = spec["warmup"] + spec["steps"]
    values = {
        "model": "random",
        "data": "random.jsonl",
        "load": spec["load"],
        "rank": spec["rank"],
        "alpha": 2 * spec["rank"],
        "rslora": False,
        "dropout": spec["dropout"],
        "target_modules": spec["targets"],
        "sequence_length": spec["row_tokens"],
        "batch_size": spec["step_rows"],
        "micro_batch_tokens": spec["micro_rows"] * spec["row_tokens"],
        "checkpointing": "full" if spec["checkpointing"] else "off",
        "gpu_memory": spec["gpu_memory"],
        "learning_rate": 2e-4,
        "max_steps": steps,
        "eval_steps": steps,
        "seed": spec["seed"],
    }
    try:
        config = RunConfig.model_validate(values | spec["settings"])
    except ValidationError as error:
        raise explain_invalid(error, "the contender's settings") from error
    return resolve(config, Facts(rows=len(spec["lengths"])))[0]


if __name__ == "__main__":
    run_worker(sys.argv[1], measure)
