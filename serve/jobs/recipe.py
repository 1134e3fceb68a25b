"""A job as the run configuration of `loraport train`: what the client said in OpenAI's words, and our own knobs.

Pure: the same job gives the same configuration, which is checked when the job is made and written when it starts. What
a job leaves open (`auto`) stays open here; the trainer derives it from rows and base, and says why.

    >>> run_config(job, Path("reader-9m"), Path("jobs/ftjob-3f/training.jsonl"))["epochs"]
    3
"""

from pathlib import Path
from typing import Any

from loraport.clients.home import Home
from loraport.serve.store.tables import Job

CHECKPOINTS = 3  # of each job, as adapters that can be asked; OpenAI keeps as many
LEAST_ROWS = 10  # of a training file
TRAINING, VALIDATION = "training.jsonl", "validation.jsonl"  # in the job's folder: its own links to the files
CONFIG = "config.yaml"  # there too: the run configuration
# OpenAI's names of hyperparameters, and ours.
NAMES = {
    "n_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
    "beta": "beta",
}
SAID = {  # and of what a request says elsewhere
    "model": "model",
    "data": "training_file",
    "eval_data": "validation_file",
    "seed": "seed",
    "method": "method.type",
    "track": "integrations",
}
QUEUE_KNOBS = frozenset({"priority", "may_share"})  # options that say nothing of training


def job_folder(home: Home, job_id: str) -> Path:
    """Where all that belongs to one job lies; mode 0700, made with the job."""
    return home.root / "jobs" / job_id


def run_config(job: Job, base: Path | str, training: Path, validation: Path | None = None) -> dict[str, Any]:
    """The run configuration of a job, as JSON types: the YAML of `loraport train --config`.

    `training` and `validation`: the rows, in the job's folder (TRAINING, VALIDATION). Not validated:
    RunConfig.model_validate does that, and names the key at fault.
    """
    values: dict[str, Any] = {
        "model": str(base),
        "data": str(training),
        "name": job.id,
        "seed": job.seed,
        "checkpoint_adapters": CHECKPOINTS,
    }
    if validation is not None:
        values["eval_data"] = str(validation)
    kind = job.method.get("type", "supervised")
    if kind != "supervised":
        values["method"] = kind
    said = hyperparameters(job.method)
    values |= {NAMES[name]: value for name, value in said.items() if value not in (None, "auto")}
    if any(each.get("type") == "wandb" for each in job.integrations or ()):
        values["track"] = ["wandb"]
    return values | {key: value for key, value in job.options.items() if key not in QUEUE_KNOBS}


def hyperparameters(method: dict[str, Any]) -> dict[str, Any]:
    """Those of a method, as they were said."""
    return dict((method.get(method.get("type", "supervised")) or {}).get("hyperparameters") or {})


def environment(job: Job) -> dict[str, str]:
    """Variables for the trainer of a job: where its integrations write to. Keys are the server's, never a request's."""
    found = next((each["wandb"] for each in job.integrations or () if each.get("type") == "wandb"), None)
    if found is None:
        return {}
    named = {
        "WANDB_PROJECT": found.get("project"),
        "WANDB_ENTITY": found.get("entity"),
        "WANDB_NAME": found.get("name") or job.id,
        "WANDB_TAGS": ",".join(found.get("tags") or ()),
    }
    return {name: value for name, value in named.items() if value}


def name_of_setting(key: str) -> str:
    """How a client said a key of the run configuration: `hyperparameters.n_epochs`, `loraport.rank`."""
    said = {ours: theirs for theirs, ours in NAMES.items()}
    if key in said:
        return f"hyperparameters.{said[key]}"
    return SAID.get(key, f"loraport.{key}")
