"""Base models of real shapes with random weights, made on the device in the form that is wanted, without a disk.

Speed and memory do not depend on the values, so `loraport bench train` needs no download. Each layer is made and
quantised by itself: a 65B base in nf4 never holds more than one layer in 16 bits.

    >>> model = random_base({"model_type": "mistral", "hidden_size": 4096, ...}, "nf4", "cuda")
"""

from typing import Any

STD = 0.02  # of all weights, as most architectures start


def random_base(
    shape: dict[str, Any], load: str, device: str, attention: str = "sdpa", seed: int = 0, linears_on: str | None = None
) -> Any:
    """A causal language model of `shape` (a config.json) on `device`, its linears held as `load`: fp32, bf16 or nf4.

    nf4 is quantised twice and computes in bf16, as train/loop/lora.py loads it. `linears_on`: where those wait, once
    they are made on `device`, for train/loop/shards.py to fetch them.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    dtype = torch.float32 if load == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if load == "nf4" and isinstance(module, torch.nn.Linear) and module is not head:
            made = random_nf4(module, device)
            model.set_submodule(path, made.to(linears_on) if linears_on else made)
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device(device):
                model.set_submodule(path, type(module)(config))  # rotary embeddings: computed, not random
        else:
            fill(module, device)
    model.tie_weights()
    model.requires_grad_(False)
    if load == "nf4":
        model.is_loaded_in_4bit, model.hf_device_map = True, {"": model.device}
    return model


def random_nf4(linear: Any, device: str) -> Any:
    """A bitsandbytes linear of the same shape as `linear`, which is on the meta device."""
    import bitsandbytes
    import torch

    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device).normal_(0, STD)
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    ).to(device)  # this is what quantises
    if linear.bias is not None:
        made.bias = torch.nn.Parameter(torch.zeros(linear.out_features, dtype=torch.bfloat16, device=device))
    return made


def fill(module: Any, device: str) -> None:
    """Give the module's own parameters memory and values: matrices random, norms 1, biases 0."""
    import torch

    for name, parameter in list(module.named_parameters(recurse=False)):
        made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if parameter.dim() > 1:
            made.normal_(0, STD)
        else:
            made.fill_(0.0 if name == "bias" else 1.0)
        setattr(module, name, torch.nn.Parameter(made, requires_grad=False))


def random_rows(lengths: list[int], vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of random tokens with these lengths, all of them trained; the same for the same seed."""
    import numpy as np

    generator = np.random.default_rng(seed)
    tokens = [generator.integers(3, vocabulary, length).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]
