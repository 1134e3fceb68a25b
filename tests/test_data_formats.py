"""Rows of every format and kind of file become the same chat rows; what does not fit is named with file and row."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from loraport.clients.errors import DataError, UsageError
from loraport.clients.rows import (
    FORMATS,
    BadRow,
    Row,
    array,
    convert,
    find_source,
    hash_source,
    iter_rows,
    read_rows,
)
from loraport.train.config import RunConfig

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b, b"}]}
OTHER = {"messages": [{"role": "user", "content": "c\nc"}, {"role": "assistant", "content": 'd "d"'}]}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def said(row: Row) -> list[tuple[str, str]]:
    """Roles and contents."""
    return [(message["role"], message["content"]) for message in row.messages]


def write_lines(path: Path, *records: Any) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "user a assistant b"),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "a"}, {"from": "chatgpt", "value": "b"}]},
            "system s user a assistant b",
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "user a assistant b",
        ),
        ({"instruction": "a", "input": "x", "output": "b"}, "user a\nx assistant b"),
        (
            {"instruction": "a", "input": "", "output": "b", "system": "s", "history": [["q", "r"]]},
            "system s user q assistant r user a assistant b",
        ),
        ({"prompt": "a", "completion": "b"}, "user a assistant b"),
        ({"prompt": "[{not json", "completion": "b"}, "user [{not json assistant b"),
        ({"question": "a", "answer": "b"}, "user a assistant b"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "user a assistant b",
        ),
    ],
    ids=[
        "sharegpt",
        "system",
        "messages as conversations",
        "alpaca",
        "history",
        "prompt",
        "bracket",
        "answer",
        "lists",
    ],
)
def test_formats_are_recognised_and_become_chat(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    (row,) = read_rows(write_lines(tmp_path / "rows.jsonl", record))
    assert " ".join(f"{role} {content}" for role, content in said(row)) == expected


def test_sharegpt_calls_and_observations(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "b"},
    ]
    (row,) = read_rows(write_lines(tmp_path / "r.jsonl", {"conversations": turns, "tools": '[{"name": "f"}]'}))
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"] == [CALL]
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


def test_loss_stays_off_replies_inside_a_prompt() -> None:
    prompt = [*CHAT["messages"], {"role": "user", "content": "c"}]
    row = convert({"prompt": prompt, "completion": "d"}, "prompt", "", 1)
    assert [message.get("weight", 1) for message in row.messages] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("format", "record", "says"),
    [
        ("sharegpt", {"conversations": [{"from": "robot", "value": "a"}]}, "message 1 is from 'robot'"),
        ("sharegpt", {"conversations": []}, "'conversations' is not a list with turns"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "a function call that is not JSON"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "message 1 has no content"),
        ("alpaca", {"instruction": "", "output": "b"}, "'instruction' is empty"),
        ("alpaca", {"instruction": "a", "output": ""}, "an assistant turn is empty"),
        ("alpaca", {"instruction": "a", "output": 7}, "'output' is of type int"),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["q"]}, "'history' is not a list of"),
        ("prompt", {"prompt": "a"}, "no key 'completion' (it has 'prompt')"),
        ("prompt", {"prompt": " ", "completion": "b"}, "'prompt' is empty"),
        ("prompt", {"prompt": 1, "completion": "b"}, "'prompt' is neither text nor a list"),
        ("prompt", {"prompt": "a", "completion": "b", "system": 5}, "content of type int"),
        ("text", {"text": 1}, "'text' is of type int"),
        ("text", {"text": " "}, "the document is empty"),
        ("chat", CHAT | {"messages": "[{"}, "'messages' is text that is not JSON"),
    ],
)
def test_a_row_that_does_not_fit_is_named(format: str, record: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(record, format, "rows.jsonl", 4)
    assert caught.value.message.startswith("rows.jsonl, line 4")
    assert says in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("chat", r'{"messages": [{"role": "user", "content": "a \ud83d"}, {"role": "assistant", "content": "b"}]}'),
        ("chat", r'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\udc00"}]}'),
        ("prompt", r'{"prompt": "[{\"role\": \"user\", \"content\": \"\\ud83d\"}]", "completion": "b"}'),
        ("text", r'{"text": "a \ud83d"}'),
    ],
)
def test_half_a_character_is_no_text(tmp_path: Path, format: str, record: str) -> None:
    """JSON can write what no tokenizer takes."""
    (tmp_path / "rows.jsonl").write_text(record + "\n")
    (row,) = iter_rows(tmp_path / "rows.jsonl", format)
    assert isinstance(row, BadRow) and "is half a character" in row.error.message


def test_a_whole_character_in_two_halves_is_one() -> None:
    record = json.loads(r'{"prompt": "\ud83d\ude00", "completion": "b"}')
    assert said(convert(record, "prompt", "rows.jsonl", 1))[0] == ("user", "\N{GRINNING FACE}")


def test_a_file_has_one_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", CHAT, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"line 2: no key 'messages' \(it has 'prompt', 'completion'\)"):
        read_rows(path)
    with pytest.raises(DataError, match="line 1: no key 'prompt'"):
        read_rows(path, "prompt")


def test_a_file_of_no_known_format_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: no key 'messages', nor those of another format") as caught:
        read_rows(write_lines(tmp_path / "rows.jsonl", {"query": "a"}))
    assert '"instruction"' in caught.value.hint


def test_the_configuration_names_the_formats_there_are() -> None:
    assert get_args(RunConfig.model_fields["format"].annotation) == ("auto", *FORMATS)
    with pytest.raises(UsageError, match="no format 'xml'"):
        read_rows("rows.jsonl", "xml")


def write_table(path: Path) -> None:
    """CHAT and OTHER as CSV, with messages as JSON."""
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["messages", "tools"])
        writer.writerows([[json.dumps(row["messages"]), ""] for row in (CHAT, OTHER)])


def write_parquet(path: Path) -> None:
    """CHAT and OTHER as Arrow makes them: every message has every key."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [*CHAT["messages"]]},
        {"messages": [OTHER["messages"][0], OTHER["messages"][1] | {"name": "x"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("r.json", lambda path: path.write_text(json.dumps([CHAT, OTHER], indent=1))),
        ("bom.json", lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps([CHAT, OTHER]).encode())),
        ("data.json", lambda path: path.write_text(json.dumps({"version": 1, "data": [CHAT, OTHER]}))),
        ("lines.json", lambda path: write_lines(path, CHAT, OTHER)),
        ("r.jsonl.gz", lambda path: path.write_bytes(gzip.compress(b"%s\n%s" % tuple(map(dump, (CHAT, OTHER)))))),
        ("r.json.gz", lambda path: path.write_bytes(gzip.compress(json.dumps([CHAT, OTHER]).encode()))),
        ("no-suffix", lambda path: write_lines(path, CHAT, OTHER)),
        ("r.csv", write_table),
        ("r.tsv", write_table),
        ("r.parquet", write_parquet),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds_of_files_hold_the_same_rows(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    rows = read_rows(tmp_path / name)
    assert [said(row) for row in rows] == [said(convert(record, "chat", "", 1)) for record in (CHAT, OTHER)]
    assert [row.line for row in rows] == [1, 2]


def dump(record: Any) -> bytes:
    """JSON as bytes."""
    return json.dumps(record).encode()


def questions(path: Path) -> list[str]:
    """What each row asks, or what is said of it."""
    rows = list(iter_rows(path))
    return [row.error.message.split(": ")[1] if isinstance(row, BadRow) else said(row)[0][1] for row in rows]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (rb"a\ud83d", r"\ud83d is half a character."),
        (rb"a\ude00 b", r"\ude00 is half a character."),
        (b"a\xff", "not UTF-8 (byte 45)."),
        (b"a\xe2\x82", "not UTF-8 (byte 45)."),
        (b"a\xed\xa0\xbd", "not UTF-8 (byte 45)."),
        (rb"a\ud83d\ude00", "a\N{GRINNING FACE}"),
        (rb"a\\ud83d", r"a\ud83d"),
        ("ä\N{GRINNING FACE}".encode(), "ä\N{GRINNING FACE}"),
    ],
)
@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_half_characters_are_found_in_lines_and_in_arrays(tmp_path: Path, name: str, raw: bytes, says: str) -> None:
    good = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    rows = [good, good.replace(b'"a"', b'"%s"' % raw), good]
    (tmp_path / name).write_bytes(b"\n".join(rows) if name == "r.jsonl" else b"[%s]" % b", ".join(rows))
    assert questions(tmp_path / name) == ["a", says, "a"]


@pytest.mark.parametrize("piece", [1, 7, 50])
@pytest.mark.parametrize("wrapped", ["[%s,%s]", ' { "a": [{}], "data" :[ %s, %s ]}', "%s\n%s", "[%s, %s] "])
def test_a_json_file_is_the_same_in_pieces_of_any_size(
    piece: int, wrapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [{"a": ['ü\\"]}', 1.5e-3, None, {"b": []}]}, {"n": [-12, True, "\\u00e9"]}]
    text = wrapped % tuple(json.dumps(each, ensure_ascii=False) for each in wanted)
    whole = len(text) if "data" in text else piece  # where the rows are is told by what is read first
    monkeypatch.setattr(array, "PIECE", whole)
    found = list(array.Documents(io.StringIO(text)).rows())
    assert [record for record, _ in found] == wanted == [json.loads(text) for _, text in found]


@pytest.mark.parametrize(
    ("name", "content", "good", "says"),
    [
        ("r.json", dump([CHAT, OTHER])[:-30], 1, "row 2: not JSON"),
        ("r.json", b"[%s][%s]" % (dump(CHAT), dump(OTHER)), 1, "row 2: not JSON (Extra data)"),
        ("r.json", b"[%s %s]" % (dump(CHAT), dump(OTHER)), 1, "row 2: not JSON (Expecting ',' delimiter)"),
        ("r.json.gz", gzip.compress(dump([CHAT, OTHER]))[:-9], 0, "row 1: not JSON"),
        ("r.json", b"[]", 0, "is empty"),
        ("r.json", b"what", 0, "row 1: not JSON"),
        ("r.json", b"[1]", 0, "row 1: a int, not an object"),
        ("r.jsonl.gz", gzip.compress(dump(CHAT) + b"\n" + bytes(range(256)) * 99)[:-9], 1, "line 2: "),
        ("r.csv", b'prompt,completion\na,b\nc,d,e\nf,"g', 1, "row 2: 1 fields more than the heading has"),
        ("r.csv", b'prompt,completion\na,b\nf,"g', 1, "row 2: not CSV"),
        ("r.parquet", b"PAR1 not really", 0, "row 1: not Parquet"),
        ("r.txt", b"\xff\xfe", 0, "not UTF-8"),
        ("r.md", b" \n", 0, "is empty"),
    ],
)
def test_a_damaged_file_is_read_up_to_there(tmp_path: Path, name: str, content: bytes, good: int, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    found: list[Row | BadRow] = []
    with pytest.raises(DataError) as caught:
        for row in iter_rows(tmp_path / name):
            if isinstance(row, BadRow):
                raise row.error
            found.append(row)
    assert len(found) == good
    assert says in caught.value.message and str(tmp_path / name) in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint


def test_documents_are_trained_whole(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Title\n\nText.\n")
    write_lines(tmp_path / "b.jsonl", {"text": "more"})
    rows = read_rows(tmp_path)
    assert [(row.text, row.messages) for row in rows] == [("# Title\n\nText.\n", []), ("more", [])]
    with pytest.raises(DataError, match="has no prompt to answer"):
        assert rows[0].prompt


def test_a_folder_is_read_in_order_without_what_holds_no_rows(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", ".cache/hidden.jsonl", "dataset_info.json"):
        write_lines(tmp_path / name, {"prompt": name, "completion": "x"})
    (tmp_path / "README.md").write_text("# about these rows")
    (tmp_path / "picture.png").write_bytes(b"")
    rows = read_rows(tmp_path)
    assert [row.prompt[0]["content"] for row in rows] == ["a/z.jsonl", "b.jsonl"]
    assert rows[1].source == str(tmp_path / "b.jsonl")


def test_test_rows_of_a_folder_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "data/validation-00000.jsonl"):
        write_lines(tmp_path / name, CHAT)
    source = find_source(tmp_path)
    assert [path.name for path in source.files] == ["train.jsonl"]
    assert source.note.endswith("split train, 2 other files left out")
    assert [path.name for path in find_source(f"{tmp_path}:val").files] == ["validation-00000.jsonl"]
    with pytest.raises(UsageError, match="no files of the split 'dev2'"):
        find_source(f"{tmp_path}:dev2")


@pytest.mark.parametrize(("name", "says"), [("empty", "has none in it"), ("x.xlsx", "of no kind that holds rows")])
def test_a_place_without_rows_is_wrong_usage(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    with pytest.raises(UsageError, match=says):
        read_rows(tmp_path / name)


def test_the_hash_is_of_what_is_in_the_files(tmp_path: Path) -> None:
    one, same, other = (
        write_lines(tmp_path / name, record)
        for name, record in (("1.jsonl", CHAT), ("2.jsonl", CHAT), ("3.jsonl", OTHER))
    )
    hashes = [hash_source(find_source(path)) for path in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
