"""One run of the loop from a loaded model to its best weights: ways, trainer, signals, checkpoints, figures.

>>> outcome = fit(model, rows, eval_rows, config, Settings(8192), folder, identity)
>>> outcome.metrics["eval_loss"]
0.41
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from loraport.clients.errors import ResourceError
from loraport.clients.terminal import say
from loraport.train.config import ResolvedConfig
from loraport.train.loop.make import make_trainer
from loraport.train.loop.packing import Rows
from loraport.train.loop.settings import Settings
from loraport.train.loop.shards import Shards
from loraport.train.loop.trainer import LoraTrainer
from loraport.train.loop.ways import agreeing, trained

SAME_SIGNAL_S = 5.0  # within which a second SIGTERM is the first: `timeout` sends it to a process and then to its group


@dataclass(frozen=True)
class Outcome:
    """`metrics`: figures of the run, `history`: what was logged at each step (transformers' `log_history`).

    `settings`: those at the end, after any step down the ladder.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    settings: Settings


class StopCallback(TrainerCallback):
    """Ends the run behind the step at which it was asked to, with a checkpoint."""

    def __init__(self) -> None:
        self.trainer: LoraTrainer | None = None
        self.signal = 0
        self.asked_at: dict[int, float] = {}  # by signal

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Several GPUs have agreed on it within the step; a process alone need not wait for the next."""
        if self.trainer and args.world_size == 1:
            self.trainer.stopping = self.trainer.stop_asked
        if self.trainer and self.trainer.stopping:
            control.should_save = control.should_training_stop = True

    def ask(self, number: int, _: FrameType | None) -> None:
        """A first signal asks; the second is not held back."""
        if number in self.asked_at:
            if time.monotonic() - self.asked_at[number] > SAME_SIGNAL_S:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.asked_at[number] = time.monotonic()
        if number == signal.SIGINT:  # nobody presses Ctrl-C twice who means it once
            signal.signal(number, signal.default_int_handler)
        self.signal = number
        if self.trainer:
            self.trainer.stop_asked = True
        with contextlib.suppress(RuntimeError, OSError):  # it may have come in the middle of another line
            say("stopping after this step, with a checkpoint (once more to stop at once)", "yellow")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, SIGTERM and Ctrl-C ask."""
        before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def fit(
    model: Any,
    rows: Rows,
    eval_rows: Rows,
    config: ResolvedConfig,
    settings: Settings,
    folder: Path,
    identity: dict[str, Any],
    resume: Path | None = None,
    callbacks: tuple[Any, ...] = (),
    report_to: list[str] | str = "none",
    shards: Shards | None = None,
) -> Outcome:
    """Train the PeftModel `model`; it holds its best weights afterwards, and its own forwards.

    `folder` takes the checkpoints, `identity` seals them, `resume` is one to continue from. A callback with an
    attribute `trainer` gets it. `shards`: those of the model, where it has any. Raises Refused when the run diverges,
    ResourceError without memory or disk, SystemExit(128 + n) when signal n ended it: then the last checkpoint is of its
    last step.
    """
    stop = StopCallback()
    ways = agreeing(model)
    with trained(model, ways), stop.listening():
        watching = [stop, *callbacks]
        trainer = make_trainer(model, rows, eval_rows, config, settings, ways, folder, identity, watching, report_to)
        trainer.shards = shards
        for callback in watching:
            if hasattr(callback, "trainer"):
                callback.trainer = trainer
        trainer.stop_asked = bool(stop.signal)  # before there was a trainer to tell
        try:
            if not trainer.prepare():
                say("stopped before the first step; nothing is lost", "yellow")
                raise SystemExit(128 + stop.signal)
            result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(trainer) from error
    if trainer.stopping or stop.signal:  # the latter alone: after the last step, when there was none to end behind
        say(f"stopped after step {trainer.state.global_step}; go on with --resume", "yellow")
        raise SystemExit(128 + (stop.signal or signal.SIGTERM))  # another GPU's process was told to
    return Outcome(figures(trainer, result), trainer.state.log_history, trainer.settings)


def out_of_memory(trainer: LoraTrainer) -> ResourceError:
    """What to say at the end of the ladder."""
    return ResourceError(
        f"the GPU ran out of memory with {trainer.settings.words(trainer.layers)}.",
        "use --load nf4, a shorter --sequence-length, a smaller model, or more GPUs: see `loraport plan train`",
    )


def figures(trainer: LoraTrainer, result: Any) -> dict[str, float]:
    """Losses of the weights that are kept, steps, speed, and on a GPU the peaks of memory in bytes."""
    history = trainer.state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    best = min(evaluations, key=lambda entry: entry["eval_loss"])
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    found = {
        "train_loss": sum(losses) / len(losses),  # transformers' own is of the steps since a run was continued
        **{key: value for key, value in best.items() if key.startswith("eval_")},
        "best_step": best["step"],
        "last_eval_loss": evaluations[-1]["eval_loss"],
        "steps": trainer.state.global_step,
        "trained_tokens": max((entry.get("trained_tokens", 0) for entry in history), default=0),
        "tokens_per_second": round(trainer.tokens_seen / result.metrics["train_runtime"], 1),
        "tokens_per_second_median": round(sorted(speeds)[len(speeds) // 2], 1),
    }
    if torch.cuda.is_available():
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return found
