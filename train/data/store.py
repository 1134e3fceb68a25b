"""Tokenised rows on disk, read a row at a time: memory is the same for a megabyte of data and for a gigabyte.

Rows are streamed through `Encoder.encode_many` into one file of tokens (int32) and one of marks (a byte each: loss or
none), beside a few numbers a row. Plain files, read by `pread`: nothing has to be converted, as Arrow would, and
unlike pages of a memory map what was read does not count as memory of the process. They lie in the cache of the home
under a hash of all that they depend on, so that the next run over the same rows begins at once. A preference row has
the tokens of its two sequences one behind the other, and `chosen` says where the second begins.

    >>> store = open_store(find_source("rows.jsonl"), "auto", encoder, home)
    >>> store[0]["labels"].shape == (store.lengths[0],)
    True
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraport.clients.errors import DataError, os_errors
from loraport.clients.home import Home, require_disk, write_json
from loraport.clients.rows import BadRow, Row, Source, hash_source, iter_rows, place, unit_of
from loraport.train.data.preference import of_method, refuse_other_method
from loraport.train.data.split import Indices, group_of
from loraport.train.data.tokens import IGNORED, Encoder, Example

LAYOUT = 2  # raised when the same inputs would now give other files
DISK_PER_BYTE = 2.5  # of data: five bytes a token, and seldom more than a token for two bytes
PACKED = 3  # times that text shrinks in Parquet and gzip
COLUMNS = {"lengths": "i", "chosen": "i", "trained": "i", "lines": "q", "files": "i", "thinking": "b", "groups": "Q"}
TOKENS, MARKS = "tokens.bin", "marks.bin"
SHOWN_LINES, KEPT_DAYS = 5, 30


@dataclass(frozen=True)
class TokenStore:
    """The finished files in `folder`, and the `source` of which they were made."""

    folder: Path
    source: Source
    format: str

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: `input_ids` and `labels`, int32 of shape (T,); labels are IGNORED where there is no loss.

        Of a pair also `chosen`, the number of tokens that are of its first sequence.
        """
        begin, length = int(self._begins[index]), int(self.lengths[index])
        tokens, marks = self._handles
        ids = np.frombuffer(read_at(tokens, 4 * begin, 4 * length), dtype=np.int32)
        learned = np.frombuffer(read_at(marks, begin, length), dtype=np.bool_)
        cut = int(self.chosen[index])
        pair = {"chosen": cut} if cut else {}
        return {"input_ids": ids, "labels": np.where(learned, ids, np.int32(IGNORED))} | pair

    @cached_property
    def about(self) -> dict[str, Any]:
        """Counts of the whole: `rows`, `tokens`, `trained_tokens`, `untrained_turns`, `thinking_rows`; `sha256`."""
        return dict(json.loads((self.folder / "about.json").read_text(encoding="utf-8")))

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, of a pair those of both sequences: int32 (N,)."""
        return self._column("lengths")

    @cached_property
    def chosen(self) -> NDArray[np.int32]:
        """Of a pair, the tokens of the sequence with the preferred reply; 0 for other rows: int32 (N,)."""
        return self._column("chosen")

    @property
    def longest_sequences(self) -> NDArray[np.int32]:
        """Tokens of each row's longer sequence: int32 (N,)."""
        return longer(self.lengths, self.chosen)

    @cached_property
    def trained(self) -> NDArray[np.int32]:
        """Tokens of each row that carry loss; the first token of a row never does: int32 (N,)."""
        return self._column("trained")

    @property
    def groups(self) -> NDArray[np.uint64]:
        """Equal for rows that ask the same: uint64 (N,), for `split`."""
        return self._column("groups")

    @property
    def thinking(self) -> NDArray[np.int8]:
        """1 for rows that were rendered with thinking on: int8 (N,)."""
        return self._column("thinking")

    @property
    def lines(self) -> NDArray[np.int64]:
        """The line, or number, of each row in its file: int64 (N,)."""
        return self._column("lines")

    @property
    def files(self) -> NDArray[np.int32]:
        """The file of each row, as an index into the source's: int32 (N,)."""
        return self._column("files")

    def where(self, index: int) -> str:
        """File and line of a row."""
        file = self.source.files[int(self._column("files")[index])]
        return place(str(file), int(self._column("lines")[index]), unit_of(file))

    def rows(self, indices: Iterable[int]) -> list[Row]:
        """The rows themselves, in the order of `indices`; read from the source again, up to the last of them."""
        wanted = [int(index) for index in indices]
        if not wanted:
            return []
        needed, found = set(wanted), {}
        for index, row in enumerate(islice(iter_rows(self.source, self.format), max(wanted) + 1)):
            if index in needed and isinstance(row, Row):
                found[index] = row
        missing = needed - set(found)
        if missing:
            raise DataError(f"{self.source.name} has changed since it was tokenised.", "start again")
        return [found[index] for index in wanted]

    def subset(self, indices: Indices | Sequence[int]) -> "Subset":
        """Some of the rows, in that order."""
        return Subset(self, np.asarray(indices, dtype=np.int64))

    def _column(self, name: str) -> NDArray[Any]:
        return np.fromfile(self.folder / f"{name}.bin", dtype=np.dtype(COLUMNS[name]))

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        return np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    @cached_property
    def _handles(self) -> tuple[int, int]:
        """File descriptors, open while the process lives: a run has two or three stores."""
        return os.open(self.folder / TOKENS, os.O_RDONLY), os.open(self.folder / MARKS, os.O_RDONLY)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: it opens the files itself."""
        return {"folder": self.folder, "source": self.source, "format": self.format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class Subset:
    """Rows `indices` (int64, (M,)) of a store, with the store's interface."""

    store: TokenStore
    indices: Indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As the store's."""
        return self.store[int(self.indices[index])]

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """As the store's: int32 (M,)."""
        return self.store.lengths[self.indices]

    @property
    def longest_sequences(self) -> NDArray[np.int32]:
        """As the store's: int32 (M,)."""
        return longer(self.lengths, self.store.chosen[self.indices])

    @cached_property
    def trained(self) -> NDArray[np.int32]:
        """As the store's: int32 (M,)."""
        return self.store.trained[self.indices]

    def rows(self, indices: Iterable[int]) -> list[Row]:
        """As the store's; `indices` count within this subset."""
        return self.store.rows(self.indices[list(indices)])


