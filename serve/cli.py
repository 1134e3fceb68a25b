"""`loraport serve`: its flags."""

import re
from typing import Annotated

import typer

from loraport.clients.errors import UsageError
from loraport.clients.home import Home


def parse_context(text: str | None) -> int | None:
    """40960 of `40960` or `40k`; UsageError otherwise."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]*)([kK]?)", text.strip())
    if not found:
        raise UsageError(f"--context {text} is not a number of tokens.", "for example --context 16384 or --context 16k")
    return int(found[1]) * (1024 if found[2] else 1)


def check_flags(port: int, share: float | None) -> None:
    """UsageError for numbers that cannot be."""
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port} is not a port.", "use 1024 to 65535")
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"--gpu-memory-utilization {share} is not a share.", "use more than 0, at most 1: 0.9")


def check_kinds(quantization: str, kv_cache_dtype: str) -> None:
    """UsageError for ways to hold weights or the KV cache that do not exist."""
    from loraport.serve.plan.settings import KV_DTYPES, QUANTIZATIONS

    for flag, value, known in (
        ("--quantization", quantization, QUANTIZATIONS),
        ("--kv-cache-dtype", kv_cache_dtype, KV_DTYPES),
    ):
        if value not in known:
            raise UsageError(f"{flag} {value} is not known.", f"use one of {', '.join(known)}")


# Flags of vLLM that would move the engine away from where we look for it, or undo what was planned and checked.
OURS = {
    "port": "use `loraport serve --port`",
    "host": "use `loraport serve --host`",
    "model": "use `loraport serve --model`",
    "max-model-len": "use `loraport serve --context`",
    "dtype": "use `loraport serve --dtype`",
    "served-model-name": "the base answers to `base` and its own name, an adapter to the name it was trained under",
    "enable-lora": "name the adapters before `--`",
    "no-enable-lora": "name no adapter: then LoRA is off",
    "lora-modules": "name the adapters before `--`",
    "api-key": "serve on 127.0.0.1 behind a proxy that asks for a key",
    "root-path": "let the proxy in front strip the path",
    "uds": "serve on 127.0.0.1; a proxy can offer a socket",
    "headless": "start `vllm serve --headless` yourself on further machines",
}
OURS_BY_PREFIX = {"ssl-": "serve on 127.0.0.1 behind a proxy that speaks TLS"}


def check_engine_flags(flags: list[str]) -> None:
    """UsageError for flags after `--` that are ours to set, in any spelling that vLLM takes: cut off, _ for -, =."""
    for word in flags:
        name = word.removeprefix("--").partition("=")[0].replace("_", "-")
        prefixed = (hint for prefix, hint in OURS_BY_PREFIX.items() if name.startswith(prefix))
        hint = next((OURS[ours] for ours in OURS if name and ours.startswith(name)), next(prefixed, None))
        if word.startswith("--") and hint:
            raise UsageError(f"--{name} cannot be given to the engine after `--`: `loraport serve` sets it.", hint)


def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER]... [-- FLAG...]",
            help="Adapters to serve: name, name@version or folder. After `--`: further flags for vLLM.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base: a folder or hub id. [default: the one the first adapter was trained on]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback are open to the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    context: Annotated[
        str | None, typer.Option(help="Context length in tokens, such as 16384 or 16k. [default: chosen]")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of the GPU's memory, or of free RAM on a CPU. [default: chosen]")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests at once. [default: chosen]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16: the type to compute in. [default: chosen]")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests of full length that must fit at once. [default: 1]")
    ] = None,
    quantization: Annotated[
        str, typer.Option(help="auto, none, fp8 or bnb: how to hold 16-bit weights on a GPU.")
    ] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto or fp8: the type of the KV cache on a GPU.")] = "auto",
    max_loras: Annotated[
        int | None, typer.Option(min=1, help="LoRA slots: adapters in a batch. [default: one an adapter, at most 8]")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the slots. [default: the adapters' largest]")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    engine_command: Annotated[
        str | None,
        typer.Option(help="How to start vLLM's OpenAI server, for a vLLM elsewhere. [default: this environment's]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document when ready.")] = False,
) -> None:
    """Serve a base and its adapters on one OpenAI-compatible URL."""
    from loraport.serve.plan.settings import Wanted
    from loraport.serve.plan.shape import BYTES
    from loraport.serve.serve import Request
    from loraport.serve.serve import serve as run

    adapters, more = split_arguments(arguments or [])
    check_engine_flags(more)
    check_flags(port, gpu_memory_utilization)
    check_kinds(quantization, kv_cache_dtype)
    if dtype is not None and dtype not in BYTES:
        raise UsageError(f"--dtype {dtype} is not known.", f"use one of {', '.join(BYTES)}")
    wanted = Wanted(
        context=parse_context(context),
        share=gpu_memory_utilization,
        requests=max_num_seqs,
        dtype=dtype,
        concurrency=concurrency,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        tensor_parallel=tensor_parallel,
    )
    run(Request(adapters, model, host, port, wanted, engine_command, more, json), Home.default())


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(adapters, flags for vLLM). The command line's `--` is gone by now: flags begin at the first dash."""
    first = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return arguments[:first], arguments[first:]
