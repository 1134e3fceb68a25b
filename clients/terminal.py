"""What people see: text for them on standard error, results on standard output, and errors in one form.

`console` writes to standard error, so that `--json` leaves exactly one document on standard output.
"""

import json
import sys
import threading
import traceback
from pathlib import Path
from shutil import which
from typing import Any, NoReturn
from unicodedata import category

from rich.console import Console
from rich.text import Text

from loraport.clients.errors import LoraportError

console = Console(stderr=True, highlight=False, soft_wrap=True)
has_document = threading.Event()  # on standard output: there is never a second one


def say(message: str, style: str = "") -> None:
    """Print a line for people. No markup: file names and replies may hold brackets."""
    console.print(Text(message, style=style))


def program() -> str:
    """How to call this program in a line to copy: `loraport`, or the path it was called by where PATH lacks it."""
    called = sys.argv[0]
    return called if Path(called).name == "loraport" and not which("loraport") else "loraport"


def printable(text: str) -> str:
    """`text` with control characters spelled out, lines and tabs aside: a model's reply must not steer the terminal."""
    return "".join(c if c in "\n\t" or category(c) != "Cc" else repr(c)[1:-1] for c in text)


def print_json(document: Any) -> None:
    """Print the one JSON document of a command that was given `--json`."""
    has_document.set()
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def exit_with(error: LoraportError, debug: bool, is_json: bool = False) -> NoReturn:
    """Show an error as evidence, sentence and hint, and end with its exit code.

    `is_json`: as the document too, where there is none yet: `kind`, the class, says what a program may do about it.
    """
    if is_json and not has_document.is_set():
        said = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        print_json({"error": said | {"exit_code": error.exit_code}})
    if debug:
        traceback.print_exception(error)
    for line in error.details:
        say(f"  | {line}", "dim")
    say(f"error: {error.message}", "bold red")
    if error.hint:
        say(f"hint: {error.hint}")
    sys.exit(error.exit_code)
