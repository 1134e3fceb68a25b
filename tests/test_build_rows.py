"""Documents into rows without a model: pieces, questions, the split, and the files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.errors import DataError, UsageError
from loraport.clients.rows import read_rows
from loraport.train.build.alike import clusters
from loraport.train.build.build import Built, Settings, build
from loraport.train.build.divide import divide
from loraport.train.build.documents import Block, Document, Section, Symbol
from loraport.train.build.lengths import estimate
from loraport.train.build.pieces import split
from loraport.train.build.questions import Asker, Pair, Source, pairs_of_piece
from loraport.train.build.symbols import pairs_of_symbol
from loraport.train.build.wording import Choice, Words, ask_heading, is_unasked

LONG = "Leaves are put into hot water and stay there for three minutes before anybody drinks."


def page(title: str, *sections: tuple[str, str]) -> str:
    """A page of Markdown."""
    return f"# {title}\n\n" + "".join(f"## {heading}\n\n{text}\n\n" for heading, text in sections)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A small documentation of six pages."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "README.md").write_text(
        page("Teapot", ("Installation", f"Run `pip install teapot`. {LONG}"), ("License", LONG))
    )
    for at, name in enumerate(["Black", "Green", "White", "Mint", "Oolong"]):
        words = " ".join(f"{name.lower()}{n}" for n in range(30))
        text = page(
            f"{name} tea",
            (f"Brewing {name.lower()} tea", words),
            ("Options", f"- `--heat-{at}`: Degrees of the water.\n"),
        )
        (folder / f"{name.lower()}.md").write_text(text)
    return folder


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("heading", "owner", "among"),
    [
        (
            "Installing the server",
            "Tea",
            ["How do I install the server in Tea?", "How can I install the server in Tea?"],
        ),
        ("Configure logging", "Tea", ["How do I configure logging in Tea?", "How to configure logging in Tea?"]),
        ("Installation", "Tea", ["How do I install Tea?", "How can I install Tea?"]),
        ("Options", "Kettle", ["What are the options of kettle in Tea?", "Which options does kettle in Tea have?"]),
        ("Why is it slow?", "Tea", ["About Tea: Why is it slow?"]),
        ("How caching works", "Tea", ["How does caching work?", "How does caching in Tea work?"]),
        (
            "`brew()`",
            "Tea",
            ["What does `brew()` do in Tea?", "What is `brew()` for in Tea?", "Explain `brew()` in Tea."],
        ),
        ("Use cases", "Tea", ["Tell me about use cases in Tea.", "Explain use cases in Tea."]),
    ],
)
def test_headings_become_questions(heading: str, owner: str, among: list[str]) -> None:
    questions = ask_heading(heading, owner, "Tea", Words.of("", ["Tea"]), Choice(0))
    assert questions[0] in among or set(among) <= set(questions)


@pytest.mark.parametrize("heading", ["License", "Changelog", "1.2.0 (2024-01-01)", "Table of contents", "Contributing"])
def test_what_nobody_asks(heading: str) -> None:
    assert is_unasked(heading)


def test_a_name_keeps_its_capital_and_a_word_does_not() -> None:
    words = Words.of("You can run it in Docker, and docker runs the server. In Docker a server is small.")
    assert words.lower("Server in Docker") == "server in Docker"


def piece_of(*blocks: Block, path: tuple[str, ...] = ("Tea", "Terms")) -> list[Pair]:
    """The pairs of one section."""
    document = Document("tea.md", "Tea", (Section(path, blocks),))
    (piece,) = split(document, 500, estimate)
    return pairs_of_piece(piece, Asker("Tea", Choice(0)))


def test_terms_definitions_and_tables() -> None:
    pairs = piece_of(
        Block("text", "Steep time\n: Seconds that the leaves stay in the water."),
        Block(
            "list", "- **Blend**: Several kinds of tea under one name.\n- `--hot` (flag): Boils the water once more."
        ),
        Block("table", "| Option | Default | Meaning |\n|---|---|---|\n| `heat` | 90 | Degrees of the water used. |"),
    )
    found = {pair.answer: pair.question for pair in pairs if pair.kind in ("definition", "table")}
    assert "teep time" in found["Seconds that the leaves stay in the water."]
    assert "lend" in found["Several kinds of tea under one name."]
    assert "`--hot`" in found["Boils the water once more."]
    assert "`heat`" in found["- Default: 90\n- Meaning: Degrees of the water used."]


@pytest.mark.parametrize(
    "text", ["TODO", "See [the guide](https://example.org).", "Short.", "Licensed under the MIT license, " + LONG]
)
def test_poor_sections_give_nothing(text: str) -> None:
    assert piece_of(Block("text", text)) == []


def test_an_answer_does_not_end_in_an_announcement() -> None:
    (pair,) = piece_of(Block("text", LONG), Block("text", "For example:"))
    assert pair.answer == LONG


def test_pieces_keep_blocks_whole_and_the_bound() -> None:
    code = "```sh\n" + "\n".join(f"line {n}" for n in range(40)) + "\n```"
    table = "| a | b |\n|---|---|\n" + "\n".join(f"| {n} | x |" for n in range(40))
    blocks = (
        Block("text", "First."),
        Block("text", "Like this:"),
        Block("code", "```\nx\n```"),
        Block("code", code),
        Block("table", table),
    )
    pieces = split(Document("a", "A", (Section(("A",), blocks),)), 60, estimate)
    assert all(estimate(piece.text) <= 60 for piece in pieces)
    assert pieces[0].text.startswith("First.\n\nLike this:\n\n```\nx\n```")
    parts = [block for piece in pieces for block in piece.blocks if block.kind == "code"]
    assert all(part.text.startswith("```") and part.text.endswith("\n```") for part in parts)
    tables = [block for piece in pieces for block in piece.blocks if block.kind == "table"]
    assert len(tables) > 1 and all(part.text.startswith("| a | b |\n|---|---|\n") for part in tables)
    assert [piece.parts for piece in pieces] == [len(pieces)] * len(pieces)


def test_docstrings_are_taken_apart() -> None:
    doc = "Brew a pot of tea.\n\nArgs:\n    kind: Which tea to take.\n\nReturns:\n    The tea, ready to drink.\n"
    symbol = Symbol("tea.brew", "function", "def brew(kind)", doc, "def brew(kind):\n    a\n    b", "python")
    pairs = pairs_of_symbol(symbol, Document("tea.py", "tea"), Choice(0), with_code=True)
    assert [pair.answer for pair in pairs] == [
        "Brew a pot of tea.",
        "- `kind`: Which tea to take.",
        "The tea, ready to drink.",
        "```python\ndef brew(kind)\n```",
        "```python\ndef brew(kind):\n    a\n    b\n```",
    ]
    assert all("`tea.brew`" in pair.question for pair in pairs)


def test_rows_are_read_by_what_reads_rows(docs: Path, tmp_path: Path) -> None:
    built = build([docs], tmp_path / "out", Settings())
    assert built.subject == "Teapot"
    rows = [row for path in built.out for row in read_rows(path)]
    assert len(rows) == built.rows == len(built.tokens)
    assert "How do I install Teapot?" in {row.prompt[0]["content"] for row in rows} | {
        "How do I install Teapot?" if row.prompt[0]["content"] == "How can I install Teapot?" else "" for row in rows
    }
    first = rows_in(built.out[0])[0]
    assert first["source"]["file"].startswith("docs/") and len(first["source"]["lines"]) == 2


def test_documents_are_held_out_whole(docs: Path, tmp_path: Path) -> None:
    built = build([docs], tmp_path / "out", Settings(eval_fraction=0.3))
    sides = [{row["source"]["file"] for row in rows_in(path)} for path in built.out]
    assert built.divided.by == "document"
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_the_same_documents_give_the_same_bytes(docs: Path, tmp_path: Path) -> None:
    one, two = (build([docs], tmp_path / name, Settings(with_context=True)) for name in ("one", "two"))
    assert [path.read_bytes() for path in one.out] == [path.read_bytes() for path in two.out]


def test_near_copies_stay_on_one_side() -> None:
    words = " ".join(f"word{n}" for n in range(60))
    texts = [words, "quite another text about something else entirely", words.replace("word7 ", "other ")]
    assert clusters(texts) == [[0, 2], [1]]
    documents = [Document(str(at), "", (Section((), (Block("text", text),)),)) for at, text in enumerate(texts)]
    pairs = [
        Pair(f"Question {at} of {n}?", f"Answer {at} {n}", "heading", Source(str(at), "A", (0, 0)))
        for at in range(3)
        for n in range(4)
    ]
    for seed in range(4):
        divided = divide(pairs, documents, 0.3, seed)
        held_out = {pair.source.file for pair in divided.evaluation}
        assert held_out in ({"1"}, {"0", "2"})


def test_one_document_is_divided_by_its_chapters(tmp_path: Path) -> None:
    path = tmp_path / "tea.md"
    path.write_text(page("Tea", *((f"Brewing with pot {n}", f"{LONG} Take {n} spoons.") for n in range(10))))
    built = build([path], tmp_path / "out", Settings(eval_fraction=0.2))
    assert (built.divided.by, len(built.divided.train), len(built.divided.evaluation)) == ("chapter", 8, 2)


def test_the_same_question_is_not_asked_for_two_answers(tmp_path: Path) -> None:
    path = tmp_path / "tea.md"
    path.write_text(page("Tea", ("A", f"- `--hot`: Boils the {LONG}"), ("B", f"- `--hot`: Warms the {LONG}")))
    built = build([path], tmp_path / "rows.jsonl", Settings(eval_fraction=0))
    questions = [row["messages"][0]["content"] for row in rows_in(built.out[0])]
    assert len(questions) == len(set(questions)) == built.rows


def test_special_tokens_and_long_answers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "tea.md"
    path.write_text(page("Tea", ("Ending a turn", f"{LONG} It ends in <|im_end|> always."), ("Brewing tea", LONG)))
    built = build([path], tmp_path / "out", Settings(eval_fraction=0))
    assert built.rows == 1
    assert built.dropped["a special token of the model in it"] == 1


def test_tokens_of_a_model_are_counted(docs: Path, tmp_path: Path) -> None:
    built = build([docs], tmp_path / "out", Settings(model="examples/reader-9m"))
    assert built.counted == "counted by examples/reader-9m"
    assert max(built.tokens) <= 1024


def test_nothing_is_overwritten_without_force(docs: Path, tmp_path: Path) -> None:
    build([docs], tmp_path / "out", Settings())
    before = (tmp_path / "out/train.jsonl").read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        build([docs], tmp_path / "out", Settings(seed=1))
    assert (tmp_path / "out/train.jsonl").read_bytes() == before
    build([docs], tmp_path / "out", Settings(force=True, eval_fraction=0))
    assert not (tmp_path / "out/eval.jsonl").exists()


def test_without_anything_to_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(DataError, match=r"1 × no format with the ending \.png"):
        build([tmp_path], tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


def test_the_command(docs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loraport_cli", "data", "build", docs, "--out", tmp_path / "rows.jsonl", "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["files"] == [str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.eval.jsonl")]
    assert document["rows"] == sum(document["kinds"].values()) == document["split"]["train"] + document["split"]["eval"]
    assert isinstance(json.loads((tmp_path / "rows.build.json").read_text()), dict)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_what_is_told(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loraport.train.build.report import tell

    built: Built = build([docs], tmp_path / "out", Settings())
    tell(built, Settings())
    told = capsys.readouterr().err
    assert "6 documents about Teapot" in told and "left out" in told
    assert f"data check {tmp_path / 'out/train.jsonl'} --eval-data" in told
