"""Which rows are nearly the same: MinHash over runs of three tokens, in numpy, a few hundred bytes a row.

Two rows are near-copies when their prompts share most runs of tokens and their answers do too. Runs that stand in many
rows (the chat template, an instruction that is repeated) say nothing and are left out; otherwise two questions under
one long instruction would look alike. No libraries for this: they hash words in Python, some 0.3 ms a row, and the
tokens are at hand as arrays already. Exact copies are not found here: see `survey`.

    >>> signer = Signer(64)
    >>> signer.learn_common(tokens, offsets)
    >>> near_copies(signer.sign(tokens, offsets))      # (later, earlier) rows
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]  # of many rows, one after the other
Offsets = npt.NDArray[np.int64]  # where each row begins, and at the end their number: (rows + 1,)
Hashes = npt.NDArray[np.uint32]
Signatures = npt.NDArray[np.uint16]  # (rows, values): the lower half of each minimum; all EMPTY where there is none
Pairs = npt.NDArray[np.int64]  # (pairs, 2)

RUN = 3  # tokens in a shingle
BANDS, BAND = 12, 5  # 12 bands of 5 values find 99% of the pairs at a similarity of 0.8, and 5% of those at 0.4
PROMPT_VALUES, ANSWER_VALUES = BANDS * BAND, 20
SIMILAR = 0.8  # share of shingles that near-copies have in common (Jaccard), estimated to within 0.05
ANSWER_SIMILAR = 0.7
COMMON_SHARE, COMMON_ROWS = 0.1, 8  # a shingle in more rows than either is boilerplate
FEWEST_RUNS = 6  # a prompt with fewer shingles of its own is too short to be called a near-copy
LOOKED_AT = 4  # most rows of one bucket that a row is compared with
EMPTY = np.uint16(0xFFFF)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread 64-bit values evenly (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def shingles(tokens: Tokens, offsets: Offsets) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """A 32-bit hash of each run of RUN tokens within a row, and the row of each; shorter rows have none."""
    if len(tokens) < RUN:
        return np.zeros(0, np.uint32), np.zeros(0, np.int64)
    wide = tokens.astype(np.uint64)
    hashes = np.zeros(len(tokens) - RUN + 1, np.uint64)
    for step in range(RUN):
        hashes = mix(hashes + wide[step : step + len(hashes)] + np.uint64(0x9E3779B97F4A7C15))
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    whole = owner[: len(hashes)] == owner[RUN - 1 :]
    return (hashes[whole] >> np.uint64(32)).astype(np.uint32), owner[: len(hashes)][whole]


@dataclass
class Signer:
    """Makes signatures of `values` numbers a row. `common`: the sorted shingles that are left out."""

    values: int
    fewest: int = 1
    common: Hashes = field(default_factory=lambda: np.zeros(0, np.uint32))

    def learn_common(self, tokens: Tokens, offsets: Offsets) -> None:
        """Take the shingles that stand in more than COMMON_SHARE of these rows as boilerplate."""
        hashes, owner = shingles(tokens, offsets)
        once = np.unique(hashes.astype(np.uint64) << np.uint64(32) | owner.astype(np.uint64)) >> np.uint64(32)
        found, counts = np.unique(once.astype(np.uint32), return_counts=True)
        self.common = found[counts > max(COMMON_ROWS, COMMON_SHARE * (len(offsets) - 1))]

    def sign(self, tokens: Tokens, offsets: Offsets) -> Signatures:
        """Signatures of rows; EMPTY for those with fewer than `fewest` shingles of their own."""
        hashes, owner = shingles(tokens, offsets)
        if len(self.common):
            at = np.minimum(np.searchsorted(self.common, hashes), len(self.common) - 1)
            own = self.common[at] != hashes
            hashes, owner = hashes[own], owner[own]
        signatures = np.full((len(offsets) - 1, self.values), EMPTY)
        counts = np.bincount(owner, minlength=len(offsets) - 1)
        long_enough = counts >= max(1, self.fewest)
        hashes = hashes[long_enough[owner]]
        if len(hashes):
            counts = counts[long_enough]
            starts = np.cumsum(counts) - counts
            minima = np.empty((len(counts), self.values), np.uint32)
            for index, (flip, factor) in enumerate(zip(*permutations(self.values), strict=True)):
                minima[:, index] = np.minimum.reduceat((hashes ^ flip) * factor, starts)
            signatures[long_enough] = minima.astype(np.uint16)
        return signatures


def permutations(values: int) -> tuple[Hashes, Hashes]:
    """The same `values` pairs of numbers each time: what is xored and multiplied for each value of a signature."""
    random = np.random.default_rng(0)
    flips = random.integers(0, 2**32, values, np.uint32)
    return flips, random.integers(0, 2**31, values, np.uint32) * np.uint32(2) + np.uint32(1)


def band_keys(signatures: Signatures, band: int) -> npt.NDArray[np.uint64]:
    """One number for each row's values in a band: rows with equal numbers are worth comparing."""
    keys = np.zeros(len(signatures), np.uint64)
    for column in range(band * BAND, (band + 1) * BAND):
        keys = mix(keys + signatures[:, column].astype(np.uint64) + np.uint64(1))
    return keys


def similarity(left: Signatures, right: Signatures) -> npt.NDArray[np.float64]:
    """Estimated share of shingles in common, row by row; 0 where a row has no signature."""
    there = (left[:, 0] != EMPTY) | (left[:, 1] != EMPTY)
    return np.asarray(np.where(there, (left == right).mean(axis=1), 0.0))


def similar_within(signatures: Signatures) -> Pairs:
    """Pairs (later, earlier) of rows at least SIMILAR; in a large group not all pairs, but each row at least once."""
    found = []
    signed = np.flatnonzero((signatures[:, 0] != EMPTY) | (signatures[:, 1] != EMPTY))
    for band in range(BANDS):
        keys = band_keys(signatures[signed], band)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, bool)
        first_of = np.maximum.accumulate(np.where(is_first, np.arange(len(ordered)), 0))
        rest = np.flatnonzero(~is_first)
        for earlier in (first_of[rest], rest - 1):
            found.append(np.stack([signed[order[rest]], signed[order[earlier]]], axis=1))
    return keep_similar(np.concatenate(found), signatures, signatures)


def similar_between(queries: Signatures, corpus: Signatures) -> Pairs:
    """Pairs (row of `queries`, row of `corpus`) that are at least SIMILAR, at most LOOKED_AT a query and band."""
    found = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        keys, wanted = band_keys(corpus, band), band_keys(queries, band)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        left, right = np.searchsorted(ordered, wanted, "left"), np.searchsorted(ordered, wanted, "right")
        for step in range(LOOKED_AT):
            hit = np.flatnonzero(left + step < right)
            found.append(np.stack([hit, order[left[hit] + step]], axis=1))
    return keep_similar(np.concatenate(found), queries, corpus)


def keep_similar(pairs: Pairs, left: Signatures, right: Signatures) -> Pairs:
    """Those of `pairs` that are at least SIMILAR, each once, in order."""
    pairs = np.unique(pairs, axis=0) if len(pairs) else pairs
    block = 65_536  # pairs at a time: their signatures are copied
    kept = [
        part[similarity(left[part[:, 0]], right[part[:, 1]]) >= SIMILAR]
        for part in (pairs[at : at + block] for at in range(0, len(pairs), block))
    ]
    return np.concatenate(kept) if kept else pairs
