"""How long an adapter takes that is not in a slot: from host memory, from the page cache, from disk. Apart from TTFT.

Requests for one token go one after the other: others first, as many as drive the adapter out of its slot (warm) or out
of host memory too (cold), since the one that was asked least recently leaves; then the base, the adapter, the base, the
adapter again, which is hot now. Its TTFT less that of the base beside it is what the adapter adds, and less its own hot
TTFT what the load takes. Where the server does not say how many it holds, that is not available.

    >>> tiers = Tiers(measurement, study.base, study.adapters, slots, folders, rounds=5)
    >>> tiers.measure()
    >>> tiers.describe()["disk"]["load_ms"]["difference"]
    41.3
"""

import ctypes
import mmap
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loraport.bench.load.figures import Records, latencies, paired_difference, percentiles, read_records
from loraport.bench.load.stage import Load, Target
from loraport.bench.serving.adapters_server import AdapterServer, Slots, name_prefix
from loraport.bench.serving.caches import drop_files
from loraport.bench.serving.measurement import Measurement
from loraport.clients.errors import LoraportError

Tier = Literal["hot", "warm", "cached", "disk"]
TIERS: dict[Tier, str] = {
    "hot": "hot, in a slot",
    "warm": "warm, in host memory",
    "cached": "cold, files in the page cache",
    "disk": "cold, files from disk",
}
LEFT = 0.05  # of a file that may stay in the page cache, to call it dropped
PROBED = 4  # requests at the end of a sequence: base, adapter, base, adapter


@dataclass(frozen=True)
class Found:
    """A probe that ran: the tier, its stage, and the adapter."""

    tier: Tier
    stage: int
    model: str


class Tiers:
    """Probes of all tiers that this server has. `measurement`: of one-token replies, prepared."""

    def __init__(
        self,
        measurement: Measurement,
        base: Target,
        adapters: Sequence[Target],
        slots: Slots,
        folders: dict[str, str],
        rounds: int,
        engines: int = 1,
    ) -> None:
        self.measurement, self.base, self.adapters = measurement, base, list(adapters)
        self.rounds, self.folders = rounds, folders
        self.others, self.missing = plan_tiers(slots, len(self.adapters), engines)
        self.found: list[Found] = []
        if "cached" in self.others:
            reason = why_not_dropped(folders, [target.model for target in self.adapters])
            if reason:
                self.missing["disk"] = reason
            else:
                self.others["disk"] = self.others["cached"]

    def measure(self) -> None:
        """Round by round, each with another adapter."""
        for turn in range(self.rounds):
            at = turn % len(self.adapters)
            adapter, others = self.adapters[at], self.adapters[at + 1 :] + self.adapters[:at]
            for tier, count in self.others.items():
                self.measurement.on_step(f"loads, round {turn + 1} of {self.rounds}: {TIERS[tier]}")
                if tier == "disk":
                    drop_files([Path(self.folders[adapter.model])])
                self.probe(tier, turn, adapter, others[:count])

    def probe(self, tier: Tier, turn: int, adapter: Target, others: Sequence[Target]) -> None:
        """One sequence of requests, as a stage."""
        before = [adapter] if tier in ("hot", "warm") else []
        sequence = [*before, *others, self.base, adapter, self.base, adapter]
        ran = self.measurement.run(f"{tier}/{turn}", sequence, Load("closed", 1), len(sequence))
        self.found.append(Found(tier, ran.stage.id, adapter.model))

    def describe(self) -> dict[str, Any]:
        """Each tier: milliseconds that it adds to the base's TTFT, and that its load takes; or why it is not there."""
        read = read_probes(self.measurement, self.found)
        pairs: dict[str, list[list[float]]] = {tier: [] for tier in TIERS}
        for one, times in zip(self.found, read.times, strict=True):
            if times:
                pairs[one.tier].append(times)
                if one.tier != "hot":
                    pairs["hot"].append([*times[2:], *times[2:]])
        left_out = read.times.count(None)
        return {
            "tiers": {tier: describe_tier(tier, pairs[tier], self.missing.get(tier)) for tier in TIERS},
            "probes": len(self.found),
            "left_out": left_out,
            "believed": 2 * left_out <= len(self.found),
            "reasons": read.reasons,
            "errors": read.errors,
        }


@dataclass(frozen=True)
class Probes:
    """TTFT in milliseconds of the last requests of each probe; None where one failed or the client is not believed."""

    times: list[list[float] | None]
    reasons: list[str]
    errors: dict[str, int]


def read_probes(measurement: Measurement, found: Sequence[Found]) -> Probes:
    """What came of probes."""
    results = {result["stage"]: result for result in measurement.results()}
    by_request = read_records(measurement.folder, lambda record: (record.stage, record.index))
    times: list[list[float] | None] = []
    errors: Counter[str] = Counter()
    for one in found:
        result = results[one.stage]
        last = len(result["targets"])
        each = [ttft(by_request.get((one.stage, last - back))) for back in range(PROBED, 0, -1)]
        known = [time for time in each if time is not None]
        times.append(known if result["believed"] and len(known) == PROBED else None)
        errors.update(result["figures"]["errors"])
    reasons = dict.fromkeys(why for one in found for why in results[one.stage]["reasons"])
    return Probes(times, list(reasons), dict(errors))


