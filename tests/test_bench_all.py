"""`loraport bench all`: parts within a budget, an interrupted run, `--resume`, and the real commands once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loraport.bench.serving import everything
from loraport.bench.serving.everything import (
    Going,
    Outcome,
    Seen,
    Settings,
    begin,
    engine_socket,
    go_on,
    run_all,
    run_command,
)
from loraport.bench.serving.report_cli import bench_all, parse_budget
from loraport.clients.endpoint import EndpointRecord, process_identity
from loraport.clients.errors import EndpointError, EngineError, Shortfall, UsageError
from loraport.clients.home import Home
from tests.conftest import free_port
from tests.misbehaving import Misbehaving

URL = "http://127.0.0.1:1/v1"
ALL = ["throughput", "lora-tax", "gateway", "adapters", "kv"]
WITH_ADAPTERS = Seen("base", ["a0", "a1"], "unix:/engine.sock")


class Commands:
    """Stands in for the commands: writes what each would write, on a clock of its own. `ran`: (part, seconds)."""

    def __init__(self, takes: float = 1.0, fails: Sequence[str] = (), cuts: Sequence[str] = ()) -> None:
        self.takes, self.fails, self.cuts = takes, fails, cuts
        self.ran: list[tuple[str, float]] = []
        self.now = 0.0
        self.interrupt_at: str | None = None

    def __call__(self, command: Sequence[str], seconds: float) -> Outcome:
        name = command[len(everything.LORAPORT)]
        self.ran.append((name, seconds))
        self.now += min(self.takes, seconds)
        document = {"bench": f"made-{name}", "complete": name not in self.cuts, "value_ms": 1}
        if name not in self.fails:
            Path(command[command.index("--out") + 1]).write_text(json.dumps(document))
        if name == self.interrupt_at:
            raise KeyboardInterrupt
        return Outcome(0, self.takes)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Fake commands, their clock, and a server with two adapters and a known socket."""
    made = Commands()
    monkeypatch.setattr(everything, "look", lambda settings: WITH_ADAPTERS)
    monkeypatch.setattr(everything, "monotonic", lambda: made.now)
    return made


def names(going: Going, status: str) -> list[str]:
    """Parts that ended so."""
    return [part.name for part in going.parts.values() if part.status == status]


def test_every_part_runs_and_is_in_the_report(commands: Commands, tmp_path: Path) -> None:
    going = run_all(Settings(URL), tmp_path, 600, commands)
    assert [name for name, _ in commands.ran] == ALL == names(going, "done")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [part["name"] for part in report["parts"]] == ["startup", *ALL]
    assert all((tmp_path / f"{name}.json").exists() for name in ALL)
    assert (tmp_path / "report.html").exists() and (tmp_path / "report.csv").exists()


def test_the_budget_is_divided_and_what_is_left_over_goes_on(commands: Commands, tmp_path: Path) -> None:
    run_all(Settings(URL), tmp_path, 600, commands)
    shares = [seconds for _, seconds in commands.ran]
    assert shares[0] == 600 * 4 / 15, "there is no start to measure"
    assert shares[-1] == 600 - 4 * commands.takes, "the last has all that is left"


def test_no_part_begins_when_the_time_is_over(commands: Commands, tmp_path: Path) -> None:
    commands.takes = 1e9
    going = run_all(Settings(URL), tmp_path, 50, commands)
    assert [name for name, _ in commands.ran] == ["throughput", "lora-tax"] and commands.now <= 50
    assert {going.parts[name].reason for name in ALL[2:]} == {"the time was over"}


def test_a_part_that_was_cut_is_kept_and_one_that_fails_is_told(commands: Commands, tmp_path: Path) -> None:
    commands.fails, commands.cuts = ["kv"], ["throughput"]
    going = run_all(Settings(URL), tmp_path, 600, commands)
    assert (names(going, "cut"), names(going, "failed")) == (["throughput"], ["kv"])
    problem = everything.verdict(going)
    assert isinstance(problem, Shortfall) and "kv brought no figures" in problem.message


def test_an_interrupted_run_keeps_what_ran_and_resume_does_the_rest(commands: Commands, tmp_path: Path) -> None:
    settings = Settings(URL, concurrency=(2, 4), output_tokens="16")
    commands.interrupt_at, commands.cuts = "gateway", ["gateway"]
    with pytest.raises(KeyboardInterrupt):
        run_all(settings, tmp_path, 600, commands)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert [(part["name"], part["status"]) for part in kept["parts"]] == [
        ("startup", "skipped"),
        ("throughput", "done"),
        ("lora-tax", "done"),
        ("gateway", "cut"),
    ]
    again = Commands()
    going = go_on(tmp_path, {"base_url": None, "output_tokens": "16"})
    assert going.settings == settings
    run_all(going.settings, tmp_path, 600, again, going)
    assert [name for name, _ in again.ran] == ["gateway", "adapters", "kv"] and names(going, "done") == ALL


def test_a_resumed_part_that_fails_does_not_lose_what_there_was(commands: Commands, tmp_path: Path) -> None:
    commands.cuts = ["kv"]
    run_all(Settings(URL), tmp_path, 600, commands)
    again = Commands(fails=["kv"])
    going = run_all(Settings(URL), tmp_path, 600, again, go_on(tmp_path, {}))
    assert [name for name, _ in again.ran] == ["kv"] and names(going, "cut") == ["kv"]
    assert json.loads((tmp_path / "kv.json").read_text())["value_ms"] == 1


