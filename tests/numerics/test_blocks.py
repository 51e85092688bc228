"""Blocks partition a matrix: every element in exactly one, short ones at the end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.blocks import Flat, counts, extents, spread, tiles

BLOCKS = st.tuples(st.none() | st.integers(1, 5), st.none() | st.integers(1, 7))
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 20))


def cut(x, block):
    """Cut by slicing: a list of rows of lists of blocks, the short ones as they are."""
    rows, cols = block[0] or x.shape[0], block[1] or x.shape[1]
    return [list(band.split(cols, 1)) for band in x.split(rows, 0)]


@given(shape=SHAPES, block=BLOCKS, seed=st.integers(0, 9))
def test_tiles_are_the_slices_and_padding_adds_no_new_value(shape, block, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    got, expected = tiles(x, block), cut(x, block)
    assert got.shape[:2] == counts(shape, block) == (len(expected), len(expected[0]))
    for i, band in enumerate(expected):
        for j, part in enumerate(band):
            assert set(got[i, j].tolist()) == set(part.flatten().tolist())


@given(shape=SHAPES, block=BLOCKS)
def test_tiles_filled_with_zeros_keep_each_sum(shape, block):
    x = torch.arange(1, 1 + shape[0] * shape[1], dtype=torch.float64).reshape(shape)
    expected = [[float(part.sum()) for part in band] for band in cut(x, block)]
    assert tiles(x, block, fill=0.0).sum(-1).tolist() == expected


@given(shape=SHAPES, block=BLOCKS)
def test_spread_gives_every_element_the_value_of_its_own_block(shape, block):
    down, across = counts(shape, block)
    stat = torch.arange(down * across, dtype=torch.float64).reshape(down, across)
    rows, cols = extents(shape, block)
    expected = [[float(stat[i // rows, j // cols]) for j in range(shape[1])] for i in range(shape[0])]
    assert spread(stat, shape, block).expand(shape).tolist() == expected


@pytest.mark.parametrize(
    ("block", "expected"),
    [((1, 64), (1, 64)), ((1, None), (1, 100)), ((None, None), (6, 100)), ((None, 1), (6, 1))],
)
def test_none_means_the_whole_axis(block, expected):
    assert extents((6, 100), block) == expected


@pytest.mark.parametrize("block", [(1, 10**12), (10**12, 10**12), (10**12, None), Flat(10**12)])
def test_a_block_larger_than_the_matrix_takes_no_more_memory_than_the_matrix(block):
    x = torch.arange(12.0).reshape(3, 4)
    down, across = counts((3, 4), block)
    assert tiles(x, block).numel() == tiles(x, block, fill=0.0).numel() == 12
    assert torch.equal(tiles(x, block).flatten(), x.flatten())
    stat = torch.arange(float(down * across)).reshape(down, across)
    assert torch.equal(spread(stat, (3, 4), block).expand(3, 4), stat.expand(3, 4))
