"""reStructuredText, plain text and the pages of a PDF as Markdown, with the line of the file for each line of it.

Only structure is rewritten: headings, code blocks, notes, definitions; the words stay as they are.

    >>> from_rst("Tea\\n===\\n\\nPour::\\n\\n    hot()\\n")[0]
    '# Tea\\n\\n\\nPour:\\n\\n```\\nhot()\\n```\\n'
"""

import re
import textwrap
from collections import Counter

Lines = list[tuple[int, str]]  # (line of the file, text)

UNDERLINE = re.compile(r"^([=\-~^\"'`#*+:.<>_])\1{2,}\s*$")
DIRECTIVE = re.compile(r"^(\s*)\.\.\s+([\w:+-]+)::[ \t]*(.*)$")
COMMENT = re.compile(r"^(\s*)\.\.(\s+(?!\[)|$)")
CODE_DIRECTIVES = {
    "code-block",
    "code",
    "sourcecode",
    "parsed-literal",
    "literalinclude",
    "doctest",
    "testcode",
    "prompt",
}
NOTE_DIRECTIVES = {
    "note", "warning", "tip", "important", "caution", "danger", "hint", "attention", "admonition", "topic", "seealso",
    "versionadded", "versionchanged", "deprecated", "versionremoved", "rubric",
}  # fmt: skip
PYTHON_DIRECTIVES = re.compile(
    r"^(?:py:|c:|js:|cpp:)?(function|method|class|attribute|data|exception|option|envvar|confval|property)$"
)
ROLE = re.compile(r":(?:[\w.+-]+:)*[\w.+-]+:`([^`]+)`")
HYPERLINK = re.compile(r"`([^`<>]+?)\s*<([^`<>]+)>`__?")
BROKEN_LINK = re.compile(r"(?<!`)`(?=[^`\n]+\n)([^`<>]+?)\s*(?:<([^`<>]+)>)?`__?(?!`)")
LITERAL = re.compile(r"``(.+?)``")
REFERENCE = re.compile(r"(?<![\w`])`([^`\n]+)`__?(?![\w`])")
WORD_REFERENCE = re.compile(r"(?<![\w`./-])([A-Za-z][\w-]*[A-Za-z0-9])_(?=[\s.,;:)]|$)")
SUBSTITUTION = re.compile(r"\|([\w .-]+)\|_{0,2}")
NUMBERED = re.compile(r"^(\d+(?:\.\d+){0,3})\.?\s+([A-Z][^.!?]{2,70})$")


def from_rst(text: str) -> tuple[str, list[int]]:
    """reStructuredText as Markdown, and the lines of the file that it stands on."""
    lines = list(enumerate(BROKEN_LINK.sub(mended, text).split("\n"), 1))
    out: Lines = []
    levels: list[str] = []
    at = 0
    while at < len(lines):
        taken = heading(lines, at, levels, out) or explicit(lines, at, out) or literal(lines, at, out)
        taken = taken or definition(lines, at, out) or paragraph_line(lines, at, out)
        at += taken
    return packed(out)


def mended(match: re.Match[str]) -> str:
    """A link that was broken over lines, on its first one; as many lines as before."""
    words = " ".join(match.group(1).split())
    link = f"`{words} <{match.group(2)}>`__" if match.group(2) else words
    return link + "\n" * match.group(0).count("\n")


def packed(out: Lines) -> tuple[str, list[int]]:
    """Text and line numbers."""
    return "\n".join(text for _, text in out), [number for number, _ in out]


def heading(lines: Lines, at: int, levels: list[str], out: Lines) -> int:
    """A title with its underline, and overline if any: lines taken. Levels are numbered as they first appear."""
    line = lines[at][1]
    over = bool(UNDERLINE.match(line)) and at + 2 < len(lines)
    title_at = at + 1 if over else at
    if title_at + 1 >= len(lines):
        return 0
    title, under = lines[title_at][1], lines[title_at + 1][1]
    if not title.strip() or not UNDERLINE.match(under) or (over and under.strip() != line.strip()):
        return 0
    if UNDERLINE.match(title) or (not over and (title.startswith(" ") or len(under.strip()) < len(title.strip()) - 2)):
        return 0
    mark = under[0] + ("over" if over else "")
    if mark not in levels:
        levels.append(mark)
    level = min(6, levels.index(mark) + 1)
    out += [(lines[title_at][0], f"{'#' * level} {inline(title.strip())}"), (lines[title_at][0], "")]
    return title_at + 2 - at


