"""`loraport plan serve`: what an engine will need and be told, from config.json alone."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loraport.clients.errors import ResourceError, UsageError
from loraport.clients.hardware import Device
from loraport.clients.home import Home
from loraport.clients.terminal import print_json
from loraport.serve.checks import open_adapters
from loraport.serve.engine.versions import cpu_memory_arguments, engine_version, spare_slots
from loraport.serve.plan.choose import plan, require_shape
from loraport.serve.plan.gpus import named_device
from loraport.serve.plan.hardware import count_replicas, read_device
from loraport.serve.plan.on_gpu import DoesNotFit
from loraport.serve.plan.report import Report, as_json, say_report
from loraport.serve.plan.settings import Wanted, for_one
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
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base, fetch_config, local_folder


def plan_serve(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADAPTER]...", help="Adapters to plan for: name, name@version or folder."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base: a folder or hub id; of it config.json is enough. [default: the adapter's]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of each GPU in GiB, as it is sold. Default: the GPU here.")
    ] = None,
    gpu_name: Annotated[
        str | None, typer.Option(help="GPU to plan for, such as H200, A100, 4090 or T4. Default: the one here.")
    ] = None,
    tensor_parallel: TensorParallel = 1,
    replicas: Replicas = "1",
    context: Context = None,
    gpu_memory_utilization: Share = None,
    max_num_seqs: Requests = None,
    dtype: Dtype = None,
    concurrency: Concurrency = None,
    quantization: Quantization = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
    max_loras: MaxLoras = None,
    max_lora_rank: MaxLoraRank = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON document.")] = False,
) -> None:
    """Say what serving will need: weights, context, memory, flags."""
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
    version = engine_version([], is_ours=True)
    opened = open_adapters(Home.default(), adapters or [], version)
    name, config, file_bytes = find_config(model, revision, opened)
    shape = require_shape(config, file_bytes, f"the config.json of {name}")
    device, count = find_device(gpu_memory, gpu_name, wanted)
    try:
        manifests = [adapter.manifest for adapter in opened]
        made = plan(for_one(wanted, count), shape, manifests, device, spare_slots(version, device.kind))
        more = cpu_memory_arguments(version, made.kv_bytes)[0] if made.kv_bytes else []
        tell(Report(name, shape, device, made, concurrency, tensor_parallel, count, tuple(more)), json)
    except ResourceError as error:
        refused = error if isinstance(error, DoesNotFit) else DoesNotFit(error.message, error.hint, (), ())
        tell(Report(name, shape, device, refused, concurrency, tensor_parallel, count), json)
        raise


def tell(report: Report, json: bool) -> None:
    """The report, in the form that was asked for."""
    if json:
        print_json(as_json(report))
    else:
        say_report(report)


def find_device(gpu_memory: float | None, gpu_name: str | None, wanted: Wanted) -> tuple[Device, int]:
    """(what each replica has, how many there are): the GPU that is asked about, or those here; else the CPU."""
    if not (gpu_memory or gpu_name):
        count = count_replicas(wanted)
        return read_device(wanted.tensor_parallel, count), count
    if wanted.replicas is None:
        raise UsageError("--replicas auto counts the GPUs here, and another one is asked about.", "give their number")
    return named_device(gpu_memory, gpu_name), wanted.replicas


def find_config(model: str | None, revision: str | None, adapters: list[Adapter]) -> tuple[str, dict[str, Any], int]:
    """(name, config.json, bytes of its weight files) of the base; 0 bytes where not all of the files are here."""
    if model is None:
        if not adapters:
            raise UsageError("there is nothing to plan for.", "name a base with --model, or an adapter")
        recorded = adapters[0].manifest.base
        model, revision = (recorded.path, None) if Path(recorded.path).is_dir() else (recorded.model, recorded.revision)
    config = fetch_config(model, revision)
    folder = local_folder(model)
    files = Base(model, folder).weight_files if folder else []
    here = bool(files) and all(path.is_file() for path in files)
    return model, config, sum(path.stat().st_size for path in files) if here else 0
