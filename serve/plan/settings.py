"""What to ask of the engine: context length, memory, concurrent requests and LoRA slots, each with its reason.

A pure function of what the model needs (from config.json and file sizes), what the adapters need (from their
manifests) and what is free. No engine is asked: vLLM answers the same questions only after it has loaded the weights.

    >>> plan(Wanted(), shape, adapters, read_device()).context
    40960
"""

from dataclasses import dataclass, field
from typing import Any

from loraport.clients.errors import ResourceError, UsageError
from loraport.clients.hardware import Device
from loraport.train.manifest import Manifest

GIB, MIB = 1 << 30, 1 << 20
# vLLM's page of the KV cache, in tokens: 16 on GPUs, 128 on CPUs (vllm/platforms/cpu.py). The larger is used for both.
BLOCK = 128
# Below it a coding assistant such as Aider has no room for the files that it works on.
ASSISTANT_CONTEXT = 16_384
SMALLEST_CONTEXT = 2_048
# A CPU reads some hundred tokens a second: a longer prompt would take minutes, and its cache is memory for nothing.
CPU_CONTEXT = 32_768
CPU_REQUESTS, GPU_REQUESTS = 16, 256
# A CPU has cache for so many requests of full length; shorter ones share it, what does not fit waits.
CPU_FULL_REQUESTS = 4
MOST_SLOTS = 8
GPU_SHARE, CPU_SHARE = 0.92, 0.6
# Beside weights, KV cache and LoRA slots. GPU: activations of a profiling run and CUDA graphs; an 8B model on one H200
# took 0.9 GiB (140 GiB x 0.92 - 15.3 weights - 0.7 slots - 111.75 cache). So the estimate is low by a little: 124.3 GiB
# of cache where vLLM 0.25.1 then had 125.0 (1.5B model on an H200), 127.2 where it had 128.24 (9M).
# CPU: both engine processes, 0.55 + 0.7 GiB.
GPU_WORKSPACE, CPU_WORKSPACE = 2 * GIB, 1_300 * MIB
# Where memory bounds the context: our estimate may be wrong by this much before vLLM refuses to start.
SAFETY = 0.9


@dataclass(frozen=True)
class Shape:
    """What decides a model's memory. Sizes are counts of elements; `weight_bytes` is what lies on disk."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int
    vocabulary: int
    latent: int  # width of a compressed KV entry (multi-head latent attention); 0: keys and values are stored
    longest: int | None  # the model's own limit in tokens
    dtype: str  # of the weights in config.json
    weight_bytes: int

    def kv_bytes_per_token(self, bytes_each: int) -> int:
        """2 (key and value) x layers x KV heads x head size x bytes; of latent attention, one latent vector a layer.

        An upper bound for models in which some layers keep less (sliding windows, linear attention).
        Source: vllm/v1/kv_cache_interface.py, `FullAttentionSpec.page_size_bytes`.
        """
        width = self.latent or 2 * self.kv_heads * self.head_dim
        return self.layers * width * bytes_each

    def lora_bytes_per_slot(self, rank: int, bytes_each: int) -> int:
        """rank x bytes x sum of (in + out) over the linears that vLLM wraps, whatever the adapter's own rank.

        Llama-3.1-8B in bfloat16 at rank 16: 88 MiB, embedding and head included.
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + q) + 2 * (self.hidden + kv)
        mlp = 3 * (self.hidden + self.intermediate) * max(1, self.experts)
        ends = 2 * (self.hidden + self.vocabulary)
        return rank * bytes_each * (self.layers * (attention + mlp) + ends)


@dataclass(frozen=True)
class Wanted:
    """What the user asked for; None: choose. `share`: --gpu-memory-utilization, of RAM on a CPU."""

    context: int | None = None
    share: float | None = None
    requests: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Choice:
    """A setting, its value in words, and why it has that value."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What the engine is told. `kv_bytes` is set on a CPU, `share` on a GPU."""

    context: int
    requests: int
    slots: int
    rank: int
    dtype: str
    kv_bytes: int | None
    share: float | None
    choices: tuple[Choice, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def read_shape(config: dict[str, Any], weight_bytes: int) -> Shape | None:
    """The shape in a config.json; None for an architecture that does not say it in the usual words."""
    nested = config.get("text_config")  # of a model that also sees or hears
    text = config | nested if isinstance(nested, dict) else config
    layers, hidden, heads = (find(text, *names) for names in (LAYERS, HIDDEN, HEADS))
    if not (layers and hidden and heads):
        return None
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=find(text, "num_key_value_heads") or heads,
        head_dim=find(text, "head_dim") or hidden // heads,
        intermediate=find(text, "intermediate_size", "n_inner") or 4 * hidden,
        experts=find(text, "num_experts", "num_local_experts", "n_routed_experts") or 1,
        vocabulary=find(text, "vocab_size") or 0,
        latent=sum(find(text, name) or 0 for name in LATENT) if find(text, *LATENT[:1]) else 0,
        longest=find(text, "max_position_embeddings", "n_positions", "max_seq_len"),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"),
        weight_bytes=weight_bytes,
    )


