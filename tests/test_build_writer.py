"""Pairs that an endpoint writes: checked, resumable, and what is done with every kind of bad reply."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loraport.clients.errors import EndpointError, ResourceError
from loraport.train.build.build import Built, Settings, build
from loraport.train.build.checks import problem
from loraport.train.build.journal import Journal
from loraport.train.build.writer import Ask, Reading, Written, pairs_in, write
from tests.fake_openai import FakeOpenAI, Knobs, Replier

SOURCE = "The kettle heats 1,500 ml of water. Set `KETTLE_PORT` (default 8000) or pass --port to change the port."
GOOD = {"question": "Which port does the kettle use?", "answer": "The default port is 8000; `KETTLE_PORT` changes it."}


def writer(messages: list[dict[str, str]]) -> str:
    """A model that writes one pair from the first words of the text, and one that is made up."""
    text = messages[-1]["content"].split('">\n', 1)[-1].split("\n</text>")[0]
    sentence = next(line for line in text.split("\n") if len(line.split()) > 8)
    pairs = [
        {"question": f"What is known of {' '.join(sentence.split()[:3])}?", "answer": sentence},
        {"question": f"Which number has {sentence.split()[0]}?", "answer": "It has the number 4711."},
    ]
    return f"<think>hm [1]</think>Here you are:\n```json\n{json.dumps({'pairs': pairs})}\n```"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Ten pages, each one text to ask about."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for n, name in enumerate("black green white mint oolong rooibos chai assam sencha matcha".split()):  # noqa: SIM905
        (folder / f"{name}.md").write_text(
            f"# {name.capitalize()}\n\n"
            f"{name} leaves are put into the water by {n + 2} people, every morning at home, before they drink it.\n"
        )
    return folder


def written(docs: Path, out: Path, endpoint: FakeOpenAI, **more: object) -> Built:
    """Build with the endpoint alone."""
    ask = Ask(endpoint.base_url, "writer", **more)  # type: ignore[arg-type]
    return build([docs], out, Settings(ask=ask, ask_only=True, eval_fraction=0, force=True))


def endpoint_of(replier: Replier, **knobs: object) -> FakeOpenAI:
    """An endpoint with one model."""
    return FakeOpenAI({"writer": replier}, Knobs(context=10**6, **knobs))  # type: ignore[arg-type]


def test_pairs_are_kept_where_the_source_supports_them(docs: Path, tmp_path: Path) -> None:
    with endpoint_of(writer) as endpoint:
        built = written(docs, tmp_path / "out", endpoint)
    assert built.kinds == {"written": 10}
    assert built.dropped == {"written, but a number is not in the source": 10}
    assert "4711" in next(iter(built.examples.values()))


def test_an_answered_text_is_never_asked_again(docs: Path, tmp_path: Path) -> None:
    with endpoint_of(writer) as endpoint:
        first = written(docs, tmp_path / "out", endpoint)
        second = written(docs, tmp_path / "out", endpoint)
        assert len(endpoint.requests) == 10
    assert (second.reused, second.rows) == (10, first.rows)


def test_kill_9_loses_no_answer(docs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with endpoint_of(writer, hang_on="mint") as endpoint:
        command = [
            sys.executable,
            "-m",
            "loraport_cli",
            "data",
            "build",
            docs,
            "--out",
            out,
            "--ask-url",
            endpoint.base_url,
        ]
        process = subprocess.Popen([*command, "--ask-model", "writer", "--ask-only"], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out.exists() and (out / "asked.jsonl").read_text().count("\n") == 9):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with (out / "asked.jsonl").open("a") as journal:
        journal.write('{"key": "cut o')
    with endpoint_of(writer) as endpoint:
        built = written(docs, out, endpoint)
        assert [re.findall("mint leaves", str(body)) != [] for body in endpoint.requests] == [True]
    assert (built.reused, built.rows) == (9, 10)


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with Journal(tmp_path / "asked.jsonl"), pytest.raises(ResourceError, match="another run"):
        Journal(tmp_path / "asked.jsonl").__enter__()


@pytest.mark.parametrize(
    ("said", "error"), [("", "an empty reply"), ("I would rather not.", "a reply that is not the JSON asked for")]
)
def test_replies_without_pairs_are_asked_for_twice_and_counted(
    docs: Path, tmp_path: Path, said: str, error: str
) -> None:
    def sometimes(messages: list[dict[str, str]]) -> str:
        return said if "mint" in messages[-1]["content"] else writer(messages)

    with endpoint_of(sometimes) as endpoint:
        built = written(docs, tmp_path / "out", endpoint)
        assert len(endpoint.requests) == 11
    assert (built.rows, dict(built.unwritten)) == (9, {error: 1})


def test_an_endpoint_that_writes_nothing_at_all(docs: Path, tmp_path: Path) -> None:
    with (
        endpoint_of(lambda messages: "no") as endpoint,
        pytest.raises(EndpointError, match="wrote nothing for 10 texts"),
    ):
        written(docs, tmp_path / "out", endpoint)
    assert not (tmp_path / "out/train.jsonl").exists()


def test_rate_limits_pass(docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    with endpoint_of(writer, statuses=(429, 503, 429)) as endpoint:
        assert written(docs, tmp_path / "out", endpoint).rows == 10


def test_a_refused_key_ends_it_and_is_not_shown(docs: Path, tmp_path: Path) -> None:
    with endpoint_of(writer, key="sk-right") as endpoint, pytest.raises(EndpointError) as caught:
        written(docs, tmp_path / "out", endpoint, key="sk-wrong")
    assert "refuses the API key" in caught.value.message
    assert "sk-" not in caught.value.message + caught.value.hint + repr(Ask("u", "m", "sk-wrong"))
    assert "sk-" not in (tmp_path / "out/asked.jsonl").read_text()


def test_a_text_that_the_endpoint_refuses_may_be_asked_later(docs: Path, tmp_path: Path) -> None:
    with endpoint_of(writer, statuses=(400,)) as endpoint:
        built = written(docs, tmp_path / "out", endpoint, concurrency=1)
        assert (built.rows, sum(built.unwritten.values())) == (9, 1)
        assert written(docs, tmp_path / "out", endpoint).rows == 10


def test_the_judge_has_the_last_word(docs: Path, tmp_path: Path) -> None:
    def judge(messages: list[dict[str, str]]) -> str:
        return '{"supported": [false, true]}' if "supported" in messages[-1]["content"] else writer(messages)

    with endpoint_of(judge) as endpoint, pytest.raises(Exception, match="no row comes of 10 documents"):
        written(docs, tmp_path / "out", endpoint, judge=True)


def test_pairs_are_in_the_order_of_the_texts(tmp_path: Path) -> None:
    readings = [
        Reading(f"{name} is a kind of tea that people like very much", name, "tea")
        for name in ("mint", "chai", "assam")
    ]
    with endpoint_of(writer) as endpoint, Journal(tmp_path / "a.jsonl") as journal:
        found: list[Written] = asyncio.run(write(readings, Ask(endpoint.base_url, "writer"), journal))
    assert [pairs.pairs[0][1].split()[0] for pairs in found] == ["mint", "chai", "assam"]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ('{"pairs": [{"question": "A b c?", "answer": "d"}]}', [("A b c?", "d")]),
        ('[{"question": "A\nb c?", "answer": "d\ne"}]', [("A b c?", "d\ne")]),
        ('{"pairs": [{"question": "A b c?", "answer": "d"}, {"question": "cut o', [("A b c?", "d")]),
        ('{"pairs": []}', []),
        ('{"pairs": [{"question": 1}]}', None),
        ("nothing", None),
    ],
)
def test_reading_replies(said: str, found: list[tuple[str, str]] | None) -> None:
    assert pairs_in(said) == found


@pytest.mark.parametrize(
    ("question", "answer", "wrong"),
    [
        (GOOD["question"], GOOD["answer"], ""),
        ("How much water does it heat?", "It heats 1500 ml of water.", ""),
        ("Which port does it use?", "The default port is 8001.", "the number 8001 is not in the source"),
        ("How is the port changed?", "Set `KETTLE_HOST` or the port.", "`KETTLE_HOST` is not in the source"),
        ("How is the port changed?", "Pass --host to change the port.", "`--host` is not in the source"),
        ("Where is the kettle?", "See https://example.org/kettle for it.", "the address https://example.org/kettle"),
        ("What does the text say?", "According to the text, the port is 8000.", "it speaks of the text"),
        ("What is its colour?", "The colour is not mentioned in the documentation.", "it does not know"),
        ("What is the kettle?", "A marvellous appliance beloved by British families.", "only 0% of its words"),
        ("What is `KETTLE_LID` for?", "The kettle heats water.", "the question's `KETTLE_LID`"),
    ],
)
def test_answers_are_checked_against_their_source(question: str, answer: str, wrong: str) -> None:
    found = problem(question, answer, SOURCE)
    assert wrong in found if wrong else not found
