"""Messages as OpenAI's API has them: what a template can render is kept, everything else is refused by name.

Tool arguments become objects, as vLLM makes them before it renders; thoughts are called `reasoning_content`.

    >>> check_messages([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], "line 1")
    [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
"""

import json
from typing import Any

from loraport.clients.errors import DataError
from loraport.clients.rows.row import EXAMPLE, ROLES, Message

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the names that thoughts go by
KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id", *THOUGHTS}
IGNORED_KEYS = {"refusal", "audio", "function_call", "annotations"}  # the API's own, null in text rows
TOOL_EXAMPLE = '{"type": "function", "function": {"name": "…", "arguments": {…}}}'


def check_messages(messages: Any, where: str) -> list[Message]:
    """Return `messages` with what can be trained on; DataError otherwise."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is not a list with messages in it.", f"a row is one line: {EXAMPLE}")
    checked = [check_message(message, f"{where}: message {at}") for at, message in enumerate(messages, 1)]
    replies = [message for message in checked if message["role"] == "assistant"]
    if not replies:
        raise DataError(f"{where}: no assistant turn.", "a row ends with the reply that the model shall give")
    if not all(reply["content"].strip() or reply.get("tool_calls") for reply in replies):
        raise DataError(f"{where}: an assistant turn is empty.", "give the reply, or remove the row")
    if checked[0]["role"] == "assistant":
        raise DataError(f"{where}: it begins with the assistant.", "a row begins with a user or system message")
    if not any(reply.get("weight", 1) for reply in replies):
        raise DataError(f"{where}: every assistant turn has weight 0.", "leave one to learn from, or remove the row")
    return checked


def check_message(message: Any, where: str) -> Message:
    """Return a message with the keys that matter; DataError when one is missing, unknown or of the wrong kind."""
    if not isinstance(message, dict):
        raise DataError(f"{where} is not an object.", "a message has 'role' and 'content'")
    if message.keys() != {"role", "content"}:  # most messages have these two alone
        message = {key: value for key, value in message.items() if value is not None or key in ("role", "content")}
        refuse_unknown(message, where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where} has the role {role!r}.", f"roles are {', '.join(ROLES)}")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        kind = "no content" if content is None else f"content of type {type(content).__name__}"
        raise DataError(f"{where} has {kind}, not text.", "content is one string")
    checked: Message = {"role": role, "content": content}
    return checked | check_extras(message, role, where) if len(message) > 2 else checked


def refuse_unknown(message: dict[str, Any], where: str) -> None:
    """DataError for a key that no template renders."""
    unknown = sorted(str(key) for key in message if key not in KEYS and key not in IGNORED_KEYS)
    if unknown:
        known = "'role' and 'content', and may have 'weight', 'reasoning_content', 'tool_calls', 'tool_call_id', 'name'"
        raise DataError(f"{where} has the unknown key {unknown[0]!r}.", f"a message has {known}")
    if message.get("function_call"):
        raise DataError(f"{where} has a 'function_call'.", "that form is obsolete: use 'tool_calls'")


def check_extras(message: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    """The keys beside role and content, checked."""
    extras: dict[str, Any] = {}
    for key in ("name", "tool_call_id", *THOUGHTS):
        if key in message and not isinstance(message[key], str):
            raise DataError(f"{where} has '{key}' of type {type(message[key]).__name__}, not text.", "give a string")
        if message.get(key):
            extras["reasoning_content" if key in THOUGHTS else key] = message[key]
    if "reasoning_content" in extras and role != "assistant":
        raise DataError(f"{where} is of the role {role!r} and has thoughts.", "only the assistant thinks")
    if "weight" in message:
        extras["weight"] = check_weight(message["weight"], role, where)
    if message.get("tool_calls"):
        if role != "assistant":
            raise DataError(f"{where} is of the role {role!r} and has 'tool_calls'.", "only the assistant calls tools")
        extras["tool_calls"] = check_tool_calls(message["tool_calls"], where)
    return extras


def check_weight(weight: Any, role: str, where: str) -> int:
    """0 or 1; 1 only where there is something to learn."""
    if isinstance(weight, str) or weight not in (0, 1):
        raise DataError(f"{where} has the weight {weight!r}.", "weight is 0 (no loss on this turn) or 1")
    if weight == 1 and role != "assistant":
        raise DataError(f"{where} is of the role {role!r} and has weight 1.", "only assistant turns carry loss")
    return int(weight)


def check_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, arguments as objects."""
    if not isinstance(calls, list) or not calls:
        raise DataError(f"{where} has 'tool_calls' that are not a list.", f"a call is {TOOL_EXAMPLE}")
    return [check_tool_call(call, where) for call in calls]


def check_tool_call(call: Any, where: str) -> dict[str, Any]:
    """One call: {"type": "function", "function": {"name", "arguments"}}, and its `id` if it has one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where} has a tool call without a function's name.", f"a call is {TOOL_EXAMPLE}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} calls {function['name']} with arguments that are not JSON.", f"a call is {TOOL_EXAMPLE}"
            ) from error
    if not isinstance(arguments := {} if arguments is None else arguments, dict):
        raise DataError(f"{where} calls {function['name']} with no object as arguments.", f"a call is {TOOL_EXAMPLE}")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return named | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def check_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The functions a row may call, in OpenAI's form; a JSON text of them is read. None where there are none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: 'tools' is text that is not JSON.", "give a list of functions") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is not a list.", "give a list of functions")
    checked = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: tool {number} has no function with a name.",
                'a tool is {"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}',
            )
        checked.append({"type": "function", "function": function})
    return checked


def as_request(messages: list[Message]) -> list[Message]:
    """Messages as a request to an OpenAI-compatible endpoint has them: no weights, arguments as JSON text."""
    return [ask_with(message) if len(message) > 2 else message for message in messages]


def ask_with(message: Message) -> Message:
    """One message of a request."""
    sent = {key: value for key, value in message.items() if key != "weight"}
    if calls := sent.get("tool_calls"):
        functions = [call["function"] for call in calls]
        arguments = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
        sent["tool_calls"] = [
            {"id": f"call_{number}"} | call | {"function": {"name": function["name"], "arguments": text}}
            for number, (call, function, text) in enumerate(zip(calls, functions, arguments, strict=True))
        ]
    return sent
