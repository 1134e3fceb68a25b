"""The steps of a training as lines of its progress file (train/progress_file.py), written by the first process.

>>> fit(model, rows, eval_rows, config, settings, folder, identity, callbacks=(ReportCallback(file, start, True),))
"""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loraport.train.loop.checkpoints import step_of
from loraport.train.loop.dpo import FIGURES
from loraport.train.loop.gpu_memory import peak_memory
from loraport.train.loop.progress import seconds_left
from loraport.train.progress_file import ProgressFile


class ReportCallback(TrainerCallback):
    """Writes `start`, `metrics`, `evaluation` and `checkpoint`.

    `facts`: what the line of the start says beside the steps. `full`: an evaluation is over all rows that there are.
    """

    def __init__(self, file: ProgressFile, facts: dict[str, Any], full: bool) -> None:
        self.file, self.facts, self.full = file, facts, full
        self.started, self.first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A resumed run begins where it was."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self.file.write("start", steps=state.max_steps, first_step=state.global_step, **self.facts)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """A step, or an evaluation."""
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.file.write("metrics", **self.metrics(state, logs))
        if "eval_loss" in logs:
            self.file.write("evaluation", step=state.global_step, **self.evaluation(logs))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint, which is sealed by now."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.file.write("checkpoint", step=step_of(folder), folder=folder)

    def metrics(self, state: Any, logs: dict[str, float]) -> dict[str, Any]:
        """Of a step."""
        return {
            "step": state.global_step,
            "steps": state.max_steps,
            "epoch": state.epoch,
            "train_loss": logs["loss"],
            "train_mean_token_accuracy": logs.get("token_accuracy"),
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": logs.get("tokens_per_second"),
            "tokens": logs.get("trained_tokens"),
            "memory_bytes": peak_memory(),
            "left_s": round(seconds_left(self.started, self.first_step, state), 1),
        } | {name: logs[name] for name in FIGURES if name in logs}

    def evaluation(self, logs: dict[str, float]) -> dict[str, Any]:
        """Of an evaluation."""
        figures = {"valid_loss": logs["eval_loss"], "valid_mean_token_accuracy": logs.get("eval_token_accuracy")}
        figures |= {f"valid_{name}": logs[f"eval_{name}"] for name in FIGURES if f"eval_{name}" in logs}
        return figures | ({f"full_{name}": value for name, value in figures.items()} if self.full else {})
