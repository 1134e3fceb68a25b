"""What is remembered of each start of an engine: its phases, how it ended, and so how long the next one will take.

One JSON file a start of an engine, in `starts/` of the home; the oldest go.

    >>> expected_seconds(home, "reader-9m on Xeon, LoRA rank 16")
    41.8
"""

import contextlib
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraport.clients.home import Home, write_json
from loraport.clients.redact import hide_secrets
from loraport.serve.engine.connect import files_name

KEPT = 200
LOOKED_AT = 5  # of the last starts of the same kind


@dataclass
class Start:
    """A start of an engine. `kind`: starts of one kind take about as long. `seconds`: from spawn to ready.

    `phases`: seconds by phase in their order, the last of them to the first adapter's first token and to the end of its
    verification. `outcome`: ready, or why not.
    """

    kind: str
    port: int
    models: list[str]
    vllm: str
    command: list[str]
    is_restart: bool
    replica: int = 0
    began: float = field(default_factory=time.time)
    phases: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    outcome: str = "starting"

    def finish(self, home: Home, phases: dict[str, float], outcome: str = "ready") -> None:
        """Keep it."""
        self.phases = {name: round(spent, 3) for name, spent in phases.items()}
        self.seconds, self.outcome = round(sum(phases.values()), 3), outcome
        folder = home.ensure(home.root / "starts")
        for old in sorted(folder.glob("*.json"))[: -KEPT + 1]:
            old.unlink(missing_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.began)) + f"-{self.began % 1 * 1000:03.0f}"
        document = asdict(self) | {"command": hide_secrets(self.command)}
        write_json(folder / f"{stamp}-{files_name(self.port, self.replica)}.json", document, is_private=True)


def read_starts(home: Home) -> list[dict[str, Any]]:
    """All starts that are remembered, newest first; unreadable files are as good as none."""
    found = []
    for path in sorted((home.root / "starts").glob("*.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if isinstance(document, dict):
                found.append(document)
    return found


def expected_seconds(home: Home, kind: str) -> float | None:
    """Median of the last starts of that kind that ended well; None where there is none."""
    times = [
        float(start["seconds"])
        for start in read_starts(home)
        if start.get("kind") == kind and start.get("outcome") == "ready" and start.get("seconds")
    ]
    return statistics.median(times[:LOOKED_AT]) if times else None
