"""What the weight file of an adapter holds, held against the base: names, ranks, shapes, and whether B is all zero.

PEFT's names are base_model.model.<module>.lora_A.weight (rank, in) and .lora_B.weight (out, rank), of embeddings
lora_embedding_A (rank, vocabulary) and lora_embedding_B (hidden, rank). vLLM reads exactly these
(vllm/lora/utils.py, `parse_fine_tuned_lora_name`), skips copies of the base's embeddings without a word
(`is_base_embedding_weights`), and takes shapes as they are, so that a wrong base would end in a crash or in nonsense.

    >>> [pair.module for pair in read_pairs(folder)][0], find_problems(folder, config, base)
    ('model.layers.0.self_attn.q_proj', [])
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import AdapterError, BaseModelError
from loraport.serve.adapters.tensors import BYTES_EACH, read_tensors
from loraport.train.adapters import WEIGHTS
from loraport.train.base_model import Base
from loraport.train.weights import read_safetensors_shapes

NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?P<end>\.weight)?"
)
COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
# Tensors of other kinds of adapter, as they end.
FOREIGN_ENDS = (
    (re.compile(r"lora_magnitude_vector(\.weight)?$"), "DoRA's magnitudes"),
    (re.compile(r"lora_[AB](\.default)?\.bias$"), "a LoRA bias"),
    (re.compile(r"lora_(diag|E)(\.|$)|ranknum"), "singular values of KaSA or AdaLoRA"),
    (re.compile(r"token_adapter\.|trainable_tokens"), "trained token embeddings"),
    (re.compile(r"lora_[AB]\.[^.]+\.weight$"), "names that only an adapter inside a model has"),
    (re.compile(r"(hada|lokr|ia3|oft|vera|boft)_"), "weights of another PEFT type"),
)
LAYER = re.compile(r"(?:^|\.)(layers|h|blocks)\.(\d+)\.")
SHOWN = 3


@dataclass(frozen=True)
class Pair:
    """A and B of one module. Shapes as in the file; None where that half is missing."""

    module: str
    is_embedding: bool
    a: tuple[int, ...] | None
    b: tuple[int, ...] | None

    @property
    def rank(self) -> int:
        """Rows of A; 0 where there is no A."""
        return self.a[0] if self.a else 0

    @property
    def suffix(self) -> str:
        """`q_proj` of model.layers.0.self_attn.q_proj."""
        return self.module.rpartition(".")[2]


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name; AdapterError where there is no whole safetensors file."""
    other = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file()), None)
    if other and not (folder / WEIGHTS).exists():
        raise AdapterError(
            f"{folder} has its weights in {other}, which can run code when it is read.",
            "save it again as safetensors: PEFT's save_pretrained does by default",
        )
    return read_safetensors_shapes(folder / WEIGHTS, AdapterError)


def sort_tensors(shapes: dict[str, tuple[int, ...]]) -> tuple[list[Pair], list[str]]:
    """(pairs of A and B, names that are neither), in the order of the file."""
    halves: dict[tuple[str, bool], dict[str, tuple[int, ...]]] = {}
    others = []
    for name, shape in shapes.items():
        found = NAME.fullmatch(name)
        if found and bool(found["embedding"]) != bool(found["end"]):
            halves.setdefault((found["module"], bool(found["embedding"])), {})[found["part"]] = shape
        else:
            others.append(name)
    pairs = [
        Pair(module, is_embedding, half.get("A"), half.get("B")) for (module, is_embedding), half in halves.items()
    ]
    return pairs, others


def read_pairs(folder: Path) -> list[Pair]:
    """The pairs of A and B in an adapter's file."""
    return sort_tensors(read_shapes(folder))[0]


def find_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    """What in the file is not plain LoRA as adapter_config.json describes it, in words; without a base."""
    pairs, others = sort_tensors(read_shapes(folder))
    odd = [name for name in others if not name.endswith(COPIES)]
    if odd:
        return [f"holds {describe_odd(odd)}, which vLLM does not apply"]
    if not pairs:
        return ["holds no LoRA weights"]
    halved = [pair.module for pair in pairs if not (pair.a and pair.b)]
    if halved:
        return [f"lacks A or B of {shown(halved)}"]
    empty = [pair.module for pair in pairs if 0 in (*(pair.a or ()), *(pair.b or ())) or len(pair.a or ()) != 2]
    if empty:
        return [f"holds no whole matrices for {shown(empty)}, as after saving a sharded model"]
    return list(find_rank_problems(pairs, config))


