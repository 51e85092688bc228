"""Batches: which windows a step has, and that parts of a batch are all of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.errors import RecipeError
from quantforge.training.batches import Batch, batch_of_step, seed_of, split


def windows(count: int, length: int = 5) -> torch.Tensor:
    return torch.arange(count)[:, None] * 100 + torch.arange(length)


@given(count=st.integers(1, 30), size=st.integers(1, 30), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_has_no_window_twice_and_as_many_as_fill_steps(count, size, seed, epoch):
    if size > count:
        return
    steps = count // size
    batches = [batch_of_step(windows(count), size, seed, epoch * steps + i) for i in range(steps)]
    seen = [w for batch in batches for w in batch.windows]
    assert len(seen) == len(set(seen)) == steps * size
    for batch in batches:
        assert torch.equal(batch.ids, windows(count)[list(batch.windows)])


def test_a_step_is_settled_by_seed_and_step_whatever_ran_before():
    def orders(seed):
        return [batch_of_step(windows(8), 2, seed, step).windows for step in range(12)]

    first = orders(7)
    torch.manual_seed(99)
    assert orders(7) == first
    assert batch_of_step(windows(8), 2, 7, 9).windows == first[9]
    assert orders(8) != first
    assert first[:4] != first[4:8] != first[8:]


def test_each_token_counts_but_the_first_and_all_are_read():
    batch = batch_of_step(windows(6), 4, 0, 0)
    assert (batch.predictions, batch.tokens) == (4 * 4, 4 * 5)
    assert batch.counted.sum(0).tolist() == [0, 4, 4, 4, 4]
    assert batch.ids.dtype == torch.int64


def test_a_first_token_that_is_marked_has_no_prediction_all_the_same():
    ones = torch.ones(2, 3, dtype=torch.bool)
    assert Batch(windows(2, 3), ones, ones, (0, 1)).predictions == 4


@given(rows=st.integers(1, 12), parts=st.integers(1, 15))
def test_parts_are_the_batch_in_order_and_none_is_empty(rows, parts):
    batch = batch_of_step(windows(12), rows, 3, 0)
    found = split(batch, parts)
    assert torch.equal(torch.cat([part.ids for part in found]), batch.ids)
    assert torch.equal(torch.cat([part.attention for part in found]), batch.attention)
    assert torch.equal(torch.cat([part.counted for part in found]), batch.counted)
    assert tuple(w for part in found for w in part.windows) == batch.windows
    sizes = [len(part.ids) for part in found]
    assert min(sizes) >= max(sizes) - 1
    assert min(sizes) >= 1
    assert sum(part.predictions for part in found) == batch.predictions


def test_more_windows_than_there_are_is_refused_in_one_line():
    with pytest.raises(RecipeError, match=r"^error\[QF-246\]: batch_size 9 is more than the 8 windows"):
        batch_of_step(windows(8), 9, 0, 0)


def test_seeds_of_different_names_and_numbers_differ():
    seeds = {seed_of(name, a, b) for name in ("step", "prepare") for a in range(12) for b in range(12)}
    assert len(seeds) == 2 * 144
    assert all(0 <= seed < 2**63 for seed in seeds)
