"""Records out of each kind of file: JSONL, JSON, Parquet, CSV, text; streamed, and .gz unpacked on the way.

A record is what a row is made of, mostly an object, with its number. One that cannot be read is Broken; so is the
place where a file ends before its time.

    >>> next(read_records(Path("examples/demo/train.jsonl")))[0]
    1
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loraport.clients.errors import DataError, UsageError, os_errors
from loraport.clients.rows.array import Documents
from loraport.clients.rows.formats import HINTS, parse_json
from loraport.clients.rows.row import place
from loraport.clients.rows.source import suffix_of

BOM = b"\xef\xbb\xbf"
BATCH = 256  # records of a Parquet file at a time
HEAD = 1 << 16  # bytes of a Parquet column at a time


@dataclass(frozen=True)
class Broken:
    """In place of a record that cannot be read."""

    error: DataError


Record = tuple[int, Any]  # its number from 1, and the record or Broken


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, by its suffix; none of a suffix is JSONL."""
    suffix = suffix_of(path)
    with os_errors("reading", path):
        if suffix == ".parquet":
            yield from read_parquet(path)
        elif suffix == ".json":
            yield from read_json(path)
        elif suffix in (".csv", ".tsv"):
            yield from read_csv(path, "\t" if suffix == ".tsv" else ",")
        elif suffix in (".txt", ".md"):
            yield from read_text(path)
        else:
            yield from read_jsonl(path)


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if it ends in .gz."""
    packed = path.suffix.lower() == ".gz"
    with gzip.open(path, "rb") if packed else path.open("rb") as handle:
        yield handle  # type: ignore[misc]


def read_jsonl(path: Path) -> Iterator[Record]:
    """A document a line; blank lines count, and hold nothing."""
    line = 0
    with open_bytes(path) as handle:
        try:
            for line, raw in enumerate(handle, 1):
                text = raw.removeprefix(BOM) if line == 1 else raw
                if text.strip():
                    yield line, parse_line(text, place(str(path), line))
        except (EOFError, gzip.BadGzipFile, zlib.error):
            yield line + 1, broken(place(str(path), line + 1), "the file is damaged or cut off", "copy it again")


def parse_line(raw: bytes, where: str) -> Any:
    """The document of a line, or Broken."""
    try:
        return parse_json(raw, where, HINTS["chat"])
    except DataError as error:
        return Broken(error)


def broken(where: str, problem: str, hint: str) -> Broken:
    """A record that cannot be read, and why."""
    return Broken(DataError(f"{where}: {problem}.", hint))


def read_text(path: Path) -> Iterator[Record]:
    """The whole file as one document."""
    with open_bytes(path) as handle:
        raw = handle.read().removeprefix(BOM)
    try:
        if raw.strip():
            yield 1, {"text": raw.decode("utf-8")}
    except UnicodeDecodeError as error:
        yield 1, broken(str(path), f"not UTF-8 (byte {error.start + 1})", "save the file as UTF-8")


def read_csv(path: Path, delimiter: str) -> Iterator[Record]:
    """A record a line, columns as keys, empty fields left out; rows are counted without the heading."""
    csv.field_size_limit(1 << 30)  # the default of 128 KiB is less than a document
    number = 0
    with open_bytes(path) as handle:
        lines = csv.DictReader(io.TextIOWrapper(handle, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        try:
            for number, fields in enumerate(lines, 1):
                yield number, check_fields(fields, place(str(path), number, "row"))
        except (csv.Error, UnicodeDecodeError) as error:
            where = place(str(path), number + 1, "row")
            yield number + 1, broken(where, f"not CSV ({error})", "quote fields with commas or line breaks in them")


def check_fields(fields: dict[Any, Any], where: str) -> Any:
    """The fields of a CSV line that hold something; Broken when there are more than the heading has."""
    if None in fields:
        return broken(
            where, f"{len(fields[None])} fields more than the heading has", "quote fields with commas in them"
        )
    return {key: value for key, value in fields.items() if value}


def read_parquet(path: Path) -> Iterator[Record]:
    """Records of a Parquet file, read in batches; keys without a value are left out, as Arrow fills them in."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(f"{path} needs pyarrow to be read.", "pip install pyarrow, or give JSONL") from error
    number = 0
    try:
        # Otherwise a row group, which may be the whole file, is read ahead into memory.
        with ParquetFile(path, pre_buffer=False, buffer_size=HEAD) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(record)
    except ArrowException as error:
        where = place(str(path), number + 1, "row")
        yield number + 1, broken(where, f"not Parquet ({str(error).splitlines()[0].rstrip('.')})", "copy it again")


def without_nulls(value: Any) -> Any:
    """`value` without keys that hold nothing, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


def read_json(path: Path) -> Iterator[Record]:
    """Rows of an array, of the array in {"data": […]}, or of objects one after another; numbered from 1."""
    number = 0
    with open_bytes(path) as handle:
        stream = io.TextIOWrapper(handle, "utf-8-sig", errors="surrogateescape", newline="")
        try:
            for number, (record, text) in enumerate(Documents(stream).rows(), 1):
                yield number, broken_bytes(text, place(str(path), number, "row")) or record
        except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            where = place(str(path), number + 1, "row")
            problem = getattr(error, "msg", "not readable")
            yield number + 1, broken(where, f"not JSON ({problem})", "a JSON file holds an array of rows")


def broken_bytes(text: str, where: str) -> Broken | None:
    """Broken where `text` holds bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = len(text[: error.start].encode()) + 1
        return broken(where, f"not UTF-8 (byte {byte})", "save the file as UTF-8")
    return None
