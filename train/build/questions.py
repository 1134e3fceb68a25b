"""Pairs without a model: from headings, definitions, lists of terms, tables. Answers are the source's words.

Symbols of source code are asked for in `symbols.py`. What cannot be asked in words that a person would use is left out
and counted, not forced: a model learns silly questions as readily as good ones.

    >>> [pair.question for pair in pairs_of_piece(piece, Asker("Tea", Choice(0)))]
    ['How do I install the server in Tea?']
"""

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate

from loraport.train.build.documents import Block, Document, join
from loraport.train.build.phrases import ABOUT, GENERIC_OF, HOW, terms_in
from loraport.train.build.pieces import Piece
from loraport.train.build.subject import is_entrance, name_in
from loraport.train.build.wording import (
    Choice,
    Words,
    action,
    ask_heading,
    ask_title,
    is_name,
    is_short,
    is_unasked,
    name_phrases,
    with_subject,
)

LICENCE = re.compile(
    r"permission is hereby granted|licensed under the|redistribution and use in source|"
    r"without warrant(?:y|ies) of any kind|"
    r"all rights reserved|spdx-license-identifier|(?:distributed|released|available) under the .{0,40}licen[sc]e",
    re.I,
)
UNFINISHED = re.compile(
    r"^(?:\W*(?:todo|tbd|coming soon|under construction|work in progress|to be written|n/?a|none|see below)\b.{0,60})$",
    re.I,
)
LIST_TERM = re.compile(
    r"^[-*+]\s+(?:\*\*(?P<bold>[^*]{2,60}?):?\*\*|"
    r"(?P<code>`[^`]{1,60}`(?:(?:,| or|/) ?`[^`]{1,60}`)*))(?:\s*\((?P<type>[^()]{1,80})\))?\s*"
    r"(?::|–|—|--|-|=|→)\s+(?P<text>\S.*)$",
    re.S,
)
INNER_COLON = re.compile(r"^[-*+]\s+\*\*(?P<bold>[^*]{2,60}?):\*\*\s+(?P<text>\S.*)$", re.S)
PARAGRAPH_TERM = re.compile(r"^\*\*(?P<bold>[^*]{2,60}?)(?::\*\*|\*\*\s*(?::|–|—))\s+(?P<text>\S.*)$", re.S)
DEFINED = re.compile(
    r"^(?P<thing>(?:(?:A|An|The)\s+)?(?:\*\*|\*|`)?[A-Za-z][\w.()-]*(?:\s[\w()-]+){0,3}?(?:\*\*|\*|`)?)\s+(?:\([^)]*\)\s+)?"
    r"(?:is|are|means|refers to|stands for)\s+(?:a|an|the|one|what|how|when|where|any|used|two|three)\b"
)
NO_THING = re.compile(
    r"^(?:this|that|these|those|it|there|here|what|which|following|below|above|they|we|you|one|each|all|both|i|its|their|only|reason|result)\b",
    re.I,
)
QUESTION = re.compile(r"^(?P<mark>\*{1,3}|_{1,3})(?:Q\s*[:.]\s*)?(?P<question>[^*_\n]{8,160}\?)(?P=mark)\s*")
POINTER = re.compile(r"^\W*(?:please )?(?:see|refer|for (?:more|further|full|detail|a |the )|check(?: out)?|visit|"
                     r"read (?:the|more)|have a look|take a look|more (?:details|information)|"
                     r"full documentation|the (?:full |complete )?documentation|documentation)\b", re.I)  # fmt: skip
ADDRESS = re.compile(r"https?://[^\s)>]+")
LABELS = terms_in(
    """
    note, warning, tip, important, caution, hint, danger, example, todo, see also, info, attention, seealso,
    admonition, output, input, before, after, result, default, required, optional, update
    """
)
TABLE_HEADS = terms_in(
    """
    option, flag, parameter, command, key, setting, variable, field, argument, error, function, method,
    property, attribute, environment variable, term, class, module, event, directive, keyword, file, folder,
    directory, exit code, preset, action, status code, status, operator, name, metric, label, marker, role,
    type, code, endpoint, header, hook, signal, extra, format, rule
    """
)


