"""`loraport chat`: as a conversation, from lines on standard input, and typed into a real terminal."""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from loraport.clients.chat import Conversation, Ending, Settings, Terminal
from loraport.clients.errors import EndpointError, UsageError
from loraport.clients.models import connect
from tests.fake_openai import FakeOpenAI, Knobs

CHAT = [sys.executable, "-m", "loraport_cli", "chat"]


def echo(messages: list[dict[str, str]]) -> str:
    """Say what was said, and how many messages there are."""
    return f"{len(messages)}:{messages[-1]['content']}"


def talk(endpoint: FakeOpenAI, **settings: int) -> Conversation:
    """A conversation with `demo`."""
    return Conversation(connect(endpoint.base_url), "demo", Settings(**settings), endpoint.knobs.context)


def test_turns_add_up_and_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI({"demo": echo}) as endpoint:
        chat, pieces = talk(endpoint), []
        chat.system = "be kind"
        assert chat.ask("one", pieces.append) == Ending("stop", 5)
        assert chat.ask("two", pieces.append).finish_reason == "stop"
    assert "".join(pieces) == "2:one4:two"
    assert [message["content"] for message in chat.messages] == ["one", "2:one", "two", "4:two"]
    assert endpoint.requests[1]["messages"][0] == {"role": "system", "content": "be kind"}


