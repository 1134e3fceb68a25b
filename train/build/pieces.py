"""Sections into pieces of bounded length, cut where the text itself is divided.

A piece ends with a block. Code and tables are cut only when one alone is longer than the bound, then between lines, and
each part is whole again: with its fence, with its head. A line that announces what follows stays with it.

    >>> [piece.text for piece in split(document, bound=1024, count=len)]
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loraport.train.build.documents import Block, Counter, Document, Section, join

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(\[])")


@dataclass(frozen=True)
class Piece:
    """A part of one section, at most as long as the bound. `part` of `parts`, from 0."""

    document: Document
    section: Section
    blocks: tuple[Block, ...]
    part: int = 0
    parts: int = 1

    @property
    def text(self) -> str:
        """What it says."""
        return join(self.blocks)

    @property
    def lines(self) -> tuple[int, int]:
        """First and last line in the file; zeros where unknown."""
        known = [block for block in self.blocks if block.first]
        return (known[0].first, max(block.last for block in known)) if known else (0, 0)


def split(document: Document, bound: int, count: Counter) -> list[Piece]:
    """The pieces of a document's sections, none longer than `bound` tokens."""
    found = []
    for section in document.sections:
        groups = group([part for block in section.blocks for part in divide(block, bound, count)], bound, count)
        found += [Piece(document, section, tuple(g), at, len(groups)) for at, g in enumerate(groups)]
    return found


def group(blocks: list[Block], bound: int, count: Counter) -> list[list[Block]]:
    """Blocks in order, as many together as the bound allows."""
    groups: list[list[Block]] = []
    size = 0
    for block in blocks:
        length = count(block.text) + 1
        if groups and size + length <= bound:
            groups[-1].append(block)
            size += length
            continue
        carried: list[Block] = []
        if groups and announces(groups[-1][-1]) and len(groups[-1]) > 1:
            announcement = count(groups[-1][-1].text) + 1
            if announcement + length <= bound:
                carried = [groups[-1].pop()]
                length += announcement
        groups.append([*carried, block])
        size = length
    return groups


def announces(block: Block) -> bool:
    """Whether a block only announces the next one."""
    return block.kind == "text" and block.text.rstrip().endswith(":")


def divide(block: Block, bound: int, count: Counter) -> list[Block]:
    """The block itself, or its parts when it alone is longer than the bound."""
    if count(block.text) <= bound:
        return [block]
    if block.kind == "code":
        head, *body, tail = block.text.split("\n")
        return [Block("code", "\n".join([head, *part, tail]), block.first, block.last)
                for part in runs(body, bound - count(head + tail) - 2, count)]  # fmt: skip
    if block.kind == "table":
        lines = block.text.split("\n")
        return [Block("table", "\n".join([*lines[:2], *part]), block.first, block.last)
                for part in runs(lines[2:], bound - count("\n".join(lines[:2])) - 2, count)]  # fmt: skip
    pieces = (
        re.split(r"\n(?=(?:[-*+]|\d+[.)])\s)", block.text) if block.kind == "list" else SENTENCE_END.split(block.text)
    )
    glue = "\n" if block.kind == "list" else " "
    return [Block(block.kind, glue.join(part), block.first, block.last) for part in runs(pieces, bound, count)]


def runs(parts: Iterable[str], bound: int, count: Counter) -> list[list[str]]:
    """Consecutive parts together up to the bound; a single part that is longer is cut by words, or characters."""
    found: list[list[str]] = []
    size = 0
    for part in (short for long in parts for short in cut(long, bound, count)):
        length = count(part) + 1
        if found and size + length <= bound:
            found[-1].append(part)
            size += length
        else:
            found.append([part])
            size = length
    return found


def cut(text: str, bound: int, count: Counter) -> list[str]:
    """Halves of a text, between words where there are any, until each is within the bound."""
    if count(text) <= bound or len(text) < 2:
        return [text]
    middle = len(text) // 2
    space = text.rfind(" ", 1, middle)
    at = space if space > 0 else middle
    return cut(text[:at], bound, count) + cut(text[at:].lstrip() or text[at:], bound, count)


def merge(pieces: list[Piece], bound: int, count: Counter) -> list[list[Piece]]:
    """Neighbouring pieces of a document together up to the bound: what a model is given to read at once."""
    found: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        length = count(shown([piece])) + 2
        if found and found[-1][-1].document is piece.document and size + length <= bound:
            found[-1].append(piece)
            size += length
        else:
            found.append([piece])
            size = length
    return found


def shown(pieces: list[Piece]) -> str:
    """Pieces with their headings, as one text."""
    parts, before = [], None
    for piece in pieces:
        if piece.section.path and piece.section is not before:
            parts.append(f"{'#' * min(6, len(piece.section.path))} {piece.section.heading}")
        parts.append(piece.text)
        before = piece.section
    return "\n\n".join(parts)
