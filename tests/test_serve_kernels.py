"""Which LoRA kernels a start uses, and what `--tune` refuses."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.errors import EngineError, UsageError
from loraport.clients.hardware import Device
from loraport.clients.home import Home, write_json
from loraport.serve import kernels
from loraport.serve.engine.process import Launch, environment
from loraport.serve.gateway.state import EngineState
from loraport.serve.plan.settings import Plan
from loraport.serve.plan.shape import GIB
from loraport.serve.tuning.tune import REPORT, Subject
from loraport.train.base_model import Base, resolve
from tests.conftest import free_port

H200 = Device("cuda", "NVIDIA H200", 140 * GIB, 139 * GIB, 16)
CPU = Device("cpu", "CPU", 24 * GIB, 20 * GIB, 2)
PLAN = Plan(1024, 256, slots=8, rank=16, dtype="bfloat16", kv_bytes=None, share=0.9)
OWNER = (1, 0.0)


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return resolve(str(tiny_base))


def launch_of(base: Base, device: Device = H200, **more: Any) -> Launch:
    made = Launch(("vllm",), (0, 25), base, ("base",), (), PLAN, device, 8000, Path("engine.sock"))
    return replace(made, **more)


def fake_search(gain: float) -> Callable[..., None]:
    def search(launch: Launch, subject: Subject, home: Home, state: EngineState) -> None:
        folder = home.ensure(subject.folder(home))
        write_json(folder / REPORT, {"calls": [{"tokens": 64, "own_us": 1.0, "us": 1.0 - gain}]})

    return search


def test_without_tuned_kernels_the_way_to_them_is_said(
    base: Base, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = launch_of(base)
    assert kernels.find(launch, is_wanted=False, home=home, state=EngineState()) == launch
    assert "loraport serve --tune" in capsys.readouterr().err
    assert kernels.FOLDER not in environment(launch, home, OWNER)


def test_tuned_kernels_serve_later_starts(
    base: Base, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "search", fake_search(0.25))
    first = kernels.find(launch_of(base), is_wanted=True, home=home, state=EngineState())
    assert "25% less time at 64 tokens than vLLM's own" in capsys.readouterr().err
    monkeypatch.delattr(kernels, "search")
    second = kernels.find(launch_of(base), is_wanted=True, home=home, state=EngineState())
    assert first.kernels == second.kernels and first.kernels and first.kernels.is_dir()
    assert environment(second, home, OWNER)[kernels.FOLDER] == str(first.kernels)
    newer = kernels.find(launch_of(base, version=(0, 32)), is_wanted=False, home=home, state=EngineState())
    assert newer.kernels is None


def test_a_search_that_fails_ends_no_start(
    base: Base, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise EngineError("the search ended.", "is the GPU free?", ("CUDA out of memory",))

    monkeypatch.setattr(kernels, "search", fail)
    launch = launch_of(base)
    assert kernels.find(launch, is_wanted=True, home=home, state=EngineState()) == launch
    said = capsys.readouterr().err
    assert "CUDA out of memory" in said and "vLLM's own are used" in said


def test_kernels_of_the_users_are_left_alone(base: Base, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.FOLDER, "/elsewhere")
    launch = launch_of(base)
    assert kernels.find(launch, is_wanted=False, home=home, state=EngineState()) == launch
    with pytest.raises(UsageError, match=kernels.FOLDER):
        kernels.require_search(PLAN, base, H200, (0, 25), is_ours=True)


@pytest.mark.parametrize(
    ("device", "plan", "is_ours", "words"),
    [
        (CPU, PLAN, True, "there is none here"),
        (H200, replace(PLAN, slots=0), True, "none are used"),
        (H200, PLAN, False, "--engine-command"),
    ],
)
def test_what_tune_refuses(base: Base, device: Device, plan: Plan, is_ours: bool, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        kernels.require_search(plan, base, device, (0, 25), is_ours)


def test_tune_on_a_cpu_is_refused_before_anything_starts(tiny_base: Path, home: Home) -> None:
    command = [
        sys.executable,
        "-m",
        "loraport_cli",
        "serve",
        "--model",
        str(tiny_base),
        "--tune",
        "--port",
        str(free_port()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--tune makes LoRA kernels faster on GPUs" in done.stderr
