"""Command lines and log lines without the secrets in them: for documents that are kept, and for what is printed.

A flag or a field is secret where its name ends in key, token, secret or password. Its name stays, its value is dots.

    >>> hide_secrets(["vllm", "serve", "--hf-token", "hf_123", "--port=80"])
    ['vllm', 'serve', '--hf-token', '…', '--port=80']
    >>> hide_in_text("non-default args: {'hf_token': 'hf_123', 'port': 80}")
    "non-default args: {'hf_token': '…', 'port': 80}"
"""

import re
from collections.abc import Sequence

NAME = r"[\w.-]*(?:key|token|secret|password)"
FLAG = re.compile(rf"(?i)--?{NAME}")
FLAG_IN_TEXT = re.compile(rf"(?i)(?<![\w-])(--{NAME}[= ] *['\"]?)(?!-)[^\s,'\"]+")
# 'name': 'value' or ['value', ...], as JSON and Python print fields; name='value', as Python prints a Namespace.
QUOTED = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
VALUE = rf"(?:{QUOTED}|\[[^\]]*\])"
FIELD_IN_TEXT = re.compile(rf"(?i)((['\"]){NAME}\2\s*:\s*|\b{NAME}=(?=['\"\[]))({VALUE})")
HIDDEN = "…"


def hide_fields(text: str) -> str:
    """The values of secret fields as dots, in their quotes."""

    def dots(found: re.Match[str]) -> str:
        value = found[3]
        quote = value[0] if value[0] in "'\"" else ""
        return found[1] + (f"{quote}{HIDDEN}{quote}" if quote else f"[{HIDDEN}]")

    return FIELD_IN_TEXT.sub(dots, text)


def hide_secrets(command: Sequence[str]) -> list[str]:
    """A command line in which the values of secret flags are dots, those within JSON of other flags too."""
    shown: list[str] = []
    is_secret = False
    for word in command:
        flag, sign, _ = word.partition("=")
        if word.startswith("-"):
            is_secret = bool(FLAG.fullmatch(flag))
            word = f"{flag}={HIDDEN}" if sign and is_secret else word
        elif is_secret:
            word = HIDDEN
        shown.append(hide_fields(word))
    return shown


def hide_in_text(line: str) -> str:
    """A line that an engine printed, with the values of secret flags and fields as dots."""
    return hide_fields(FLAG_IN_TEXT.sub(rf"\1{HIDDEN}", line))
