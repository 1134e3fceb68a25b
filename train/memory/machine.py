"""Where a run would happen: the GPU here, one that is named, or so many GiB; and what a configuration means there.

>>> find_machine(gpu_memory=None, gpu_name="4090", gpus=1).memory // 2**30
23
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from loraport.clients.errors import ConfigError, UsageError
from loraport.clients.hardware import read_cpu, read_gpus
from loraport.clients.terminal import say
from loraport.train.config import RunConfig

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU of the market. `tflops`: dense bf16 (fp16 where it has no bf16) with fp32 accumulation, by the data sheet.

    `memory` in GiB as torch.cuda.get_device_properties counts it, what the driver keeps taken off.
    """

    name: str
    tflops: float
    memory: float
    has_bf16: bool = True


# Data sheets and architecture papers of NVIDIA (nvidia.com: H200, H100, A100, L40S, L4, A10, T4, V100 data sheets; Ada,
# Ampere GA102 and RTX Blackwell architecture papers, "Peak BF16 Tensor TFLOPS with FP32 Accumulate", without sparsity).
# The first whose name is part of what the driver says counts.
GPUS = (
    Gpu("B200", 2250, 178.4),
    Gpu("H200", 989, 139.8),
    Gpu("H100 NVL", 835, 93.1),
    Gpu("H100 PCIe", 756, 79.2),
    Gpu("H100", 989, 79.2),
    Gpu("A100 40GB", 312, 39.4),
    Gpu("A100-SXM4-40GB", 312, 39.4),
    Gpu("A100-PCIE-40GB", 312, 39.4),
    Gpu("A100", 312, 79.2),
    Gpu("L40S", 362, 44.4),
    Gpu("L4", 121, 22.0),
    Gpu("A10G", 70, 22.0),
    Gpu("A10", 125, 22.0),
    Gpu("RTX 6000 Ada", 364, 47.4),
    Gpu("RTX A6000", 155, 47.4),
    Gpu("5090", 209, 31.3),
    Gpu("4090", 165, 23.5),
    Gpu("4080", 97, 15.6),
    Gpu("3090", 71, 23.5),
    Gpu("V100", 125, 15.7, has_bf16=False),
    Gpu("T4", 65, 14.6, has_bf16=False),
)


