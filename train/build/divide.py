"""Rows into training and evaluation, by document, so that nothing that is asked in one was learnt in the other.

Documents that are nearly the same stay together. With one document, or with one that holds most rows, the split is by
its chapters, which is weaker, and said.

    >>> divided = divide(pairs, documents, fraction=0.1, seed=0)
    >>> divided.by, len(divided.train), len(divided.evaluation)
    ('document', 180, 20)
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from loraport.train.build.alike import clusters, normal
from loraport.train.build.documents import Document
from loraport.train.build.questions import Pair

SAME_DOCUMENT = 0.5  # share of word triples from which two documents stay together
SHORT_ANSWER = 8  # words up to which two documents may say the same by chance


@dataclass(frozen=True)
class Divided:
    """The two sides. `by`: document, chapter or section; `leaks`: evaluation pairs that training has, left out."""

    train: list[Pair]
    evaluation: list[Pair]
    by: str
    groups: int
    leaks: int


def divide(pairs: Sequence[Pair], documents: Sequence[Document], fraction: float, seed: int) -> Divided:
    """Train and evaluation pairs; about `fraction` of them for evaluation."""
    if fraction <= 0 or len(pairs) < 2:
        return Divided(list(pairs), [], "document", 0, 0)
    same = together(documents)
    ways = [(by, grouped(pairs, same, depth)) for by, depth in (("document", 0), ("chapter", 2), ("section", 9))]
    choices = [(by, groups, choose(groups, fraction * len(pairs), seed)) for by, groups in ways]
    by, groups, chosen = next((choice for choice in choices if choice[2]), choices[-1])
    train = [pair for key, members in groups.items() if key not in chosen for pair in members]
    evaluation = [pair for key, members in groups.items() if key in chosen for pair in members]
    kept = without_leaks(train, evaluation)
    return Divided(train, kept, by, len(groups), len(evaluation) - len(kept))


def together(documents: Sequence[Document]) -> dict[str, str]:
    """For each document's name, the name of the first that is nearly the same."""
    found = clusters([document.text for document in documents], words=3, threshold=SAME_DOCUMENT)
    return {documents[at].name: documents[members[0]].name for members in found for at in members}


def grouped(pairs: Sequence[Pair], same: dict[str, str], depth: int) -> dict[str, list[Pair]]:
    """Pairs by document, or by the first `depth` headings in it."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        headings = pair.source.heading.split(" > ")[:depth]
        groups["\0".join([same.get(pair.source.file, pair.source.file), *headings])].append(pair)
    return groups


def choose(groups: dict[str, list[Pair]], wanted: float, seed: int) -> set[str]:
    """Groups for evaluation: in an order made by hashing, each that does not go beyond what is wanted by half."""
    chosen: set[str] = set()
    size = 0
    for key in sorted(groups, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest()):
        if size < wanted and size + len(groups[key]) <= max(1.0, 1.5 * wanted):
            chosen.add(key)
            size += len(groups[key])
    return chosen if size >= wanted / 2 and len(chosen) < len(groups) else set()


def without_leaks(train: list[Pair], evaluation: list[Pair]) -> list[Pair]:
    """The evaluation pairs whose question and answer training does not have."""
    questions = {normal(pair.question) for pair in train}
    answers = {normal(pair.answer) for pair in train}
    return [
        pair
        for pair in evaluation
        if normal(pair.question) not in questions
        and (normal(pair.answer) not in answers or len(pair.answer.split()) <= SHORT_ANSWER)
    ]
