"""Pairs from source code: what a definition does, its parameters, what it returns and raises, examples, its signature.

The answers are the docstring's words (parsed by docstring-parser, which knows Google's, NumPy's and Sphinx's form).

    >>> [pair.kind for pair in pairs_of_symbol(symbol, document, Choice(0), with_code=False)]
    ['symbol', 'signature']
"""

import re
from collections.abc import Iterator
from typing import Any

from loraport.train.build.documents import Document, Symbol
from loraport.train.build.markdown import clean, fenced
from loraport.train.build.plain import from_rst
from loraport.train.build.questions import LICENCE, Pair, Source
from loraport.train.build.wording import Choice

DOES = ("What does {} do?", "What is {} for?", "Explain {}.", "Describe {}.")
MODULE = ("What is the module {} for?", "What does the module {} contain?", "Explain the module {}.", "What is in {}?")
CLASS = ("What is the class {}?", "What is {} for?", "Explain the class {}.", "Describe {}.")
PROPERTY = ("What is {}?", "What does {} hold?", "Explain {}.")
PARAMETERS = ("What are the parameters of {}?", "Which arguments does {} take?", "Explain the parameters of {}.")
RETURNS = ("What does {} return?", "What is the return value of {}?")
RAISES = ("Which exceptions does {} raise?", "What does {} raise?", "Which errors can {} raise?")
EXAMPLE = ("Show me an example of {}.", "How is {} used?", "Give an example of {}.")
SIGNATURE = ("What is the signature of {}?", "How is {} called?", "How is {} declared?")
CODE = ("Show me the source code of {}.", "How is {} implemented?", "What does the code of {} look like?")
LONGEST_CODE = 80  # lines


def pairs_of_symbol(symbol: Symbol, document: Document, choice: Choice, with_code: bool) -> list[Pair]:
    """Every pair that a definition gives."""
    found = [
        Pair(
            questions[0],
            answer,
            kind,
            Source(document.name, symbol.name, (symbol.first, symbol.last)),
            others=tuple(questions[1:]),
        )
        for kind, phrases, answer in answers(symbol, with_code)
        if (questions := [phrase.format(shown_name(symbol)) for phrase in choice.order(phrases, symbol.name)])
    ]
    return [pair for pair in found if pair.answer.strip()]


def shown_name(symbol: Symbol) -> str:
    """How a question names a definition: `Class.method` in `module`, which tells it from others of its name."""
    if symbol.kind == "definition":
        name, _, file = symbol.name.partition(" (")
        return f"`{name}` in `{file.rstrip(')')}`"
    return f"`{symbol.name}`"


def answers(symbol: Symbol, with_code: bool) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(kind, phrases, answer) of a definition."""
    if symbol.doc and not LICENCE.search(symbol.doc):
        doc = parsed(symbol.doc) if symbol.language == "python" else None
        yield from documented(symbol, doc) if doc else [("symbol", phrases_of(symbol), said(symbol.doc))]
    if symbol.kind not in ("module", "class") and symbol.signature and symbol.doc and not is_property(symbol):
        yield "signature", SIGNATURE, fenced(symbol.signature, symbol.language)
    lines = symbol.code.count("\n") + 1
    if with_code and symbol.code and 2 < lines <= LONGEST_CODE and symbol.kind != "class":
        yield "code", CODE, fenced(symbol.code, symbol.language)


def phrases_of(symbol: Symbol) -> tuple[str, ...]:
    """How to ask what it is."""
    if is_property(symbol):
        return PROPERTY
    return {"module": MODULE, "class": CLASS}.get(symbol.kind, DOES)


def is_property(symbol: Symbol) -> bool:
    """Whether a method is read like a value."""
    return bool(re.match(r"@(?:\w+\.)?(?:cached_)?property\b", symbol.code))


def parsed(text: str) -> Any:
    """A docstring taken apart, or None when that fails or finds no parts."""
    from docstring_parser import ParseError, parse

    try:
        doc = parse(text)
    except (ParseError, ValueError, IndexError, KeyError):
        return None
    return doc if doc.meta else None


def documented(symbol: Symbol, doc: Any) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """The answers of a docstring with parts."""
    yield "symbol", phrases_of(symbol), said(doc.description or "")
    parameters = [item for item in doc.params if item.description]
    if parameters:
        yield (
            "symbol",
            PARAMETERS,
            "\n".join(f"- `{p.arg_name}`{typed(p)}: {one_line(p.description)}" for p in parameters),
        )
    if doc.returns and doc.returns.description and len(doc.returns.description.split()) > 1:
        kind = f"`{doc.returns.type_name}`: " if doc.returns.type_name else ""
        yield "symbol", RETURNS, kind + one_line(doc.returns.description)
    raises = [item for item in doc.raises if item.type_name and item.description]
    if raises:
        yield "symbol", RAISES, "\n".join(f"- `{item.type_name}`: {one_line(item.description)}" for item in raises)
    examples = "\n\n".join(example.description or example.snippet or "" for example in doc.examples).strip()
    if examples:
        yield "symbol", EXAMPLE, example_text(examples, symbol.language)


def typed(item: Any) -> str:
    """A parameter's type in brackets, if it is said."""
    return f" ({item.type_name})" if item.type_name else ""


def one_line(text: str) -> str:
    """A description with its line breaks taken out, its markup in Markdown."""
    return " ".join(clean(from_rst(text)[0]).split())


def example_text(text: str, language: str) -> str:
    """An example: as code, unless it has its own fences or prose."""
    if "```" in text:
        return text
    converted = clean(from_rst(text)[0]).strip()
    return converted if "```" in converted else fenced(text, language)


def said(doc: str) -> str:
    """What a docstring says in prose, as Markdown; empty when it is hardly a word."""
    text = re.sub(r"\n{3,}", "\n\n", clean(from_rst(doc)[0])).strip()
    return text if len(re.findall(r"[^\W\d_]{2,}", text)) >= 4 else ""
