"""`loraport serve`: its flags."""

from typing import Annotated

import typer

from loraport.clients.errors import UsageError
from loraport.clients.home import Home
from loraport.serve.finetuning.options import Options
from loraport.serve.plan.wish import (
    Concurrency,
    Context,
    Dtype,
    KvCacheDtype,
    MaxLoraRank,
    MaxLoras,
    Quantization,
    Replicas,
    Requests,
    Share,
    TensorParallel,
    wish,
)


def check_port(port: int) -> None:
    """UsageError for a number that is no port."""
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port} is not a port.", "use 1024 to 65535")


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
    "lora-target-modules": "name all adapters before `--`: what they use gets slots",
    "api-key": "make keys with `loraport keys create NAME`",
    "root-path": "let the proxy in front strip the path",
    "uds": "the engine has a socket of its own; the gateway listens on --host and --port",
    "disable-log-stats": "the figures tell an engine that works from one that hangs",
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
    context: Context = None,
    gpu_memory_utilization: Share = None,
    max_num_seqs: Requests = None,
    dtype: Dtype = None,
    concurrency: Concurrency = None,
    quantization: Quantization = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
    max_loras: MaxLoras = None,
    max_lora_rank: MaxLoraRank = None,
    tensor_parallel: TensorParallel = 1,
    replicas: Replicas = "1",
    engine_command: Annotated[
        str | None,
        typer.Option(help="How to start vLLM's OpenAI server, for a vLLM elsewhere. [default: this environment's]"),
    ] = None,
    merge: Annotated[
        str | None, typer.Option(help="Serve this adapter alone, merged into the weights: as fast as its base.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First search for the fastest LoRA kernels on this GPU: some minutes, once.")
    ] = False,
    origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may ask from a browser, with a key; repeatable.")
    ] = None,
    drain: Annotated[
        float,
        typer.Option(min=0, help="Seconds for running requests to end after SIGTERM; Ctrl-C waits for none."),
    ] = 30.0,
    jobs: Annotated[
        bool, typer.Option(help="Take fine-tuning jobs, and keep LoRA slots for what comes of them.")
    ] = True,
    jobs_database: Annotated[
        str | None,
        typer.Option(
            help="PostgreSQL for the jobs, without a password: that is for LORAPORT_JOBS_DATABASE. [default: SQLite]"
        ),
    ] = None,
    jobs_policy: Annotated[
        str, typer.Option(help="auto, coexist, yield or wait: what the engine does for a job that needs its GPU.")
    ] = "auto",
    jobs_window: Annotated[
        str | None, typer.Option(help="Time of the day for --jobs-policy wait, such as 22:00-06:00.")
    ] = None,
    jobs_ray: Annotated[
        str | None, typer.Option(help="URL of a Ray cluster's dashboard: it trains, and this machine serves.")
    ] = None,
    jobs_per_key: Annotated[
        int | None, typer.Option(min=1, help="Most jobs of one key that train at once. [default: as many as fit]")
    ] = None,
    jobs_time_limit: Annotated[
        str, typer.Option(help="How long a job may train, all its starts together: 90m, 12h, 7d.")
    ] = "24h",
    gpu_price: Annotated[
        float | None, typer.Option(min=0, help="Of a GPU-hour, in any currency: jobs' costs are told by it.")
    ] = None,
    private_webhooks: Annotated[
        bool, typer.Option("--private-webhooks", help="Let webhooks reach this machine and private networks.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document when ready.")] = False,
) -> None:
    """Serve a base and its adapters on one OpenAI-compatible URL."""
    from loraport.serve.serve import Request
    from loraport.serve.serve import serve as run

    adapters, more = split_arguments(arguments or [])
    check_engine_flags(more)
    check_port(port)
    where = jobs_database, jobs_policy, jobs_window, gpu_price, private_webhooks, jobs_ray
    options = Options.of(*where, jobs_per_key, jobs_time_limit) if jobs and not merge else None
    wanted = wish(
        context,
        gpu_memory_utilization,
        max_num_seqs,
        dtype,
        concurrency,
        quantization,
        kv_cache_dtype,
        max_loras,
        max_lora_rank,
        tensor_parallel,
        replicas,
    )
    run(
        Request(
            *(adapters, model, host, port, wanted, engine_command, more, json, drain, merge, tuple(origin or ()), tune),
            options,
        ),
        Home.default(),
    )


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(adapters, flags for vLLM). The command line's `--` is gone by now: flags begin at the first dash."""
    first = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return arguments[:first], arguments[first:]
