"""What the tests of whole runs share: a small one with checkpoints, its lines of progress, and what it stored."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.home import Home
from loraport.train.adapters import WEIGHTS, Adapter, adapter_names, versions
from loraport.train.config import RunConfig
from loraport.train.progress_file import ProgressFile
from loraport.train.run import train

STEPS = [5, 10, 15, 20]  # those with a checkpoint, in the run below
Lines = list[dict[str, Any]]
Undisturbed = tuple[Home, Adapter, Lines]


def configure(base: Path, data: Path, **settings: Any) -> RunConfig:
    """20 steps in 4 epochs with dropout, a checkpoint after each; the two before the last become adapters."""
    given = {"model": str(base), "data": data, "name": "colours", "rank": 4, "epochs": 4, "batch_size": 8}
    given |= {"learning_rate": 1e-2, "dropout": 0.1, "eval_prompts": 2, "checkpoint_adapters": 2}
    return RunConfig.model_validate(given | settings)


def train_undisturbed(config: RunConfig, folder: Path) -> Undisturbed:
    """A run that nobody disturbs: its home, its adapter and its lines."""
    home = Home(folder / "home")
    adapter = train(config, home, file=ProgressFile(folder / "progress.jsonl"))
    return home, adapter, read(folder / "progress.jsonl")


def read(path: Path) -> Lines:
    """All lines of a progress file; fails on one that is no JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def of(lines: Lines, kind: str) -> Lines:
    return [line for line in lines if line["type"] == kind]


def stored(home: Home) -> dict[str, bytes]:
    """The weights of every version."""
    found = {name: versions(home, name) for name in adapter_names(home)}
    return {f"{name}@{path.name}": (path / WEIGHTS).read_bytes() for name, paths in found.items() for path in paths}
