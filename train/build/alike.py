"""Which texts are nearly the same: MinHash signatures of word shingles, and bands that bring likely pairs together.

The estimate of a pair's overlap is exact to about 0.1; candidates are compared by their shingles themselves.

    >>> clusters(["the cat sat on the mat today", "the cat sat on the mat today!", "quite another thing"])
    [[0, 1], [2]]
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

HASHES, BANDS = 32, 16  # two hashes a band: pairs that overlap by half meet in one band or another with 99%
PRIME = (1 << 61) - 1
FACTORS = [(0x9E3779B97F4A7C15 * (2 * at + 1) % PRIME, 0xC2B2AE3D27D4EB4F * (at + 7) % PRIME) for at in range(HASHES)]
SAMPLE = 4000  # shingles of a text that are hashed: the smallest ones, which are the same ones in a similar text


def normal(text: str) -> str:
    """A text's words alone, in small letters."""
    return " ".join(re.findall(r"\w+", text.lower()))


def shingles(text: str, words: int) -> frozenset[int]:
    """Hashes of all runs of so many words; of the whole text where it is shorter."""
    parts = normal(text).split()
    runs = (" ".join(parts[at : at + words]) for at in range(max(1, len(parts) - words + 1)))
    found = {zlib.crc32(run.encode()) for run in runs}
    return frozenset(sorted(found)[:SAMPLE])


def signature(hashes: frozenset[int]) -> tuple[int, ...]:
    """The smallest value of each hash function over all shingles."""
    return tuple(min((a * value + b) % PRIME for value in hashes) for a, b in FACTORS)


def overlap(one: frozenset[int], other: frozenset[int]) -> float:
    """The share of the smaller text's shingles that the other has too."""
    return len(one & other) / max(1, min(len(one), len(other)))


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Shared shingles over all shingles."""
    return len(one & other) / max(1, len(one | other))


def clusters(texts: Sequence[str], words: int = 3, threshold: float = 0.5) -> list[list[int]]:
    """Indices of texts, those together that share `threshold` of their shingles; in the order of their first one."""
    sets = [shingles(text, words) for text in texts]
    parents = list(range(len(texts)))

    def root(at: int) -> int:
        while parents[at] != at:
            parents[at] = parents[parents[at]]
            at = parents[at]
        return at

    for one, other in candidates(sets):
        a, b = root(one), root(other)
        if a != b and jaccard(sets[one], sets[other]) >= threshold:
            parents[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = defaultdict(list)
    for at in range(len(texts)):
        groups[root(at)].append(at)
    return [groups[key] for key in sorted(groups)]


def candidates(sets: Sequence[frozenset[int]]) -> set[tuple[int, int]]:
    """Pairs of indices that agree in a band of their signatures; each with the first that it agrees with."""
    seen: dict[tuple[int, ...], int] = {}
    pairs = set()
    rows = HASHES // BANDS
    for at, hashes in enumerate(sets):
        signed = signature(hashes) if hashes else ()
        for band in range(BANDS if signed else 0):
            first = seen.setdefault((band, *signed[band * rows : (band + 1) * rows]), at)
            if first != at:
                pairs.add((first, at))
    return pairs


class Seen:
    """Questions that were asked: whether a new one is the same as, or nearly the same as, an earlier one."""

    def __init__(self, threshold: float = 0.9) -> None:
        self.threshold = threshold
        self.exact: set[str] = set()
        self.bands: dict[tuple[int, ...], list[frozenset[int]]] = defaultdict(list)

    def add(self, text: str, near: bool = False) -> str:
        """Remember a text; "" when it is new, else how it was seen: "the same" or, with `near`, "nearly the same"."""
        key = normal(text)
        if key in self.exact:
            return "the same"
        self.exact.add(key)
        return self.add_near(text) if near else ""

    def add_near(self, text: str) -> str:
        """Remember the words of a text; whether one of nearly the same words was there."""
        hashes = shingles(text, 1)
        signed = signature(hashes)
        keys = [(band, *signed[band * 2 : band * 2 + 2]) for band in range(BANDS)]
        found = any(jaccard(hashes, other) >= self.threshold for k in keys for other in self.bands.get(k, ())[:20])
        for k in keys:
            self.bands[k].append(hashes)
        return "nearly the same" if found else ""