def plan_tiers(slots: Slots, adapters: int, engines: int = 1) -> tuple[dict[Tier, int], dict[Tier, str]]:
    """How many others must be asked for each tier that can be had, and why the rest cannot."""
    if engines > 1:
        return {}, dict.fromkeys(TIERS, f"{engines} engines answer there, each with slots of its own")
    others: dict[Tier, int] = {"hot": 0}
    most, host = slots.max_loras, slots.max_cpu_loras
    silent = "the server does not say max_{0}: --max-{1} tells it"
    if most is None:
        said = silent.format("loras", "loras")
        return others, {"warm": said, "cached": said, "disk": said}
    if host is None:
        said = silent.format("cpu_loras", "cpu-loras")
        return others, {"warm": said, "cached": said, "disk": said}
    missing: dict[Tier, str] = {}
    asked = "the one adapter that is asked has" if adapters == 1 else f"the {adapters} adapters that are asked all have"
    if host <= most:
        missing["warm"] = f"host memory holds no more than the slots (max_cpu_loras {host}, max_loras {most})"
    elif adapters <= most:
        missing["warm"] = f"{asked} a slot (max_loras {most}): it takes {most + 1}"
    else:
        others["warm"] = most
    if adapters <= host:
        said = f"{asked} a place in host memory (max_cpu_loras {host}): it takes {host + 1}"
        return others, missing | {"cached": said, "disk": said}
    others["cached"] = host
    return others, missing


def why_not_dropped(folders: dict[str, str], models: Sequence[str]) -> str | None:
    """Why the files of adapters cannot be dropped from the page cache; None where they can, as one of them shows."""
    if any(name not in folders for name in models):
        return "the server does not say where adapters lie"
    folder = Path(folders[models[0]])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return f"{folder} is not on this machine"
    drop_files([folder])
    left = max(resident_share(path) for path in files)
    return None if left <= LEFT else f"{left:.0%} of {folder} stays in the page cache when it is dropped"


def resident_share(path: Path) -> float:
    """Pages of a file that are in memory, as a share, by mincore(2); 1 where the system does not tell."""
    with suppress(OSError, ValueError, AttributeError), path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
            pages = -(-len(view) // mmap.PAGESIZE)
            seen = (ctypes.c_ubyte * pages)()
            first = ctypes.c_char.from_buffer(view)
            status = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(view)), seen)
            del first  # a map with a view into it cannot be closed
        return sum(page & 1 for page in seen) / pages if status == 0 else 1.0
    return 1.0


def ttft(records: Records | None) -> float | None:
    """Of a single request in milliseconds; None where it failed."""
    found = latencies(records)["ttft"] if records else np.array([])
    return 1000 * float(found[0]) if len(found) == 1 else None


def describe_tier(tier: Tier, pairs: Sequence[Sequence[float]], missing: str | None) -> dict[str, Any]:
    """A tier's figures. `pairs`: TTFT of base, adapter, base, adapter (hot) in milliseconds."""
    found: dict[str, Any] = {"what": TIERS[tier], "available": bool(pairs), "reason": missing}
    if not pairs:
        return found | {"reason": missing or "no probe of it was answered and believed"}
    base, adapter, _, hot = (list(column) for column in zip(*pairs, strict=True))
    return found | {
        "ttft_ms": milliseconds(adapter),
        "base_ttft_ms": milliseconds(base),
        "added_ms": paired_difference(adapter, base),
        "load_ms": paired_difference(adapter, hot) if tier != "hot" else None,
    }


def milliseconds(values: Sequence[float]) -> dict[str, float | int] | None:
    """Their percentiles."""
    return percentiles(np.array(values, dtype=np.float64) / 1000)


class Loads:
    """Adapters loaded by the server's route under names of ours, then asked, then unloaded. Stops where it may not."""

    def __init__(
        self, server: AdapterServer, measurement: Measurement, base: Target, folders: dict[str, str], count: int
    ) -> None:
        self.server, self.measurement, self.base, self.count = server, measurement, base, count
        self.folders, self.prefix = list(folders.values()), name_prefix()
        self.seconds: list[float] = []
        self.found: list[Found] = []
        self.dropped = 0
        self.reason: str | None = None if self.folders else "the server does not say where adapters lie"

    def measure(self) -> None:
        """As often as wished; a refusal is kept as the reason."""
        for turn in range(self.count if self.folders else 0):
            folder, name = self.folders[turn % len(self.folders)], f"{self.prefix}{turn}"
            self.measurement.on_step(f"loads by the server's route, {turn + 1} of {self.count}")
            self.dropped += is_dropped(Path(folder))
            try:
                self.seconds.append(self.server.load(name, folder))
                target = Target(self.base.url, name)
                sequence = [self.base, target, self.base, target]
                ran = self.measurement.run(f"load/{turn}", sequence, Load("closed", 1), PROBED)
                self.found.append(Found("hot", ran.stage.id, name))
            except LoraportError as error:
                self.reason = error.message
                return
            finally:
                with suppress(LoraportError):
                    self.server.unload(name)

    def describe(self) -> dict[str, Any]:
        """Seconds of the request, and what the first token after it adds to the base's."""
        read = read_probes(self.measurement, self.found)
        pairs = [times[:2] for times in read.times if times]
        added = paired_difference([pair[1] for pair in pairs], [pair[0] for pair in pairs]) if pairs else None
        return {
            "available": bool(self.seconds),
            "reason": self.reason,
            "loads": len(self.seconds),
            "files_dropped": self.dropped,
            "with_proof": self.server.is_ours,
            "load_ms": milliseconds([1000 * seconds for seconds in self.seconds]),
            "first_token_added_ms": added,
            "left_out": read.times.count(None),
            "reasons": read.reasons,
            "errors": read.errors,
        }


def is_dropped(folder: Path) -> bool:
    """Drop the files of an adapter from the page cache; whether they are gone."""
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    drop_files([folder] if files else [])
    return bool(files) and all(resident_share(path) <= LEFT for path in files)
