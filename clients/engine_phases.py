"""What vLLM's log tells of a start, 0.25 to 0.32: which phase a line begins, and how long a step took by its own word.

The one place that knows these lines: `loraport serve` shows the phases as they come (serve/engine/startup.py), and
`loraport bench startup` reads the log of any vLLM afterwards. What an engine says when it fails is in
serve/engine/versions.py.

    >>> timeline = Timeline()
    >>> timeline.see(21.0, "INFO [gpu_model_runner.py:2653] Starting to load model /models/8b...")
    True
    >>> timeline.phase, durations("Loading weights took 2.59 seconds")
    ('weights', {'weights': 2.59})
"""

import re
from dataclasses import dataclass, field

LORA = "LoRA slots"
# The lines that begin a phase of the start, in order. A version may lack a line: then its time falls to the phase
# before. Nothing is logged during imports.
PHASES: tuple[tuple[str, str], ...] = (
    ("imports", r""),
    ("configuration", r"version \d+\.\d+\S*\s*$|vLLM API server version|non-default args"),
    ("engine process", r"Resolved architecture"),
    ("worker", r"Initializing a V1 LLM engine"),
    ("weights", r"Starting to load model"),
    (LORA, r"Loading weights took"),
    ("compilation", r"Model loading took|Start compiling|Dynamo bytecode transform time"),
    ("profiling", r"torch\.compile took"),
    ("KV cache", r"Initial profiling/warmup run took|Available KV cache memory|CPU KV cache size"),
    ("graph capture", r"GPU KV cache size|Capturing CUDA graph"),
    ("warm-up", r"Graph capturing finished"),
    ("front end", r"init engine .* took|Supported[ _]tasks|Starting vLLM (?:API )?server"),
)
PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in PHASES if pattern)
# Seconds that it names. They overlap: "engine in all" holds all but the weights.
DURATIONS = (
    ("weights", re.compile(r"Loading weights took ([\d.]+) seconds")),
    ("model loading", re.compile(r"Model loading took .* ([\d.]+) s(?:econds)?\b")),
    ("Dynamo", re.compile(r"Dynamo bytecode transform time: ([\d.]+) s")),
    ("compilation", re.compile(r"torch\.compile took ([\d.]+) s")),
    ("profiling", re.compile(r"Initial profiling/warmup run took ([\d.]+) s")),
    ("graph capture", re.compile(r"Graph capturing finished in ([\d.]+) sec")),
    ("engine in all", re.compile(r"init engine .* took ([\d.]+) s")),
)


def phase_of(line: str) -> int | None:
    """Index in PHASES of the phase that a log line begins, if it begins one."""
    for index, (_, pattern) in enumerate(PATTERNS, start=1):
        if pattern.search(line):
            return index
    return None


def durations(log: str) -> dict[str, float]:
    """Seconds by step, as the log names them; of a step that is named twice the last."""
    return {name: float(found[-1]) for name, pattern in DURATIONS if (found := pattern.findall(log))}


@dataclass
class Timeline:
    """Seconds by phase. Phases only move forward; a phase that the engine does not name adds to the one before.

    `has_lora`: whether the engine makes LoRA slots; without, what follows the loading is part of the weights' phase.
    """

    has_lora: bool = True
    current: int = 0
    begun: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """Name of the phase that the engine is in."""
        return PHASES[self.current][0]

    def see(self, at: float, line: str) -> bool:
        """Take a log line, `at` seconds after the start; return whether it began another phase."""
        index = phase_of(line)
        if index is None or index <= self.current or (PHASES[index][0] == LORA and not self.has_lora):
            return False
        self.finish(at)
        self.current = index
        return True

    def finish(self, at: float) -> None:
        """End the current phase."""
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + at - self.begun
        self.begun = at

    def see_end(self, name: str, at: float) -> None:
        """Add a phase that is not the engine's own, from the last end until `at`."""
        self.seconds[name] = at - self.begun
        self.begun = at
