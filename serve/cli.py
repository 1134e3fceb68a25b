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
    engine_command: Annotated[
        str | None,
        typer.Option(help="How to start vLLM's OpenAI server, for a vLLM elsewhere. [default: this environment's]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document when ready.")] = False,
) -> None:
    """Serve a base and its adapters on one OpenAI-compatible URL."""
    from loraport.serve.plan import BYTES, Wanted
    from loraport.serve.serve import Request
    from loraport.serve.serve import serve as run

    adapters, more = split_arguments(arguments or [])
    check_flags(port, gpu_memory_utilization)
    if dtype is not None and dtype not in BYTES:
        raise UsageError(f"--dtype {dtype} is not known.", f"use one of {', '.join(BYTES)}")
    wanted = Wanted(parse_context(context), gpu_memory_utilization, max_num_seqs, dtype)
    run(Request(adapters, model, host, port, wanted, engine_command, more, json), Home.default())


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(adapters, flags for vLLM). The command line's `--` is gone by now: flags begin at the first dash."""
    first = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return arguments[:first], arguments[first:]
