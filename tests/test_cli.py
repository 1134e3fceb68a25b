"""The command line as a whole: help, laziness, one form of errors, exit codes."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import loraport_cli
from loraport.clients import errors

ROOT = Path(__file__).parent.parent


def loraport(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loraport_cli", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_help_names_every_command_and_imports_no_room() -> None:
    code = (
        "import sys, loraport_cli\n"
        "try: loraport_cli.main()\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'vllm', 'openai', 'pydantic', 'loraport')])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert all(f"\n  {command} " in done.stdout for command in loraport_cli.COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "..." not in done.stdout.split("Commands:")[1], "a help line is cut off at 80 columns"


@pytest.mark.parametrize("command", loraport_cli.COMMANDS)
def test_the_line_in_the_list_is_the_commands_own(command: str) -> None:
    module, line = loraport_cli.COMMANDS[command]
    target = getattr(importlib.import_module(module), command)
    if not isinstance(target, typer.Typer):
        assert target.__doc__.splitlines()[0] == line


@pytest.mark.parametrize("command", loraport_cli.COMMANDS)
def test_every_command_has_help_without_torch(command: str) -> None:
    code = (
        "import sys, loraport_cli\n"
        "try: loraport_cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, check=True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nonsense"], 2, "No such command"),
        (["train", "--nonsense"], 2, "No such option"),
        (["train"], 2, "error: model and data must be given."),
        (["train", "--model", "/none", "--data", "/none.jsonl"], 2, "error: there is no data file /none.jsonl."),
        (["train", "--config", "/none.yaml"], 2, "error: there is no configuration file /none.yaml."),
        (["adapters", "show", "nobody"], 3, "error: there is no adapter nobody"),
        (["serve", "nobody"], 3, "error: there is no adapter nobody"),
        (["env"], 3, "error: no endpoint of Loraport runs on this machine."),
    ],
)
def test_errors_are_a_sentence_a_hint_and_an_exit_code(arguments: list[str], code: int, message: str) -> None:
    done = loraport(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    if code == 3:
        assert "\nhint: " in done.stderr


def test_a_bug_of_ours_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["loraport", "train"])
    monkeypatch.setattr(loraport_cli, "build_app", lambda _: lambda: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        loraport_cli.main()
    assert caught.value.code == 1
    assert "this is a bug of ours: ZeroDivisionError" in capsys.readouterr().err


def test_the_tree_of_errors_is_as_drawn() -> None:
    drawn = dict(re.findall(r"(\w+) +(\d)  ", (errors.__doc__ or "").split(">>>")[0]))
    defined = {
        name: str(kind.exit_code)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.LoraportError)
    }
    assert drawn == defined


@pytest.mark.parametrize("number", [28, 13, 122, 2])
def test_errors_of_the_operating_system_are_mapped(number: int) -> None:
    with pytest.raises(errors.ResourceError) as caught, errors.os_errors("writing", Path("/x")):
        raise OSError(number, "words of the system")
    assert "/x" in caught.value.message and caught.value.hint
