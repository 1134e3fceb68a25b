"""What the user asked for and what the engine is told; and what GPUs and CPUs choose alike.

The plan itself: choose.py, with on_gpu.py and on_cpu.py. What a model takes: shape.py, memory.py.

    >>> Wanted(context=40_960, concurrency=8, max_loras=4)
"""

from dataclasses import dataclass, field, replace

from loraport.clients.errors import UsageError
from loraport.clients.hardware import Device
from loraport.serve.plan.shape import BYTES, GIB, LINEARS, MIB, Shape
from loraport.serve.plan.variants import Variant
from loraport.train.config import VLLM_RANKS
from loraport.train.manifest import Manifest

# Below it a coding assistant such as Aider has no room for the files that it works on.
ASSISTANT_CONTEXT = 16_384
CPU_REQUESTS, GPU_REQUESTS = 16, 256
MOST_SLOTS, USUAL_RANK = 8, 16
TUNED_SLOTS = 2  # where jobs are trained: a result beside a checkpoint of it, or beside another's
QUANTIZATIONS, KV_DTYPES = ("auto", "none", "fp8", "bnb"), ("auto", "fp8")


@dataclass(frozen=True)
class Wanted:
    """What the user asked for; None: choose. `share`: --gpu-memory-utilization, of RAM on a CPU.

    `concurrency`: requests of full length at once, on all replicas together; `requests`: --max-num-seqs of each.
    `replicas` None: as many as there are GPUs for. `tuned`: LoRA slots for what will be fine-tuned here, beside those
    of the adapters.
    """

    context: int | None = None
    share: float | None = None
    requests: int | None = None
    dtype: str | None = None
    concurrency: int | None = None
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    max_loras: int | None = None
    max_lora_rank: int | None = None
    tensor_parallel: int = 1
    replicas: int | None = 1
    tuned: int = 0


