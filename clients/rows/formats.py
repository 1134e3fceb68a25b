"""The formats in which rows come, each converted to a chat row: chat, ShareGPT, Alpaca, prompt/completion, text; and
preference, whose rows have two replies (preference.py).

A file has one format, recognised by the keys of its first rows or named; a row that does not fit is refused.

    >>> convert({"instruction": "Add.", "input": "2 + 2", "output": "4"}, "alpaca", "", 1).reference
    '4'
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from loraport.clients.errors import DataError
from loraport.clients.rows import preference
from loraport.clients.rows.chat import check_messages, check_tools
from loraport.clients.rows.row import EXAMPLE, Message, Row, place

Record = dict[str, Any]

# Names of the speakers in ShareGPT files, and the roles they have.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def chat(record: Record, where: str) -> list[Message]:
    """`messages`, as OpenAI has them."""
    return check_messages(as_list(record["messages"], "messages", where), where)


def sharegpt(record: Record, where: str) -> list[Message]:
    """`conversations` of `from` and `value`; a `system` text beside them comes first."""
    turns = as_list(record["conversations"], "conversations", where)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: 'conversations' is not a list with turns in it.", HINTS["sharegpt"] + ", one object a row"
        )
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    spoken = [speak(turn, f"{where}: message {number}") for number, turn in enumerate(turns, 1)]
    return check_messages([*system, *spoken], where)


def speak(turn: Any, where: str) -> Any:
    """A ShareGPT turn as a message."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # some call messages `conversations`; what is neither is refused there
    role = SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise DataError(f"{where} is from {turn['from']!r}.", f"speakers are {', '.join(SPEAKERS)}")
    rest = {key: turn[key] for key in ("weight", "name", "reasoning_content", "tool_call_id") if key in turn}
    if role != "call":
        return {"role": role, "content": turn.get("value")} | rest
    try:
        calls = json.loads(turn["value"]) if isinstance(turn.get("value"), str) else turn.get("value")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is a function call that is not JSON.", '{"name": "…", "arguments": {…}}') from error
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]} | rest


def alpaca(record: Record, where: str) -> list[Message]:
    """`instruction` with `input` below it, and `output`; `system`, and `history` as pairs, come before."""
    for key in ("instruction", "input", "output", "system"):
        if not isinstance(record.get(key) or "", str):
            raise DataError(f"{where}: '{key}' is of type {type(record[key]).__name__}, not text.", HINTS["alpaca"])
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in as_list(record.get("history"), "history", where) or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{where}: 'history' is not a list of question and answer.", '[["…", "…"], …]')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(part for part in (record.get("instruction"), record.get("input")) if part)
    if not asked.strip():
        raise DataError(f"{where}: 'instruction' is empty.", HINTS["alpaca"])
    return check_messages(
        [*messages, pair_up(asked, record.get("output"))[0], *pair_up("", record["output"])[1:]], where
    )


def prompt(record: Record, where: str) -> list[Message]:
    """`prompt` and `completion`: texts, or lists of messages; loss falls on the completion alone."""
    first, second = next(pair for pair in PAIRS if all(key in record for key in pair))
    asked, answered = (from_json(record[key]) for key in (first, second))
    if isinstance(asked, str):
        if not asked.strip():
            raise DataError(f"{where}: '{first}' is empty.", "give the prompt, or remove the row")
        asked = [{"role": "user", "content": asked}]
    if isinstance(answered, str):
        answered = [{"role": "assistant", "content": answered}]
    for key, value in ((first, asked), (second, answered)):
        if not isinstance(value, list) or not value:
            raise DataError(f"{where}: '{key}' is neither text nor a list of messages.", HINTS["prompt"])
    given = [m | {"weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in asked]
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return check_messages([*system, *given, *answered], where)


def pair_up(asked: str, answered: Any) -> list[Message]:
    """A user's message and its answer."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def as_list(value: Any, key: str, where: str) -> Any:
    """`value`; the JSON inside it where it is text, as CSV columns have it."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: '{key}' is text that is not JSON.", "a column of messages holds a JSON list"
        ) from error


def from_json(value: Any) -> Any:
    """The list of messages inside a text, or `value` as it is: a prompt may begin with a bracket."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# name: keys of which a row has all of one group, and how it becomes messages. In the order of detection.
FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Record, str], list[Message]] | None]] = {
    "preference": (preference.KEYS, None),  # first: such rows may have their preferred conversation as messages too
    "chat": ((("messages",),), chat),
    "sharegpt": ((("conversations",),), sharegpt),
    "alpaca": ((("instruction", "output"),), alpaca),
    "prompt": (PAIRS, prompt),
    "text": ((("text",),), None),
}
HINTS = {
    "chat": f"a row is one line: {EXAMPLE}",
    "sharegpt": 'a row is {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
    "alpaca": 'a row is {"instruction": "…", "input": "…", "output": "…"}',
    "prompt": 'a row is {"prompt": "…", "completion": "…"}; both may be lists of messages',
    "text": 'a row is {"text": "…"}, a document that is trained whole',
    "preference": preference.HINT,
}


def detect(records: Iterable[Any]) -> str | None:
    """The format of the first record that has the keys of one; None where none has."""
    for record in records:
        for name, (groups, _) in FORMATS.items():
            if isinstance(record, dict) and any(all(key in record for key in keys) for keys in groups):
                return name
    return None


def convert(record: Any, format: str, source: str, line: int, unit: str = "line") -> Row:
    """A record of a file as a row; DataError that names `source` and `line` when it does not fit the format."""
    where = place(source, line, unit)
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, not an object.", HINTS[format])
    groups, build = FORMATS[format]
    if not any(all(key in record for key in keys) for keys in groups):
        missing = min(([key for key in keys if key not in record] for keys in groups), key=len)
        keys = ", ".join(map(repr, record)) or "nothing"
        raise DataError(f"{where}: no key {missing[0]!r} (it has {keys}).", HINTS[format])
    if format == "preference":
        pair = preference.read_pair(record, where)
        messages, rejected, tools = (refuse_halves(part, where) for part in (pair.messages, pair.rejected, pair.tools))
        return Row(messages, line, tools, None, source, unit, rejected)
    if build is None:
        return Row([], line, None, check_text(refuse_halves(record["text"], where), where), source, unit)
    messages, tools = build(record, where), check_tools(record.get("tools"), where)
    return Row(refuse_halves(messages, where), line, refuse_halves(tools, where), None, source, unit)


def refuse_halves(value: Any, where: str) -> Any:
    """`value`; DataError when a text in it has half of a UTF-16 pair, which JSON can write and no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{where}: {half} is half a character.", "write the character whole, or remove the row"
        ) from error
    return value


def check_text(text: Any, where: str) -> str:
    """A document's text; DataError when it is empty or no text."""
    if not isinstance(text, str):
        raise DataError(f"{where}: 'text' is of type {type(text).__name__}, not text.", HINTS["text"])
    if not text.strip():
        raise DataError(f"{where}: the document is empty.", "remove the row")
    return text


def parse_row(raw: bytes, where: str, line: int, format: str = "chat") -> Row:
    """One line of a JSONL file as a row. `where` stands in the errors."""
    return convert(parse_json(raw, where, HINTS[format]), format, where.rpartition(", line ")[0], line)


def parse_json(raw: bytes, where: str, hint: str) -> Any:
    """One JSON document; DataError that says what is wrong with it."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1}).", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else "not readable"
        raise DataError(f"{where}: not JSON ({problem}).", hint) from error
