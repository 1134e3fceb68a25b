"""How rows relate to each other: copies, near-copies, contradictions, and training rows that the evaluation asks again.

It works on the hashes and signatures of a survey alone; the rows themselves are gone by then.

    >>> [finding.message for finding in compare(train, evaluation)]
    ['2 rows are exact copies of an earlier row.']
"""

import numpy as np

from loraport.train.data.findings import Finding, Place, count_of
from loraport.train.data.flat import Array
from loraport.train.data.similar import ANSWER_SIMILAR, Pairs, similar_between, similar_within, similarity
from loraport.train.data.survey import Survey


def compare(train: Survey, evaluation: Survey | None) -> list[Finding]:
    """All findings about relations between rows."""
    found = [leaks(train, evaluation), near_leaks(train, evaluation)] if evaluation else []
    found += [duplicates(train), contradictions(train), near_duplicates(train)]
    return [finding for finding in found if finding.places]


def earliest(values: Array) -> Array:
    """For each value the index of its first occurrence."""
    if not len(values):
        return np.zeros(0, np.int64)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])


def duplicates(train: Survey) -> Finding:
    """Rows that are the same as an earlier one to the letter."""
    first = earliest(train.column("whole"))
    later = np.flatnonzero(first != np.arange(len(first)))
    places = [train.place(index, f"as {where(train, first[index])}") for index in later]
    return Finding("duplicate", places, f"{count_of(places, 'row')} {verb(places, 'repeat')} an earlier row exactly.")


def contradictions(train: Survey) -> Finding:
    """Rows that answer a prompt otherwise than its first row does, case and spacing aside; that row is listed too.

    A prompt may be asked of several pairs; what contradicts is to prefer one reply to another, and that one to it.
    """
    prompts, answers = train.column("question"), train.column("answer")
    first = earliest(prompts)
    other = np.flatnonzero((answers != answers[first]) & (prompts != 0)) if len(first) else first
    groups = np.unique(first[other])
    listed = np.unique(np.concatenate([groups, other])).astype(int)
    places = [
        train.place(index, "" if first[index] == index else f"prompt of {where(train, first[index])}")
        for index in sorted(listed, key=lambda index: (first[index], index))
    ]
    have = "has" if len(groups) == 1 else "have"
    if train.pairs:
        message = f"{count_of(groups, 'choice')} between two replies {have} been made both ways, in "
        return Finding("contradiction", places, f"{message}{count_of(places, 'row')}.", "decide for one way")
    return Finding(
        "contradiction",
        places,
        f"{count_of(groups, 'prompt')} {have} more than one answer, in {count_of(places, 'row')}.",
    )


def near_duplicates(train: Survey) -> Finding:
    """Rows that nearly repeat the prompt and the answer of an earlier one; exact copies are not among them."""
    pairs = same_answers(similar_within(train.column("prompt_signature")), train, train)
    pairs = unlike(np.concatenate([pairs, same_but_for_spacing(train)]), train, train, "whole")
    first = first_partner(pairs, train.usable)
    copies = earliest(train.column("whole"))
    later = [index for index in np.flatnonzero(first >= 0) if copies[index] == index]
    places = [train.place(index, f"like {where(train, first[index])}") for index in later]
    return Finding(
        "near_duplicate", places, f"{count_of(places, 'row')} nearly {verb(places, 'repeat')} an earlier row."
    )


def same_but_for_spacing(train: Survey) -> Pairs:
    """Pairs (later, earliest) of rows with the same prompt and answer, case and spacing aside."""
    prompts, answers = train.column("prompt"), train.column("answer")
    first = earliest(prompts * np.uint64(0x9E3779B97F4A7C15) ^ answers) if train.usable else prompts
    later = np.flatnonzero((first != np.arange(len(first))) & (prompts != 0))
    return np.stack([later, first[later]], axis=1).astype(np.int64)


def leaks(train: Survey, evaluation: Survey) -> Finding:
    """Training rows whose prompt is asked again in evaluation, case and spacing aside."""
    prompts, asked = train.column("prompt"), evaluation.column("prompt")
    found = np.flatnonzero(np.isin(prompts, asked) & (prompts != 0))
    order = np.argsort(asked, kind="stable")
    partner = order[np.searchsorted(asked[order], prompts[found])] if len(found) else found
    places = [
        train.place(index, f"as {where(evaluation, other)} of the evaluation")
        for index, other in zip(found, partner, strict=True)
    ]
    return Finding(
        "leak", places, f"{count_of(places, 'training row')} {verb(places, 'ask')} what the evaluation asks."
    )


def near_leaks(train: Survey, evaluation: Survey) -> Finding:
    """Training rows that nearly repeat the prompt and the answer of an evaluation row."""
    pairs = similar_between(train.column("prompt_signature"), evaluation.column("prompt_signature"))
    pairs = unlike(same_answers(pairs, train, evaluation), train, evaluation, "prompt")
    first = first_partner(pairs, train.usable)
    places = [
        train.place(index, f"like {where(evaluation, first[index])} of the evaluation")
        for index in np.flatnonzero((first >= 0) & ~np.isin(train.column("prompt"), evaluation.column("prompt")))
    ]
    return Finding(
        "near_leak",
        places,
        f"{count_of(places, 'training row')} nearly {verb(places, 'ask')} what the evaluation asks.",
    )


def same_answers(pairs: Pairs, left: Survey, right: Survey) -> Pairs:
    """Those of `pairs` whose answers are the same or similar: several questions on one long text are no copies."""
    ours, theirs = pairs[:, 0], pairs[:, 1]
    same = left.column("answer")[ours] == right.column("answer")[theirs]
    near = similarity(left.column("answer_signature")[ours], right.column("answer_signature")[theirs])
    chosen: Pairs = pairs[same | (near >= ANSWER_SIMILAR)]
    return chosen


def unlike(pairs: Pairs, left: Survey, right: Survey, column: str) -> Pairs:
    """Those of `pairs` that differ in `column`."""
    chosen: Pairs = pairs[left.column(column)[pairs[:, 0]] != right.column(column)[pairs[:, 1]]]
    return chosen


def first_partner(pairs: Pairs, rows: int) -> Array:
    """For each row the lowest partner it has in `pairs`, or -1."""
    first = np.full(rows, np.iinfo(np.int64).max)
    np.minimum.at(first, pairs[:, 0], pairs[:, 1])
    return np.where(first == np.iinfo(np.int64).max, -1, first)


def where(survey: Survey, index: int) -> str:
    """A row in words: its number, and its file where there are several."""
    place = survey.place(int(index))
    return f"row {place.row}" if len(survey.files) == 1 else f"{place.file}, row {place.row}"


def verb(places: list[Place], plain: str) -> str:
    """A verb that agrees with the number of rows."""
    return f"{plain}s" if len(places) == 1 else plain
