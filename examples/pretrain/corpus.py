"""Download the pinned libraries and harvest their documentation.

Two things come out of the wheels, read with `ast` and never imported:

- *texts*: cleaned docstrings, the plain English that the base is pre-trained on;
- *functions*: documented parameters (name, type, default, first sentence), the raw material of the
  reading tasks (`tasks.py`) and of the demo rows (`../demo/make_rows.py`).

    python -m examples.pretrain.corpus --sources examples/pretrain/sources.txt --out build/corpus
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import inspect
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

UNDERLINE = re.compile(r"^\s*[-=~^*+_#.]{3,}\s*$\n?", re.MULTILINE)
HEADING = re.compile(r"^(Parameters|Other Parameters)\n-{3,}\n(.*?)(?=^\S[^\n]*\n-{3,}|\Z)", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^([A-Za-z_]\w*)\s*:[ \t]*([^\n]+)\n((?:(?:[ \t]+[^\n]*)?(?:\n|\Z))+)", re.MULTILINE)
GOOGLE_ENTRY = re.compile(r"^\s{4,}([a-z_]\w*) \(([^\n]+)\):\s*\n?\s+([^\n]+(?:\n\s{8,}[^\n]+)*)", re.MULTILINE)
DEFAULT_IN_TYPE = re.compile(r"[,;.]?\s*\(?\s*\*?(?:optional|[Dd]efaults?\b|by default|keyword.only)[^\n]*$")
ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`_*")
QUOTES = re.compile(r"`+([^`]*)`+_*")


@dataclass(frozen=True)
class Parameter:
    """One documented parameter; `default` is source text, `""` when there is none."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class Function:
    """A documented function or class of a library with at least one clean parameter."""

    library: str
    name: str
    parameters: list[Parameter]


