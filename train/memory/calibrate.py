"""Predictions against measured runs, as a table: to set the Coefficients of load.py, and to show how good they are.

    python -m loraport.train.memory.calibrate runs.json

`runs.json` is a list of objects, one a run:

    {"name": "nf4 r16 4096", "base": {config.json}, "config": {"load": "nf4", "rank": 16, ...}, "tokens": 4096,
     "checkpointed": 32, "offload": false, "trained": 4096, "sharding": "none", "gpus": 1,
     "peak_allocated": bytes, "peak_reserved": bytes}

`base` may also be the path of a model's folder; `config` holds fields of the run configuration; `tokens` and `trained`
are those of the largest micro-step; the peaks are torch.cuda.max_memory_allocated and max_memory_reserved of the GPU
with the highest. A prediction is good when it is never under and at most 10% over.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from loraport.clients.errors import LoraportError, Shortfall, UsageError, os_errors
from loraport.clients.terminal import exit_with, print_json, say
from loraport.train.base_model import fetch_config
from loraport.train.config import load_config
from loraport.train.defaults import Facts, resolve
from loraport.train.memory.load import COEFFICIENTS, Coefficients
from loraport.train.memory.machine import Machine
from loraport.train.memory.parts import Layout, Parts, memory
from loraport.train.memory.plan import load_of
from loraport.train.memory.shapes import read_shape

MOST_OVER = 1.10
LAYOUT = ("tokens", "checkpointed", "offload", "sharding", "gpus", "trained")
A_GPU = Machine("cuda", "the GPU of the measurement", 1 << 40)


@dataclass(frozen=True)
class Compared:
    """A measured run beside its prediction; ratios are predicted over measured."""

    name: str
    tokens: int
    checkpointed: int
    parts: Parts
    measured_allocated: int
    measured_reserved: int

    @property
    def allocated_ratio(self) -> float:
        """Of the peak of allocated memory."""
        return self.parts.allocated / self.measured_allocated

    @property
    def reserved_ratio(self) -> float:
        """Of the peak of reserved memory: the one that decides about running out."""
        return self.parts.reserved / self.measured_reserved

    @property
    def is_good(self) -> bool:
        """Never under, at most 10% over."""
        return 1.0 <= self.reserved_ratio <= MOST_OVER


def compare(runs: list[dict[str, Any]], known: Coefficients = COEFFICIENTS) -> list[Compared]:
    """Every run beside its prediction. UsageError for a run that lacks something."""
    return [compare_run(run, number, known) for number, run in enumerate(runs, 1)]


def compare_run(run: dict[str, Any], number: int, known: Coefficients) -> Compared:
    """One run beside its prediction."""
    try:
        base = run["base"] if isinstance(run["base"], dict) else fetch_config(run["base"])
        given = load_config(None, {"model": "measured", "data": "measured"} | run["config"])
        layout = Layout(**{key: run[key] for key in LAYOUT if key in run})
        allocated, reserved = int(run["peak_allocated"]), int(run["peak_reserved"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"run {number} lacks something: {error}.", "see python -m loraport.train.memory.calibrate --help"
        ) from error
    resolved, _ = resolve(given, Facts.of_base(base))
    shape = read_shape(base)
    parts = memory(shape, load_of(resolved, shape, A_GPU), layout, known)
    name = str(run.get("name", f"run {number}"))
    return Compared(name, layout.tokens, layout.checkpointed, parts, allocated, reserved)


def main(
    runs: Annotated[Path, typer.Argument(help="JSON list of measured runs.")],
    as_document: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare predicted with measured peak memory; exit code 4 when one is under, or more than 10% over."""
    with os_errors("reading", runs):
        text = runs.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{runs} is not JSON: {error}.", "give a JSON list of runs") from error
    if not isinstance(found, list) or not found:
        raise UsageError(f"{runs} holds no list of runs.", "see python -m loraport.train.memory.calibrate --help")
    compared = compare(found)
    if as_document:
        print_json([describe(each) for each in compared])
    else:
        say_table(compared)
    bad = [each.name for each in compared if not each.is_good]
    if bad:
        raise Shortfall(f"{len(bad)} of {len(compared)} predictions are off, first that of {bad[0]}.", "")


def describe(each: Compared) -> dict[str, Any]:
    """A comparison for --json, sizes in bytes."""
    return {
        "name": each.name,
        "tokens": each.tokens,
        "checkpointed": each.checkpointed,
        "memory": each.parts.as_bytes(),
        "moment": each.parts.moment,
        "allocated": [each.parts.allocated, each.measured_allocated, round(each.allocated_ratio, 4)],
        "reserved": [each.parts.reserved, each.measured_reserved, round(each.reserved_ratio, 4)],
        "good": each.is_good,
    }


def say_table(compared: list[Compared]) -> None:
    """The same for people: predicted GiB, measured GiB and their ratio."""
    width = max(len(each.name) for each in compared)
    heads = f"{'tokens':>7}{'ckpt':>5}  {'allocated':>9}{'measured':>9}{'ratio':>7}"
    say(f"{'run':<{width}}{heads}  {'reserved':>8}{'measured':>9}{'ratio':>7}", "bold")
    for each in compared:
        sizes = (each.parts.allocated, each.measured_allocated, each.parts.reserved, each.measured_reserved)
        allocated, was_allocated, reserved, was_reserved = (size / 2**30 for size in sizes)
        say(
            f"{each.name:<{width}}{each.tokens:>7,}{each.checkpointed:>5}"
            f"  {allocated:>9.2f}{was_allocated:>9.2f}{each.allocated_ratio:>7.3f}"
            f"  {reserved:>8.2f}{was_reserved:>9.2f}{each.reserved_ratio:>7.3f}{'' if each.is_good else '  off'}"
        )


if __name__ == "__main__":
    try:
        typer.run(main)
    except LoraportError as problem:
        exit_with(problem, debug=False)
