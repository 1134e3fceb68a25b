"""The adapters on this machine: names, versions, and the check that a folder is whole. No torch here.

A reference is `demo` (its newest version), `demo@v2`, or a path to an adapter folder.

    >>> find_adapter(Home.default(), "demo").name
    'v2'
"""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

from loraport.clients.errors import AdapterError, LoraportError, UsageError, os_errors
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


def find_same(home: Home, name: str, fingerprint: str) -> Adapter | None:
    """The newest version of `name`, if it is whole and was made from the same inputs."""
    found = versions(home, name)
    try:
        newest = open_adapter(home, str(found[-1])) if found else None
    except LoraportError:
        return None  # damaged: train again
    return newest if newest and newest.manifest.fingerprint == fingerprint else None


class PartialVersion:
    """A hidden folder beside the versions of `name`, removed at the end unless it was renamed to a version."""

    def __init__(self, home: Home, name: str) -> None:
        self.home = home
        self.parent = home.adapters / name

    def __enter__(self) -> Path:
        self.home.ensure(self.parent)
        for stale in self.parent.glob(".partial-*"):  # of a run that was killed
            if not Path(f"/proc/{stale.name.split('-')[1]}").exists():
                shutil.rmtree(stale, ignore_errors=True)
        with os_errors("making a folder in", self.parent):
            self.folder = Path(tempfile.mkdtemp(prefix=f".partial-{os.getpid()}-", dir=self.parent))
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # it holds versions, or another run's folder
            self.parent.rmdir()


def publish(home: Home, folder: Path, manifest: Manifest) -> Adapter:
    """Give the finished folder the next version number, by a rename that either happens or does not."""
    while True:
        found = versions(home, manifest.name)
        number = int(found[-1].name[1:]) + 1 if found else 1
        target = folder.parent / f"v{number}"
        manifest = manifest.model_copy(update={"version": target.name})
        manifest.write(folder)
        check_whole(folder, manifest)
        with os_errors("storing", target):
            try:
                folder.rename(target)
            except OSError:
                if not target.exists():  # another run took the number; anything else is an error
                    raise
                continue
        return Adapter(target, manifest)
