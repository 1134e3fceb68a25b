"""The plan on a CPU: a cache for some requests, within what other programs leave free.

>>> plan_cpu(Wanted(), shape, [], read_device()).kv_bytes
3145728
"""

from loraport.clients.errors import ResourceError, UsageError
from loraport.clients.hardware import Device
from loraport.serve.plan.settings import (
    Choice,
    Plan,
    Wanted,
    choose_dtype,
    choose_requests,
    choose_slots,
    choose_targets,
    context_warnings,
    describe_adapters,
    gib,
)
from loraport.serve.plan.shape import BYTES, MIB, Shape
from loraport.serve.plan.variants import SMALLEST_CONTEXT
from loraport.train.manifest import Manifest

# vLLM's page of the KV cache on a CPU, in tokens (vllm/platforms/cpu.py).
BLOCK = 128
# A CPU reads some hundred tokens a second: a longer prompt would take minutes, and its cache is memory for nothing.
LONGEST = 32_768
# A CPU has cache for so many requests of full length; shorter ones share it, what does not fit waits.
FULL_REQUESTS = 4
SHARE = 0.6
WORKSPACE = 1_300 * MIB  # both engine processes, 0.55 + 0.7 GiB
# Where memory bounds the context: our estimate may be wrong by this much before vLLM refuses to start.
SAFETY = 0.9


def plan_cpu(wanted: Wanted, shape: Shape, adapters: list[Manifest], device: Device, spare_slots: int = 0) -> Plan:
    """All settings on a CPU; UsageError, ResourceError. `spare_slots`: those that must stay empty."""
    check_flags(wanted)
    dtype, requests = choose_dtype(wanted, shape, adapters, device), choose_requests(wanted, device)
    rank, slots = choose_slots(wanted, adapters, spare_slots)
    each = BYTES[dtype.value]
    targets = choose_targets(wanted, shape, adapters)
    slot_bytes = slots * shape.lora_bytes_per_slot(rank, each, targets=targets)
    share = wanted.share or SHARE
    weights = shape.weights("none", each)
    budget = memory_budget(weights, slot_bytes, share, device)
    context = choose_context(wanted, shape, budget, each)
    tokens = int(context.value)
    kv_bytes = kv_cache_bytes(
        tokens, wanted.concurrency or min(int(requests.value), FULL_REQUESTS), budget, shape, each
    )
    kv_tokens = kv_bytes // (BLOCK * shape.kv_bytes_per_token(each)) * BLOCK
    cache = Choice(
        "KV cache",
        gib(kv_bytes),
        f"{kv_tokens / tokens:.0f} requests of full length; {gib(weights)} of weights, "
        f"{gib(device.free)} of memory free",
    )
    described = describe_adapters(rank, slots, targets, slot_bytes, adapters, spare_slots, wanted.tuned)
    return Plan(
        context=tokens,
        requests=int(requests.value),
        slots=slots,
        rank=rank,
        targets=targets,
        tuned=wanted.tuned,
        dtype=dtype.value,
        kv_bytes=kv_bytes,
        share=None,
        choices=(context, cache, requests, dtype, *described),
        warnings=(*context_warnings(tokens, shape), *(f"note: {each}" for each in shape.doubts)),
        quantization=shape.stored.method if shape.stored else "none",
        is_stored=shape.stored is not None,
        kv_tokens=kv_tokens,
        memory={"weights": weights, "lora_slots": slot_bytes, "workspace": WORKSPACE, "kv_cache": kv_bytes},
    )


def check_flags(wanted: Wanted) -> None:
    """UsageError for what only a GPU can do."""
    given = [
        words
        for words, is_given in (
            (f"--quantization {wanted.quantization}", wanted.quantization not in ("auto", "none")),
            (f"--kv-cache-dtype {wanted.kv_cache_dtype}", wanted.kv_cache_dtype != "auto"),
            (f"--tensor-parallel {wanted.tensor_parallel}", wanted.tensor_parallel > 1),
        )
        if is_given
    ]
    if given:
        raise UsageError(
            f"{given[0]} needs an NVIDIA GPU, and there is none here.",
            "leave it away; `loraport plan serve --gpu-name 4090` tells what another machine would do",
        )


def memory_budget(weights: int, slot_bytes: int, share: float, device: Device) -> int:
    """Bytes left for the KV cache. ResourceError when the model alone does not fit."""
    taken = int(device.free * share)
    left = taken - weights - slot_bytes - WORKSPACE
    if left <= 0:
        raise ResourceError(
            f"the model does not fit: {gib(weights)} of weights, {gib(slot_bytes)} of LoRA slots and "
            f"{gib(WORKSPACE)} of workspace, and {gib(taken)} of memory to use ({share:.0%} of {gib(device.free)}).",
            "end other programs that use this memory, raise --gpu-memory-utilization, or serve a smaller model",
        )
    return left


def choose_context(wanted: Wanted, shape: Shape, budget: int, each: int) -> Choice:
    """The longest context that one request can fill, within what the model was made for."""
    fits = int(budget * SAFETY / shape.kv_bytes_per_token(each)) // BLOCK * BLOCK
    limit = shape.longest or max(wanted.context or 0, LONGEST)
    if wanted.context:
        return check_context(wanted.context, fits, shape, budget, each)
    if fits < min(limit, SMALLEST_CONTEXT):
        raise ResourceError(
            f"memory is left for {max(fits, 0):,} tokens of context, which is not enough for one request.",
            "end other programs that use this memory, raise --gpu-memory-utilization, or serve a smaller model",
        )
    if min(fits, limit) > LONGEST:
        reason = f"a CPU reads longer prompts for minutes; the model's own limit is {limit:,}: raise it with --context"
        return Choice("context", str(LONGEST), reason)
    if limit <= fits:
        return Choice("context", str(limit), "the model's own limit, and it fits")
    return Choice("context", str(fits), f"the most that fits {gib(budget)} of KV cache; the model's limit is {limit:,}")


def check_context(context: int, fits: int, shape: Shape, budget: int, each: int) -> Choice:
    """--context as given, unless the memory cannot hold it."""
    if context > fits:
        needed = context * shape.kv_bytes_per_token(each)
        raise ResourceError(
            f"--context {context} needs {gib(needed)} of KV cache for one request, {gib(budget)} is left for it.",
            f"use --context {fits} or less, or raise --gpu-memory-utilization",
        )
    return Choice("context", str(context), "as given")


def kv_cache_bytes(context: int, requests: int, budget: int, shape: Shape, each: int) -> int:
    """KV cache for so many requests at full length where that fits, in whole MiB.

    Not all that is free, as on a GPU: the machine runs other programs, and the cache is written with zeros at start.
    One block more than the requests need, because vLLM keeps one for itself.
    """
    blocks = requests * -(-context // BLOCK) + 1
    wanted = blocks * BLOCK * shape.kv_bytes_per_token(each)
    return -(-min(wanted, budget) // MIB) * MIB
