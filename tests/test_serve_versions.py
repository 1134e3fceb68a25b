"""What differs between versions of vLLM: failures turned into advice, flags, and how a version is found out."""

import sys

import pytest

from loraport.serve.engine import versions
from loraport.serve.engine.startup import last_words


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "ValueError: To serve at least one request with the model's max seq len (40960), (10.00 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (2.75 GiB). Based on the available memory, the "
            "estimated maximum model length is 11264. Try increasing `gpu_memory_utilization`",
            "a context of 40960 tokens needs 10.00 GiB of KV cache, which does not fit.",
            "--context 11264",
        ),
        ("ValueError: No available memory for the cache blocks. Try increasing", "no memory is left", "utilization"),
        ("ValueError: Cannot auto-fit max_model_len: not enough GPU memory", "no memory is left", "utilization"),
        (
            "ValueError: Free memory on device cuda:0 (60.1/79.2 GiB) on startup is less than desired GPU memory",
            "only 60.1 of 79.2 GiB are free on the GPU.",
            "nvidia-smi",
        ),
        (
            "ValueError: Available memory on node 0 (3.10/6.34 GiB) on startup is less than desired CPU memory",
            "only 3.10 of 6.34 GiB of memory are free.",
            "--context",
        ),
        ("AssertionError: Error in memory profiling. Initial free memory 10", "another program freed", "start again"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "ran out of memory", "end other programs"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried", "ran out of memory", "end other"),
        ("Failed to load model - not enough GPU memory. Try lowering", "ran out of memory", "end other"),
        ("OSError: [Errno 98] Address already in use", "another program took the port", "--port"),
        ("api_server.py: error: unrecognized arguments: --nonsense 7", "does not know --nonsense 7.", "after `--`"),
        ("api_server.py: error: argument --dtype: invalid choice: 'x'", "refuses a flag: argument --dtype", "flags"),
        (
            "ValueError: Model architectures ['FooForCausalLM'] are not supported for now. Supported",
            "does not run FooForCausalLM models",
            "architecture",
        ),
        ("ModuleNotFoundError: No module named 'vllm'", "has no vllm.", "make setup"),
        ("/usr/bin/python: No module named vllm.entrypoints", "has no vllm.entrypoints.", "--engine-command"),
        ("/nowhere/python: No such file or directory", "there is no program /nowhere/python.", "--engine-command"),
        ("OSError: [Errno 28] No space left on device", "the disk is full", "LORAPORT_HOME"),
    ],
)
def test_known_failures_become_advice(line: str, message: str, hint: str) -> None:
    log = ["(EngineCore pid=9) ERROR 11-21 23:22:09 [core.py:1] EngineCore failed to start.", line, "INFO: bye"]
    found = versions.explain(log)
    assert found is not None and message in found.message and hint in found.hint


def test_unknown_failures_stay_unexplained() -> None:
    assert versions.explain(["RuntimeError: something new"]) is None


def test_last_words_are_the_exceptions_without_tracebacks() -> None:
    log = """\
(EngineCore pid=9) ERROR 11-21 23:22:09 [core.py:911] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-21 23:22:09 [core.py:911]   File "/x/core.py", line 902, in run_engine_core
(EngineCore pid=9) ERROR 11-21 23:22:09 [core.py:911]     raise ValueError(
(EngineCore pid=9) ERROR 11-21 23:22:09 [core.py:911] ValueError: the root of it
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.
UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects"""
    assert last_words(log.splitlines()) == ["ValueError: the root of it"]
    assert last_words(["plain words", ""]) == ["plain words"]


def test_flags_by_version() -> None:
    assert versions.cpu_memory_arguments((0, 32), 5) == (["--kv-cache-memory-bytes", "5"], {})
    assert versions.cpu_memory_arguments((0, 25), 5) == ([], {"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert versions.one_process_arguments((0, 25), 4) == ([], {})
    assert not versions.honours_patterns((0, 25)) and versions.honours_patterns((0, 32))


def test_the_engines_version_is_asked_without_importing_it() -> None:
    assert versions.parse("0.32.0+cpu") == (0, 32) and versions.parse("dev") is None
    ours = versions.engine_version([], is_ours=True)
    assert versions.engine_version([sys.executable, "-m", "vllm"], is_ours=False) == ours >= (0, 25)
    assert versions.engine_version(["/nowhere/python"], is_ours=False) == versions.ASSUMED
