"""What a base model is made of, from its config.json alone: linear layers, what else has weights, and their sizes.

transformers builds the model on torch's meta device, where tensors have a shape and no memory: 65B parameters take a
tenth of a second, and every architecture that transformers knows is counted as it will be loaded. What the memory
formula cannot speak for is told here: mixtures of experts, linear attention, bases that are stored quantised.
Nothing is said about memory: see parts.py.

    >>> shape = read_shape({"model_type": "mistral", ...})
    >>> shape.trainable_parameters(8, ("q_proj", "k_proj", "v_proj", "o_proj"))
    6815744
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loraport.clients.errors import BaseModelError, ConfigError
from loraport.train.presets import ALL_LINEAR

# Attention of the layers for which train/loop/fused.py has functions of its own; others run as transformers has them.
PLAIN_ATTENTION = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
# Keys of a config.json that change logits after the product with the head, so that the chunked loss is not used.
HEAD_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Linear:
    """A linear layer: its path in the model, and elements in and out. Its weight has shape (outputs, inputs)."""

    path: str
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        """The last part of the path: `q_proj`."""
        return self.path.rpartition(".")[2]

    @property
    def parameters(self) -> int:
        """Elements of the weight, the bias aside."""
        return self.inputs * self.outputs

    def adapter_parameters(self, rank: int) -> int:
        """Elements of A (rank, inputs) and B (outputs, rank); Hu et al., 2021, arXiv:2106.09685."""
        return rank * (self.inputs + self.outputs)


@dataclass(frozen=True)
class Block:
    """One decoder layer. `other`: elements of its parameters that are no weight of a linear layer."""

    linears: tuple[Linear, ...]
    other: int

    @property
    def parameters(self) -> int:
        """All elements."""
        return self.other + sum(linear.parameters for linear in self.linears)

    @cached_property
    def attention(self) -> tuple[Linear, ...]:
        """The linears of attention."""
        return tuple(each for each in self.linears if "attn" in each.path or "attention" in each.path)

    @cached_property
    def mlp(self) -> tuple[Linear, ...]:
        """The other linears."""
        return tuple(each for each in self.linears if each not in self.attention)


@dataclass(frozen=True)
class Shape:
    """A base model. Sizes are counts of elements, `longest` the model's own limit in tokens.

    `outside` are linears that lie in no decoder layer, the head aside (those of an image encoder, say); `other` counts
    the elements of all parameters that stay 16-bit when linears are quantised: embedding, head, norms, biases.
    `is_fused`: the layers are those that the loop has functions of its own for, and the formula was made for;
    `has_plain_head`: logits are the product with the head and nothing else, so that the loss goes in chunks.
    """

    model_type: str
    architectures: tuple[str, ...]
    blocks: tuple[Block, ...]
    outside: tuple[Linear, ...]
    other: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    head_name: str
    is_tied: bool
    has_qk_norm: bool
    is_fused: bool
    has_plain_head: bool
    longest: int | None

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear that an adapter may go onto and that quantisation takes."""
        return (*(linear for block in self.blocks for linear in block.linears), *self.outside)

    @cached_property
    def linear_parameters(self) -> int:
        """Elements of the weights of `linears`."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All elements, tied ones once."""
        return self.linear_parameters + self.other

    def targeted(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """The linears that get an adapter, as PEFT finds them: the path is a target or ends in `.target`.

        Source: peft/tuners/tuners_utils.py, `check_target_module_exists`.
        """
        return tuple(linear for linear in self.linears if is_target(linear, targets))

    def trainable_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of the adapter: the sum of rank * (inputs + outputs) over its linears."""
        return sum(linear.adapter_parameters(rank) for linear in self.targeted(targets))


def is_target(linear: Linear, targets: tuple[str, ...]) -> bool:
    """Whether `linear` gets an adapter."""
    return targets == (ALL_LINEAR,) or linear.path.endswith(tuple(f".{target}" for target in targets))


class Uncounted(BaseModelError):
    """A base that can perhaps be trained, but not planned for."""


def read_shape(config: dict[str, Any], model: str = "the model") -> Shape:
    """The shape of the model that a config.json describes; BaseModelError where it is not known, Uncounted where it
    cannot be planned for.

    Imports torch and transformers: some seconds, once a process.
    """
    check_plain(config, model)
    built = build_on_meta(config, model)
    check_dense(built, config, model)
    return describe(built, config, model)


def check_plain(config: dict[str, Any], model: str) -> None:
    """Refuse a base whose weights are stored quantised: it is loaded in another way than the formula says."""
    stored = config.get("quantization_config")
    if stored:
        method = stored.get("quant_method", "some format") if isinstance(stored, dict) else "some format"
        raise BaseModelError(
            f"{model} is stored quantised ({method}), and training starts from 16-bit weights.",
            "use the model that it was made from, with --load nf4 or int8 where memory is short",
        )


def build_on_meta(config: dict[str, Any], model: str) -> Any:
    """The model without memory; BaseModelError for an architecture that transformers does not know."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    logging.set_verbosity_error()
    kind = config.get("model_type")
    try:
        parsed = CONFIG_MAPPING[kind].from_dict(dict(config))
        with torch.device("meta"), no_init_weights():
            built = AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
        built.tie_weights()  # a part of the initialisation that was left out
        return built
    except KeyError as error:
        raise BaseModelError(
            f"{model} is of an architecture that the installed transformers does not know: {kind!r}.",
            "check model_type in its config.json; models that bring code of their own are not run",
        ) from error
    except (
        ValueError,
        TypeError,
        AttributeError,
        ZeroDivisionError,
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"{model} cannot be built as a causal language model from its config.json: {reason}.",
            f"model_type is {kind!r}; a chat model's config.json is needed",
        ) from error


def check_dense(built: Any, config: dict[str, Any], model: str) -> None:
    """Uncounted where the formula does not hold: experts in one tensor, layers without softmax attention."""
    text = built.config.get_text_config()
    if any(".experts." in name for name, _ in built.named_parameters()):
        raise Uncounted(
            f"the memory of {model} cannot be counted: it is a mixture of experts, which any --load leaves in 16 bits.",
            "`loraport train` takes it with the settings that need least; a dense model can be planned",
        )
    kinds = set(getattr(text, "layer_types", None) or ())
    odd = sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind)
    if odd or not getattr(text, "num_attention_heads", None):
        raise Uncounted(
            f"the memory of {model} cannot be counted: it has layers without softmax attention "
            f"({', '.join(odd) or config.get('model_type')}).",
            "`loraport train` takes it with the settings that need least; one with attention everywhere can be planned",
        )


