"""A data set from a hub: downloaded once, its splits by file name, taken from the cache, and refused in words."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub

READ = """
import sys
from loraport.clients.errors import LoraportError
from loraport.clients.rows import find_source, read_rows
from loraport.clients.terminal import exit_with

try:
    source = find_source(sys.argv[1])
    print([row.messages[0]["content"] for row in read_rows(source)], source.note)
except LoraportError as error:
    exit_with(error, False)
"""


def row(word: str) -> bytes:
    """A chat row about a word."""
    messages = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
    return json.dumps({"messages": messages}).encode() + b"\n"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub with one data set, card and code aside."""
    with FakeHub() as server:
        files = {
            "README.md": b"# A card",
            "load.py": b"raise SystemExit",
            "data/train-00000-of-00002.jsonl": row("one"),
            "data/train-00001-of-00002.jsonl": row("two"),
            "data/test.jsonl": row("test"),
        }
        server.add("datasets/org/questions", files)
        server.add("datasets/org/pictures", {"README.md": b"", "a.png": b""})
        server.add("datasets/org/secret", files, gated=True)
        yield server


def read(hub: FakeHub, cache: Path, name: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The first messages of a data set's rows, in a process that knows this hub alone."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache)} | more
    command = [sys.executable, "-c", READ, name]
    return subprocess.run(command, env=environment, cwd=cache.parent, capture_output=True, text=True, timeout=120)


def test_a_data_set_gives_its_training_split_and_is_kept(hub: FakeHub, tmp_path: Path) -> None:
    done = read(hub, tmp_path / "hf", "org/questions")
    assert done.stdout == "['one', 'two'] org/questions: split train, 1 other files left out\n", done.stderr
    assert hub.count("GET", "/datasets/org/questions/resolve/main/README.md") == 0
    assert not [path for _, path, _ in hub.requests if path.endswith("load.py")]
    before = len(hub.requests)
    offline = read(hub, tmp_path / "hf", "org/questions:test", HF_HUB_OFFLINE="1")
    assert offline.stdout.startswith("['test']"), offline.stderr
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("org/nothing", 3, "there is no file or folder org/nothing and no such data set on"),
        ("org/secret", 3, "is gated"),
        ("org/pictures", 3, "has no files with rows"),
        ("org/questions:validation", 2, "has no files of the split 'validation'"),
        ("org/rows.jsonl", 2, "there is no data file org/rows.jsonl"),
    ],
)
def test_what_cannot_be_had_is_refused(hub: FakeHub, tmp_path: Path, name: str, code: int, says: str) -> None:
    done = read(hub, tmp_path / "hf", name)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr and "Traceback" not in done.stderr


def test_a_hub_that_is_away_is_named(hub: FakeHub, tmp_path: Path) -> None:
    done = read(hub, tmp_path / "hf", "org/questions", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 3
    assert "does not answer" in done.stderr
