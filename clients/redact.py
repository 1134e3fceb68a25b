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
FLAG_IN_TEXT = re.compile(rf"(?i)(?<![\w-])(--{NAME}[= ] *)(?!-)[^\s,'\"]+")
FIELD_IN_TEXT = re.compile(rf"(?i)((['\"]){NAME}\2\s*:\s*)(['\"])(?:(?!\3).)*\3")
HIDDEN = "…"


def hide_secrets(command: Sequence[str]) -> list[str]:
    """A command line in which the values of secret flags are dots, those within JSON of other flags too."""
    shown: list[str] = []
    for word in command:
        hides = bool(shown) and FLAG.fullmatch(shown[-1])
        flag, sign, _ = word.partition("=")
        if hides and not word.startswith("-"):
            word = HIDDEN
        elif sign and FLAG.fullmatch(flag):
            word = f"{flag}={HIDDEN}"
        shown.append(FIELD_IN_TEXT.sub(rf"\1\g<3>{HIDDEN}\3", word))
    return shown


def hide_in_text(line: str) -> str:
    """A line that an engine printed, with the values of secret flags and fields as dots."""
    return FIELD_IN_TEXT.sub(rf"\1\g<3>{HIDDEN}\3", FLAG_IN_TEXT.sub(rf"\1{HIDDEN}", line))
