"""Pre-train the base on one GPU for a given number of seconds, and save it as a Hugging Face model folder.

One loop, top to bottom: worker processes draw reading tasks and text and pack them into sequences; a
Qwen3 model learns on them with Muon (matrices) and AdamW (embeddings, norms); the learning rate
follows the elapsed share of the time. Early sequences have 512 tokens; in the last quarter, every third
batch has 8,192, so that the context length in the configuration is one that the model has seen.

    python -m examples.pretrain.pretrain --corpus build/corpus --out examples/reader-9m --seconds 480
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.pretrain.tasks import END, TaskMaker
from examples.pretrain.tokenizer import read_corpus

SHORT, LONG = 512, 8192  # tokens in a sequence
TEXT_ROWS = 0.1  # share of sequences that hold text alone; the others hold tasks, and text in the space left
TEXT_WEIGHT = 0.3  # loss weight of a text token (an answer token has 1)
MUON_LR, ADAM_LR = 0.02, 2e-3
WARM_UP, DECAY_FROM, LONG_FROM = 0.02, 0.5, 0.75  # shares of the time


class Corpus:
    """The harvest of `corpus.py`, the tokenizer, and all texts as one array of token ids."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.functions, self.texts = read_corpus(folder)
        self.tokenizer = tokenizer.backend_tokenizer
        encoded = self.tokenizer.encode_batch_fast([text + END for text in self.texts], add_special_tokens=False)
        self.text_ids = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded])


