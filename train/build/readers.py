"""Files into documents: a reader for each format, and what a file's bytes say in text.

Web pages become Markdown by markdownify, PDF becomes text by pypdf, reStructuredText and plain text by `plain.py`; then
all go the way of Markdown. Source code is read by `code.py`. Nothing here decides what is worth asking about.

    >>> read_file(File(Path("docs/design.md"), "docs/design.md", "markdown", Path("docs"))).title
    'Design'
"""

import re
from pathlib import Path
from typing import Any

from loraport.train.build.code import read_python, read_source
from loraport.train.build.documents import Document, Section
from loraport.train.build.markdown import clean_heading, read_markdown
from loraport.train.build.phrases import GENERIC_OF
from loraport.train.build.plain import from_pages, from_rst, from_text
from loraport.train.build.sources import File, Unreadable
from loraport.train.build.subject import NO_SUBJECT

NOT_CONTENT = (
    "script, style, noscript, template, nav, header, footer, aside, form, button, svg, iframe, dialog, img, "
    "a.headerlink, a.anchor, [role=navigation], [role=banner], [role=contentinfo], [role=search], [aria-hidden=true], "
    "[hidden], .sidebar, .toc, .toctree-wrapper, .breadcrumbs, .breadcrumb, .edit-link, .skip-link, .related, "
    ".pagination, .cookie-banner, .prev-next-area, .viewcode-link, .sphinxsidebar, .linenos, .gp"
)
CONTENT = ("main", "[role=main]", "article", "div.document div.body", "#content", ".content", "body")
BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
                    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))  # fmt: skip


def read_file(file: File) -> Document:
    """The document in a file. Raises Unreadable with the reason."""
    try:
        raw = file.path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    if file.format == "html":
        return read_html(file, raw)
    if file.format == "pdf":
        return read_pdf(file)
    text = decode(raw)
    if file.format in ("python", "source"):
        return read_python(file, text) if file.format == "python" else read_source(file, text)
    numbers = None
    if file.format == "rst":
        text, numbers = from_rst(text)
    elif file.format == "text":
        text, numbers = from_text(text)
    title, sections = read_markdown(text, numbers)
    return finish(file, title, sections)


def finish(file: File, title: str, sections: list[Section]) -> Document:
    """A document of sections; Unreadable when nothing is left of it."""
    if not sections:
        raise Unreadable("no text in it")
    title = clean_heading(title)
    is_poor = not title or title.lower() in GENERIC_OF or title.lower() in NO_SUBJECT
    return Document(file.name, title_from(file.path) if is_poor else title, tuple(sections))


def title_from(path: Path) -> str:
    """A title made of a file's name, or of its folder's where the name says nothing."""
    stem = (
        path.stem if path.stem.lower() not in ("readme", "index", "__init__", "main") else path.absolute().parent.name
    )
    return " ".join(re.split(r"[-_\s]+", stem)).strip()


def decode(raw: bytes) -> str:
    """Text of a file's bytes: by its byte order mark, as UTF-8, or as what it most likely is. Unreadable if binary."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if raw.startswith(mark)), None)
    try:
        if not encoding and b"\0" in raw:
            raise Unreadable("binary")
        text = raw.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        text = guess(raw)
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").expandtabs(4).replace("\f", "\n")


def guess(raw: bytes) -> str:
    """Text in another encoding than UTF-8, as charset-normalizer finds it."""
    from charset_normalizer import from_bytes

    best = from_bytes(raw).best()
    if best is None:
        raise Unreadable("neither UTF-8 nor another encoding that can be told")
    return str(best)


def read_html(file: File, raw: bytes) -> Document:
    """A web page: its main part alone."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(raw, "html.parser")
    if raw.count(b"\0") and not soup.find(["p", "h1", "h2", "pre", "li"]):
        raise Unreadable("binary")
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    body = next((found for query in CONTENT if (found := soup.select_one(query)) and found.get_text(strip=True)), soup)
    for unwanted in body.select(NOT_CONTENT):
        unwanted.decompose()
    simplify(soup, body)
    converter = MarkdownConverter(heading_style="ATX", code_language_callback=code_language, bullets="-",
                                  escape_misc=False,
                                  escape_underscores=False, escape_asterisks=False)  # fmt: skip
    heading, sections = read_markdown(converter.convert_soup(body), [])
    return finish(file, heading or re.split(r"\s+[|–—·-]\s+", title)[0], sections)


def simplify(soup: Any, body: Any) -> None:
    """Give Sphinx's signatures, field lists and admonitions the form that Markdown has for them."""
    for title in body.select("p.admonition-title"):
        title.string = f"**{title.get_text().strip()}:**"
    for fields in body.select("dl dl, dl.field-list"):
        items = soup.new_tag("ul")
        for term in fields.find_all("dt", recursive=False):
            item = soup.new_tag("li")
            item.append(f"{term.get_text().strip().rstrip(':')}: ")
            text = term.find_next_sibling("dd")
            only = text.find("p", recursive=False) if text and len(text.find_all(True, recursive=False)) == 1 else text
            item.extend(list((only or text).contents) if text else [])
            items.append(item)
        if not fields.select("dt.sig"):
            fields.replace_with(items)
    for signature in body.select("dt.sig"):
        described = signature.find_next_sibling("dd")
        whole = " ".join(signature.get_text().split())
        name = re.match(r"(?:\w+ )*([\w.]+)(\()?", whole)
        heading = soup.new_tag("h6")
        heading.string = f"`{name[1]}{'()' if name[2] else ''}`" if name else whole
        signature.replace_with(heading)
        if described:
            code = soup.new_tag("pre")
            code.string = whole
            described.insert(0, code)
            described.name = "div"
    for definitions in body.select("dl:has(> h6)"):
        definitions.name = "div"


def code_language(element: Any) -> str:
    """The language of a <pre>, from the class names that highlighters use."""
    around = [element, *element.find_all("code", limit=1), *list(element.parents)[:2]]
    names = [name for node in around for name in (node.get("class") or [])]
    found = (re.fullmatch(r"(?:language|lang|highlight|highlight-source|brush)-([\w+#]+)", name) for name in names)
    language = next((match.group(1) for match in found if match), "")
    return "" if language in ("default", "none", "text", "notranslate") else language


def read_pdf(file: File) -> Document:
    """The text of a PDF, with the headings of its outline where it has one. Lines of its blocks are pages."""
    import logging

    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports each oddity of a file, which nobody can mend
    try:
        reader = PdfReader(file.path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("encrypted")
        pages = [page.extract_text() or "" for page in reader.pages]
        outline = [(str(title).strip(), level) for title, level in flatten(reader.outline, 1)]
        title = str(reader.metadata.title or "").strip() if reader.metadata else ""
    except Unreadable:
        raise
    except Exception as error:  # pypdf lets every kind of error through that a damaged file can cause
        raise Unreadable(f"not a PDF that can be read ({type(error).__name__})") from error
    if not any(len(page.split()) > 3 for page in pages):
        raise Unreadable("no text in it (scanned pages?)")
    text, numbers = from_pages(pages, outline)
    heading, sections = read_markdown(text, numbers)
    return finish(file, title if len(title.split()) in range(1, 12) else heading, sections)


def flatten(outline: Any, level: int) -> list[tuple[str, int]]:
    """Titles of a PDF's outline with their depth."""
    found: list[tuple[str, int]] = []
    for entry in outline:
        found += flatten(entry, level + 1) if isinstance(entry, list) else [(entry.title, level)]
    return found
