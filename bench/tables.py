"""How the benches print: tables without frames on standard output, figures with a dash where there is none.

>>> number(1234.5, "{:,.0f}")
'1,234'
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraport.clients.errors import UsageError

WIDTH = 110  # of the tables in a file
NOTHING = "–"


def result_console(width: int = WIDTH) -> Console:
    """Standard output, as wide as the terminal, or `width` in a file."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else width)


def plain_table(first: str, columns: Sequence[str]) -> Table:
    """A table without frames: names on the left, figures on the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table


def side_by_side(names: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]], width: int) -> list[Table]:
    """Figures as rows and what they are of as columns; several tables where the width has no room for all."""
    first = max(map(len, names))
    tables: list[Table] = []
    shown: list[tuple[str, Sequence[str]]] = []
    for number, column in enumerate(columns):
        shown.append(column)
        following = columns[number + 1 : number + 2]
        if not following or first + sum(breadth(each) for each in [*shown, *following]) > width:
            table = plain_table("", [title for title, _ in shown])
            for row, name in enumerate(names):
                table.add_row(Text(name), *(cells[row] for _, cells in shown))
            tables.append(table)
            shown = []
    return tables


def breadth(column: tuple[str, Sequence[str]]) -> int:
    """Characters of a column, with the blanks before it."""
    title, cells = column
    return 2 + max(len(line) for cell in (title, *cells) for line in cell.split("\n"))


def number(value: float | None, form: str, nothing: str = "") -> str:
    """A figure in its form; `nothing` where there is none."""
    return nothing if value is None else form.format(value)


def rounded(value: float | None, digits: int = 3) -> float | None:
    """To so many decimals."""
    return None if value is None else round(value, digits)


def known(what: str, name: str, names: Any) -> str:
    """`name`, if there is such a thing; UsageError that lists what there is."""
    if name not in names:
        raise UsageError(f"there is no {what} {name!r}.", f"there are {', '.join(names)}")
    return name


def check_out(path: Path | None) -> None:
    """Refuse a file for the results that could not be written at the end, before anything is measured."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{path} cannot be written.", "--out is a file in a folder that is there")