@dataclass(frozen=True)
class Source:
    """Where a pair comes from: file, headings, lines (of a PDF: pages; zeros where unknown)."""

    file: str
    heading: str
    lines: tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """A question with its answer. `kind`: heading, definition, table, symbol, signature, code, context, written."""

    question: str
    answer: str
    kind: str
    source: Source
    others: tuple[str, ...] = ()  # more ways to ask it, the best first
    precise: str = ""  # the question with its place, for when it has another answer elsewhere


@dataclass
class Asker:
    """What questions need to know beside the piece. `unasked` counts what was left out, by reason."""

    subject: str
    choice: Choice
    count: Callable[[str], None] = field(default=lambda reason: None)
    words: Words = field(default_factory=Words)
    entrances: dict[str, str] = field(default_factory=dict)  # folder -> what its README or index is called

    def read(self, documents: list[Document]) -> None:
        """Learn the words of all documents, and what the first page of each folder is called."""
        blocks = (b for d in documents for s in d.sections for b in s.blocks if b.kind in ("text", "list"))
        prose = "\n".join(block.text for block in blocks)
        for document in documents:
            folder, _, _ = document.name.rpartition("/")
            if document.sections and is_entrance(document.name) and folder:
                self.entrances.setdefault(folder, name_in(document.title) or folder.rpartition("/")[2])
        titles = (name_in(document.title) for document in documents if len(documents) == 1)
        self.words = Words.of(prose, [self.subject, *self.entrances.values(), *titles])

    def subject_of(self, document: Document) -> str:
        """What a document is about: what all of them are, or the first page of its folder, or its own title."""
        folders = [*accumulate(document.name.split("/")[:-1], "{}/{}".format)]
        nearest = next((self.entrances[folder] for folder in reversed(folders) if folder in self.entrances), "")
        return self.subject or nearest or name_in(document.title) or document.title


def pairs_of_piece(piece: Piece, asker: Asker) -> list[Pair]:
    """Every pair that a piece gives."""
    if any(is_unasked(heading) for heading in (*piece.section.path, piece.document.title)):
        asker.count("about the project's affairs (licence, changes, contributing, links)")
        return []
    if LICENCE.search(piece.text) and len(piece.text) < 3000:
        asker.count("a licence text")
        return []
    found = [*terms_of(piece, asker), *table_rows(piece, asker), *sentences(piece, asker), *faq(piece, asker)]
    own = heading_pair(piece, asker)
    return [own, *found] if own else found


def source_of(piece: Piece, blocks: tuple[Block, ...] | None = None) -> Source:
    """Where a piece, or some of its blocks, stand."""
    part = piece if blocks is None else replace(piece, blocks=blocks)
    return Source(piece.document.name, " > ".join(piece.section.path), part.lines)


def owner_of(piece: Piece, subject: str) -> str:
    """The nearest heading above that says something; the subject where there is none."""
    path = [h for h in piece.section.path[:-1] if h.lower() not in GENERIC_OF and h != piece.document.title]
    title = name_in(piece.document.title) or piece.document.title
    return path[-1] if path else title if piece.section.heading != piece.document.title else subject


def heading_pair(piece: Piece, asker: Asker) -> Pair | None:
    """The section's heading as a question, its text as the answer."""
    if piece.part:
        asker.count("a long section's later parts (no heading of their own)")
        return None
    blocks = trimmed(piece.blocks)
    answer = join(blocks)
    reason = poor_answer(answer)
    if reason:
        asker.count(reason)
        return None
    if not any(section.path for section in piece.document.sections):
        asker.count("text without any heading")
        return None
    subject = asker.subject_of(piece.document)
    heading = piece.section.heading or piece.document.title
    owner, words, defines = owner_of(piece, subject), asker.words, defined_by(blocks[0], heading)
    is_first = is_entrance(piece.document.name) and (not asker.subject or piece.document.name.count("/") < 2)
    if heading == piece.document.title and (name_in(heading) == subject or is_first):
        questions = ask_title(subject, asker.choice)
    else:
        questions = ask_heading(heading, owner, subject, words, asker.choice, defines)
    if not questions:
        asker.count("a heading that says nothing")
        return None
    return Pair(
        questions[0],
        answer,
        "heading",
        source_of(piece, blocks),
        tuple(questions[1:]),
        placed(questions[0], owner, words),
    )


def placed(question: str, place: str, words: Words) -> str:
    """A question with the place where its answer stands."""
    return (
        f"{question[:-1]} ({words.lower(place)}){question[-1]}"
        if place and place.lower() not in question.lower()
        else ""
    )


