"""The Makefile as `make -n` shows it: what reaches `loraport`, word for word."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def commands(*words: str) -> list[list[str]]:
    """The `loraport` commands that `make WORDS` would run, as their words after `loraport`."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/loraport ")]


BASE = "/a b/it's"
DEMO = ["train", "--name", "demo", "--config", "examples/demo/train.yaml"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "serve"], [DEMO, ["serve", "demo", "--port", "8000"]]),
        (["serve", "NAME=x"], [["serve", "x", "--port", "8000"]]),
        (["serve", "MODEL=org/m"], [["serve", "--model", "org/m", "--port", "8000"]]),
        (["serve", "NAME=x", "MODEL=org/m"], [["serve", "x", "--model", "org/m", "--port", "8000"]]),
        (["serve", "PORT=1", "ARGS=--context 4k"], [["serve", "demo", "--port", "1", "--context", "4k"]]),
        (
            ["train", "serve", "MODEL=org/m", "DATA=r.jsonl"],
            [
                ["train", "--name", "demo", "--model", "org/m", "--data", "r.jsonl"],
                ["serve", "demo", "--port", "8000"],
            ],
        ),
        (
            ["train", "serve", "ARGS=--rank 8", "SERVE_ARGS=--context 4k"],
            [[*DEMO, "--rank", "8"], ["serve", "demo", "--port", "8000", "--context", "4k"]],
        ),
        (
            ["train", "DATA=my rows.jsonl", f"MODEL={BASE}", "NAME=n x", "CONFIG=c d.yaml", "PRESET=small"],
            [
                shlex.split(
                    f"train --name 'n x' --config 'c d.yaml' --model {BASE!r} --data 'my rows.jsonl' --preset small"
                )
            ],
        ),
    ],
)
def test_what_reaches_the_command_line(words: list[str], expected: list[list[str]]) -> None:
    assert commands(*words) == expected


def test_eval_asks_base_and_adapter() -> None:
    (line,) = commands("eval", "NAME=my own", "ARGS=--show 3")
    assert line[-6:] == ["--model", "base", "--model", "my own", "--show", "3"]


def test_every_target_that_is_named_has_a_rule() -> None:
    text = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([a-z]+):", text, re.M))
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert phony and set(phony[1].split()) == rules
    promised = re.search(r"^make (setup .*)$", (ROOT / "README.md").read_text(), re.M)
    assert promised and set(promised[1].split(" | ")) <= rules
