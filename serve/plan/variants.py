"""Ways to hold a model on a GPU: weights in 16 bits, FP8 or 4 bits, KV cache in 16 or 8; what each has room for.

The first in the order of ORDER that holds the wish is taken: each further one is coarser. A pure function of shape and
question; settings.py makes the question of what the user said.

    >>> chosen, every = choose(shape, question)
    >>> chosen.quantization, chosen.kv_cache_dtype, chosen.tokens
    ('fp8', 'auto', 155904)
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loraport.serve.plan.gpus import GPUS, LEAST_BF16
from loraport.serve.plan.memory import BLOCK, Memory, Setup, divide, kv_tokens, requests_that_fit
from loraport.serve.plan.shape import GIB, Shape

# Weights before the KV cache: FP8 weights are scaled, an FP8 cache is not calibrated. 16-bit weights with an FP8 cache
# are taken only where other weights are not allowed.
ORDER = (("none", "auto"), ("fp8", "auto"), ("fp8", "fp8"), ("bnb", "auto"), ("bnb", "fp8"), ("none", "fp8"))
# Compute capability from which FP8 runs: weights by Marlin kernels (8.9: in hardware), KV cache, NF4.
FP8_WEIGHTS, FP8_HARDWARE, FP8_CACHE = 8.0, 8.9, 8.9
ROUND = 128  # contexts that are chosen are multiples of it
SMALLEST_CONTEXT = 2_048  # below it a context is of no use


@dataclass(frozen=True)
class Question:
    """What has to fit. `setup`: quantization and KV dtype in it do not matter, they are what is asked for.

    `context`: tokens of a request, None: as many as fit; `enough`: where that is a good answer. `requests` of that
    length at once. `quantization` and `kv_cache_dtype`: auto, or what is allowed. `limit`: the model's own.
    """

    setup: Setup
    capability: float | None
    limit: int
    context: int | None
    enough: int
    requests: int = 1
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True)
class Variant:
    """One way. `longest`: context that one request can have; `each`: that each of the wished requests can have;
    `full`: requests of `context` tokens at once; `why_not`: why the GPU or vLLM cannot do it at all."""

    quantization: str
    kv_cache_dtype: str
    memory: Memory
    tokens: int
    longest: int
    each: int
    context: int
    full: int
    holds: bool
    why_not: str = ""


def variants(shape: Shape, question: Question) -> list[Variant]:
    """All ways in which this model could be held, in the order of ORDER; of a ready quantised one, as it is."""
    pairs = [pair for pair in ORDER if not shape.stored or pair[0] == "none"]
    return [measure(shape, question, quantization, cache) for quantization, cache in pairs]


def measure(shape: Shape, question: Question, quantization: str, kv_cache_dtype: str) -> Variant:
    """The room that one way leaves."""
    setup = replace(question.setup, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    memory = divide(shape, setup)
    tokens = kv_tokens(shape, setup, memory)
    each = min(question.limit, tokens // question.requests // BLOCK * BLOCK)
    context = question.context or min(question.limit, each // ROUND * ROUND if each < question.limit else each)
    wish = question.context or question.enough
    why_not = why_impossible(question.capability, quantization, kv_cache_dtype)
    return Variant(
        quantization=shape.stored.method if shape.stored else quantization,
        kv_cache_dtype=kv_cache_dtype,
        memory=memory,
        tokens=tokens,
        longest=min(question.limit, tokens),
        each=each,
        context=context,
        full=requests_that_fit(tokens, context) if context else 0,
        holds=not why_not and requests_that_fit(tokens, wish) >= question.requests,
        why_not=why_not,
    )


def why_impossible(capability: float | None, quantization: str, kv_cache_dtype: str) -> str:
    """Why a GPU cannot do it; empty where it can, or is not known."""
    if capability is None:
        return ""
    if quantization == "fp8" and capability < FP8_WEIGHTS:
        return "FP8 weights need Ampere or later"
    if kv_cache_dtype == "fp8" and capability < FP8_CACHE:
        return "an FP8 KV cache needs Ada or later"
    return ""


def is_allowed(question: Question, variant: Variant, is_stored: bool) -> bool:
    """Whether the user left this way open. Of a ready quantised model the weights are not ours to choose."""
    weights = is_stored or question.quantization in ("auto", variant.quantization)
    if question.kv_cache_dtype != "auto":
        return weights and variant.kv_cache_dtype == question.kv_cache_dtype
    coarse = (variant.quantization, variant.kv_cache_dtype) == ("none", "fp8") and question.quantization == "auto"
    return weights and not coarse


def choose(shape: Shape, question: Question) -> tuple[Variant | None, list[Variant]]:
    """(the way to take, all of them). Where none holds what is `enough` and no context was asked for, the one with most
    room; None where none holds the wish."""
    every = variants(shape, question)
    allowed = [each for each in every if is_allowed(question, each, bool(shape.stored)) and not each.why_not]
    holding = next((each for each in allowed if each.holds), None)
    if holding or question.context:
        return holding, every
    best = max(allowed, key=lambda each: each.each, default=None)
    return best, every


def least_context(question: Question) -> int:
    """The context below which a plan is none."""
    return question.context or min(question.limit, SMALLEST_CONTEXT)


def alternatives(shape: Shape, question: Question) -> Iterator[str]:
    """Changes that would hold the wish, each alone, those first that cost least; in flags where there are any."""
    setup = question.setup
    is_bound = question.quantization != "auto" or question.kv_cache_dtype != "auto"
    if is_bound and is_served(shape, replace(question, quantization="auto", kv_cache_dtype="auto")):
        yield "--quantization auto --kv-cache-dtype auto"
    yield from smaller_wishes(shape, question)
    fewer = [
        (f"--max-loras {number}", replace(setup, slots=number)) for number in (4, 2, 1) if 0 < number < setup.slots
    ]
    lower = [
        (f"adapters of rank {rank} (--max-lora-rank {rank})", replace(setup, rank=rank))
        for rank in (64, 16, 8)
        if setup.slots and rank < setup.rank
    ]
    for changes in (fewer, lower):
        held = (words for words, changed in changes if is_served(shape, replace(question, setup=changed)))
        yield from [words] if (words := next(held, None)) else []
    for gpus in (2, 4, 8):
        if gpus > setup.tensor_parallel and is_served(
            shape, replace(question, setup=replace(setup, tensor_parallel=gpus))
        ):
            yield f"{gpus} such GPUs: --tensor-parallel {gpus}"
            break
    for gpu in sorted(GPUS, key=lambda gpu: gpu.memory):
        larger = replace(question, setup=replace(setup, total=int(gpu.memory * GIB)), capability=gpu.capability)
        if gpu.memory * GIB > setup.total and gpu.capability >= LEAST_BF16 and is_served(shape, larger):
            yield f"a larger GPU, such as {gpu.name}"
            break


def smaller_wishes(shape: Shape, question: Question) -> Iterator[str]:
    """A shorter context, or fewer requests, that the best way left open has room for."""
    open_ways = [each for each in variants(shape, question) if not each.why_not]
    allowed = [each for each in open_ways if is_allowed(question, each, bool(shape.stored))]
    best = max(allowed, key=lambda each: each.tokens, default=None)
    if best is None or best.tokens < ROUND:
        return
    if question.context and question.requests > 1 and (fit := requests_that_fit(best.tokens, question.context)):
        yield f"--concurrency {fit}"
    if question.context and (shorter := best.each // ROUND * ROUND) >= SMALLEST_CONTEXT:
        yield f"--context {shorter}"


def is_served(shape: Shape, question: Question) -> bool:
    """Whether some way that is left open makes a plan."""
    found, _ = choose(shape, question)
    return found is not None and found.context >= least_context(question)
