"""What a run stores: weights as PEFT's files, and the manifest that says what they are. Publishing is adapters.py's.

>>> save_weights(model, folder)
>>> publish(home, folder, describe(job, model, folder, metrics, golden))
"""

import math
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loraport.clients.errors import Refused, ResourceError, os_errors
from loraport.train.adapters import WEIGHTS
from loraport.train.job import Job
from loraport.train.manifest import Golden, Manifest
from loraport.train.weights import read_safetensors_shapes


def save_weights(model: Any, folder: Path) -> None:
    """Write PEFT's two files, and nothing of the base.

    Refused when a weight is not finite, or when the file holds more or less than the adapter.
    """
    from safetensors import SafetensorError

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not all(bool(parameter.isfinite().all()) for parameter in trained):
        raise Refused("the adapter's weights are not finite.", "lower --learning-rate; nothing was stored")
    with os_errors("writing", folder):
        try:
            model.save_pretrained(folder, save_embedding_layers=False)
        except SafetensorError as error:
            raise ResourceError(f"the adapter could not be written: {error}.", "is the disk full?") from error
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    shapes = read_safetensors_shapes(folder / WEIGHTS, Refused)
    held, wanted = sum(math.prod(shape) for shape in shapes.values()), sum(each.numel() for each in trained)
    if held != wanted:
        raise Refused(
            f"the adapter's file holds {held:,} parameters instead of {wanted:,}.",
            "this is a bug of Loraport or of PEFT: nothing was stored",
        )


def describe(job: Job, model: Any, folder: Path, metrics: dict[str, float], golden: list[Golden]) -> Manifest:
    """The manifest of the adapter in `folder`; its version is given when it is published."""
    from loraport.train.loop.lora import Device, count_trainable
    from loraport.train.memory.machine import choose_types

    config = job.config
    return Manifest(
        name=config.name,
        version="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=job.fingerprint,
        base=job.identity,
        base_dtype=choose_types(config, Device.here()).held,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=sorted(model.peft_config["default"].target_modules),
        trainable_parameters=count_trainable(model),
        adapter_bytes=(folder / WEIGHTS).stat().st_size,
        max_lora_rank=config.max_lora_rank,
        stop_tokens=sorted(job.data.encoder.stop_tokens),
        chat_template_kwargs=job.data.encoder.template_kwargs,
        data=job.data.counts(),
        run=config.model_dump(mode="json"),
        metrics=metrics,
        versions={name: installed(name) for name in ("loraport", "torch", "transformers", "peft")},
        golden=golden,
    )


def installed(package: str) -> str:
    """Version of an installed package; "source" where it runs from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"
