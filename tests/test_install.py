"""requirements/install.py: what it refuses, what it detects, that the pins are whole and that it need not run twice."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
INSTALL = runpy.run_path(str(ROOT / "requirements/install.py"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(re.match(r"([a-z0-9._-]+)==(\S+)", line).groups() for line in lines if line[:1].isalnum())  # type: ignore[union-attr]


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_an_unsupported_python_is_refused(version: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        INSTALL["check_python"](version)
    assert caught.value.code == 3
    words = capsys.readouterr().err
    assert f"error: Python {version[0]}.{version[1]} is not supported; Loraport needs 3.11 to " in words
    assert "hint: install Python 3.11 and run: make setup PYTHON=python3.11" in words


def test_the_python_that_runs_this_is_supported() -> None:
    INSTALL["check_python"](sys.version_info)


@pytest.mark.parametrize(
    ("script", "device"),
    [("echo 'GPU 0: NVIDIA H200'", "cuda"), ("echo no devices were found; exit 6", "cpu"), (None, "cpu")],
)
def test_the_device_is_what_the_driver_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, device: str
) -> None:
    if script:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing else: this machine may have a driver in /bin
    monkeypatch.delenv("DEVICE", raising=False)
    assert INSTALL["detect_device"]() == device
    monkeypatch.setenv("DEVICE", "cuda" if device == "cpu" else "cpu")
    assert INSTALL["detect_device"]() != device


def test_an_unknown_device_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DEVICE", "tpu")
    with pytest.raises(SystemExit):
        INSTALL["detect_device"]()
    assert "DEVICE=tpu is not known" in capsys.readouterr().err


def stamped_device() -> str:
    """The device that the environment of these tests was made for, as its stamp says."""
    stamp = Path(sys.prefix) / ".loraport"
    if not stamp.is_file():
        pytest.skip("these tests run in an environment that requirements/install.py did not make")
    return stamp.read_text().split()[0]


def test_the_pins_are_what_is_installed_here() -> None:
    from importlib.metadata import version

    pinned = pins(f"{stamped_device()}.txt")
    assert {name: version(name) for name in pinned} == pinned


def test_the_build_of_torch_is_the_devices() -> None:
    assert pins("cpu.txt")["torch"].endswith("+cpu")
    assert "+cpu" not in pins("cuda.txt")["torch"]


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt"])
def test_the_pins_lie_within_the_declared_ranges(name: str) -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["train"], *extras[name.removesuffix(".txt")]]
    pinned = pins(name)
    for requirement in map(Requirement, declared):
        if requirement.name != "loraport":
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_the_second_set_up_does_nothing() -> None:
    """The environment that runs these tests was made by `make setup`: its stamp is of this very state."""
    venv = ROOT / ".venv"
    if not (venv / ".loraport").exists():
        pytest.skip("these tests run in another environment than .venv")
    before = (venv / ".loraport").stat().st_mtime_ns
    done = subprocess.run(
        [os.environ.get("PYTHON", sys._base_executable), ROOT / "requirements/install.py", ".venv"],  # type: ignore[attr-defined]
        env=os.environ | {"DEVICE": (venv / ".loraport").read_text().split()[0]},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, (venv / ".loraport").stat().st_mtime_ns) == (0, "", before)


def test_a_failing_installer_is_shown_in_its_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installer: Any = INSTALL["Installer"](str(tmp_path))
    installer.uv, installer.python = None, sys.executable
    with pytest.raises(SystemExit) as caught:
        installer.install("nothing", "--no-index", "a-package-that-is-not-there")
    words = capsys.readouterr().err
    assert caught.value.code == 3
    assert "a-package-that-is-not-there" in words and "error: could not install nothing." in words
