"""Trackers: the real libraries on this machine, and a real MLflow server from its own environment."""

import os
import signal
import subprocess
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from loraport.clients.errors import ConfigError, EndpointError, Shortfall
from loraport.clients.home import Home
from loraport.train.loop import tracking
from loraport.train.loop.tracking import Tracking, check_trackers, flatten, without_password, without_passwords
from tests.conftest import ROOT, free_port

MLFLOW = "mlflow==3.17.2"
PARAMETERS = {
    "rank": 16,
    "learning_rate": 2e-4,
    "target_modules": ["q_proj", "v_proj"],
    "base": {"model": "m"},
    "x": None,
}
NAMES = ("MLFLOW_", "WANDB_", "TENSORBOARD_")


class Line(torch.nn.Module):
    """The smallest model that a Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.line(x)[:, 0] - labels).square().mean()}


def train_three_steps(report_to: Any, folder: Path) -> Trainer:
    """A run of transformers' Trainer that logs each step."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        report_to=report_to,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"x": torch.tensor([1.0, n]), "labels": torch.tensor(1.0)} for n in range(24)]
    trainer = Trainer(model=Line(), args=arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


@pytest.fixture(autouse=True)
def no_trackers_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the person who runs the tests, and whatever a library leaves."""
    for name in [name for name in os.environ if name.startswith(NAMES)]:
        monkeypatch.delenv(name)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Stands for the folder of a stored adapter."""
    folder = tmp_path / "v1"
    folder.mkdir()
    (folder / "report.html").write_text("<h1>demo</h1>")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_nothing_is_tracked_unless_asked_for(home: Home, tmp_path: Path) -> None:
    with Tracking((), home, "demo", PARAMETERS) as tracked:
        trainer = train_three_steps(tracked.report_to, tmp_path)
    kinds = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert not [kind for kind in kinds if "Mlflow" in kind or "MLflow" in kind or "Wandb" in kind or "Tensor" in kind]
    assert not home.root.exists()


def test_tensorboard_holds_steps_and_the_result(home: Home, tmp_path: Path, adapter: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Tracking(("tensorboard",), home, "demo", PARAMETERS) as tracked:
        train_three_steps(tracked.report_to, tmp_path)
        tracked.finish(adapter, {"success": 0.9})
    (folder,) = (home.root / "tracking" / "tensorboard").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("final/success")[0].value == pytest.approx(0.9)
    assert b"q_proj, v_proj" in events.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0]


def test_mlflow_without_a_server_keeps_all_under_home(home: Home, tmp_path: Path, adapter: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    with Tracking(("mlflow",), home, "demo", PARAMETERS) as tracked:
        train_three_steps(tracked.report_to, tmp_path)
        tracked.finish(adapter, {"success": 0.9})
    client = mlflow.MlflowClient(f"sqlite:///{home.root}/tracking/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("loraport").experiment_id])
    wanted = {"rank": "16", "learning_rate": "0.0002", "target_modules": "q_proj, v_proj", "base.model": "m"}
    assert run.data.params == wanted and run.info.status == "FINISHED" and run.info.run_name == "demo"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    assert run.data.metrics["final/success"] == 0.9
    stored = home.root / "tracking" / "mlflow" / "artifacts" / run.info.run_id / "artifacts"
    assert (stored / "report.html").is_file() and (stored / "adapter" / "adapter_model.safetensors").is_file()


def test_wandb_without_a_key_stays_offline(home: Home, tmp_path: Path, adapter: Path, monkeypatch: Any) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    with Tracking(("wandb",), home, "demo", PARAMETERS) as tracked:
        train_three_steps(tracked.report_to, tmp_path)
        tracked.finish(adapter, {"success": 0.9})
    (run,) = (home.root / "tracking" / "wandb" / "wandb").glob("offline-run-*")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing outside of home
    (record,) = run.glob("*.wandb")
    raw = record.read_bytes()
    assert b"learning_rate" in raw and b"adapter_model.safetensors" in raw


def test_steps_of_other_processes_are_sent_at_the_end(home: Home) -> None:
    mlflow = pytest.importorskip("mlflow")
    with Tracking(("mlflow", "tensorboard"), home, "demo", {}) as tracked:
        assert tracked.report_elsewhere == ["tensorboard"]
        tracked.replay([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "epoch": 0.5}])
    client = mlflow.MlflowClient(f"sqlite:///{home.root}/tracking/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("loraport").experiment_id])
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in losses] == [(1, 2.0), (2, 1.5)]


@pytest.mark.parametrize(("error", "status"), [(ValueError("bug"), "FAILED"), (Shortfall("short"), "FINISHED")])
def test_how_a_run_ended_is_recorded(home: Home, error: Exception, status: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    with pytest.raises(type(error)), Tracking(("mlflow",), home, "demo", {}):
        raise error
    client = mlflow.MlflowClient(f"sqlite:///{home.root}/tracking/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("loraport").experiment_id])
    assert run.info.status == status
    assert not [name for name in os.environ if name.startswith(NAMES)]


def test_only_the_first_of_several_processes_tracks(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Tracking(("tensorboard",), home, "demo", PARAMETERS) as tracked:
        assert tracked.report_to == "none"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--track mlflow needs mlflow and sqlalchemy and alembic") as caught:
        check_trackers(["mlflow"])
    assert "loraport[tracking]" in caught.value.hint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    with pytest.raises(ConfigError, match="--track mlflow needs mlflow, which"):
        check_trackers(["mlflow"])


def test_a_server_that_is_not_there_is_told_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    with pytest.raises(EndpointError, match="does not answer") as caught, Tracking(("mlflow",), home, "demo", {}):
        pass
    assert "secret" not in caught.value.message


def test_a_tracker_that_breaks_costs_a_warning(
    home: Home, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tracking.Tensorboard, "finish", full)
    with Tracking(("tensorboard",), home, "demo", {}) as tracked:
        tracked.finish(adapter, {"success": 1.0})
    assert "warning: tensorboard did not take everything: disk full" in capsys.readouterr().err


def test_parameters_are_flat_and_addresses_without_password() -> None:
    assert flatten({"a": {"b": 1, "c": None}, "d": (1, 2)}) == {"a.b": 1, "d": "1, 2"}
    assert without_password("http://me:pw@host:5000/x") == "http://host:5000/x"
    assert without_passwords("API request to https://me:p@h:5/api failed") == "API request to https://h:5/api failed"


@pytest.fixture(scope="session")
def mlflow_program() -> Path:
    """MLflow with its server in .venv-mlflow, which is made when it is not there and kept for the next time.

    Its pins of pyarrow and others are not ours: in our environment is its client alone.
    """
    folder = ROOT / ".venv-mlflow"
    stamp, program = folder / "installed", folder / "bin" / "mlflow"
    if not stamp.is_file() or stamp.read_text() != MLFLOW:
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", MLFLOW]
        done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0 and not os.environ.get("CI"):
            pytest.skip(f"{MLFLOW} cannot be installed here: {done.stdout[-500:]}")
        assert done.returncode == 0, done.stdout
        stamp.write_text(MLFLOW)
    return program


@pytest.fixture
def mlflow_server(mlflow_program: Path, tmp_path: Path) -> Iterator[str]:
    """A real server on a free port, with its database and its artifacts in a folder of the test."""
    port = free_port()
    stores = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/stored"]
    line = [str(mlflow_program), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *stores]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(line, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, tmp_path / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it and its worker: the group that was started here
        process.wait()


def wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when the server answers; fail with its log when it ends before."""
    give_up = time.monotonic() + 120
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)


@pytest.mark.mlflow
def test_a_real_mlflow_server_holds_parameters_steps_report_and_adapter(
    mlflow_server: str, home: Home, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ships")
    with Tracking(("mlflow",), home, "demo", PARAMETERS) as tracked:
        train_three_steps(tracked.report_to, tmp_path)
        tracked.finish(adapter, {"success": 0.9, "eval_loss": 0.4})

    def ask(what: str, **query: Any) -> Any:
        return httpx.get(f"{mlflow_server}/api/2.0/mlflow/{what}", params=query, timeout=30).raise_for_status().json()

    experiment = ask("experiments/get-by-name", experiment_name="ships")["experiment"]["experiment_id"]
    found = httpx.post(f"{mlflow_server}/api/2.0/mlflow/runs/search", json={"experiment_ids": [experiment]}, timeout=30)
    (run,) = found.json()["runs"]
    assert run["info"]["status"] == "FINISHED"
    assert {each["key"]: each["value"] for each in run["data"]["params"]}["target_modules"] == "q_proj, v_proj"
    metrics = {each["key"]: each["value"] for each in run["data"]["metrics"]}
    assert metrics["final/success"] == 0.9 and {"loss", "grad_norm", "learning_rate"} <= set(metrics)
    history = ask("metrics/get-history", run_id=run["info"]["run_id"], metric_key="loss")["metrics"]
    assert [point["step"] for point in history] == [1, 2, 3]
    top = ask("artifacts/list", run_id=run["info"]["run_id"])["files"]
    assert {each["path"] for each in top} == {"report.html", "adapter"}
    below = ask("artifacts/list", run_id=run["info"]["run_id"], path="adapter")["files"]
    assert "adapter/adapter_model.safetensors" in {each["path"] for each in below}
    assert not home.root.exists()
