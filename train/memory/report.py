"""A plan as one JSON document, and as text for people. The figures come from plan.py and speed.py."""

from dataclasses import asdict, dataclass
from typing import Any

from loraport.clients.terminal import console, say
from loraport.train.config import ResolvedConfig
from loraport.train.defaults import Choice
from loraport.train.memory.plan import Plan, Rung, gib
from loraport.train.memory.shapes import Shape
from loraport.train.memory.speed import Speed

# part of Parts -> what it is, for people
PARTS = {
    "weights": "base, {held}",
    "adapter": "adapter in float32, and a copy to compute with",
    "gradients": "its gradients",
    "optimizer": "states of {optimizer}",
    "activations": "activations of {tokens:,} tokens",
    "largest_moment": "for a moment: {moment}",
    "workspace": "workspace of kernels",
    "slack": "slack of the allocator",
    "context": "context of {device}",
}


@dataclass(frozen=True)
class Work:
    """How much there is to do. `tokens` of one epoch; `is_most` where rows were taken at their full length."""

    tokens: int | None
    passes: float
    is_most: bool
    source: str


@dataclass(frozen=True)
class Report:
    """A plan with what it was made for."""

    model: str
    config: ResolvedConfig
    shape: Shape
    plan: Plan
    derived: tuple[Choice, ...]
    speed: Speed | None
    work: Work
    price: float | None

    def hours(self, tokens_per_second: float) -> float | None:
        """Hours at a speed; None where it is not known how much there is to do."""
        return None if self.work.tokens is None else self.work.tokens * self.work.passes / tokens_per_second / 3600

    def cost(self, hours: float | None) -> float | None:
        """For all GPUs together; None without a price for each hour of one."""
        return None if hours is None or self.price is None else hours * self.price * self.plan.machine.gpus


def as_json(report: Report) -> dict[str, Any]:
    """The document of --json. Sizes in bytes on each GPU, times in hours; ranges are [low, high]."""
    made, speed = report.plan, report.speed
    hours = report.hours(speed.tokens_per_second) if speed else None
    bounds = [report.hours(speed.high), report.hours(speed.low)] if speed else [None, None]
    return {
        "model": report.model,
        "parameters": report.shape.parameters,
        "trainable_parameters": made.trainable_parameters,
        "adapter_bytes": made.adapter_bytes,
        "rank": report.config.rank,
        "target_modules": sorted({linear.name for linear in report.shape.targeted(report.config.target_modules)}),
        "max_lora_rank": report.config.max_lora_rank,
        "gpu": {"name": made.machine.name, "kind": made.machine.kind, "count": made.machine.gpus},
        "memory_limit_bytes": made.machine.memory,
        "peak_memory_bytes": made.parts.peak,
        "memory": made.parts.as_bytes(),
        "fits": made.fits,
        "verdict": made.verdict,
        "settings": asdict(made.settings)
        | {key: getattr(report.config, key) for key in ("sequence_length", "batch_size", "epochs", "learning_rate")},
        "reasons": {choice.name: choice.reason for choice in (*report.derived, *made.choices)},
        "ladder": [asdict(rung) for rung in made.ladder],
        "alternatives": [asdict(each) for each in made.alternatives],
        "tokens_per_second": speed.tokens_per_second if speed else None,
        "tokens_per_second_range": [speed.low, speed.high] if speed else None,
        "tokens": report.work.tokens,
        "hours": rounded(hours),
        "hours_range": [rounded(each) for each in bounds] if hours is not None else None,
        "cost": rounded(report.cost(hours)),
        "cost_range": [rounded(report.cost(each)) for each in bounds] if report.cost(hours) is not None else None,
        "notes": list(made.notes),
    }


def rounded(number: float | None) -> float | None:
    """To three digits after the point."""
    return None if number is None else round(number, 3)