def describe(built: Any, config: dict[str, Any], model: str) -> Shape:
    """Count the modules of a model on the meta device."""
    import torch

    text = built.config.get_text_config()
    head = built.get_output_embeddings()
    layers, prefix = find_layers(built, int(text.num_hidden_layers), model)
    linears = {
        path: Linear(path, module.in_features, module.out_features)
        for path, module in built.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    blocks = tuple(count_block(layer, linears, f"{prefix}.{number}.") for number, layer in enumerate(layers))
    if not any(block.linears for block in blocks):
        raise BaseModelError(
            f"{model} has no linear layers that an adapter could go onto ({config.get('model_type')}).",
            "LoRA needs torch.nn.Linear; choose another model",
        )
    heads = int(text.num_attention_heads)
    return Shape(
        model_type=str(config.get("model_type")),
        architectures=tuple(config.get("architectures") or (type(built).__name__,)),
        blocks=blocks,
        outside=tuple(each for path, each in linears.items() if not path.startswith(f"{prefix}.")),
        other=sum(each.numel() for each in built.parameters()) - sum(each.parameters for each in linears.values()),
        hidden=int(text.hidden_size),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocabulary=int(text.vocab_size),
        head_name=next((path.rpartition(".")[2] for path, each in built.named_modules() if each is head), "lm_head"),
        is_tied=head is not None and head.weight is built.get_input_embeddings().weight,
        has_qk_norm=any(path.endswith("q_norm") for path, _ in built.named_modules()),
        is_fused=is_plain(built, text),
        has_plain_head=all(getattr(text, key, None) in (None, 1, 1.0) for key in HEAD_SCALES),
        longest=getattr(text, "max_position_embeddings", None),
    )


def is_plain(built: Any, text: Any) -> bool:
    """Whether all attention is of the plain kind and the MLP's activation is SiLU."""
    kinds = {type(module).__name__ for module in built.modules() if type(module).__name__.endswith("Attention")}
    return bool(kinds) and kinds <= PLAIN_ATTENTION and getattr(text, "hidden_act", None) in ("silu", "swish")


def find_layers(built: Any, count: int, model: str) -> tuple[Iterable[Any], str]:
    """The list of decoder layers and its path: that of the language model, though an image encoder may have as many."""
    import torch

    own = set((built.get_decoder() or built).modules())
    found = [
        (module, path)
        for path, module in built.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and module in own
    ]
    if not found:
        raise BaseModelError(f"{model} has no list of {count} decoder layers.", "its architecture is an unusual one")
    return min(found, key=lambda pair: pair[1].count("."))


def count_block(layer: Any, linears: dict[str, Linear], prefix: str) -> Block:
    """One decoder layer; `prefix` is its path with a dot."""
    own = tuple(linear for path, linear in linears.items() if path.startswith(prefix))
    return Block(own, sum(each.numel() for each in layer.parameters()) - sum(each.parameters for each in own))


def check_targets(shape: Shape, targets: tuple[str, ...], model: str) -> None:
    """ConfigError unless every target is the name of linears that an adapter may go onto, and vLLM would serve it."""
    refused = sorted({shape.head_name, "lm_head", "embed_tokens"} & set(targets))
    if refused:
        tied = ", which shares its weight with the embedding here" if shape.is_tied else ""
        raise ConfigError(
            f"vLLM serves no adapter on {' or '.join(refused)}{tied}.",
            "leave it out of --target-modules: adapters go onto the linear layers of attention and MLP",
        )
    names = sorted({linear.name for linear in shape.linears})
    missing = [name for name in targets if name != ALL_LINEAR and not shape.targeted((name,))]
    if missing:
        raise ConfigError(
            f"{model} has no linear layers called {', '.join(missing)} that an adapter may go onto.",
            f"choose --target-modules {ALL_LINEAR}, or among: {', '.join(names)}",
        )
