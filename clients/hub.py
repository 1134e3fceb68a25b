"""What downloads of models and of data sets share: try the hub, else the cache; refuse in words; close the bars.

>>> fetch("org/questions", DATA_SET, look, lambda: snapshot_download("org/questions", repo_type="dataset"))
PosixPath('/home/me/.cache/huggingface/hub/datasets--org--questions/snapshots/0c4f…')
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import LoraportError, Refused, ResourceError, http_errors, os_errors
from loraport.clients.home import require_disk


@dataclass(frozen=True)
class Kind:
    """What is fetched, in words, and the error that refuses it. `prefix`: of its folder in the hub's cache."""

    error: type[Refused]
    prefix: str
    thing: str
    local: str
    gated: tuple[str, str]
    private: str
    instead: str


def fetch(name: str, kind: Kind, look: Callable[[], None] | None, get: Callable[[], str]) -> Path:
    """The folder that `get` brings, or finds in the cache; `look` asks the hub beforehand and may refuse.

    A hub that is away, or refuses now what it gave before, does not matter while the cache has it.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    network: tuple[type[Exception], ...] = (OSError, *http_errors("HTTPError"))  # HfHubHTTPError is both
    refusals: tuple[type[Exception], ...] = (hub.HFValidationError, *network)
    try:
        if look and not constants.HF_HUB_OFFLINE:
            with contextlib.suppress(*network):
                look()
        return Path(get())
    except refusals as error:
        raise explain(error, name, kind) from error
    finally:
        close_bars()


def explain(error: Exception, name: str, kind: Kind) -> LoraportError:
    """Why something did not come: gated, unknown, unreachable, or broken off. An unknown one may also be private."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
    if isinstance(error, hub.GatedRepoError):
        what, where = kind.gated
        return kind.error(
            f"the {kind.thing} {name} on {constants.ENDPOINT} is gated: its {what} must be accepted first.",
            f"accept {where} page, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, hub.HFValidationError) or status in (401, 404):
        return kind.error(
            f"there is no {kind.local} {name} and no such {kind.thing} on {constants.ENDPOINT}.",
            f"check the spelling; for a private {kind.private} run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, hub.LocalEntryNotFoundError):
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        return kind.error(
            f"there is no {kind.local} {name}, the cache {constants.HF_HUB_CACHE} does not hold all of the "
            f"{kind.thing} {name}, and {state}.",
            f"go online once, or give the path of a {kind.instead}",
        )
    if isinstance(error, OSError) and error.errno:
        try:
            with os_errors("downloading to", Path(constants.HF_HUB_CACHE)):
                raise error
        except ResourceError as full:
            return full
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return kind.error(f"downloading {name} failed: {reason}.", "try again; files that arrived whole are kept")


def require_room(info: Any, sizes: dict[str, int], kind: Kind) -> None:
    """ResourceError unless the disk holds what the cache lacks of these files. `info`: the hub's, `sizes` in bytes."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    have = cache / f"{kind.prefix}--{info.id.replace('/', '--')}" / "snapshots" / (info.sha or "")
    missing = sum(size for name, size in sizes.items() if not (have / name).exists())
    try:
        require_disk(cache, missing, f"the {kind.thing} {info.id}")
    except ResourceError as error:
        raise ResourceError(error.message, "free some space, or set HF_HOME to a folder on another disk") from error


def close_bars() -> None:
    """Close the progress bars that huggingface_hub leaves open, in the way of what is printed next."""
    from huggingface_hub.utils.tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
