"""How far rounding may move log-probabilities between training and serving, by the types that both computed in.

Where the engine holds weights or KV cache in fewer bits than training did, replies agree within a looser bound, which
the report says; a bound that is too loose proves nothing, and `verify.tells_apart` finds that out for each adapter.

    >>> serving_type(plan), tolerance_for(manifest, "bfloat16+fp8")
    ('bfloat16+fp8', Tolerance(most=0.55, mean=0.12, reason='FP8 weights'))
"""

from dataclasses import dataclass
from math import hypot

from loraport.serve.plan.settings import Plan
from loraport.train.manifest import Manifest


@dataclass(frozen=True)
class Tolerance:
    """Nats by which rounding may move log-probabilities: at any token, and on average over a reply.

    The average is the sharper test: another adapter moves all tokens, rounding moves few of them much. `reason`: what
    the engine holds coarser than 16 bits, if anything.
    """

    most: float
    mean: float
    reason: str = ""


# By the coarser of the types that training and serving computed in. Measured with vLLM 0.32.0 on a CPU (AVX-512 with
# bfloat16) against PEFT in float32, rank 16 on six linears, replies of 4 to 32 tokens: largest difference at a token /
# largest mean of a reply, where that was measured.
#   served in float32:   0.2M random 0.00000 / 0.00000   5.8M 0.00001 / 0.00000   embedded 9.2M base 0.00002 / 0.00000
#   served in bfloat16:  0.2M random 0.006               5.8M 0.036               embedded 9.2M base 0.121   / 0.034
# And on an H200 with vLLM 0.25.1, served in bfloat16, largest difference at a token:
#   trained on bfloat16: the demo 0.037      trained on NF4: a random Qwen3 of 1.5B 0.447
# Other kernels round differently, hence the room above that.
TOLERANCES = {
    "float32": Tolerance(0.01, 0.002),
    "bfloat16": Tolerance(0.35, 0.08),
    "float16": Tolerance(0.35, 0.08),  # not measured; rounds less than bfloat16
    "nf4": Tolerance(
        1.0, 0.2, "4-bit weights"
    ),  # trained on a 4-bit base and served on the 16-bit one, or the other way round
    "int8": Tolerance(
        0.42, 0.085, "8-bit weights"
    ),  # not measured; LLM.int8 rounds weights and activations, no worse than FP8 does
}
# What FP8 adds to the type beside it, as errors add that do not know of each other: in squares. Not measured. From
# theory: e4m3 keeps three bits behind the leading one, so values are 2^-3/sqrt(12) of their power of two off, which is
# 2.7% of their own size on average (root mean square); weights and activations together 3.8%. NF4 is about 9% off (its
# signal-to-noise ratio on normally distributed weights is near 21 dB). Differences of log-probabilities grow with the
# error, so that FP8 gets 0.42 of NF4's. A KV cache in FP8 rounds keys and values alone, with scales of 1: no more.
ADDED = {"fp8": Tolerance(0.42, 0.085, "FP8 weights"), "fp8-kv": Tolerance(0.42, 0.085, "an FP8 KV cache")}


def serving_type(plan: Plan, merged_into: str | None = None) -> str:
    """What the engine computes in, joined by `+`: `bfloat16`, `nf4`, `bfloat16+fp8`, `bfloat16+fp8+fp8-kv`.

    `merged_into`: the type that merged weights were rounded to, which counts where the engine computes in float32. A
    ready quantised base was the same in training, but FP8 rounds activations too, in serving alone.
    """
    computed = merged_into if merged_into and plan.dtype == "float32" else plan.dtype
    parts = ["nf4" if plan.quantization == "bnb" else computed]
    if "fp8" in plan.quantization:
        parts.append("fp8")
    if plan.kv_cache_dtype.startswith("fp8"):
        parts.append("fp8-kv")
    return "+".join(parts)


def tolerance_of(types: str) -> Tolerance:
    """The bound for one side, of types joined by `+`; one that is not known counts as bfloat16."""
    parts = [(TOLERANCES | ADDED).get(name, TOLERANCES["bfloat16"]) for name in types.split("+")]
    if len(parts) == 1:
        return parts[0]
    most, average = hypot(*(part.most for part in parts)), hypot(*(part.mean for part in parts))
    return Tolerance(round(most, 2), round(average, 2), " and ".join(part.reason for part in parts if part.reason))


def tolerance_for(manifest: Manifest, served: str) -> Tolerance:
    """What rounding explains: the bound of the coarser of training and serving. `served`: see `serving_type`."""
    return max(map(tolerance_of, (manifest.base_dtype, served)), key=lambda tolerance: tolerance.most)
