"""What is measured: shapes of real models, cases, and the lengths of the rows.

The first six cases are those of the project's first baselines: a tutorial's QLoRA recipe (rank 8, attention only, 1,024
tokens) with and without checkpointing, and rank 16 on all linears at 4,096 tokens. Values do not matter for speed and
memory, so models have random weights and rows random tokens.

    >>> row_lengths(CASES["nf4-r8-1024-full"], "natural", 4)
    [410, 196, 1024, 283]
"""

import math
import random
from dataclasses import dataclass
from typing import Any, Literal

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
STEP_TOKENS = 16_384  # of an optimiser step, about, on full rows as on natural ones
# Natural rows: log-normal, as lengths of chats are; mean about 480 tokens.
MEDIAN, SIGMA, SHORTEST = 350, 0.8, 16
FLOPS_A_PARAMETER = 4  # a frozen base: forward, and backward to the activations; none to the weights

Rows = Literal["full", "natural"]


def shape(
    kind: str, hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """The part of a config.json that decides about speed and memory."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **more,
    }


TIED = {"tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": shape("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=None),
    "llama-3.2-1b": shape("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
    "llama-3.2-3b": shape("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **TIED),
    "llama-3.1-8b": shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "qwen3-1.7b": shape("qwen3", 2048, 6144, 28, 16, 8, 151936, head_dim=128, **TIED),
    "qwen3-4b": shape("qwen3", 2560, 9728, 36, 32, 8, 151936, head_dim=128, **TIED),
    "qwen3-8b": shape("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "qwen3-14b": shape("qwen3", 5120, 17408, 40, 40, 8, 151936, head_dim=128),
    "mistral-small-24b": shape("mistral", 5120, 32768, 40, 32, 8, 131072, head_dim=128, sliding_window=None),
    "qwen3-32b": shape("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128),
    "llama-65b": shape("llama", 8192, 22016, 80, 64, 64, 32000),
    "tiny": shape("llama", 64, 128, 2, 4, 2, 256),
}


@dataclass(frozen=True)
class Case:
    """One setting of a run. `micro_rows`: full rows on the device at once; `row_tokens`: the longest row."""

    name: str
    load: Literal["nf4", "bf16", "fp32"]
    rank: int
    targets: tuple[str, ...]
    micro_rows: int
    row_tokens: int
    checkpointing: bool
    dropout: float = 0.0

    @property
    def words(self) -> str:
        """For the table: `NF4, rank 8 on attention, 4 × 1,024 tokens, checkpointing`."""
        where = "all linears" if self.targets == ALL else "attention"
        saved = "checkpointing" if self.checkpointing else "no checkpointing"
        return (
            f"{self.load.upper()}, rank {self.rank} on {where}, {self.micro_rows} × {self.row_tokens:,} tokens, {saved}"
        )


CASES = {
    case.name: case
    for case in (
        Case("nf4-r8-1024-full", "nf4", 8, ATTENTION, 4, 1024, True, 0.05),
        Case("nf4-r8-1024-off", "nf4", 8, ATTENTION, 4, 1024, False, 0.05),
        Case("nf4-r16-4096-full", "nf4", 16, ALL, 4, 4096, True),
        Case("nf4-r16-4096-off", "nf4", 16, ALL, 1, 4096, False),
        Case("bf16-r16-4096-full", "bf16", 16, ALL, 4, 4096, True),
        Case("bf16-r16-4096-off", "bf16", 16, ALL, 2, 4096, False),
        Case("fp32-r8-64-full", "fp32", 8, ATTENTION, 4, 64, True),
        Case("fp32-r8-64-off", "fp32", 8, ATTENTION, 4, 64, False),
    )
}


def default_cases(on_gpu: bool) -> list[str]:
    """Those that a device can run."""
    return [case.name for case in CASES.values() if on_gpu == (case.load != "fp32")]


def step_rows(case: Case, rows: Rows) -> int:
    """Rows of an optimiser step: about STEP_TOKENS tokens, and whole micro-batches."""
    average = case.row_tokens if rows == "full" else min(480, case.row_tokens / 2)
    wanted = min(STEP_TOKENS, 16 * case.row_tokens) / average
    return max(1, round(wanted / case.micro_rows)) * case.micro_rows


def row_lengths(case: Case, rows: Rows, count: int, seed: int = 0) -> list[int]:
    """Tokens of `count` rows: all as long as may be, or log-normal and cut there. The same for the same seed."""
    if rows == "full":
        return [case.row_tokens] * count
    generator = random.Random(seed)
    median = min(MEDIAN, case.row_tokens / 3)
    drawn = (round(generator.lognormvariate(math.log(median), SIGMA)) for _ in range(count))
    return [max(min(SHORTEST, case.row_tokens), min(case.row_tokens, length)) for length in drawn]


def parameters(shape: dict[str, Any]) -> int:
    """Elements of a model of the Llama family; those of a head that is the embedding count once."""
    hidden, head = shape["hidden_size"], shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    attention = 2 * hidden * head * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    norms = 2 * hidden + (2 * head if shape["model_type"] == "qwen3" else 0)  # Qwen3 norms queries and keys, by head
    layer = attention + 3 * hidden * shape["intermediate_size"] + norms
    words = (1 if shape["tie_word_embeddings"] else 2) * shape["vocab_size"] * hidden
    return int(shape["num_hidden_layers"] * layer + words + hidden)


def limit_tokens_per_second(shape: dict[str, Any], matmul_flops: float | None) -> float | None:
    """What no LoRA step on a frozen base can exceed, from the measured speed of a matrix product."""
    return matmul_flops / (FLOPS_A_PARAMETER * parameters(shape)) if matmul_flops else None
