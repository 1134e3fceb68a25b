"""The chat template: a row rendered as inference would, with thoughts on or off, and where its turns lie in the text.

A row thinks when an assistant turn behind its last question has thoughts. Such a row is rendered as inference does
with thinking switched on, every other one as with thinking switched off, where the template knows the switch; so each
row is trained on the prompt that inference sends in that mode.

    >>> Template.of(tokenizer).render([{"role": "user", "content": "2 + 2?"}], None, False, prompt=True)
    '<|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n'
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from loraport.clients.errors import BaseModelError, DataError
from loraport.clients.rows import Message, Row
from loraport.clients.rows.chat import THOUGHTS

Span = tuple[int, int]  # characters of the rendered text: first, and one behind the last
Tools = list[dict[str, Any]] | None
SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch; Qwen, GLM, SmolLM: the first
CLOSES = "</think>"  # templates of thinking models find thoughts in the content by this mark


@dataclass(frozen=True)
class Rendered:
    """A row as text: all of it, the length of its last trained turn's prompt, and where earlier turns lie.

    `untrained`: earlier turns that carry no loss, because the template renders them differently once others follow.
    """

    text: str
    cut: int
    earlier: tuple[Span, ...]
    untrained: int
    thinking: bool


@dataclass(frozen=True)
class Template:
    """A tokenizer's compiled chat template. `switch`: its name for thinking, if it has one; `thoughts`: theirs."""

    source: str
    compiled: Any
    with_tools: Any  # some models have another template for rows with tools
    constants: dict[str, Any]
    switch: str | None
    thoughts: str | None
    specials: re.Pattern[str] | None

    @classmethod
    def of(cls, tokenizer: Any) -> "Template":
        """The template that `apply_chat_template` would use; BaseModelError when it is no Jinja template."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template  # one call a row is half the time

        sources = [tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])]
        try:
            compiled, with_tools = map(_compile_jinja_template, sources)
        except TemplateError as error:
            raise BaseModelError(
                f"the chat template cannot be read: {first_line(error)}.", "put another chat_template.jinja there"
            ) from error
        source = "\n".join(dict.fromkeys(sources))
        thoughts = next((name for name in THOUGHTS if re.search(rf"\b{name}\b", source)), None)
        marks = {mark for mark in ("<think>", CLOSES) if mark in source}
        plain = cls(
            source,
            compiled,
            with_tools,
            tokenizer.special_tokens_map,
            None,
            thoughts,
            special_pattern(tokenizer, marks),
        )
        return replace(plain, switch=find_switch(plain))

    def kwargs(self, thinking: bool) -> dict[str, bool]:
        """What the template is given for rows with thoughts, or without."""
        return {self.switch: thinking} if self.switch else {}

    def thinks(self, row: Row) -> bool:
        """Whether the row holds thoughts that its last question led to; of a pair, one of its two replies."""
        if row.rejected is not None and has_thoughts(row.rejected):
            return True
        for message in reversed(row.messages):
            if message["role"] == "user":
                return False
            if message["role"] == "assistant" and has_thoughts(message):
                return True
        return False

    def render(
        self, messages: list[Message], tools: Tools, thinking: bool, prompt: bool = False, where: str = "the row"
    ) -> str:
        """Messages as text; with `prompt`, what inference sends for the next turn. DataError when it refuses them."""
        from jinja2 import TemplateError

        options = self.constants | self.kwargs(thinking) | {"add_generation_prompt": prompt}
        template = self.with_tools if tools else self.compiled
        try:
            return str(template.render(messages=messages, tools=tools, documents=None, **options))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"{where}: the chat template refuses the row: {first_line(error)}.",
                "some templates take no system message, or want user and assistant to alternate",
            ) from error

    def render_row(self, row: Row) -> Rendered:
        """A row up to its last trained turn; DataError when it cannot be told what to learn from it."""
        self.refuse_special_tokens(row)
        messages = self.adapt(row)
        thinking, last = self.thinks(row), row.last_reply

        def render(count: int, prompt: bool = False) -> str:
            return self.render(messages[:count], row.tools, thinking, prompt, row.where)

        text, prompt = render(last + 1), render(last, True)
        if not text.startswith(prompt):
            raise DataError(
                f"{row.where}: the chat template renders the last reply's prompt differently in training than in "
                f"generation, so what to learn cannot be told.",
                "use another chat template: put a chat_template.jinja into the model's folder",
            )
        self.refuse_dropped(row, messages[last], text[len(prompt) :])
        earlier, untrained = [], 0
        for index in range(last):
            if messages[index]["role"] == "assistant" and messages[index].get("weight", 1):
                asked = render(index, True)
                until = render(index + 1) if text.startswith(asked) else ""
                if until.startswith(asked) and text.startswith(until):
                    earlier.append((len(asked), len(until)))
                else:
                    untrained += 1
        return Rendered(text, len(prompt), tuple(earlier), untrained, thinking)

    def adapt(self, row: Row) -> list[Message]:
        """The row's messages, thoughts where this template looks for them: by its own name, not in the content."""
        if self.thoughts is None:
            return row.messages
        return [self.adapt_message(message) if has_thoughts(message) else message for message in row.messages]

    def adapt_message(self, message: Message) -> Message:
        """A message with thoughts; those in the content are taken out as templates that can do it take them."""
        before, mark, content = message["content"].rpartition(CLOSES)
        thoughts = message.get("reasoning_content", "")
        kept = {key: value for key, value in message.items() if key != "reasoning_content"}
        if not thoughts and mark and before.lstrip().startswith("<think>"):
            thoughts = before.lstrip().removeprefix("<think>").strip("\n")
            kept["content"] = content.lstrip("\n")
        return kept | ({self.thoughts: thoughts} if thoughts and self.thoughts else {})

    def refuse_dropped(self, row: Row, message: Message, turn: str) -> None:
        """DataError when the last turn lost its thoughts or the calls of its tools on the way through the template."""
        if message.get(self.thoughts or "reasoning_content", "").strip() not in turn:
            raise DataError(
                f"{row.where}: the chat template does not render the reply's thoughts ('reasoning_content').",
                "train a thinking model on such rows, remove the thoughts, or put them into the content as "
                "<think>…</think>",
            )
        lost = [call for call in message.get("tool_calls", ()) if call["function"]["name"] not in turn]
        if lost:
            raise DataError(
                f"{row.where}: the chat template does not render the reply's tool calls.",
                "train a model whose template knows tools, or remove the row",
            )

    def refuse_special_tokens(self, row: Row) -> None:
        """A turn that spells a special token would end, or begin, where nobody meant it to."""
        if self.specials is None:
            return
        for number, message in enumerate(row.messages, 1):
            for text in texts_of(message):
                if found := self.specials.search(text):
                    raise special_token_error(f"{row.where}: message {number}", found[0])
        if row.text is not None and (found := self.specials.search(row.text)):
            raise special_token_error(f"{row.where}: the document", found[0])
        if row.tools and (found := self.specials.search(repr(row.tools))):
            raise special_token_error(f"{row.where}: a tool", found[0])


