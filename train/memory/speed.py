"""Tokens a second, hours, cost and the size of the adapter. Estimates, with their uncertainty; no torch here.

A step's arithmetic is 4 FLOP for each weight and token (forward, and backward to the activations: the base is frozen),
2 more for each weight that is computed again (fused layers leave out their last, train/loop/layer.py), 6 for each of
the adapter's, and attention's. It takes the time that a GPU of that data sheet needs at the share of it that training
was measured to reach.

    >>> estimate(shape, load, Layout(tokens=4096), machine, trained_share=1.0).tokens_per_second
    9100
"""

import json
from dataclasses import dataclass

from loraport.train.memory.load import Load
from loraport.train.memory.machine import Machine
from loraport.train.memory.parts import Layout
from loraport.train.memory.shapes import Shape

# Share of the data sheet's arithmetic that a step with many tokens reaches, and the tokens at which it reaches half of
# that: kernels are launched and weights dequantised once a micro-step, however many tokens. From ten runs of ours on
# one H200, shapes of 7B to 65B (docs/benchmarks/2026-11-22-h200-training); * int8 was not measured.
UTILISATION = {"nf4": 0.60, "int8": 0.50, "other": 0.57}
HALF_SPEED_TOKENS = {"nf4": 650, "int8": 800, "other": 200}
# Estimated over real: measured GPU and not. Other GPUs reach more or less of their data sheet.
MEASURED_ON = "H200"
UNCERTAINTY, UNCERTAINTY_ELSEWHERE = (0.85, 1.2), (0.5, 1.3)
DDP_EFFICIENCY, FSDP_EFFICIENCY = 0.92, 0.75  # of one GPU's speed, for each of several; not measured yet
OFFLOAD_EFFICIENCY = 0.85


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all GPUs together, between `low` and `high`."""

    tokens_per_second: int
    low: int
    high: int


def work_per_token(shape: Shape, load: Load, layout: Layout, length: int, trained_share: float) -> float:
    """FLOP for each token. `length`: tokens of a document, half of which a token sees on average.

    Attention (Dao, 2023, arXiv:2307.08691): 4·Q FLOP for each token seen forward, 10·Q backward.
    """
    again = layout.checkpointed / len(shape.blocks)
    seen, query = length / 2, shape.heads * shape.head_dim
    attention = len(shape.blocks) * query * seen * (14 + 4 * again)
    head = 4 * shape.hidden * shape.vocabulary * trained_share
    adapter = (6 + 2 * again) * shape.trainable_parameters(load.rank, load.targets)
    last = sum(each.parameters for each in shape.linears if each.name == "down_proj") if shape.is_fused else 0
    return 4 * shape.linear_parameters + 2 * again * (shape.linear_parameters - last) + adapter + attention + head


def reached(load: Load, tokens: int) -> float:
    """Share of the data sheet's arithmetic that micro-steps of so many tokens reach."""
    kind = load.types.held if load.types.held in UTILISATION else "other"
    return UTILISATION[kind] * tokens / (tokens + HALF_SPEED_TOKENS[kind])


def relative_time(shape: Shape, load: Load, layout: Layout, length: int) -> float:
    """Time for each token, in units that are the same for all layouts of one run: to choose among them."""
    time = work_per_token(shape, load, layout, length, 1.0) / reached(load, layout.tokens)
    return time / (OFFLOAD_EFFICIENCY if layout.offload else 1.0)


def estimate(
    shape: Shape, load: Load, layout: Layout, machine: Machine, length: int, trained_share: float = 1.0
) -> Speed | None:
    """Tokens a second on `machine`; None for a GPU without figures, and for a CPU."""
    if machine.gpu is None or machine.kind != "cuda":
        return None
    work = work_per_token(shape, load, layout, length, trained_share)
    each = {"ddp": DDP_EFFICIENCY, "fsdp": FSDP_EFFICIENCY, "none": 1.0}[layout.sharding]
    each *= OFFLOAD_EFFICIENCY if layout.offload else 1.0
    speed = machine.gpu.tflops * 1e12 * reached(load, layout.tokens) / work * each * layout.gpus
    low, high = UNCERTAINTY if machine.gpu.name == MEASURED_ON else UNCERTAINTY_ELSEWHERE
    return Speed(round(speed), round(speed * low), round(speed * high))


def adapter_bytes(shape: Shape, rank: int, targets: tuple[str, ...]) -> int:
    """Size of adapter_model.safetensors to the byte: float32 matrices behind a JSON header.

    The header lists tensors by name with type, shape and offsets, and is padded with blanks to a multiple of 8
    (https://github.com/huggingface/safetensors, "Format"). Names are PEFT's.
    """
    sizes = {}
    for linear in shape.targeted(targets):
        sizes[f"base_model.model.{linear.path}.lora_A.weight"] = [rank, linear.inputs]
        sizes[f"base_model.model.{linear.path}.lora_B.weight"] = [linear.outputs, rank]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (rows, columns) in sorted(sizes.items()):
        start, end = end, end + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + (length + 7) // 8 * 8 + end