LAYERS, HIDDEN = ("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd")
HEADS, LATENT = ("num_attention_heads", "n_head"), ("kv_lora_rank", "qk_rope_head_dim")


def find(config: dict[str, Any], *names: str) -> int | None:
    """The first of these keys that holds a positive whole number."""
    return next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)


def plan(wanted: Wanted, shape: Shape, adapters: list[Manifest], device: Device, spare_slots: int = 0) -> Plan:
    """All settings for `shape` and `adapters` on `device`, or a refusal: UsageError, ResourceError.

    `spare_slots`: LoRA slots that must stay empty (versions.spare_slots).
    """
    dtype = choose_dtype(wanted, shape, adapters, device)
    rank, slots = choose_slots(adapters, spare_slots)
    each = BYTES[dtype.value]
    slot_bytes = slots_value(rank, slots, shape, each)
    budget, share = memory_budget(wanted, shape, device, slot_bytes, each)
    context = choose_context(wanted, shape, device, budget, each)
    requests = choose_requests(wanted, device)
    tokens = int(context.value)
    kv_bytes = kv_cache_bytes(tokens, int(requests.value), budget, shape, each) if device.kind == "cpu" else None
    memory = describe_memory(share, kv_bytes, tokens, budget, shape, each, device)
    return Plan(
        context=tokens,
        requests=int(requests.value),
        slots=slots,
        rank=rank,
        dtype=dtype.value,
        kv_bytes=kv_bytes,
        share=share if device.kind == "cuda" else None,
        choices=(context, memory, requests, dtype, *describe_adapters(rank, slots, slot_bytes, adapters, spare_slots)),
        warnings=context_warnings(tokens, shape),
    )


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    small = shape.weight_bytes <= device.free // 8
    if small and adapters and all(manifest.base_dtype == "float32" for manifest in adapters):
        return Choice("dtype", "float32", "as in training, so that replies are the same to the last rounding")
    if small and not device.has_bf16:
        return Choice("dtype", "float32", "this CPU has no bfloat16 instructions")
    return Choice("dtype", own, "the model's own")


def choose_slots(adapters: list[Manifest], spare: int) -> tuple[int, int]:
    """(rank, slots) as small as the adapters need: vLLM allocates and computes every slot in full.

    With spare slots there is one for each adapter, however many: adapters that take turns would fill the spare ones.
    """
    rank = max((manifest.max_lora_rank for manifest in adapters), default=0)
    if not adapters or not spare:
        return rank, min(len(adapters), MOST_SLOTS)
    return rank, len(adapters) + spare


def slots_value(rank: int, slots: int, shape: Shape, each: int) -> int:
    """Memory of all LoRA slots in bytes."""
    return slots * shape.lora_bytes_per_slot(rank, each) if slots else 0


def weights_in_memory(shape: Shape, each: int) -> int:
    """Weights as they are held: a float32 serve of 16-bit weights doubles them; quantised ones stay as they are."""
    stored = BYTES.get(shape.dtype, each)
    return shape.weight_bytes * each // stored


def memory_budget(wanted: Wanted, shape: Shape, device: Device, slot_bytes: int, each: int) -> tuple[int, float]:
    """(bytes left for the KV cache, share of the memory taken). ResourceError when the model alone does not fit."""
    usual = GPU_SHARE if device.kind == "cuda" else CPU_SHARE
    weights = weights_in_memory(shape, each)
    if device.kind == "cuda":
        workspace = GPU_WORKSPACE
        # vLLM takes the share of all memory, and refuses to start when less than that is free.
        share = wanted.share or min(usual, int(device.free / device.total * 100 - 1) / 100)
        taken = int(device.total * share)
    else:
        workspace = CPU_WORKSPACE
        share = wanted.share or usual
        taken = int(device.free * share)
    left = taken - weights - slot_bytes - workspace
    if left <= 0:
        raise ResourceError(
            f"the model does not fit: {gib(weights)} of weights, {gib(slot_bytes)} of LoRA slots and "
            f"{gib(workspace)} of workspace, and {gib(taken)} of memory to use ({share:.0%} of "
            f"{gib(device.total if device.kind == 'cuda' else device.free)}).",
            "end other programs that use this memory, raise --gpu-memory-utilization, or serve a smaller model",
        )
    return left, share