def body_of(lines: Lines, at: int, indent: int) -> Lines:
    """The lines from `at` on that are blank or indented deeper than `indent`, without blank ones at the end."""
    end = at
    while end < len(lines) and (not lines[end][1].strip() or indent_of(lines[end][1]) > indent):
        end += 1
    while end > at and not lines[end - 1][1].strip():
        end -= 1
    return lines[at:end]


def indent_of(line: str) -> int:
    """Spaces before the first word."""
    return len(line) - len(line.lstrip())


def dedent(lines: Lines) -> Lines:
    """The lines without the indent that they share."""
    if not lines:
        return []
    texts = textwrap.dedent("\n".join(text for _, text in lines)).split("\n")
    return [(number, text) for (number, _), text in zip(lines, texts, strict=True)]


def explicit(lines: Lines, at: int, out: Lines) -> int:
    """A directive, comment or target: lines taken. Code becomes a fence, notes a paragraph, the rest goes."""
    line = lines[at][1]
    found = DIRECTIVE.match(line)
    if not found:
        return 1 + len(body_of(lines, at + 1, indent_of(line))) if COMMENT.match(line) else 0
    body = body_of(lines, at + 1, len(found.group(1)))
    name, argument = found.group(2), found.group(3).strip()
    content = without_options(body)
    if name in CODE_DIRECTIVES and content:
        out += fence(content, argument if name != "parsed-literal" else "")
    elif name in NOTE_DIRECTIVES:
        label = f"**{name.capitalize()}:** " if not name.startswith(("version", "rubric")) else ""
        label = {"versionadded": "New in version ", "versionchanged": "Changed in version "}.get(name, label)
        inner, numbers = from_rst("\n".join(text for _, text in dedent(content)))
        first = lines[at][0]
        out += [(first, ""), (first, f"{label}{inline(argument)} ".rstrip() if argument or label.strip() else "")]
        out += [(first + number, text) for number, text in zip(numbers, inner.split("\n"), strict=True)]
        out.append((first, ""))
    elif PYTHON_DIRECTIVES.match(name) and argument and content:
        out += described(lines[at][0], argument, content)
    return 1 + len(body)


def described(first: int, argument: str, content: Lines) -> Lines:
    """`.. option:: --x` and the like with its body, as a definition."""
    inner, _ = from_rst("\n".join(text for _, text in dedent(content)))
    text = " ".join(part.strip() for part in inner.split("\n\n", 1)[0].split("\n"))
    return [(first, ""), (first, f"`{argument}`"), (first, f": {text}"), (first, "")]


def without_options(body: Lines) -> Lines:
    """A directive's body behind its `:option:` lines and blank lines."""
    at = 0
    while at < len(body) and (not body[at][1].strip() or re.match(r"\s*:[\w-]+:", body[at][1])):
        at += 1
    return body[at:]


def fence(body: Lines, language: str) -> Lines:
    """Lines of code as a fenced block."""
    code = dedent(body)
    return [(code[0][0], ""), (code[0][0], f"```{language}"), *code, (code[-1][0], "```"), (code[-1][0], "")]


def literal(lines: Lines, at: int, out: Lines) -> int:
    """A paragraph's last line that ends in `::` and the indented block behind it, or a doctest: lines taken."""
    number, line = lines[at]
    if line.lstrip().startswith(">>> "):
        end = at
        while end < len(lines) and lines[end][1].strip():
            end += 1
        out += fence(lines[at:end], "pycon")
        return end - at
    if not line.rstrip().endswith("::"):
        return 0
    body = body_of(lines, at + 1, indent_of(line))
    while body and not body[0][1].strip():
        body = body[1:]
    if not body:
        return 0
    introduced = inline(line.rstrip()[:-1]).rstrip()
    out += [(number, introduced if introduced.strip() != ":" else ""), *fence(body, "")]
    return next(index for index in range(at, len(lines)) if lines[index][0] == body[-1][0]) + 1 - at


