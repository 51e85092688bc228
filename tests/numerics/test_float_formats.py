"""FP8 and FP4, scales that are powers of two or differ by shifts, and what MX and NV formats make of them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.formats import E8M0, NAMED, parse
from quantforge.numerics.grids import find, shift_grid
from quantforge.numerics.qtensor import fit, quantize

SEEDS = st.integers(0, 9999)
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def sample(seed, rows=4, cols=128):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=rng) * torch.rand(rows, cols // 32, generator=rng).mul(
        6
    ).exp().repeat_interleave(32, 1)


def error(x, notation, rule="minmax"):
    fmt = parse(notation)
    return float((quantize(x, fit(x, fmt, rule), fmt).dequantize(torch.float32) - x).square().sum())


@pytest.mark.parametrize("name", DTYPES)
def test_every_code_is_the_value_that_torch_has_for_it(name):
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).float()
    finite = codes[codes.isfinite()].unique()
    assert torch.equal(torch.tensor(find(name).values), finite)


@pytest.mark.parametrize("name", DTYPES)
@given(seed=SEEDS)
def test_rounding_is_the_cast_of_torch_after_clamping(name, seed):
    grid, x = find(name), sample(seed)
    assert torch.equal(grid.round(x), x.clamp(grid.low, grid.high).to(DTYPES[name]).float())
    assert torch.equal(grid.decode(grid.encode(x)), grid.round(x))


def test_ties_go_to_the_even_mantissa_and_nothing_finite_becomes_a_nan():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 3e38])
    assert find("e2m1").round(x).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0]
    for name in DTYPES:
        assert find(name).round(torch.tensor([3e38, -3e38])).tolist() == [find(name).high, find(name).low]


@pytest.mark.parametrize(("name", "low", "high"), [("e4m3", -6, 8), ("e5m2", -13, 15)])
def test_a_4_bit_float_shifted_within_the_window_is_an_8_bit_float_exactly(name, low, high):
    values = torch.tensor(find("e2m1").values)
    for k in range(low, high + 1):
        moved = values * 2.0**-k
        assert torch.equal(moved.to(DTYPES[name]).float(), moved)
    for k in (low - 1, high + 1):
        moved = values * 2.0**-k
        assert not torch.equal(moved.to(DTYPES[name]).float(), moved)


@given(seed=SEEDS, rule=st.sampled_from(["minmax", "mse"]))
def test_scales_that_are_powers_of_two_are(seed, rule):
    x = sample(seed)
    fmt = parse("e2m1-g32-e8m0")
    q = quantize(x, fit(x, fmt, rule), fmt)
    assert q.scale.dtype == E8M0
    assert torch.equal(q.scale.float().log2(), q.scale.float().log2().round())
    if rule == "minmax":  # upwards: nothing is clipped, and half as much would clip
        largest = x.abs().view(4, 4, 32).amax(-1)
        assert (largest <= 6 * q.scale.float()).all()
        assert (largest > 3 * q.scale.float()).all()


@given(seed=SEEDS, rule=st.sampled_from(["minmax", "mse"]))
def test_shifted_scales_differ_from_the_largest_of_their_row_by_a_shift_within_the_window(seed, rule):
    x, fmt = sample(seed), NAMED["fp4-m2-g64"]
    q = quantize(x, fit(x, fmt, rule), fmt)
    scale = q.scale.dequantize(torch.float32)
    shifts = (scale.amax(1, keepdim=True) / scale).log2()
    assert torch.equal(shifts, shifts.round())
    assert shifts.max() <= 8
    if rule == "minmax":
        reached = (scale > scale.amax(1, keepdim=True) * 2.0**-8).flatten()
        assert (x.abs().view(4, 2, 64).amax(-1) <= 6 * scale * (1 + 1e-5)).flatten()[reached].all()


@given(seed=SEEDS)
def test_the_better_of_two_shifts_is_no_worse_than_either(seed):
    x, fmt = sample(seed), NAMED["fp4-m2-g64"]
    best = quantize(x, fit(x, fmt, "mse"), fmt)
    chosen = best.scale.dequantize(torch.float32)
    blocks = x.view(4, 2, 64)
    for factor in (0.5, 2.0):
        other = (chosen * factor)[..., None]
        theirs = (find("e2m1").round(blocks / other) * other - blocks).square().sum(-1)
        ours = (best.dequantize(torch.float32) - x).view(4, 2, 64).square().sum(-1)
        free = fit(x, parse("e2m1-g64"), "mse").scale
        neighbours = ((chosen * factor) / free).log2().abs() < 1  # the two between which the free scale lies
        assert (ours <= theirs * (1 + 1e-4) + 1e-9)[neighbours].all()


def test_what_constraints_on_scales_cost_on_normal_numbers():
    """The relative squared errors of groups of 128 that are known for E2M1: free, M1 upwards, M2 better of two."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    energy = float(x.square().sum())
    assert error(x, "e2m1-g128") / energy == pytest.approx(0.01186, rel=0.01)
    assert error(x, "e2m1-g128-e8m0") / energy == pytest.approx(0.01561, rel=0.01)
    assert error(x, "e2m1-g128-e8m0", "mse") < error(x, "e2m1-g128-e8m0")
    shifted = replace(NAMED["fp4-m2-g64"], block=(1, 128))
    upwards, better = (
        float((quantize(x, fit(x, shifted, rule), shifted).dequantize(torch.float32) - x).square().sum()) / energy
        for rule in ("minmax", "mse")
    )
    assert better < min(upwards, 0.01369)


def test_micro_formats_have_their_bits():
    for name, bits in (("mxfp4", 4.25), ("mxfp8", 8.25), ("nvfp4", 4.5)):
        assert NAMED[name].nbits((128, 1024)) / (128 * 1024) == pytest.approx(bits, abs=1e-3)
    assert NAMED["fp4-m2-g64"].nbits((128, 1024)) / (128 * 1024) == 4 + 4 / 64 + 32 / 1024


def test_shifts_are_few():
    assert shift_grid(3).values == (0.125, 0.25, 0.5, 1.0)
    assert find("shift8") == shift_grid(8)
    with pytest.raises(ValueError, match="1 to 31 steps"):
        shift_grid(32)
    assert find("narrow4").values[0] == -7.0
    assert math.isclose(find("narrow8").high, 127)
