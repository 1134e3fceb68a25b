"""A plan in vLLM's words. `loraport serve` starts the engine with these flags, `loraport plan serve` prints them.

>>> vllm_args(made)
['--max-model-len', '40960', '--max-num-seqs', '256', '--dtype', 'bfloat16', '--quantization', 'fp8', ...]
"""

from loraport.serve.plan.settings import Plan

# Ways to hold weights that vLLM is told of; a ready quantised model says it in its config.json.
QUANTIZATION = {"fp8": "fp8", "bnb": "bitsandbytes"}


def vllm_args(plan: Plan) -> list[str]:
    """Flags for memory, context and LoRA; of a CPU without those of its KV cache, which differ between versions."""
    flags = ["--max-model-len", "auto" if plan.is_auto else str(plan.context)]
    flags += ["--max-num-seqs", str(plan.requests), "--dtype", plan.dtype]
    if plan.share is not None:
        flags += ["--gpu-memory-utilization", f"{plan.share:.2f}"]
    if plan.online_quantization:
        flags += ["--quantization", QUANTIZATION[plan.quantization]]
    if plan.kv_cache_dtype != "auto":
        flags += ["--kv-cache-dtype", plan.kv_cache_dtype]
    if plan.tensor_parallel > 1:
        flags += ["--tensor-parallel-size", str(plan.tensor_parallel)]
    if plan.slots:
        flags += ["--enable-lora", "--max-loras", str(plan.slots), "--max-lora-rank", str(plan.rank)]
    if plan.targets:
        flags += ["--lora-target-modules", *plan.targets]
    return flags
