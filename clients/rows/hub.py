"""A data set of a model hub: its files with rows, downloaded once into the hub's shared cache, and refused in words.

Loading scripts are never run: they are code of strangers.

    >>> download("org/questions")
    PosixPath('/home/me/.cache/huggingface/hub/datasets--org--questions/snapshots/0c4f…')
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from loraport.clients.errors import DataError, LoraportError, ResourceError, http_errors, os_errors
from loraport.clients.home import require_disk

SUFFIXES = ("jsonl", "ndjson", "json", "parquet", "csv", "tsv", "txt")
WANTED = tuple(f"*.{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz"))


def download(name: str) -> Path:
    """The folder with the data set's files that hold rows, downloaded or from the cache.

    A hub that is away, or refuses now what it gave before, does not matter while the cache has the data set. DataError
    when it is unknown, gated or has no files that we read; ResourceError without disk.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub

    network: tuple[type[Exception], ...] = (OSError, *http_errors("HTTPError"))  # HfHubHTTPError is both
    refusals: tuple[type[Exception], ...] = (hub.HFValidationError, *network)
    try:
        if not constants.HF_HUB_OFFLINE:
            with contextlib.suppress(*network):
                check(HfApi().dataset_info(name, files_metadata=True))
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(WANTED)))
    except refusals as error:
        raise explain(error, name) from error
    finally:
        close_bars()


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
    cache = Path(constants.HF_HUB_CACHE)
    have = cache / f"datasets--{info.id.replace('/', '--')}" / "snapshots" / (info.sha or "")
    missing = sum(size for name, size in sizes.items() if not (have / name).exists())
    try:
        require_disk(cache, missing, f"the data set {info.id}")
    except ResourceError as error:
        raise ResourceError(error.message, "free some space, or set HF_HOME to a folder on another disk") from error


def explain(error: Exception, name: str) -> LoraportError:
    """Why a data set did not come: gated, unknown, unreachable, or broken off. An unknown one may also be private."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
    if isinstance(error, hub.GatedRepoError):
        return DataError(
            f"the data set {name} on {constants.ENDPOINT} is gated: its terms must be accepted first.",
            "accept them on its page, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, hub.HFValidationError) or status in (401, 404):
        return DataError(
            f"there is no file or folder {name} and no such data set on {constants.ENDPOINT}.",
            "check the spelling; for a private one run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, hub.LocalEntryNotFoundError):
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        return DataError(
            f"there is no file or folder {name}, the cache {constants.HF_HUB_CACHE} does not hold all of the data set "
            f"{name}, and {state}.",
            "go online once, or give the path of a file",
        )
    if isinstance(error, OSError) and error.errno:
        try:
            with os_errors("downloading to", Path(constants.HF_HUB_CACHE)):
                raise error
        except ResourceError as full:
            return full
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return DataError(f"downloading {name} failed: {reason}.", "try again; files that arrived whole are kept")


def close_bars() -> None:
    """Close the progress bars that huggingface_hub leaves open, in the way of what is printed next."""
    from huggingface_hub.utils.tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
