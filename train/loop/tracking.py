"""MLflow, W&B and TensorBoard, where they are asked for: parameters, each step, and at the end report and adapter.

Steps are sent by transformers' own integrations (`report_to`); what is ours is that a run is opened before them, under
parameters that people know, and stays open until the adapter is stored. Nothing leaves this machine unless the
tracker's own variables (MLFLOW_TRACKING_URI, WANDB_API_KEY) say so. A tracker that fails once training has begun costs
a warning, never the adapter.

    >>> check_trackers(config.track)                                    # before anything else
    >>> with Tracking(config.track, home, "demo", parameters) as tracking:
    ...     arguments = TrainingArguments(report_to=tracking.report_to, ...)
    ...     tracking.finish(folder, metrics)
"""

import contextlib
import logging
import netrc
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from loraport.clients.errors import ConfigError, EndpointError, Shortfall, http_errors
from loraport.clients.home import Home
from loraport.clients.terminal import say

# Modules that a tracker needs here; the extra `tracking` of pyproject.toml brings all of them.
MODULES = {"mlflow": ("mlflow",), "wandb": ("wandb",), "tensorboard": ("tensorboard",)}
LOCAL_MODULES = ("sqlalchemy", "alembic")  # of MLflow without a server
REPORT = "report.html"
LONGEST_PARAMETER = 500  # characters that MLflow takes


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError for a tracker whose package is missing."""
    for name in names:
        local = LOCAL_MODULES if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI") else ()
        missing = [module for module in (*MODULES[name], *local) if find_spec(module) is None]
        if missing:
            raise ConfigError(
                f"--track {name} needs {' and '.join(missing)}, which is not installed.",
                'pip install "loraport[tracking]", or in a clone: .venv/bin/pip install -e ".[tracking]"',
            )


def is_main_process() -> bool:
    """Whether this is the only process of the run, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


