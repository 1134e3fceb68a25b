"""Packing: no row is lost or doubled, every micro-step keeps within its budget, which changes nothing else."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from loraport.train.loop.packing import StepSampler, join, largest, micro_step, pack
from tests.loop import ToyRows

CASES = [
    (rows, batch, budget, world)
    for rows in (1, 7, 64)
    for batch in (1, 5, 16)
    for budget in (1, 50, 900)
    for world in (1, 2, 3)
]


def sampler(lengths: Any, batch: int, budget: int, world: int = 1, rank: int = 0, epoch: int = 0) -> StepSampler:
    return StepSampler(np.asarray(lengths), batch, budget, 7, lambda: epoch, rank, world)


def lengths_of(count: int) -> list[int]:
    return np.random.default_rng(count).integers(2, 200, count).tolist()


@pytest.mark.parametrize(("count", "batch", "budget", "world"), CASES)
def test_every_row_comes_once_an_epoch_and_every_micro_step_fits(
    count: int, batch: int, budget: int, world: int
) -> None:
    lengths = lengths_of(count)
    by_rank = [list(sampler(lengths, batch, budget, world, rank)) for rank in range(world)]
    assert {len(steps) for steps in by_rank} == {-(-count // batch)}
    for at_once in zip(*by_rank, strict=True):
        assert len({len(packs) for packs in at_once}) == 1  # FSDP and DDP wait for each other
    packs = [pack for steps in by_rank for step in steps for pack in step]
    assert Counter(row for members, counted in packs if counted for row in members) == Counter(range(count))
    assert all(len(members) == 1 or sum(lengths[row] for row in members) <= budget for members, _ in packs)


def test_which_rows_make_a_step_depends_on_seed_and_epoch_alone() -> None:
    lengths = lengths_of(40)
    steps = sampler(lengths, 8, 100).steps(3)
    for budget in (1, 1000):
        for world in (1, 4):
            made: list[list[int]] = [[] for _ in steps]
            for rank in range(world):
                for number, step in enumerate(sampler(lengths, 8, budget, world, rank, epoch=3)):
                    made[number] += [row for members, counted in step if counted for row in members]
            assert [sorted(rows) for rows in made] == [sorted(rows) for rows in steps]
    assert sampler(lengths, 8, 100).steps(4) != steps


def test_rows_are_dealt_evenly() -> None:
    lengths = lengths_of(64)
    loads = [sum(lengths[row] for row in part) for part in sampler(lengths, 64, 100, world=4).deal(list(range(64)))]
    assert max(loads) - min(loads) <= max(lengths)
    assert max(loads) < 1.05 * sum(loads) / 4


def test_fewer_rows_than_gpus_keep_all_of_them_in_step() -> None:
    (step,) = sampler([5, 3], 8, 100, world=3, rank=2)
    assert step == [((1,), False)]
    assert len(micro_step(ToyRows(2), (1,), counted=False).targets_K) == 0


def test_best_fit_wastes_little() -> None:
    lengths = lengths_of(200)
    packs = pack(lengths, 1000)
    assert len(packs) <= 1.05 * sum(lengths) / 1000 + 1
    sums = [sum(lengths[index] for index in members) for members in packs]
    assert sums == sorted(sums, reverse=True)


@pytest.mark.parametrize("budget", [1, 45, 90, 10_000])
@pytest.mark.parametrize("batch", [1, 4, 30])
def test_the_largest_is_at_least_what_ever_comes(batch: int, budget: int) -> None:
    rows = ToyRows(30)
    for item in rows.items:
        item["labels"] = item["input_ids"]
    bound = largest(rows, batch, budget)
    for epoch in range(40):
        for step in sampler(rows.lengths, batch, budget, epoch=epoch):
            for members, _ in step:
                micro = micro_step(rows, members)
                assert micro.tokens <= bound.tokens
                assert len(micro.targets_K) <= len(bound.targets_K)
    assert bound.tokens <= max(budget, max(rows.lengths))


def test_each_target_is_behind_its_position_and_in_its_own_document() -> None:
    first = {"input_ids": np.array([5, 6, 7], np.int32), "labels": np.array([5, -100, 7], np.int32)}
    second = {"input_ids": np.array([8, 9], np.int32), "labels": np.array([8, 9], np.int32)}
    micro = join([first, second], (0, 1))
    assert micro.input_ids_1T.tolist() == [[5, 6, 7, 8, 9]]
    assert micro.position_ids_1T.tolist() == [[0, 1, 2, 0, 1]]
    assert micro.positions_K.tolist() == [1, 3]
    assert micro.targets_K.tolist() == [7, 9]  # no row predicts the first token of the next
    assert micro.documents.bounds.tolist() == [0, 3, 5]
    assert micro.documents.bounds.dtype == torch.int32
