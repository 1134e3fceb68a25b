"""Documents into rows, from top to bottom: find, read, split, ask, check, divide, write.

>>> built = build([Path("docs")], Path("rows"), Settings())
>>> built.rows, built.out
(212, [PosixPath('rows/train.jsonl'), PosixPath('rows/eval.jsonl')])
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loraport.clients.errors import DataError, EndpointError, UsageError, os_errors
from loraport.train.build.alike import Seen, normal
from loraport.train.build.checks import malformed, problem
from loraport.train.build.divide import Divided, divide
from loraport.train.build.documents import Counter as Tokens
from loraport.train.build.documents import Document
from loraport.train.build.journal import Journal
from loraport.train.build.lengths import TEMPLATE_TOKENS, counter
from loraport.train.build.pieces import Piece, merge, shown, split
from loraport.train.build.questions import Asker, Pair, Source, pairs_of_piece, source_of, with_context
from loraport.train.build.readers import read_file
from loraport.train.build.sources import Skipped, Unreadable, find_files
from loraport.train.build.subject import project_of
from loraport.train.build.symbols import pairs_of_symbol
from loraport.train.build.wording import Choice
from loraport.train.build.writer import Ask, Reading, write

QUESTION_TOKENS = 64  # kept free for the question when pieces are cut
CONTEXT_SHARE = 0.6  # of the context that an answer may be, for copying it to be an exercise


@dataclass(frozen=True)
class Settings:
    """How rows are made. `model`: whose tokens are counted; `subject`: what the documents are about."""

    model: str | None = None
    max_tokens: int = 1024
    subject: str | None = None
    with_context: bool = False
    with_code: bool = False
    phrasings: int = 1
    eval_fraction: float = 0.1
    seed: int = 0
    force: bool = False
    ask: Ask | None = None
    ask_only: bool = False


@dataclass
class Built:
    """What came of it. `dropped`: pieces and pairs left out, by reason; `counted`: how tokens were counted."""

    subject: str
    counted: str
    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    pieces: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    reused: int = 0
    unwritten: Counter[str] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=list)
    divided: Divided = field(default_factory=lambda: Divided([], [], "document", 0, 0))
    out: list[Path] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows written."""
        return len(self.divided.train) + len(self.divided.evaluation)

    def drop(self, reason: str, example: str = "") -> None:
        """Count what is left out, with the first example of each reason."""
        self.dropped[reason] += 1
        if example:
            self.examples.setdefault(reason, example)


def build(
    sources: list[Path], out: Path, settings: Settings, progress: Callable[[int, int], None] = lambda done, of: None
) -> Built:
    """Make rows of the documents in `sources` and write them to `out`, a folder or a .jsonl file.

    Raises UsageError for sources and files in the way, DataError when no row comes of it, EndpointError.
    """
    paths = places(out, settings)
    count, counted, special = counter(settings.model)
    files, skipped = find_files(sources)
    built = Built("", counted, skipped=skipped)
    for file in files:
        try:
            built.documents.append(read_file(file))
        except Unreadable as error:
            built.skipped.append(Skipped(file.name, error.message))
        except RecursionError:
            built.skipped.append(Skipped(file.name, "nested too deeply"))
    leave_out_copies(built)
    if not built.documents:
        raise DataError(nothing_read(sources, built), "give Markdown, HTML, text, PDF, reStructuredText or source code")
    built.subject = settings.subject or project_of(sources, built.documents)
    bound = max(32, settings.max_tokens - TEMPLATE_TOKENS - QUESTION_TOKENS)
    pieces = {document.name: split(document, bound, count) for document in built.documents}
    built.pieces = sum(map(len, pieces.values()))
    pairs = [] if settings.ask_only else ask_without_model(built, pieces, settings, bound, count)
    if settings.ask:
        pairs += ask_endpoint(built, pieces, settings, paths[0].parent, bound, count, progress)
    kept = keep(pairs, built, settings, count, special)
    if not kept:
        raise DataError(f"no row comes of {len(built.documents)} documents.", why_none(built))
    built.divided = divide(kept, built.documents, settings.eval_fraction, settings.seed)
    built.kinds.update(pair.kind for pair in (*built.divided.train, *built.divided.evaluation))
    if built.divided.leaks:
        built.dropped["evaluation pairs that training has too"] += built.divided.leaks
    write_out(built, paths, settings)
    return built


