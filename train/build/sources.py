"""Which files of the given sources are documents: walks folders, leaves out what nobody learns from, says why.

Links to folders are not followed, so that loops cannot arise. What a .gitignore leaves out is left out; a file that
the user names is always read.

    >>> found, skipped = find_files([Path("docs")])
    >>> found[0].name
    'docs/design.md'
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraport.clients.errors import Refused, UsageError
from loraport.train.build.phrases import terms_in

LARGEST_BYTES = 64 * 2**20
SKIPPED_FOLDERS = terms_in(
    """
    node_modules, __pycache__, venv, site-packages, dist, build, target, vendor, _static, _sources, _images
    """
)
# Whole files about the project's affairs: nobody asks a model about them, and they would be learnt by heart.
SKIPPED_STEMS = terms_in(
    """
    license, licence, copying, notice, authors, contributors, maintainers, code_of_conduct, code-of-conduct,
    security, changelog, changes, history, news, release_notes, release-notes, pull_request_template, funding,
    codeowners, thanks, credits, patents, third_party_notices, robots, requirements, constraints, sources,
    top_level, entry_points, whatsnew, releases, genindex, search, py-modindex, 404
    """
)
# The ending of a file says how it is read; `readers.py` has the readers.
FORMATS = {
    "markdown": (".md", ".markdown", ".mdx", ".qmd", ".rmd"),
    "html": (".html", ".htm", ".xhtml"),
    "text": (".txt", ".text"),
    "rst": (".rst", ".rest"),
    "pdf": (".pdf",),
    "python": (".py", ".pyi"),
    "source": (
        ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".java", ".js", ".jsx", ".kt", ".lua", ".mjs", ".php", ".rb",
        ".rs", ".scala", ".sh", ".swift", ".ts", ".tsx", ".zig",
    ),
}  # fmt: skip
FORMAT_OF = {ending: name for name, endings in FORMATS.items() for ending in endings}


class Unreadable(Refused):
    """A file that is not read as a document; the message is the reason. It is counted, and ends nothing."""


@dataclass(frozen=True)
class File:
    """A file to read: where it lies, what it is called in rows, and its format. `root`: the source it was found in."""

    path: Path
    name: str
    format: str
    root: Path


@dataclass(frozen=True)
class Skipped:
    """A file that is not read, and why."""

    name: str
    reason: str


def find_files(sources: list[Path]) -> tuple[list[File], list[Skipped]]:
    """Files to read in the order of their names, each once, and those left out for a reason worth telling.

    Raises UsageError when a source is not there.
    """
    found: list[File] = []
    skipped: list[Skipped] = []
    seen: set[Path] = set()
    names: set[str] = set()
    for source in sources:
        if not source.exists():
            raise UsageError(f"there is no file or folder {source}.", "check the path")
        if not source.is_dir() and not source.is_file():
            raise UsageError(f"{source} is neither a file nor a folder.", "give files and folders")
        for file in walk(source, skipped) if source.is_dir() else [named(source)]:
            real = file.path.resolve()
            if real not in seen:
                seen.add(real)
                found.append(replace(file, name=unused(file, names)))
                names.add(found[-1].name)
    return found, skipped


def unused(file: File, names: set[str]) -> str:
    """The file's name, with as many folders before it as tell it from those of other sources."""
    parts = file.path.absolute().parts
    lengths = range(file.name.count("/") + 2, len(parts) + 1)
    longer = ("/".join(parts[-length:]).removeprefix("//") for length in lengths)
    return file.name if file.name not in names else next(name for name in longer if name not in names)


def named(path: Path) -> File:
    """A file that the user named: of unknown ending, it is read as text."""
    return File(path, path.name, FORMAT_OF.get(path.suffix.lower(), "text"), path.parent)


def walk(root: Path, skipped: list[Skipped]) -> Iterator[File]:
    """The documents in a folder, sorted; reasons for the others go to `skipped`."""
    ignored = Ignored(root)
    top = root.absolute().name or "/"

    def closed(error: OSError) -> None:
        skipped.append(Skipped(f"{top}/{os.path.relpath(error.filename, root)}", f"cannot be read ({error.strerror})"))

    for folder, folders, files in os.walk(root, followlinks=False, onerror=closed):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not is_skipped_folder(here / name) and not ignored(here / name))
        for name in sorted(files):
            path = here / name
            if ignored(path):
                continue
            shown = f"{top}/{path.relative_to(root).as_posix()}"
            reason = reason_to_skip(path)
            if reason:
                skipped.append(Skipped(shown, reason))
            else:
                yield File(path, shown, FORMAT_OF[path.suffix.lower()], root)


def is_skipped_folder(path: Path) -> bool:
    """Folders of tools, environments and other people's code, hidden ones, and links to folders."""
    return (
        path.name in SKIPPED_FOLDERS
        or path.name.startswith(".")
        or path.name.endswith((".dist-info", ".egg-info"))
        or path.is_symlink()
        or (path / "pyvenv.cfg").exists()
    )


def reason_to_skip(path: Path) -> str:
    """Why a file found in a folder is not read; empty when it is."""
    try:
        state = path.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(state.st_mode):
        return "not a plain file"
    if path.suffix.lower() not in FORMAT_OF:
        return f"no format with the ending {path.suffix}" if path.suffix else "no ending that tells its format"
    if path.stem.lower() in SKIPPED_STEMS or path.name.startswith(".") or "license" in path.name.lower():
        return "licence, change log or the like"
    if path.name.lower().endswith((".min.js", ".bundle.js", ".d.ts")):
        return "made by a tool"
    if state.st_size > LARGEST_BYTES:
        return f"larger than {LARGEST_BYTES // 2**20} MiB"
    return "" if state.st_size else "empty"


class Ignored:
    """Whether a path below `root` is left out by the .gitignore of a folder between the two."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rules: dict[Path, Any] = {}

    def __call__(self, path: Path) -> bool:
        for folder in path.parents:
            verdict = self.verdict(folder, path)
            if verdict is not None or folder == self.root:
                return bool(verdict)
        return False

    def verdict(self, folder: Path, path: Path) -> bool | None:
        """What the .gitignore of `folder` says of `path`: True, False (`!name`), or nothing."""
        if folder not in self.rules:
            self.rules[folder] = read_rules(folder / ".gitignore")
        rules = self.rules[folder]
        if rules is None:
            return None
        shown = path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")
        include: bool | None = rules.check_file(shown).include
        return include


def read_rules(path: Path) -> Any:
    """The rules of a .gitignore, or None."""
    if not path.is_file():
        return None
    from pathspec import GitIgnoreSpec

    try:
        return GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except (OSError, ValueError):  # a rule that git would not read either
        return None
