"""Models made to measure with: a base of a real shape without weights, and random adapters for any base. No torch.

Speed and memory do not depend on values. The base is a folder with a configuration and a tokenizer in which every word
is a token, for engines that make up weights themselves (vLLM's `--load-format dummy`). Adapters are PEFT folders in
16 bits: A random as PEFT begins, B small, so that they change replies and do not break them.

    >>> make_base("qwen3-8b", Path("base"))
    >>> make_adapters(Path("base"), Path("adapters"), count=8, rank=16)
    [PosixPath('adapters/a0'), ...]
"""

import json
import math
from pathlib import Path
from typing import Any

from loraport.bench.load.workload import WORDS
from loraport.bench.training.cases import ALL, SHAPES, parameters
from loraport.clients.errors import BaseModelError, UsageError, os_errors
from loraport.clients.home import require_disk, write_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SMALL = 0.01  # of B's entries, as a share of A's
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_base(shape: str, folder: Path, context: int = 32768, has_weights: bool = False) -> None:
    """Write config.json and a tokenizer of a shape of `loraport bench train`; the folder must be new or empty.

    `has_weights`: zeros too, as a file with holes that takes no room on disk, for commands that ask for weights.
    """
    require_new(folder)
    known = SHAPES[shape]
    config = {
        **known,
        "architectures": [ARCHITECTURES[known["model_type"]]],
        "max_position_embeddings": context,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        "dtype": "bfloat16",
        "attention_bias": False,
    }
    with os_errors("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 0})
    write_tokenizer(folder, int(known["vocab_size"]), context)
    if has_weights:
        write_zeros(folder / "model.safetensors", tensors(config))


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name, as transformers has them for the kinds of ARCHITECTURES but qwen2."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    found |= {f"{name}.weight": (outer, inner) for name, (inner, outer) in linears(config, ALL).items()}
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        found |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if config["model_type"] == "qwen3":
            found |= {f"{layer}.self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
    found["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocabulary, hidden)
    return found


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros in bfloat16: its header, and then nothing up to its full length."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with os_errors("writing", path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def write_tokenizer(folder: Path, size: int, context: int) -> None:
    """A tokenizer of `size` words: <eos>, <unk>, roles, common words, then w0, w1, …; blanks divide them."""
    words = dict.fromkeys(["<eos>", "<unk>", "user", "assistant", "system", *WORDS])
    words |= dict.fromkeys(f"w{number}" for number in range(size))
    vocabulary = {word: number for number, word in enumerate(list(words)[:size])}
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": "<eos>", **special}, {"id": 1, "content": "<unk>", **special}],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<eos>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def make_adapters(base: Path, folder: Path, count: int, rank: int, targets: tuple[str, ...] = ALL) -> list[Path]:
    """Write `count` random adapters for the model in `base` as `a0`, `a1`, …; the folder must be new or empty."""
    import numpy as np
    from safetensors.numpy import save_file

    sizes = linears(read_config(base), targets)
    require_new(folder)
    elements = sum(rank * (inner + outer) for inner, outer in sizes.values())
    with os_errors("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
    require_disk(folder, 2 * elements * count, f"{count} adapters")
    made = []
    for number in range(count):
        draw = np.random.default_rng(number)
        tensors = {}
        for name, (inner, outer) in sizes.items():
            scale = np.float32(inner**-0.5)
            for side, shape, size in (("A", (rank, inner), scale), ("B", (outer, rank), SMALL * scale)):
                values = draw.standard_normal(shape, dtype=np.float32) * size
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = values.astype(np.float16)
        path = folder / f"a{number}"
        with os_errors("writing", path):
            path.mkdir()
            save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        write_json(path / "adapter_config.json", adapter_config(base, rank, targets))
        made.append(path)
    return made


def adapter_config(base: Path, rank: int, targets: tuple[str, ...]) -> dict[str, Any]:
    """PEFT's."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.absolute()),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def read_config(base: Path) -> dict[str, Any]:
    """The configuration of a model's folder; BaseModelError where it is none that is known here."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "give the folder of a model, with its config.json"
        raise BaseModelError(f"{base} has no config.json that can be read: {error}.", hint) from error
    if config.get("model_type") not in ARCHITECTURES:
        hint = f"adapters can be made for {', '.join(ARCHITECTURES)}"
        raise BaseModelError(f"{base} is of the kind {config.get('model_type')!r}.", hint)
    return dict(config)


def linears(config: dict[str, Any], targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """(in, out) of each targeted linear by its name; UsageError for a target that the model does not have."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = head * config["num_attention_heads"]
    keys = head * (config.get("num_key_value_heads") or config["num_attention_heads"])
    known = {
        "q_proj": ("self_attn", hidden, queries),
        "k_proj": ("self_attn", hidden, keys),
        "v_proj": ("self_attn", hidden, keys),
        "o_proj": ("self_attn", queries, hidden),
        "gate_proj": ("mlp", hidden, inner),
        "up_proj": ("mlp", hidden, inner),
        "down_proj": ("mlp", inner, hidden),
    }
    unknown = set(targets) - set(known)
    if unknown:
        raise UsageError(f"there is no linear {', '.join(sorted(unknown))}.", f"there are {', '.join(known)}")
    return {
        f"model.layers.{layer}.{known[name][0]}.{name}": known[name][1:]
        for layer in range(config["num_hidden_layers"])
        for name in targets
    }


def require_new(folder: Path, flag: str = "--out") -> None:
    """Refuse a folder, given with `flag`, in which something lies."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty.", f"choose a new folder: {flag} DIR")


def billions(shape: str) -> float:
    """Parameters of a shape, in billions."""
    return parameters(SHAPES[shape]) / 1e9