def test_settings_that_are_not_given_are_left_to_the_server() -> None:
    with FakeOpenAI({"demo": echo}) as endpoint:
        talk(endpoint).ask("one", str)
        talk(endpoint, max_tokens=3, temperature=0, thinking=False).ask("one", str)
    assert not {"max_tokens", "temperature", "chat_template_kwargs"} & set(endpoint.requests[0])
    assert endpoint.requests[1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert (endpoint.requests[1]["max_tokens"], endpoint.requests[1]["temperature"]) == (3, 0)


def test_an_endpoint_from_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENAI_BASE_URL wins over an endpoint that serves here: not without a word."""
    with FakeOpenAI({"demo": echo}) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.base_url)
        done = subprocess.run(CHAT, input=b"hi\n", capture_output=True, timeout=60)
    assert (done.stdout, done.stderr.decode()) == (b"1:hi\n", f"demo at {endpoint.base_url}\n")


def test_too_long_a_conversation_is_said_in_words_and_stays_usable() -> None:
    with FakeOpenAI({"demo": echo}, Knobs(context=30)) as endpoint:
        chat = talk(endpoint)
        chat.ask("one", str)
        with pytest.raises(EndpointError, match="longer than the model's context of 30 tokens"):
            chat.ask("x" * 40, str)
        assert chat.ask("two", str).finish_reason == "stop"
        assert len(chat.messages) == 4


@pytest.mark.parametrize(
    ("limit", "says"), [(3, "cut at --max-tokens 3"), (None, "the model's context of 12 tokens is full")]
)
def test_why_a_reply_was_cut(capsys: pytest.CaptureFixture[str], limit: int | None, says: str) -> None:
    with FakeOpenAI({"demo": lambda messages: "x" * 100}, Knobs(context=12)) as endpoint:
        chat = Conversation(connect(endpoint.base_url), "demo", Settings(limit), 12)
        Terminal(chat, interactive=False).handle("hi")
    captured = capsys.readouterr()
    assert captured.out == "x" * (limit or 10) + "\n"
    assert says in captured.err


def test_a_stream_that_breaks_leaves_the_conversation_as_it_was() -> None:
    with FakeOpenAI({"demo": echo}, Knobs(break_stream_after=3)) as endpoint:
        chat = talk(endpoint)
        with pytest.raises(EndpointError, match="broke the connection off"):
            chat.ask("one", str)
    assert chat.messages == []


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI({"base": echo, "demo": echo}) as endpoint:
        terminal = Terminal(talk(endpoint), interactive=False)
        for line in ("/model base", "/system be kind", "hi", "//path", "/reset", "/model", "/system", "bye"):
            terminal.handle(line)
        with pytest.raises(UsageError, match="no command /nope"):
            terminal.handle("/nope")
        with pytest.raises(UsageError, match="no model 'other'"):
            terminal.handle("/model other")
    captured = capsys.readouterr()
    assert captured.out == "2:hi\n4:/path\n1:bye\n"
    assert "* base\n  demo\n" in captured.err
    assert {request["model"] for request in endpoint.requests} == {"base"}


def run_lines(endpoint: FakeOpenAI, lines: bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
    """`loraport chat` with `lines` on standard input."""
    command = [*CHAT, "--base-url", endpoint.base_url, *flags]
    return subprocess.run(command, input=lines, capture_output=True, timeout=60)


def test_lines_on_standard_input() -> None:
    with FakeOpenAI({"base": echo, "demo": echo}) as endpoint:
        done = run_lines(endpoint, b"h\xffi\n\nyou\n/exit\nnot sent\n")
    assert done.stdout.decode() == "1:h�i\n3:you\n"
    assert (done.stderr.decode(), done.returncode) == (f"demo at {endpoint.base_url}\n", 0)
    assert endpoint.requests[0]["model"] == "demo"  # the first adapter, not the base


def test_an_error_ends_a_script() -> None:
    with FakeOpenAI({"demo": echo}, Knobs(context=30)) as endpoint:
        done = run_lines(endpoint, b"x" * 40 + b"\nnext\n")
    assert done.returncode == 3
    assert b"longer than the model's context" in done.stderr
    assert b"Traceback" not in done.stderr


class Typist:
    """A person at a terminal: types, and waits until something can be read."""

    def __init__(self, command: list[str]) -> None:
        ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=make_controlling,
        )  # fmt: skip
        os.close(theirs)
        self.terminal, self.seen = ours, ""

    def type(self, text: str) -> None:
        """Send key strokes."""
        os.write(self.terminal, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until `pattern` comes; return what came before it and forget it."""
        while not (found := re.search(pattern, self.seen)):
            assert self.read(60), f"waited for {pattern!r}, saw {self.seen!r}"
        before, self.seen = self.seen[: found.start()], self.seen[found.end() :]
        return before

    def read(self, seconds: float) -> bool:
        """Take in what there is to see; False when nothing came in so many seconds."""
        ready, _, _ = select.select([self.terminal], [], [], seconds)
        if ready:
            self.seen += os.read(self.terminal, 4096).decode(errors="replace")
        return bool(ready)

    def interrupt_prompt(self) -> None:
        """Ctrl-C at a prompt, until a new one comes: Python misses it between writing a prompt and waiting for keys."""
        for _ in range(60):
            self.type("\x03")
            while self.read(1):
                pass
            if "> " in self.seen:
                break
        self.wait_for("> ")


def make_controlling() -> None:
    """In the child: make the terminal on standard input the one whose Ctrl-C it gets."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_stops_the_reply_and_ctrl_d_the_program() -> None:
    replies = {"demo": lambda messages: "x" * 100_000 if messages[-1]["content"] == "long" else echo(messages)}
    with FakeOpenAI(replies, Knobs(token_seconds=0.002, context=10**6)) as endpoint:
        person = Typist([*CHAT, "--base-url", endpoint.base_url])
        person.wait_for("> ")
        person.type("long\n")
        person.wait_for("xxxx")
        person.type("\x03")
        person.wait_for(r"stopped by you")
        person.wait_for("> ")
        assert endpoint.cut.wait(60)  # the server saw the stream close
        person.type("short\n")
        person.wait_for("3:short")  # the turn that was stopped is remembered
        person.wait_for("> ")
        person.interrupt_prompt()
        person.type("\x04")
        assert person.process.wait(60) == 0


def test_a_person_sees_an_error_and_goes_on() -> None:
    with FakeOpenAI({"demo": lambda messages: "\x1b[2Jhi"}, Knobs(statuses=(500, 200))) as endpoint:
        person = Typist([*CHAT, "--base-url", endpoint.base_url])
        person.wait_for("> ")
        person.type("one\n")
        person.wait_for("error: .* answered 500: as ordered")
        person.wait_for("> ")
        person.type("two\n")
        person.wait_for(re.escape("\\x1b[2Jhi"))
        person.type("/exit\n")
        assert person.process.wait(60) == 0


def test_bad_usage(tmp_path: Path) -> None:
    with FakeOpenAI({"demo": echo}) as endpoint:
        done = run_lines(endpoint, b"hi\n", "--model", "other")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"it has: demo" in done.stderr
