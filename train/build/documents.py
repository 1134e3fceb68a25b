"""What a document is once it has been read: sections with their headings, blocks, and the symbols of source code.

Every format becomes this, so that nothing behind here knows Markdown from PDF. Texts are in Markdown, because that is
what chat models write. Reading is in `readers.py`.

    >>> Document("docs/a.md", "A", (Section(("A", "Install"), (Block("text", "Run it.", 3, 3),)),)).text
    'A\\nInstall\\nRun it.'
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

BlockKind = Literal["text", "list", "code", "table"]
Counter = Callable[[str], int]  # tokens of a text


@dataclass(frozen=True)
class Block:
    """A paragraph, list, code block or table. `first` and `last` are lines (of a PDF: pages), 0 where unknown."""

    kind: BlockKind
    text: str
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class Section:
    """The blocks under one heading, without those of its subsections. `path`: its headings, the outermost first."""

    path: tuple[str, ...]
    blocks: tuple[Block, ...]

    @property
    def heading(self) -> str:
        """The section's own heading; empty before the first one."""
        return self.path[-1] if self.path else ""

    @property
    def text(self) -> str:
        """All blocks, a blank line between them."""
        return join(self.blocks)


@dataclass(frozen=True)
class Symbol:
    """A definition in source code: its full `name`, one-line `signature`, documentation, and the code itself."""

    name: str
    kind: Literal["module", "function", "method", "class", "definition"]
    signature: str
    doc: str
    code: str
    language: str
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class Document:
    """A file that was read. `name`: its path from the source that the user gave; `title`: what it calls itself."""

    name: str
    title: str
    sections: tuple[Section, ...] = ()
    symbols: tuple[Symbol, ...] = ()

    @cached_property
    def text(self) -> str:
        """Everything that it says, for comparing documents with each other."""
        parts = [self.title, *(part for s in self.sections for part in (s.heading, s.text))]
        return "\n".join(
            part for part in [*parts, *(f"{s.signature}\n{s.doc}\n{s.code}" for s in self.symbols)] if part
        )


def join(blocks: tuple[Block, ...] | list[Block]) -> str:
    """Blocks as one text."""
    return "\n\n".join(block.text for block in blocks)
