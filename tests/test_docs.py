"""What README and docs tell to type: each command and each flag exists, and links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

import loraport_cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md")]
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.S)
# Up to the end of the line, a comment, the next command, or what a shell puts around one.
CALL = re.compile(r"(?:^|[\s/(`])loraport ((?:(?!&&| #| loraport |  |[`\n;,|)…]).|\\\n)+)")
LINK = re.compile(r"\]\(([^)#]+)?(?:#([^)]+))?\)")


def calls(page: Path) -> list[list[str]]:
    """The words behind each `loraport` in the code of a page, up to a lone `--`."""
    found = []
    for code in CODE.findall(page.read_text()):
        for text in CALL.findall(code):
            words = text.replace("\\\n", " ").split()
            found.append(words[: words.index("--")] if "--" in words else words)
    return [words for words in found if words and re.fullmatch(r"[a-z-]+", words[0])]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """(the command that is called, as Click finds it; the words that are its own)."""
    command: Any = typer.main.get_command(loraport_cli.build_app(loraport_cli.command_of(words)))
    while words and words[0] in getattr(command, "commands", {}):
        _, command, words = command.resolve_command(command.context_class(command), words)
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_exist(page: Path) -> None:
    for words in calls(page):
        assert words[0] in loraport_cli.COMMANDS or words[0] in loraport_cli.GROUPS, f"loraport {' '.join(words)}"
        command, own = find_command(words)
        assert not (own and hasattr(command, "commands")), f"loraport {' '.join(words)}"
        known = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
        used = {word.partition("=")[0] for word in own if re.match(r"--[a-z]", word)}
        hands_on = command.context_settings.get("ignore_unknown_options")
        assert hands_on or used <= known, f"loraport {' '.join(words)}: {used - known}"


def anchor(heading: str) -> str:
    """What a heading is linked by."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for path, part in LINK.findall(page.read_text()):
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert part in map(anchor, headings), f"{page.name}: {path}#{part}"
