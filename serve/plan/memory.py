"""How vLLM divides a GPU: weights, LoRA slots, activations of its profiling run, CUDA graphs; the rest is KV cache.

total x utilisation - weights - slots - peak of the profiling run - CUDA graphs and libraries = KV cache
(vllm/v1/worker/gpu_worker.py, `determine_available_memory`; the CUDA context is there before, and not in the sum).
The figures are chosen so that the cache is never promised larger than vLLM then finds it, and at most 5% smaller. Held
against measurements on an H200 in tests/test_plan_serve.py.

    >>> divide(shape, Setup(total=150_109_880_320, share=0.92, ...)).kv_cache // 2**30
    111
"""

from dataclasses import dataclass

from loraport.serve.plan.shape import MIB, Shape

BLOCK = 16  # tokens of a page of the KV cache on a GPU
# CUDA graphs as vLLM estimates them, cuBLAS and other libraries: a 9M model of 8 layers took 0.38 GiB in all on an
# H200, an 8B one of 36 layers about 0.3 GiB beside weights, slots and activations. Graphs grow with the layers.
FIXED, PER_LAYER = 460 * MIB, 4 * MIB
# NCCL's buffers and vLLM's own all-reduce, on each of several GPUs; not measured.
PER_SHARED_GPU = 640 * MIB
# Bytes that the sampler holds for a logit at once: 16-bit logits, and in float32 four times as many
# (vllm/v1/sample, warmed up with max_num_seqs rows in `_dummy_sampler_run`). Measured on an H200 with 256 rows: 18.3
# and 18.5 for 128,256 and 151,936 logits (docs/benchmarks/2026-11-22-h200-serving, llama-3.2-1b and qwen3-1.7b).
SAMPLER_BYTES = 19


@dataclass(frozen=True)
class Setup:
    """What the engine would be told, and `total`: bytes of each GPU as torch counts them. `each`: bytes of a number."""

    total: int
    share: float
    quantization: str
    kv_cache_dtype: str
    each: int
    rank: int
    slots: int
    requests: int
    batched_tokens: int
    tensor_parallel: int = 1
    targets: tuple[str, ...] = ()  # linears that have LoRA slots; without, all that can


@dataclass(frozen=True)
class Memory:
    """Bytes of each GPU by part; `kv_cache` is what remains, below zero where the rest alone is too much."""

    weights: int
    lora_slots: int
    activations: int
    graphs_and_libraries: int
    kv_cache: int
    left_free: int

    def as_bytes(self) -> dict[str, int]:
        """Part to bytes; together they are the GPU."""
        return dict(self.__dict__)


def divide(shape: Shape, setup: Setup) -> Memory:
    """The memory of each GPU by part."""
    weights = shape.weights(setup.quantization, setup.each) // setup.tensor_parallel
    slot = shape.lora_bytes_per_slot(setup.rank, setup.each, setup.tensor_parallel, setup.targets)
    slots = setup.slots * slot
    activations = peak_activations(shape, setup)
    fixed = FIXED + shape.layers * PER_LAYER + (PER_SHARED_GPU if setup.tensor_parallel > 1 else 0)
    taken = int(setup.total * setup.share)
    left = taken - weights - slots - activations - fixed
    return Memory(weights, slots, activations, fixed, left, setup.total - taken)


def peak_activations(shape: Shape, setup: Setup) -> int:
    """Peak of the profiling run: the MLP over a full batch of tokens, or the sampler over all requests.

    In the MLP live at once: residual and input (hidden each), gate and up, and their product (intermediate each); of a
    mixture of experts, for each expert that a token is sent to.
    """
    inner = shape.intermediate // setup.tensor_parallel * shape.active_experts
    each_token = (2 * shape.hidden + 3 * inner) * setup.each
    if setup.quantization == "fp8":
        each_token += shape.hidden + inner  # the 8-bit copy of what goes into a linear
    if setup.slots:
        each_token += 3 * setup.rank * 4  # x·A of gate, up and one more in float32
    forward = setup.batched_tokens * each_token
    if setup.quantization == "bnb":  # a linear is unpacked to 16 bits for a batch; gate and up are one
        forward += 2 * shape.hidden * shape.intermediate // setup.tensor_parallel * setup.each
    sampler = min(setup.requests, setup.batched_tokens) * shape.vocabulary * SAMPLER_BYTES
    return max(forward, sampler)


def kv_tokens(shape: Shape, setup: Setup, memory: Memory) -> int:
    """Tokens in the KV cache, in whole blocks."""
    kv_each = 1 if setup.kv_cache_dtype == "fp8" else setup.each
    block = BLOCK * shape.kv_bytes_per_token(kv_each, setup.tensor_parallel)
    return max(0, memory.kv_cache) // block * BLOCK


def requests_that_fit(tokens: int, context: int) -> int:
    """Requests of full length in a cache of `tokens`."""
    return tokens // (-(-context // BLOCK) * BLOCK)
