"""A check of the user's: whether a reply is good, where being the reference is not the question.

    regex:^Source: \\w+$            the expression is found in the reply (^ and $ match at lines)
    json-schema:FILE              the reply is JSON that the schema in FILE accepts
    python:FILE.py:function       function(reply, row) returns True or False, or a share from 0 to 1

All that can be wrong with a check is found by `load_check`, before training, and by `try_check`, which asks it about
the references. What a function raises later is its author's error: told in one sentence, the reply counts as failed.

    >>> load_check("regex:tea").judge("Ms Lee sells tea.", {})
    1.0
"""

import contextlib
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import ConfigError

Row = dict[str, Any]  # as it stands in the file of rows
Judge = Callable[[str, Row], float]
FORMS = "regex:EXPRESSION, json-schema:FILE or python:FILE.py:function"


class CheckFailed(Exception):
    """The check itself went wrong on a reply; the sentence says how."""


@dataclass(frozen=True)
class Check:
    """`judge(reply, row)` gives 0 to 1, or raises CheckFailed; `text` is what the user wrote."""

    text: str
    judge: Judge


def load_check(text: str) -> Check:
    """The check that `text` describes; ConfigError when there is none, or when it cannot be used."""
    kind, _, rest = text.partition(":")
    if kind not in MAKERS or not rest:
        raise ConfigError(f"--check {text} is no check.", f"give {FORMS}")
    return Check(text, MAKERS[kind](rest))


def check_sha256(text: str) -> str:
    """Hash of what a check that can be loaded says: its expression, or its file's content and the function's name."""
    kind, _, rest = text.partition(":")
    file, _, function = rest.rpartition(":") if kind == "python" else (rest, "", "")
    said = rest.encode() if kind == "regex" else Path(file).read_bytes()
    return hashlib.sha256(f"{kind}:{function}:".encode() + said).hexdigest()


def try_check(check: Check, references: list[tuple[str, Row]]) -> list[str]:
    """References that the check does not accept. ConfigError when it goes wrong on one, or accepts none.

    A check that refuses what the model is taught can never be met; better known before training than after.
    """
    refused = []
    for reference, row in references:
        try:
            if check.judge(reference, row) < 1:
                refused.append(reference)
        except CheckFailed as error:
            raise ConfigError(
                f"--check goes wrong on a reference: {error}.", f"the reference is {reference!r}"
            ) from error
    if refused and len(refused) == len(references):
        raise ConfigError(
            f"--check {check.text} accepts none of {len(references)} references, so that no reply could succeed.",
            f"a reference is {references[0][0]!r}",
        )
    return refused


def make_regex(expression: str) -> Judge:
    """1 where `expression` is found."""
    try:
        pattern = re.compile(expression, re.MULTILINE)
    except re.error as error:
        raise ConfigError(f"--check regex:{expression} is no regular expression: {error}.", f"give {FORMS}") from error
    return lambda reply, row: float(pattern.search(reply) is not None)


def make_schema(file: str) -> Judge:
    """1 where the reply is JSON of the schema in `file`."""
    import jsonschema

    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
        validator = jsonschema.validators.validator_for(schema)
        validator.check_schema(schema)
    except (OSError, ValueError, AttributeError, jsonschema.SchemaError) as error:
        problem = str(getattr(error, "message", None) or getattr(error, "strerror", None) or error).splitlines()[0]
        raise ConfigError(f"--check cannot use {file} as a JSON schema: {problem}.", "see json-schema.org") from error
    ready = validator(schema)

    def judge(reply: str, row: Row) -> float:
        try:
            return float(ready.is_valid(json.loads(reply)))
        except (ValueError, RecursionError):
            return 0.0

    return judge


def make_function(place: str) -> Judge:
    """What the user's function says; its own output goes to standard error."""
    file, _, name = place.rpartition(":")
    if not file:
        raise ConfigError(f"--check python:{place} names no function.", "give python:FILE.py:function")
    function = getattr(load_module(Path(file)), name, None)
    if not callable(function):
        raise ConfigError(f"{file} has no function {name}.", "give python:FILE.py:function")

    def judge(reply: str, row: Row) -> float:
        with told(file), contextlib.redirect_stdout(sys.stderr):
            value = function(reply, row)
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
            raise CheckFailed(f"{file}: {name} returned {value!r} instead of True, False or a share from 0 to 1")
        return float(value)

    return judge


def load_module(path: Path) -> Any:
    """The user's file as a module; ConfigError when it is missing or raises."""
    spec = importlib.util.spec_from_file_location(f"loraport_check_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"there is no Python file {path}.", "check the path in --check python:FILE.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        with told(str(path)), contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except CheckFailed as error:
        raise ConfigError(f"{error}.", "--check runs this file") from error
    return module


@contextlib.contextmanager
def told(file: str) -> Iterator[None]:
    """Whatever the user's code raises, as one sentence with its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        trace, line = error.__traceback__, 0
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(Path(file)) else line
            trace = trace.tb_next
        line = error.lineno or 0 if isinstance(error, SyntaxError) else line
        said = " ".join(str(error).split())
        where = f"{file}, line {line}" if line else file
        raise CheckFailed(f"{where}: {type(error).__name__}{': ' + said if said else ''}") from error


MAKERS: dict[str, Callable[[str], Judge]] = {
    "regex": make_regex,
    "json-schema": make_schema,
    "python": make_function,
}
