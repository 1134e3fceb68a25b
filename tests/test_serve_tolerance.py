"""How far replies may move, by what engine and training hold their numbers in."""

from typing import Any

import pytest

from loraport.serve.plan.settings import Plan
from loraport.serve.proof.tolerance import TOLERANCES, Tolerance, serving_type, tolerance_for, tolerance_of
from tests.test_serve_plan import manifest


def plan(dtype: str = "bfloat16", **more: Any) -> Plan:
    return Plan(context=1024, requests=1, slots=0, rank=0, dtype=dtype, kv_bytes=None, share=0.9, **more)


@pytest.mark.parametrize(
    ("made", "merged_into", "expected"),
    [
        (plan(), None, "bfloat16"),
        (plan("float32"), None, "float32"),
        (plan("float32"), "bfloat16", "bfloat16"),
        (plan("float16"), "bfloat16", "float16"),
        (plan(quantization="fp8"), None, "bfloat16+fp8"),
        (plan(quantization="fp8", kv_cache_dtype="fp8"), None, "bfloat16+fp8+fp8-kv"),
        (plan(kv_cache_dtype="fp8"), None, "bfloat16+fp8-kv"),
        (plan(quantization="bnb"), None, "nf4"),
        (plan("float16", quantization="awq", is_stored=True), None, "float16"),
        (plan(quantization="fbgemm-fp8", is_stored=True), None, "bfloat16+fp8"),
    ],
)
def test_a_plan_says_what_is_computed_in(made: Plan, merged_into: str | None, expected: str) -> None:
    assert serving_type(made, merged_into) == expected


def test_fp8_is_looser_than_16_bits_and_says_so() -> None:
    assert tolerance_of("bfloat16+fp8") == Tolerance(0.55, 0.12, "FP8 weights")
    assert tolerance_of("bfloat16+fp8+fp8-kv") == Tolerance(0.69, 0.14, "FP8 weights and an FP8 KV cache")
    assert TOLERANCES["bfloat16"].most < tolerance_of("bfloat16+fp8").most < TOLERANCES["nf4"].most
    assert tolerance_of("bfloat16").reason == ""


def test_the_coarser_side_counts() -> None:
    assert tolerance_for(manifest(8), "bfloat16+fp8").reason == "FP8 weights"
    assert tolerance_for(manifest(8, dtype="nf4"), "bfloat16+fp8") == TOLERANCES["nf4"]
    assert tolerance_for(manifest(8, dtype="nf4"), "nf4") == TOLERANCES["nf4"]
    assert tolerance_for(manifest(8, dtype="int8"), "bfloat16").reason == "8-bit weights"
    assert tolerance_for(manifest(8, dtype="another"), "bfloat16") == TOLERANCES["bfloat16"]
