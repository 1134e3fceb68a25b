"""Preference rows: a conversation, the reply that is preferred to it, and one that is not.

OpenAI's form (`input`, `preferred_output`, `non_preferred_output`) and TRL's (`prompt`, `chosen`, `rejected`: texts,
lists of messages, or whole conversations that have their beginning in common). A reply is one assistant message: what
is compared is the next turn, not a way on from there. Dialogues as text, "Human: …" and "Assistant: …" as Anthropic's
hh-rlhf has them, are taken apart.

    >>> read_pair({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "line 1").rejected
    {'role': 'assistant', 'content': '5'}
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from loraport.clients.errors import DataError
from loraport.clients.rows.chat import check_messages, check_tools
from loraport.clients.rows.row import Message

KEYS = (("input", "preferred_output", "non_preferred_output"), ("prompt", "chosen", "rejected"), ("chosen", "rejected"))
HINT = (
    'a row is {"input": {"messages": […]}, "preferred_output": [{"role": "assistant", "content": "…"}], '
    '"non_preferred_output": […]} or {"prompt": "…", "chosen": "…", "rejected": "…"}'
)
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")  # of the dialogues in Anthropic's hh-rlhf
SPOKEN = {"Human": "user", "Assistant": "assistant"}
NAMES = "preferred output", "non-preferred output"


@dataclass(frozen=True)
class Pair:
    """`messages`: the conversation with the preferred reply at its end; `rejected`: the reply that is not preferred."""

    messages: list[Message]
    rejected: Message
    tools: list[dict[str, Any]] | None


def read_pair(record: dict[str, Any], where: str) -> Pair:
    """A record with one group of KEYS; DataError when it is no pair of replies to one conversation."""
    if "preferred_output" in record:
        asked = from_json(record["input"])
        if not isinstance(asked, dict):
            raise DataError(f"{where}: 'input' is not an object with 'messages'.", HINT)
        tools, given = asked.get("tools", record.get("tools")), asked.get("messages")
        outputs = record["preferred_output"], record["non_preferred_output"]
    else:
        tools, given = record.get("tools"), record.get("prompt")
        outputs = record["chosen"], record["rejected"]
    prompt, preferred, rejected = take_apart(given, outputs, where)
    check_prompt(prompt, where)
    kept, other = (
        check_output(prompt, reply, name, where) for reply, name in zip((preferred, rejected), NAMES, strict=True)
    )
    if same_reply(kept[-1], other[-1]):
        raise DataError(f"{where}: the preferred and the non-preferred output are the same.", "remove the row")
    return Pair(kept, other[-1], check_tools(tools, where))


def take_apart(given: Any, outputs: tuple[Any, Any], where: str) -> tuple[list[Any], Any, Any]:
    """Prompt, preferred and rejected reply as messages; where outputs are whole conversations, what they share."""
    prompt = as_prompt(given, where)
    turns = [as_output(output, name, prompt is None, where) for output, name in zip(outputs, NAMES, strict=True)]
    begun = [turn for turn in turns if isinstance(turn[0], dict) and turn[0].get("role") != "assistant"]
    if prompt is None or begun:
        shared = turns[0][:-1]
        if shared != turns[1][:-1]:
            raise DataError(
                f"{where}: the two conversations differ before their last message.",
                "both are the same up to one assistant message",
            )
        if prompt and prompt != shared[-len(prompt) :] and prompt != shared[: len(prompt)]:
            raise DataError(f"{where}: 'prompt' is not what the two conversations begin with.", HINT)
        return shared, turns[0][-1], turns[1][-1]
    for turn, name in zip(turns, NAMES, strict=True):
        if len(turn) != 1:
            raise DataError(
                f"{where}: the {name} has {len(turn)} messages.",
                "an output is one assistant message; what comes before it belongs to the input",
            )
    return prompt, turns[0][0], turns[1][0]


def as_prompt(given: Any, where: str) -> list[Any] | None:
    """The conversation that is given; None where the outputs hold it."""
    given = from_json(given)
    if given is None:
        return None
    if isinstance(given, str):
        if not given.strip():
            raise DataError(f"{where}: the prompt is empty.", "give the prompt, or remove the row")
        return dialogue(given, ends_open=True) or [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: the input is not a list with messages in it.", HINT)
    return given


def as_output(output: Any, name: str, is_whole: bool, where: str) -> list[Any]:
    """An output as messages; `is_whole`: it must hold the conversation too."""
    output = from_json(output)
    if isinstance(output, dict):
        output = [output]
    if isinstance(output, str):
        told = dialogue(output) if is_whole else None
        if is_whole and told is None:
            raise DataError(f"{where}: the {name} is text, and there is no 'prompt' beside it.", HINT)
        output = told or [{"role": "assistant", "content": output}]
    if not isinstance(output, list) or not output:
        raise DataError(f"{where}: the {name} is empty.", HINT)
    return output


def dialogue(text: str, ends_open: bool = False) -> list[Message] | None:
    """A dialogue of "Human:" and "Assistant:" as messages; None for any other text.

    `ends_open`: it ends with the "Assistant:" that the reply would follow, which is left out.
    """
    parts = SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        return None
    spoken = zip(parts[1::2], parts[2::2], strict=True)
    turns = [{"role": SPOKEN[speaker], "content": said.strip()} for speaker, said in spoken]
    return turns[:-1] if ends_open and not turns[-1]["content"] and len(turns) > 1 else turns


def check_prompt(prompt: list[Any], where: str) -> None:
    """DataError when there is nothing to reply to."""
    if not prompt:
        raise DataError(f"{where}: there is no input before the outputs.", HINT)
    if isinstance(prompt[-1], dict) and prompt[-1].get("role") == "assistant":
        raise DataError(f"{where}: the input ends with the assistant.", "it ends with what the outputs reply to")


def check_output(prompt: list[Any], reply: Any, name: str, where: str) -> list[Message]:
    """The conversation with a reply at its end, checked; loss falls on the reply alone."""
    if not isinstance(reply, dict) or reply.get("role") != "assistant":
        role = f"of the role {reply.get('role')!r}" if isinstance(reply, dict) else "no object"
        raise DataError(f"{where}: the {name} is {role}.", "an output is one assistant message")
    if not has_content(reply):
        raise DataError(f"{where}: the {name} is empty.", "give the reply, or remove the row")
    given = [m | {"weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
    said = {key: value for key, value in reply.items() if key != "weight"}
    return check_messages([*given, said], where)


def has_content(reply: Message) -> bool:
    """Whether a reply says or calls something; what is no text is refused elsewhere."""
    content = reply.get("content")
    return bool(reply.get("tool_calls") or (content.strip() if isinstance(content, str) else content))


def same_reply(one: Message, other: Message) -> bool:
    """Whether two replies are the same, spaces at their ends aside."""
    texts = ("content", "reasoning_content")
    same = all(one.get(key, "").strip() == other.get(key, "").strip() for key in texts)
    return same and one.get("tool_calls") == other.get("tool_calls")


def from_json(value: Any) -> Any:
    """The messages inside a text, as columns of tables have them, or `value` as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[{", "{")):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        is_messages = isinstance(found, list) or (isinstance(found, dict) and ("messages" in found or "role" in found))
        return found if is_messages else value  # a reply may itself be JSON
    return value
