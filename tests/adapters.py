"""A small real adapter for the tests: random A and B on a tiny base, with the replies that PEFT gives to it."""

import re
from math import prod
from pathlib import Path
from typing import Any

from loraport.clients.home import Home
from loraport.train.base_model import Base, identify
from loraport.train.manifest import DataCounts, Golden, Manifest

PROMPTS = ("Where is the key?", "Name a colour.", "Who wrote this module?")
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_tiny_adapter(home: Path, base_folder: Path, name: str, seed: int = 1, rank: int = 8, **lora: Any) -> Path:
    """Write adapters/<name>/v1 in `home` for the base in `base_folder`; return the folder. `lora`: more of LoraConfig.

    B is random, not zero as at the start of a training, so that the adapter's replies differ clearly from the base's.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from loraport.train.data.tokens import Encoder
    from loraport.train.proof.golden import golden_replies

    folder = Home(home).adapters / name / "v1"
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS}
    model = get_peft_model(base, LoraConfig(**settings | lora))
    for key, parameter in model.named_parameters():
        if "lora_B" in key or "lora_embedding_A" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    model.save_pretrained(folder)
    encoder = Encoder.load(base_folder)
    golden = golden_replies(model, encoder, [[{"role": "user", "content": text}] for text in PROMPTS])
    write_manifest(folder, base_folder, name, rank, golden, encoder.template_kwargs)
    return folder


def write_manifest(
    folder: Path, base_folder: Path, name: str, rank: int, golden: list[Golden], template_kwargs: dict[str, bool]
) -> None:
    """A manifest like that of a training."""
    from loraport.clients.errors import AdapterError
    from loraport.train.adapters import WEIGHTS
    from loraport.train.weights import read_safetensors_shapes

    weights = folder / WEIGHTS
    shapes = read_safetensors_shapes(weights, AdapterError)
    targets = {re.sub(r"\.lora_.*", "", name).rpartition(".")[2] for name in shapes}
    Manifest(
        name=name,
        version="v1",
        created="2026-01-01T00:00:00+00:00",
        fingerprint="0" * 64,
        base=identify(Base(str(base_folder), Path(base_folder).absolute())),
        base_dtype="float32",
        rank=rank,
        alpha=2 * rank,
        target_modules=sorted(targets),
        trainable_parameters=sum(map(prod, shapes.values())),
        adapter_bytes=weights.stat().st_size,
        max_lora_rank=max(8, rank),
        stop_tokens=[0, 2],
        chat_template_kwargs=template_kwargs,
        data=DataCounts(files=[], sha256="", rows=0, tokens=0, trained_tokens=0, eval_rows=0),
        run={},
        metrics={},
        versions={},
        golden=golden,
    ).write(folder)
