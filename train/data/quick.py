"""The warnings of `loraport data check` for a training run, from the tokens on disk that the run reads anyway.

Nothing is rendered or tokenised: a thousand rows cost a tenth of a second, and only once. What a row can have wrong by
itself is not looked for, because a run refuses such rows before; how rows relate, and whether they are enough, is.

    >>> say_warnings(warnings_of(store.subset(training), store.subset(held_out), encoder))
    warning: 2 training rows ask what the evaluation asks (rows 166, 167).
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

import numpy as np

from loraport.clients.errors import ResourceError
from loraport.clients.home import write_json
from loraport.clients.terminal import say
from loraport.train.data.check import Limits, Report, conclude
from loraport.train.data.findings import Finding
from loraport.train.data.flat import FlatTokens
from loraport.train.data.preference import sequences
from loraport.train.data.split import normalise
from loraport.train.data.store import Subset, TokenStore
from loraport.train.data.survey import SAMPLED, Survey, Surveyor, answer_of, digest, question_of
from loraport.train.data.tokens import IGNORED, Encoder

UNLIMITED = 1 << 30  # a run refuses rows that are too long by itself
CHECKS = 1  # raised when the same rows would now be warned of otherwise
NAMED = 3  # rows that a warning names


def quick_check(
    train: TokenStore | Subset, evaluation: TokenStore | Subset | None, encoder: Encoder, capacity: int | None = None
) -> Report:
    """The report on the rows of a run. `capacity`: parameters of the adapter, to compare with the tokens to learn."""
    surveyor = Surveyor(encoder, UNLIMITED)
    surveys = [
        survey_tokens(rows if isinstance(rows, Subset) else rows.subset(np.arange(len(rows))), data, surveyor)
        for rows, data in ((train, "train"), (evaluation, "eval"))
        if rows is not None
    ]
    return conclude(surveys[0], surveys[1] if len(surveys) > 1 else None, Limits(UNLIMITED, capacity))


def survey_tokens(rows: Subset, data: str, surveyor: Surveyor) -> Survey:
    """What `Surveyor.survey` keeps of rows, made of their tokens."""
    store = rows.store
    found = Survey(store.source.name, data, [str(path) for path in store.source.files])
    lines, files, groups = (column[rows.indices] for column in (store.lines, store.files, store.groups))
    while found.read < len(rows):
        here = slice(found.read, min(len(rows), found.read + surveyor.chunk))
        items = [rows[index] for index in range(here.start, here.stop)]
        tokens, *rest = (flat_tokens(part) for part in zip(*(sequences(item) for item in items), strict=True))
        other = rest[0] if rest else None
        found.pairs = other is not None
        prompts = np.where(tokens.documents, np.uint64(0), groups[here])
        replies = decode_answers(tokens, surveyor.encoder, found)
        if other:
            others = decode_answers(other, surveyor.encoder, None)
            replies = [[*own, *theirs] for own, theirs in zip(replies, others, strict=True)]
        answers = np.array([answer_of(each) for each in replies], np.uint64)
        questions = [question_of(int(prompt), each) for prompt, each in zip(prompts, replies, strict=True)]
        columns = {
            "row": lines[here],
            "file": files[here],
            "all_lengths": tokens.lengths,
            "whole": np.array([digest(item["input_ids"].tobytes()) for item in items], np.uint64),
            "prompt": prompts,
            "answer": np.where(tokens.documents, np.uint64(0), answers),
            "question": np.array(questions, np.uint64),
            **surveyor.measure(tokens, other),
        }
        for name, values in columns.items():
            found.parts.setdefault(name, []).append(values)
        found.read = here.stop
    return found


def flat_tokens(items: Sequence[dict[str, Any]]) -> FlatTokens:
    """Sequences of the store in one array."""
    labels = [item["labels"] for item in items]
    documents = [len(label) > 1 and bool(label[1] != IGNORED) for label in labels]  # others begin with a prompt
    return FlatTokens.of([item["input_ids"] for item in items], labels, documents)


def decode_answers(tokens: FlatTokens, encoder: Encoder, found: Survey | None) -> list[list[str]]:
    """The answers' texts, one a row, without differences of case and spacing; `found` samples the first ones."""
    backend = encoder.tokenizer.backend_tokenizer
    rows = [tokens.row(index) for index in range(len(tokens.lengths))]
    parts = [
        (row[:start].tolist(), row[start:].tolist()) for row, start in zip(rows, tokens.answer_starts, strict=True)
    ]
    texts = backend.decode_batch([answer for _, answer in parts])
    if found and found.sample.rows < SAMPLED:
        asked = backend.decode_batch([prompt for prompt, _ in parts])
        for prompt, answer, document in zip(asked, texts, tokens.documents, strict=True):
            if not document:
                found.sample.add(prompt, answer, thinks=False, calls=False)
    return [[normalise(text)] for text in texts]


def warnings_of(train: Subset, evaluation: Subset, encoder: Encoder) -> list[str]:
    """Errors and warnings, a sentence each; kept beside the tokens, so that the same rows are looked at once."""
    digest = sha256(json.dumps([CHECKS, evaluation.store.folder.name]).encode())
    for rows in (train, evaluation):
        digest.update(rows.indices.tobytes())
    kept = train.store.folder / f"warnings-{digest.hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):
        return [str(line) for line in json.loads(kept.read_text(encoding="utf-8"))]
    findings = quick_check(train, evaluation, encoder).findings
    found = [f"{each.message.rstrip('.')}{rows_of(each)}." for each in findings if each.level != "note"]
    with suppress(ResourceError):  # a run needs no cache
        write_json(kept, found)
    return found


def say_warnings(found: list[str]) -> None:
    """Print warnings, one line each; nothing where all is well."""
    for line in found:
        say(f"warning: {line}", "yellow")


def rows_of(finding: Finding) -> str:
    """The first rows of a finding, in brackets."""
    numbers = ", ".join(str(place.row) for place in finding.places[:NAMED])
    more = ", ..." if len(finding.places) > NAMED else ""
    return f" ({'row' if len(finding.places) == 1 else 'rows'} {numbers}{more})" if numbers else ""
