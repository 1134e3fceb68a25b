"""An engine that is kept: started again when it crashes or hangs, left down when that does not help."""

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loraport.clients.errors import EngineError, ResourceError, VerificationError
from loraport.clients.home import Home
from loraport.serve.engine.connect import LONGEST, connect, socket_path
from loraport.serve.engine.leftovers import EngineTrace, read_traces, session_of
from loraport.serve.engine.process import LOGS_KEPT, Launch, open_log
from loraport.serve.engine.starts import expected_seconds, read_starts
from loraport.serve.gateway.state import EngineState, Model, Phase
from loraport.serve.plan.settings import Wanted
from loraport.serve.serve import Request, prepare
from loraport.serve.supervise import Keeper, Patience, Running, kind_of
from tests.conftest import free_port
from tests.serving import FAKE, all_gone, wait_until

QUICK = Patience(silent_s=0.5, look_s=0.02, probe_s=0.05, pause_s=0.01)


@pytest.fixture
def launch(home: Home, tiny_base: Path) -> Launch:
    """The fake engine with a base alone."""
    request = Request([], str(tiny_base), "127.0.0.1", free_port(), Wanted(), FAKE, [], json=False, drain_s=0)
    return prepare(request, home)


class Kept:
    """A keeper whose `watch` runs in a thread of its own."""

    def __init__(self, launch: Launch, home: Home, patience: Patience = QUICK) -> None:
        self.state, self.brought_up = EngineState(), 0
        self.phases: list[tuple[Phase, str]] = []
        self.error: EngineError | None = None
        self.keeper = Keeper(launch, home, self.state, self.bring_up, patience)
        begin = self.state.begin

        def noted(phase: Phase, reason: str = "", expected_s: float | None = None, replica: int | None = None) -> None:
            self.phases.append((phase, reason))
            begin(phase, reason, expected_s, replica)

        self.state.begin = noted  # type: ignore[method-assign]

    def bring_up(self, running: Running) -> None:
        self.brought_up += 1
        models = [Model("base", max_model_len=running.launch.plan.context)]
        self.state.ready(models, uds=str(running.launch.socket))

    def watch(self) -> None:
        try:
            self.keeper.watch()
        except EngineError as error:
            self.error = error

    def ask(self, path: str = "/v1/completions") -> httpx.Response | None:
        """A request straight to the engine; None where it breaks the connection off."""
        try:
            with connect(self.keeper.launch.socket) as client:
                return client.post(path, json={"model": "base", "prompt": "a b", "max_tokens": 2})
        except httpx.HTTPError:
            return None

    def crash(self, times: int = 1) -> None:
        """End the engine as a crash does, and wait until the next one is ready or none will be."""
        for _ in range(times):
            before = self.brought_up
            self.ask("/die")
            wait_until(lambda before=before: self.brought_up > before or self.error is not None, "a restart")  # type: ignore[misc]


