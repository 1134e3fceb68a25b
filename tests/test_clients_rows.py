"""Reading chat rows: what is kept, and one sentence with file and line for everything that cannot be used."""

import json
from pathlib import Path

import pytest

from loraport.clients.errors import DataError, LoraportError, UsageError
from loraport.clients.rows import BadRow, Row, as_request, iter_rows, read_rows

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 7}'


def write(folder: Path, *lines: str) -> Path:
    """A file of rows."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def messages(*pairs: str) -> str:
    """A row of role, content, role, content, ..."""
    inside = (f'{{"role": "{r}", "content": "{c}"}}' for r, c in zip(pairs[::2], pairs[1::2], strict=True))
    return f'{{"messages": [{", ".join(inside)}]}}'


def reply(extra: str) -> str:
    """A row whose assistant turn has more keys."""
    return GOOD.replace('"content": "b"', f'"content": "b", {extra}')


def test_rows_keep_their_line_prompt_and_reference(tmp_path: Path) -> None:
    long = messages("system", "s", "user", "1", "assistant", "2", "user", "3", "assistant", "4 ")
    rows = read_rows(write(tmp_path, GOOD, "", long))
    assert [row.line for row in rows] == [1, 3]
    assert [message["content"] for message in rows[1].prompt] == ["s", "1", "2", "3"]
    assert rows[1].reference == "4 "


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode())
    assert len(read_rows(path)) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a list, not an object"),
        ('"text"', "a str, not an object"),
        ('{"prompt": "a"}', "no key 'messages' (it has 'prompt')"),
        ('{"messages": []}', "not a list with messages"),
        ('{"messages": "hi"}', "not a list with messages"),
        ('{"messages": ["hi"]}', "message 1 is not an object"),
        (messages("user", "a"), "no assistant turn"),
        (messages("user", "a", "assistant", " "), "an assistant turn is empty"),
        (messages("assistant", "a"), "begins with the assistant"),
        (messages("user", "a", "robot", "b"), "message 2 has the role 'robot'"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "has the role ['user']"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no content"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 has no content"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "content of type list"),
        ('{"messages": [{"role": "user", "content": "a", "wait": 0}]}', "unknown key 'wait'"),
        ('{"messages": [{"role": "user", "content": "a", "weight": 1}]}', "role 'user' and has weight 1"),
        (reply('"weight": 2'), "message 2 has the weight 2"),
        (reply('"weight": 0'), "every assistant turn has weight 0"),
        (reply('"tool_calls": {}, "name": 1'), "'name' of type int"),
        (reply('"tool_calls": "f"'), "'tool_calls' that are not a list"),
        (reply('"tool_calls": [{"function": {}}]'), "a tool call without a function's name"),
        (reply('"tool_calls": [{"name": "f", "arguments": "{"}]'), "calls f with arguments that are not JSON"),
        (reply('"tool_calls": [{"name": "f", "arguments": [1]}]'), "calls f with no object as arguments"),
        (reply('"function_call": {"name": "f"}'), "has a 'function_call'"),
        (GOOD[:-1] + ', "tools": [{}]}', "tool 1 has no function with a name"),
        (GOOD[:-1] + ', "tools": {"name": "f"}}', "'tools' is not a list"),
    ],
)
def test_a_broken_row_is_named_with_its_line(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path, GOOD, "", line)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.message.startswith(f"{path}, line 3: ")
    assert says in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n{\xff}\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="is empty"):
        read_rows(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_path_that_is_no_file_is_wrong_usage(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_rows(tmp_path / name)
    assert isinstance(caught.value, LoraportError)
    assert caught.value.exit_code == 2


def test_what_a_template_can_render_is_kept(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    said = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "hm", "weight": 0, "refusal": None},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "b", "weight": 1},
        {"role": "assistant", "content": "c", "weight": 0},
    ]
    (row,) = read_rows(write(tmp_path, json.dumps({"messages": said, "tools": [{"name": "f"}]})))
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert row.messages == [
        said[0],
        {"role": "assistant", "content": "", "reasoning_content": "hm", "weight": 0, "tool_calls": [called]},
        said[2],
        said[3],
        said[4],
    ]
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]
    assert as_request(row.messages)[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [called | {"function": {"name": "f", "arguments": '{"x": 1}'}}],
    }
    assert (row.last_reply, row.reference) == (3, "b")  # the last one that is to be learned


def test_bad_rows_come_with_the_good_ones(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, "{", GOOD, messages("user", "a"))
    found = list(iter_rows(path))
    assert [type(row) for row in found] == [Row, BadRow, Row, BadRow]
    assert [row.where for row in found] == [f"{path}, line {n}" for n in (1, 2, 3, 4)]
    bad = found[1]
    assert isinstance(bad, BadRow) and bad.error.message.startswith(f"{path}, line 2: not JSON")


def test_a_row_knows_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert read_rows(path)[0].source == str(path)
