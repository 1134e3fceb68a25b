"""The loop: transformers' Trainer with a loss that computes logits only where there is something to learn.

What is ours: batches padded on the right and sent without an attention mask (under a causal mask no token sees what
is to its right, so the pads change nothing and the attention kernels stay on their fast path), logits for trained
positions only, and an evaluation loss that is a mean over tokens, not over batches.
"""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer

from loraport.train.tokens import IGNORED

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
