"""Parity with TRL's SFTTrainer: same rows and same adapter in, same losses, gradients and weights out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from loraport.train.config import ResolvedConfig
from loraport.train.loop.fit import fit
from loraport.train.loop.packing import StepSampler
from loraport.train.loop.settings import Settings
from tests.loop import ToyRows, assert_same, base_of, config_for, lora_on, weights_of
from tests.models import make_tiny_base

ROWS = 24


class Gradients(TrainerCallback):
    """Notes the gradients of every step, after clipping."""

    def __init__(self) -> None:
        self.noted: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.noted.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})


class InOrder(SFTTrainer):
    """The rows as they come, which is in the order that our loop draws."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_base(tmp_path_factory.mktemp("trl") / "base"))


def trl_settings(config: ResolvedConfig, folder: Path) -> dict[str, Any]:
    """A run configuration in TRL's words, with padded batches of 4."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": config.batch_size // 4,
        "num_train_epochs": 1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "max_length": None,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def by_trl(model: Any, rows: ToyRows, config: ResolvedConfig, tokenizer: Any, folder: Path) -> tuple[Any, Gradients]:
    """The same run by TRL: padded batches of 4, accumulated to those of `config`."""
    order = StepSampler(rows.lengths, config.batch_size, 1, config.seed, lambda: 0).steps(0)
    items = [{key: rows[row][key].tolist() for key in rows[row]} for step in order for row in step]
    gradients = Gradients()
    arguments = SFTConfig(**trl_settings(config, folder), packing=False)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(items),
        processing_class=tokenizer,
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients


@pytest.mark.parametrize("kind", ["qwen3", "mistral-window"])
def test_losses_gradients_and_weights_are_those_of_trl(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = ToyRows(ROWS)
    config = config_for(batch_size=8, epochs=1, learning_rate=2e-3, weight_decay=0.1, eval_steps=3, save_steps=3)
    theirs, model = lora_on(base_of(kind)), lora_on(base_of(kind))
    begun = weights_of(model)
    assert_same(weights_of(theirs), begun, rtol=0, share=0)
    trainer, their_gradients = by_trl(theirs, rows, config, tokenizer, tmp_path / "trl")

    gradients = Gradients()
    outcome = fit(model, rows, ToyRows(3, 1), config, Settings(100), tmp_path / "ours", {}, callbacks=(gradients,))

    losses, their_losses = (
        [entry["loss"] for entry in history if "loss" in entry]
        for history in (outcome.history, trainer.state.log_history)
    )
    assert len(losses) == ROWS // 8
    assert losses == pytest.approx(their_losses, rel=1e-5)
    assert len(gradients.noted) == len(their_gradients.noted) == ROWS // 8
    # Of the first step to rounding; afterwards AdamW has divided by the root of squares that may be nearly zero.
    assert_same(gradients.noted[0], their_gradients.noted[0], rtol=1e-4, share=1e-5)
    for found, wanted in zip(gradients.noted, their_gradients.noted, strict=True):
        assert_same(found, wanted, rtol=1e-2, share=1e-3)
    assert_same(weights_of(model), weights_of(theirs), rtol=1e-2, share=1e-3)
    assert all(float((after - begun[name]).abs().max()) > 1e-3 for name, after in weights_of(model).items())