def trimmed(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """The blocks without a last one that announces what is not there."""
    while blocks and blocks[-1].kind == "text" and blocks[-1].text.rstrip().endswith(":"):
        blocks = blocks[:-1]
    return blocks


def poor_answer(answer: str) -> str:
    """Why a section is no answer; empty when it is one."""
    prose = re.sub(r"```.*?```", " ", answer, flags=re.S)
    words = re.findall(r"[^\W\d_]{2,}", prose)
    if UNFINISHED.match(answer.strip()):
        return "unfinished"
    if len(words) < 8 and len(answer) < 120:
        return "too little text for an answer"
    if not words:
        return "code without a word"
    if POINTER.match(answer) and len(words) < 30:
        return "only points elsewhere"
    if sum(map(len, ADDRESS.findall(answer))) * 2 > len(answer):
        return "mostly addresses"
    return "mostly numbers and signs" if len(words) * 12 < len(prose) - 200 else ""


def defined_by(block: Block, heading: str) -> str:
    """The thing that a section's first sentence defines, if it is the heading: "the adapter folder"."""
    match = DEFINED.match(block.text) if block.kind == "text" else None
    if not match or NO_THING.match(match["thing"]):
        return ""
    thing = re.sub(r"^(A|An|The) ", lambda m: m[0].lower(), match["thing"]).replace("*", "")
    core = {word.rstrip("s") for word in re.findall(r"\w+", thing.lower())} - {"a", "an", "the"}
    return thing if core & {word.rstrip("s") for word in re.findall(r"\w+", heading.lower())} else ""


def sentences(piece: Piece, asker: Asker) -> Iterator[Pair]:
    """Paragraphs that define a term set in bold, italics or code: "A **golden reply** is a ..."."""
    for at, block in enumerate(piece.blocks):
        match = DEFINED.match(block.text) if block.kind == "text" and (at or piece.part) else None
        if not match or NO_THING.match(match["thing"]) or not re.search(r"[*`]", match["thing"]):
            continue
        if len(block.text.split()) < 8 or block.text.rstrip().endswith(":"):
            continue
        thing = re.sub(r"^(A|An|The) ", lambda m: m[0].lower(), match["thing"]).replace("*", "")
        yield named_pair(thing, block.text, piece, asker, (block,))


def named_pair(
    term: str, answer: str, piece: Piece, asker: Asker, blocks: tuple[Block, ...], kind: str = "definition"
) -> Pair:
    """A pair for a term. A term in code is asked for as code, one in words in its place."""
    subject = asker.subject_of(piece.document)
    heading = piece.section.heading
    place = (
        heading if heading and heading.lower() not in GENERIC_OF and not is_name(heading) else owner_of(piece, subject)
    )
    words = asker.words
    is_option = re.search(r"option|parameter|argument|setting|flag|variable|field", heading, re.I)
    if "`" in term or is_name(term) or (is_option and re.fullmatch(r"[a-z][\w-]*", term)):
        name = term if "`" in term else f"`{term}`"
        phrases = name_phrases(name, subject)
    elif done := action(term, words):
        name, phrases = with_subject(done, subject), HOW
    else:
        name = with_subject(words.lower(term), subject)
        phrases = ("What is {}?", "What does {} mean?", "Explain {}.", "What is meant by {}?")
        if not is_glossary(piece):
            inside = f" ({words.lower(place)})" if place != subject and is_short(place) else ""
            name = with_subject(f"{words.lower(term)}{inside}", subject)
            phrases = ABOUT
    questions = [phrase.format(name) for phrase in asker.choice.order(phrases, term + place)]
    return Pair(
        questions[0], answer, kind, source_of(piece, blocks), tuple(questions[1:]), placed(questions[0], place, words)
    )


def is_glossary(piece: Piece) -> bool:
    """Whether a section defines terms."""
    return bool(
        re.search(r"glossary|terms|terminology|definitions|concepts|vocabulary", " ".join(piece.section.path), re.I)
    )


def terms_of(piece: Piece, asker: Asker) -> Iterator[Pair]:
    """Definition lists, lists of `term: text`, and paragraphs that begin with a term."""
    for block in piece.blocks:
        for term, text in defined_in(block):
            term = term.strip(" :")
            text = " ".join(text.split()) if "\n" not in text.strip() else text.strip()
            if term.lower().strip("*`") in LABELS or len(term.split()) > 6 or len(re.findall(r"\w+", text)) < 4:
                continue
            if term.endswith((".", "?", "!", ",")) or text.endswith(":") or is_unasked(term) or ADDRESS.match(text):
                continue
            yield named_pair(term, text, piece, asker, (block,))


def defined_in(block: Block) -> Iterator[tuple[str, str]]:
    """(term, text) in a block."""
    if block.kind == "list":
        for item in re.split(r"\n(?=[-*+]\s)", block.text):
            match = INNER_COLON.match(item) or LIST_TERM.match(item)
            if match:
                yield match["bold"] or match["code"], dedent_item(match["text"])
    elif block.kind == "text":
        yield from definition_list(block.text)
        match = PARAGRAPH_TERM.match(block.text)
        if match:
            yield match["bold"], match["text"]


def faq(piece: Piece, asker: Asker) -> Iterator[Pair]:
    """Paragraphs that are a question in bold or italics, with the blocks behind them as the answer."""
    starts = [(at, match["question"]) for at, block in enumerate(piece.blocks) if (match := QUESTION.match(block.text))]
    ends = [at for at, _ in starts[1:]] + [len(piece.blocks)]
    for (at, question), end in zip(starts, ends[: len(starts)], strict=True):
        rest = re.sub(r"^A\s*[:.]\s+", "", QUESTION.sub("", piece.blocks[at].text).strip())
        blocks = trimmed((*((Block("text", rest),) if rest else ()), *piece.blocks[at + 1 : end]))
        if len(question.split()) > 2 and not poor_answer(join(blocks)):
            subject = asker.subject_of(piece.document)
            yield Pair(
                ask_heading(question, subject, subject, Words(), asker.choice)[0],
                join(blocks),
                "heading",
                source_of(piece, piece.blocks[at:end]),
            )


def dedent_item(text: str) -> str:
    """The text of a list item, the indent of its further lines removed."""
    first, _, rest = text.partition("\n")
    return f"{first}\n{textwrap.dedent(rest)}".strip()


def definition_list(text: str) -> Iterator[tuple[str, str]]:
    """(term, text) of `term` on a line and `: text` on the next."""
    lines = text.split("\n")
    for at in range(len(lines) - 1):
        if lines[at].strip() and not lines[at].startswith((":", " ")) and re.match(r": +\S", lines[at + 1]):
            end = at + 2
            while (
                end < len(lines)
                and lines[end].strip()
                and not (end + 1 < len(lines) and lines[end + 1].startswith(": "))
            ):
                end += 1
            yield lines[at].strip(" *"), " ".join(line.lstrip(": ").strip() for line in lines[at + 1 : end])


def table_rows(piece: Piece, asker: Asker) -> Iterator[Pair]:
    """Rows of tables whose first column names things: options, commands, fields."""
    for block in piece.blocks:
        rows = [cells(line) for line in block.text.split("\n")] if block.kind == "table" else []
        if len(rows) < 3 or len(rows[0]) < 2 or rows[0][0].lower().strip("*` ").rstrip("s") not in TABLE_HEADS:
            continue
        for row in rows[2:]:
            answer = row_answer(rows[0], row)
            if row and 0 < len(row[0].split()) < 7 and len(re.findall(r"[^\W\d_]{2,}", answer)) > 3:
                yield named_pair(row[0].strip("*"), answer, piece, asker, (block,), "table")


def cells(line: str) -> list[str]:
    """The cells of a line of a table."""
    inner = re.sub(r"^\||\|$", "", line.strip())
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def row_answer(heads: list[str], row: list[str]) -> str:
    """What a row says of its first cell: the second cell, or each with its head."""
    filled = [(head, cell) for head, cell in zip(heads[1:], row[1:], strict=False) if cell.strip(" -–—")]
    if len(filled) == 1:
        return filled[0][1]
    return "\n".join(f"- {head}: {cell}" if head else f"- {cell}" for head, cell in filled)


CONTEXTS = (
    "{context}\n\n{question}",
    "Answer from this text.\n\n{context}\n\nQuestion: {question}",
    "{question}\n\nUse what the documentation says:\n\n{context}",
)


def with_context(pair: Pair, context: str, choice: Choice) -> Pair:
    """The pair with the text that holds its answer in the prompt."""
    prompt = choice.of(CONTEXTS, pair.question).format(context=context, question=pair.question)
    return replace(pair, question=prompt, kind="context", others=(), precise="")
