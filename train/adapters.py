"""The adapters on this machine: names, versions, and the check that a folder is whole. No torch here.

A reference is `demo` (its newest version), `demo@v2`, or a path to an adapter folder.

    >>> find_adapter(Home.default(), "demo").name
    'v2'
"""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from loraport.clients.errors import AdapterError, UsageError
from loraport.clients.home import Home
from loraport.train.manifest import Manifest
from loraport.train.weights import read_safetensors_shapes

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# A name is also a model name in URLs, Aider and vLLM: no slash, colon or blank. `base` is the base model's own alias.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = re.compile(r"v([1-9][0-9]*)")


@dataclass(frozen=True)
class Adapter:
    """One version of an adapter, with its manifest read."""

    folder: Path
    manifest: Manifest


def check_name(name: str) -> str:
    """Return `name` if an adapter may be called so; UsageError otherwise."""
    if name == "base" or not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of an adapter.",
            "use letters, digits, dot, dash and underscore, at most 64, not 'base'",
        )
    return name


def versions(home: Home, name: str) -> list[Path]:
    """Folders of the versions of adapter `name`, oldest first; empty when there is none."""
    folder = home.adapters / name
    found = [path for path in folder.iterdir() if VERSION.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[1:]))


def adapter_names(home: Home) -> list[str]:
    """Names that have at least one version, sorted."""
    folders = home.adapters.iterdir() if home.adapters.is_dir() else []
    return sorted(path.name for path in folders if NAME.fullmatch(path.name) and versions(home, path.name))


def find_adapter(home: Home, reference: str) -> Path:
    """Folder of `demo`, `demo@v2` or a path; AdapterError that lists what there is otherwise."""
    if "/" in reference:
        path = Path(reference).expanduser()
        if path.is_dir():
            return path.absolute()
        raise AdapterError(f"there is no adapter folder {reference}.", "check the path")
    name, _, version = reference.partition("@")
    found = versions(home, name)
    chosen = [path for path in found if path.name == version] if version else found[-1:]
    if chosen:
        return chosen[0]
    known = ", ".join(path.name for path in found) if found else ", ".join(adapter_names(home))
    raise AdapterError(
        f"there is no adapter {reference} in {home.adapters}.",
        f"there is: {known}" if known else f"train it first: loraport train --name {name} --data rows.jsonl",
    )


def open_adapter(home: Home, reference: str) -> Adapter:
    """Find an adapter, read its manifest and check that its files are whole."""
    folder = find_adapter(home, reference)
    manifest = Manifest.read(folder)
    check_whole(folder, manifest)
    return Adapter(folder, manifest)


def check_whole(folder: Path, manifest: Manifest) -> None:
    """AdapterError unless configuration and weights are there, readable, and as large as they say."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} has no {CONFIG}.", "the folder is incomplete: train again")
    shapes = read_safetensors_shapes(folder / WEIGHTS, AdapterError)
    size = (folder / WEIGHTS).stat().st_size
    if size != manifest.adapter_bytes:
        raise AdapterError(
            f"{folder / WEIGHTS} has {size:,} bytes, the manifest says {manifest.adapter_bytes:,}.",
            "the file was cut off or replaced: train again, or restore the folder",
        )
    parameters = sum(prod(shape) for shape in shapes.values())
    if parameters != manifest.trainable_parameters:
        raise AdapterError(
            f"{folder / WEIGHTS} holds {parameters:,} parameters, the manifest says {manifest.trainable_parameters:,}.",
            "the file belongs to another adapter: train again, or restore the folder",
        )
