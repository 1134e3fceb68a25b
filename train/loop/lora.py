"""The frozen base with LoRA layers on it: types, quantisation, targets.

>>> model = load_lora(resolve("examples/reader-9m"), config)       # a PeftModel
"""

from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from loraport.clients.errors import AdapterError, BaseModelError, ConfigError, ResourceError
from loraport.train.adapters import WEIGHTS
from loraport.train.base_model import Base
from loraport.train.config import ResolvedConfig, RunConfig
from loraport.train.data.tokens import first_line
from loraport.train.memory.machine import Types, choose_types
from loraport.train.presets import ALL_LINEAR


@dataclass(frozen=True)
class Device:
    """What torch computes on: `kind` is cuda or cpu, `has_bf16` whether it does bfloat16 in hardware."""

    kind: str
    has_bf16: bool

    @classmethod
    def here(cls) -> "Device":
        """The first GPU, or the CPU."""
        import torch

        if torch.cuda.is_available():
            return cls("cuda", torch.cuda.is_bf16_supported(including_emulation=False))
        return cls("cpu", False)


def load_lora(base: Base, config: ResolvedConfig, device: Any = None) -> Any:
    """The frozen base with fresh LoRA layers on its target modules, as a PeftModel.

    Raises BaseModelError for an architecture that transformers does not know, ConfigError for targets that the base
    does not have, ResourceError when the memory does not hold it.
    """
    from transformers import set_seed

    quiet_transformers()
    set_seed(config.seed)
    model = load_base(base, choose_types(config, Device.here()), config.double_quant, device)
    return with_lora(model, config, resolve_targets(base, config, model))


def with_lora(model: Any, config: ResolvedConfig, targets: list[str]) -> Any:
    """A loaded base, frozen, with fresh LoRA layers on the linears called `targets`, as a PeftModel.

    BaseModelError where PEFT refuses them.
    """
    from peft import LoraConfig, get_peft_model

    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
    )
    try:
        return get_peft_model(model, adapter)
    except ValueError as error:  # Mamba's linears, say
        raise BaseModelError(
            f"PEFT puts no adapter on {', '.join(targets)} of {config.model}: {first_line(error)}.",
            "choose others with --target-modules, or another base",
        ) from error


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of the adapter, or checkpoint, in `folder` into a PeftModel; memory of its device is not needed.

    AdapterError unless they are exactly its own.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    found = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    odd = sorted([*found.unexpected_keys, *(trained & set(found.missing_keys))])
    if odd:
        raise AdapterError(
            f"{len(odd)} weights of the trained adapter do not belong to this model, or are missing, first {odd[0]}.",
            "this is a bug of Loraport or of PEFT: nothing was stored, and the checkpoints are kept",
        )


def load_base(base: Base, types: Types, double_quant: bool, device: Any = None) -> Any:
    """The base's weights on `device`: this process's GPU if None, or memory where there is none; auto: spread over all
    GPUs and, where they do not hold it, memory.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    computed = getattr(torch, types.computed)
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    options: dict[str, Any] = {} if device is None else {"device_map": "auto" if device == "auto" else {"": device}}
    if types.held == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=computed,
        )
    elif types.held == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    try:
        return AutoModelForCausalLM.from_pretrained(
            base.folder, dtype=computed, attn_implementation="sdpa", trust_remote_code=False, **options
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"the weights of {base.model} ({base.weight_bytes / 2**30:.1f} GiB on disk) do not fit the memory.",
            "use --load nf4 on a GPU, end other programs that use the memory, or train a smaller model",
        ) from error
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise BaseModelError(
            f"{base.model} cannot be loaded as a causal language model: {first_line(error)}.",
            f"its config.json says model_type {base.config.get('model_type')!r}; is it supported by this transformers?",
        ) from error


def quiet_transformers() -> None:
    """Progress bars and advice of libraries would drown ours; their errors still arrive as exceptions."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # For each int8 linear, each time: "inputs will be cast to float16 during quantization".
    getLogger("bitsandbytes.autograd._functions").setLevel(ERROR)


def resolve_targets(base: Base, config: RunConfig, model: Any) -> list[str]:
    """Names of the linear layers that get an adapter; ConfigError when the base, its head aside, has none so called."""
    import torch

    head = model.get_output_embeddings()
    linears = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not linears:
        raise BaseModelError(f"{base.model} has no linear layers that an adapter may go onto.", "choose another base")
    if config.target_modules == (ALL_LINEAR,):
        return sorted(linears)
    missing = [name for name in config.target_modules if name not in linears]
    if missing:
        raise ConfigError(
            f"{base.model} has no linear layers called {', '.join(missing)} that an adapter may go onto.",
            f"choose --target-modules {ALL_LINEAR}, or among: {', '.join(sorted(linears))}",
        )
    return list(config.target_modules)


def count_trainable(model: Any) -> int:
    """Number of parameters that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