def definition(lines: Lines, at: int, out: Lines) -> int:
    """A term and its indented definition: lines taken. The same form as Markdown's definition lists."""
    number, line = lines[at]
    if at + 1 >= len(lines) or not line.strip() or line.startswith((" ", "-", "*", "#", ":", "|", ">", "+")):
        return 0
    before = lines[at - 1][1] if at else ""
    if before.strip() or re.match(r"\d+\.", line) or not re.match(r" {2,}\S", lines[at + 1][1]):
        return 0
    body = body_of(lines, at + 1, 0)
    paragraph = []
    for _, text in body:
        if not text.strip():
            break
        paragraph.append(text.strip())
    inner, numbers = from_rst("\n".join(text for _, text in dedent(body[len(paragraph) :])))
    out += [(number, ""), (number, inline(line.strip())), (number, f": {inline(' '.join(paragraph))}"), (number, "")]
    out += [(number + len(paragraph) + n, text) for n, text in zip(numbers, inner.split("\n"), strict=True) if inner]
    return 1 + len(body)


def paragraph_line(lines: Lines, at: int, out: Lines) -> int:
    """Anything else, its inline markup rewritten; the indent of a quoted block is not code. One line taken."""
    number, line = lines[at]
    line = "" if re.fullmatch(r"\s*(?:\|[\w .-]+\|_{0,2}\s*)+", line) else line
    line = re.sub(r"^(\s*):(param|type|returns?|rtype|raises?)\b([^:]*):", r"\1- \2\3:", line)
    line = re.sub(r"^( *)\* ", r"\1- ", line)
    if line.startswith("    ") and not re.match(r"\s*(?:[-*+]|\d+\.|#\.)\s", line) and not inside_list(out):
        line = line.lstrip()
    out.append((number, inline(re.sub(r"^(\s*)#\. ", r"\g<1>1. ", line))))
    return 1


def inside_list(out: Lines) -> bool:
    """Whether the last line that is not indented begins a list item."""
    last = next((text for _, text in reversed(out) if text.strip() and not text.startswith(" ")), "")
    return bool(re.match(r"(?:[-*+]|\d+\.)\s", last))


def inline(text: str) -> str:
    """Roles, literals and references of reStructuredText as Markdown."""
    kept: list[str] = []

    def keep(code: str) -> str:
        kept.append(f"`{code}`")
        return f"\0{len(kept) - 1}\0"

    text = LITERAL.sub(lambda match: keep(match.group(1)), text)
    text = ROLE.sub(lambda match: keep(role_text(match.group(1))), text)
    text = HYPERLINK.sub(lambda m: f"[{m[1]}]({m[2]})" if "://" in m[2] else m[1], text)
    text = WORD_REFERENCE.sub(r"\1", SUBSTITUTION.sub(r"\1", REFERENCE.sub(r"\1", text)))
    text = re.sub(r"\\ ", "", re.sub(r" ?\[[#*\w]+\]_", "", text))
    return re.sub("\0(\\d+)\0", lambda match: kept[int(match.group(1))], text)


def role_text(text: str) -> str:
    """What a role shows: its title, or its target without the marks that shorten it."""
    titled = re.match(r"(.+?)\s*<[^<>]+>$", text, re.S)
    if titled:
        return titled.group(1)
    return (
        text[2:].rsplit(".", 1)[-1]
        if text.startswith("~.")
        else text.rsplit(".", 1)[-1]
        if text[0] == "~"
        else text.lstrip("!.")
    )


def from_text(text: str) -> tuple[str, list[int]]:
    """Plain text as Markdown: underlined, numbered and capital headings are found; as many lines as before."""
    lines = list(enumerate(text.split("\n"), 1))
    out: Lines = []
    levels: list[str] = []
    at = 0
    while at < len(lines):
        taken = heading(lines, at, levels, out)
        if not taken:
            out += text_line(lines, at)
            taken = 1
        at += taken
    return packed(out)


