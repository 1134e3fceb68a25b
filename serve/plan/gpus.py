"""GPUs of the market, as far as serving on them can be planned: memory, compute capability, vLLM's defaults for them.

>>> named_device(None, "H100").total // 2**30
79
"""

from dataclasses import dataclass

from loraport.clients.errors import UsageError
from loraport.clients.hardware import Device
from loraport.serve.plan.shape import GIB


@dataclass(frozen=True)
class Gpu:
    """`memory` in GiB as torch.cuda.get_device_properties counts it; `capability`: 8.9 of Ada, 9.0 of Hopper."""

    name: str
    memory: float
    capability: float


# Memory as train/memory/machine.py has it; capabilities: https://developer.nvidia.com/cuda-gpus.
# The first whose name is part of what the driver says counts.
GPUS = (
    Gpu("B200", 178.4, 10.0),
    Gpu("H200", 139.8, 9.0),
    Gpu("H100 NVL", 93.1, 9.0),
    Gpu("H100", 79.2, 9.0),
    Gpu("A100 40GB", 39.4, 8.0),
    Gpu("A100-SXM4-40GB", 39.4, 8.0),
    Gpu("A100-PCIE-40GB", 39.4, 8.0),
    Gpu("A100", 79.2, 8.0),
    Gpu("L40S", 44.4, 8.9),
    Gpu("L4", 22.0, 8.9),
    Gpu("A10G", 22.0, 8.6),
    Gpu("A10", 22.0, 8.6),
    Gpu("RTX 6000 Ada", 47.4, 8.9),
    Gpu("RTX A6000", 47.4, 8.6),
    Gpu("5090", 31.3, 12.0),
    Gpu("4090", 23.5, 8.9),
    Gpu("4080", 15.6, 8.9),
    Gpu("3090", 23.5, 8.6),
    Gpu("V100", 15.7, 7.0),
    Gpu("T4", 14.6, 7.5),
)
# Of a GPU that is not in the list: what the driver keeps of the memory on the box. H200 0.4%, H100 0.6%, 4090 1.5%.
KEPT = 0.01
# vLLM refuses to start when less is free than the share it may take; its own CUDA context comes first.
CONTEXT = 640 << 20
LEAST_BF16 = 8.0


def find_gpu(name: str) -> Gpu | None:
    """The entry of GPUS for what a driver or a person calls a GPU."""
    plain = " ".join(name.lower().replace("nvidia", "").replace("geforce", "").split())
    parts = {plain, plain.replace("rtx ", ""), plain.replace("-", " "), plain.replace(" ", "-")}
    return next((gpu for gpu in GPUS if any(is_named(gpu.name.lower(), part) for part in parts)), None)


def is_named(known: str, text: str) -> bool:
    """Whether `known` stands in `text` and is not the beginning of a longer name: L4 is no L40S."""
    before, found, after = text.partition(known)
    return bool(found) and not before[-1:].isalnum() and not after[:1].isalnum()


def named_device(gpu_memory: float | None, gpu_name: str | None) -> Device:
    """A GPU that is not here, with nothing on it; UsageError for a name without figures and without --gpu-memory."""
    known = find_gpu(gpu_name) if gpu_name else None
    if gpu_name and known is None and gpu_memory is None:
        raise UsageError(
            f"no figures are known for a GPU called {gpu_name!r}.",
            f"give its memory, --gpu-memory GIB, or one of: {', '.join(gpu.name for gpu in GPUS)}",
        )
    memory = gpu_memory if gpu_memory is not None else known.memory if known else 0.0
    name = known.name if known else gpu_name or f"a GPU of {gpu_memory:g} GB"
    total = int(memory * GIB)
    return Device("cuda", name, total, total, 1, has_bf16=not known or known.capability >= LEAST_BF16)


def usable(device: Device) -> int:
    """Bytes of a GPU as torch and vLLM count them: less than NVML and the box say."""
    known = find_gpu(device.name)
    if known and 0.97 * device.total <= int(known.memory * GIB) <= device.total:
        return int(known.memory * GIB)
    return int(device.total * (1 - KEPT))


def capability(device: Device) -> float | None:
    """Compute capability as the driver says, else by the GPU's name; None where it is not known."""
    known = find_gpu(device.name)
    return device.capability or (known.capability if known else None)


def batched_tokens(device: Device) -> int:
    """vLLM's --max-num-batched-tokens for `vllm serve`: what the profiling run takes at once.

    Source: vllm/engine/arg_utils.py, `get_batch_defaults`, 0.25 to 0.32.
    """
    if device.total >= 160 * GIB:
        return 16_384
    return 8_192 if device.total >= 70 * GIB and "a100" not in device.name.lower() else 2_048
