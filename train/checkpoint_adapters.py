"""Checkpoints of a run as adapters of their own: `checkpoint_adapters: 3` in the run configuration.

Each is NAME.step-40 beside NAME, complete and servable, with its own golden replies and the figures of its evaluation.
They are published before the run's own version: where that one is there, they are. Which checkpoints those are does not
depend on interruptions, so a run that is continued finds the ones that it has published already.

    >>> [(each.manifest.name, each.manifest.step) for each in checkpoint_adapters(home, adapter)]
    [('demo.step-20', 20), ('demo.step-40', 40)]
"""

import filecmp
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraport.clients.errors import UsageError
from loraport.clients.home import Home
from loraport.clients.rows import Message
from loraport.train.adapters import WEIGHTS, Adapter, PartialVersion, adapter_names, find_same, publish
from loraport.train.config import RunConfig
from loraport.train.job import Job
from loraport.train.loop.checkpoints import step_of, whole
from loraport.train.manifest import Golden
from loraport.train.storing import describe, save_weights

LONGEST_NAME = 64 - len(".step-9999999")
# A step's figures in the history of a run, and their names among the metrics of an adapter.
FIGURES = {
    "loss": "train_loss",
    "token_accuracy": "train_token_accuracy",
    "trained_tokens": "trained_tokens",
    "eval_loss": "eval_loss",
    "eval_perplexity": "eval_perplexity",
    "eval_token_accuracy": "eval_token_accuracy",
    "eval_reward_margin": "eval_reward_margin",
    "eval_reward_accuracy": "eval_reward_accuracy",
}


def step_name(name: str, step: int) -> str:
    """What the checkpoint of a step is called as an adapter."""
    return f"{name}.step-{step}"


def check_step_names(config: RunConfig) -> None:
    """UsageError when the names of checkpoints would be too long."""
    if config.checkpoint_adapters and len(config.name) > LONGEST_NAME:
        raise UsageError(
            f"--name {config.name} is too long for --checkpoint-adapters, which adds the step to it.",
            f"use at most {LONGEST_NAME} characters",
        )


def checkpoint_adapters(home: Home, adapter: Adapter) -> list[Adapter]:
    """Those of the run that made `adapter`, oldest step first."""
    manifest = adapter.manifest
    most = int(manifest.run.get("checkpoint_adapters") or 0)
    if not most:
        return []
    pattern = re.compile(re.escape(manifest.name) + r"\.step-[1-9][0-9]*")
    names = [name for name in adapter_names(home) if pattern.fullmatch(name)]
    found = [same for name in names if (same := find_same(home, name, manifest.fingerprint))]
    return sorted(found, key=lambda each: each.manifest.step or 0)[-most:]


def store_checkpoints(
    job: Job,
    model: Any,
    runs: Path,
    history: Sequence[dict[str, Any]],
    final: Path,
    prompts: list[list[Message]],
    golden: list[Golden],
    home: Home,
) -> None:
    """Publish the last ones before the final step, as many as the configuration says; those that are there are left.

    `model`: holds the weights in the folder `final`, and holds them again afterwards; those of the checkpoints take
    their place meanwhile, so the device needs no more memory. `golden`: of the final weights on `prompts`.
    """
    chosen = choose(runs, history, job.config.checkpoint_adapters)
    with restored(model, final if chosen else None):
        for checkpoint in chosen:
            step = step_of(checkpoint)
            name = step_name(job.config.name, step)
            if not is_stored(home, name, job.fingerprint, checkpoint):
                store_checkpoint(job, model, checkpoint, metrics_at(history, step), prompts, golden, home)


def choose(runs: Path, history: Sequence[dict[str, Any]], most: int) -> list[Path]:
    """The last whole checkpoints that were evaluated, without the final step: a signal's is none of the run's own."""
    evaluated = {entry["step"] for entry in history if "eval_loss" in entry}
    final = max((entry["step"] for entry in history), default=0)
    found = [path for path in whole(runs) if step_of(path) in evaluated and step_of(path) < final]
    return found[-most:] if most else []


@contextmanager
def restored(model: Any, final: Path | None) -> Iterator[None]:
    """Give the model the weights in `final` when the block is over."""
    from loraport.train.loop.lora import load_weights

    try:
        yield
    finally:
        if final:
            load_weights(model, final)


def is_stored(home: Home, name: str, fingerprint: str, checkpoint: Path) -> bool:
    """Whether the newest version of `name` is this checkpoint of this run."""
    same = find_same(home, name, fingerprint)
    return same is not None and filecmp.cmp(same.folder / WEIGHTS, checkpoint / WEIGHTS, shallow=False)


def store_checkpoint(
    job: Job,
    model: Any,
    checkpoint: Path,
    metrics: dict[str, float],
    prompts: list[list[Message]],
    golden: list[Golden],
    home: Home,
) -> Adapter:
    """Load, prove and publish one."""
    from loraport.train.loop.lora import load_weights
    from loraport.train.proof.golden import golden_replies

    step = step_of(checkpoint)
    load_weights(model, checkpoint)
    with PartialVersion(home, step_name(job.config.name, step)) as folder:
        replies = golden_replies(model, job.data.encoder, prompts, golden)
        save_weights(model, folder)
        manifest = describe(job, model, folder, metrics, replies)
        return publish(home, folder, manifest.model_copy(update={"name": folder.parent.name, "step": step}))


def metrics_at(history: Sequence[dict[str, Any]], step: int) -> dict[str, float]:
    """What was logged of a step and its evaluation."""
    logged: dict[str, Any] = {}
    for entry in history:
        logged |= entry if entry.get("step") == step else {}
    return {"steps": step} | {name: logged[key] for key, name in FIGURES.items() if key in logged}
