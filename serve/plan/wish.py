"""What a user may wish of an engine: the flags that `loraport serve` and `loraport plan serve` share.

>>> wish(context="40k", share=None, requests=None, dtype=None, concurrency=8).context
40960
"""

import re
from typing import Annotated

import typer

from loraport.clients.errors import UsageError
from loraport.serve.plan.settings import KV_DTYPES, QUANTIZATIONS, Wanted
from loraport.serve.plan.shape import BYTES

Context = Annotated[str | None, typer.Option(help="Context length in tokens, such as 16384 or 16k. [default: chosen]")]
Share = Annotated[
    float | None, typer.Option(help="Share of the GPU's memory, or of free RAM on a CPU. [default: chosen]")
]
Requests = Annotated[int | None, typer.Option(min=1, help="Requests at once. [default: chosen]")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16: the type to compute in. [default: chosen]")
]
Concurrency = Annotated[
    int | None, typer.Option(min=1, help="Requests of full length that must fit at once. [default: 1]")
]
Quantization = Annotated[str, typer.Option(help="auto, none, fp8 or bnb: how to hold 16-bit weights on a GPU.")]
KvCacheDtype = Annotated[str, typer.Option(help="auto or fp8: the type of the KV cache on a GPU.")]
MaxLoras = Annotated[
    int | None, typer.Option(min=1, help="LoRA slots: adapters in a batch. [default: one an adapter, at most 8]")
]
MaxLoraRank = Annotated[int | None, typer.Option(min=1, help="Rank of the slots. [default: the adapters' largest]")]
TensorParallel = Annotated[int, typer.Option(min=1, help="GPUs that share the model.")]
Replicas = Annotated[
    str, typer.Option(help="Copies of the engine, each on GPUs of its own: a number, or auto for all GPUs.")
]


def wish(
    context: str | None,
    share: float | None,
    requests: int | None,
    dtype: str | None,
    concurrency: int | None = None,
    quantization: str = "auto",
    kv_cache_dtype: str = "auto",
    max_loras: int | None = None,
    max_lora_rank: int | None = None,
    tensor_parallel: int = 1,
    replicas: str = "1",
) -> Wanted:
    """The flags as one object; UsageError for values that cannot be."""
    check_share(share)
    check_known("--quantization", quantization, QUANTIZATIONS)
    check_known("--kv-cache-dtype", kv_cache_dtype, KV_DTYPES)
    if dtype is not None:
        check_known("--dtype", dtype, tuple(BYTES))
    return Wanted(
        parse_context(context),
        share,
        requests,
        dtype,
        concurrency,
        quantization,
        kv_cache_dtype,
        max_loras,
        max_lora_rank,
        tensor_parallel,
        parse_replicas(replicas),
    )


def parse_context(text: str | None) -> int | None:
    """40960 of `40960` or `40k`; UsageError otherwise."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]*)([kK]?)", text.strip())
    if not found:
        raise UsageError(f"--context {text} is not a number of tokens.", "for example --context 16384 or --context 16k")
    return int(found[1]) * (1024 if found[2] else 1)


def parse_replicas(text: str) -> int | None:
    """2 of `2`; None of `auto`; UsageError otherwise."""
    if text.strip().lower() == "auto":
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,2}", text.strip()):
        raise UsageError(
            f"--replicas {text} is not a number of engines.", "for example --replicas 2 or --replicas auto"
        )
    return int(text)


def check_share(share: float | None) -> None:
    """UsageError for a share that is none."""
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"--gpu-memory-utilization {share} is not a share.", "use more than 0, at most 1: 0.9")


def check_known(flag: str, value: str, known: tuple[str, ...]) -> None:
    """UsageError for a word that the flag does not know."""
    if value not in known:
        raise UsageError(f"{flag} {value} is not known.", f"use one of {', '.join(known)}")
