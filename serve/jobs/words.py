"""Words of trainers and checks, made fit for a client: no path of this machine, no control characters, an end.

>>> clean("/home/me/.loraport/jobs/ftjob-1/training.jsonl, line 3: no key 'messages'", {"/home/me": "…"})
"…/.loraport/jobs/ftjob-1/training.jsonl, line 3: no key 'messages'"
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraport.clients.terminal import printable

LONGEST = 2000


def clean(text: str, names: Mapping[str, str] | None = None) -> str:
    """`text` with each key of `names` replaced by its value, printable and of bounded length."""
    for path in sorted(names or {}, key=len, reverse=True):
        text = text.replace(path, (names or {})[path])
    text = printable(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def failure(code: str, message: str, param: str | None = None, hint: str = "") -> dict[str, Any]:
    """The error of a job as OpenAI's API has it. The hint is part of the message: clients show nothing else."""
    message = message.strip()
    if hint:
        message = f"{message.rstrip('.')}. {hint[:1].upper()}{hint[1:].rstrip('.')}."
    return {"code": code, "message": clean(message), "param": param}


def last_lines(path: Path, count: int = 5, most_bytes: int = 16_384) -> list[str]:
    """The last lines of a log that say something; none of a log that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - most_bytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [printable(line) for line in text.splitlines() if line.strip()][-count:]
