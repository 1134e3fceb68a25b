"""The plan on a GPU, or on each of several that share a model: the variant to take, and why; or what would fit.

>>> plan_gpu(Wanted(context=40_960), shape, [], named_device(80, None)).quantization
'fp8'
"""

from loraport.clients.errors import ResourceError
from loraport.clients.hardware import Device
from loraport.serve.plan.gpus import CONTEXT, batched_tokens, capability, usable
from loraport.serve.plan.memory import Setup
from loraport.serve.plan.settings import (
    ASSISTANT_CONTEXT,
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
from loraport.serve.plan.shape import BYTES, Shape
from loraport.serve.plan.variants import (
    FP8_HARDWARE,
    Question,
    Variant,
    alternatives,
    choose,
    is_allowed,
    least_context,
)
from loraport.train.manifest import Manifest

# Where nothing was said: coarser weights are worth it for so long a context, but not for adapters, whose recorded
# replies are those of 16-bit weights, as long as a coding assistant can work.
USUAL_CONTEXT = 40_960
UNKNOWN_LIMIT = 32_768  # of a model that does not say how long a context it was made for
GPU_SHARE = 0.92  # vLLM's own


class DoesNotFit(ResourceError):
    """A refusal that knows what was tried: `loraport plan serve` shows it. `hint` says what would fit."""

    def __init__(self, message: str, hint: str, variants: tuple[Variant, ...], changes: tuple[str, ...]) -> None:
        super().__init__(message, hint)
        self.variants, self.changes = variants, changes


def plan_gpu(wanted: Wanted, shape: Shape, adapters: list[Manifest], device: Device) -> Plan:
    """All settings on one GPU, or on each of several that share the model; UsageError, DoesNotFit."""
    question, dtype, requests = ask(wanted, shape, adapters, device)
    chosen, every = choose(shape, question)
    if chosen is None or chosen.context < least_context(question):
        raise refusal(question, shape, every)
    return describe(question, chosen, every, (dtype, requests), wanted, shape, adapters, device)


def ask(wanted: Wanted, shape: Shape, adapters: list[Manifest], device: Device) -> tuple[Question, Choice, Choice]:
    """What has to fit, the dtype, and the requests at once."""
    dtype, requests = choose_dtype(wanted, shape, adapters, device), choose_requests(wanted, device)
    rank, slots = choose_slots(wanted, adapters, 0)
    limit = shape.longest or max(wanted.context or 0, UNKNOWN_LIMIT)
    setup = Setup(
        total=usable(device),
        share=choose_share(wanted, device),
        quantization="none",
        kv_cache_dtype="auto",
        each=BYTES[dtype.value],
        rank=rank,
        slots=slots,
        requests=int(requests.value),
        batched_tokens=batched_tokens(device),
        tensor_parallel=wanted.tensor_parallel,
        targets=choose_targets(wanted, shape, adapters),
    )
    question = Question(
        setup=setup,
        capability=capability(device),
        limit=limit,
        context=wanted.context,
        enough=min(limit, ASSISTANT_CONTEXT if adapters else USUAL_CONTEXT),
        requests=wanted.concurrency or 1,
        quantization=wanted.quantization,
        kv_cache_dtype=wanted.kv_cache_dtype,
    )
    return question, dtype, requests


def describe(
    question: Question,
    chosen: Variant,
    every: list[Variant],
    settled: tuple[Choice, Choice],
    wanted: Wanted,
    shape: Shape,
    adapters: list[Manifest],
    device: Device,
) -> Plan:
    """The variant that was chosen as a plan. `settled`: dtype and requests at once."""
    setup, limit = question.setup, question.limit
    dtype, requests = settled
    is_auto = not wanted.context and not wanted.concurrency and chosen.tokens < limit
    weights = Choice("weights", name_weights(chosen.quantization), why_weights(chosen, every, shape, wanted, question))
    context = Choice("context", str(chosen.context), why_context(wanted, chosen, limit))
    return Plan(
        context=chosen.context,
        requests=setup.requests,
        slots=setup.slots,
        rank=setup.rank,
        targets=setup.targets,
        dtype=dtype.value,
        kv_bytes=None,
        share=setup.share,
        choices=(
            *(weights, context, describe_gpu(setup, device, chosen), kv_choice(wanted, chosen), requests, dtype),
            *describe_adapters(
                *(setup.rank, setup.slots, setup.targets, chosen.memory.lora_slots), adapters, 0, wanted.tuned
            ),
        ),
        warnings=(*context_warnings(chosen.context, shape), *doubts(chosen, shape, device)),
        quantization=chosen.quantization,
        kv_cache_dtype=chosen.kv_cache_dtype,
        is_stored=shape.stored is not None,
        kv_tokens=chosen.tokens,
        is_auto=is_auto,
        tensor_parallel=wanted.tensor_parallel,
        memory=chosen.memory.as_bytes(),
        chosen=chosen,
        variants=tuple(every),
        tuned=wanted.tuned,
    )


def choose_share(wanted: Wanted, device: Device) -> float:
    """vLLM takes the share of all memory, and refuses to start when less than that is free."""
    free = (min(device.free, usable(device)) - CONTEXT) / usable(device) if device.free < device.total else 1.0
    return wanted.share or max(0.01, min(GPU_SHARE, int(free * 100) / 100))


def refusal(question: Question, shape: Shape, every: list[Variant]) -> DoesNotFit:
    """The error for a wish that no variant holds, with what would."""
    changes = tuple(alternatives(shape, question))
    hint = "; or ".join(changes) or "end other programs that use this memory, or serve a smaller model"
    possible = [each for each in every if is_allowed(question, each, bool(shape.stored)) and not each.why_not]
    if not possible:
        reasons = {each.why_not for each in every if each.why_not}
        return DoesNotFit(f"this GPU cannot serve it so: {' and '.join(sorted(reasons))}.", hint, tuple(every), changes)
    setup, best = question.setup, max(possible, key=lambda each: each.memory.kv_cache)
    memory = best.memory
    if not best.tokens:
        message = (
            f"the model does not fit: {gib(memory.weights)} of {name_weights(best.quantization)} weights, "
            f"{gib(memory.lora_slots)} of LoRA slots and {gib(memory.activations + memory.graphs_and_libraries)} of "
            f"workspace, and {gib(int(setup.total * setup.share))} of memory to use ({setup.share:.0%} of "
            f"{gib(setup.total)})."
        )
        return DoesNotFit(message, hint, tuple(every), changes)
    best = max(possible, key=lambda each: each.tokens)
    many = f" for {question.requests} requests at once" if question.requests > 1 else ""
    wish = f"--context {question.context}{many} does not fit" if question.context else f"no useful context{many} fits"
    cache = "an FP8" if best.kv_cache_dtype == "fp8" else "a 16-bit"
    weights = name_weights(best.quantization)
    message = f"{wish}: {weights} weights and {cache} KV cache leave room for {best.tokens:,} tokens."
    return DoesNotFit(message, hint, tuple(every), changes)


def name_weights(quantization: str) -> str:
    """Weights in the words of people."""
    return {"none": "16-bit", "fp8": "FP8", "bnb": "4-bit"}.get(quantization, quantization)


def why_weights(chosen: Variant, every: list[Variant], shape: Shape, wanted: Wanted, question: Question) -> str:
    """The reason for the weights, with what finer ones would hold."""
    if shape.stored:
        return "as the model is stored"
    if wanted.quantization != "auto":
        return "as given"
    finer = every[: every.index(chosen)]
    if not finer:
        return "they hold what is wished" if chosen.holds else "the most room there is"
    wish = question.context or question.enough
    many = f" x {question.requests} requests" if question.requests > 1 else ""
    has = finer[0].tokens
    return f"16-bit weights leave room for {has:,} tokens, of {wish:,}{many} wished"


def why_context(wanted: Wanted, chosen: Variant, limit: int) -> str:
    """The reason for the context."""
    room = "one such request fits" if chosen.full == 1 else f"{chosen.full} such requests fit at once"
    if wanted.context:
        return f"as given; {room}"
    if chosen.context == limit:
        return f"the model's own limit, and it fits; {room}"
    many = f" for each of {wanted.concurrency} requests" if wanted.concurrency else ""
    return f"the most that fits{many}; the model's limit is {limit:,}"


def describe_gpu(setup: Setup, device: Device, chosen: Variant) -> Choice:
    """The memory choice in words."""
    spread = f" on each of {setup.tensor_parallel} GPUs" if setup.tensor_parallel > 1 else ""
    free = f", {gib(device.free)} free" if device.free < device.total else ""
    reason = (
        f"of {gib(setup.total)} on {device.name}{free}; {gib(chosen.memory.weights)} of weights and "
        f"about {gib(chosen.memory.kv_cache)} of KV cache{spread}"
    )
    return Choice("memory share", f"{setup.share:.2f}", reason)


def kv_choice(wanted: Wanted, chosen: Variant) -> Choice:
    """The KV cache in words."""
    kind = "FP8" if chosen.kv_cache_dtype == "fp8" else "16-bit"
    reason = (
        ("what holds the wish" if chosen.holds else "the most room there is") if kind == "FP8" else "vLLM's default"
    )
    given = "as given" if wanted.kv_cache_dtype != "auto" else reason
    return Choice("KV cache", f"{kind}, about {chosen.tokens:,} tokens", given)


def doubts(chosen: Variant, shape: Shape, device: Device) -> list[str]:
    """What else is needed, and what the figures do not know."""
    known = capability(device)
    found = [f"note: {each}" for each in shape.doubts]
    if chosen.quantization == "bnb":
        found.append("note: vLLM 0.28 and later load 4-bit weights through a plugin: pip install vllm-bnb-plugin")
    if chosen.quantization == "fp8" and known is not None and known < FP8_HARDWARE:
        found.append(
            "note: this GPU has no FP8 arithmetic: Marlin kernels unpack the weights, which saves memory only."
        )
    if chosen.quantization == "fp8" and known is None:
        found.append("note: FP8 weights need Hopper or Ada, or Ampere with Marlin kernels; --gpu-name would tell.")
    if chosen.kv_cache_dtype == "fp8":
        found.append("note: the FP8 KV cache is not calibrated (scales of 1): compare replies before you rely on it.")
    return found
