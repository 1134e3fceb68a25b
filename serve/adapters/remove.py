"""Versions deleted from the home: never one that an endpoint serves, and never half of one.

>>> remove_version(home, "demo@v1")
PosixPath('/home/me/.loraport/adapters/demo/v1')
"""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from loraport.clients.endpoint import is_alive, read_records
from loraport.clients.errors import AdapterError, ResourceError, UsageError, os_errors
from loraport.clients.home import Home
from loraport.serve.adapters import remote
from loraport.serve.adapters.catalog import Aliases, Catalog, serving_ports, split_name
from loraport.train.adapters import check_name, versions


def remove_version(home: Home, reference: str) -> Path:
    """Delete `demo@v1`; return the folder that was. UsageError for a reference without a version."""
    name, which = split_name(reference)
    if "/" in reference or ":" in reference or which is None:
        raise UsageError(
            f"{reference} does not say which version to delete.", f"{name}@v1 is one; --all with {name} deletes all"
        )
    return remove(home, find(home, name, which))


def remove_all(home: Home, name: str) -> list[Path]:
    """Delete all versions of an adapter, unless one of them is served."""
    found = versions(home, check_name(name))
    if not found:
        raise AdapterError(f"there is no adapter {name} in {home.adapters}.", "`loraport adapters list` shows them")
    for folder in found:
        check_unserved(home, folder)
    removed = [remove(home, folder) for folder in found]
    (home.adapters / name / "aliases.json").unlink(missing_ok=True)
    with suppress(OSError):
        (home.adapters / name).rmdir()
    return removed


def find(home: Home, name: str, version: str) -> Path:
    """The folder of a version; AdapterError with those there are."""
    found = versions(home, check_name(name))
    folder = next((path for path in found if path.name == version), None)
    if folder is None:
        there = f"there is: {', '.join(path.name for path in found)}" if found else "`loraport adapters list` shows all"
        raise AdapterError(f"there is no adapter {name}@{version} in {home.adapters}.", there)
    return folder


def check_unserved(home: Home, folder: Path) -> None:
    """ResourceError where a running endpoint serves that version."""
    reference = f"{folder.parent.name}@{folder.name}"
    alive = {record.port for record in read_records(home) if is_alive(record.process)}
    port = next((port for port, known in serving_ports(home).items() if reference in known.references), None)
    loaded = [entry for entry in remote.listings(home) if entry["name"] == folder.parent.name]
    if any(folder.name == entry.get("prev") and entry.get("is_prev_loaded") for entry in loaded):
        raise ResourceError(
            f"{reference} is the version before the one that is served, and still loaded.",
            f"unload it first: loraport adapters unload {folder.parent.name}:prev",
        )
    if port in alive:
        raise ResourceError(
            f"{reference} is served on port {port}.", f"unload it first: loraport adapters unload {folder.parent.name}"
        )


def remove(home: Home, folder: Path) -> Path:
    """Delete one version, which no endpoint may serve."""
    check_unserved(home, folder)
    return take_away(home, folder)


def take_away(home: Home, folder: Path) -> Path:
    """Delete it whoever serves it: out of sight by one rename, then its files; aliases and registrations go too."""
    name, reference = folder.parent.name, f"{folder.parent.name}@{folder.name}"
    for port, known in serving_ports(home).items():
        if reference in known.references:
            Catalog(home, port).forget(name)
    catalog, known_aliases = Catalog(home), Catalog(home).aliases(name)
    kept = [
        entry if entry and entry.folder != str(folder) else None for entry in (known_aliases.latest, known_aliases.prev)
    ]
    if known_aliases != Aliases(*kept):
        catalog.write_aliases(name, Aliases(*kept))
    with os_errors("removing", folder):
        grave = Path(tempfile.mkdtemp(prefix=".removed-", dir=folder.parent))
        folder.rename(grave / folder.name)
        shutil.rmtree(grave)
    return folder
