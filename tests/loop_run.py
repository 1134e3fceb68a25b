"""A small run of the loop as a process of its own, to be killed, continued, or spread over several processes.

python -m tests.loop_run FOLDER [--resume] [--pause SECONDS] [--batch-size 3] [--dropout 0.2] [--die-in-checkpoint STEP]
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from loraport.train.loop import trainer
from loraport.train.loop.checkpoints import newest, seal, step_of
from loraport.train.loop.fit import Outcome, fit
from loraport.train.loop.settings import Settings
from tests.loop import ToyRows, base_of, config_for, lora_on, weights_of

IDENTITY = {"rows": "those", "settings": {"rank": 4}}


class Pause(TrainerCallback):
    """Makes the steps of a tiny model long enough to be killed in, and says when the first begins."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        Path(args.output_dir, "begun").touch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        time.sleep(self.seconds)


def run(folder: Path, resume: bool = False, callbacks: tuple[Any, ...] = (), **settings: Any) -> tuple[Any, Outcome]:
    """12 steps in 3 shuffled epochs with dropout, a checkpoint after each third: none is at the end of an epoch."""
    given = {"batch_size": 3, "epochs": 3, "eval_steps": 3, "save_steps": 3, "dropout": 0.2} | settings
    model, config = lora_on(base_of("qwen3"), dropout=given["dropout"]), config_for(**given)
    checkpoint = newest(folder, IDENTITY) if resume else None
    outcome = fit(
        model,
        ToyRows(10),
        ToyRows(3, 1),
        config,
        Settings(60),
        folder,
        IDENTITY,
        resume=checkpoint,
        callbacks=callbacks,
    )
    return model, outcome


def learned(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What was logged, without times and memory."""
    figures = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_token_accuracy")
    figures += ("token_accuracy", "trained_tokens")
    return [{key: entry[key] for key in figures if key in entry} for entry in history if "train_runtime" not in entry]


def die() -> None:
    """As by the kernel when memory is short: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--die-in-checkpoint", type=int, help="of this step, when all but the seal is written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.die_in_checkpoint:
        trainer.seal = lambda *of: die() if step_of(of[0]) == given.die_in_checkpoint else seal(*of)
    settings = {"batch_size": given.batch_size, "dropout": given.dropout}
    model, outcome = run(given.folder, given.resume, (Pause(given.pause),), **settings)
    if os.environ.get("RANK", "0") != "0":
        return
    save_file(weights_of(model), given.folder / "weights.safetensors")
    (given.folder / "history.json").write_text(json.dumps(learned(outcome.history)))


if __name__ == "__main__":
    main()
