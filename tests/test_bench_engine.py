"""Load tests on the real vLLM: lengths are exact to the token, for text, chat and adapters."""

import json

import pytest

from loraport.bench.serving.cli import bench_throughput
from tests.conftest import Served

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("chat", [False, True])
def test_lengths_are_exact_and_no_prompt_was_seen_before(
    served: Served, chat: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"input_tokens": "64", "output_tokens": "12", "chat": chat, "calibrate": False, "json": True}
    bench_throughput(served.base_url, ["base", served.adapter], concurrency="2", requests=8, **options)  # type: ignore[arg-type]
    found = json.loads(capsys.readouterr().out)
    (stage,) = found["stages"]
    assert stage["figures"]["errors"] == {} and found["workload"]["notes"] == []
    for model in ("base", served.adapter):
        figures = stage["by_model"][model]
        assert (figures["answered"], figures["input_tokens"], figures["output_tokens"]) == (4, 4 * 64, 4 * 12)
        assert figures["tpot_ms"]["count"] == 4 and figures["gap_ms"]["count"] <= 4 * 11
    assert not stage["server"].get("prefix_cache_hits")
