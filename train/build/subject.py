"""What the documents are about, as questions name it: the project, told by its README, its pyproject.toml or a title.

>>> project_of([Path("docs")], documents)
'Loraport'
"""

import re
import tomllib
from pathlib import Path

from loraport.train.build.documents import Document
from loraport.train.build.phrases import GENERIC_OF, terms_in
from loraport.train.build.wording import is_unasked

NO_SUBJECT = terms_in(
    """
    docs, doc, documentation, readme, index, guide, user guide, manual, home, welcome, contents, reference,
    api, tutorial, tutorials, guides, wiki, src, lib, source, content, pages, main, untitled, faq
    """
)
LONGEST = 4  # words of a title that can be a name


def project_of(sources: list[Path], documents: list[Document]) -> str:
    """The name of what all documents are about; empty when each has to speak for itself."""
    if all(document.symbols and not document.sections for document in documents):
        return ""  # symbols carry their full names
    folders = [source.absolute() for source in sources if source.is_dir()]
    for folder in folders:
        for place in (folder, folder.parent) if folder.name.lower() in NO_SUBJECT else (folder,):
            found = named(sources, documents) or from_readme(place, documents) or from_pyproject(place)
            if found:
                return found
    titles = [document for document in documents if document.sections]
    if len(titles) == 1:
        return name_in(titles[0].title)
    if folders and folders[0].name.lower() not in NO_SUBJECT:
        return ""
    first = min(titles, key=lambda document: (not is_entrance(document.name), document.name.count("/"), document.name))
    return name_in(first.title) if is_entrance(first.name) else ""


def named(sources: list[Path], documents: list[Document]) -> str:
    """The title of a README that the user named among other sources."""
    names = {source.name for source in sources if source.is_file() and is_entrance(source.name)}
    return next((name_in(document.title) for document in documents if document.name in names), "")


def is_entrance(name: str) -> bool:
    """Whether a file is the first one to read."""
    return Path(name).stem.lower() in ("readme", "index")


def from_readme(folder: Path, documents: list[Document]) -> str:
    """The title of the README or index that lies in a folder and was read."""
    for document in sorted(documents, key=lambda document: document.name):
        if is_entrance(document.name) and document.name.count("/") == 1 and document.name.startswith(f"{folder.name}/"):
            return name_in(document.title)
    return ""


def from_pyproject(folder: Path) -> str:
    """The name in a folder's pyproject.toml."""
    try:
        name = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {}).get("name", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(name)


def name_in(title: str) -> str:
    """The name in a title like "Welcome to Flask's documentation!" or "Tea: hot water"; empty when it is none."""
    title = re.sub(r"^(?:welcome to|introduction to|about|the)\s+", "", title.strip(), flags=re.I)
    title = re.split(r"\s*(?::\s|\s[–—|-]\s)", title)[0]
    title = re.sub(r"(?:['’]s)?\s*(?:\d+(?:\.\d+)+\s*)?"
                   r"(?:documentation|docs|manual|user guide|guide|readme|reference|homepage)?[!.]*$", "", title,
                   flags=re.I).strip(" `*")  # fmt: skip
    poor = (
        title.lower() in NO_SUBJECT or title.lower() in GENERIC_OF or is_unasked(title) or len(title.split()) > LONGEST
    )
    return "" if poor else title
