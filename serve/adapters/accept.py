"""What vLLM can apply of an adapter, decided before the engine sees it; a reason in words where it cannot.

Read in the sources of vLLM 0.25.1 and 0.32.0 (vllm/lora: peft_helper.py, lora_model.py, utils.py) and PEFT 0.19. What
stands in adapter_config.json is judged here, what the weight file holds in weights.py. Fine as they are: rsLoRA,
`exclude_modules`, `layers_to_transform`, `layers_pattern`, regular expressions as targets (the names in the weight file
count, not the configuration), `fan_in_fan_out` (how the base stores its weight: A and B are the same), dropout.

    >>> check_servable(folder, (0, 32)), needed_rank(read_peft_config(folder))
    (None, 16)
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from loraport.clients.errors import AdapterError
from loraport.serve.adapters import weights
from loraport.serve.engine import versions
from loraport.train.adapters import CONFIG, WEIGHTS
from loraport.train.base_model import Base
from loraport.train.config import VLLM_RANKS

# Initialisations of A and B that leave the base's own weights alone. PiSSA, OLoRA, LoftQ and CorDA change them when
# PEFT loads the adapter, which vLLM does not do (vllm/lora/peft_helper.py, `_init_is_supported`; 0.25 does not check).
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Keys of adapter_config.json that change what the adapter computes and that no supported vLLM implements. vLLM reads
# only the keys that it knows: those of newer variants would be ignored without a word.
REFUSED_FEATURES = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA bias",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "modules_to_save": "whole modules beside LoRA (modules_to_save)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
}
REQUIRED = ("r", "lora_alpha", "target_modules")  # vLLM reads no configuration without them


def read_peft_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as an object; AdapterError otherwise."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (folder / "config.json").is_file():
            raise AdapterError(f"{folder} is a base, not an adapter.", f"loraport serve --model {folder}") from error
        raise AdapterError(f"{folder} has no {CONFIG}.", "the folder is incomplete: train again") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read: {error}.", "restore it, or train again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} is not a JSON object.", "restore it, or train again")
    return config


def check_servable(folder: Path, version: versions.Version) -> None:
    """AdapterError for everything in an adapter's folder that vLLM refuses, or ignores without a word."""
    config = read_peft_config(folder)
    found = find_features(config, version)
    if found:
        raise AdapterError(
            f"the adapter in {folder} uses {' and '.join(found)}, which vLLM does not serve.",
            "train it as plain LoRA, or merge it into its base with PEFT and serve that",
        )
    check_rank(config, folder)
    check_alpha(config, folder)
    problems = weights.find_problems(folder, config)
    if problems:
        raise AdapterError(
            f"the adapter in {folder} {problems[0]}.",
            "save it again with PEFT's save_pretrained, as plain LoRA; or merge it into its base and serve that",
        )


def find_features(config: dict[str, Any], version: versions.Version) -> list[str]:
    """What a configuration asks for beyond plain LoRA, in words."""
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        return [f"the PEFT type {kind}"]
    found = [words for key, words in REFUSED_FEATURES.items() if config.get(key)]
    if (config.get("bias") or "none") != "none":
        found.append(f"bias={config['bias']!r}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        found.append(f"the initialisation {init}, which changes the base's weights")
    if (config.get("rank_pattern") or config.get("alpha_pattern")) and not versions.honours_patterns(version):
        found.append(f"a rank or alpha of its own for some modules, which vLLM {version[0]}.{version[1]} ignores")
    return found


def ranks_of(config: dict[str, Any]) -> list[Any]:
    """The rank, and those of single modules."""
    return [config.get("r"), *(config.get("rank_pattern") or {}).values()]


def check_rank(config: dict[str, Any], folder: Path) -> None:
    """AdapterError unless every rank is one that vLLM can hold, and what else it cannot do without is there."""
    ranks = ranks_of(config)
    if not all(isinstance(rank, int) and 0 < rank <= VLLM_RANKS[-1] for rank in ranks):
        raise AdapterError(
            f"the adapter in {folder} has rank {max((r for r in ranks if isinstance(r, int)), default=None)}; "
            f"vLLM takes 1 to {VLLM_RANKS[-1]}.",
            "train it with a lower --rank",
        )
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise AdapterError(
            f"{folder / CONFIG} does not say {' and '.join(missing)}, which vLLM needs.",
            "save the adapter again with PEFT's save_pretrained",
        )


def check_alpha(config: dict[str, Any], folder: Path) -> None:
    """AdapterError where the scale alpha / rank is no number, or zero: then the adapter changes nothing."""
    alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(alpha, int | float) and not isinstance(alpha, bool) for alpha in alphas):
        raise AdapterError(f"{folder / CONFIG} has an alpha that is no number.", "restore it, or train again")
    if not any(alphas):
        raise AdapterError(
            f"the adapter in {folder} has alpha 0: it changes nothing.", "train it again, with an alpha of its rank"
        )


def check_changes(folder: Path, name: str) -> None:
    """AdapterError where every B is zero. It reads all of them; of our own adapters the golden replies tell as much."""
    if weights.is_untrained(folder / WEIGHTS):
        raise AdapterError(
            f"the adapter {name} changes nothing: every B of it is zero, as before training.",
            "was the right checkpoint saved?",
        )


def needed_rank(config: dict[str, Any]) -> int:
    """The smallest --max-lora-rank of vLLM that holds an adapter whose ranks are fine."""
    return next(allowed for allowed in VLLM_RANKS if allowed >= max(ranks_of(config)))


def check_fits(folder: Path, name: str, base: Base, targets: Collection[str] = ()) -> None:
    """AdapterError where the weights are not made for `base`, or for modules that the engine was told to leave out.

    `targets`: what the engine has slots for, if not for all; others it would drop in silence.
    """
    pairs = weights.read_pairs(folder)
    misfits = weights.find_misfits(pairs, base) or weights.find_resized(folder, base)
    if misfits:
        raise AdapterError(
            f"the adapter {name} was made for another base than {base.folder}: it {misfits[0]}.",
            "serve it on the base that it was trained on: its adapter_config.json names it",
        )
    dropped = sorted({pair.suffix for pair in pairs} - set(targets)) if targets else []
    if dropped:
        raise AdapterError(
            f"the adapter {name} has weights for {', '.join(dropped)}, and this engine has no slots for them.",
            f"start `loraport serve` again with {name} among its adapters, or with --max-loras: then all have slots",
        )
