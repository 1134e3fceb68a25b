"""`loraport data show`: one row as the trainer sees it, token by token, with what carries loss marked.

>>> shown = show_row(find_source("examples/demo/train.jsonl"), "1", "auto", encoder)
>>> shown.spans
[Span(first=101, behind=108, text='a_indexes\\nSource: indexes_identical<|im_end|>')]
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.text import Text

from loraport.clients.errors import UsageError
from loraport.clients.rows import BadRow, Row, Source, iter_rows
from loraport.clients.terminal import console, printable, say
from loraport.train.data.findings import count_of
from loraport.train.data.tokens import IGNORED, Encoder, Example

BEGIN, END, BETWEEN = "⟦", "⟧", "│"  # around what is trained, and between tokens
TRAINED, SPECIAL, MARK = "bold green", "magenta", "dim"
SHOWN_NEWLINE = "↵"


@dataclass(frozen=True)
class Cell:
    """One token, or several that only together make a character: ids, text, whether it carries loss and is special."""

    ids: list[int]
    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Span:
    """A trained part: tokens from `first` to before `behind`, counted from 0; its `last` token, and if that stops."""

    first: int
    behind: int
    text: str
    last: str
    stop: bool


@dataclass(frozen=True)
class Shown:
    """A row, its tokens and trained parts; `other`: of a pair, the same with the reply that is not preferred."""

    row: Row
    example: Example
    cells: list[Cell]
    spans: list[Span]
    other: "Shown | None" = None

    def document(self) -> dict[str, Any]:
        """For JSON: ids, labels and texts of the same length or shorter, see Cell."""
        pair = {"non_preferred": self.other.document()} if self.other else {}
        return pair | {
            "file": self.row.source,
            "row": self.row.line,
            "tokens": len(self.example.input_ids),
            "trained_tokens": self.example.trained_tokens,
            "untrained_turns": self.example.untrained_turns,
            "spans": [
                {"first": span.first, "behind": span.behind, "text": span.text, "last": span.last, "stops": span.stop}
                for span in self.spans
            ],
            "pieces": [
                {"ids": cell.ids, "text": cell.text, "trained": cell.trained, "special": cell.special}
                for cell in self.cells
            ],
        }


def show_row(source: Source, wanted: str | None, format: str, encoder: Encoder) -> Shown:
    """The row `wanted`, "7" or "part.jsonl:7"; the first one without it.

    Raises UsageError when there is no such row, DataError when it cannot be trained on.
    """
    row = find_row(source, wanted, format)
    if isinstance(row, BadRow):
        raise row.error
    return show_example(row, encoder.encode(row), encoder)


def show_example(row: Row, example: Example, encoder: Encoder) -> Shown:
    """A row that was tokenised."""
    other = show_example(row, example.rejected, encoder) if example.rejected else None
    return Shown(row, example, cells_of(example, encoder), spans_of(example, encoder), other)


def find_row(source: Source, wanted: str | None, format: str) -> Row | BadRow:
    """The row of that number, as reports count: in its file, blank lines included."""
    file, _, number = (wanted or "").rpartition(":")
    if wanted and not number.isdecimal():
        raise UsageError(f"--row {wanted} is no row number.", "give 7, or part.jsonl:7 where there are several files")
    files = tuple(path for path in source.files if not file or str(path).endswith(file)) or ()
    if not files:
        raise UsageError(f"{source.name} has no file {file}.", f"it has {', '.join(map(str, source.files[:5]))}")
    last = 0
    for row in iter_rows(Source(str(files[0]), files[:1]), format):
        if not wanted or row.line == int(number):
            return row
        last = row.line
    raise UsageError(f"{files[0]} has no row {number}.", f"its last is {last}")


def cells_of(example: Example, encoder: Encoder) -> list[Cell]:
    """The tokens as text, piece by piece; tokens that are parts of one character stay together."""
    special = set(encoder.tokenizer.all_special_ids)
    cells: list[Cell] = []
    waiting: list[int] = []
    before: list[int] = []
    ids = np.asarray(example.input_ids).tolist()
    trained = (np.asarray(example.labels) != IGNORED).tolist()
    for at, token in enumerate(ids):
        waiting.append(token)
        text = piece(encoder.tokenizer, before, waiting)
        if "\ufffd" in text and len(waiting) < 4 and at + 1 < len(ids) and ids[at + 1] not in special:
            continue
        cells.append(Cell(waiting, text, trained[at] and at > 0, token in special))
        before, waiting = waiting, []
    return cells


def piece(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """What `tokens` add to the text behind `before`: a tokenizer may drop the space at the start of a text."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    prefix = tokenizer.decode(before, **options)
    whole = str(tokenizer.decode([*before, *tokens], **options))
    return whole[len(prefix) :] if whole.startswith(prefix) else str(tokenizer.decode(tokens, **options))


