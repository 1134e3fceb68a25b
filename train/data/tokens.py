"""Rows to tokens: the chat template is rendered once, and loss falls on the assistant's turns and their end alone.

The trained part of a turn begins where inference would begin to generate and ends with a token that generation stops
on. It is found by rendering the turn's prompt: what follows in the full text is the turn. Prompt and last turn are
tokenised apart, so that the tokens before the trained part are exactly those that inference sends. A row for which
none of this can be established is refused: a model trained on it would never learn to stop. A document of plain text
has no template: it is trained whole, with the model's first token before it and a stop token at its end.

Trainer and checker share one path, `encode_many`. It renders a batch of rows while the tokenizer, which is Rust and
needs no interpreter, works on the batch before.

    >>> encoder = Encoder.load("examples/reader-9m")
    >>> encoder.encode(row).labels          # -100 everywhere but on "Paris", "<|im_end|>"
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraport.clients.errors import BaseModelError, DataError
from loraport.clients.rows import BadRow, Message, Row
from loraport.train.data.preference import encode_pairs
from loraport.train.data.template import Rendered, Span, Template, Tools
from loraport.train.data.template import first_line as first_line

IGNORED = -100  # torch's cross entropy skips these labels
GROUP_ROWS, GROUP_CHARACTERS = 256, 1 << 20  # of rows that are tokenised together, whichever is reached first
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised row: `input_ids` and `labels` of T tokens; labels are the same tokens, or IGNORED.

    `untrained_turns`: assistant turns before the last that carry no loss, because the template renders them
    differently once others follow (thinking models drop thoughts there). `thinking`: rendered with thinking on.
    `rejected`: of a preference row, whose tokens these are with the preferred reply, those with the other one.
    """

    input_ids: Ints
    labels: Ints
    line: int
    untrained_turns: int = 0
    thinking: bool = False
    row: Row | None = None
    rejected: "Example | None" = None

    @property
    def features(self) -> dict[str, Ints]:
        """The form in which transformers' samplers take rows."""
        return {"input_ids": self.input_ids, "labels": self.labels}

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that carry loss; the first token of a row never does."""
        return int(np.count_nonzero(np.asarray(self.labels)[1:] != IGNORED))


Encodings = tuple[Iterator[Any], Iterator[Any]]  # the tokenizer's, of plain texts and of placed ones


@dataclass(frozen=True)
class Batch:
    """Rows with what the template made of them (None: it has no part in it), and the texts to tokenise, in order.

    `placed`: prompts with trained turns in them, for which the tokenizer must say where its tokens lie.
    """

    rows: list[Row | BadRow]
    rendered: list[Rendered | None]
    plain: list[str]
    placed: list[str]


@dataclass(frozen=True)
class Encoder:
    """A base's tokenizer and template, the tokens on which its generation stops, and what the template is given.

    `template_kwargs` are those of inference; a row of a mixed data set is rendered in its own mode.
    """

    tokenizer: Any
    stop_tokens: frozenset[int]
    template_kwargs: dict[str, bool]
    template: Template

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read the tokenizer of a model folder.

        BaseModelError when it cannot be read, has no chat template, no offsets, or no token to stop on.
        """
        from transformers import AutoTokenizer

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
        template = Template.of(tokenizer)
        return cls(tokenizer, find_stop_tokens(tokenizer, Path(folder)), template.kwargs(False), template)

    def for_data(self, thinking: int, rows: int) -> "Encoder":
        """This encoder with the `template_kwargs` that inference shall use after training on such rows.

        The mode of most rows: a chat client that says nothing about thinking then gets what was mostly trained. Of a
        mixed data set each row is still trained in its own mode, and a client may ask for the other.
        """
        return replace(self, template_kwargs=self.template.kwargs(2 * thinking > rows))

    def explain(self, thinking: int, rows: int) -> str:
        """One sentence on which mode is recorded for inference and why; empty where there is nothing to choose."""
        if not self.template.switch or not thinking:
            return ""
        chosen = "on" if 2 * thinking > rows else "off"
        if thinking == rows:
            return "all rows have thoughts: the adapter is served with thinking on"
        return (
            f"{thinking:,} of {rows:,} rows have thoughts: each is trained in its own mode, and the adapter is served "
            f"with thinking {chosen}, as most are; a request may set {self.template.switch} otherwise"
        )

    def encode(self, row: Row) -> Example:
        """Tokens and labels of a row; DataError when it cannot be told what to learn from it."""
        (example,) = self.encode_many([row])
        if isinstance(example, BadRow):
            raise example.error
        return example

    def encode_many(self, rows: Iterable[Row | BadRow]) -> Iterator[Example | BadRow]:
        """Examples of rows, in order; a BadRow for each that cannot be trained on, and for each that is one already."""
        return encode_pairs(self._encode_each, rows)

    def _encode_each(self, rows: Iterable[Row | BadRow]) -> Iterator[Example | BadRow]:
        with ThreadPoolExecutor(1) as worker:
            waiting: deque[tuple[Batch, Future[Encodings]]] = deque()
            try:
                for group in in_groups(rows):
                    batch = self._render(group)
                    waiting.append((batch, worker.submit(self._tokenise, batch)))
                    if len(waiting) > 1:
                        yield from self._label(*waiting.popleft())
                while waiting:
                    yield from self._label(*waiting.popleft())
            finally:
                worker.shutdown(cancel_futures=True)

    def prompt(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Tokens that inference sends to get an answer to `messages`, the generation prompt included."""
        thinking = any(self.template_kwargs.values())
        return self._prompt(Row(messages, 0, tools), len(messages), thinking)

    def prompt_of(self, row: Row) -> list[int]:
        """Tokens that inference sends to get the row's last trained turn, in the row's own mode of thinking."""
        return self._prompt(row, row.last_reply, self.template.thinks(row))

    def _prompt(self, row: Row, count: int, thinking: bool) -> list[int]:
        messages = self.template.adapt(row)[:count]
        text = self.template.render(messages, row.tools, thinking, prompt=True, where=row.where)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, group: list[Row | BadRow]) -> "Batch":
        """Rows through the template, and the texts to tokenise."""
        batch = Batch([], [], [], [])
        for row in group:
            made = None
            try:
                if isinstance(row, Row) and row.text is not None:
                    self.template.refuse_special_tokens(row)
                    batch.plain.append(row.text)
                elif isinstance(row, Row):
                    made = self.template.render_row(row)
                    (batch.placed if made.earlier else batch.plain).append(made.text[: made.cut])
                    batch.plain.append(made.text[made.cut :])
                batch.rows.append(row)
            except DataError as error:
                batch.rows.append(BadRow(row.line, row.where, error, row.source))
            batch.rendered.append(made)
        return batch

    def _tokenise(self, batch: "Batch") -> "Encodings":
        """Encodings of the plain texts and of the placed ones, without the tokens that the tokenizer would add."""
        tokenizer = self.tokenizer.backend_tokenizer
        plain = tokenizer.encode_batch_fast(batch.plain, add_special_tokens=False)  # a fifth less without offsets
        return iter(plain), iter(tokenizer.encode_batch(batch.placed, add_special_tokens=False))

    def _label(self, batch: "Batch", tokenised: "Future[Encodings]") -> Iterator[Example | BadRow]:
        plain, placed = tokenised.result()
        for row, made in zip(batch.rows, batch.rendered, strict=True):
            if isinstance(row, BadRow):
                yield row
            elif made is None:
                yield self._document(row, next(plain))
            else:
                prompt = next(placed if made.earlier else plain)
                try:
                    yield self._conversation(row, made, prompt, next(plain))
                except DataError as error:
                    yield BadRow(row.line, row.where, error, row.source)

    def _document(self, row: Row, encoding: Any) -> Example:
        """A document: the model's first token where it wants one, all of the text, and a token to stop on."""
        first = [self.tokenizer.bos_token_id] if self.begins_with_bos else []
        ids = np.array([*first, *encoding.ids, self.final_token], dtype=np.int32)
        return Example(ids, ids, row.line, row=row)

    def _conversation(self, row: Row, made: Rendered, prompt: Any, turn: Any) -> Example:
        """A conversation: loss on the last turn, and on the earlier ones that the prompt holds as they were said."""
        before = prompt.ids
        tokens = before + turn.ids
        ids = np.array(tokens, dtype=np.int32)
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        earlier = (tokens_of(prompt, span, made.cut) for span in made.earlier)
        for first, behind in (*earlier, (len(before), len(tokens))):
            end = self._first_stop(tokens, first, behind)
            if end is None:
                raise DataError(
                    f"{row.where}: the chat template does not end an assistant turn with a token that stops "
                    f"generation.",
                    "the token that closes assistant turns must be in eos_token_id of generation_config.json",
                )
            labels[first : end + 1] = ids[first : end + 1]
        bos = self.tokenizer.bos_token_id
        if bos is not None and tokens[:2] == [bos, bos]:
            raise DataError(
                f"{row.where}: it begins with {self.tokenizer.bos_token!r} twice.",
                "the chat template writes it more than once: put a corrected chat_template.jinja into the folder",
            )
        return Example(ids, labels, row.line, made.untrained, made.thinking, row)

    def _first_stop(self, tokens: list[int], first: int, behind: int) -> int | None:
        """The position of the first stop token from `first` on and before `behind`, if there is one."""
        found = None
        for stop in self.stop_tokens:
            with suppress(ValueError):  # list.index, because a loop over tokens takes as long as all the rest
                found = behind = tokens.index(stop, first, behind)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides about tokens and labels; of the day too, where the template prints it."""
        today = date.today().isoformat() if "strftime_now" in self.template.source else ""
        parts = [self.template.source, self.template.constants, sorted(self.stop_tokens), self.begins_with_bos, today]
        text = self.tokenizer.backend_tokenizer.to_str() + json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def final_token(self) -> int:
        """The token that ends a document."""
        eos = self.tokenizer.eos_token_id
        return int(eos if eos in self.stop_tokens else min(self.stop_tokens))

    @cached_property
    def begins_with_bos(self) -> bool:
        """Whether the model's texts begin with its BOS token: its tokenizer adds it, or its template writes it."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return False
        added = self.tokenizer("a")["input_ids"][:1] == [bos]
        return added or self.prompt([{"role": "user", "content": "a"}])[:1] == [bos]


def find_stop_tokens(tokenizer: Any, folder: Path) -> frozenset[int]:
    """The tokens on which generation stops; BaseModelError when there is none."""
    from transformers import GenerationConfig

    stops = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
        stops |= set(listed if isinstance(listed, list) else [listed])
    stops.discard(None)
    if not stops:
        raise BaseModelError(
            f"{folder} names no token that ends generation.", "set eos_token_id in generation_config.json"
        )
    return frozenset(stops)


def tokens_of(encoding: Any, span: Span, length: int) -> Span:
    """The tokens that begin within some characters of an encoded text of `length`: first, and one behind the last."""
    return token_at(encoding, span[0], length), token_at(encoding, span[1], length)


def token_at(encoding: Any, position: int, length: int) -> int:
    """The first token that begins at character `position` or behind it."""
    for character in range(position, length):
        token = encoding.char_to_token(character)
        if token is not None and encoding.token_to_chars(token)[0] >= position:
            return int(token)
    return len(encoding.ids)


def in_groups(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    """Rows in lists that bound what is held at once."""
    group: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        group.append(row)
        if isinstance(row, Row):
            characters += len(row.text or "") + sum(len(message["content"]) for message in row.messages)
        if len(group) == GROUP_ROWS or characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
