"""Rows to tokens: the chat template is rendered once, and loss falls on the assistant's turns and their end alone.

The trained part of a turn begins where inference would begin to generate and ends with a token that generation stops
on. It is found by rendering the turn's prompt: what follows in the full text is the turn. Prompt and last turn are
tokenised apart, so that the tokens before the trained part are exactly those that inference sends. A row for which
none of this can be established is refused: a model trained on it would never learn to stop.

    >>> encoder = Encoder.load("examples/reader-9m")
    >>> encoder.encode(row).labels          # -100 everywhere but on "Paris", "<|im_end|>"
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import BaseModelError, DataError
from loraport.clients.rows import Message, Row

IGNORED = -100  # torch's cross entropy skips these labels
Span = tuple[int, int]  # characters of the rendered text: first, and one behind the last


@dataclass(frozen=True)
class Example:
    """A tokenised row: `input_ids` and `labels` of T tokens; labels are the same tokens, or IGNORED.

    `untrained_turns`: assistant turns before the last that carry no loss, because the template renders them
    differently once others follow (thinking models drop thoughts there).
    """

    input_ids: list[int]
    labels: list[int]
    line: int
    untrained_turns: int = 0

    @property
    def features(self) -> dict[str, list[int]]:
        """The form in which transformers' samplers take rows."""
        return {"input_ids": self.input_ids, "labels": self.labels}

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that carry loss; the first token of a row never does."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoder:
    """A base's tokenizer and template, the tokens on which its generation stops, and what the template is given."""

    tokenizer: Any
    stop_tokens: frozenset[int]
    template_kwargs: dict[str, bool]

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read the tokenizer of a model folder.

        BaseModelError when it cannot be read, has no chat template, no offsets, or no token to stop on.
        """
        from transformers import AutoTokenizer, GenerationConfig

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise BaseModelError(
                f"the tokenizer in {folder} cannot be loaded: {first_line(error)}.",
                "is tokenizer.json there and whole?",
            ) from error
        if not tokenizer.chat_template:
            raise BaseModelError(
                f"{folder} has no chat template, so rows of messages cannot be rendered.",
                "use the instruct version of the model, or put a chat_template.jinja into the folder",
            )
        if not tokenizer.is_fast:
            raise BaseModelError(
                f"the tokenizer in {folder} cannot say where its tokens lie in the text.",
                "convert it to a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...))",
            )
        stops = {tokenizer.eos_token_id}
        if (folder / "generation_config.json").is_file():
            listed = GenerationConfig.from_pretrained(folder).eos_token_id
            stops |= set(listed if isinstance(listed, list) else [listed])
        stops.discard(None)
        if not stops:
            raise BaseModelError(
                f"{folder} names no token that ends generation.", "set eos_token_id in generation_config.json"
            )
        return cls(tokenizer, frozenset(stops), thinking_off(tokenizer))

    def encode(self, row: Row) -> Example:
        """Tokens and labels of a row; DataError when it cannot be told what to learn from it."""
        self._refuse_special_tokens(row)
        full, prompt = self._render(row, row.messages), self._render(row, row.prompt, add_generation_prompt=True)
        if not full.startswith(prompt):
            raise DataError(
                f"line {row.line}: the chat template renders the last reply's prompt differently in training than in "
                f"generation, so what to learn cannot be told.",
                "use another chat template: put a chat_template.jinja into the model's folder",
            )
        tokens, starts = self._tokenise(full, len(prompt))
        labels = [IGNORED] * len(tokens)
        spans = self._earlier_turns(row, full)
        for begin, end in [*(span for span in spans if span), (len(prompt), len(full))]:
            self._mark(row, tokens, starts, labels, (begin, end))
        return Example(tokens, labels, row.line, untrained_turns=sum(span is None for span in spans))

    def prompt(self, messages: list[Message]) -> list[int]:
        """Tokens that inference sends to get an answer to `messages`, the generation prompt included."""
        text = self._render(Row(messages, 0), messages, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenise(self, text: str, cut: int) -> tuple[list[int], list[int]]:
        """Token ids, and the character at which each begins; the text before and behind `cut` apart."""
        tokens: list[int] = []
        starts: list[int] = []
        for begin, part in ((0, text[:cut]), (cut, text[cut:])):
            encoded = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            tokens += encoded["input_ids"]
            starts += [begin + start for start, _ in encoded["offset_mapping"]]
        return tokens, starts

    def _earlier_turns(self, row: Row, full: str) -> list[Span | None]:
        """Characters of the assistant turns before the last; None for one that the full text renders differently."""
        spans: list[Span | None] = []
        for index in range(row.last_reply):
            if row.messages[index]["role"] == "assistant":
                prompt = self._render(row, row.messages[:index], add_generation_prompt=True)
                until = self._render(row, row.messages[: index + 1])
                told = until.startswith(prompt) and full.startswith(until)
                spans.append((len(prompt), len(until)) if told else None)
        return spans

    def _mark(self, row: Row, tokens: list[int], starts: list[int], labels: list[int], span: Span) -> None:
        """Give loss to the tokens of `span` up to the first stop token, inclusive; DataError when there is none."""
        for position, token in enumerate(tokens):
            if span[0] <= starts[position] < span[1]:
                labels[position] = token
                if token in self.stop_tokens:
                    return
        raise DataError(
            f"line {row.line}: the chat template does not end an assistant turn with a token that stops generation.",
            "the token that closes assistant turns must be in eos_token_id of generation_config.json",
        )

    def _render(self, row: Row, messages: list[Message], **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.template_kwargs, **options))
        except TemplateError as error:
            raise DataError(
                f"line {row.line}: the chat template refuses the row: {first_line(error)}.",
                "some templates take no system message, or want user and assistant to alternate",
            ) from error

    def _refuse_special_tokens(self, row: Row) -> None:
        """A turn that spells a special token would end, or begin, where nobody meant it to."""
        for number, message in enumerate(row.messages, 1):
            found = next((token for token in self.tokenizer.all_special_tokens if token in message["content"]), None)
            if found:
                raise DataError(
                    f"line {row.line}: message {number} contains {found!r}, which is a special token of this model.",
                    "remove it from the text",
                )


def thinking_off(tokenizer: Any) -> dict[str, bool]:
    """{"enable_thinking": False} where the template knows that switch: rows hold replies without thoughts."""
    from jinja2 import TemplateError

    question = [{"role": "user", "content": "?"}]
    try:
        plain, off = (
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **kwargs)
            for kwargs in ({}, {"enable_thinking": False})
        )
    except TemplateError:
        return {}
    return {"enable_thinking": False} if plain != off else {}


def first_line(error: Exception) -> str:
    """What an exception says, in one line without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def encode_rows(encoder: Encoder, rows: list[Row], longest: int, where: Path) -> list[Example]:
    """Encode all rows; DataError naming the file and the lines that are longer than `longest` tokens."""
    try:
        examples = [encoder.encode(row) for row in rows]
    except DataError as error:
        raise DataError(f"{where}, {error.message}", error.hint) from error
    too_long = [example for example in examples if len(example.input_ids) > longest]
    if too_long:
        most = max(len(example.input_ids) for example in too_long)
        lines = ", ".join(str(example.line) for example in too_long[:5]) + (", ..." if len(too_long) > 5 else "")
        raise DataError(
            f"{where}: {len(too_long)} of {len(rows)} rows are longer than {longest} tokens (lines {lines}).",
            f"the longest has {most} tokens: --sequence-length {most}, or shorten or split those rows",
        )
    return examples
