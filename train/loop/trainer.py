"""The loop: transformers' Trainer with a loss that computes logits only where there is something to learn.

What is ours: batches padded on the right and sent without an attention mask (under a causal mask no token sees what
is to its right, so the pads change nothing and the attention kernels stay on their fast path), logits for trained
positions only, and an evaluation loss that is a mean over tokens, not over batches.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loraport.clients.errors import Refused, ResourceError
from loraport.train.config import RunConfig
from loraport.train.data.tokens import IGNORED, Encoder, Example
from loraport.train.loop.lora import Device, choose_types, use_checkpointing
from loraport.train.loop.progress import ProgressCallback

Features = dict[str, list[int]]  # `input_ids` and `labels` of one row


def collate(rows: list[Features], pad_token: int) -> dict[str, torch.Tensor]:
    """A batch of B rows: `input_ids` and `labels` of shape (B, T), padded on the right to the longest row; `lengths`.

    The first token of a row is no target; its label is IGNORED, so that counting labels counts targets.
    """
    lengths_B = torch.tensor([len(row["input_ids"]) for row in rows])
    ids_BT = torch.full((len(rows), int(lengths_B.max())), pad_token)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids_BT[index, :length] = torch.tensor(row["input_ids"])
        labels_BT[index, 1:length] = torch.tensor(row["labels"][1:])
    return {"input_ids": ids_BT, "labels": labels_BT, "lengths": lengths_B}


def summed_loss(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy in nats summed over the trained tokens of a batch, and their number.

    Logits are computed for the union of the positions that any row of the batch trains (`logits_to_keep`), which for
    answers at the end of rows is a fraction of T; softmax in float32.
    """
    targets_BT = inputs["labels"][:, 1:]
    trained_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits_BKV = model(input_ids=inputs["input_ids"], logits_to_keep=trained_K, use_cache=False).logits
    targets_BK = targets_BT[:, trained_K]
    learned = targets_BK != IGNORED
    return cross_entropy(logits_BKV[learned].float(), targets_BK[learned], reduction="sum"), learned.sum()


class LoraTrainer(Trainer):  # type: ignore[misc]
    """Trainer over a list of Features. `tokens_seen` counts the tokens of the rows, without padding."""

    def __init__(self, *, pad_token: int, **options: Any) -> None:
        super().__init__(data_collator=lambda rows: collate(rows, pad_token), **options)
        # Our loss divides by the targets of the whole optimiser step, so accumulation does not change the gradient.
        self.model_accepts_loss_kwargs = True
        self.pad_token = pad_token
        self.tokens_seen = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean loss in nats over the targets of the optimiser step this batch belongs to."""
        self.tokens_seen += int(inputs["lengths"].sum())
        loss, count = summed_loss(model, inputs)
        return loss / (count if num_items_in_batch is None else num_items_in_batch)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss in nats over all targets of the evaluation rows; logged as `eval_loss`."""
        self.model.eval()
        total, count = 0.0, 0
        # Rows of like length together: less padding, and the mean over tokens does not depend on the order.
        rows = sorted(self.eval_dataset, key=lambda row: len(row["input_ids"]))
        size = self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(collate(rows[start : start + size], self.pad_token))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, targets = summed_loss(self.model, batch)
            total, count = total + float(loss), count + int(targets)
        metrics = {"eval_loss": total / count}
        self.log(metrics)
        return metrics


class DivergenceCallback(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose loss or gradient is no longer a finite number: nothing that follows could be kept."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Raise Refused that names the step and the figure."""
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise Refused(
                    f"the run diverged: {name} is {value} at step {state.global_step} of {state.max_steps}.",
                    "lower --learning-rate, or look at the rows of the last batches; nothing was stored",
                )


def run_trainer(
    model: Any, encoder: Encoder, examples: list[Example], eval_examples: list[Example], config: RunConfig, folder: Path
) -> dict[str, float]:
    """Run the loop; return losses, steps and tokens/s. Refused when it diverges, ResourceError without memory."""
    micro = micro_batch_rows(config, max(len(example.input_ids) for example in [*examples, *eval_examples]))
    progress = ProgressCallback()
    pad = encoder.tokenizer.pad_token_id
    trainer = LoraTrainer(
        model=model,
        args=training_arguments(config, model, len(examples), micro, folder),
        train_dataset=[example.features for example in examples],
        eval_dataset=[example.features for example in eval_examples],
        callbacks=[progress, DivergenceCallback()],
        pad_token=next(iter(encoder.stop_tokens)) if pad is None else pad,
    )
    trainer.remove_callback(PrinterCallback)
    progress.trainer = trainer
    try:
        result = trainer.train()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the GPU ran out of memory with {micro} rows at once.",
            f"halve --micro-batch-tokens (it is {config.micro_batch_tokens or 4096}), or use --load nf4",
        ) from error
    finally:
        progress.close()
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "train_loss": result.training_loss,
        "eval_loss": evaluations[-1],
        "steps": trainer.state.global_step,
        "tokens_per_second": round(trainer.tokens_seen / result.metrics["train_runtime"], 1),
    }


def training_arguments(config: RunConfig, model: Any, rows: int, micro: int, folder: Path) -> TrainingArguments:
    """The run configuration in transformers' words, for one device."""
    device = Device.here()
    computed = choose_types(config, device).computed
    checkpointing = use_checkpointing(config, model)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // micro,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(-(-rows // config.batch_size) * config.epochs * config.warmup_ratio),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=computed == "bfloat16",
        fp16=computed == "float16",
        use_cpu=device.kind == "cpu",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide from us what it finds
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.kind == "cuda",
        seed=config.seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer wraps the model into DataParallel, which would cut our batches apart
    return arguments


def micro_batch_rows(config: RunConfig, longest: int) -> int:
    """Rows on the device at once: the largest divisor of the batch whose longest rows stay within the budget."""
    fitting = max(1, (config.micro_batch_tokens or 4096) // longest)
    return max(size for size in range(1, config.batch_size + 1) if config.batch_size % size == 0 and size <= fitting)