def find_rank_problems(pairs: list[Pair], config: dict[str, Any]) -> Iterator[str]:
    """Ranks that are not those of adapter_config.json: vLLM scales by the latter."""
    for pair in pairs:
        said = pattern_value(config.get("rank_pattern") or {}, pair.module, config.get("r"))
        assert pair.a and pair.b
        if not pair.rank == pair.b[1] == said:
            yield f"has rank {pair.rank} and {pair.b[1]} in A and B of {pair.module}, and its configuration says {said}"
            return


def pattern_value(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's name, as PEFT's `get_pattern_key` finds it."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            continue
    return default


def describe_odd(names: list[str]) -> str:
    """Unknown tensors in words, with some of their names."""
    for end, words in FOREIGN_ENDS:
        if end.search(names[0]):
            return f"{words} ({shown(names)})"
    if names[0].endswith(".weight"):
        return f"whole weights ({shown(names)})"
    return f"unknown weights ({shown(names)})"


def shown(names: list[str]) -> str:
    """The first few names."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_base_shapes(base: Base) -> dict[str, tuple[int, ...]]:
    """Shapes of all of a base's tensors, from the headers of its files: milliseconds, whatever its size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in base.weight_files:
        shapes |= read_safetensors_shapes(path, BaseModelError)
    return shapes


def find_misfits(pairs: list[Pair], base: Base) -> list[str]:
    """What of an adapter does not fit a base, in words: modules that it has not, layers, sizes.

    Modules are compared by the end of their name, from the layer on: what stands before it differs between versions of
    transformers. A quantised base packs its weights: then only names are compared.
    """
    modules = {tail(name.removesuffix(".weight")): shape for name, shape in read_base_shapes(base).items()}
    packed = {name.rpartition(".")[0] for name in modules}  # `…q_proj` of `…q_proj.qweight`
    is_packed = bool(base.config.get("quantization_config"))
    layers = {found[2] for name in modules if (found := LAYER.search(name))}
    for pair in pairs:
        name, found = tail(pair.module), LAYER.search(pair.module)
        shape = modules.get(name) or modules.get(tied_to(name))
        if shape is None and name not in packed and not is_fused_expert(name, modules):
            if found and found[2] not in layers:
                return [f"has weights for layer {found[2]}, and the base has {len(layers)} layers"]
            return [f"has weights for {pair.module}, which the base does not have"]
        if shape and not is_packed and not fits(pair, shape):
            assert pair.a and pair.b
            return [f"is made for {describe_size(pair)}, and the base's {pair.suffix} is {' x '.join(map(str, shape))}"]
    return []


def find_resized(folder: Path, base: Base) -> list[str]:
    """Copies of the base's embeddings that have another size: tokens were added, and vLLM skips such copies."""
    sizes = {tail(name.removesuffix(".weight")): shape for name, shape in read_base_shapes(base).items()}
    for name, shape in read_shapes(folder).items():
        own = sizes.get(tail(name.removesuffix(".base_layer.weight"))) if name.endswith(COPIES) else None
        if own and own != shape:
            return [f"was trained with a vocabulary of {shape[0]:,}, and the base's is {own[0]:,}"]
    return []


def tail(name: str) -> str:
    """A module's name from its layer on; the last part of one that is in no layer."""
    found = LAYER.search(name)
    return name[found.start(1) :] if found else name.rpartition(".")[2]


def tied_to(name: str) -> str:
    """The module whose weights a head shares, where the base stores them once."""
    return "embed_tokens" if name == "lm_head" else name


def is_fused_expert(name: str, modules: dict[str, tuple[int, ...]]) -> bool:
    """Whether a base stores all experts of a layer as one tensor, so that a single one's name is not in its files."""
    before = name.partition(".experts.")[0] + ".experts."
    return ".experts." in name and any(
        module.startswith(before) and len(shape) == 3 for module, shape in modules.items()
    )


def fits(pair: Pair, shape: tuple[int, ...]) -> bool:
    """Whether A and B belong to a weight of that shape (out, in), or (in, out) as in GPT-2's Conv1D."""
    assert pair.a and pair.b
    if pair.is_embedding:
        return (pair.a[1], pair.b[0]) == shape
    return (pair.b[0], pair.a[1]) in (shape, shape[::-1])


def describe_size(pair: Pair) -> str:
    """`q_proj of 4096 x 4096`."""
    assert pair.a and pair.b
    rows, columns = (pair.a[1], pair.b[0]) if pair.is_embedding else (pair.b[0], pair.a[1])
    return f"{pair.suffix} of {rows} x {columns}"


def is_untrained(weights: Path) -> bool:
    """Whether every B of an adapter is zero, as LoRA begins: then it changes nothing, wherever it is applied."""
    tensors = read_tensors(weights, AdapterError)[0].values()
    halves = [tensor for tensor in tensors if (found := NAME.fullmatch(tensor.name)) and found["part"] == "B"]
    return bool(halves) and all(half.dtype in BYTES_EACH and not half.read().any() for half in halves)