def say_report(report: Report) -> None:
    """The same for people; the verdict last, unless it is an error's to say."""
    made, shape = report.plan, report.shape
    say(f"{report.model}  {shape.parameters / 1e9:.2f}B parameters, {len(shape.blocks)} layers", "bold")
    say(
        f"adapter  rank {report.config.rank}, {made.trainable_parameters:,} parameters, "
        f"{made.adapter_bytes:,} bytes ({gib(made.adapter_bytes)}); vLLM needs --max-lora-rank "
        f"{report.config.max_lora_rank}"
    )
    say("")
    say_parts(made)
    say("")
    say_choices((*report.derived, *made.choices))
    say("")
    if len(made.ladder) > 1:
        for rung in made.ladder:
            say(f"  {describe_rung(rung)}")
        say("")
    for line in time_lines(report):
        say(line)
    for note in made.notes:
        say(f"note: {note}", "yellow")
    if made.fits:
        say(made.verdict, "bold green")


def say_parts(made: Plan) -> None:
    """The table of parts."""
    from rich.table import Table

    table = Table("memory" + (" of each GPU" if made.machine.gpus > 1 else ""), "GiB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    words = {
        "held": made.load.types.held,
        "optimizer": made.load.optimizer,
        "tokens": made.layout.tokens,
        "moment": made.parts.moment,
        "device": "CUDA" if made.machine.kind == "cuda" else "Python and torch",
    }
    for name, size in made.parts.as_bytes().items():
        table.add_row(f"  {PARTS[name].format(**words)}", f"{size / 2**30:.2f}")
    table.add_row("peak", f"{made.parts.peak / 2**30:.2f}", style="bold")
    table.add_row("there is", f"{made.machine.memory / 2**30:.2f}")
    console.print(table)


def say_choices(choices: tuple[Choice, ...]) -> None:
    """Settings, with the reason for each."""
    name, value = (max(len(getattr(choice, field)) for choice in choices) for field in ("name", "value"))
    for choice in choices:
        say(f"  {choice.name:<{name}}  {choice.value:<{value}}  ({choice.reason})")


def describe_rung(rung: Rung) -> str:
    """A rung of the ladder in a line."""
    spread = "" if rung.sharding == "none" else f" {rung.sharding.upper():<4}"
    fits = "fits" if rung.fits else "does not fit"
    return (
        f"checkpointing {rung.checkpointing:<7}{spread}  {rung.micro_batch_tokens:>6,} tokens at once  "
        f"{gib(rung.peak):>9}  {fits}"
    )


def time_lines(report: Report) -> list[str]:
    """Speed, hours and cost with their uncertainty, or why there are none."""
    speed, work, machine = report.speed, report.work, report.plan.machine
    if speed is None:
        what = "a CPU" if machine.kind == "cpu" else machine.name
        return [f"speed    not known for {what}" + ("" if machine.kind == "cpu" else "; name one with --gpu-name")]
    lines = [f"speed    about {speed.tokens_per_second:,} tokens/s ({speed.low:,} to {speed.high:,})"]
    hours = report.hours(speed.tokens_per_second)
    if hours is None or work.tokens is None:
        return [*lines, "time     give --rows, --tokens or --data to know it"]
    bounds = f"{in_time(report.hours(speed.high))} to {in_time(report.hours(speed.low))}"
    most = "at most " if work.is_most else "about "
    lines.append(
        f"time     about {in_time(hours)} ({bounds}), for {most}{work.tokens:,} tokens ({work.source}) "
        f"× {work.passes:g} epoch{'' if work.passes == 1 else 's'}"
    )
    cost = report.cost(hours)
    if cost is not None:
        low, high = report.cost(report.hours(speed.high)), report.cost(report.hours(speed.low))
        lines.append(f"cost     about {cost:,.2f} ({low:,.2f} to {high:,.2f})")
    return lines


def in_time(hours: float | None) -> str:
    """Hours, or minutes below two hours."""
    return "?" if hours is None else f"{hours:,.1f} h" if hours >= 2 else f"{hours * 60:,.0f} min"
