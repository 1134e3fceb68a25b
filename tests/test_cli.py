"""The command line as a whole: help, laziness, one form of errors, exit codes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import loraport_cli
from loraport.clients import errors, terminal
from loraport.clients.home import Home
from tests.fake_openai import FakeOpenAI
from tests.test_train_run import write_rows

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
    """A group has no words of its own: it is given the line, and must not lose it."""
    app = typer.main.get_command(loraport_cli.build_app(command))
    own = app.commands[command].help  # type: ignore[attr-defined]
    assert own.splitlines()[0] == loraport_cli.COMMANDS[command][1]


def help_of(*words: str) -> str:
    """The help of a command, printed by a process that must not import torch or vLLM for it."""
    code = (
        "import sys, loraport_cli\n"
        "try: loraport_cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'vllm' not in sys.modules"
    )
    line = [sys.executable, "-c", code, *words, "--help"]
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", loraport_cli.COMMANDS)
def test_every_command_has_help_without_torch(command: str) -> None:
    words = help_of(command)
    assert loraport_cli.COMMANDS[command][1] in words
    assert max(map(len, words.splitlines())) <= 80


def test_the_help_of_a_group_and_of_its_commands() -> None:
    words = help_of("adapters")
    listed = dict(re.findall(r"^  (\w+) {2,}(.*)$", words.split("Commands:")[1], re.M))
    assert set(listed) == {"list", "show", "load", "unload", "rollback", "verify", "remove"}
    for name, line in listed.items():
        assert line.endswith(".") and "..." not in line, "a help line is cut off at 80 columns"
        assert line in help_of("adapters", name)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nonsense"], 2, "error: no such command 'nonsense'.\nhint: `loraport --help`"),
        (["trian"], 2, "error: no such command 'trian'.\nhint: did you mean train? `"),
        (["train", "--nonsense"], 2, "error: no such option: --nonsense.\nhint: did you mean "),
        (["train", "--rank", "x"], 2, "error: invalid value for '--rank': "),
        (["train", "--load", "fp8"], 2, "error: invalid value for '--load': 'fp8' is not one of 'auto', "),
        (["adapters", "show"], 2, "error: missing argument 'reference'.\nhint: `loraport adapters show --help`"),
        (["env", "--base-url"], 2, "error: option '--base-url' requires an argument.\nhint: `loraport env --help`"),
        (["train"], 2, "error: model and data must be given."),
        (["train", "--model", "/none", "--data", "/none.jsonl"], 2, "error: there is no data file /none.jsonl."),
        (["train", "--config", "/none.yaml"], 2, "error: there is no configuration file /none.yaml."),
        (["adapters", "show", "nobody"], 3, "error: there is no adapter nobody"),
        (["serve", "nobody", "--port", "18733"], 3, "error: there is no adapter nobody"),
        (["env"], 3, "error: no endpoint of Loraport runs on this machine."),
    ],
)
def test_errors_are_a_sentence_a_hint_and_an_exit_code(arguments: list[str], code: int, message: str) -> None:
    done = loraport(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert "\nhint: " in done.stderr and "Usage:" not in done.stderr


def test_a_group_without_a_command_is_help() -> None:
    done = loraport("adapters")
    assert done.returncode == 2 and "error" not in done.stderr
    assert "Commands:" in done.stdout + done.stderr


def test_a_bug_of_ours_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["loraport", "train"])
    monkeypatch.setattr(loraport_cli, "build_app", lambda _: lambda **_: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        loraport_cli.main()
    assert caught.value.code == 1
    assert "this is a bug of ours: ZeroDivisionError" in capsys.readouterr().err


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe whose reader has gone, as `head` goes when it has its lines."""
    ours, theirs = os.pipe()
    os.close(ours)
    yield theirs
    os.close(theirs)


def write_row(folder: Path) -> Path:
    """A file with one row."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
    (folder / "row.jsonl").write_text(json.dumps({"messages": messages}))
    return folder / "row.jsonl"


@pytest.mark.parametrize("words", ["--help", "--version", "train --help", "env", "eval", "eval --json", "chat"])
def test_a_pipe_that_nobody_reads_ends_it_quietly(tmp_path: Path, unread: int, words: str) -> None:
    with FakeOpenAI({"demo": lambda messages: "hi"}) as endpoint:
        line = [sys.executable, "-m", "loraport_cli", *words.split()]
        line += [] if "-" in words.split()[-1] and words != "eval --json" else ["--base-url", endpoint.base_url]
        line += ["--data", str(write_row(tmp_path))] if words.startswith("eval") else []
        done = subprocess.run(line, input="hi\n", stdout=unread, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 128 + signal.SIGPIPE, done.stderr
    assert not re.search("error|bug|Traceback|Exception|Errno", done.stderr), done.stderr


def test_errors_that_nobody_reads(unread: int) -> None:
    line = [sys.executable, "-m", "loraport_cli", "env"]
    assert subprocess.run(line, stdout=unread, stderr=unread).returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["--help", "env --base-url {url}", "env --json --base-url {url}"])
def test_streams_that_are_closed(closed: str, words: str) -> None:
    with FakeOpenAI({"demo": lambda messages: "hi"}) as endpoint:
        line = f"{shlex.quote(sys.executable)} -m loraport_cli {words.format(url=endpoint.base_url)} {closed}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert not re.search("error|bug|Traceback|Errno", done.stderr), done.stderr


def start_training(tmp_path: Path, base: Path, home: Home, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`loraport train`, of an hour or so, in the middle of its steps."""
    line = [*prefix, sys.executable, "-m", "loraport_cli", "train", "--model", str(base), "--name", "colours"]
    line += ["--data", str(write_rows(tmp_path / "rows.jsonl")), "--epochs", "100000"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for words in process.stderr:
        said += words
        if words.startswith("epoch "):
            assert list((home.adapters / "colours").glob(".partial-*"))
            return process
    raise AssertionError(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up(tmp_path: Path, tiny_base: Path, home: Home, number: signal.Signals) -> None:
    process = start_training(tmp_path, tiny_base, home)
    process.send_signal(number)
    process.send_signal(number)  # as `timeout` does: the second must not interrupt the clean-up
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert list(home.adapters.rglob("*")) == []
    assert "Traceback" not in err and "error" not in err


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loraport_cli.signals_as_exits():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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


def test_lines_to_copy_name_the_program_as_it_can_be_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/loraport", "train"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert terminal.program() == ".venv/bin/loraport"
    (tmp_path / "loraport").touch(mode=0o755)
    assert terminal.program() == "loraport"
