"""What the tests of the training loop share: random rows, tiny models of several architectures, the plain formula."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from loraport.train.config import ResolvedConfig
from loraport.train.loop.checkpointing import set_checkpointing
from loraport.train.loop.packing import join, pack
from loraport.train.loop.settings import Settings
from loraport.train.loop.ways import Ways, trained

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # ten times the usual: attention that looks at something, losses that differ
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
# Architecture (transformers' prefix), what is special about it, and the ways in which it must be trained.
SPECIAL: dict[str, tuple[str, dict[str, Any], Ways]] = {
    "qwen3": ("Qwen3", {}, Ways()),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True}, Ways()),
    "llama": ("Llama", {}, Ways()),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, Ways()),
    "mistral-window": ("Mistral", {"sliding_window": 6}, Ways()),
    "qwen2": ("Qwen2", {}, Ways()),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, Ways()),
    "phi3": ("Phi3", {}, Ways()),
    "gpt-neox": ("GPTNeoX", {}, Ways()),
    "granite": ("Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5}, Ways(own_head=False)),
    "gemma2": ("Gemma2", {"sliding_window": 6} | CAPS, Ways(False, False, False)),
}


def config_for(model: str = "tiny", **settings: Any) -> ResolvedConfig:
    """A resolved configuration in which everything that a test does not name is small and still."""
    given: dict[str, Any] = {
        "model": model,
        "data": "rows.jsonl",
        "sequence_length": 64,
        "rank": 4,
        "alpha": 8,
        "dropout": 0.0,
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "eval_steps": 2,
        "save_steps": 2,
    }
    return ResolvedConfig.model_validate(given | settings)


class ToyRows:
    """Rows of random tokens, 5 to 39 of them; the first half of each carries no loss."""

    def __init__(self, count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        generator = np.random.default_rng(seed)
        self.items = []
        for length in generator.integers(5, 40, count):
            ids = generator.integers(3, vocabulary, length).astype(np.int32)
            labels = np.where(np.arange(length) < length // 2, np.int32(-100), ids)
            self.items.append({"input_ids": ids, "labels": labels})
        self.lengths = np.array([len(item["input_ids"]) for item in self.items], np.int32)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.items[row]


def base_of(kind: str, seed: int = 0) -> Any:
    """A random frozen model of one of the SPECIAL kinds."""
    import transformers

    prefix, special, _ = SPECIAL[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**SHAPE | special)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).requires_grad_(False)


def lora_on(
    base: Any, dropout: float = 0.0, rank: int = 4, seed: int = 1, targets: Any = "all-linear", **more: Any
) -> Any:
    """A PeftModel on linears of `base`, whose adapter is not the zero that it starts as."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "lora_dropout": dropout, "target_modules": targets}
    settings |= {"r": rank, "lora_alpha": 2 * rank}
    model = get_peft_model(base, LoraConfig(**settings | more))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what learns."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the gradients, which are taken away."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model: Any, rows: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The formula itself, by transformers and PEFT, a row at a time: mean loss over the targets of all rows."""
    targets = sum(int((rows[row]["labels"][1:] != -100).sum()) for row in range(len(rows)))
    total = 0.0
    model.train()
    for row in range(len(rows)):
        ids_1T, labels_T = (torch.from_numpy(rows[row][key]).long() for key in ("input_ids", "labels"))
        logits_TV = model(input_ids=ids_1T[None], use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits_TV, labels_T[1:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    return total, gradients_of(model)


def ours(
    model: Any, rows: Any, ways: Ways, budget: int, layers: int = 0, offload: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same in the loop's ways, `budget` tokens at once and the first `layers` checkpointed."""
    packs = pack([int(length) for length in rows.lengths], budget if ways.packed else 1)
    micro_steps = [join([rows[row] for row in members], tuple(members)) for members in packs]
    targets = sum(len(micro.targets_K) for micro in micro_steps)
    total = 0.0
    model.train()
    with trained(model, ways):
        set_checkpointing(model, Settings(budget, layers, offload))
        for micro in micro_steps:
            loss, _ = model(**micro.to(torch.device("cpu")), scale=1 / targets)
            loss.backward()
            total += loss.item()
        set_checkpointing(model, Settings(budget))
    return total, gradients_of(model)


def assert_same(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float = 1e-3, share: float = 1e-5
) -> None:
    """Equal tensors by name; `share`: absolute tolerance as a part of the largest number of each."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(
            found[name], tensor, rtol=rtol, atol=share * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def files_of(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, sorted by step."""
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
