"""The plan of an engine: weights, context, memory, concurrent requests and LoRA slots, each with its reason.

A pure function of what the model needs (shape.py), what the adapters need (from their manifests) and what is free.
`loraport serve` starts what it says, `loraport plan serve` prints it. No engine is asked: vLLM answers the same
questions only after it has loaded the weights.

    >>> plan(Wanted(), shape, adapters, read_device()).context
    40960
"""

from dataclasses import replace
from typing import Any

from loraport.clients.errors import BaseModelError, ResourceError, UsageError
from loraport.clients.hardware import Device
from loraport.serve.plan.on_cpu import plan_cpu
from loraport.serve.plan.on_gpu import plan_gpu
from loraport.serve.plan.settings import Plan, Wanted
from loraport.serve.plan.shape import Shape, read_shape
from loraport.train.manifest import Manifest

NO_SLOTS = "warning: there is no memory for LoRA slots of fine-tuned models, so that none can be served."


def require_shape(config: dict[str, Any], file_bytes: int, where: object) -> Shape:
    """The shape of a base; BaseModelError where the config.json in `where` does not say what a plan needs."""
    shape = read_shape(config, file_bytes)
    if shape is None:
        raise BaseModelError(
            f"{where} does not say how many layers and heads the model has.",
            "serve a decoder model; is this a model's folder?",
        )
    return shape


def plan(wanted: Wanted, shape: Shape, adapters: list[Manifest], device: Device, spare_slots: int = 0) -> Plan:
    """All settings for `shape` and `adapters` on `device`, or a refusal: UsageError, ResourceError.

    Slots for what will be fine-tuned are left out where they alone do not fit.

    `spare_slots`: LoRA slots that must stay empty (versions.spare_slots).
    """
    if wanted.context and shape.longest and wanted.context > shape.longest:
        raise UsageError(
            f"--context {wanted.context} is more than the {shape.longest:,} tokens that the model was made for.",
            f"use --context {shape.longest} or less",
        )
    if shape.stored and wanted.quantization in ("fp8", "bnb"):
        raise UsageError(
            f"--quantization {wanted.quantization}: the model is stored in {shape.stored.method} already.",
            "leave it away, or serve the model that it was made from",
        )
    if wanted.tuned:
        try:
            return choose(wanted, shape, adapters, device, spare_slots)
        except ResourceError:
            made = choose(replace(wanted, tuned=0), shape, adapters, device, spare_slots)
            return replace(made, warnings=(*made.warnings, NO_SLOTS))
    return choose(wanted, shape, adapters, device, spare_slots)


def choose(wanted: Wanted, shape: Shape, adapters: list[Manifest], device: Device, spare_slots: int) -> Plan:
    """The plan of that kind of device; ResourceError where it does not fit."""
    try:
        if device.kind == "cuda":
            return plan_gpu(wanted, shape, adapters, device)
        return plan_cpu(wanted, shape, adapters, device, spare_slots)
    except ResourceError as error:
        if device.kind == "cpu" and (wanted.replicas or 1) > 1:  # they share what there is; GPUs have their own
            words = f"{error.message.rstrip('.')}, for each of {wanted.replicas} replicas."
            raise ResourceError(words, f"use fewer --replicas; or {error.hint}") from error
        raise
