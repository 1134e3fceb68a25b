"""Which layers of a model are computed again in the backward pass.

>>> set_checkpointing(model, Settings(8192, checkpointed_layers=16))
"""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from loraport.train.loop.fused import is_fused
from loraport.train.loop.settings import Settings


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a PeftModel, first to last; those of an image encoder are not among them."""
    causal = model.get_base_model()
    decoder = causal.get_decoder() or causal
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_checkpointing(model: Any, settings: Settings) -> None:
    """Checkpoint the first layers. The last ones would gain nothing: their memory is the first to be freed.

    Fused layers see to it themselves (`again` and `to_host` of layer.py), others are left to transformers.
    """
    causal = model.get_base_model()
    causal.gradient_checkpointing_disable()
    to_host = settings.offload and model.device.type == "cuda"
    if settings.checkpointed_layers:
        # Random numbers matter to dropout alone, and to keep their state for each layer takes time.
        dropout = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
        how = {"use_reentrant": False, "preserve_rng_state": dropout, "determinism_check": "none"}
        causal.gradient_checkpointing_enable(how, offload=to_host)
        # It makes embeddings ask for gradients, which the first layer pays for and these checkpoints do not need.
        causal.disable_input_require_grads()
    for index, layer in enumerate(decoder_layers(model)):
        chosen, fused = index < settings.checkpointed_layers, is_fused(layer)
        layer.gradient_checkpointing = chosen and not fused
        layer.__dict__["again"], layer.__dict__["to_host"] = chosen and fused, chosen and fused and to_host
