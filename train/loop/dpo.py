"""Direct preference optimisation (Rafailov et al., 2023): the loop of `trainer.py` with a loss over pairs of replies.

For a pair of a preferred reply c and another one r, of which the base thinks what it does,

    margin = beta · [(log p(c) - log p_base(c)) - (log p(r) - log p_base(r))],  loss = -log sigmoid(margin)

Log-probabilities are sums over a reply's tokens. A row is a pair, so both its sequences are in one micro-step; the loss
of a step is a mean over the pairs of all its micro-steps on all GPUs. The base's part is computed once (reference.py).

    >>> trainer = DpoTrainer(model=model, rows=pairs, eval_rows=eval_pairs, config=config, ...)
    >>> trainer.prepare() and trainer.train()
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from loraport.clients.errors import ConfigError
from loraport.clients.terminal import console, say
from loraport.train.loop.packing import IGNORED, MicroStep, Rows, join
from loraport.train.loop.reference import Kept, as_base
from loraport.train.loop.trainer import LoraTrainer

# Means over pairs, in the order of the sums that `loss_of` returns; rewards are beta · (log p - log p_base).
FIGURES = ("reward_margin", "reward_accuracy", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps")
WORTH_A_LINE = 0.5  # seconds


class DpoTrainer(LoraTrainer):
    """Trainer of a PeftModel on pairs, against its base."""

    reference: tuple[Tensor, Tensor]  # of the base: (N, 2) of the rows and of the evaluation rows, on the host

    def prepare(self) -> bool:
        """The base's log-probabilities, from the disk or computed."""
        if self.args.world_size > 1 and not self.ways.packed:
            raise ConfigError(
                f"--method dpo trains {type(self.model.get_base_model()).__name__} on one GPU: its documents cannot be "
                f"packed, so the two of a pair take two passes.",
                "use --gpus 1",
            )
        started, computed = time.monotonic(), 0
        found = []
        for rows in (self.train_dataset, self.eval_dataset):
            kept = Kept.of(rows, self.config, self.identity, self.ways)
            reference_N2 = self.agreed(kept.read() if kept else None)
            if reference_N2 is None:
                reference_N2, computed = self.compute_reference(rows), computed + len(rows)
                if self.stop_asked and self.args.world_size == 1:
                    return False
                if kept and self.args.should_save:
                    kept.write(reference_N2)
            found.append(reference_N2)
        self.reference = found[0], found[1]
        self.clock = time.monotonic()
        spent = self.clock - started
        if spent >= WORTH_A_LINE and computed:
            say(f"  log-probabilities of {computed:,} pairs under the base: {spent:.1f} s", "dim")
        return True

    def agreed(self, found: Tensor | None) -> Tensor | None:
        """What was found on the disk, if all processes found it: they compute together or not at all."""
        missing = self.sum_up([int(found is None)])[0]
        return None if missing else found

    @torch.no_grad()
    def compute_reference(self, rows: Rows) -> Tensor:
        """Log-probabilities (N, 2) of pairs under the base; of some of them alone where a signal cuts it off."""
        self.model.eval()
        reference_N2 = torch.zeros(len(rows), 2)
        with as_base(self.model), console.status("log-probabilities of the base") as status:
            for number, (micro, turns) in enumerate(self.passes(rows), 1):
                logps_P2, _ = self.logps(self.model, self.parts(micro))
                if len(micro.targets_K):
                    reference_N2[list(micro.rows)] = logps_P2.float().cpu()
                status.update(f"log-probabilities of the base: {number:,} of {turns:,}")
                if self.stop_asked and self.args.world_size == 1:
                    break
        self.release()
        if self.args.world_size > 1:
            shared = reference_N2.to(self.args.device)
            torch.distributed.all_reduce(shared)
            reference_N2 = shared.cpu()
        return reference_N2

    def parts(self, micro: MicroStep) -> list[dict[str, Any]]:
        """What the model is called with: once, or where nothing may be packed once for each sequence."""
        micros = [micro] if self.ways.packed else [join([item], ()) for item in documents_of(micro)]
        return [each.to(self.args.device) | {"counts": each.counts} for each in micros]

    def logps(self, model: Any, parts: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (P, 2) of the replies, and how many of their tokens were the likeliest (P, 2)."""
        found = [model(**part) for part in parts]
        logps_D, right_D = (torch.cat(each) for each in zip(*found, strict=True))
        return (logps_D.view(-1, 2), right_D.view(-1, 2)) if len(logps_D) % 2 == 0 else (logps_D, right_D)

    def given(self, micro: MicroStep, rows: Rows) -> dict[str, Any]:
        """The parts, with the base's log-probabilities and the number of tokens of the preferred replies."""
        reference_N2 = self.reference[1] if rows is self.eval_dataset else self.reference[0]
        pairs = self.size_of(micro)
        return {
            "parts": self.parts(micro),
            "pairs": pairs,
            "reference": reference_N2[list(micro.rows) if pairs else []].to(self.args.device, non_blocking=True),
            "tokens": sum(micro.counts[::2]),
        }

    def loss_of(self, model: Any, inputs: dict[str, Any], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The loss summed over the pairs, times `scale`; sums of FIGURES, and of the preferred replies' tokens those
        that were the likeliest, and all.
        """
        logps_P2, right_P2 = self.logps(model, inputs["parts"])
        if not inputs["pairs"]:  # a rehearsal, or company for other GPUs
            return logps_P2.sum() * 0.0, torch.zeros(len(FIGURES) + 2, device=logps_P2.device, dtype=torch.float64)
        rewards_P2 = self.config.beta * (logps_P2 - inputs["reference"])
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        loss = -logsigmoid(margins_P).sum() * scale
        columns = [margins_P, (margins_P > 0).float(), *rewards_P2.unbind(1), *logps_P2.unbind(1), right_P2[:, 0]]
        sums = torch.stack([each.detach().double().sum() for each in columns])
        return loss, torch.cat([sums, torch.tensor([inputs["tokens"]]).to(sums)])

    def size_of(self, micro: MicroStep) -> int:
        """Its pairs."""
        return len(micro.rows) if len(micro.targets_K) else 0

    def figures_of(self, seen: list[float], size: int) -> dict[str, float]:
        """Means over pairs, and the token accuracy of the preferred replies."""
        *sums, right, tokens = seen
        means = {name: value / max(size, 1) for name, value in zip(FIGURES, sums, strict=True)}
        return means | {"token_accuracy": right / max(tokens, 1)}

    def evaluation_of(self, loss: float, seen: list[float], size: int) -> dict[str, float]:
        """Without perplexity: the loss is none of tokens."""
        return {"loss": loss} | self.figures_of(seen, size)


def documents_of(micro: MicroStep) -> list[dict[str, Any]]:
    """The sequences of a micro-step as tokenised rows."""
    ids_T = micro.input_ids_1T[0]
    labels_T = torch.full_like(ids_T, IGNORED)
    labels_T[micro.positions_K + 1] = micro.targets_K
    lengths = list(micro.documents.lengths)
    parts = zip(ids_T.split(lengths), labels_T.split(lengths), strict=True)
    return [{"input_ids": ids.numpy(), "labels": labels.numpy()} for ids, labels in parts]