def spans_of(example: Example, encoder: Encoder) -> list[Span]:
    """The trained parts."""
    trained = np.asarray(example.labels) != IGNORED
    trained[:1] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained, [0]]).astype(int)))
    ids = np.asarray(example.input_ids)
    return [
        Span(
            int(first),
            int(behind),
            str(encoder.tokenizer.decode(ids[first:behind].tolist(), skip_special_tokens=False)),
            str(encoder.tokenizer.decode(ids[behind - 1 : behind].tolist(), skip_special_tokens=False)),
            int(ids[behind - 1]) in encoder.stop_tokens,
        )
        for first, behind in zip(edges[::2], edges[1::2], strict=True)
    ]


def print_row(shown: Shown, sequence_length: int) -> None:
    """Print it: the row in words, its tokens, its trained parts; of a pair the same twice."""
    name = "preferred output: " if shown.other else ""
    say(f"{shown.row.where}: {name}{count_tokens(shown)}", "bold")
    say(f"{BEGIN}{END} around what is trained, {BETWEEN} between tokens, {SHOWN_NEWLINE} a line's end", "dim")
    say("")
    print_tokens(shown, sequence_length)
    if shown.other:
        say("")
        say(f"{shown.row.where}: non-preferred output: {count_tokens(shown.other)}", "bold")
        say("")
        print_tokens(shown.other, sequence_length)


def count_tokens(shown: Shown) -> str:
    """How many there are."""
    return f"{len(shown.example.input_ids):,} tokens, {shown.example.trained_tokens:,} of them trained"


def print_tokens(shown: Shown, sequence_length: int) -> None:
    """Print tokens and trained parts of one sequence."""
    text = draw(shown.cells)
    console.print(text, end="" if text.plain.endswith("\n") else "\n")
    say("")
    for span in shown.spans:
        ending = "generation stops" if span.stop else "generation does NOT stop"
        count = count_of(span.behind - span.first, "token")
        say(f"trained: {count}, number {span.first + 1:,} to {span.behind:,}; on the last, {span.last!r}, {ending}")
    if shown.example.untrained_turns:
        say(f"note: {shown.example.untrained_turns} earlier assistant turns carry no loss", "yellow")
    if len(shown.example.input_ids) > sequence_length:
        say(f"warning: longer than {sequence_length:,} tokens, so training refuses the row", "yellow")


def draw(cells: list[Cell]) -> Text:
    """The tokens as one text; a line's end is shown and kept."""
    text = Text()
    was_trained = False
    for number, cell in enumerate(cells):
        if was_trained and not cell.trained:
            text.append(END, TRAINED)
        if cell.trained and not was_trained:
            text.append(BEGIN, TRAINED)
        elif number and not text.plain.endswith("\n"):
            text.append(BETWEEN, MARK)
        style = f"{TRAINED if cell.trained else ''} {'' if not cell.special else SPECIAL}".strip()
        text.append(printable(cell.text).replace("\n", f"{SHOWN_NEWLINE}\n"), style)
        was_trained = cell.trained
    if was_trained:
        text.append(END, TRAINED)
    return text