@contextmanager
def kept(launch: Launch, home: Home, patience: Patience = QUICK) -> Iterator[Kept]:
    """An engine that is watched; ended afterwards, whatever has become of it, with all its processes."""
    made = Kept(launch, home, patience)
    made.keeper.start()
    seen: list[psutil.Process] = []
    thread = threading.Thread(target=made.watch, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        seen = [process for trace in read_traces(home) for process in session_of(trace)]
        made.keeper.crashes = [time.monotonic()] * 9  # the next end is the last
        made.ask("/die")
        wait_until(lambda: not thread.is_alive(), "the end of the watch")
        made.keeper.end()
        assert all_gone(seen)


def test_a_crash_is_mended_and_told(launch: Launch, home: Home) -> None:
    with kept(launch, home) as running:
        assert running.state.snapshot.phase is Phase.READY
        assert running.state.snapshot.ready[0].uds == str(launch.socket)
        running.crash()
        wait_until(lambda: running.state.snapshot.phase is Phase.READY, "ready again")
        answer = running.ask()
        assert answer is not None and answer.status_code == 200
        told = [reason for phase, reason in running.phases if phase is Phase.RESTARTING]
        assert told[0] == "the engine stopped with status 9 while serving"
        assert any(one.startswith(f"{told[0]} (") for one in told[1:])  # and the phases of the start, as they are seen
    starts = read_starts(home)
    assert [start["is_restart"] for start in starts] == [True, False]
    assert {start["outcome"] for start in starts} == {"ready"}
    assert "weights" in starts[0]["phases"] and "--uds" in starts[0]["command"]
    assert "LoRA slots" not in starts[0]["phases"]  # it serves its base alone
    assert expected_seconds(home, kind_of(launch)) == pytest.approx(
        sum(start["seconds"] for start in starts) / 2, abs=0.01
    )


def test_after_three_crashes_it_stays_down_and_says_why(launch: Launch, home: Home) -> None:
    with kept(launch, home) as running:
        running.crash(3)
        wait_until(lambda: running.error is not None, "the end")
        assert running.brought_up == 3
        snapshot = running.state.snapshot
        assert snapshot.phase is Phase.DOWN
        assert "status 9 while serving; it ended 3 times without 10 minutes of service" in snapshot.reason
        assert running.error is not None and "the fake was told to die" in "\n".join(running.error.details)
        assert not launch.socket.exists()


def test_an_engine_whose_weights_got_mixed_up_is_replaced(launch: Launch, home: Home) -> None:
    with kept(launch, home) as running:
        running.keeper.spoil("base and adapters do not keep apart.")
        wait_until(lambda: running.brought_up == 2 and running.state.snapshot.phase is Phase.READY, "another engine")
        assert (Phase.RESTARTING, "the engine is replaced: base and adapters do not keep apart") in running.phases


def test_crashes_long_ago_do_not_count(launch: Launch, home: Home) -> None:
    with kept(launch, home, Patience(silent_s=9, look_s=0.02, pause_s=0.01, window_s=0.0)) as running:
        running.crash(4)
        assert running.error is None and running.brought_up == 5
        running.keeper.patience = QUICK


def test_an_engine_that_hangs_is_started_again(
    launch: Launch, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ice = tmp_path / "ice"
    monkeypatch.setenv("FAKE_FREEZE", str(ice))
    with kept(launch, home) as running:
        ice.touch()
        wait_until(lambda: running.state.snapshot.phase is Phase.RESTARTING, "a restart")
        ice.unlink()
        wait_until(lambda: running.state.snapshot.phase is Phase.READY, "ready again")
    told = [reason for phase, reason in running.phases if phase is Phase.RESTARTING]
    assert told[0] == "the engine hangs: it gave no token for 0.5 s"


def test_an_engine_that_is_busy_does_not_hang(
    launch: Launch, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ice = tmp_path / "ice"
    monkeypatch.setenv("FAKE_FREEZE", str(ice))
    monkeypatch.setenv("FAKE_BUSY", "1")
    with kept(launch, home, Patience(silent_s=0.2, look_s=0.02, probe_s=0.02, pause_s=0.01)) as running:
        ice.touch()
        time.sleep(1.5)
        assert running.state.snapshot.phase is Phase.READY and running.brought_up == 1
        ice.unlink()


def test_a_connection_that_is_refused_once_is_no_silence(launch: Launch, home: Home) -> None:
    with kept(launch, home, Patience(silent_s=5, look_s=0.02, probe_s=0.02, pause_s=0.01)) as running:
        hidden = launch.socket.with_suffix(".hidden")
        launch.socket.rename(hidden)
        time.sleep(1)
        hidden.rename(launch.socket)
        time.sleep(1)
        assert running.state.snapshot.phase is Phase.READY and running.brought_up == 1


def test_an_engine_that_cannot_be_written_down_is_not_left_behind(
    launch: Launch, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards: list[psutil.Process] = []

    def full(trace: EngineTrace, _: Home) -> None:
        guards.append(psutil.Process(trace.guard[0]))
        raise ResourceError("no disk space left.")

    monkeypatch.setattr(EngineTrace, "write", full)
    with pytest.raises(ResourceError):
        Keeper(launch, home, EngineState(), lambda _: None, QUICK).start()
    assert guards and all_gone(guards)


def test_a_restart_that_fails_counts_as_a_crash(launch: Launch, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(launch, home) as running:
        monkeypatch.setenv("FAKE_CRASH", "weights")
        monkeypatch.setenv("FAKE_LAST_WORDS", "torch.OutOfMemoryError: CUDA out of memory")
        running.crash()
        wait_until(lambda: running.error is not None, "the end")
        assert "ran out of memory" in running.state.snapshot.reason and running.brought_up == 1


def test_adapters_that_no_longer_answer_as_trained_keep_it_from_ready(launch: Launch, home: Home) -> None:
    with kept(launch, home) as running:

        def refuse(_: Running) -> None:
            running.brought_up += 1
            raise VerificationError("the adapter demo is loaded but not applied.", "look")

        running.keeper.bring_up = refuse
        running.ask("/die")
        wait_until(lambda: running.error is not None, "the end")
        assert "loaded but not applied" in running.state.snapshot.reason


def test_a_start_with_the_context_that_vllm_names(
    launch: Launch, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "To serve at least one request with the model's max seq len (1024), (0.1 GiB KV cache is needed, which is "
    words += "larger than the available KV cache memory (0.05 GiB). the estimated maximum model length is 700."
    monkeypatch.setenv("FAKE_TOO_LONG", "700")
    monkeypatch.setenv("FAKE_LAST_WORDS", words)
    with kept(launch, home) as running:
        assert running.keeper.launch.plan.context == 640
    assert [start["outcome"] == "ready" for start in read_starts(home)] == [True, False]


def test_a_start_with_slots_for_all_where_vllm_cannot_limit_them(
    launch: Launch, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "ValueError: LoRA target module model.layers.0.mlp.gate_proj (Odd) matched the deployment configuration but "
    )
    words += "could not be wrapped by any LoRA layer implementation."
    monkeypatch.setenv("FAKE_TARGETS_FAIL", "1")
    monkeypatch.setenv("FAKE_LAST_WORDS", words)
    limited = replace(launch, plan=replace(launch.plan, slots=1, rank=8, targets=("q_proj",)))
    with kept(limited, home) as running:
        assert running.keeper.launch.plan.targets == ()
    assert [start["outcome"] == "ready" for start in read_starts(home)] == [True, False]


def test_a_home_with_a_long_path_has_its_socket_elsewhere(tmp_path: Path) -> None:
    short, far = Home(Path("/home/me/.loraport")), Home(tmp_path / ("x" * LONGEST))
    found = socket_path(far, 8000)
    assert len(os.fsencode(found)) <= LONGEST and found.parent.stat().st_mode & 0o777 == 0o700
    assert socket_path(far, 8000) == found != socket_path(far, 8001)
    assert found.parent != short.run


class Refusing(socket.socket):
    """A socket that only a file system of this machine's own holds."""

    refused = ""

    def bind(self, address: Any) -> None:
        if str(address).startswith(self.refused):
            raise PermissionError(1, "Operation not permitted")
        super().bind(address)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_home_that_holds_no_sockets_has_its_socket_elsewhere(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(short / "home")
    assert socket_path(home, 8000) == home.run / "8000.sock"
    monkeypatch.setattr(socket, "socket", Refusing)
    monkeypatch.setattr(Refusing, "refused", str(home.run))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(short))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "home"))
    found = socket_path(home, 8000)
    assert found.parent.parent == short and found.parent.stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as shared:  # a file system without modes, on which all may enter
        shared.setattr(Refusing, "refused", "/nowhere")
        home.run.chmod(0o755)
        assert socket_path(home, 8000).parent == home.run
        home.run.chmod(0o755)
        shared.setattr(Path, "chmod", lambda *_: None)
        assert socket_path(home, 8000) == found
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/nowhere")
    found = socket_path(home, 8000)
    assert found.parent.parent == short / "home" and list(found.parent.iterdir()) == []
    found.parent.chmod(0o755)
    with pytest.raises(ResourceError, match="is open to them"):
        socket_path(home, 8000)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ResourceError, match=r"neither .* nor /nowhere can hold a Unix socket") as caught:
        socket_path(home, 8000)
    assert "TMPDIR" in caught.value.hint


def test_a_folder_for_sockets_that_somebody_else_has_made_is_passed_over(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, ours = Home(short / ("x" * LONGEST)), short / "run"
    ours.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(short))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(ours))
    taken = socket_path(home, 8000).parent
    taken.chmod(0o777)
    assert taken.parent == short and socket_path(home, 8000).parent.parent == ours


def test_two_starts_may_remove_old_logs_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.ensure(home.logs)
    for number in range(LOGS_KEPT + 2):
        (home.logs / f"serve-{number:02}.log").touch()
    stat = Path.stat

    def vanished(path: Path, **more: Any) -> os.stat_result:
        if path.name == "serve-03.log":
            path.unlink(missing_ok=True)  # by the other one, between its listing and ours
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", vanished)
    path, log = open_log(home, "8000")
    log.close()
    monkeypatch.undo()
    assert path.stat().st_mode & 0o777 == 0o600 and len(list(home.logs.glob("serve-*.log"))) <= LOGS_KEPT


def test_secrets_among_the_engines_flags_are_not_kept(launch: Launch, home: Home) -> None:
    secret = ("--hf-token", "hf_geheim")
    with kept(replace(launch, more=secret), home) as running:
        assert "hf_geheim" in running.keeper.launch.more
    [start] = read_starts(home)
    assert start["command"][-2:] == ["--hf-token", "…"]
    [path] = (home.root / "starts").iterdir()
    assert "geheim" not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
