"""Names, immutable versions, aliases, and what is registered for serving; all in files of the home.

A reference says which version of which adapter is meant:

    demo                 the newest version that was trained         demo:latest, demo@prev   what the aliases point at
    demo@v2              that version                                ./folder, name=./folder  an adapter folder

    adapters/<name>/aliases.json    {"latest": {"version": "v3", "folder": "…"}, "prev": …}
    serving/<port>.json             what the endpoint on that port serves, so that it comes back without arguments

A version in the home is `v3`; a folder elsewhere may change, so the hash of its contents is its version. The engine
calls an adapter `demo@v3`, and a name never means other weights than before.

    >>> Catalog(home).set_latest(open_reference(home, "demo", (0, 32)))
    >>> Catalog(home).aliases("demo").latest.version
    'v3'
"""

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loraport.clients.errors import AdapterError, LoraportError, UsageError
from loraport.clients.home import Home, write_json
from loraport.serve.adapters import foreign
from loraport.serve.adapters.accept import check_servable
from loraport.serve.engine import versions as engine_versions
from loraport.train.adapters import Adapter, check_name, check_whole, find_adapter, open_adapter
from loraport.train.base_model import Base, resolve
from loraport.train.manifest import FILE_NAME, Manifest

LATEST, PREV = "latest", "prev"
ALIASES = "aliases.json"
VERSIONED = re.compile(r"(?P<name>[^@:]+)[@:](?P<which>[^@:]+)")
USUAL_PORT = 8000


@dataclass(frozen=True)
class Entry:
    """A version of an adapter and where it lies."""

    name: str
    version: str
    folder: str

    def reference(self, home: Home) -> str:
        """How to ask for it again."""
        own = home.adapters / self.name / self.version
        return f"{self.name}@{self.version}" if Path(self.folder) == own else f"{self.name}={self.folder}"


@dataclass(frozen=True)
class Aliases:
    """What `demo:latest` and `demo:prev` mean."""

    latest: Entry | None = None
    prev: Entry | None = None

    @property
    def by_name(self) -> dict[str, Entry | None]:
        """The same by the aliases' names."""
        return {LATEST: self.latest, PREV: self.prev}


@dataclass(frozen=True)
class Registered:
    """What an endpoint serves: the base as it was called, and references of the adapters."""

    base: str | None
    references: tuple[str, ...]


def engine_name(adapter: Adapter) -> str:
    """`demo@v3`: what the engine calls an adapter."""
    return f"{adapter.manifest.name}@{adapter.manifest.version}"


def entry_of(adapter: Adapter) -> Entry:
    """An adapter as the files name it."""
    return Entry(adapter.manifest.name, adapter.manifest.version, str(adapter.folder))


class Catalog:
    """The files. Each change appears at once or not at all; a damaged file counts as none, and is written anew."""

    def __init__(self, home: Home, port: int = USUAL_PORT) -> None:
        self.home = home
        self.path = home.root / "serving" / f"{port}.json"

    def aliases(self, name: str) -> Aliases:
        """The aliases of an adapter; without any where it was never served."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            fields = json.loads((self.home.adapters / name / ALIASES).read_text(encoding="utf-8"))
            return Aliases(*(Entry(name, **fields[which]) if fields.get(which) else None for which in (LATEST, PREV)))
        return Aliases()

    def set_latest(self, adapter: Adapter) -> Aliases:
        """`latest` means this version from now on, `prev` what it meant before. The same version again: no change."""
        known, entry = self.aliases(adapter.manifest.name), entry_of(adapter)
        made = known if known.latest == entry else Aliases(entry, known.latest)
        self.write_aliases(adapter.manifest.name, made)
        return made

    def write_aliases(self, name: str, aliases: Aliases) -> None:
        """Put the aliases of an adapter on disk."""
        document = {
            which: {"version": entry.version, "folder": entry.folder} if entry else None
            for which, entry in aliases.by_name.items()
        }
        write_json(self.home.ensure(self.home.adapters / check_name(name)) / ALIASES, document)

    def registered(self) -> Registered:
        """What the endpoint on this port served last; empty where that is not known."""
        base, entries = self.read()
        return Registered(base, tuple(entry.reference(self.home) for entry in entries))

    def read(self) -> tuple[str | None, list[Entry]]:
        """(base, adapters) of the file."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            fields = json.loads(self.path.read_text(encoding="utf-8"))
            return fields["base"], [Entry(**entry) for entry in fields["adapters"]]
        return None, []

    def begin(self, base: Base, adapters: list[Adapter]) -> None:
        """Register these adapters on that base, and no others; each is the latest of its name."""
        self.write(base.model, [entry_of(adapter) for adapter in adapters])
        for adapter in adapters:
            self.set_latest(adapter)

    def put(self, base: Base, adapter: Adapter) -> None:
        """Register an adapter in place of what had its name, as the latest of it; both or neither."""
        before = self.aliases(adapter.manifest.name)
        self.set_latest(adapter)
        try:
            self.register(base, adapter)
        except LoraportError:
            self.write_aliases(adapter.manifest.name, before)
            raise

    def register(self, base: Base, adapter: Adapter) -> None:
        """Register an adapter in place of what had its name."""
        _, entries = self.read()
        entry = entry_of(adapter)
        if any(known.name == entry.name for known in entries):
            self.write(base.model, [entry if known.name == entry.name else known for known in entries])
        else:
            self.write(base.model, [*entries, entry])

    def forget(self, name: str) -> None:
        """Register an adapter no longer."""
        base, entries = self.read()
        self.write(base, [entry for entry in entries if entry.name != name])

    def write(self, base: str | None, entries: list[Entry]) -> None:
        """Put the registered adapters on disk."""
        self.home.ensure(self.path.parent)
        write_json(self.path, {"base": base, "adapters": [asdict(entry) for entry in entries]})


