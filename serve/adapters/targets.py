"""Which weight of the base each pair of LoRA matrices belongs to, and by how much it counts.

PEFT names modules as the class in transformers does, files as the class that saved them did: prefixes differ
(`transformer.h.0…` and `h.0…`; `model.language_model.layers.0…` and `language_model.model.layers.0…`). So names are
matched by their ends, from the number of the layer on; what is not found, or found twice, is refused.

    >>> find_targets(adapter.folder, base)["model.layers.0.self_attn.q_proj.weight"].scale
    2.0
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from loraport.clients.errors import AdapterError, BaseModelError
from loraport.serve.adapters.accept import read_peft_config
from loraport.serve.adapters.tensors import BYTES_EACH, Floats, Tensor, read_tensors
from loraport.serve.adapters.weights import COPIES, pattern_value
from loraport.serve.plan.shape import TIED, read_stored
from loraport.train.adapters import WEIGHTS
from loraport.train.base_model import Base

PREFIX = "base_model.model."
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<matrix>[AB])(?:\.default)?(?:\.weight)?")
Parts = tuple[str, ...]


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight: `scale` x B A, turned where the weight lies as (in, out).

    `a`: (rank, in), `b`: (out, rank). Of an embedding the weight is (vocabulary, width), which is (in, out).
    """

    module: str
    a: Tensor
    b: Tensor
    scale: float
    is_turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is added to."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.is_turned else shape

    def factors(self) -> tuple[Floats, Floats]:
        """(left, right), whose product is added: (rows, rank) and (rank, columns) of the weight as it lies."""
        a, b = self.a.read(), self.b.read()
        left, right = (a.T, b.T) if self.is_turned else (b, a)
        return left * self.scale, right


def find_targets(folder: Path, base: Base) -> dict[str, Delta]:
    """Deltas of the adapter in `folder` by the name of the base's tensor that each is added to.

    AdapterError where one has no weight of its own there, or holds anything but LoRA matrices; BaseModelError where
    the base's weights are of a type that cannot be added to.
    """
    check_plain_base(base)
    weights = {
        name: tensor for file in base.weight_files for name, tensor in read_tensors(file, BaseModelError)[0].items()
    }
    index = index_by_tail(weights.values())
    found: dict[str, Delta] = {}
    for delta in read_deltas(folder):
        check_untied(delta, base, weights)
        tensor = find_weight(delta, index, base)
        if tensor.name in found:
            raise AdapterError(
                f"{delta.module} and {found[tensor.name].module} of the adapter are both {tensor.name} in the base.",
                "serve the adapter unmerged",
            )
        found[tensor.name] = delta
    return found


def read_deltas(folder: Path) -> list[Delta]:
    """All pairs of matrices of an adapter, scaled as PEFT scales them; AdapterError for a tensor that is in no pair.

    Source: peft/tuners/lora/layer.py, `update_layer`: alpha / r, or alpha / sqrt(r) with rsLoRA, r and alpha by the
    first pattern that a module's name ends in.
    """
    config = read_peft_config(folder)
    pairs: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder / WEIGHTS, AdapterError)[0].items():
        if name.endswith(COPIES):  # of the base's embeddings, as they are
            continue
        key = KEY.fullmatch(name.removeprefix(PREFIX))
        if not key or tensor.dtype not in BYTES_EACH or len(tensor.shape) != 2:
            raise AdapterError(
                f"{folder / WEIGHTS} holds {name}, which is no LoRA matrix of a linear layer.",
                "serve the adapter unmerged, or merge it with PEFT",
            )
        pairs.setdefault((key["module"], bool(key["embedding"])), {})[key["matrix"]] = tensor
    return [read_pair(module, is_embedding, pair, config) for (module, is_embedding), pair in pairs.items()]


