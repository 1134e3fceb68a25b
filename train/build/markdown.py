"""Markdown into sections: blocks are the source's own lines, without badges, pictures, comments and navigation.

markdown-it finds the structure; what stands in a block is the text as it was written, so that answers are verbatim.

    >>> sections("# Tea\\n\\nWater and leaves.\\n", Lines.of("...")).sections[0].path
    ('Tea',)
"""

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from loraport.train.build.documents import Block, BlockKind, Section

KINDS: dict[str, BlockKind] = {
    "paragraph_open": "text",
    "blockquote_open": "text",
    "bullet_list_open": "list",
    "ordered_list_open": "list",
    "fence": "code",
    "code_block": "code",
    "table_open": "table",
    "html_block": "text",
}
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)(?:---|\.\.\.)[ \t]*\n", re.S)
FRONT_TITLE = re.compile(r"^title:[ \t]*[\"']?(.+?)[\"']?[ \t]*$", re.M | re.I)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
IMAGE = re.compile(r"!\[[^\]]*\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])")
LINK = re.compile(
    r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*<?([^()\s>]*(?:\([^()\s]*\)[^()\s]*)*)>?(?:\s+[\"'(][^)]*)?\s*\)"
)
REFERENCE_LINK = re.compile(r"(?<![!\]\w`])\[([^\[\]]+)\]\[[^\[\]]*\]")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:[ \t]+\S+.*$", re.M)
COMMENT = re.compile(r"<!--.*?-->", re.S)
TAG = re.compile(r"</?[a-zA-Z][\w-]*(?:\s+[\w:@-]+(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'>]+))?)*\s*/?>")
CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
ADMONITION = re.compile(r"^(?:!!!|\?\?\?\+?)[ \t]+(\w+)(?:[ \t]+\"([^\"]*)\")?[ \t]*$")
CALLOUT = re.compile(r"^(> ?)\[!(\w+)\][-+]?[ \t]*")
DIRECTIVE = re.compile(r"^\{([\w:-]+)\}")
ROLE = re.compile(r"\{[\w:.-]+\}(`[^`]+`)")
FOOTNOTE = re.compile(r"\[\^[^\]]+\]")
EMOJI_CODE = re.compile(r":[a-z0-9_+-]+:(?=\s|$)")
ANCHOR = re.compile(r"\s*\{:?\s*#[^}]*\}\s*$|\s*[¶#]+\s*$")
NUMBERING = re.compile(
    r"^(?:(?:chapter|section|part|appendix)\s+)?(?:\d+(?:\.\d+)*[.):]?|[IVX]+\.|[A-Z]\.)\s+(?=[A-Za-z`])", re.I
)
UNESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+.!<>~|-])")
OPTIONAL = re.compile(r"\s*\((?:optional|advanced|beta|experimental|new|wip|deprecated)\)\s*$", re.I)
SYMBOLS = re.compile("[\U0001f000-\U0001faff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\uf000-\uf2ff]+")


def read_markdown(text: str, numbers: Sequence[int] | None = None) -> tuple[str, list[Section]]:
    """Title and sections of a text. `numbers`: the file's line for each line of `text`, where the two differ."""
    title = ""
    front = FRONT_MATTER.match(text)
    if front:
        found = FRONT_TITLE.search(front.group(1))
        title = found.group(1) if found else ""
        text = "\n" * front.group(0).count("\n") + text[front.end() :]
    lines = prepare(text).split("\n")
    number = (lambda at: numbers[min(at, len(numbers)) - 1] if numbers else 0) if numbers is not None else int
    found_sections, headings = collect(lines, number)
    return title or title_among(headings), found_sections


def title_among(headings: list[tuple[int, str]]) -> str:
    """The first heading, if it stands above all others; empty otherwise."""
    above = headings and all(level > headings[0][0] for level, _ in headings[1:])
    return headings[0][1] if above else ""


def prepare(text: str) -> str:
    """The text with admonitions as paragraphs that markdown-it knows, and without comments; as many lines as before."""
    text = COMMENT.sub(lambda match: "\n" * match.group(0).count("\n"), text)
    lines, inside, fence = [], False, ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if mark and not inside:
            fence = "" if fence and line.strip().startswith(fence) else fence or mark.group(1)
        found = None if fence else ADMONITION.match(line)
        if found:
            inside = True
            lines.append(f"**{found.group(2) or found.group(1).capitalize()}:**")
        elif inside and line.strip() and not line.startswith("    "):
            inside = False
            lines.append(line)
        else:
            lines.append(line[4:] if inside else line)
    return "\n".join(lines)


def collect(lines: list[str], number: Any) -> tuple[list[Section], list[tuple[int, str]]]:
    """Sections, one for each heading that has text of its own, and all headings with their levels."""
    from markdown_it import MarkdownIt

    found: list[Section] = []
    path: list[tuple[int, str]] = []
    headings: list[tuple[int, str]] = []
    blocks: list[Block] = []
    tokens = MarkdownIt("commonmark").enable("table").parse("\n".join(lines))
    for at, token in enumerate(tokens):
        if token.level or not token.map:
            continue
        if token.type == "heading_open":
            found.append(Section(tuple(heading for _, heading in path), tuple(blocks)))
            level = int(token.tag[1])
            path = [entry for entry in path if entry[0] < level]
            path.append((level, clean_heading(tokens[at + 1].content)))
            headings.append(path[-1])
            blocks = []
        elif token.type in KINDS:
            first, last = token.map
            blocks += block_of(token, lines[first:last], number(first + 1), number(last))
    found.append(Section(tuple(heading for _, heading in path), tuple(blocks)))
    return [section for section in found if section.blocks], headings


