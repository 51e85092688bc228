"""A code stands for the nearest value of its grid, with the documented side taken on ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.grids import Grid, int_grid

TABLE = Grid("table", (-1.0, -0.6, -0.25, 0.0, 0.1, 0.5, 1.0))
GRIDS = [TABLE, *(int_grid(b) for b in range(1, 9))]
NUMBERS = st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=64)


@given(grid=st.sampled_from(GRIDS), x=NUMBERS)
def test_encode_picks_a_nearest_value(grid, x):
    x = torch.tensor(x)
    got = (grid.decode(grid.encode(x)).double() - x.double()).abs()
    best = (torch.tensor(grid.values, dtype=torch.float64) - x.double()[:, None]).abs().amin(1)
    torch.testing.assert_close(got, best, rtol=0, atol=1e-6)


@given(grid=st.sampled_from(GRIDS), x=NUMBERS)
def test_encoding_is_monotone_and_leaves_its_input_alone(grid, x):
    x = torch.tensor(x).sort().values
    before = x.clone()
    codes = grid.encode(x).int()
    assert (codes.diff() >= 0).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_every_code_is_what_its_own_value_encodes_to(grid):
    codes = torch.arange(len(grid.values), dtype=torch.uint8)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert grid.decode(codes).tolist() == pytest.approx(grid.values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_an_integer_grid_is_the_twos_complement_range(bits):
    grid = int_grid(bits)
    assert grid.values == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert (grid.bits, grid.low, grid.high) == (bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_an_integer_grid_rounds_half_to_even():
    grid = int_grid(4)
    ties = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert grid.decode(grid.encode(ties)).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


def test_an_integer_grid_clamps_at_both_ends():
    far = torch.tensor([-9.0, -8.6, 7.6, 1e30, -torch.inf, torch.inf])
    assert int_grid(4).encode(far).tolist() == [0, 0, 15, 15, 0, 15]


def test_a_table_takes_the_lower_value_on_a_tie():
    grid = Grid("powers", (-1.0, 0.0, 0.5, 1.0))
    ties = torch.tensor([-0.5, 0.25, 0.75])
    assert grid.decode(grid.encode(ties)).tolist() == [-1.0, 0.0, 0.5]


@pytest.mark.parametrize(("size", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (17, 5), (256, 8)])
def test_a_table_has_as_many_bits_as_its_codes_need(size, bits):
    assert Grid("table", tuple(float(i) for i in range(size))).bits == bits


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_an_integer_grid_of_no_bits_or_too_many_is_refused(bits):
    with pytest.raises(ValueError, match=f"1 to 8 bits, not {bits}"):
        int_grid(bits)
