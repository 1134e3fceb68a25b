"""What 4-bit and FP8 weights need, known before the engine starts."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraport.clients.errors import ResourceError
from loraport.clients.hardware import Device, read_gpu
from loraport.serve.engine import quantised
from loraport.serve.engine.quantised import needed_modules, require_packages
from loraport.serve.plan import gpus
from loraport.serve.plan.settings import Plan
from loraport.serve.plan.variants import why_impossible

NEW = (0, 32)


def plan(**more: Any) -> Plan:
    return Plan(context=1024, requests=1, slots=0, rank=0, dtype="bfloat16", kv_bytes=None, share=0.9, **more)


@pytest.mark.parametrize(
    ("made", "version", "expected"),
    [
        (plan(quantization="bnb"), (0, 27), ["bitsandbytes"]),
        (plan(quantization="bnb"), (0, 28), ["bitsandbytes", "vllm_bnb_plugin"]),
        (plan(quantization="bitsandbytes", is_stored=True), NEW, ["bitsandbytes", "vllm_bnb_plugin"]),
        (plan(quantization="fp8"), NEW, []),
        (plan(), NEW, []),
    ],
)
def test_what_is_needed(made: Plan, version: tuple[int, int], expected: list[str]) -> None:
    assert needed_modules(made, version) == expected


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda module: None if module == "vllm_bnb_plugin" else object())
    with pytest.raises(
        ResourceError, match="4-bit weights need vllm-bnb-plugin, which this environment has not"
    ) as said:
        require_packages(plan(quantization="bnb"), ("python",), NEW, is_ours=True)
    assert said.value.hint.startswith("pip install vllm-bnb-plugin")
    require_packages(plan(quantization="bnb"), ("python",), (0, 25), is_ours=True)
    require_packages(plan(quantization="fp8"), ("python",), NEW, is_ours=True)


def test_another_python_is_asked_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise SystemExit('it is looked for, not imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    require_packages(plan(quantization="bnb"), command, (0, 25), is_ours=False)
    with pytest.raises(ResourceError, match=r"vllm-bnb-plugin, which .*python"):
        require_packages(plan(quantization="bnb"), command, NEW, is_ours=False)


def test_of_what_is_no_python_nothing_is_known() -> None:
    require_packages(plan(quantization="bnb"), ("sh", "serve.sh"), NEW, is_ours=False)


def test_the_driver_knows_gpus_that_are_in_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda _: "handle",
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=8 << 30, free=8 << 30),
        nvmlDeviceGetName=lambda _: "NVIDIA Mystery 1060",
        nvmlDeviceGetCudaComputeCapability=lambda _: (6, 1),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device = read_gpu()
    assert device is not None and gpus.capability(device) == 6.1
    assert why_impossible(gpus.capability(device), "fp8", "auto") == "FP8 weights need Ampere or later"
    assert gpus.capability(Device("cuda", "NVIDIA L4", 1, 1, 1)) == 8.9
    assert gpus.capability(Device("cuda", "Unknown", 1, 1, 1)) is None
