"""What schemathesis is told: names of things that are there, so that it gets beyond `404`, and what no answer may hold.

`SCHEMATHESIS_HOOKS=tests.fuzz_hooks`, with LORAPORT_FUZZ a JSON object of names and `secrets`.
"""

import json
import os
import zlib
from typing import Any

import schemathesis

KNOWN: dict[str, Any] = json.loads(os.environ["LORAPORT_FUZZ"])


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """In three of four requests name what is there; `rows` is in no path, so that nobody deletes it."""
    chance = zlib.crc32(repr((case.path, case.path_parameters, case.body)).encode()) % 4
    if chance == 0:
        return
    for name in set(case.path_parameters or {}) & set(KNOWN):
        case.path_parameters[name] = KNOWN[name]
    if isinstance(case.body, dict) and "training_file" in case.body:
        case.body |= {"model": "base", "training_file": KNOWN["rows"]}
        if case.body.get("validation_file") is not None:
            case.body["validation_file"] = KNOWN["rows"]
        if chance == 1:  # what is random all over is mostly refused
            case.body = {name: case.body[name] for name in ("model", "training_file", "seed") if name in case.body}


@schemathesis.check
def no_leak(context: Any, response: Any, case: Any) -> None:
    """Nothing of another tenant is in an answer."""
    text = response.content.decode(errors="replace")
    asked = f"{case.path_parameters} {case.query} {case.body!r}"
    for secret in KNOWN["secrets"]:
        assert secret not in text or secret in asked, f"the answer holds {secret}"
    assert "Traceback" not in text and "sqlalchemy" not in text
