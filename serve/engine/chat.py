"""How a base talks, found by asking its chat template: what it makes of a call of a tool, of thoughts, of a question.

A template says in its own words what the model was trained to write, so it is rendered with small probes and the text
is looked at; names of models are not trusted with that. The same templates are rendered by vLLM for each request.

    >>> read_chat(base).call()
    '<|im_end|>\\n<|im_start|>assistant\\n<tool_call>\\n{"name": "probe_tool", "arguments": {"city": "Rome"}}…'
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from loraport.train.base_model import Base, chat_template, read_json

Message = dict[str, Any]
QUESTION: Message = {"role": "user", "content": "Where is the key?"}
TOOL_NAME, ARGUMENT, VALUE = "probe_tool", "city", "Rome"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Looks a town up.",
        "parameters": {"type": "object", "properties": {ARGUMENT: {"type": "string"}}, "required": [ARGUMENT]},
    },
}
# Mistral's templates want nine letters or digits; some templates want arguments as an object, some as text.
CALL: dict[str, Any] = {
    "id": "abc123def",
    "type": "function",
    "function": {"name": TOOL_NAME, "arguments": {ARGUMENT: VALUE}},
}
THOUGHTS, REPLY = "the thoughts of a probe", "the reply of a probe"


@dataclass(frozen=True)
class Chat:
    """A base's template, the tokens beside its vocabulary by their text, and those on which generation stops.

    `with_tools`: some models have another template for requests with tools. `specials`: bos_token and the like.
    """

    template: str
    with_tools: str
    tokens: dict[str, int] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()
    specials: dict[str, str] = field(default_factory=dict)

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
        """Messages as text; empty where the template refuses them or cannot be read."""
        from jinja2 import TemplateError

        source = self.with_tools if tools else self.template
        with suppress(TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError):
            compiled = environment().from_string(source)
            return str(compiled.render(messages=messages, tools=tools, documents=None, **self.specials, **options))
        return ""

    def prompt(self, **switches: bool) -> str:
        """What generation goes on behind, for a question."""
        return self.render([QUESTION], None, add_generation_prompt=True, **switches)

    def call(self) -> str:
        """All behind the question where the model calls a tool; empty where the template does not know tools."""
        asked = self.render([QUESTION], [TOOL], add_generation_prompt=True)
        said = self.render([QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL])
        behind = said.rpartition(QUESTION["content"])[2]
        return behind if TOOL_NAME in asked and VALUE in behind else ""  # a tool that the model never hears of is none

    def thoughts(self) -> str:
        """The tag around thoughts: `think` of `<think>…</think>`; empty where the template renders none so."""
        message = {"role": "assistant", "content": REPLY, "reasoning_content": THOUGHTS}
        before, _, behind = self.render([QUESTION, message]).partition(THOUGHTS)
        closing = re.match(r"\s*</([\w:]+)>", behind)
        return closing[1] if closing and before.rstrip().endswith(f"<{closing[1]}>") else ""

    def switch(self) -> str:
        """The name by which the template is told whether to think; empty where it makes no difference."""
        names = ("enable_thinking", "thinking")
        return next((name for name in names if self.prompt(**{name: True}) != self.prompt(**{name: False})), "")

    @property
    def is_tuned(self) -> bool:
        """Whether generation stops on a token that ends the template's turns: a base before its tuning does not."""
        texts = [text for text, token in self.tokens.items() if token in self.ends]
        return "eos_token" in self.template or any(text in self.template for text in texts)


def read_chat(base: Base) -> Chat:
    """What a base's folder says of its chat."""
    template, with_tools = split_template(chat_template(base))
    config = read_optional(base.folder / "tokenizer_config.json")
    texts = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    specials = {name: text["content"] if isinstance(text, dict) else text for name, text in texts.items() if text}
    tokens = read_added_tokens(base.folder, config)
    ends = base.config.get("eos_token_id")
    ends = read_optional(base.folder / "generation_config.json").get("eos_token_id", ends)
    known = {ends} if isinstance(ends, int) else set(ends or ())
    return Chat(template, with_tools, tokens, frozenset(known), specials)


def split_template(text: str) -> tuple[str, str]:
    """(the template, the one for requests with tools), where a tokenizer_config.json holds several by name."""
    if not text.startswith("["):
        return text, text
    with suppress(ValueError, TypeError, KeyError):
        named = {entry["name"]: entry["template"] for entry in json.loads(text)}
        return named.get("default", ""), named.get("tool_use", named.get("default", ""))
    return text, text


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object that need not be there."""
    return read_json(path) if path.is_file() else {}


def read_added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Tokens beside the vocabulary, by their text. Of tokenizer.json only that part is parsed: the rest takes 0.3 s."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r'"added_tokens"\s*:\s*', text)
    with suppress(ValueError, TypeError, KeyError):
        if found:
            added, _ = json.JSONDecoder().raw_decode(text, found.end())
            return {entry["content"]: int(entry["id"]) for entry in added}
        return {entry["content"]: int(token) for token, entry in config.get("added_tokens_decoder", {}).items()}
    return {}


@cache
def environment() -> Any:
    """Jinja as transformers sets it up for chat templates (transformers/utils/chat_template_utils.py)."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's turns for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            number = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=number)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "1 January 2026"}
    return made
