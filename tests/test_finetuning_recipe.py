"""A job as a run configuration: what of a request reaches the trainer, and under which name it comes back."""

from pathlib import Path
from typing import Any

import pytest

from loraport.serve.finetuning.wishes import KNOBS
from loraport.serve.jobs.recipe import environment, name_of_setting, run_config
from loraport.serve.store.tables import Job
from loraport.train.config import RunConfig
from loraport.train.defaults import Facts, resolve

TRAINING = Path("/jobs/ftjob-1/training.jsonl")


def job(hyperparameters: dict[str, Any] | None = None, kind: str = "supervised", **more: Any) -> Job:
    """A job that was said so."""
    method = {"type": kind, kind: {"hyperparameters": hyperparameters or {}}}
    return Job(id="ftjob-1", seed=7, method=method, options=more.pop("options", {}), **more)


def test_what_is_left_open_is_left_to_the_trainer() -> None:
    auto = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    assert run_config(job(auto), "base", TRAINING) == {
        "model": "base",
        "data": str(TRAINING),
        "name": "ftjob-1",
        "seed": 7,
        "checkpoint_adapters": 3,
    }


def test_what_is_said_is_a_run_configuration() -> None:
    said = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 0.5}
    options = {"rank": 8, "require": ["success>=0.9"], "priority": 2, "may_share": True, "checkpoint_adapters": 1}
    held_out = TRAINING.with_name("validation.jsonl")
    config = RunConfig.model_validate(run_config(job(said, options=options), Path("/b"), TRAINING, held_out))
    assert (config.epochs, config.batch_size, config.learning_rate_multiplier) == (3, 4, 0.5)
    assert (config.rank, config.require, config.eval_data, config.checkpoint_adapters) == (
        8,
        ("success>=0.9",),
        held_out,
        1,
    )


def test_the_multiplier_is_one_of_the_rate_that_is_derived() -> None:
    facts = Facts(rows=100, hidden_size=2000)
    rates = []
    for said in ({}, {"learning_rate_multiplier": 3.0}):
        resolved, _ = resolve(RunConfig.model_validate(run_config(job(said), "base", TRAINING)), facts)
        rates.append(resolved.learning_rate)
    assert rates == [5e-4, 1.5e-3]


def test_preferences_have_their_method() -> None:
    config = run_config(job({"beta": 0.2, "n_epochs": "auto"}, "dpo"), "base", TRAINING)
    assert (config["method"], config["beta"]) == ("dpo", 0.2) and "epochs" not in config


def test_integrations_are_trackers_without_a_key() -> None:
    wandb = {"type": "wandb", "wandb": {"project": "p", "tags": ["a", "b"]}}
    tracked = job(integrations=[wandb])
    assert run_config(tracked, "base", TRAINING)["track"] == ["wandb"]
    assert environment(tracked) == {"WANDB_PROJECT": "p", "WANDB_NAME": "ftjob-1", "WANDB_TAGS": "a,b"}
    assert environment(job()) == {}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("epochs", "hyperparameters.n_epochs"),
        ("beta", "hyperparameters.beta"),
        ("rank", "loraport.rank"),
        ("data", "training_file"),
        ("eval_data", "validation_file"),
    ],
)
def test_a_setting_comes_back_by_the_name_that_was_said(key: str, said: str) -> None:
    assert name_of_setting(key) == said


def test_knobs_are_keys_of_the_run_configuration_and_none_is_a_place() -> None:
    assert set(KNOBS) <= set(RunConfig.model_fields)
    assert not set(KNOBS) & {"model", "revision", "data", "eval_data", "name", "track", "keep_checkpoints"}