def text_line(lines: Lines, at: int) -> Lines:
    """A line of plain text: as a heading if it stands alone and looks like one."""
    number, line = lines[at]
    alone = bool(line.strip()) and not any(lines[i][1].strip() for i in (at - 1, at + 1) if 0 <= i < len(lines))
    numbered = NUMBERED.match(line.strip())
    if alone and numbered:
        return [(number, f"{'#' * min(6, 2 + numbered.group(1).count('.'))} {numbered.group(2)}")]
    if alone and line.isupper() and 3 < len(line.strip()) < 60 and not line.rstrip().endswith((".", "!")):
        return [(number, f"## {line.strip().capitalize()}")]
    if UNDERLINE.match(line):
        return [(number, "")]
    return [(number, line)]


def from_pages(pages: list[str], outline: list[tuple[str, int]]) -> tuple[str, list[int]]:
    """Pages of a PDF as Markdown; each line's number is its page. Running heads and page numbers go."""
    repeated = running_lines(pages)
    titles = {" ".join(title.split()).lower(): level for title, level in outline}
    out: Lines = []
    for number, page in enumerate(pages, 1):
        lines = [line.strip() for line in page.split("\n")]
        for line in lines:
            if without_digits(line) in repeated or re.fullmatch(
                r"(?:page\s*)?[\divxlc]{1,5}(?:\s*(?:/|of)\s*\d+)?", line, re.I
            ):
                continue
            out += page_line(number, line, titles)
    return packed(reflowed(unhyphenated(out)))


def running_lines(pages: list[str]) -> set[str]:
    """First and last lines that most pages share, digits aside."""
    ends: Counter[str] = Counter()
    for page in pages:
        lines = [line.strip() for line in page.split("\n") if line.strip()]
        ends.update({without_digits(line) for line in lines[:2] + lines[-2:]})
    return {line for line, count in ends.items() if len(pages) > 3 and count > len(pages) / 2}


def without_digits(line: str) -> str:
    """A line, its numbers made equal."""
    return re.sub(r"\d+", "0", line.strip())


def page_line(number: int, line: str, titles: dict[str, int]) -> Lines:
    """A line of a page: as a heading if the outline has it, or, without an outline, if it is a numbered title."""
    plain = " ".join(line.split()).lower()
    level = titles.get(plain) or titles.get(re.sub(r"^[\d.]+\s+", "", plain))
    numbered = NUMBERED.match(line)
    if not level and not titles and numbered and not line.endswith((",", ";")) and len(line.split()) <= 10:
        level = 1 + numbered.group(1).count(".")
    if level:
        return [(number, ""), (number, f"{'#' * min(6, level + 1)} {line}"), (number, "")]
    bullet = re.match(r"^[•▪◦–‣]\s*(.*)", line)
    return [(number, f"- {bullet.group(1)}")] if bullet else [(number, re.sub(r"^([#>+*=-])", r"\\\1", line))]


def reflowed(lines: Lines) -> Lines:
    """Lines of one paragraph on one line: a PDF breaks them where its page ends."""
    out: Lines = []
    for number, text in lines:
        before = out[-1][1] if out else ""
        goes_on = len(before) > 40 and not re.search(r"[.:!?;]$", before) and not before.startswith("#")
        if goes_on and re.match(r"[\w(`\"']", text) and not NUMBERED.match(text):
            out[-1] = (out[-1][0], f"{before} {text}")
        else:
            out.append((number, text))
    return out


def unhyphenated(lines: Lines) -> Lines:
    """Words that were broken at the end of a line in one piece again."""
    out: Lines = []
    for number, text in lines:
        if out and re.search(r"[a-z]-$", out[-1][1]) and re.match(r"[a-z]", text):
            head, _, rest = text.partition(" ")
            out[-1] = (out[-1][0], out[-1][1][:-1] + head)
            text = rest
        out.append((number, text))
    return out
