"""A data set of a model hub: its files with rows, downloaded once into the hub's shared cache, and refused in words.

Loading scripts are never run: they are code of strangers.

    >>> download("org/questions")
    PosixPath('/home/me/.cache/huggingface/hub/datasets--org--questions/snapshots/0c4f…')
"""

import re
from pathlib import Path
from typing import Any

from loraport.clients.errors import DataError
from loraport.clients.hub import Kind, fetch, require_room

SUFFIXES = ("jsonl", "ndjson", "json", "parquet", "csv", "tsv", "txt")
WANTED = tuple(f"*.{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz"))
DATA_SET = Kind(DataError, "datasets", "data set", "file or folder", ("terms", "them on its"), "one", "file")


def download(name: str) -> Path:
    """The folder with the data set's files that hold rows, downloaded or from the cache.

    A hub that is away, or refuses now what it gave before, does not matter while the cache has the data set. DataError
    when it is unknown, gated or has no files that we read; ResourceError without disk.
    """
    from huggingface_hub import HfApi, snapshot_download

    return fetch(
        name,
        DATA_SET,
        lambda: check(HfApi().dataset_info(name, files_metadata=True)),
        lambda: snapshot_download(name, repo_type="dataset", allow_patterns=list(WANTED)),
    )


def check(info: Any) -> None:
    """Refuse a data set without files that we read, or that the disk cannot hold. `info`: with sizes."""
    from huggingface_hub import constants

    endings = re.compile(rf".*\.({'|'.join(SUFFIXES)})(\.gz)?")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if endings.fullmatch(file.rfilename)}
    if not sizes:
        raise DataError(
            f"the data set {info.id} on {constants.ENDPOINT} has no files with rows.",
            f"Loraport reads {', '.join(SUFFIXES)}, and runs no loading scripts",
        )
    require_room(info, sizes, DATA_SET)