def special_token_error(what: str, token: str) -> DataError:
    """The refusal of a text that spells a special token."""
    return DataError(f"{what} contains {token!r}, which is a special token of this model.", "remove it from the text")


def texts_of(message: Message) -> list[str]:
    """Everything in a message that ends up in the text."""
    if len(message) == 2:
        return [message["content"]]
    others = (message.get("reasoning_content", ""), message.get("name", ""), message.get("tool_call_id", ""))
    return [message["content"], *others, *(repr(call) for call in message.get("tool_calls", ()))]


def has_thoughts(message: Message) -> bool:
    """Whether an assistant turn has thoughts, beside its content or in it."""
    content = message["content"] if message["role"] == "assistant" else ""
    inside = content.partition(CLOSES)[0].replace("<think>", "").strip() if CLOSES in content else ""
    return bool(message.get("reasoning_content", "").strip() or inside)


def special_pattern(tokenizer: Any, but: set[str]) -> re.Pattern[str] | None:
    """What finds a special token in a text; the marks of thoughts that the template itself looks for aside."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = (added | set(tokenizer.all_special_tokens)) - but
    longest_first = sorted((token for token in tokens if token), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def find_switch(template: Template) -> str | None:
    """The name by which the template is told whether to think; None where it makes no difference."""
    question: list[Message] = [{"role": "user", "content": "?"}]
    for name in SWITCHES:
        probe = replace(template, switch=name)
        try:
            on, off = (probe.render(question, None, thinking, prompt=True) for thinking in (True, False))
        except DataError:
            return None
        if on != off:
            return name
    return None


def first_line(error: Exception) -> str:
    """What an exception says, in one line without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