def for_one(wanted: Wanted, replicas: int) -> Wanted:
    """What one of several replicas must hold: its part of the requests, and all else as wished."""
    return replace(wanted, concurrency=-(-wanted.concurrency // replicas) if wanted.concurrency else None)


@dataclass(frozen=True)
class Choice:
    """A setting, its value in words, and why it has that value."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What the engine is told. `kv_bytes` is set on a CPU, `share` on a GPU; `variants` are those of a GPU.

    `targets`: the linears that LoRA slots are made for; without, all that vLLM can make some for.
    `is_auto`: vLLM is to find the longest context itself; `context` is then what it will find at least.
    """

    context: int
    requests: int
    slots: int
    rank: int
    dtype: str
    kv_bytes: int | None
    share: float | None
    choices: tuple[Choice, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    kv_tokens: int = 0
    is_auto: bool = False
    tensor_parallel: int = 1
    memory: dict[str, int] = field(default_factory=dict)
    chosen: Variant | None = None
    variants: tuple[Variant, ...] = ()
    targets: tuple[str, ...] = ()
    is_stored: bool = False  # the weights are quantised in their files already
    tuned: int = 0  # slots for what will be fine-tuned here, which an engine may be started without

    @property
    def online_quantization(self) -> bool:
        """Whether the engine quantises 16-bit weights when it loads them."""
        return self.quantization != "none" and not self.is_stored


def choose_dtype(wanted: Wanted, shape: Shape, adapters: list[Manifest], device: Device) -> Choice:
    """The type that weights are computed in.

    A GPU takes the model's own. A CPU takes float32 where the adapters were trained in it and the model is small: then
    replies are those of training to the last rounding (see verify.py for the figures); or where it has no bfloat16
    instructions and would emulate them.
    """
    if wanted.dtype:
        return Choice("dtype", wanted.dtype, "as given")
    own = shape.dtype if shape.dtype in BYTES else "bfloat16"
    if device.kind == "cuda":
        if own == "float32" or (own == "bfloat16" and not device.has_bf16):
            return Choice("dtype", "float16", "half the memory" if own == "float32" else "this GPU has no bfloat16")
        return Choice("dtype", own, "the model's own")
    small = shape.weights("none", BYTES[own]) <= device.free // 8
    if small and adapters and all(manifest.base_dtype == "float32" for manifest in adapters):
        return Choice("dtype", "float32", "as in training, so that replies are the same to the last rounding")
    if small and not device.has_bf16:
        return Choice("dtype", "float32", "this CPU has no bfloat16 instructions")
    return Choice("dtype", own, "the model's own")


def choose_slots(wanted: Wanted, adapters: list[Manifest], spare: int) -> tuple[int, int]:
    """(rank, slots) as small as the adapters need: vLLM allocates and computes every slot in full.

    The rank is rounded up to one that vLLM takes. With spare slots there is one for each adapter, however many:
    adapters that take turns would fill the spare ones. And one more, for a version that is loaded beside the one it
    replaces (adapters/loading.py).
    """
    own = max((manifest.max_lora_rank for manifest in adapters), default=0)
    if wanted.tuned:
        own = max(own, wanted.max_lora_rank or USUAL_RANK)
    given = max(wanted.max_lora_rank or 0, own)
    if given > VLLM_RANKS[-1]:
        raise UsageError(f"--max-lora-rank {given} is more than vLLM takes.", f"use {VLLM_RANKS[-1]} or less")
    if not (adapters or wanted.max_loras or wanted.max_lora_rank or wanted.tuned):
        return 0, 0
    rank = next(allowed for allowed in VLLM_RANKS if allowed >= (given or USUAL_RANK))
    count = len(adapters) + wanted.tuned
    slots = wanted.max_loras or min(max(count, 1), MOST_SLOTS)
    return rank, max(slots, count) + 1 + spare if spare else slots


def choose_targets(wanted: Wanted, shape: Shape, adapters: list[Manifest]) -> tuple[str, ...]:
    """The linears that adapters use, and those that vLLM computes with them: only these get slots.

    It computes LoRA for each linear that has some, embedding and head included, whatever adapters hold.

    All usual ones where slots were asked for, because others will be loaded into them. None where it cannot be said
    so: without adapters, of experts (whose linears vLLM knows by other names), of linears with unusual names.
    """
    used = {name.rpartition(".")[2] for manifest in adapters for name in manifest.target_modules}
    usual = set().union(*LINEARS.values())
    if not used or shape.experts > 1 or not used <= usual:
        return ()
    is_open = wanted.max_loras or wanted.max_lora_rank or wanted.tuned
    return tuple(sorted(name for group in LINEARS.values() if is_open or group & used for name in group))


def choose_requests(wanted: Wanted, device: Device) -> Choice:
    """How many requests are worked on at once; more wait."""
    if wanted.requests:
        return Choice("requests at once", str(wanted.requests), "as given")
    usual = CPU_REQUESTS if device.kind == "cpu" else GPU_REQUESTS
    if (wanted.concurrency or 0) > usual:
        return Choice("requests at once", str(wanted.concurrency), "as wished")
    if device.kind == "cpu":
        cores = "1 core gains" if device.cores == 1 else f"{device.cores} cores gain"
        return Choice("requests at once", str(CPU_REQUESTS), f"{cores} nothing from more")
    return Choice("requests at once", str(GPU_REQUESTS), "vLLM's default; what does not fit the cache waits")


def describe_adapters(
    rank: int, slots: int, targets: tuple[str, ...], slot_bytes: int, adapters: list[Manifest], spare: int, tuned: int
) -> list[Choice]:
    """The LoRA choice in words, and what the adapters' chat template is told, if anything."""
    if not slots:
        return [Choice("LoRA", "off", "no adapter was named")]
    kept = f"; {tuned} of them for fine-tuned models, which --no-jobs saves" if tuned else ""
    if not adapters:
        why = (
            f"for fine-tuned models; {gib(slot_bytes)}, which --no-jobs saves"
            if tuned
            else f"as given; {gib(slot_bytes)}"
        )
        return [Choice("LoRA", f"{slots} slot{'s' if slots > 1 else ''} of rank {rank}", why)]
    ranks = ", ".join(f"{manifest.name} rank {manifest.rank}" for manifest in adapters)
    where = f"; on {', '.join(targets)} alone" if 0 < len(targets) < sum(map(len, LINEARS.values())) else ""
    mixed = "; one is for replacing, the last stays empty, because vLLM on a CPU mixes it into the base's requests"
    empty = mixed if spare else ""
    plural = "s" if slots > 1 else ""
    lora = Choice("LoRA", f"{slots} slot{plural} of rank {rank}", f"{ranks}; {gib(slot_bytes)}{where}{kept}{empty}")
    told = [(manifest.name, describe_template(manifest.chat_template_kwargs)) for manifest in adapters]
    words = ", ".join(f"{switches} for {name}" for name, switches in told if switches)
    return [lora, Choice("chat template", words, "as in training")] if words else [lora]


def describe_template(kwargs: dict[str, bool]) -> str:
    """`thinking off` of {"enable_thinking": False}; other switches by their own names."""
    words = {"enable_thinking": "thinking"}
    return ", ".join(f"{words.get(name, name)} {'on' if value else 'off'}" for name, value in kwargs.items())


def context_warnings(context: int, shape: Shape) -> tuple[str, ...]:
    """What the context is too short for. A model whose own limit is short is just stated."""
    limit = shape.longest or context
    if context >= ASSISTANT_CONTEXT:
        return ()
    if limit < ASSISTANT_CONTEXT:
        return (f"note: the model's own limit is {limit:,} tokens; coding assistants need {ASSISTANT_CONTEXT:,}.",)
    return (
        f"warning: with {context:,} tokens coding assistants such as Aider will not work; they need "
        f"{ASSISTANT_CONTEXT:,}.",
    )


def gib(size: int) -> str:
    """A size in words: GiB, or MiB below a tenth of one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / MIB:.1f} MiB"
