"""Cases of `loraport bench plan`: a shape of a real model, and what the plan is asked for.

The plan is asked as a user asks, by the command: this room does not import the one that plans.

    >>> case = Case.parse("qwen3-8b,rank=16,loras=8,quantization=fp8")
    >>> case.flags()
    ['--max-lora-rank', '16', '--max-loras', '8', '--quantization', 'fp8']
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.bench.serving.made import make_base
from loraport.bench.tables import known
from loraport.bench.training.cases import SHAPES
from loraport.clients.errors import UsageError

# key of a case -> (flag of `loraport plan serve`, type)
KEYS: dict[str, tuple[str, type]] = {
    "rank": ("--max-lora-rank", int),
    "loras": ("--max-loras", int),
    "quantization": ("--quantization", str),
    "kv": ("--kv-cache-dtype", str),
    "share": ("--gpu-memory-utilization", float),
    "context": ("--context", int),
    "requests": ("--max-num-seqs", int),
    "dtype": ("--dtype", str),
    "gpus": ("--tensor-parallel", int),
}
PLAN = (sys.executable, "-m", "loraport_cli", "plan", "serve")
MODEL_CONTEXT = 32_768  # that a made base says it was trained for, where the case does not ask for more
# Sizes, ranks, slots, ways to hold weights and cache, and shares, each with others: what a formula can be wrong about.
SETS = {
    "h200": (
        "llama-3.2-1b",
        "llama-3.2-1b,rank=256,loras=8",
        "qwen3-1.7b,rank=16,loras=1,quantization=none",
        "llama-3.2-3b,rank=64,loras=4,quantization=fp8,requests=64",
        "qwen3-4b,rank=32,loras=8,quantization=none,share=0.5",
        "mistral-7b,rank=8,loras=1,context=8192,requests=64",
        "qwen3-8b,rank=16,loras=8,quantization=none",
        "qwen3-8b,rank=16,loras=8,quantization=fp8,share=0.5,context=8192,requests=64",
        "llama-3.1-8b,rank=128,loras=2,quantization=none,kv=fp8",
        "qwen3-14b,rank=64,loras=8,quantization=none",
        "mistral-small-24b,rank=16,loras=4,quantization=fp8",
        "qwen3-32b,rank=32,loras=2,quantization=none",
        "qwen3-32b,rank=64,loras=8,quantization=fp8",
    ),
    "cpu": ("tiny", "tiny,rank=8,loras=1", "tiny,rank=16,loras=4,context=4096,requests=4"),
}


class PlanRefused(Exception):
    """`loraport plan serve` printed no plan; the message holds its words."""


@dataclass(frozen=True)
class Case:
    """A shape, and values by KEYS, as they were given."""

    shape: str
    settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Case":
        """`SHAPE[,key=value…]`; UsageError for what is not known."""
        shape, *parts = (part.strip() for part in text.split(","))
        settings = {}
        for part in parts:
            key, sign, value = part.partition("=")
            kind = KEYS[known("key of a case", key, KEYS)][1]
            try:
                kind(value)
            except ValueError:
                sign = ""
            if not sign or not value:
                raise UsageError(f"{part!r} of the case {text!r} has no value of its kind.", "write it as in rank=16")
            settings[key] = value
        return cls(known("shape", shape, SHAPES), tuple(settings.items()))

    @property
    def name(self) -> str:
        """As it is given on the command line."""
        return ",".join([self.shape, *(f"{key}={value}" for key, value in self.settings)])

    def flags(self) -> list[str]:
        """For `loraport plan serve`."""
        return [word for key, value in self.settings for word in (KEYS[key][0], value)]

    def make(self, folder: Path) -> None:
        """Its base, without weights, in a new folder."""
        make_base(self.shape, folder, max(MODEL_CONTEXT, int(dict(self.settings).get("context", 0))))


def chosen_cases(named: list[str], set_name: str | None, part: str | None) -> list[Case]:
    """Those given and those of a set, each once; of `K/N` every N-th from the K-th on. UsageError where none is."""
    texts = [*named, *(SETS[known("set", set_name, SETS)] if set_name else ())]
    cases = list({case.name: case for case in map(Case.parse, texts)}.values())
    if part:
        first, sign, count = part.partition("/")
        if not (sign and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
            raise UsageError(f"--part {part} is no part.", "the second of four is 2/4")
        cases = cases[int(first) - 1 :: int(count)]
    if not cases:
        hint = f"--case qwen3-8b,rank=16,loras=8, or --set NAME of {', '.join(SETS)}"
        raise UsageError("there is no case to measure.", hint)
    return cases


def ask_plan(case: Case, folder: Path) -> dict[str, Any]:
    """The document of `loraport plan serve --json` for its base; PlanRefused where it ends with an error."""
    command = [*PLAN, "--model", str(folder), *case.flags(), "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    try:
        if done.returncode == 0:
            return dict(json.loads(done.stdout))
    except ValueError:
        pass
    words = " ".join((done.stderr or done.stdout).split())
    raise PlanRefused(words[-500:] or f"it ended with status {done.returncode}")


def engine_command(command: list[str], folder: Path, port: int, plan: dict[str, Any], more: list[str]) -> list[str]:
    """The engine on made-up weights, told what the plan says; `more` comes last, where the last of a kind counts."""
    model = [str(folder)] if command[-1] == "serve" else ["--model", str(folder)]
    where = ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    return [*command, *model, *where, *plan["vllm_args"], "--load-format", "dummy", *more]
