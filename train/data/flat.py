"""The tokens of many rows in one array, so that numpy looks at a thousand rows at once.

>>> FlatTokens.of([row.input_ids for row in rows], [row.labels for row in rows], [False, False]).trained_counts
array([8, 17], dtype=int32)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loraport.train.data.tokens import IGNORED

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class FlatTokens:
    """Rows of together T tokens, one after the other, each with at least one token.

    `ids`, `trained` (carries loss): (T,). `offsets`: where rows begin, and T: (rows + 1,). `answer_starts`: a row's
    tokens before its last trained part, all of them where nothing is trained; `trained_counts`; `documents`: whether a
    row is no conversation: (rows,).
    """

    ids: Array
    trained: Array
    offsets: Array
    answer_starts: Array
    trained_counts: Array
    documents: Array

    @classmethod
    def of(cls, rows: Sequence[Array], labels: Sequence[Array], documents: Sequence[bool]) -> "FlatTokens":
        """Those of `rows` with their labels; the first token of a row is predicted from nothing and carries no loss."""
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        ids = np.concatenate(rows).astype(np.int32)
        trained = np.concatenate(labels) != IGNORED
        trained[offsets[:-1]] = False
        begins = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))
        last = np.searchsorted(begins, offsets[1:]) - 1
        begin = np.concatenate([begins, [-1]])[last]
        starts = np.where((last >= 0) & (begin >= offsets[:-1]), begin - offsets[:-1], np.diff(offsets))
        counts = np.add.reduceat(trained, offsets[:-1], dtype=np.int32)
        return cls(ids, trained, offsets, starts.astype(np.int32), counts, np.asarray(documents, bool))

    @property
    def lengths(self) -> Array:
        """Tokens of each row."""
        lengths: Array = np.diff(self.offsets).astype(np.int32)
        return lengths

    def row(self, index: int) -> Array:
        """The tokens of one row."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def prompts(self) -> tuple[Array, Array]:
        """The tokens before the last trained part, and their offsets; of a document, all of it."""
        lengths = np.where(self.documents, self.lengths, self.answer_starts)
        return self.part(self.positions() < np.repeat(lengths, self.lengths))

    def answers(self) -> tuple[Array, Array]:
        """The tokens of the last trained part, and their offsets."""
        return self.part(self.positions() >= np.repeat(self.answer_starts, self.lengths))

    def positions(self) -> Array:
        """The position of each token in its row."""
        positions: Array = np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], self.lengths)
        return positions

    def part(self, chosen: Array) -> tuple[Array, Array]:
        """The chosen tokens, and the offsets of the rows among them."""
        counts = np.add.reduceat(chosen, self.offsets[:-1], dtype=np.int64)
        return self.ids[chosen], np.concatenate([[0], np.cumsum(counts)])

    def rows_with(self, positions: Array) -> Array:
        """Rows, as a mask, in which one of the `positions` of the whole lies."""
        mask = np.zeros(len(self.offsets) - 1, bool)
        mask[np.searchsorted(self.offsets, positions, side="right") - 1] = True
        return mask

    def ends_without(self, stops: frozenset[int]) -> Array:
        """Rows with a trained part that does not end on one of `stops`."""
        following = np.concatenate([self.trained[1:], [False]])
        following[self.offsets[1:] - 1] = False
        return self.rows_with(np.flatnonzero(self.trained & ~following & ~np.isin(self.ids, list(stops))))

    def has_twice(self, token: int) -> Array:
        """Rows in which `token` stands twice in a row."""
        first = np.zeros(len(self.ids), bool)
        first[self.offsets[:-1]] = True
        return self.rows_with(np.flatnonzero((self.ids[:-1] == token) & (self.ids[1:] == token) & ~first[1:]))
