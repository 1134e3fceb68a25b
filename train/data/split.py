"""Which rows are held out: every n-th question, never one that is trained on.

Rows with the same prompt, whatever its case and spacing, are a group, and a group goes one way as a whole: an answer
that was trained would make the held-out rows look better than the adapter is. Only 8 bytes a row are needed for it.

    >>> training, held_out = split(np.array([7, 7, 8, 9], dtype=np.uint64), 0.25, 200)
    >>> training.tolist(), held_out.tolist()
    ([0, 1, 2], [3])
"""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from loraport.clients.rows import Row

Indices = NDArray[np.int64]


def prompt_text(row: Row) -> str:
    """What a row asks, without differences of case and spacing; of a document, its text."""
    if row.text is not None:
        return normalise(row.text)
    parts = (f"{message['role']} {normalise(message['content'])}" for message in row.prompt)
    tools = json.dumps([row.tools], sort_keys=True) if row.tools else ""
    return "\n".join((tools, *parts))


def normalise(text: str) -> str:
    """`text` in lower case, with single spaces."""
    return " ".join(text.lower().split())


def group_of(row: Row) -> int:
    """64 bits of a hash of what a row asks: rows with the same number are one group."""
    return int.from_bytes(hashlib.blake2b(prompt_text(row).encode("utf-8", "surrogatepass"), digest_size=8).digest())


def split(groups: NDArray[np.uint64], fraction: float, most: int) -> tuple[Indices, Indices]:
    """Indices of training and held-out rows: about `fraction` of the rows, at most `most`, at least one.

    Groups are taken evenly over the file. The training part is empty where all rows are one group.
    """
    wanted = min(most, max(1, round(len(groups) * fraction)))
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    order = np.argsort(first)
    first, sizes = first[order], sizes[order]
    picked = spread(len(first), max(1, round(wanted * len(first) / len(groups))))
    within = np.cumsum(sizes[picked]) <= wanted
    within[np.argmin(sizes[picked])] |= not within.any()
    held = np.isin(groups, groups[first[picked[within]]])
    return np.flatnonzero(~held), np.flatnonzero(held)


def spread(count: int, most: int) -> Indices:
    """At most `most` of `count` indices, evenly spaced."""
    return np.arange(count) if count <= most else np.arange(most) * count // most
