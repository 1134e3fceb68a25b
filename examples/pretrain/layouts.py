"""The layouts in which a reading task shows a list of documented parameters."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One documented parameter of a task; `default` may be empty."""

    name: str
    type: str
    default: str
    description: str


def paren(entries: list[Entry], mark: str) -> str:
    """`name (type, default x): description` lines."""
    return "\n".join(f"{e.name} ({e.type}{tail(e, mark, ', ')}): {e.description}" for e in entries)


def paren_bullet(entries: list[Entry], mark: str) -> str:
    """The same as a list with bullets and full stops."""
    return "\n".join(f"- {e.name} ({e.type}{tail(e, mark, ', ')}): {e.description}." for e in entries)


def numpydoc(entries: list[Entry], mark: str) -> str:
    """Entries as numpydoc writes them."""
    return "\n".join(f"{e.name} : {e.type}{tail(e, mark, ', ')}\n    {e.description}" for e in entries)


def one_line(entries: list[Entry], mark: str) -> str:
    """`name: type, default x. Description.` lines."""
    return "\n".join(f"{e.name}: {e.type}{tail(e, mark, ', ')}. {e.description}." for e in entries)


def description_first(entries: list[Entry], mark: str) -> str:
    """The meaning before type and default."""
    return "\n".join(f"* {e.name}: {e.description} [{e.type}{tail(e, mark, '; ')}]" for e in entries)


def google(entries: list[Entry], mark: str) -> str:
    """Entries as Google's style writes them."""
    return "Args:\n" + "\n".join(f"    {e.name} ({e.type}): {e.description}{tail(e, mark, '. ')}" for e in entries)


def table(entries: list[Entry], mark: str) -> str:
    """A table with a header line."""
    return "\n".join(
        [
            "name | type | default | meaning",
            *(f"{e.name} | {e.type} | {e.default or '-'} | {e.description}" for e in entries),
        ]
    )


def assignments(entries: list[Entry], mark: str) -> str:
    """Assignments with a comment."""
    return "\n".join(f"{e.name} = {e.default or '...'}  # {e.type}: {e.description}" for e in entries)


def blocks(entries: list[Entry], mark: str) -> str:
    """One block of labelled lines for each parameter."""
    return "\n".join(
        f"{e.name}\n  type: {e.type}\n"
        + (f"  default: {e.default}\n" if e.default else "")
        + f"  meaning: {e.description}"
        for e in entries
    )


def prose(entries: list[Entry], mark: str) -> str:
    """Sentences."""
    return " ".join(
        f"The parameter {e.name} is of type {e.type}{tail(e, mark, ', ')}: {e.description}." for e in entries
    )


def signature(entries: list[Entry], mark: str) -> str:
    """A signature with types and defaults, then the meanings."""
    head = ", ".join(f"{e.name}: {e.type}" + (f" = {e.default}" if e.default else "") for e in entries)
    return f"({head})\n" + "\n".join(f"{e.name}: {e.description}" for e in entries)


def tail(entry: Entry, mark: str, separator: str) -> str:
    """The default in the wording `mark`, or nothing when there is none."""
    return separator + mark.format(entry.default) if entry.default else ""


LAYOUTS = [
    paren,
    paren,
    paren_bullet,
    numpydoc,
    numpydoc,
    one_line,
    description_first,
    google,
    table,
    assignments,
    blocks,
    prose,
    signature,
]