def read_pair(module: str, is_embedding: bool, pair: dict[str, Tensor], config: dict[str, Any]) -> Delta:
    """One pair with its scale; AdapterError where a matrix is missing or the ranks differ."""
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or a.shape[0] != b.shape[1]:
        raise AdapterError(f"the LoRA matrices of {module} do not fit together.", "train or copy the adapter again")
    rank = a.shape[0]
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    return Delta(module, a, b, scale, is_embedding or bool(config.get("fan_in_fan_out")))


def check_plain_base(base: Base) -> None:
    """BaseModelError for weights that are quantised in their files: rounding a sum to so few bits would undo it."""
    stored = read_stored(base.config)
    if stored:
        raise BaseModelError(
            f"{base.model} is stored in {stored.method}, into which no adapter can be merged.",
            "merge into the 16-bit model that it was made from (--model), or serve the adapter unmerged",
        )


def check_untied(delta: Delta, base: Base, weights: dict[str, Tensor]) -> None:
    """AdapterError for an adapter of the embedding or the head where both are one weight: it would change both."""
    leaf = delta.module.rpartition(".")[2]
    is_head = leaf in ("lm_head", "embed_out")
    if not (is_head or leaf in ("embed_tokens", "wte", "embed_in", "word_embeddings")):
        return
    config = base.config
    nested = config.get("text_config")
    text = config | nested if isinstance(nested, dict) else config
    has_head = any(name.split(".")[-2:-1] in (["lm_head"], ["embed_out"]) for name in weights)
    if not has_head or text.get("tie_word_embeddings", text.get("model_type") in TIED):
        raise AdapterError(
            f"the adapter changes {leaf}, and embedding and head of {base.model} are one weight.",
            "serve it unmerged, or train it without that target",
        )


def tail(name: Parts) -> Parts:
    """The part of a name that does not depend on what is wrapped around the layers: from `layers.0` on, or the end."""
    numbers = [index for index, part in enumerate(name) if part.isdigit()]
    return name[max(0, numbers[0] - 1) :] if numbers else name[-2:]


def index_by_tail(weights: Iterable[Tensor]) -> dict[Parts, list[Tensor]]:
    """Tensors by the part of their name that PEFT and the files agree on."""
    index: dict[Parts, list[Tensor]] = {}
    for tensor in weights:
        index.setdefault(tail(tuple(tensor.name.split("."))), []).append(tensor)
    return index


def find_weight(delta: Delta, index: dict[Parts, list[Tensor]], base: Base) -> Tensor:
    """The one weight in the base's files that a module of the adapter stands for; AdapterError otherwise."""
    name = (*delta.module.split("."), "weight")
    candidates = index.get(tail(name), [])
    most = max((common_end(name, candidate) for candidate in candidates), default=0)
    closest = [candidate for candidate in candidates if common_end(name, candidate) == most]
    if len(closest) > 1:  # the layers of an encoder of pictures, say: what stands before them tells
        before = set(name[: len(name) - most])
        closest = [candidate for candidate in closest if before <= set(candidate.name.split("."))]
    if len(closest) != 1:
        raise AdapterError(
            f"the adapter changes {delta.module}, which is {len(closest) or 'no'} weight{'s' * (len(closest) != 1)} in "
            f"the files of {base.model}.",
            "serve it unmerged; if vLLM applies it so, the files only name their weights in another way",
        )
    (weight,) = closest
    if weight.shape != delta.shape:
        raise AdapterError(
            f"the adapter's matrices of {delta.module} make {'x'.join(map(str, delta.shape))}, the base's weight is "
            f"{'x'.join(map(str, weight.shape))}.",
            "it was trained on another base",
        )
    if weight.dtype not in BYTES_EACH:
        raise BaseModelError(
            f"{weight.name} of {base.model} is stored as {weight.dtype}, into which no adapter can be merged.",
            "merge into the 16-bit model that it was made from (--model), or serve the adapter unmerged",
        )
    return weight


def common_end(name: Parts, tensor: Tensor) -> int:
    """How many of the last parts two names share."""
    other = tensor.name.split(".")
    pairs = zip(reversed(name), reversed(other), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(name), len(other)))
