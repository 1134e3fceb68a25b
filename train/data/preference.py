"""Preference rows as pairs of sequences: the conversation with its preferred reply, and with the other one.

A pair passes through the encoder as two rows and comes out as one Example whose `rejected` is the second. Both share
the prompt to the token, and the mode of thinking: a pair thinks when one of its replies does. Which rows a run takes is
its `method`: sft learns what rows say, dpo which of two replies is preferred; each refuses the other's rows.

    >>> [len(example.rejected.input_ids) for example in encoder.encode_many(of_method(rows, "dpo"))]
    [31, 28]
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from loraport.clients.errors import DataError
from loraport.clients.rows import BadRow, Row

if TYPE_CHECKING:
    from loraport.train.data.store import TokenStore
    from loraport.train.data.tokens import Example

Outcome = Union["Example", BadRow]
# What is wrong with a row of the other method, and what helps.
REFUSALS = {
    "sft": (
        "it is a preference row, and the run's method is sft.",
        "train it with --method dpo, or with --format chat where its rows have 'messages' too",
    ),
    "dpo": (
        "it is no preference row, which --method dpo learns from.",
        "give rows with a preferred and a non-preferred output, or train with --method sft",
    ),
}


def encode_pairs(
    encode: Callable[[Iterator[Row | BadRow]], Iterator[Outcome]], rows: Iterable[Row | BadRow]
) -> Iterator[Outcome]:
    """What `encode` makes of rows, one outcome each in order. Of a pair it is given both rows, and what comes is
    put together; a pair is bad where one of the two is.
    """
    are_pairs: deque[bool] = deque()

    def doubled() -> Iterator[Row | BadRow]:
        for row in rows:
            are_pairs.append(isinstance(row, Row) and row.rejected is not None)
            yield row
            if isinstance(row, Row) and row.rejected is not None:
                yield row.swapped

    found = encode(doubled())
    for first in found:
        if not are_pairs.popleft():
            yield first
            continue
        second = next(found)
        if isinstance(first, BadRow):
            yield first
        else:
            yield of_rejected(second) if isinstance(second, BadRow) else replace(first, rejected=second)


def of_rejected(bad: BadRow) -> BadRow:
    """The refusal of a pair for its other reply, in words that say so."""
    reason = bad.error.message.removeprefix(bad.where).lstrip(":, ")
    error = DataError(f"{bad.where}: with its non-preferred output, {reason}", bad.error.hint)
    return BadRow(bad.line, bad.where, error, bad.source)


def of_method(rows: Iterable[Row | BadRow], method: str) -> Iterator[Row | BadRow]:
    """`rows`, those that are not for `method` as bad ones; auto: as the first row is."""
    for row in rows:
        if isinstance(row, Row):
            kind = "sft" if row.rejected is None else "dpo"
            method = kind if method == "auto" else method
            if kind != method:
                row = BadRow(row.line, row.where, refusal(method, row.where), row.source)
        yield row


def refusal(method: str, where: str) -> DataError:
    """Why a row of the other method cannot be trained."""
    problem, hint = REFUSALS[method]
    return DataError(f"{where}: {problem}", hint)


def refuse_other_method(store: "TokenStore", method: str) -> None:
    """DataError for the first row of tokens in the cache that `method` does not train."""
    wrong = np.flatnonzero((store.chosen > 0) != (method == "dpo"))
    if len(wrong):
        first = int(wrong[0])
        line, file = int(store.lines[first]), str(store.source.files[int(store.files[first])])
        raise BadRow(line, store.where(first), refusal(method, store.where(first)), file).error


def sequences(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The sequences of a tokenised row as it lies in the store: one, or of a pair the preferred and the other one."""
    cut = item.get("chosen", 0)
    if not cut:
        return [item]
    parts = slice(cut), slice(cut, None)
    return [{key: item[key][part] for key in ("input_ids", "labels")} for part in parts]
