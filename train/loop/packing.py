"""Rows into micro-steps: packed by best fit within a token budget, never across the rows of an optimiser step.

An optimiser step takes `batch_size` rows, in an order drawn anew for each epoch. They are dealt to the GPUs and packed
into as few micro-steps as the budget allows. The loss of a step is a mean over the targets of all its rows, so the
budget decides about memory and speed and never about the result: that is what lets a run step down when memory is
short.

    >>> pack([900, 500, 400, 100], 1000)
    [[0, 3], [1, 2]]
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from loraport.train.data.preference import sequences
from loraport.train.loop.attention import Documents

IGNORED = -100

Pack = tuple[int, ...]  # rows that make one micro-step


class Rows(Protocol):
    """Tokenised rows: `lengths` (tokens a row), and items with `input_ids` and `labels` of T int32; those of pairs have
    the tokens of two sequences and, as `chosen`, how many are of the first.
    """

    @property
    def lengths(self) -> np.ndarray[Any, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]: ...


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Best fit decreasing: indices by micro-step, the fullest first; a row longer than the budget goes alone."""
    free: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[index], -1))
        if at == len(free):
            packs.append([])
            left, number = max(budget, lengths[index]), len(packs) - 1
        else:
            left, number = free.pop(at)
        packs[number].append(index)
        insort(free, (left - lengths[index], number))
    return sorted(packs, key=lambda members: -sum(lengths[i] for i in members))


@dataclass(frozen=True)
class MicroStep:
    """One packed sequence of T tokens with K targets; tensors on the host until `to`.

    `positions` (K): where the hidden state predicts `targets` (K), in the sequence.
    """

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    positions_K: torch.Tensor
    targets_K: torch.Tensor
    documents: Documents
    rows: Pack

    @property
    def tokens(self) -> int:
        """T."""
        return self.input_ids_1T.shape[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """Targets of each document."""
        inner = self.documents.bounds[1:-1].to(self.positions_K.dtype)
        bounds = torch.searchsorted(self.positions_K, inner).tolist()
        return tuple(np.diff([0, *bounds, len(self.positions_K)]).tolist())

    def to(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the model, on `device`."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)  # a few KiB: pinning them would take longer

        documents = Documents(move(self.documents.bounds), self.documents.lengths)
        return {
            "input_ids": move(self.input_ids_1T),
            "position_ids": move(self.position_ids_1T),
            "positions": move(self.positions_K),
            "targets": move(self.targets_K),
            **documents.kwargs(),
        }


def micro_step(rows: Rows, members: Pack, counted: bool = True) -> MicroStep:
    """The rows of one pack, a pair as two documents. Without `counted` it has no targets and only keeps other GPUs
    company.
    """
    items = [rows[row] for row in members]
    if not counted:
        items = [item | {"labels": np.full_like(item["labels"], IGNORED)} for item in items]
    return join(items, members)


def join(items: list[dict[str, Any]], members: Pack) -> MicroStep:
    """Tokenised rows behind each other, position numbers beginning anew with each, in a pair with its second too."""
    items = [sequence for item in items for sequence in sequences(item)]
    lengths = [len(item["input_ids"]) for item in items]
    ids = np.concatenate([np.asarray(item["input_ids"]) for item in items])
    following = np.concatenate([np.append(np.asarray(item["labels"])[1:], IGNORED) for item in items])
    positions = np.flatnonzero(following != IGNORED)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return MicroStep(
        torch.from_numpy(ids.astype(np.int64))[None],
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        torch.from_numpy(positions),
        torch.from_numpy(following[positions].astype(np.int64)),
        Documents(bounds, tuple(lengths)),
        members,
    )


def largest(rows: Rows, batch_size: int, budget: int) -> MicroStep:
    """The largest micro-step that can come: the longest row and the next ones, the last cut to fill the budget, and a
    target at every position.
    """
    longest = np.argsort(-np.asarray(rows.lengths), kind="stable")[:batch_size].tolist()
    wanted = max(min(budget, int(rows.lengths[longest].sum())), int(rows.lengths[longest[0]]))
    items: list[dict[str, Any]] = []
    for row in longest:
        left = wanted - sum(len(item["input_ids"]) for item in items)
        if left > 0:
            item = rows[row]
            ids = np.asarray(item["input_ids"])[:left]
            cut = {"chosen": item["chosen"]} if 0 < item.get("chosen", 0) < len(ids) else {}
            items.append({"input_ids": ids, "labels": ids} | cut)
    return join(items, ())


@dataclass(frozen=True)
class Step:
    """What one GPU does in an optimiser step."""

    micro_steps: list[MicroStep]

    @property
    def tokens(self) -> int:
        """Tokens of this GPU's rows."""
        return sum(micro.tokens for micro in self.micro_steps if len(micro.targets_K))

    @property
    def rows(self) -> list[int]:
        """All rows of this GPU's part."""
        return [row for micro in self.micro_steps for row in micro.rows]


class StepSampler:
    """Batches of packs for a DataLoader, one an optimiser step; `epoch` tells which epoch's order is wanted.

    Every GPU computes the same plan and takes its own part, so nothing has to be sent around; all get equally many
    micro-steps, because FSDP needs all of them in step: (rows, False) marks one that has nothing to learn.
    """

    def __init__(
        self,
        lengths: np.ndarray[Any, Any],
        batch_size: int,
        budget: int,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.lengths, self.batch_size, self.budget, self.seed = lengths, batch_size, budget, seed
        self.epoch, self.rank, self.world = epoch, rank, world

    def __len__(self) -> int:
        """Optimiser steps an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[Pack, bool]]]:
        """Packs of each optimiser step for this GPU."""
        for rows in self.steps(self.epoch()):
            parts = [self.packs(part) for part in self.deal(rows)]
            longest = max(len(part) for part in parts)
            mine = [(members, True) for members in parts[self.rank]]
            shortest = min(rows, key=lambda row: int(self.lengths[row]))
            yield mine + [((shortest,), False)] * (longest - len(mine))

    def steps(self, epoch: int) -> list[list[int]]:
        """Rows by optimiser step, in this epoch's order, whatever the budget and the number of GPUs."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def packs(self, rows: list[int]) -> list[Pack]:
        """Rows of one GPU's part by micro-step."""
        members = pack([int(self.lengths[row]) for row in rows], self.budget)
        return [tuple(rows[index] for index in each) for each in members]

    def deal(self, rows: list[int]) -> list[list[int]]:
        """The rows of a step by GPU, about the same number of tokens each: longest first, to whom has least."""
        if self.world == 1:
            return [rows]
        parts: list[list[int]] = [[] for _ in range(self.world)]
        loads = [0] * self.world
        for row in sorted(rows, key=lambda row: -int(self.lengths[row])):
            least = loads.index(min(loads))
            parts[least].append(row)
            loads[least] += int(self.lengths[row])
        return parts


class PackedRows(torch.utils.data.Dataset):
    """A map from (pack, counted) to its MicroStep, for a DataLoader over a StepSampler."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Number of rows; transformers prints it."""
        return len(self.rows)

    def __getitem__(self, item: tuple[Pack, bool]) -> MicroStep:
        """The micro-step of a pack."""
        return micro_step(self.rows, *item)
