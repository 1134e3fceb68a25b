"""Files into documents: each format, what is left out, and what cannot be read."""

from pathlib import Path

import pytest

from loraport.clients.errors import UsageError
from loraport.train.build.documents import Document
from loraport.train.build.readers import read_file
from loraport.train.build.sources import Unreadable, find_files

RST = """\
Teapot
======

Brews tea, see `the
RFC <https://example.org/rfc>`_ and :class:`~tea.Pot`.

Brew it::

    pot.brew()

.. toctree::

   install

.. note::

   Mind the ``steam``.

Steep time
   Seconds that the leaves stay.
"""
HTML = """\
<html><head><title>Pot | Teapot</title></head><body><nav><a href="/">Home</a></nav><main>
<h1>Pot</h1><p>A pot holds <b>eight</b> cups.</p>
<div class="highlight-python"><pre>Pot("assam")</pre></div>
<dl class="py function"><dt class="sig">brew(kind, seconds=180)</dt><dd><p>Brew a pot.</p>
<dl class="field-list"><dt>Parameters:</dt><dd><p>kind of tea</p></dd></dl></dd></dl>
</main><footer>(c) Somebody</footer></body></html>
"""


def read(folder: Path, name: str, content: str | bytes) -> Document:
    """Write a file and read it as a document."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found, _ = find_files([path])
    return read_file(found[0])


def make_pdf(lines: list[str]) -> bytes:
    """A PDF of one page with these lines."""
    shown = "".join(f"({line}) Tj 0 -20 Td " for line in lines)
    stream = f"BT /F1 12 Tf 50 700 Td {shown} ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer << /Root 1 0 R /Size 6 >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + end


def test_markdown_keeps_words_and_lines_and_drops_what_is_around(tmp_path: Path) -> None:
    text = (
        "---\ntitle: Tea\n---\n# Tea\n\n[![badge](a.svg)](b) ![x](y.png)\n\n<!-- hidden -->\n"
        "- [One](#one)\n- [Two](#two)\n\n## 2. Brew **it** {#brew}\n\nPour [water](pot.md) or `[a](b)`, see\n"
        "[the site](https://example.org).\n\n```sh\nbrew\n```\n"
    )
    document = read(tmp_path, "tea.md", text)
    assert document.title == "Tea"
    (section,) = document.sections
    assert section.path == ("Tea", "Brew it")
    assert [(block.kind, block.first, block.last) for block in section.blocks] == [("text", 14, 15), ("code", 17, 19)]
    assert section.text == "Pour water or `[a](b)`, see\n[the site](https://example.org).\n\n```sh\nbrew\n```"


def test_restructured_text_becomes_markdown(tmp_path: Path) -> None:
    document = read(tmp_path, "tea.rst", RST)
    assert document.title == "Teapot"
    text = document.sections[0].text
    assert "[the RFC](https://example.org/rfc)" in text and "`Pot`" in text
    assert "Brew it:\n\n```\npot.brew()\n```" in text
    assert "**Note:**" in text and "Mind the `steam`." in text
    assert "Steep time\n: Seconds that the leaves stay." in text
    assert "toctree" not in text and "install" not in text


def test_a_web_page_is_its_main_part(tmp_path: Path) -> None:
    document = read(tmp_path, "pot.html", HTML)
    assert document.title == "Pot"
    assert [section.heading for section in document.sections] == ["Pot", "`brew()`"]
    text = document.text
    assert "A pot holds **eight** cups." in text and '```python\nPot("assam")\n```' in text
    assert "brew(kind, seconds=180)" in text and "Parameters: kind of tea" in text
    assert "Home" not in text and "Somebody" not in text


def test_a_pdf_with_numbered_headings(tmp_path: Path) -> None:
    document = read(
        tmp_path, "kettle.pdf", make_pdf(["1 Descaling", "Use one litre of water and some citric acid.", "7"])
    )
    (section,) = document.sections
    assert (section.heading, section.blocks[0].first) == ("Descaling", 1)
    assert section.text == "Use one litre of water and some citric acid."


def test_python_by_its_syntax_tree(tmp_path: Path) -> None:
    code = 'class Pot:\n    """Holds tea."""\n\n    def brew(self, kind: str) -> None:\n        """Brew it."""\n\n'
    code += "    def _no(self): ...\n"
    document = read(tmp_path, "tea.py", code)
    assert [(s.name, s.signature, s.doc) for s in document.symbols] == [
        ("tea.Pot", "class Pot", "Holds tea."),
        ("tea.Pot.brew", "def brew(self, kind: str) -> None", "Brew it."),
    ]
    assert document.symbols[1].code.startswith("def brew")


@pytest.mark.parametrize(
    ("name", "code", "signature"),
    [
        ("a.rs", "/// Adds two.\n#[inline]\npub fn add(a: i32) -> i32 {\n    a\n}\n", "pub fn add(a: i32) -> i32"),
        ("a.go", "// Adds two.\nfunc add(a int) int {\n\treturn a\n}\n", "func add(a int) int"),
        ("a.js", "/**\n * Adds two.\n */\nexport function add(a) {\n  return a\n}\n", "export function add(a)"),
        ("a.c", "/* Adds two. */\nint add(int a)\n{\n  return a;\n}\n", "int add(int a)"),
    ],
)
def test_other_languages_by_their_definitions(tmp_path: Path, name: str, code: str, signature: str) -> None:
    (symbol,) = read(tmp_path, name, code).symbols
    assert (symbol.name, symbol.doc, symbol.signature) == (f"add ({name})", "Adds two.", signature)
    assert symbol.code.rstrip().endswith("}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    text = "# Thé\n\nLe thé est une boisson préparée avec des feuilles, à toute heure, même très tôt.\n"
    assert "préparée" in read(tmp_path, "the.md", text.encode(encoding)).text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.md", b"\x00\x01\x02", "binary"),
        ("a.pdf", b"%PDF-1.4 broken", "not a PDF that can be read"),
        ("a.py", b"def (:", "not Python"),
        ("a.md", b"<!-- nothing -->", "no text"),
    ],
)
def test_what_cannot_be_read_has_a_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        read(tmp_path, name, content)


def test_a_folder_is_walked_with_sense(tmp_path: Path) -> None:
    for name in ("docs/a.md", "docs/private/b.md", "docs/private/c.md", "node_modules/x/README.md", ".git/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# A\n")
    (tmp_path / ".gitignore").write_text("docs/private/*\n!docs/private/c.md\n")
    (tmp_path / "LICENSE.md").write_text("MIT\n")
    (tmp_path / "picture.png").write_text("x")
    (tmp_path / "docs/loop").symlink_to(tmp_path)
    found, skipped = find_files([tmp_path, tmp_path / "docs/a.md"])
    top = tmp_path.name
    assert [file.name for file in found] == [f"{top}/docs/a.md", f"{top}/docs/private/c.md"]
    assert {s.name: s.reason for s in skipped}[f"{top}/LICENSE.md"] == "licence, change log or the like"
    assert any(s.reason == "no format with the ending .png" for s in skipped)


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for name in ("a/docs/x.md", "b/docs/x.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("# A\n")
    found, _ = find_files([tmp_path / "a/docs", tmp_path / "b/docs"])
    assert [file.name for file in found] == ["docs/x.md", "b/docs/x.md"]
    found, _ = find_files([tmp_path / "a/docs/x.md", tmp_path / "b/docs/x.md"])
    assert [file.name for file in found] == ["x.md", "docs/x.md"]


def test_a_source_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file or folder"):
        find_files([tmp_path / "nope"])