def serving_ports(home: Home) -> dict[int, Registered]:
    """What is registered, by port."""
    folder = home.root / "serving"
    paths = folder.glob("*.json") if folder.is_dir() else ()
    return {int(path.stem): Catalog(home, int(path.stem)).registered() for path in paths if path.stem.isdigit()}


def locate(home: Home, reference: str, name: str | None = None) -> tuple[Path, str | None]:
    """(folder, the name that it is to have, None for its own) of a reference; AdapterError where nothing is."""
    given, equals, path = reference.partition("=")
    if equals and "/" not in given:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise AdapterError(f"there is no adapter folder {path}.", "check the path")
        return folder.absolute(), check_name(name or given)
    if name is not None:
        check_name(name)
    stem, which = split_name(reference)
    if which in (LATEST, PREV):
        return Path(aliased(home, stem, which).folder), name
    if ":" in reference and "/" not in reference:
        raise UsageError(f"{reference} is no reference.", f"use {stem}:latest, {stem}:prev or {stem}@v1")
    return find_adapter(home, reference), name


def aliased(home: Home, name: str, which: str) -> Entry:
    """The version that `demo:latest` or `demo:prev` means; AdapterError where there is none."""
    found = Catalog(home).aliases(name).by_name[which]
    if found is None:
        raise AdapterError(f"there is no {name}:{which}.", "an alias is set when the adapter is served; use its name")
    return found


def open_reference(
    home: Home,
    reference: str,
    version: engine_versions.Version,
    base: Base | str | None = None,
    name: str | None = None,
) -> Adapter:
    """The adapter that a reference means, known to be whole and servable.

    `base`: what a folder without our manifest is served on, by default what its adapter_config.json names.
    """
    folder, name = locate(home, reference, name)
    check_servable(folder, version)
    if home.adapters not in folder.parents and not (folder / FILE_NAME).is_file():
        on = resolve(base) if isinstance(base, str) else base
        return foreign.open_foreign(folder, on or foreign.recorded_base(folder), name)
    manifest = Manifest.read(folder)
    check_whole(folder, manifest)
    name, label = name or manifest.name, manifest.version
    if folder != home.adapters / name / label:  # a copy, or another's name: `demo@v3` must mean the home's v3
        label = f"{label}-{foreign.content_hash(folder)}"
    return Adapter(folder, manifest.model_copy(update={"name": name, "version": label}))


def open_whole(home: Home, reference: str) -> Adapter:
    """The adapter that a reference means, known to be whole, of whatever rank: `--merge` puts it into no slot."""
    folder, name = locate(home, reference)
    adapter = open_adapter(home, str(folder))
    return replace(adapter, manifest=adapter.manifest.model_copy(update={"name": name})) if name else adapter


def require_unchanged(adapter: Adapter, home: Home) -> None:
    """AdapterError where a folder outside the home holds other weights than when it got its version, or is gone."""
    if home.adapters in adapter.folder.parents:  # immutable
        return
    try:
        found = foreign.content_hash(adapter.folder)
    except OSError as error:
        words = f"{adapter.folder} cannot be read any more ({error.strerror})."
        raise AdapterError(words, "load it again from where it is now") from error
    if not adapter.manifest.version.endswith(found):
        raise AdapterError(
            f"{adapter.folder} has changed since it was loaded as {engine_name(adapter)}.",
            "load it again: it is another version now",
        )


def split_name(text: str) -> tuple[str, str | None]:
    """("demo", "v2") of `demo@v2` and of `demo:v2`; ("demo", None) of `demo`."""
    found = VERSIONED.fullmatch(text)
    return (found["name"], found["which"]) if found else (text, None)
