"""A code stands for the nearest value of its grid, with the documented side taken on ties."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.grids import (
    FloatGrid,
    Grid,
    af4,
    bnb_fp4,
    dynamic8,
    find,
    int_grid,
    minifloat,
    nf_grid,
    quantile_grid,
)

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


NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
TABLES = [nf_grid(b) for b in range(2, 9)] + [af4(), bnb_fp4(), dynamic8()]
TABLES += [minifloat(e, m) for e, m in ((2, 1), (3, 2), (2, 3), (4, 3), (5, 2), (3, 0), (1, 2))]


def test_nf4_is_the_published_table_to_the_last_bit():
    assert list(nf_grid(4).values) == NF4


@pytest.mark.parametrize(
    ("bits", "values"),
    [
        (2, [-1, 0, 0.435818, 1]),
        (3, [-1, -0.535023, -0.246931, 0, 0.183337, 0.381994, 0.622986, 1]),
    ],
)
def test_narrower_normal_floats_follow_the_same_construction(bits, values):
    assert nf_grid(bits).values == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_floats_are_normal_quantiles_at_equal_steps_of_probability_on_either_side(bits):
    values = nf_grid(bits).values
    half = 2 ** (bits - 1)
    assert len(values) == 2**bits
    assert (values[0], values[half - 1], values[-1]) == (-1, 0, 1)
    top = 1 - (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2
    scale = NormalDist().inv_cdf(top)
    for side in (values[half - 1 :], [-v for v in values[half - 1 :: -1]]):
        steps = [b - a for a, b in pairwise(NormalDist().cdf(v * scale) for v in side)]
        assert steps == pytest.approx([(top - 0.5) / len(steps)] * len(steps), rel=1e-4)


@pytest.mark.parametrize("grid", TABLES, ids=lambda g: g.name)
@given(data=st.data())
def test_a_table_encodes_as_a_search_through_all_its_values_does_with_its_own_side_on_ties(grid, data):
    values = torch.tensor(grid.values, dtype=torch.float64)
    middles = (values.float()[1:] + values.float()[:-1]) / 2
    i = data.draw(st.lists(st.integers(0, len(middles) - 1), min_size=1, max_size=20))
    near = [
        middles[i],
        torch.nextafter(middles[i], torch.tensor(torch.inf)),
        torch.nextafter(middles[i], values[0].float()),
    ]
    x = torch.cat([*near, torch.tensor(data.draw(NUMBERS)) / 600 * float(values[-1]) * 1.1])
    distance = (values - x.double()[:, None]).abs()
    # a middle that float32 cannot hold may fall to either side
    best, got = distance.argmin(1), grid.encode(x).long()
    slack = 1e-7 * float(values[-1])
    differ = best != got
    assert (distance.gather(1, got[:, None])[:, 0] - distance.amin(1))[differ].le(slack).all()
    exact = (values[1:] + values[:-1]) / 2 == middles.double()
    lower = exact.nonzero()[:, 0]
    if isinstance(grid, FloatGrid):  # to an even number of steps from zero; of powers of two alone, to the larger
        steps = (torch.arange(len(values)) - grid.values.index(0.0)).abs()
        chosen = torch.where(steps[lower] % 2 == 0, lower, lower + 1)
        if not grid.mantissa:
            larger = torch.where(values[lower] < 0, lower, lower + 1)
            chosen = torch.where(torch.minimum(steps[lower], steps[lower + 1]) == 0, chosen, larger)
    else:
        chosen = lower
    assert torch.equal(grid.encode(middles[exact]).long(), chosen)


@pytest.mark.parametrize("grid", TABLES, ids=lambda g: g.name)
def test_every_value_of_a_table_is_its_own_code_and_a_float32_number(grid):
    values = grid.decode(torch.arange(len(grid.values), dtype=torch.uint8))
    assert tuple(values.tolist()) == grid.values
    assert torch.equal(grid.round(values), values)
    assert [(a, b) for a, b in pairwise(grid.values) if not a < b] == ([(0, 0)] if grid.name == "fp4" else [])
    assert 0.0 in grid.values


@pytest.mark.parametrize(
    ("kind", "dtype"), [((4, 3), torch.float8_e4m3fn), ((5, 2), torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_eight_bit_floats_are_those_of_torch(kind, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    assert list(minifloat(*kind).values) == sorted({v for v in every.tolist() if math.isfinite(v)})


@pytest.mark.parametrize(
    ("kind", "dtype"), [((4, 3), torch.float8_e4m3fn), ((5, 2), torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_eight_bit_floats_saturate_where_torch_overflows_and_else_round_as_near(kind, dtype):
    grid = minifloat(*kind)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * grid.high / 3
    got, torchs = grid.round(x), x.clamp(grid.low, grid.high).to(dtype).float()
    assert torch.equal((got - x).abs(), (torchs - x).abs())
    assert grid.round(torch.tensor([1e9, -1e9, torch.inf])).tolist() == [grid.high, grid.low, grid.high]


def test_narrow_floats_are_those_of_the_microscaling_standard():
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert list(minifloat(2, 1).values) == sorted({*positive, *(-v for v in positive)})
    highest = [minifloat(e, m).high for e, m in ((3, 2), (2, 3), (4, 3), (5, 2))]
    assert highest == [28, 7.5, 448, 57344]
    assert min(v for v in minifloat(4, 3).values if v > 0) == 2**-9


@given(k=st.integers(-6, 8))
def test_four_bit_floats_times_a_power_of_two_are_eight_bit_floats(k):
    assert {v * 2.0**-k for v in minifloat(2, 1).values} <= set(minifloat(4, 3).values)


def test_fp4_of_bitsandbytes_is_not_e2m1_and_splits_where_it_splits():
    fp4 = bnb_fp4()
    assert [v for v in fp4.values if v > 0] == pytest.approx([1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
    assert fp4.values != tuple(v / 6 for v in minifloat(2, 1).values)
    thresholds = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    magnitudes = [v for v in fp4.values if v >= 0][1:]
    for threshold, around in zip(thresholds, pairwise(magnitudes), strict=True):
        for sign in (1, -1):
            x = sign * torch.tensor([threshold - 1e-6, threshold + 1e-6])
            assert (sign * fp4.round(x)).tolist() == list(around)


def test_the_dynamic_table_has_seven_decades_and_lacks_minus_one():
    values = dynamic8().values
    assert len(values) == 256
    assert min(v for v in values if v > 0) == pytest.approx(5.5e-7)
    assert (values[-1], values[0]) == (1.0, pytest.approx(-0.99297, abs=1e-5))
    assert {-v for v in values if v < 0} == {v for v in values if v > 0} - {1.0}
    for i in range(7):
        inside = [v for v in values if 10.0 ** (i - 7) < v < 10.0 ** (i - 6) and v < 1]
        assert len(inside) == 2**i


@given(bits=st.integers(2, 6), seed=st.integers(0, 99))
def test_quantile_codes_lie_midway_between_quantiles_and_one_of_them_is_zero(bits, seed):
    mean = (seed - 50) / 100
    grid = quantile_grid(bits, _quantile(mean))
    edges = [_quantile(mean)(i / (2**bits + 1)) for i in range(2**bits + 1)]
    edges[0] = edges[1]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    top = max(map(abs, middles))
    nearest = min(middles, key=abs)
    expected = sorted({0.0 if v == nearest else v / top for v in middles})
    assert grid.values == pytest.approx(expected, abs=1e-6)
    assert len(grid.values) <= 2**bits
    assert max(map(abs, grid.values)) == 1
    assert 0.0 in grid.values


def _quantile(mean):
    return lambda p: NormalDist(mean, 1).inv_cdf(p) if p > 0 else -math.inf


@pytest.mark.parametrize("quantile", [lambda p: 0.0, lambda p: 3.0, lambda p: -2.0])
def test_a_table_of_what_is_all_the_same_holds_it_and_zero(quantile):
    values = set(quantile_grid(4, quantile).values)
    assert 0.0 in values
    assert quantile(0.5) == 0 or math.copysign(1, quantile(0.5)) in values


@pytest.mark.parametrize("name", ["int4", "nf4", "nf3", "fp4", "af4", "e2m1", "e4m3", "dynamic8"])
def test_a_grid_is_found_by_its_own_name(name):
    assert find(name).name == name


@pytest.mark.parametrize("name", ["", "nf1", "nf9", "int9", "e9m9", "e6m6", "fp5", "custom", "NF4"])
def test_what_is_no_grid_is_not_found(name):
    assert find(name) is None


@pytest.mark.parametrize(("exponent", "mantissa"), [(0, 3), (5, 3), (2, -1)])
def test_floats_that_cannot_be_are_refused(exponent, mantissa):
    with pytest.raises(ValueError, match="does not fit into 8 bits"):
        minifloat(exponent, mantissa)


@pytest.mark.parametrize("bits", [1, 9])
def test_normal_floats_of_one_bit_or_too_many_are_refused(bits):
    with pytest.raises(ValueError, match=f"2 to 8 bits, not {bits}"):
        nf_grid(bits)
