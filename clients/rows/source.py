"""Where rows lie: a file, a folder of files, or a data set on a hub, as the list of files that hold them.

A name with `:split` at its end (`org/name:test`) chooses the files of that split; without one, a folder or data set
whose files are named after splits gives those for training, so that nobody trains on the test rows by accident.

    >>> find_source("examples/demo/train.jsonl").files
    (PosixPath('examples/demo/train.jsonl'),)
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from loraport.clients.errors import UsageError, os_errors

TABLES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
DOCUMENTS = (".txt", ".md")
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # left by `datasets`
CARDS = re.compile(r"(readme|license|licence|changelog|contributing)\b.*", re.I)
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    "test": "test",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:\w+)?")


@dataclass(frozen=True)
class Source:
    """`files` in the order in which their rows come; `name` as the user gave it; `note`: what was left out."""

    name: str
    files: tuple[Path, ...]
    note: str = ""


def find_source(name: str | Path) -> Source:
    """The files that `name` stands for; a hub's data set is downloaded, or taken from the cache.

    UsageError when there is nothing of that name, or nothing in it that holds rows; DataError for a hub's refusals.
    """
    path, split = split_name(str(name))
    if path.is_file():
        check_suffix(path)
        return Source(str(name), (path,))
    if path.is_dir():
        return choose(str(name), find_files(path), path, split)
    if looks_like_hub_id(str(name)):
        from loraport.clients.rows.hub import download

        folder = download(str(name).partition(":")[0])
        return choose(str(name), find_files(folder, documents=(".txt",)), folder, split)
    raise UsageError(f"there is no data file {name}.", "check the path, or give a hub data set as org/name")


def split_name(name: str) -> tuple[Path, str]:
    """A path and the split behind its last colon, if any."""
    path = Path(name).expanduser()
    before, colon, split = name.rpartition(":")
    if colon and not path.exists() and re.fullmatch(r"\w+", split):
        return Path(before).expanduser(), split
    return path, ""


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` can be a data set's id; a name with a suffix of data files is a path that is missing."""
    return bool(HUB_ID.fullmatch(name)) and suffix_of(Path(name)) not in TABLES + DOCUMENTS


def suffix_of(path: Path) -> str:
    """The suffix that tells the kind of file, in lower case; .gz aside."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def unit_of(path: Path) -> str:
    """What the numbers of a file's records count."""
    return "line" if suffix_of(path) in ("", ".jsonl", ".ndjson") else "row"


def check_suffix(path: Path) -> None:
    """UsageError for an Arrow, Excel or other file that we do not read; no suffix is JSONL."""
    if suffix_of(path) in ("", *TABLES, *DOCUMENTS):
        return
    known = ", ".join(TABLES + DOCUMENTS)
    raise UsageError(f"{path} is of no kind that holds rows.", f"known suffixes: {known}; .gz on top of them")


def find_files(folder: Path, documents: tuple[str, ...] = DOCUMENTS) -> list[Path]:
    """Files with rows in `folder` and below, sorted by path; cards and hidden files aside where there are tables."""
    with os_errors("reading", folder):
        found = sorted(p for p in folder.rglob("*") if p.is_file() and not is_hidden(p.relative_to(folder)))
    tables = [p for p in found if suffix_of(p) in TABLES and p.name not in NOT_ROWS]
    texts = [p for p in found if suffix_of(p) in documents and not (tables and CARDS.fullmatch(p.stem))]
    return sorted([*tables, *texts])


def is_hidden(path: Path) -> bool:
    """Whether the file, or a folder on the way to it, begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def split_of(path: Path) -> str | None:
    """The split that a file's name, or its folder's, tells: `data/train-00000-of-00004.parquet`."""
    words = [word for part in (path.name, *path.parts[-2:-1]) for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def choose(name: str, files: list[Path], folder: Path, split: str) -> Source:
    """Those of `files` that belong to the split; without one, to training, if any file is named so."""
    if not files:
        known = ", ".join(TABLES + DOCUMENTS)
        raise UsageError(f"{name} is a folder, not a file of rows, and has none in it.", f"known suffixes: {known}")
    splits = {path: split_of(path.relative_to(folder)) for path in files}
    wanted = SPLITS.get(split, split) or ("train" if "train" in splits.values() else None)
    chosen = [path for path in files if wanted is None or splits[path] == wanted]
    if not chosen:
        there = ", ".join(sorted({found or "none" for found in splits.values()}))
        raise UsageError(f"{name} has no files of the split {split!r}.", f"its files are of: {there}")
    left = len(files) - len(chosen)
    return Source(name, tuple(chosen), f"{name}: split {wanted}, {left} other files left out" if left else "")


def hash_source(source: Source) -> str:
    """SHA-256 over kind and bytes of all files in order; names do not count. Reads in pieces."""
    digest = hashlib.sha256()
    for path in source.files:
        with os_errors("reading", path), path.open("rb") as handle:
            digest.update(suffix_of(path).encode() + b"\0" + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