def places(out: Path, settings: Settings) -> list[Path]:
    """The files to write: train, eval, report. UsageError when one is in the way and --force is not given."""
    if out.suffix == ".jsonl":
        paths = [out, out.with_suffix(".eval.jsonl"), out.with_suffix(".build.json")]
    else:
        paths = [out / "train.jsonl", out / "eval.jsonl", out / "build.json"]
    if (out.suffix == ".jsonl" and out.is_dir()) or (out.suffix != ".jsonl" and out.is_file()):
        raise UsageError(
            f"{out} is {'a folder' if out.is_dir() else 'a file'}.", "--out takes a folder, or a file *.jsonl"
        )
    there = [path for path in paths if path.exists()]
    if there and not settings.force:
        raise UsageError(f"{there[0]} is there already.", "choose another --out, or give --force to replace it")
    return paths


def leave_out_copies(built: Built) -> None:
    """Documents that say exactly the same as an earlier one go."""
    seen: dict[str, str] = {}
    for document in built.documents:
        first = seen.setdefault(document.text, document.name)
        if first != document.name:
            built.skipped.append(Skipped(document.name, f"the same as {first}"))
    firsts = set(seen.values())
    built.documents = [document for document in built.documents if document.name in firsts]


def nothing_read(sources: list[Path], built: Built) -> str:
    """Why there are no documents."""
    reasons = Counter(skipped.reason for skipped in built.skipped)
    why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3)) or "they are empty"
    return f"nothing can be read in {', '.join(map(str, sources[:3]))}: {why}."


def why_none(built: Built) -> str:
    """The hint when every pair was dropped."""
    reasons = "; ".join(f"{count} × {reason}" for reason, count in built.dropped.most_common(3))
    return f"left out: {reasons or 'nothing that could be asked'}; --ask-url lets a model write the questions"


def ask_without_model(
    built: Built, pieces: dict[str, list[Piece]], settings: Settings, bound: int, count: Tokens
) -> list[Pair]:
    """Pairs from the structure of the documents."""
    choice = Choice(settings.seed)
    asker = Asker(built.subject, choice, built.drop)
    asker.read(built.documents)
    found: list[Pair] = []
    for document in built.documents:
        for symbol in document.symbols:
            found += pairs_of_symbol(symbol, document, choice, settings.with_code)
        for group in merge(pieces[document.name], bound, count):
            context = shown(group)
            for piece in group:
                pairs = pairs_of_piece(piece, asker)
                found += pairs
                if settings.with_context:
                    found += contexts(pairs, context, choice)
    return found


def contexts(pairs: Iterable[Pair], context: str, choice: Choice) -> list[Pair]:
    """The pairs once more with the text in the prompt, where the answer is only a part of it."""
    return [with_context(pair, context, choice) for pair in pairs if len(pair.answer) < CONTEXT_SHARE * len(context)]


def ask_endpoint(
    built: Built,
    pieces: dict[str, list[Piece]],
    settings: Settings,
    folder: Path,
    bound: int,
    count: Tokens,
    progress: Callable[[int, int], None],
) -> list[Pair]:
    """Pairs that the endpoint writes, those that their source does not support dropped."""
    assert settings.ask
    texts = [*readings(built, pieces, bound, count)]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, len(texts))

    with Journal(folder / "asked.jsonl") as journal:
        written = asyncio.run(write([reading for reading, _ in texts], settings.ask, journal, step))
    built.reused = journal.reused
    refused = [answer.error for answer in written if answer.error]
    if refused and len(refused) == len(written):
        raise EndpointError(f"{settings.ask.model} wrote nothing for {len(written)} texts: {refused[0]}",
                            "is it an instruct model, and its context long enough for --max-tokens?")  # fmt: skip
    found = []
    for (reading, source), answer in zip(texts, written, strict=True):
        if answer.error:
            built.unwritten[answer.error] += 1
        judged = answer.judged or [True] * len(answer.pairs)
        for (question, text), is_supported in zip(answer.pairs, judged, strict=True):
            wrong = problem(question, text, f"{reading.subject}\n{reading.heading}\n{reading.text}")
            wrong = wrong or ("" if is_supported else "the judge does not find it supported")
            if wrong:
                built.drop(f"written, but {kind_of(wrong)}", f"{wrong}: {question}")
            else:
                found.append(Pair(question, text, "written", source))
    return found


def kind_of(wrong: str) -> str:
    """A problem without its particulars, to count by."""
    for kind in ("number", "address"):
        if wrong.startswith(f"the {kind} "):
            return f"a {kind} is not in the source"
    if wrong.endswith("is not in the source"):
        return "a name is not in the source"
    return "too few of its words are in the source" if wrong.startswith("only ") else wrong