class PackedBatches(IterableDataset):
    """Endless batches `(ids_BT, weights_BT)`: whole tasks packed into sequences, filled up with text."""

    def __init__(self, corpus: Corpus, rows: int, length: int) -> None:
        self.corpus, self.rows, self.length = corpus, rows, length

    def tasks(self, seed: int) -> Iterator[tuple[list[int], list[float]]]:
        """Token ids and loss weights of one task after the other."""
        corpus = self.corpus
        maker, rng = TaskMaker(corpus.functions, corpus.texts, seed), random.Random(seed)
        while True:
            fillers = ["" for _ in range(64)]
            if self.length == LONG:
                counts = [rng.choice([0, 0, 0, 0, 1, 2, 4, 8]) for _ in fillers]
                fillers = ["\n\n".join(rng.choices(corpus.texts, k=count)) for count in counts]
            drawn = [maker.make(filler) for filler in fillers]
            flat = [text for segments in drawn for text, _ in segments]
            encoded = iter(corpus.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
            for segments in drawn:
                ids: list[int] = []
                weights: list[float] = []
                for _, weight in segments:
                    new = next(encoded).ids
                    ids += new
                    weights += [weight] * len(new)
                if len(ids) <= self.length:
                    yield ids, weights

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        seed = 1000 + (info.id if info else 0) + self.length
        tasks, rng, text_ids = self.tasks(seed), random.Random(seed), self.corpus.text_ids
        waiting = next(tasks)
        while True:
            ids_BT = np.empty((self.rows, self.length), dtype=np.int32)
            weights_BT = np.empty((self.rows, self.length), dtype=np.float16)
            for row in range(self.rows):
                ids: list[int] = []
                weights: list[float] = []
                if rng.random() > TEXT_ROWS:
                    while len(ids) + len(waiting[0]) <= self.length:
                        ids += waiting[0]
                        weights += waiting[1]
                        waiting = next(tasks)
                room = self.length - len(ids)
                start = rng.randrange(len(text_ids) - room)
                text = text_ids[start : start + room].tolist()
                text_weights = [TEXT_WEIGHT] * room
                first = rng.random() < 0.3  # text in front moves the tasks to other positions
                ids_BT[row] = text + ids if first else ids + text
                weights_BT[row] = text_weights + weights if first else weights + text_weights
            yield torch.from_numpy(ids_BT), torch.from_numpy(weights_BT)


class Muon:
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration (K. Jordan et al., 2024).

    Matrices of one shape are stacked, so that a step costs a handful of batched products.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95) -> None:
        shapes = sorted({tuple(m.shape) for m in matrices})
        self.groups = [[m for m in matrices if tuple(m.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros_like(torch.stack(list(group))) for group in self.groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all matrices from their gradients."""
        for group, buffer_NOI in zip(self.groups, self.buffers, strict=True):
            gradient_NOI = torch.stack([m.grad for m in group])
            buffer_NOI.lerp_(gradient_NOI, 1 - self.momentum)
            update_NOI = orthogonalise(gradient_NOI.lerp(buffer_NOI, self.momentum))
            scale = max(1.0, update_NOI.shape[1] / update_NOI.shape[2]) ** 0.5
            for matrix, update_OI in zip(group, update_NOI.unbind(), strict=True):
                matrix.add_(update_OI.to(matrix.dtype), alpha=-lr * scale)


def orthogonalise(matrices_NOI: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: five quintic Newton-Schulz steps in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices_NOI.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh Qwen3 of 9.2 million parameters whose embeddings are tied."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def weighted_loss(hidden_BTD: Tensor, embedding_VD: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per unit of loss weight."""
    logits_BTV = hidden_BTD @ embedding_VD.to(hidden_BTD.dtype).T
    losses = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    return (losses * weights_BT.flatten()).sum() / weights_BT.sum()


def hidden_states(model: Qwen3ForCausalLM, ids_BT: Tensor) -> Tensor:
    """Final hidden states BTD under a plain causal mask; packed documents see each other."""
    positions_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    hidden_BTD = model.model.embed_tokens(ids_BT)
    rotary = model.model.rotary_emb(hidden_BTD, positions_1T)
    for layer in model.model.layers:
        hidden_BTD = layer(hidden_BTD, attention_mask=None, position_embeddings=rotary)
    return model.model.norm(hidden_BTD)


def learning_rate(progress: float) -> float:
    """Share of the peak learning rate at a share of the time: warm-up, constant, linear decay to zero."""
    return min(1.0, progress / WARM_UP, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="model folder; its tokenizer is already there")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--tokens-per-batch", type=int, default=262_144)
    parser.add_argument("--workers", type=int, default=(os.cpu_count() or 2) - 1)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    corpus = Corpus(args.corpus, tokenizer)
    print(f"{len(corpus.text_ids) / 1e6:.1f}M tokens of text")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are processes already
    long_workers = max(1, args.workers // 5)
    batches = {
        length: iter(
            DataLoader(
                PackedBatches(corpus, args.tokens_per_batch // length, length),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=4,
                pin_memory=args.device == "cuda",
            )
        )
        for length, workers in ((SHORT, args.workers - long_workers), (LONG, long_workers))
    }
    model = make_model(tokenizer).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    loss_of = weighted_loss
    if args.device == "cuda":
        loss_of = torch.compile(weighted_loss, dynamic=False)
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    step, tokens, start = 0, 0, time.monotonic()
    while (progress := (time.monotonic() - start) / args.seconds) < 1:
        length = LONG if progress > LONG_FROM and step % 3 == 0 else SHORT
        ids_BT, weights_BT = (t.to(args.device, non_blocking=True) for t in next(batches[length]))
        ids_BT = ids_BT.long()
        with torch.autocast(args.device, torch.bfloat16):
            hidden_BTD = hidden_states(model, ids_BT[:, :-1])
            loss = loss_of(hidden_BTD, model.lm_head.weight, ids_BT[:, 1:], weights_BT[:, 1:].float())
        loss.backward()
        scale = learning_rate(progress)
        muon.step(MUON_LR * scale)
        adam.param_groups[0]["lr"] = ADAM_LR * scale
        adam.step()
        model.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids_BT.numel()
        if step % 50 == 0 or step <= 3:
            seconds = time.monotonic() - start
            speed = tokens / seconds / 1e6
            print(f"{seconds:5.0f} s  step {step:5d}  {length} tokens  loss {loss.item():.4f}  {speed:.2f}M tokens/s")

    model.to(torch.bfloat16).save_pretrained(args.out)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, do_sample=False).save_pretrained(args.out)
    print(f"{step} steps, {tokens / 1e6:.0f}M tokens, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
