"""What a training run is doing, on standard error: phases with their times, a bar on a terminal, lines elsewhere.

    phases = Phases()
    with phases("tokenising", total=len(rows)) as phase:     # a bar, or where there is no total a spinner
        for row in rows:
            phase.advance()
        phase.note = "124,198 tokens"                        # stands in the line that remains:
                                                             #   tokenising: 124,198 tokens, 3.4 s
    phases.seconds                                           # {"tokenising": 3.4}, for the report

Where standard error is no terminal, each step of the training is one line, and nothing is overwritten.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

from loraport.clients.terminal import console, say
from loraport.train.loop.gpu_memory import peak_memory
from loraport.train.progress_file import ProgressFile

MANY_STEPS = 200  # from here on the line of a step leaves out what hardly changes
WORTH_A_LINE = 0.1  # seconds


def seconds_left(started: float, first_step: int, state: Any) -> float:
    """To the last step, at the speed since `started`, when `first_step` steps were done; evaluations count."""
    done = max(1, state.global_step - first_step)
    return (time.monotonic() - started) / done * float(state.max_steps - state.global_step)


def clock(seconds: float) -> str:
    """Minutes and seconds, hours where there are any: 1:05, 2:03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def took(seconds: float) -> str:
    """`3.4 s`, from two minutes on as a clock shows it."""
    return f"{seconds:.1f} s" if seconds < 120 else clock(seconds)


class Phase:
    """One part of a run while it lasts. `note` stands in the line that remains of it."""

    def __init__(self, bar: Progress | None, task: TaskID | None) -> None:
        self.note = ""
        self._bar, self._task = bar, task

    def advance(self, count: int = 1) -> None:
        """Move the bar by `count`."""
        if self._bar and self._task is not None:
            self._bar.advance(self._task, count)


class Phases:
    """The parts of a run, one after the other, and how long each took (`seconds`, by name)."""

    def __init__(self, file: ProgressFile | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.file = file or ProgressFile()

    @contextmanager
    def __call__(self, name: str, total: int | None = None, bar: bool = True) -> Iterator[Phase]:
        """Show `name` while the block runs; `bar` False where the block shows something of its own."""
        started = time.monotonic()
        self.file.write("phase", name=name)
        live = phase_bar(total) if bar and console.is_terminal else None
        phase = Phase(live, live.add_task(name, total=total) if live else None)
        try:
            if live:
                live.start()
            yield phase
        finally:
            if live:
                live.stop()
            spent = time.monotonic() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 2)
        self.file.write("phase", name=name, seconds=round(spent, 2))
        if spent >= WORTH_A_LINE or phase.note:
            say(f"  {name}: {phase.note + ', ' if phase.note else ''}{took(spent)}", "dim")


def phase_bar(total: int | None) -> Progress:
    """A bar with a count where there is a total, a spinner elsewhere; gone when it is stopped."""
    counted = (BarColumn(24), MofNCompleteColumn()) if total else ()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


class ProgressCallback(TrainerCallback):
    """Shows step, loss, tokens/s, memory and time left. Bind it to its `trainer`, whose counts it reads."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.started = self.step_began = self.in_steps = 0.0
        self.first_step = 0
        self.losses: list[float] = []  # since the last evaluation
        self.best = float("inf")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[at]}"),
        )
        self.bar = Progress(*columns, console=console, transient=True)
        self.task: TaskID | None = None
        self.evaluation: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock and the bar; a resumed run begins where it was."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if console.is_terminal and state.is_world_process_zero:
            self.bar.start()
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, at="")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of a step: evaluations and checkpoints do not count for the speed."""
        self.step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock of the step, and move the bar."""
        self.in_steps += time.monotonic() - self.step_began
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Show a step, or an evaluation."""
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.losses.append(logs["loss"])
            if self.task is not None:
                self.bar.update(self.task, at=self.step_line(state, logs, full=True))
            else:
                line = self.step_line(state, logs, full=state.max_steps <= MANY_STEPS)
                say(f"step {state.global_step}/{state.max_steps}  {line}")
        if "eval_loss" in logs:
            say(self.evaluation_line(state, logs))
            self.losses = []
            if self.evaluation is not None:
                self.bar.remove_task(self.evaluation)
                self.evaluation = None

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show on a terminal how far an evaluation is, until it is logged."""
        if self.task is None:
            return
        done, total = self.trainer.evaluated
        if self.evaluation is None:
            self.evaluation = self.bar.add_task("evaluating", total=total, at="")
        self.bar.update(self.evaluation, completed=done)

    def close(self) -> None:
        """Leave the terminal as it was; also after a run that failed."""
        if self.task is not None:
            self.bar.stop()

    def step_line(self, state: Any, logs: dict[str, float], full: bool) -> str:
        """Loss, speed, memory and time left: what the step logged, else from all that has run so far."""
        left = seconds_left(self.started, self.first_step, state)
        speed = logs.get("tokens_per_second") or self.trainer.tokens_seen / max(self.in_steps, 1e-9)
        memory = f"{logs.get('memory_gib') or peak_memory() / 2**30:.1f} GiB  " if full else ""
        margin = f"margin {logs['reward_margin']:.3f}  " if "reward_margin" in logs else ""
        return f"loss {logs['loss']:.3f}  {margin}{speed:,.0f} tokens/s  {memory}{clock(left)} left"

    def evaluation_line(self, state: Any, logs: dict[str, float]) -> str:
        """Epoch, mean training loss since the last evaluation, and what was evaluated."""
        parts = [f"epoch {state.epoch or 0:.1f}"]
        if self.losses:
            parts.append(f"loss {sum(self.losses) / len(self.losses):.3f}")
        parts.append(f"eval loss {logs['eval_loss']:.3f}")
        if "eval_reward_accuracy" in logs:
            parts.append(f"margin {logs['eval_reward_margin']:.2f}")
            parts.append(f"reward accuracy {logs['eval_reward_accuracy']:.1%}")
        if "eval_perplexity" in logs:
            parts.append(f"perplexity {logs['eval_perplexity']:.2f}")
        if "eval_token_accuracy" in logs:
            parts.append(f"token accuracy {logs['eval_token_accuracy']:.1%}")
        if self.best < float("inf"):
            parts.append("best so far" if logs["eval_loss"] < self.best else f"best was {self.best:.3f}")
        self.best = min(self.best, logs["eval_loss"])
        return "  ".join(parts)