class Tracker(Protocol):
    """One run in one tracker."""

    def start(self, name: str, parameters: Mapping[str, Any]) -> str:
        """Open the run; where it can be seen."""

    def replay(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Send the steps of a run that other processes made."""

    def finish(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Hand over the final figures, and the adapter's folder with the report in it."""

    def end(self, failed: bool) -> None:
        """Close the run."""


class Mlflow:
    """A run in MLflow: on the server of MLFLOW_TRACKING_URI, else in a database under home."""

    def __init__(self, home: Home) -> None:
        self.folder = home.root / "tracking" / "mlflow"
        self.home = home

    def start(self, name: str, parameters: Mapping[str, Any]) -> str:
        """Open the run; EndpointError when its server does not answer."""
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # Transformers would add 150 parameters of its own; run urls go to standard output, which is for --json.
        defaults("MLFLOW_MAX_LOG_PARAMS=0", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT=true")
        defaults("MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES=3")
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if uri.startswith("http"):
            check_answers(uri)
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "loraport"
        if not uri:
            self.home.ensure(self.folder)
            uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        try:
            mlflow.set_tracking_uri(uri)
            if uri.startswith("sqlite") and mlflow.get_experiment_by_name(experiment) is None:
                mlflow.create_experiment(experiment, artifact_location=(self.folder / "artifacts").as_uri())
            mlflow.set_experiment(experiment)
            run = mlflow.start_run(run_name=name)
            os.environ.pop("MLFLOW_RUN_ID", None)  # the integration would start that run once more
            mlflow.log_params({key: str(value)[:LONGEST_PARAMETER] for key, value in parameters.items()})
        except mlflow.MlflowException as error:
            problem = without_passwords(str(error).strip().splitlines()[0].rstrip("."))
            raise EndpointError(f"MLflow refuses the run: {problem}.", "check MLFLOW_TRACKING_URI") from error
        seen = f"mlflow server --backend-store-uri {uri}" if uri.startswith("sqlite") else without_password(uri)
        return f"{seen}, experiment {experiment}, run {run.info.run_name}"

    def replay(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Under the names that the integration gives them."""
        import mlflow

        for entry in history:
            mlflow.log_metrics({key: value for key, value in entry.items() if key != "step"}, step=entry["step"])

    def finish(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Figures, the report, and the adapter under `adapter/`."""
        import mlflow

        mlflow.log_metrics({f"final/{key}": value for key, value in metrics.items()})
        if (folder / REPORT).is_file():
            mlflow.log_artifact(str(folder / REPORT))
        mlflow.log_artifacts(str(folder), "adapter")

    def end(self, failed: bool) -> None:
        """Wait for what is on its way, and set the run's state."""
        import mlflow

        if mlflow.active_run():
            try:
                mlflow.flush_async_logging()
            finally:
                mlflow.end_run("FAILED" if failed else "FINISHED")


class Wandb:
    """A run in W&B: offline, into a folder under home, unless there is a key or WANDB_MODE."""

    def __init__(self, home: Home) -> None:
        self.folder = home.root / "tracking" / "wandb"
        self.home = home
        self.run: Any = None
        self.parameters: dict[str, Any] = {}

    def start(self, name: str, parameters: Mapping[str, Any]) -> str:
        """Open the run."""
        defaults("WANDB_SILENT=true", f"WANDB_MODE={'online' if has_wandb_key() else 'offline'}")
        self.parameters = dict(parameters)
        folder = Path(os.environ.get("WANDB_DIR") or self.home.ensure(self.folder))
        defaults(f"WANDB_DATA_DIR={folder / 'data'}", f"WANDB_CACHE_DIR={folder / 'cache'}")
        defaults(f"WANDB_CONFIG_DIR={folder / 'config'}")
        import wandb

        project = os.environ.get("WANDB_PROJECT") or "loraport"
        settings = wandb.Settings(console="off", silent=True)
        try:
            self.run = wandb.init(
                project=project, name=name, dir=str(folder), config=self.parameters, settings=settings
            )
        except wandb.Error as error:
            raise EndpointError(
                f"W&B refuses the run: {str(error).splitlines()[0]}.", "WANDB_MODE=offline keeps it on this machine"
            ) from error
        return self.run.url or f"{Path(self.run.dir).parent}  (send it: wandb sync <folder>)"

    def replay(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Under the names that the integration gives them."""
        from transformers.integrations.integration_utils import rewrite_logs

        for entry in history:
            figures = {key: value for key, value in entry.items() if key != "step"}
            self.run.log(rewrite_logs(figures) | {"train/global_step": entry["step"]})

    def finish(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Figures as the run's summary, report and adapter as an artifact."""
        import wandb

        self.run.config.update(self.parameters, allow_val_change=True)  # the integration wrote its own over some
        self.run.summary.update({f"final/{key}": value for key, value in metrics.items()})
        artifact = wandb.Artifact(f"adapter-{self.run.id}", type="model")
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact)

    def end(self, failed: bool) -> None:
        """Close the run, and wait for the process that writes it."""
        import wandb

        if self.run:
            self.run.finish(exit_code=int(failed))
            wandb.teardown()


class Tensorboard:
    """Event files under home, or in TENSORBOARD_LOGGING_DIR."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or home.root / "tracking" / "tensorboard")

    def start(self, name: str, parameters: Mapping[str, Any]) -> str:
        """Choose the run's folder and write its parameters."""
        self.home.ensure(self.folder)
        self.folder = self.folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder)
        with self.writer() as writer:
            table = "".join(f"| {key} | {value} |\n" for key, value in parameters.items())
            writer.add_text("parameters", f"| setting | value |\n|---|---|\n{table}")
        return f"tensorboard --logdir {self.folder.parent}"

    def replay(self, history: Sequence[Mapping[str, Any]]) -> None:
        """They are there: see `Tracking.report_elsewhere`."""

    def finish(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Figures, and where the adapter is: event files hold no others."""
        with self.writer() as writer:
            for key, value in metrics.items():
                writer.add_scalar(f"final/{key}", value)

    def end(self, failed: bool) -> None:
        """Nothing is open."""

    def writer(self) -> Any:
        """A writer into the run's folder."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=str(self.folder))


KINDS: dict[str, Callable[[Home], Tracker]] = {"mlflow": Mlflow, "wandb": Wandb, "tensorboard": Tensorboard}


class Tracking:
    """The runs of one training in all trackers that were asked for; of several processes only the first has any.

    Raises EndpointError on entering when one cannot be opened. Variables that the integrations read are set while it
    is open, and restored.
    """

    def __init__(self, names: Sequence[str], home: Home, name: str, parameters: Mapping[str, Any]) -> None:
        self.names = list(dict.fromkeys(names)) if is_main_process() else []
        self.trackers: dict[str, Tracker] = {each: KINDS[each](home) for each in self.names}
        self.name, self.parameters = name, flatten(parameters)
        self.environment: dict[str, str] = {}

    @property
    def report_to(self) -> list[str] | str:
        """For TrainingArguments; "none" switches every integration off, installed or not."""
        return self.names or "none"

    @property
    def report_elsewhere(self) -> list[str] | str:
        """The same where the training is in other processes: they can write into a folder, but not into an open run."""
        return [name for name in self.names if name == "tensorboard"] or "none"

    def replay(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Send the steps of such a training to the others, when it is done."""
        for name, tracker in self.trackers.items():
            with forgiven(name):
                tracker.replay(history)

    def __enter__(self) -> Self:
        self.environment = dict(os.environ)
        started: list[Tracker] = []
        try:
            for each, tracker in self.trackers.items():
                say(f"tracked by {each}: {tracker.start(self.name, self.parameters)}", "dim")
                started.append(tracker)
        except BaseException:
            for tracker in started:
                with forgiven("closing"):
                    tracker.end(failed=True)
            restore(self.environment)
            raise
        return self

    def finish(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Hand the stored adapter's folder and the final figures to all; a failure is a warning."""
        for name, tracker in self.trackers.items():
            with forgiven(name):
                tracker.finish(folder, metrics)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        failed = error is not None and not isinstance(error, Shortfall)  # it ran: the figures say the rest
        for name, tracker in self.trackers.items():
            with forgiven(name):
                tracker.end(failed)
        restore(self.environment)


def flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters by dotted names, lists as words, those without a value left out."""
    flat: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat


@contextlib.contextmanager
def forgiven(name: str) -> Iterator[None]:
    """A tracker's failure as a warning: what was trained is worth more than its record."""
    try:
        yield
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"warning: {name} did not take everything: {without_passwords(said)}", "yellow")


def check_answers(uri: str) -> None:
    """EndpointError when nobody answers at a server's address; MLflow itself would try for minutes."""
    import httpx

    try:
        httpx.get(uri, timeout=10, follow_redirects=True)
    except (*http_errors("TransportError"), *http_errors("InvalidURL")) as error:
        raise EndpointError(
            f"the MLflow server at {without_password(uri)} does not answer: {without_passwords(str(error))}.",
            "check MLFLOW_TRACKING_URI",
        ) from error


def without_password(uri: str) -> str:
    """An address without the user and password that may stand in it."""
    scheme, mark, rest = uri.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}" if mark and not scheme.startswith("sqlite") else uri


def without_passwords(text: str) -> str:
    """A library's words without users and passwords of the addresses in them."""
    return re.sub(r"://[^/\s@]*@", "://", text)


def has_wandb_key() -> bool:
    """Whether W&B would find a key: in its variable, or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False


def defaults(*settings: str) -> None:
    """Variables as NAME=value, where they are not set."""
    for setting in settings:
        name, _, value = setting.partition("=")
        os.environ.setdefault(name, value)


def restore(environment: Mapping[str, str]) -> None:
    """Make the trackers' variables what they were."""
    for name in set(os.environ) | set(environment):
        if name.startswith(("MLFLOW_", "WANDB_", "TENSORBOARD_")):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
