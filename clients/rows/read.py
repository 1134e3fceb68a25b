"""Rows out of files, one at a time: nothing here holds a file in memory.

>>> sum(isinstance(row, Row) for row in iter_rows("examples/demo/train.jsonl"))
1000
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from loraport.clients.errors import DataError, UsageError
from loraport.clients.rows.files import Broken, Record, read_records
from loraport.clients.rows.formats import FORMATS, HINTS, convert, detect
from loraport.clients.rows.row import EXAMPLE, BadRow, Row, place
from loraport.clients.rows.source import DOCUMENTS, Source, find_source, suffix_of, unit_of

FIRST = 20  # records that are looked at to tell a file's format


def iter_rows(source: str | Path | Source, format: str = "auto") -> Iterator[Row | BadRow]:
    """All rows of a file, folder or hub data set (`org/name:split`), in order; a BadRow where one cannot be used.

    `format`: one of FORMATS, or auto, by the keys of a file's first rows. UsageError when there is nothing of that
    name, DataError when a file has no rows at all or is of no known format.
    """
    if format not in ("auto", *FORMATS):
        raise UsageError(f"there is no format {format!r}.", f"formats are auto, {', '.join(FORMATS)}")
    found = source if isinstance(source, Source) else find_source(source)
    for path in found.files:
        yield from iter_file(path, format)


def iter_file(path: Path, format: str) -> Iterator[Row | BadRow]:
    """The rows of one file."""
    unit = unit_of(path)
    records = read_records(path)
    first = list(islice(records, FIRST))
    if not first:
        raise DataError(f"{path} is empty.", f"a row is one line: {EXAMPLE}")
    if format == "auto" or suffix_of(path) in DOCUMENTS:
        format = detect(record for _, record in first) or refuse_unknown(path, first, unit)
    for line, record in chain(first, records):
        yield to_row(record, format, str(path), line, unit)


def to_row(record: Any, format: str, source: str, line: int, unit: str) -> Row | BadRow:
    """A record as a row, or as a bad one."""
    try:
        if isinstance(record, Broken):
            raise record.error
        return convert(record, format, source, line, unit)
    except DataError as error:
        return BadRow(line, place(source, line, unit), error, source)


def refuse_unknown(path: Path, first: list[Record], unit: str) -> str:
    """Raise DataError for a file whose first records have the keys of no format; a broken record says more."""
    line, record = first[0]
    where = place(str(path), line, unit)
    if isinstance(record, Broken):
        error = record.error
    elif not isinstance(record, dict):
        error = DataError(f"{where}: a {type(record).__name__}, not an object.", HINTS["chat"])
    else:
        keys = ", ".join(map(repr, list(record)[:8])) or "nothing"
        error = DataError(
            f"{where}: no key 'messages', nor those of another format (it has {keys}).",
            "; ".join(HINTS[name] for name in FORMATS),
        )
    raise BadRow(line, where, error, str(path)).error


def read_rows(path: str | Path | Source, format: str = "auto") -> list[Row]:
    """All rows at once, for small files. Raises as `iter_rows` does, and DataError at the first bad row."""
    rows = []
    for row in iter_rows(path, format):
        if isinstance(row, BadRow):
            raise row.error
        rows.append(row)
    return rows