def readings(
    built: Built, pieces: dict[str, list[Piece]], bound: int, count: Tokens
) -> Iterable[tuple[Reading, Source]]:
    """What the endpoint is given to read, and where it stands: pieces of text, and documented code."""
    unasked = Asker(built.subject, Choice(0))
    unasked.read(built.documents)
    for document in built.documents:
        subject = unasked.subject_of(document)
        asked = [piece for piece in pieces[document.name] if is_worth_reading(piece, unasked)]
        for group in merge(asked, bound, count):
            first = source_of(group[0])
            last = max(piece.lines[1] for piece in group)
            yield (
                Reading(shown(group), first.heading, subject),
                Source(first.file, first.heading, (first.lines[0], last)),
            )
        for symbol in document.symbols:
            text = f"{symbol.name}\n\n{symbol.signature}\n\n{symbol.doc}".strip()
            if len(symbol.doc.split()) >= 20 and count(text) <= bound:
                yield (
                    Reading(text, symbol.name, subject),
                    Source(document.name, symbol.name, (symbol.first, symbol.last)),
                )


def is_worth_reading(piece: Piece, asker: Asker) -> bool:
    """Whether a piece is about the subject: not a licence, not a change log, more than a few words."""
    left_out: list[str] = []
    pairs_of_piece(piece, replace(asker, count=left_out.append))
    affairs = any("affairs" in reason or "licence" in reason for reason in left_out)
    return not affairs and len(piece.text.split()) >= 15


def keep(pairs: list[Pair], built: Built, settings: Settings, count: Tokens, special: frozenset[str]) -> list[Pair]:
    """The pairs that become rows: not twice, not too long, one answer to each question."""
    seen = Seen()
    answers: set[str] = set()
    kept: list[Pair] = []
    for pair in pairs:
        reason = unfit(pair, settings, count, special)
        questions = [pair.question, *pair.others][: settings.phrasings]
        if not reason and (again := seen.add(pair.question, near=pair.kind == "written")):
            is_new = (
                again == "the same"
                and pair.precise
                and normal(pair.answer) not in answers
                and not seen.add(pair.precise)
            )
            questions = [pair.precise]
            reason = "" if is_new else f"a question that is {again} as another"
        if reason:
            built.drop(reason, pair.question[:120])
            continue
        answers.add(normal(pair.answer))
        for at, question in enumerate(questions):
            if not at or not seen.add(question):
                kept.append(Pair(question, pair.answer, pair.kind, pair.source))
                built.tokens.append(length(kept[-1], count))
    return kept


def length(pair: Pair, count: Tokens) -> int:
    """Tokens of a row, the template's own about."""
    return count(pair.question) + count(pair.answer) + TEMPLATE_TOKENS


def unfit(pair: Pair, settings: Settings, count: Tokens, special: frozenset[str]) -> str:
    """Why a pair cannot be a row; empty when it can."""
    text = f"{pair.question}\n{pair.answer}"
    if any(token in text for token in special or DEFAULT_SPECIAL):
        return "a special token of the model in it"
    wrong = malformed(pair.question, pair.answer) if pair.kind == "written" else ""
    return wrong or ("longer than --max-tokens" if length(pair, count) > settings.max_tokens else "")


DEFAULT_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>",
                   "<|start_header_id|>",
                   "[INST]", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|assistant|>", "<|user|>")  # fmt: skip


def row_of(pair: Pair) -> dict[str, Any]:
    """A line of the file. `source` says where the answer stands; training does not read it."""
    messages = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}]
    return {"messages": messages, "source": {"kind": pair.kind, **asdict(pair.source)}}


def write_out(built: Built, paths: list[Path], settings: Settings) -> None:
    """All files, each by one rename; an evaluation file of an earlier run goes when there is none now."""
    from loraport.train.build.report import document_of

    texts = ["".join(json.dumps(row_of(pair), ensure_ascii=False) + "\n" for pair in side)
             for side in (built.divided.train, built.divided.evaluation)]  # fmt: skip
    built.out = [path for path, text in zip(paths, texts, strict=False) if text]
    texts.append(json.dumps(document_of(built, settings), indent=2, ensure_ascii=False) + "\n")
    for path, text in zip(paths, texts, strict=True):
        with os_errors("writing", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not text:
                path.unlink(missing_ok=True)
                continue
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                partial.write_text(text, encoding="utf-8", errors="replace")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
