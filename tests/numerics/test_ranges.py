"""Ranges: every value within half a step, zero exact, scales as stored, degenerate blocks finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.blocks import spread, tiles
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.grids import int_grid
from quantforge.numerics.qtensor import quantize
from quantforge.numerics.ranges import RULES, minmax, mse, percentile, rule, stored

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = st.builds(
    Format,
    st.builds(int_grid, st.integers(1, 8)),
    st.sampled_from([(1, 8), (1, 5), (1, None), (None, None), (2, 3)]),
    st.booleans(),
    st.sampled_from(DTYPES),
)
KINDS = ["normal", "positive", "negative", "constant", "zero", "one-value", "outlier", "ties"]


def matrix(kind, rows=3, cols=19, seed=0):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if kind == "positive":
        x = x.abs() + 5
    if kind == "negative":
        x = -x.abs() - 5
    if kind == "constant":
        x = torch.full_like(x, -1.7)
    if kind == "zero":
        x = torch.zeros_like(x)
    if kind == "one-value":
        x = torch.zeros_like(x)
        x[-1, -1] = 3.0
    if kind == "outlier":
        x[0, 0] = 1e4
    if kind == "ties":
        x = (x * 4).round() / 2
    return x


def errors_in_steps(w, r, fmt):
    """Return |W − Ŵ| / scale for every element, in float64."""
    shape = (w.shape[0], w.shape[1])
    error = (w.double() - quantize(w, r, fmt).dequantize(torch.float32).double()).abs()
    return error / spread(r.scale, shape, fmt.block).double()


def allowed(fmt):
    """Return half a step, plus what rounding the scale to its stored dtype takes off the ends of the range."""
    steps = fmt.grid.high - fmt.grid.low
    return 0.5 + steps * (0.5 * torch.finfo(fmt.scale).eps + 1e-6)


@given(fmt=FORMATS, kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_minmax_errs_by_at_most_half_a_step(fmt, kind, seed):
    w = matrix(kind, seed=seed)
    assert errors_in_steps(w, minmax(w, fmt), fmt).max() <= allowed(fmt)


@given(fmt=FORMATS, kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_minmax_takes_no_more_room_than_the_values_do(fmt, kind, seed):
    w = matrix(kind, seed=seed)
    blocks = tiles(w, fmt.block)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if fmt.symmetric else high - low
    needed = torch.where(span > 0, span / (2**fmt.grid.bits - 1), 1.0)
    torch.testing.assert_close(minmax(w, fmt).scale, needed, rtol=torch.finfo(fmt.scale).eps, atol=1e-30)


@pytest.mark.parametrize("name", RULES)
@given(fmt=FORMATS, kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_every_rule_keeps_scales_and_zero_points_to_what_is_stored(name, fmt, kind, seed):
    w = matrix(kind, seed=seed)
    before = w.clone()
    r = rule(name)(w, fmt, torch.rand(w.shape[1], generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(w, before)
    assert r.scale.shape == r.zero.shape == tiles(w, fmt.block).shape[:2]
    assert (r.scale > 0).all()
    assert r.scale.isfinite().all()
    assert torch.equal(r.scale, r.scale.to(fmt.scale).float())
    assert torch.equal(r.zero, r.zero.round())
    assert r.zero.min() >= fmt.grid.low
    assert r.zero.max() <= fmt.grid.high
    if fmt.symmetric:
        assert not r.zero.any()


@pytest.mark.parametrize("name", RULES)
@given(fmt=FORMATS, kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_zero_is_stored_exactly_under_every_rule(name, fmt, kind, seed):
    w = matrix(kind, seed=seed)
    r = rule(name)(w, fmt)
    assert not quantize(torch.zeros_like(w), r, fmt).dequantize(torch.float32).any()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["minmax", "mse", "hessian"])
def test_symmetric_rows_of_one_sign_do_not_saturate(name, sign, bits):
    w = sign * torch.linspace(0.1, 1, 40)[None]
    fmt = parse(f"int{bits}-channel-sym")
    w_hat = quantize(w, rule(name)(w, fmt), fmt).dequantize()
    # a code book anchored at zero with half its codes reaches 0.467 of the maximum
    assert (w_hat[0, -1] * sign) >= (0.6 if bits == 2 else 0.8)
    assert errors_in_steps(w, minmax(w, fmt), fmt).max() <= allowed(fmt)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_groups_far_from_zero_are_reproduced(sign, bits):
    w = sign * torch.tensor([[10.0, 11.0]])
    fmt = parse(f"int{bits}-channel-asym")
    r = minmax(w, fmt)
    error = (w - quantize(w, r, fmt).dequantize()).abs().max()
    assert error <= r.scale.item() / 2 * (1 + 1e-5) <= 11 / (2**bits - 1) / 2 * (1 + 1e-4)


@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-35, 1e-20, 1.0, 1e20, 1e37])
def test_groups_of_any_size_keep_their_relative_accuracy(size, bits, kind):
    w = matrix("normal")
    w = w / w.abs().max() * size
    fmt = parse(f"int{bits}-g8-{kind}")
    error = (w.double() - quantize(w, minmax(w, fmt), fmt).dequantize().double()).abs().max() / size
    assert error <= 1 / (2**bits - 1) * (1 + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 6e4, 1e30, 1e38, 3.4e38])
def test_groups_beyond_the_scale_dtype_stay_finite(size, kind, dtype):
    w = torch.tensor([[-1.0, 0.5, 0.25, 1.0]]) * size
    fmt = parse(f"int4-channel-{kind}").with_scale(dtype)
    for name in RULES:
        r = rule(name)(w, fmt)
        assert (r.scale > 0).all()
        assert r.scale.isfinite().all()
        assert r.scale.to(dtype).isfinite().all()
        assert quantize(w, r, fmt).dequantize(torch.float32).isfinite().all()


@given(fmt=FORMATS, name=st.sampled_from(sorted(RULES)))
def test_a_block_of_zeros_has_scale_one_and_is_exact(fmt, name):
    w = torch.zeros(4, 10)
    r = rule(name)(w, fmt)
    assert (r.scale == 1).all()
    assert not quantize(w, r, fmt).dequantize(torch.float32).any()


@given(
    fmt=FORMATS,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
    power=st.sampled_from([2.0, 2.4]),
    weighted=st.booleans(),
)
def test_searched_ranges_are_never_worse_than_minmax(fmt, kind, seed, power, weighted):
    w = matrix(kind, 4, 120, seed)
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(seed)) if weighted else None
    factor = torch.ones(w.shape[1]) if importance is None else importance

    def loss(r):
        error = (w - quantize(w, r, fmt).dequantize(torch.float32)).abs().double().pow(power) * factor.double()
        return tiles(error, fmt.block, fill=0.0).sum(-1)

    assert (loss(mse(w, fmt, importance, power=power)) <= loss(minmax(w, fmt)) * (1 + 1e-4) + 1e-9).all()


def test_an_unweighted_search_is_never_worse_than_minmax_in_a_short_group_either():
    fmt, w = parse("int3-g8-asym"), matrix("normal", 300, 11)
    searched, plain = ((w - quantize(w, f(w, fmt), fmt).dequantize())[:, 8:].square() for f in (mse, minmax))
    assert (searched.sum(1) <= plain.sum(1) * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("fmt", ["int2-g16-asym", "int3-g16-asym", "int4-g16-sym", "int3-tensor-asym"])
def test_search_gains_on_weights_with_outliers(fmt):
    fmt = parse(fmt)
    w = matrix("normal", 16, 64) ** 3
    searched, plain = (w - quantize(w, f(w, fmt), fmt).dequantize() for f in (mse, minmax))
    assert searched.norm() < 0.95 * plain.norm()


def test_importance_moves_the_range_towards_what_matters():
    fmt = parse("int3-g32-asym")
    w = matrix("normal", 16, 64, seed=3)
    importance = torch.ones(64)
    importance[::8] = 1000.0
    plain, weighted = (w - quantize(w, mse(w, fmt, i), fmt).dequantize() for i in (None, importance))
    assert (weighted.square() * importance).sum() < 0.9 * (plain.square() * importance).sum()


def test_the_filling_of_a_short_group_has_no_weight_in_the_search():
    fmt = parse("int3-g64-asym")
    w, importance = matrix("normal", 8, 70), torch.rand(70, generator=torch.Generator().manual_seed(1))
    ragged = mse(w, fmt, importance)
    alone = mse(w[:, 64:], parse("int3-channel-asym"), importance[64:])
    assert torch.equal(ragged.scale[:, 1:], alone.scale)
    assert torch.equal(ragged.zero[:, 1:], alone.zero)


@given(fmt=FORMATS, seed=st.integers(0, 99), exponent=st.integers(-6, 6), name=st.sampled_from(sorted(RULES)))
def test_a_power_of_two_goes_into_the_scale_and_nowhere_else(fmt, seed, exponent, name):
    w = matrix("normal", seed=seed)
    r, scaled = rule(name)(w, fmt), rule(name)(w * 2.0**exponent, fmt)
    assert torch.equal(scaled.scale, r.scale * 2.0**exponent)
    assert torch.equal(scaled.zero, r.zero)


@pytest.mark.parametrize("name", RULES)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_rows_and_groups_do_not_see_each_other(name, bits, symmetric, seed):
    fmt = Format(int_grid(bits), (1, 6), symmetric)
    w = matrix("normal", 5, 18, seed=seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    r = rule(name)(w, fmt)
    assert torch.equal(rule(name)(w[order], fmt).scale, r.scale[order])
    parts = [rule(name)(p.contiguous(), fmt) for p in w.split(6, 1)]
    assert torch.equal(torch.cat([p.scale for p in parts], 1), r.scale)
    assert torch.equal(torch.cat([p.zero for p in parts], 1), r.zero)


@pytest.mark.parametrize("fmt", ["int4-g32-asym", "int3-channel-sym"])
def test_a_large_matrix_is_searched_as_its_rows_are(fmt):
    fmt = parse(fmt)
    w, importance = matrix("normal", 700, 256), torch.rand(700, 256, generator=torch.Generator().manual_seed(1))
    parts = [mse(a, fmt, b) for a, b in zip(w.split(90), importance.split(90), strict=True)]
    whole = mse(w, fmt, importance)
    assert torch.equal(whole.scale, torch.cat([p.scale for p in parts]))
    assert torch.equal(whole.zero, torch.cat([p.zero for p in parts]))


@given(fmt=FORMATS, seed=st.integers(0, 99))
def test_percentiles_clip_and_all_of_them_are_minmax(fmt, seed):
    w = matrix("normal", 4, 40, seed=seed)
    full = minmax(w, fmt)
    everything = percentile(w, fmt, p=100)
    assert torch.equal(everything.scale, full.scale)
    assert torch.equal(everything.zero, full.zero)
    assert (percentile(w, fmt, p=80).scale <= full.scale).all()


def test_percentile_leaves_a_lone_outlier_out():
    w = matrix("normal", 1, 2000)
    w[0, 7] = 1000.0
    fmt = parse("int4-channel-sym")
    assert minmax(w, fmt).scale.item() > 100
    assert percentile(w, fmt, p=99.9).scale.item() < 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scales_are_fixed_points_within_half_a_unit(dtype):
    x = torch.tensor([0.0, 1e-45, 1e-38, 1e-7, 0.1, 1 / 3, 1.0, 1e3, 7e4, 3e38])
    got = stored(x, dtype)
    info = torch.finfo(dtype)
    assert torch.equal(stored(got, dtype), got)
    assert got.min() == info.tiny
    inside = (x >= info.tiny) & (x <= info.max)
    assert ((got - x).abs() <= x * info.eps / 2)[inside].all()


def test_an_unknown_rule_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'minmix'; there are minmax, percentile, mse"):
        rule("minmix")
