"""`loraport plan serve` as a command; and a start that vLLM refuses for want of KV cache."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraport.clients.errors import UsageError
from loraport.clients.home import Home
from loraport.serve.engine.startup import served_context
from loraport.serve.engine.versions import cpu_memory_arguments, engine_version, named_context
from loraport.serve.plan.settings import Wanted
from loraport.serve.plan.wish import wish
from tests.adapters import make_tiny_adapter
from tests.fake_hub import FakeHub
from tests.serving import FAKE, Serving
from tests.shapes import QWEN3_32B

KEYS = {
    *("fits", "quantization", "kv_cache_dtype", "max_model_len", "kv_cache_tokens", "gpu_memory_utilization"),
    *("max_num_seqs", "memory", "vllm_args", "variants", "warnings", "alternatives", "verdict"),
}
REFUSED = (
    "ValueError: To serve at least one request with the model's max seq len ({asked}), (10.0 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (2.5 GiB). Based on the available memory, the estimated "
    "maximum model length is {named}. Try increasing `gpu_memory_utilization`"
)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A folder that holds config.json and nothing else."""
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen/config.json").write_text(json.dumps(QWEN3_32B))
    return tmp_path / "qwen"


def plan(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "loraport_cli", "plan", "serve", *map(str, arguments)]
    return subprocess.run(command, env=clean | more, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def document_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_document_of_write_up_a(qwen: Path) -> None:
    done = plan("--model", qwen, "--gpu-memory", "80", "--context", "40k", "--max-lora-rank", "16", "--json")
    assert done.returncode == 0, done.stderr
    document = document_of(done)
    assert document.keys() >= KEYS
    assert (document["fits"], document["quantization"], document["max_model_len"]) == (True, "fp8", 40_960)
    assert document["requests_of_full_length"] == 3 == document["kv_cache_tokens"] // 40_960
    assert set(document["memory"]) >= {"weights", "lora_slots", "activations", "kv_cache"}
    bf16, fp8 = document["variants"][:2]
    assert not bf16["holds_the_wish"] and bf16["max_model_len"] < 40_960
    assert fp8["is_chosen"] and fp8["requests"] == 3 and fp8["max_model_len"] == 40_960
    assert "--quantization" in document["vllm_args"]


def test_the_text_has_table_flags_and_verdict(qwen: Path) -> None:
    done = plan("--model", qwen, "--gpu-memory", "80", "--context", "40k", COLUMNS="200")
    assert done.returncode == 0 and done.stdout == ""
    [marked] = [line for line in done.stderr.splitlines() if line.startswith("> ")]
    assert marked.split()[1:3] == ["FP8", "16-bit"]
    assert "  --max-model-len 40960 --max-num-seqs 256" in done.stderr
    assert done.stderr.splitlines()[-1] == ("It fits: FP8 weights, 40,960 tokens, 3 requests of that length at once.")


def test_a_short_context_warns_of_coding_assistants(qwen: Path) -> None:
    done = plan("--model", qwen, "--gpu-name", "H200", "--context", "10k", "--json")
    [warning] = document_of(done)["warnings"]
    assert "coding assistants such as Aider will not work" in warning


def test_what_does_not_fit_exits_3_with_the_document(qwen: Path) -> None:
    done = plan("--model", qwen, "--gpu-name", "4090", "--context", "40k", "--json")
    assert done.returncode == 3
    document = document_of(done)
    assert not document["fits"] and document["vllm_args"] is None and len(document["variants"]) == 6
    assert "2 such GPUs: --tensor-parallel 2" in document["alternatives"]
    assert "error: --context 40960 does not fit" in done.stderr and "--tensor-parallel 2" in done.stderr


def test_what_does_not_fit_a_cpu_has_a_document_too(qwen: Path) -> None:
    done = plan("--model", qwen, "--gpu-memory-utilization", "0.01", "--json", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3 and document_of(done)["fits"] is False
    assert "error: the model does not fit" in done.stderr


def test_a_cpus_cache_is_among_the_flags(tiny_base: Path) -> None:
    """Of the vLLM that is installed here; before 0.32 it is not a flag but a variable."""
    done = plan("--model", tiny_base, "--json", CUDA_VISIBLE_DEVICES="")
    document = document_of(done)
    assert document["gpu"]["kind"] == "cpu" and document["memory"]["kv_cache"] > 0
    flags = cpu_memory_arguments(engine_version([], is_ours=True), document["memory"]["kv_cache"])[0]
    assert document["vllm_args"][-len(flags) :] == flags or not flags


def test_replicas_share_the_requests(qwen: Path) -> None:
    flags = ["--model", str(qwen), "--gpu-memory", "80", "--context", "40k", "--json"]
    one = document_of(plan(*flags, "--concurrency", "7"))
    two = document_of(plan(*flags, "--concurrency", "14", "--replicas", "2"))
    assert one["vllm_args"] == two["vllm_args"] and one["kv_cache_dtype"] == "fp8"
    assert (one["requests_of_full_length"], two["requests_of_full_length"]) == (7, 14)
    assert (one["replicas"], two["replicas"]) == (1, 2) and two["requests_of_full_length_each"] == 7
    assert one["memory"] == two["memory"] and "7 on each of 2 replicas" in two["verdict"]


def test_adapters_by_name_say_base_rank_and_slots(home: Home, tiny_base: Path) -> None:
    make_tiny_adapter(home.root, tiny_base, "demo")
    done = plan("demo", "--gpu-name", "H200", "--json", LORAPORT_HOME=str(home.root))
    assert done.returncode == 0, done.stderr
    document = document_of(done)
    assert document["max_loras"] == 1 and document["max_lora_rank"] >= 8
    assert document["model"] == str(tiny_base) and document["max_model_len"] == 1024


def test_of_a_hubs_model_the_configuration_alone_is_fetched(tmp_path: Path) -> None:
    with FakeHub() as hub:
        hub.add("org/big", {"config.json": json.dumps(QWEN3_32B).encode(), "model.safetensors": bytes(200_000)})
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        done = plan("--model", "org/big", "--gpu-name", "H200", "--json", **environment)
        assert done.returncode == 0, done.stderr
        assert document_of(done)["parameters"] == 32_762_123_264
        files = {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests if "/resolve/" in path or "/cdn/" in path}
        assert files == {"config.json"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "/none"], 3, "there is no model folder /none"),
        ([], 2, "nothing to plan for"),
        (["--gpu-name", "Radeon"], 2, "no figures are known for a GPU called 'Radeon'"),
        (["--gpu-memory", "80", "--context", "41k"], 2, "more than the 40,960 tokens"),
        (["--gpu-memory", "80", "--quantization", "gguf"], 2, "--quantization gguf is not known"),
        (["--gpu-memory", "80", "--dtype", "int8"], 2, "--dtype int8 is not known"),
        (["--gpu-memory", "80", "--replicas", "auto"], 2, "--replicas auto counts the GPUs here"),
        (["--replicas", "none"], 2, "--replicas none is not a number of engines"),
        (["--quantization", "fp8"], 2, "needs an NVIDIA GPU"),
        (["--gpu-name", "T4", "--quantization", "fp8"], 3, "FP8 weights need Ampere or later"),
    ],
)
def test_refusals(qwen: Path, arguments: list[str], code: int, message: str) -> None:
    model = [] if "--model" in arguments or not arguments else ["--model", str(qwen)]
    done = plan(*model, *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_kinds_that_do_not_exist() -> None:
    assert wish("16k", 0.9, 4, "bfloat16", kv_cache_dtype="fp8") == Wanted(
        16_384, 0.9, 4, "bfloat16", kv_cache_dtype="fp8"
    )
    for wrong in ({"quantization": "int8"}, {"kv_cache_dtype": "int8"}, {"dtype": "int8"}):
        with pytest.raises(UsageError, match="is not known"):
            wish(**{"context": None, "share": None, "requests": None, "dtype": None} | wrong)


def test_a_start_without_room_is_tried_once_more_with_what_vllm_names(home: Home, tiny_base: Path) -> None:
    """The fake engine refuses each time: the second refusal, which names no shorter context, ends it."""
    make_tiny_adapter(home.root, tiny_base, "demo")
    words = REFUSED.format(asked=1024, named=900)
    running = Serving(home, "demo", "--engine-command", FAKE, crash="KV cache", last_words=words)
    assert running.end() == 3
    assert running.text.count("it is started again with 896, which it says will fit") == 1
    assert "error: the engine stopped during start-up" in running.text
    assert not list(home.run.iterdir())


def test_a_context_that_is_no_shorter_is_not_tried(home: Home, tiny_base: Path) -> None:
    words = REFUSED.format(asked=1024, named=1100)
    running = Serving(home, "--model", str(tiny_base), "--engine-command", FAKE, crash="KV cache", last_words=words)
    assert running.end() == 3 and "started again" not in running.text


def test_the_context_that_vllm_names() -> None:
    assert named_context(["x", REFUSED.format(asked=40960, named=10928)]) == 10_928
    assert named_context(["No available memory for the cache blocks"]) is None


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"data": [{"id": "base", "max_model_len": 39_120}, {"id": "demo"}]}, 39_120),
        ({"data": [{"id": "base", "max_model_len": None}]}, None),
        ({}, None),
    ],
)
def test_the_context_that_vllm_has_found(answer: dict[str, Any], found: int | None) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    with httpx.Client(transport=transport, base_url="http://engine") as client:
        assert served_context(client) == found