def read_sources(path: Path) -> list[str]:
    """Requirement lines (`name==version`) of a sources file; what follows `#` is the licence."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def download(requirement: str, folder: Path) -> Path:
    """The wheel of one pinned requirement, fetched with pip into `folder` unless it lies there."""
    name, version = requirement.split("==")
    prefix = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}-"

    def found() -> list[Path]:
        return [
            w
            for w in sorted(folder.glob("*.whl"))
            if w.name.lower().replace(".", "_").startswith(prefix.replace(".", "_"))
        ]

    if not found():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        subprocess.run([*command, requirement], check=True)
    return found()[0]


def strip_markup(text: str) -> str:
    """Plain words instead of reStructuredText roles, links and back-quotes; white space runs become one space."""
    text = QUOTES.sub(r"\1", ROLE.sub(r"\1", text))
    return re.sub(r"\s+", " ", text.replace("**", "").replace("\\", "")).strip()


def first_sentence(text: str) -> str:
    """The first sentence of a description, without its final full stop."""
    text = re.split(r"\n\s*\n|\n\s*[-*.]\s", text.strip())[0]
    text = strip_markup(text)
    return re.split(r"(?<=[a-z0-9)'\]])\. (?=[A-Z])", text)[0].rstrip(" .:;,")


def is_clean(parameter: Parameter) -> bool:
    """Whether a person would call all fields of the parameter readable."""
    fields = f"{parameter.name} {parameter.type} {parameter.default} {parameter.description}"
    if not fields.isascii() or any(mark in fields for mark in ("%(", "{0", ":math", "::", "|", "<", "http", "$", "`")):
        return False
    balanced = all(fields.count(a) == fields.count(b) for a, b in ("()", "[]", "{}"))
    quotes = parameter.type.count("'") % 2 == 0 and parameter.type.count('"') % 2 == 0
    lengths = len(parameter.name) > 1 and 2 <= len(parameter.type) <= 70 and 12 <= len(parameter.description) <= 140
    return balanced and quotes and lengths and len(parameter.default) <= 40 and " " in parameter.description


def signature_defaults(node: Definition) -> dict[str, str]:
    """Source text of the defaults of a function, or of a class's `__init__`, by parameter name."""
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return signature_defaults(inits[0]) if inits else {}
    arguments = node.args
    names = [a.arg for a in arguments.posonlyargs + arguments.args]
    pairs = list(zip(names[len(names) - len(arguments.defaults) :], arguments.defaults, strict=True))
    pairs += [(a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    return {name: ast.unparse(default) for name, default in pairs}


def parse_parameters(doc: str, defaults: dict[str, str]) -> list[Parameter]:
    """Clean parameters out of a numpydoc or Google-style docstring."""
    entries = [e for section in HEADING.finditer(doc + "\n") for e in ENTRY.findall(section.group(2))]
    entries = entries or GOOGLE_ENTRY.findall(doc)
    parameters = []
    for name, kind, description in entries:
        kind = DEFAULT_IN_TYPE.sub("", strip_markup(kind)).strip(" ,.;*")
        parameters.append(Parameter(name, kind, defaults.get(name, ""), first_sentence(description)))
    return [p for p in parameters if is_clean(p)]


def python_docstrings(source: str) -> Iterator[tuple[Definition | None, str, str]]:
    """(definition, qualified name, cleaned docstring) of a module and everything in it."""
    tree = ast.parse(source)
    queue: list[tuple[ast.Module | Definition, str]] = [(tree, "")]
    while queue:
        node, name = queue.pop()
        doc = ast.get_docstring(node)
        if doc:
            yield (None if isinstance(node, ast.Module) else node), name, inspect.cleandoc(doc)
        for child in node.body:
            if isinstance(child, Definition):
                queue.append((child, f"{name}.{child.name}".strip(".")))


def is_prose(text: str) -> bool:
    """Whether a docstring is long enough and mostly English words."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return 150 <= len(text) <= 20_000 and text.isascii() and letters > 0.7 * len(text)


def harvest(wheel: Path, library: str) -> tuple[list[str], list[Function]]:
    """All texts and documented functions of one wheel; tests are left out."""
    texts: list[str] = []
    functions: list[Function] = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".py") or re.search(r"(^|/)(tests?|_vendor|externals?|extern)/|test_", name):
                continue
            try:
                docs = list(python_docstrings(archive.read(name).decode()))
            except (SyntaxError, ValueError):
                continue  # templates and Python 2 leftovers are no documentation
            for node, qualified, doc in docs:
                texts.append(f"{qualified}\n{UNDERLINE.sub('', doc)}".strip())
                if node is None or node.name.startswith("_"):
                    continue
                parameters = parse_parameters(doc, signature_defaults(node))
                if parameters:
                    functions.append(Function(library, node.name, parameters))
    return [t for t in texts if is_prose(t)], functions


def unique_texts(texts: list[str]) -> list[str]:
    """Texts in order, with any paragraph seen before dropped (libraries repeat whole parameter blocks)."""
    seen: set[bytes] = set()
    kept = []
    for text in texts:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = hashlib.blake2b(paragraph.strip().encode(), digest_size=8).digest()
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= 150:
            kept.append("\n\n".join(paragraphs))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for wheels/, texts.json.gz, functions.json.gz")
    args = parser.parse_args()
    wheels = args.out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    functions: list[Function] = []
    for requirement in read_sources(args.sources):
        library = requirement.split("==")[0]
        new_texts, new_functions = harvest(download(requirement, wheels), library)
        print(f"{requirement}: {len(new_texts):,} texts, {len(new_functions):,} functions", flush=True)
        texts += new_texts
        functions += new_functions
    texts = unique_texts(texts)
    for name, value in (("texts", texts), ("functions", [asdict(f) for f in functions])):
        (args.out / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(value).encode(), 6, mtime=0))
    print(f"{len(texts):,} texts with {sum(map(len, texts)) / 1e6:.1f} MB, {len(functions):,} functions")


if __name__ == "__main__":
    main()
