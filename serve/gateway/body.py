"""A request's body: parsed once, within bounds, and changed only where it has to be.

What the gateway does not know goes to the engine as it came, byte for byte. JSON that two parsers could read
differently (a key given twice, NaN) is refused: the engine must see the model that was checked.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from loraport.serve.gateway.refusals import Refusal, bad_request

# Where the field for the longest reply stands, the one that counts first.
LIMIT_FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
THINKING_FIELDS = {"enable_thinking", "thinking", "reasoning_effort", "reasoning", "output_config"}
TEMPLATED = {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize"}
STOPPED = {"/v1/chat/completions", "/v1/completions"}  # where vLLM takes `stop_token_ids`


# Streams of these say what was used only where that is asked for.
COUNTED_STREAMS = {"/v1/chat/completions", "/v1/completions"}


class Twice(ValueError):
    """A key that an object has more than once."""


@dataclass
class Body:
    """A parsed body; `raw` is what goes to the engine."""

    raw: bytes
    fields: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        """Whether the client asked for server-sent events."""
        return self.fields.get("stream") is True

    def set(self, fields: dict[str, Any]) -> None:
        """Replace the body by `fields`."""
        self.fields = fields
        self.raw = json.dumps(fields, separators=(",", ":")).encode()


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ; Twice otherwise."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise Twice
    return fields


def no_number(text: str) -> NoReturn:
    """NaN and Infinity, which JSON does not have."""
    raise ValueError(text)


def depth(value: Any) -> int:
    """How deep lists and objects are nested; a number or string: 0."""
    deepest, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list)) and item]:
        deepest += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return deepest


def parse(raw: bytes, most_depth: int) -> Body:
    """The body of a request; Refusal 400 with the reason, which never quotes the body."""
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except Twice:
        raise bad_request("invalid_json", "The body has an object with the same key twice.") from None
    except RecursionError:
        raise too_deep(most_depth) from None
    except json.JSONDecodeError as error:
        raise bad_request("invalid_json", f"The body is not JSON: {error.msg} at character {error.pos}.") from None
    except ValueError:
        raise bad_request("invalid_json", "The body is not JSON in UTF-8.") from None
    if not isinstance(fields, dict):
        raise bad_request("invalid_json", "The body must be a JSON object.")
    # There cannot be more levels than opening brackets; short bodies need no walk.
    if raw.count(b"{") + raw.count(b"[") > most_depth and depth(fields) > most_depth:
        raise too_deep(most_depth)
    return Body(raw, fields)


def too_deep(most: int) -> Refusal:
    """400 for nesting."""
    return bad_request("invalid_json", f"The body is nested deeper than {most} levels.")


def model_name(body: Body) -> str:
    """The model that is asked; Refusal 400 without one."""
    name = body.fields.get("model")
    if not isinstance(name, str) or not name:
        raise bad_request("missing_model", "The request names no `model`; GET /v1/models lists them.", "model")
    return name


def wanted_tokens(path: str, body: Body) -> int | None:
    """The longest reply that the client asks for, in tokens; None where it leaves that open."""
    for name in LIMIT_FIELDS.get(path, ()):
        value = body.fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def rename_model(body: Body, name: str) -> None:
    """Call the model as the engine does."""
    if body.fields["model"] != name:
        body.set(body.fields | {"model": name})


def wanted_thinking(fields: dict[str, Any]) -> bool | None:
    """Whether a client asks for thinking, in any of the ways there are; None where it says nothing of it.

    From the first to the last that counts: `enable_thinking` beside the messages (Qwen's API); `thinking` with a `type`
    (Anthropic's, DeepSeek's and Z.ai's); an effort of `none` or `minimal` (OpenAI's), which vLLM takes for thinking
    where it is `minimal`. Other efforts are left to the engine; but where Anthropic's API is given one and no
    `thinking`, there is none to be, and vLLM would think (Claude Code with MAX_THINKING_TOKENS=0).
    """
    wanted = fields.get("enable_thinking")
    if isinstance(wanted, bool):
        return wanted
    if wanted is not None:
        raise bad_request("invalid_value", "`enable_thinking` must be true or false.", "enable_thinking")
    thinking, reasoning = fields.get("thinking"), fields.get("reasoning")
    if isinstance(thinking, dict) and thinking.get("type") in ("enabled", "disabled"):
        return bool(thinking["type"] == "enabled")
    if isinstance(fields.get("output_config"), dict) and thinking is None:
        return False if fields["output_config"].get("effort") else None
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else fields.get("reasoning_effort")
    return False if effort in ("none", "minimal") else None


def move_thinking(path: str, body: Body) -> None:
    """Say whether to think where the chat template sees it: `chat_template_kwargs`. What stands there counts most.

    vLLM ignores `enable_thinking` beside the messages without a word. Templates that know no such switch ignore it too.
    """
    if path not in TEMPLATED or not THINKING_FIELDS & body.fields.keys():
        return
    wanted = wanted_thinking(body.fields)
    given = body.fields.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        return
    rest = {name: value for name, value in body.fields.items() if name != "enable_thinking"}
    if wanted is not None:
        rest["chat_template_kwargs"] = {"enable_thinking": wanted, **(given or {})}
    if rest != body.fields:
        body.set(rest)


def fill_defaults(path: str, body: Body, defaults: Mapping[str, Any]) -> None:
    """Add what a model wants and the request does not say: each template switch by itself, stop tokens to the given.

    Nothing is added on routes where vLLM does not take it.
    """
    given = body.fields
    filled: dict[str, Any] = {}
    for name, value in defaults.items():
        said = given.get(name)
        if name == "chat_template_kwargs":
            is_rendered = path in TEMPLATED and (path != "/tokenize" or "messages" in given)
            if is_rendered and isinstance(said, dict | None):
                filled[name] = {**value, **(said or {})}
        elif name == "stop_token_ids":
            if path in STOPPED and isinstance(said, list | None):
                filled[name] = [*(said or ()), *(token for token in value if token not in (said or ()))]
        elif said is None and path in LIMIT_FIELDS:
            filled[name] = value
    if any(given.get(name) != value for name, value in filled.items()):
        body.set(given | filled)


def ask_usage(path: str, body: Body) -> bool:
    """Have a stream say at its end what it used, where the client left that open; whether that was added.

    It is put in front of what came, which stays as it is.
    """
    if path not in COUNTED_STREAMS or not body.is_stream or "stream_options" in body.fields:
        return False
    head, brace, rest = body.raw.partition(b"{")
    body.raw = head + brace + b'"stream_options":{"include_usage":true},' + rest
    return True