def test_what_there_is_nothing_to_measure_of_is_left_out_with_the_reason(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everything, "look", lambda settings: Seen("base", []))
    going = run_all(Settings(URL), tmp_path, 600, commands)
    assert names(going, "done") == ["throughput", "kv"] and everything.verdict(going) is None
    reasons = {part.name: part.reason for part in going.parts.values() if part.status == "skipped"}
    assert reasons["lora-tax"] == "the server has no adapter" and "--direct-url" in reasons["gateway"]


def test_only_the_parts_that_are_named(commands: Commands, tmp_path: Path) -> None:
    run_all(Settings(URL, only=("kv",)), tmp_path, 600, commands)
    assert [name for name, _ in commands.ran] == ["kv"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h", 3600), ("45", 45), ("1.5m", 90)])
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "soon", "-5m", "0s", "nan", "10d"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no time"):
        parse_budget(text)


def test_folders_and_settings_that_do_not_fit(commands: Commands, tmp_path: Path) -> None:
    run_all(Settings(URL), tmp_path, 600, commands)
    with pytest.raises(UsageError, match="is not empty"):
        begin(Settings(URL), tmp_path)
    with pytest.raises(UsageError, match="begun with --output 128"):
        go_on(tmp_path, {"output_tokens": "64"})
    with pytest.raises(UsageError, match="no run to go on with"):
        go_on(tmp_path / "new", {})
    (tmp_path / "report.json").write_text('{"bench": "report", "parts": []}')
    with pytest.raises(UsageError, match="is not of `bench all`"):
        go_on(tmp_path, {})


def test_nothing_answers_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(EndpointError):
        bench_all(tmp_path / "new", base_url=URL)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="there is no part 'speed'"):
        bench_all(tmp_path / "new", base_url=URL, only=["speed"])


def test_a_command_gets_ctrl_c_when_its_time_is_over(tmp_path: Path) -> None:
    out = tmp_path / "said"
    code = (
        "import pathlib, sys, time\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    pathlib.Path(sys.argv[1]).write_text('reported')\n"
    )
    found = run_command([sys.executable, "-c", code, str(out)], 2.0)
    assert found.was_cut and out.read_text() == "reported"


def test_a_command_that_ignores_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "GRACE_S", 0.2)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    found = run_command([sys.executable, "-c", code], 1.0)
    assert found.was_cut and found.status == -signal.SIGKILL


def test_the_way_past_the_gateway_is_that_of_the_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPORT_HOME", str(tmp_path))
    home = Home.default()
    record = EndpointRecord("http://127.0.0.1:8000/v1", 8000, ["base"], [], 100, process_identity(os.getpid()), None)
    record.write(home)
    assert engine_socket(record.base_url) is None
    (home.run / "8000.sock").touch()
    assert engine_socket(record.base_url) == f"unix:{home.run / '8000.sock'}"
    assert engine_socket("http://127.0.0.1:9000/v1") is None
    (home.run / "8000-1.sock").touch()
    assert engine_socket(record.base_url) is None, "of several engines none is what the gateway is"


def test_a_command_that_serves_is_started_for_the_rest(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[bool] = []

    def serve(settings: Settings, folder: Path, going: Going, body: Callable[[], None]) -> None:
        served.append([name for name, _ in commands.ran] == ["startup"])
        body()

    monkeypatch.setattr(everything, "serve_meanwhile", serve)
    going = run_all(Settings(URL, command=("vllm", "serve")), tmp_path, 600, commands)
    assert served == [True] and names(going, "done") == ["startup", *ALL]
    assert commands.ran[0] == ("startup", 600 * 10 / 25)


def test_a_server_that_never_comes_up_is_told_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; sys.exit('no such model')"
    going = begin(
        Settings(f"http://127.0.0.1:{free_port()}/v1", command=(sys.executable, "-c", code)), tmp_path / "out"
    )
    with pytest.raises(EngineError, match="ended with status 1") as caught:
        everything.serve_meanwhile(going.settings, going.folder, going, lambda: None)
    assert any("no such model" in line for line in caught.value.details)


def test_a_port_that_is_taken_is_no_place_to_start(tmp_path: Path) -> None:
    with Misbehaving(["good"]) as server, pytest.raises(UsageError, match="something answers at"):
        bench_all(tmp_path / "new", ["vllm", "serve"], base_url=server.base_url)
    assert not (tmp_path / "new").exists()


def test_the_real_command_on_a_server_and_ctrl_c(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the first part: its report is there, and --resume says which part is next."""
    with Misbehaving(["good"]) as server:
        out = tmp_path / "out"
        command = [sys.executable, "-m", "loraport_cli", "bench", "all", "--base-url", server.base_url]
        command += ["--out", str(out), "--only", "throughput", "--input", "8", "--output", "4", "--concurrency", "2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "2 at once" in line:
                    break
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "throughput (not complete)" in said
    document: dict[str, Any] = json.loads((out / "throughput.json").read_text())
    assert not document["complete"] and document["stages"][0]["figures"]["answered"] > 0
    assert "not complete" in (out / "report.html").read_text()
