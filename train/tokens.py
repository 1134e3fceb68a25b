"""Rows to tokens: the chat template is rendered once, and loss falls on the assistant's turns and their end alone.

The trained part of a turn begins where inference would begin to generate and ends with a token that generation stops
on. A row for which that cannot be established is refused: a model trained on it would never learn to stop.

    >>> encoder = Encoder.load("examples/reader-9m")
    >>> encoder.encode(row).labels          # -100 everywhere but on "Paris", "<|im_end|>"
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import BaseModelError, DataError
from loraport.clients.rows import Row

IGNORED = -100  # torch's cross entropy skips these labels
GENERATION_MARKER = "{% generation %}"


@dataclass(frozen=True)
class Example:
    """A tokenised row: `input_ids` and `labels` of T tokens; labels are the same tokens, or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    line: int

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
    """A base's tokenizer and template, and the tokens on which its generation stops."""

    tokenizer: Any
    stop_tokens: frozenset[int]

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read the tokenizer of a model folder; BaseModelError when it has no chat template or no stop token."""
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer.chat_template:
            raise BaseModelError(
                f"{folder} has no chat template, so rows of messages cannot be rendered.",
                "use the instruct version of the model, or put a chat_template.jinja into the folder",
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
        return cls(tokenizer, frozenset(stops))

    def encode(self, row: Row) -> Example:
        """Tokens and labels of a row; DataError when a trained turn would not end in a stop token."""
        marked = GENERATION_MARKER in self.tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}")
        tokens, trained = self._masked_by_template(row) if marked else self._masked_by_prefixes(row)
        for end in range(len(tokens)):
            ends_turn = trained[end] and (end + 1 == len(tokens) or not trained[end + 1])
            if ends_turn and tokens[end] not in self.stop_tokens:
                raise DataError(
                    f"line {row.line}: an assistant turn ends in {self.tokenizer.decode(tokens[end])!r}, on which "
                    f"generation does not stop.",
                    "the chat template must close assistant turns with a token of generation_config's eos_token_id",
                )
        labels = [token if learn else IGNORED for token, learn in zip(tokens, trained, strict=True)]
        return Example(tokens, labels, row.line)

    def prompt(self, row: Row) -> list[int]:
        """Tokens that inference sends for the last assistant turn of a row, the generation prompt included."""
        rendered = self.tokenizer.apply_chat_template(
            row.prompt, add_generation_prompt=True, return_dict=True, enable_thinking=False
        )
        return list(rendered["input_ids"])

    def _masked_by_template(self, row: Row) -> tuple[list[int], list[bool]]:
        """Masks from the template's generation markers."""
        rendered = self.tokenizer.apply_chat_template(
            row.messages, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=False
        )
        return list(rendered["input_ids"]), [bool(mask) for mask in rendered["assistant_masks"]]

    def _masked_by_prefixes(self, row: Row) -> tuple[list[int], list[bool]]:
        """Masks from rendering each assistant turn's prompt: what it adds to the full text is the turn.

        Holds only where each prompt is a prefix of the full text; a template that renders earlier turns differently
        once others follow (thinking models do) is refused for rows with several assistant turns.
        """
        full = self._render(row.messages)
        encoded = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
        tokens, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
        trained = [False] * len(tokens)
        for index, message in enumerate(row.messages):
            if message["role"] == "assistant":
                prefix = self._render(row.messages[:index], add_generation_prompt=True)
                if not full.startswith(prefix):
                    raise DataError(
                        f"line {row.line}: the chat template renders message {index + 1} differently in training than "
                        f"in generation, so what to learn cannot be told.",
                        "split the conversation so that each row ends with one assistant turn, or mark the template's "
                        "assistant turns with {% generation %} ... {% endgeneration %}",
                    )
                self._mark_turn(tokens, starts, trained, len(prefix))
        return tokens, trained

    def _mark_turn(self, tokens: list[int], starts: list[int], trained: list[bool], begin: int) -> None:
        """Mark tokens from character `begin` to the first stop token after it, inclusive; to the end without one."""
        for position, token in enumerate(tokens):
            if starts[position] >= begin:
                trained[position] = True
                if token in self.stop_tokens:
                    return

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options))


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
