"""Resuming: what an earlier run has measured stands in its document, and only what is missing is measured.

The document is written after each load, so it is there also after `kill -9`. Loads that it has whole are kept as they
are; all else must be the same, or the two would not belong into one table.

    >>> earlier = read_earlier(Path("night.json"), plan)
    >>> earlier.result("8 at once")["headline"]
    {...}
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.clients.errors import DataError, UsageError

if TYPE_CHECKING:
    from loraport.bench.load.stage import Target
    from loraport.bench.serving.loads import Amount, Chosen
    from loraport.bench.serving.measurement import Setting

STAGES_A_RUN = 1 << 10  # numbers of stages that a part of a run may use, so that the next has prompts of its own


@dataclass
class Earlier:
    """Results of an earlier run by the label of their load. `parts`: how many runs there were."""

    document: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        """Runs that the document is of."""
        return int(self.document.get("parts", 1)) if self.document else 0

    @property
    def first_stage(self) -> int:
        """Number of the first stage whose prompts nobody has seen."""
        return self.parts * STAGES_A_RUN

    @property
    def seed(self) -> int | None:
        """Of its prompts."""
        return self.document["workload"]["seed"] if self.document else None

    def result(self, label: str) -> dict[str, Any] | None:
        """What it measured under a load, to its end; figures that were withheld because of the client are none."""
        for stage in self.document.get("stages", ()):
            if stage["label"] == label and stage["complete"] and (stage["believed"] or stage["figures"]["errors"]):
                return dict(stage)
        return None

    def has(self, chosen: "Chosen") -> bool:
        """Whether nothing is missing; a sweep that ran out of time may go on."""
        if chosen.sweep:
            sweep = self.document.get("sweep") or {}
            same = sweep.get("kind") == chosen.sweep.kind and sweep.get("gain") == chosen.sweep.gain
            return same and sweep.get("stopped") in ("found", "nothing was fine")
        return bool(self.document) and all(self.result(load.words) for load in chosen.loads)

    def check_plan(self, plan: dict[str, Any]) -> None:
        """UsageError where it is of another run, naming the options."""
        known = self.document.get("plan", {})
        different = sorted(name for name in plan if self.document and known.get(name) != plan[name])
        if different:
            named = ", ".join(f"{name} ({known.get(name)!r}, now {plan[name]!r})" for name in different)
            raise UsageError(f"the earlier run was another: {named}.", "run it without --resume, or with its options")

    def check_servers(self, servers: dict[str, dict[str, Any]]) -> None:
        """UsageError where a server is not what it was."""
        for url, server in self.document.get("servers", {}).items():
            now = servers.get(url, {}).get("version")
            if now != server["version"]:
                raise UsageError(
                    f"{url} is of version {now}, and was of {server['version']} in the earlier run.",
                    "figures of the two do not belong into one table: run it without --resume",
                )


def plan_of(
    setting: "Setting", targets: "Sequence[Target]", amount: "Amount", trace: Path | None, scale: float
) -> dict[str, Any]:
    """The options that must be the same for two runs to belong together; loads may differ."""
    wish = setting.wish
    rows = hashlib.sha256("\n".join(wish.rows).encode()).hexdigest()[:16] if wish.rows else None
    return {
        "targets": [[target.url, target.model] for target in targets],
        "requests": amount.requests,
        "seconds": amount.seconds,
        "trace": f"{trace.name} × {scale:g}" if trace else None,
        "input": list(wish.input),
        "output": list(wish.output),
        "data": rows,
        "seed": wish.seed,
        **{name: getattr(wish, name) for name in ("chat", "prefix", "natural", "replays", "as_is")},
        "processes": setting.processes,
        "slo": setting.limits,
    }


def read_earlier(path: Path) -> Earlier:
    """The run that wrote this document; none where there is no such file. DataError where it is another's."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Earlier()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "--resume goes on with what --out has written") from error
    if not isinstance(document, dict) or document.get("bench") != "throughput" or "plan" not in document:
        raise DataError(f"{path} is no result of bench throughput.", "--resume goes on with what --out has written")
    return Earlier(document)