def block_of(token: Any, lines: list[str], first: int, last: int) -> list[Block]:
    """The block of a token, cleaned; none when nothing is left of it."""
    kind = KINDS[token.type]
    if kind == "code":
        directive = DIRECTIVE.match(token.info.strip())
        if directive and directive.group(1) not in ("code", "code-block", "code-cell", "sourcecode"):
            return [Block(b.kind, b.text, first, last) for b in directive_blocks(directive.group(1), token.content)]
        language = "" if directive else re.split(r"[\s{,:]", token.info.strip(), maxsplit=1)[0]
        text = fenced(token.content.rstrip("\n"), language)
        return [Block("code", text, first, last)] if token.content.strip() else []
    text = "\n".join(lines).rstrip()
    if kind != "table" and is_navigation(text, 2 if kind == "list" else 1):
        return []
    if token.type == "html_block" and not re.search(r"\w{2,}[^.\n]{25,}\.", TAG.sub("", text)):
        return []
    text = textwrap.dedent(text) if kind == "list" else text
    text = clean(text) if kind != "table" else clean_table(text)
    while lines and not lines[-1].strip():
        lines, last = lines[:-1], last - 1
    return [Block(kind, text, first, max(first, last))] if re.search(r"\w", text) else []


def is_navigation(text: str, words_a_link: int) -> bool:
    """Whether a block is hardly more than links or pictures: menus, tables of contents, badges."""
    text = CODE_SPAN.sub("code", text)
    linked = IMAGE.sub("", text)
    rest = len(re.findall(r"\w{2,}", TAG.sub("", REFERENCE_LINK.sub("", LINK.sub("", linked)))))
    links = len(LINK.findall(linked)) + len(REFERENCE_LINK.findall(linked)) + len(IMAGE.findall(text))
    return links > 0 and rest <= words_a_link * links


def directive_blocks(name: str, content: str) -> list[Block]:
    """MyST: the body of a note or the like as text; navigation and generated parts are left out."""
    if name not in (
        "note",
        "tip",
        "warning",
        "important",
        "hint",
        "caution",
        "admonition",
        "attention",
        "danger",
        "seealso",
    ):
        return []
    body = re.sub(r"\A(?::\w[\w-]*:.*\n)+", "", content)
    text = clean(f"**{name.capitalize()}:** {body.strip()}")
    return [Block("text", text)] if body.strip() else []


def fenced(code: str, language: str = "") -> str:
    """Code in a fence that is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def outside_code(text: str, change: Any) -> str:
    """`change` applied to what is not a code span."""
    parts, at = [], 0
    for span in CODE_SPAN.finditer(text):
        parts += [change(text[at : span.start()]), span.group(0)]
        at = span.end()
    return "".join([*parts, change(text[at:])])


def clean(text: str) -> str:
    """Prose without pictures, tags, references and links that lead nowhere in a chat."""
    text = CODE_SPAN.sub(
        lambda match: match.group(0).replace("[", "\0"), text
    )  # what looks like a link in code is none
    text = ROLE.sub(r"\1", CALLOUT.sub(lambda m: f"{m.group(1)}**{m.group(2).capitalize()}:** ", text))
    text = LINK.sub(link_text, IMAGE.sub("", text))
    text = LINK.sub(link_text, text)  # a picture inside a link is gone by now
    text = outside_code(text, clean_prose).replace("\0", "[")
    text = re.sub(r"[ \t]+$", "", re.sub(r"(?<=\S)[ \t]{2,}(?=\S)", " ", text), flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def clean_prose(text: str) -> str:
    """What is changed outside of code spans."""
    text = REFERENCE_LINK.sub(r"\1", REFERENCE.sub("", text))
    text = re.sub(r"<(https?://[^>\s]+)>", r"\1", TAG.sub("", text))
    return text.replace("&nbsp;", " ") if "&nbsp;" in text else FOOTNOTE.sub("", text)


def link_text(match: re.Match[str]) -> str:
    """A link's text, with its address where that means something outside of the page."""
    text, address = match.group(1).strip(), match.group(2)
    if not text or not address.startswith(("http://", "https://")) or text == address:
        return text or ""
    return f"[{text}]({address})"


def clean_table(text: str) -> str:
    """A table, its cells cleaned."""
    return "\n".join(clean(line) or line for line in text.split("\n"))


def clean_heading(text: str) -> str:
    """A heading as words: no markup, numbering, anchors or pictures."""
    text = SYMBOLS.sub("", ANCHOR.sub("", IMAGE.sub("", ROLE.sub(r"\1", text))))
    text = TAG.sub("", LINK.sub(lambda match: match.group(1), REFERENCE_LINK.sub(r"\1", text)))
    text = re.sub(r"(\*\*|__)(.+?)\1", r"\2", EMOJI_CODE.sub("", text))
    text = re.sub(r"(?<![\w*])\*([^*]+)\*(?![\w*])", r"\1", text)
    text = OPTIONAL.sub("", NUMBERING.sub("", " ".join(UNESCAPE.sub(r"\1", text).split()))).strip(" :-–—|")
    shouted = text.isupper() and (" " in text or len(text) > 6) and "_" not in text
    return text.capitalize() if shouted else re.sub(r"[?!]*\?[?!]*$", "?", text)
