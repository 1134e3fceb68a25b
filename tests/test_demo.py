"""The demo: real rows whose held-out part shares nothing with the training part, and what the adapter makes of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraport.clients.rows import Row, read_rows
from tests.conftest import Served

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples/demo"
BASE = ROOT / "examples/reader-9m"


def parts(row: Row) -> tuple[str, str, str]:
    """(context, question, bare answer) of a demo row; see examples/demo/make_rows.py for the layout."""
    context, wanted = row.messages[0]["content"].split("\n\n")
    return context, wanted.splitlines()[-1], row.reference.split("\nSource: ")[0]


@pytest.fixture(scope="module")
def train_rows() -> list[Row]:
    return read_rows(DEMO / "train.jsonl")


@pytest.fixture(scope="module")
def heldout_rows() -> list[Row]:
    return read_rows(DEMO / "heldout.jsonl")


@pytest.mark.parametrize("part", [0, 1, 2], ids=["context", "question", "answer"])
def test_nothing_held_out_occurs_in_training(train_rows: list[Row], heldout_rows: list[Row], part: int) -> None:
    training = {parts(row)[part].casefold() for row in train_rows}
    held_out = {parts(row)[part].casefold() for row in heldout_rows}
    assert len(training) > 100 and held_out
    assert training & held_out == set()


def test_no_held_out_answer_occurs_anywhere_in_training(train_rows: list[Row], heldout_rows: list[Row]) -> None:
    """As whole words, in contexts and questions too."""
    training = "\n".join(message["content"] for row in train_rows for message in row.messages)
    for row in heldout_rows:
        for text in (row.reference, parts(row)[2]):
            assert not re.search(rf"(?<!\w){re.escape(text)}(?!\w)", training), text


def test_no_reply_is_held_out_and_trained(train_rows: list[Row], heldout_rows: list[Row]) -> None:
    assert {row.reference for row in train_rows} & {row.reference for row in heldout_rows} == set()


def test_the_answer_stands_in_the_context(train_rows: list[Row], heldout_rows: list[Row]) -> None:
    for row in [*train_rows, *heldout_rows]:
        context, _, answer = parts(row)
        assert answer in context, row.line


def test_the_base_is_small_and_safe() -> None:
    size = sum(path.stat().st_size for path in BASE.iterdir())
    assert size <= 20_000_000
    assert not [path for path in BASE.iterdir() if path.suffix in (".bin", ".pt", ".py")]


@pytest.mark.engine
def test_the_adapter_answers_what_it_never_saw(served: Served) -> None:
    """The figures that the README promises, through the endpoint of the real vLLM."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loraport_cli", "eval", "--base-url", served.base_url, "--json"),
            *("--data", str(DEMO / "heldout.jsonl"), "--model", "base", "--model", "demo"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    results = {result["model"]: result for result in json.loads(done.stdout)["models"]}
    assert results["demo"]["rows"] == results["base"]["rows"] == 200
    assert results["demo"]["success"]["rate"] >= 0.90
    assert results["demo"]["stopped"]["rate"] == 1.0
    assert results["base"]["success"]["rate"] <= 0.40


@pytest.mark.engine
def test_what_is_served_is_what_was_trained(served: Served) -> None:
    (adapter,) = served.ready["adapters"]
    assert adapter["state"] == "verified" and adapter["telling"] > 0
    metrics = served.trained["metrics"]
    assert metrics["stop_rate"] == 1.0 and metrics["success"] > metrics["base_success"]
