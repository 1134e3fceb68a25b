"""Peers of `loraport bench train`, set up in good faith: transformers' Trainer with PEFT, the same with Liger, and TRL.

All get the same random base, rows and adapter as ours (train/loop/random_base.py) and the same clock. What is chosen in
their favour: no upcasting of norms and head (`prepare_model_for_kbit_training`), the paged 8-bit optimiser, and for TRL
one packed sequence at a time, because without the flash-attn package its attention mask grows with the square of what
is packed together.

    python -m loraport.bench.contenders.peers spec.json
"""

import importlib.util
import sys
import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from loraport.train.loop.random_base import random_base, random_rows
from loraport.train.loop.step_clock import StepClock, run_worker

HAS_FLASH = importlib.util.find_spec("flash_attn") is not None


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """The figures of the contender that the spec names."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_trl = spec["contender"] == "trl"
    attention = "flash_attention_2" if is_trl and HAS_FLASH else "sdpa"
    base = random_base(spec["shape"], spec["load"], device, attention, spec["seed"])
    rows = random_rows(spec["lengths"], spec["shape"]["vocab_size"], spec["seed"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = (make_trl if is_trl else make_stock)(base, rows, spec, folder)
        clock = StepClock(spec["warmup"])
        clock.trainer = trainer
        trainer.add_callback(clock)
        clock.reset()
        trainer.train()
        notes = [f"attention {attention}, {trainer.args.per_device_train_batch_size} sequences at once"]
        return clock.figures() | {"notes": notes if is_trl else [], "trainable_parameters": count(trainer.model)}


def count(model: Any) -> int:
    """Parameters that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_config(spec: dict[str, Any]) -> LoraConfig:
    """PEFT's configuration of the case's adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec["rank"],
        lora_alpha=2 * spec["rank"],
        lora_dropout=spec["dropout"],
        target_modules=spec["targets"],
    )


def arguments(spec: dict[str, Any], folder: str, sequences: int) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments for `sequences` at once and the case's rows a step."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "per_device_train_batch_size": sequences,
        "gradient_accumulation_steps": max(1, spec["step_rows"] // sequences),
        "max_steps": spec["warmup"] + spec["steps"],
        "learning_rate": 2e-4,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "optim": "paged_adamw_8bit" if on_gpu else "adamw_torch",
        "gradient_checkpointing": spec["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if spec["checkpointing"] else None,
        "use_liger_kernel": spec["contender"] in ("stock-liger", "trl") and on_gpu,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": spec["seed"],
        "remove_unused_columns": False,
    }


class CountedTrainer(Trainer):  # type: ignore[misc]
    """Trainer that counts the tokens of its rows, padding aside, without waiting for the device."""

    tokens_seen: Any = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
        """Count, then train."""
        self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum()
        return super().training_step(model, inputs, *rest, **more)


def make_stock(base: Any, rows: list[dict[str, list[int]]], spec: dict[str, Any], folder: str) -> Any:
    """transformers' Trainer on a PEFT model, rows padded to the longest of their micro-batch."""
    model = get_peft_model(base, adapter_config(spec))
    model.config.use_cache = False
    if spec["checkpointing"]:
        model.enable_input_require_grads()
    settings = TrainingArguments(**arguments(spec, folder, spec["micro_rows"]))
    return CountedTrainer(model=model, args=settings, train_dataset=rows, data_collator=pad)


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """What DataCollatorForSeq2Seq makes of rows: (B, T) with T the longest, labels -100 where it is padding."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def make_trl(base: Any, rows: list[dict[str, list[int]]], spec: dict[str, Any], folder: str) -> Any:
    """TRL's SFTTrainer; rows of natural length are packed by best fit into sequences of the case's row length."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class CountedSFT(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer that counts its tokens; packed sequences have no padding."""

        tokens_seen = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
            """Count, then train."""
            self.tokens_seen += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *rest, **more)

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    base.config.use_cache = False
    packing = spec["rows"] == "natural"  # full rows leave nothing to pack
    sequences = spec["micro_rows"] if HAS_FLASH or not packing else 1
    own = arguments(spec, folder, sequences) | {"packing": packing, "max_length": spec["row_tokens"]}
    if packing:
        packed_a_step = max(1, round(spec["step_tokens"] / spec["row_tokens"]))
        own["gradient_accumulation_steps"] = max(1, packed_a_step // sequences)
    return CountedSFT(
        model=base,
        args=SFTConfig(**own),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter_config(spec),
    )


if __name__ == "__main__":
    run_worker(sys.argv[1], measure)