def longer(lengths: NDArray[np.int32], chosen: NDArray[np.int32]) -> NDArray[np.int32]:
    """Tokens of the longer sequence of rows of `lengths`, the first `chosen` of which are the first sequence's."""
    found: NDArray[np.int32] = np.maximum(chosen, lengths - chosen)
    return found


def read_at(handle: int, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset` on; the system gives at most 2 GiB at a time."""
    pieces = []
    while length:
        piece = os.pread(handle, length, offset)
        if not piece:
            raise DataError("the tokens of the rows in the cache are cut off.", "remove cache/tokens in LORAPORT_HOME")
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def open_store(
    source: Source, format: str, encoder: Encoder, home: Home, data_sha256: str = "", method: str = "auto"
) -> TokenStore:
    """The store of a source's rows, from the cache or made now. `data_sha256`: of `hash_source`, if it is known.

    DataError at the first row that cannot be trained on, or is not for `method` (auto: unlike the first row),
    ResourceError without disk; neither leaves a file.
    """
    key = json.dumps([LAYOUT, data_sha256 or hash_source(source), format, encoder.fingerprint])
    parent = home.ensure(home.cache / "tokens")
    target = parent / hashlib.sha256(key.encode()).hexdigest()[:32]
    store = TokenStore(target, source, format)
    if (target / "about.json").is_file():
        with suppress(OSError):
            os.utime(target)  # it is in use: see `sweep`
        if method != "auto":
            refuse_other_method(store, method)
        return store
    require_disk(parent, int(DISK_PER_BYTE * expected_bytes(source)), f"the token cache of {source.name}")
    sweep(parent)
    with os_errors("writing", parent):
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{os.getpid()}-", dir=parent))
        try:
            build(store, encoder, partial, method)
            with suppress(OSError):  # another run was faster; its files are the same
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return store


def expected_bytes(source: Source) -> int:
    """About how long a source is when it is unpacked."""
    packed = (".gz", ".parquet")
    return sum(path.stat().st_size * (PACKED if path.suffix in packed else 1) for path in source.files)


def sweep(parent: Path) -> None:
    """Remove what runs that were killed have left, and what nobody has used for a month."""
    for stale in parent.glob(".partial-*"):
        if not Path(f"/proc/{stale.name.split('-')[1]}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    for kept in parent.glob("[0-9a-f]*"):
        with suppress(OSError):
            if time.time() - kept.stat().st_mtime > KEPT_DAYS * 24 * 3600:
                shutil.rmtree(kept, ignore_errors=True)


def build(store: TokenStore, encoder: Encoder, folder: Path, method: str = "auto") -> None:
    """Write the files of a store into `folder`."""
    columns = {name: array(code) for name, code in COLUMNS.items()}
    numbers = {str(path): number for number, path in enumerate(store.source.files)}
    untrained = 0
    with ExitStack() as stack:
        tokens, marks = (stack.enter_context((folder / name).open("wb", 1 << 20)) for name in (TOKENS, MARKS))
        for example in encoder.encode_many(of_method(iter_rows(store.source, store.format), method)):
            if isinstance(example, BadRow):
                raise example.error
            for each in (example, example.rejected):
                if each:
                    tokens.write(np.ascontiguousarray(each.input_ids).data)
                    marks.write((each.labels != IGNORED).data)
            untrained += example.untrained_turns
            note(columns, example, numbers)
    for name, values in columns.items():
        with (folder / f"{name}.bin").open("wb") as handle:
            values.tofile(handle)
    about = {
        "source": store.source.name,
        "rows": len(columns["lengths"]),
        "tokens": sum(columns["lengths"]),
        "trained_tokens": sum(columns["trained"]),
        "untrained_turns": untrained,
        "thinking_rows": sum(columns["thinking"]),
    }
    write_json(folder / "about.json", about)


def note(columns: dict[str, "array[Any]"], example: Example, numbers: dict[str, int]) -> None:
    """The numbers that are kept of a row."""
    assert example.row is not None
    first, other = len(example.input_ids), example.rejected
    columns["lengths"].append(first + (len(other.input_ids) if other else 0))
    columns["chosen"].append(first if other else 0)
    columns["trained"].append(example.trained_tokens + (other.trained_tokens if other else 0))
    columns["lines"].append(example.line)
    columns["files"].append(numbers[example.row.source])
    columns["thinking"].append(example.thinking)
    columns["groups"].append(group_of(example.row))


def refuse_long(store: TokenStore, longest: int) -> None:
    """DataError that counts the rows longer than `longest` tokens and names the first of them; of a pair, each of the
    two sequences may be as long.
    """
    lengths = store.longest_sequences
    too_long = np.flatnonzero(lengths > longest)
    if len(too_long):
        most = int(lengths.max())
        first = "; ".join(store.where(index) for index in too_long[:SHOWN_LINES])
        more = "; ..." if len(too_long) > SHOWN_LINES else ""
        error = DataError(
            f"{len(too_long):,} of {len(store):,} rows are longer than {longest:,} tokens ({first}{more}).",
            f"the longest has {most} tokens: --sequence-length {most}, or shorten or split those rows",
        )
        error.file = str(store.source.files[int(store.files[too_long[0]])])
        error.row = int(store.lines[too_long[0]])
        raise error
