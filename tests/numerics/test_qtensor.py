"""Codes are the nearest to the weight under the scale that is stored, and decode to the same value every time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.blocks import spread
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.grids import int_grid
from quantforge.numerics.qtensor import QTensor, from_values, quantize
from quantforge.numerics.ranges import RULES, Range, minmax, rule

FORMATS = st.builds(
    Format,
    st.builds(int_grid, st.integers(1, 8)),
    st.sampled_from([(1, 8), (1, 7), (1, None), (None, None), (2, 3)]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
SEEDS = st.integers(0, 999)


def matrix(seed, rows=4, cols=20):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=rng) * torch.rand(rows, 1, generator=rng) * 10


@given(fmt=FORMATS, seed=SEEDS, name=st.sampled_from(sorted(RULES)))
def test_no_other_code_is_nearer_under_the_stored_scale(fmt, seed, name):
    w = matrix(seed)
    q = quantize(w, rule(name)(w, fmt), fmt)
    scale = spread(q.scale.double(), q.shape, fmt.block).expand(q.shape)[..., None]
    zero = 0.0 if q.zero is None else spread(q.zero.double(), q.shape, fmt.block).expand(q.shape)[..., None]
    choices = scale * (torch.tensor(fmt.grid.values, dtype=torch.float64) - zero)
    distances = (w.double()[..., None] - choices).abs()
    chosen = distances.gather(-1, q.codes.long()[..., None])[..., 0]
    assert (chosen <= distances.amin(-1) + 1e-5 * scale[..., 0]).all()


@given(fmt=FORMATS, seed=SEEDS)
def test_dequantize_is_scale_times_value_minus_zero(fmt, seed):
    w = matrix(seed)
    q = quantize(w, minmax(w, fmt), fmt)
    value = q.codes.double() - 2 ** (fmt.grid.bits - 1)
    if q.zero is not None:
        value = value - spread(q.zero.double(), q.shape, fmt.block)
    exact = value * spread(q.scale.double(), q.shape, fmt.block)
    assert q.dequantize().dtype == fmt.scale
    assert torch.equal(q.dequantize(torch.float64), exact)
    assert torch.equal(q.dequantize(torch.float32), exact.float())


@given(fmt=FORMATS, seed=SEEDS)
def test_quantizing_twice_changes_nothing(fmt, seed):
    w = matrix(seed)
    r = minmax(w, fmt)
    q = quantize(w, r, fmt)
    again = quantize(q.dequantize(torch.float32), r, fmt)
    assert torch.equal(again.codes, q.codes)


@given(fmt=FORMATS, seed=SEEDS)
def test_larger_weights_never_get_smaller_values(fmt, seed):
    w = matrix(seed, 1, 64).sort().values
    fmt = Format(fmt.grid, (1, None), fmt.symmetric, fmt.scale)
    assert (quantize(w, minmax(w, fmt), fmt).dequantize(torch.float32).diff() >= 0).all()


@given(fmt=FORMATS, seed=SEEDS)
def test_quantize_leaves_weight_and_range_alone_and_keeps_the_stored_dtypes(fmt, seed):
    w = matrix(seed)
    r = minmax(w, fmt)
    before = w.clone(), r.scale.clone(), r.zero.clone()
    q = quantize(w, r, fmt)
    assert all(torch.equal(a, b) for a, b in zip(before, (w, r.scale, r.zero), strict=True))
    assert (q.codes.dtype, q.scale.dtype, q.shape) == (torch.uint8, fmt.scale, (4, 20))
    assert torch.equal(q.scale.float(), r.scale)
    assert (q.zero is None) == fmt.symmetric
    if q.zero is not None:
        assert q.zero.dtype == torch.int8
        assert torch.equal(q.zero.float(), r.zero)
    assert q.nbits == fmt.nbits((4, 20))


def test_rounding_is_half_to_even():
    fmt = parse("int4-channel-sym")
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]])
    q = quantize(w, Range(torch.ones(1, 1), torch.zeros(1, 1)), fmt)
    assert q.dequantize().tolist() == [[0, 2, 2, 0, -2, -2, 4]]


@given(fmt=FORMATS, seed=SEEDS)
def test_values_on_the_grid_are_stored_as_they_are(fmt, seed):
    rng = torch.Generator().manual_seed(seed)
    value = torch.randint(int(fmt.grid.low), int(fmt.grid.high) + 1, (4, 20), generator=rng).float()
    r = minmax(matrix(seed), fmt)
    q = from_values(value, r, fmt)
    assert torch.equal(fmt.grid.decode(q.codes), value)


@given(start=st.integers(0, 5), stop=st.integers(0, 5), text=st.sampled_from(["int4-g8-asym", "int4-channel-sym"]))
def test_rows_cut_out_decode_as_they_did(start, stop, text):
    w = matrix(0, 5)
    q = quantize(w, minmax(w, parse(text)), parse(text))
    assert torch.equal(q.rows(start, stop).dequantize(), q.dequantize()[start:stop])


def test_rows_that_share_a_scale_cannot_be_cut_apart():
    fmt = parse("int4-tensor-sym")
    w = matrix(0)
    with pytest.raises(ValueError, match="int4-tensor-sym-fp32 shares scales between rows"):
        quantize(w, minmax(w, fmt), fmt).rows(0, 1)


def test_a_range_of_another_shape_is_refused():
    fmt = parse("int4-g8-sym")
    with pytest.raises(ValueError, match=r"shape \(4, 1\) does not fit \(4, 20\)"):
        quantize(matrix(0), Range(torch.ones(4, 1), torch.zeros(4, 1)), fmt)


def test_eight_bit_asymmetric_spans_the_whole_of_int8():
    fmt = parse("int8-channel-asym")
    q = quantize(
        torch.tensor([[0.0, 255.0], [-255.0, 0.0]]), minmax(torch.tensor([[0.0, 255.0], [-255.0, 0.0]]), fmt), fmt
    )
    assert isinstance(q, QTensor)
    assert q.zero is not None
    assert q.zero.flatten().tolist() == [-128, 127]
    assert q.dequantize().tolist() == [[0, 255], [-255, 0]]