def choose_context(wanted: Wanted, shape: Shape, device: Device, budget: int, each: int) -> Choice:
    """The longest context that one request can fill, within what the model was made for."""
    fits = int(budget * SAFETY / shape.kv_bytes_per_token(each)) // BLOCK * BLOCK
    limit = shape.longest or max(wanted.context or 0, CPU_CONTEXT)
    if wanted.context:
        return check_wanted_context(wanted.context, limit, fits, shape, each, budget)
    if fits < min(limit, SMALLEST_CONTEXT):
        raise ResourceError(
            f"memory is left for {max(fits, 0):,} tokens of context, which is not enough for one request.",
            "end other programs that use this memory, raise --gpu-memory-utilization, or serve a smaller model",
        )
    if device.kind == "cpu" and min(fits, limit) > CPU_CONTEXT:
        reason = f"a CPU reads longer prompts for minutes; the model's own limit is {limit:,}: raise it with --context"
        return Choice("context", str(CPU_CONTEXT), reason)
    if limit <= fits:
        return Choice("context", str(limit), "the model's own limit, and it fits")
    return Choice("context", str(fits), f"the most that fits {gib(budget)} of KV cache; the model's limit is {limit:,}")


def check_wanted_context(context: int, limit: int, fits: int, shape: Shape, each: int, budget: int) -> Choice:
    """--context as given, unless the model or the memory cannot hold it."""
    if context > limit:
        raise UsageError(
            f"--context {context} is more than the {limit:,} tokens that the model was made for.",
            f"use --context {limit} or less",
        )
    if context > fits:
        needed = context * shape.kv_bytes_per_token(each)
        raise ResourceError(
            f"--context {context} needs {gib(needed)} of KV cache for one request, {gib(budget)} is left for it.",
            f"use --context {fits} or less, or raise --gpu-memory-utilization",
        )
    return Choice("context", str(context), "as given")


def choose_requests(wanted: Wanted, device: Device) -> Choice:
    """How many requests are worked on at once; more wait."""
    if wanted.requests:
        return Choice("requests at once", str(wanted.requests), "as given")
    if device.kind == "cpu":
        return Choice("requests at once", str(CPU_REQUESTS), f"{device.cores} cores gain nothing from more")
    return Choice("requests at once", str(GPU_REQUESTS), "vLLM's default; what does not fit the cache waits")


def kv_cache_bytes(context: int, requests: int, budget: int, shape: Shape, each: int) -> int:
    """KV cache on a CPU: some requests at full length where that fits, in whole MiB.

    Not all that is free, as on a GPU: the machine runs other programs, and the cache is written with zeros at start.
    One block more than the requests need, because vLLM keeps one for itself.
    """
    blocks = min(requests, CPU_FULL_REQUESTS) * -(-context // BLOCK) + 1
    wanted = blocks * BLOCK * shape.kv_bytes_per_token(each)
    return -(-min(wanted, budget) // MIB) * MIB


def describe_memory(
    share: float, kv_bytes: int | None, context: int, budget: int, shape: Shape, each: int, device: Device
) -> Choice:
    """The memory choice in words."""
    weights = gib(weights_in_memory(shape, each))
    full = (kv_bytes or budget) / (context * shape.kv_bytes_per_token(each))
    if kv_bytes is None:
        reason = f"of {gib(device.total)} on {device.name}, {gib(device.free)} free; {weights} of weights and about "
        return Choice("memory share", f"{share:.2f}", f"{reason}{gib(budget)} of KV cache, {full:.0f} full requests")
    reason = f"{full:.0f} requests of full length; {weights} of weights, {gib(device.free)} of memory free"
    return Choice("KV cache", gib(kv_bytes), reason)


def describe_adapters(rank: int, slots: int, slot_bytes: int, adapters: list[Manifest], spare: int) -> list[Choice]:
    """The LoRA choice in words, and what the adapters' chat template is told, if anything."""
    if not adapters:
        return [Choice("LoRA", "off", "no adapter was named")]
    ranks = ", ".join(f"{manifest.name} rank {manifest.rank}" for manifest in adapters)
    empty = "; the last stays empty, because vLLM on a CPU mixes it into the base's requests" if spare else ""
    plural = "s" if slots > 1 else ""
    lora = Choice("LoRA", f"{slots} slot{plural} of rank {rank}", f"{ranks}; {gib(slot_bytes)}{empty}")
    told = describe_template(adapters[0].chat_template_kwargs)
    return [lora, Choice("chat template", told, "as in training")] if told else [lora]


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
