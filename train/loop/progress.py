"""Progress of a training run on standard error: a bar on a terminal, a line every tenth of the way elsewhere."""

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback

from loraport.clients.terminal import console, say


def clock(seconds: float) -> str:
    """Minutes and seconds, hours where there are any: 1:05, 2:03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss, tokens/s and time left. Bind it to its trainer, whose `tokens_seen` it reads."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.losses: dict[str, float] = {}
        self.started = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[at]}"),
        )
        self.bar = Progress(*columns, console=console, transient=True)
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock and the bar."""
        self.started = time.monotonic()
        if console.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task("training", total=state.max_steps, at="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar, or print a line at each tenth."""
        tenth = max(1, state.max_steps // 10)
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step, at=self.line(state))
        elif state.global_step % tenth == 0 or state.global_step == state.max_steps:
            say(f"step {state.global_step}/{state.max_steps}  {self.line(state)}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep the newest losses; say each evaluation's."""
        self.losses |= {key: value for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
        if logs and "eval_loss" in logs:
            loss, eval_loss = self.losses.get("loss", float("nan")), logs["eval_loss"]
            say(f"epoch {state.epoch or 0:.1f}  loss {loss:.3f}  eval loss {eval_loss:.3f}")

    def close(self) -> None:
        """Leave the terminal as it was; also after a run that failed."""
        if self.task is not None:
            self.bar.stop()

    def line(self, state: Any) -> str:
        """Loss, speed and time left, from what has run so far."""
        elapsed = time.monotonic() - self.started
        left = elapsed / state.global_step * (state.max_steps - state.global_step)
        speed = self.trainer.tokens_seen / elapsed
        loss = f"loss {self.losses['loss']:.3f}  " if "loss" in self.losses else ""
        return f"{loss}{speed:,.0f} tokens/s  {clock(left)} left"