@dataclass(frozen=True)
class Machine:
    """What a run may use: `memory` in bytes of each of `gpus` GPUs, or of the machine where `kind` is cpu."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory: int
    has_bf16: bool = True
    gpus: int = 1
    gpu: Gpu | None = None  # None: of a kind whose speed is not known


@dataclass(frozen=True)
class Types:
    """`held`: how the base's linears are held, nf4, int8 or torch's word; `computed`: the type of the arithmetic."""

    held: str
    computed: str

    @property
    def width(self) -> int:
        """Bytes of a number in the arithmetic, and of the weights that are not quantised."""
        return WIDTHS[self.computed]

    @property
    def is_quantised(self) -> bool:
        """Whether linears are held in 4 or 8 bits."""
        return self.held in ("nf4", "int8")


SMALL_ADAPTER = 2**26  # parameters; their states in 32 bits take half a GiB
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


class Computer(Protocol):
    """What `choose_types` has to know of a device: a Machine here, or what torch has found (train/loop/lora.py)."""

    @property
    def kind(self) -> str: ...

    @property
    def has_bf16(self) -> bool: ...


def choose_types(config: RunConfig, device: Computer) -> Types:
    """What `load` and `compute_dtype` mean on `device`; ConfigError for nf4 or int8 without a GPU.

    A GPU without bfloat16 (before Ampere) gets float16, a CPU float32. A base that is not quantised is held in the type
    of the arithmetic.
    """
    half = "bfloat16" if device.has_bf16 else "float16"
    computed = DTYPES.get(config.compute_dtype)
    if config.load in ("nf4", "int8"):
        if device.kind != "cuda":
            raise ConfigError(
                f"load {config.load} needs an NVIDIA GPU, and there is none here.",
                "use --load auto; `loraport plan train --gpu-name 4090` tells what another machine would do",
            )
        return Types(config.load, computed or half)
    held = computed or DTYPES.get(config.load, half if device.kind == "cuda" else "float32")
    return Types(held, held)


def choose_optimizer(config: RunConfig, types: Types, parameters: int) -> Literal["adamw", "paged_adamw_8bit"]:
    """What `optimizer` means for an adapter of so many parameters.

    States in 8 bits save 6 bytes a parameter and take longer to update: they are for adapters that are large beside a
    quantised base. A matter of the configuration alone, because it shows in the result.
    """
    if config.optimizer != "auto":
        return config.optimizer
    return "paged_adamw_8bit" if types.is_quantised and parameters > SMALL_ADAPTER else "adamw"


def find_machine(gpu_memory: float | None, gpu_name: str | None, gpus: int | None = None) -> Machine:
    """The machine that is asked about: by GPU name, by GiB, or this one; of this one, what is free now.

    `gpus` None: one, or of this machine all.

    UsageError for a name that is not in GPUS and comes without --gpu-memory.
    """
    if gpu_name:
        known = find_gpu(gpu_name)
        if known is None and gpu_memory is None:
            raise UsageError(
                f"no figures are known for a GPU called {gpu_name!r}.",
                f"give its memory, --gpu-memory GIB, or one of: {', '.join(gpu.name for gpu in GPUS)}",
            )
        memory = gpu_memory if gpu_memory is not None or known is None else known.memory
        return Machine(
            "cuda",
            known.name if known else gpu_name,
            int((memory or 0) * GIB),
            not known or known.has_bf16,
            gpus or 1,
            known,
        )
    here = read_here(gpus)
    if gpu_memory is None:
        return here
    limit = int(gpu_memory * GIB)
    if here.kind == "cuda" and limit <= here.memory:
        return replace(here, memory=limit)
    return Machine("cuda", f"a GPU of {gpu_memory:g} GiB", limit, gpus=gpus or 1)


def machine_for_run(gpu_memory: float | None, gpus: int = 1) -> Machine:
    """This machine, for a run that starts now: what is free, and no more than `gpu_memory` GiB of it."""
    here = read_here(gpus)
    return here if gpu_memory is None else replace(here, memory=min(here.memory, int(gpu_memory * GIB)))


def read_here(gpus: int | None = 1) -> Machine:
    """This machine: the first `gpus` visible GPUs (None: all) where torch can use any, else the CPU.

    Of several GPUs the one with the least free memory counts, because each does the same.
    """
    found = read_gpus(gpus) if torch_has_cuda() else []
    if found:
        least = min(found, key=lambda gpu: gpu.free)
        has_bf16 = all(gpu.has_bf16 for gpu in found)
        return Machine("cuda", least.name, least.free, has_bf16, gpus or len(found), find_gpu(least.name))
    cpu = read_cpu(bound=False)
    return Machine("cpu", cpu.name, cpu.free, cpu.has_bf16)


def gpus_with_rows(wanted: int, batch_size: int) -> int:
    """GPUs that a run uses: no more than a step has rows, which is said."""
    if wanted > batch_size:
        say(
            f"note: {batch_size} of {wanted} GPUs are used, one for each row of a step; a larger --batch-size uses "
            f"more, with another result",
            "yellow",
        )
    return min(wanted, batch_size)


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for NVIDIA GPUs."""
    import torch

    return bool(torch.version.cuda)


def find_gpu(name: str) -> Gpu | None:
    """The entry of GPUS for what a driver or a person calls a GPU."""
    plain = " ".join(name.lower().replace("nvidia", "").replace("geforce", "").split())
    parts = [plain, plain.replace("rtx ", ""), plain.replace("-", " "), plain.replace(" ", "-")]
    return next((gpu for gpu in GPUS if any(is_named(gpu.name.lower(), part) for part in parts)), None)


def is_named(known: str, text: str) -> bool:
    """Whether `known` stands in `text` and is not the beginning of a longer name: L4 is no L40S."""
    before, found, after = text.partition(known)
    return bool(found) and not before[-1:].isalnum() and not after[:1].isalnum()
