"""Formats that store the value of the lowest code: what GGUF's Q4_1 computes, and the laws of every other format."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.blocks import spread, tiles
from quantforge.numerics.formats import Format, from_json, parse, to_json
from quantforge.numerics.grids import int_grid
from quantforge.numerics.qtensor import quantize
from quantforge.numerics.ranges import RULES, Range, minmax, real_zero, rule
from quantforge.solvers.gptq import GPTQ
from quantforge.solvers.hqq import HQQ
from quantforge.solvers.rtn import RTN

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = st.builds(
    Format,
    st.builds(int_grid, st.integers(1, 8)),
    st.sampled_from([(1, 8), (1, 5), (1, None), (None, None), (2, 3)]),
    st.just(False),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.just(False),
    st.just(True),
)
KINDS = st.sampled_from(["normal", "far", "constant", "zero", "tiny-minimum"])
SEEDS = st.integers(0, 999)
Q4_1 = parse("int4-g32-asym-fp16-min-fp16")


def matrix(kind, seed, rows=3, cols=20):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return {
        "normal": x,
        "far": x * 0.01 - 5,
        "constant": torch.full_like(x, -1.7),
        "zero": torch.zeros_like(x),
        "tiny-minimum": x.abs() + 1e-5,
    }[kind]


@given(FORMATS)
def test_a_format_reads_back_from_its_own_name_and_from_json(fmt):
    assert parse(str(fmt)) == fmt
    assert from_json(to_json(fmt)) == fmt


def test_the_name_says_what_is_stored():
    assert str(Q4_1) == "int4-g32-asym-fp16-min-fp16"
    assert Q4_1.short == "int4-g32-asym-min"
    assert parse("int4-g32-asym-fp16-zero-fp16") != Q4_1
    assert Q4_1.nbits((4, 64)) == 4 * 64 * 5
    assert Q4_1.with_scale(torch.bfloat16) == parse("int4-g32-asym-bf16-min-bf16")


def test_what_is_symmetric_or_quantizes_its_zero_points_has_no_minima():
    with pytest.raises(ValueError, match="is no format"):
        parse("int4-g32-sym-fp16-min-fp16")
    for wrong in ({"symmetric": True}, {"zero": None}, {"zero": to_json(parse("int3-tensor-sym"))}):
        with pytest.raises(ValueError, match="only what is asymmetric has minima"):
            from_json({**to_json(Q4_1), **wrong})


def test_files_of_earlier_versions_say_nothing_of_minima():
    old = to_json(parse("int4-g32-asym-fp16-zero-fp16"))
    del old["minimum"]
    assert from_json(old) == parse("int4-g32-asym-fp16-zero-fp16")


@given(fmt=FORMATS, kind=KINDS, seed=SEEDS, name=st.sampled_from(sorted(RULES)))
def test_no_other_code_is_nearer_under_the_stored_scale_and_minimum(fmt, kind, seed, name):
    w = matrix(kind, seed)
    q = quantize(w, rule(name)(w, fmt), fmt)
    scale = spread(q.scale.double(), q.shape, fmt.block).expand(q.shape)
    low = spread(q.zero.double(), q.shape, fmt.block).expand(q.shape)
    values = low[..., None] + scale[..., None] * torch.arange(len(fmt.grid.values), dtype=torch.float64)
    distances = (w.double()[..., None] - values).abs()
    chosen = distances.gather(-1, q.codes.long()[..., None])[..., 0]
    assert (chosen <= distances.amin(-1) + 1e-5 * scale + 1e-6 * w.abs()).all()


@given(fmt=FORMATS, kind=KINDS, seed=SEEDS)
def test_values_are_code_times_scale_plus_minimum_in_float32(fmt, kind, seed):
    w = matrix(kind, seed)
    q = quantize(w, minmax(w, fmt), fmt)
    assert (q.scale.dtype, q.zero.dtype, q.zero.shape) == (fmt.scale, fmt.zero, q.scale.shape)
    scale, low = (spread(part.float(), q.shape, fmt.block).expand(q.shape).numpy() for part in (q.scale, q.zero))
    expected = torch.from_numpy(q.codes.numpy().astype(np.float32) * scale + low)
    assert torch.equal(q.dequantize(torch.float32), expected)
    assert torch.equal(q.dequantize(torch.bfloat16), expected.bfloat16())
    assert torch.equal(q.dequantize(), expected.to(fmt.scale))
    zero = spread(q.zero_points(), q.shape, fmt.block)
    close = (fmt.grid.decode(q.codes) - zero) * torch.from_numpy(scale)
    torch.testing.assert_close(close, expected, rtol=1e-4, atol=1e-5 * float(q.scale.max()))


@given(fmt=FORMATS, kind=KINDS, seed=SEEDS)
def test_minmax_errs_by_half_a_step_and_by_what_rounding_scale_and_minimum_takes(fmt, kind, seed):
    w = matrix(kind, seed)
    q = quantize(w, minmax(w, fmt), fmt)
    error = tiles((w.double() - q.dequantize(torch.float64)).abs(), fmt.block, fill=0.0).amax(-1)
    steps, largest = fmt.grid.high - fmt.grid.low, tiles(w.abs().double(), fmt.block).amax(-1)
    eps = [torch.finfo(dtype).eps for dtype in (fmt.scale, fmt.zero)]
    assert (error <= q.scale.double() * (0.5 + steps * eps[0]) + largest * (eps[1] + 1e-6)).all()


@given(fmt=FORMATS, kind=KINDS, seed=SEEDS)
def test_quantizing_twice_changes_nothing(fmt, kind, seed):
    w = matrix(kind, seed)
    r = minmax(w, fmt)
    q = quantize(w, r, fmt)
    again = quantize(q.dequantize(torch.float32), r, fmt)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.zero, q.zero)


@given(fmt=FORMATS, kind=KINDS, seed=SEEDS, name=st.sampled_from(sorted(RULES)))
def test_zero_points_of_a_range_are_those_of_the_stored_minima(fmt, kind, seed, name):
    w = matrix(kind, seed)
    r = rule(name)(w, fmt)
    torch.testing.assert_close(r.zero, quantize(w, r, fmt).zero_points(), rtol=1e-6, atol=2e-6)


def test_a_range_without_regard_to_minima_is_rounded_before_codes_are_chosen():
    fmt = parse("int4-channel-asym-fp32-min-bf16")
    w = torch.linspace(1001.6, 1016.6, 16)[None]
    q = quantize(w, Range(torch.ones(1, 1), torch.full((1, 1), -8 - 1001.6)), fmt)
    assert q.zero.item() == 1000
    assert q.codes.tolist() == [[*range(2, 16), 15, 15]]
    assert real_zero(torch.full((1, 1), -1009.6), fmt).item() == pytest.approx(-1009.6)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-8, 6e4, 1e30, 3.4e38])
def test_blocks_beyond_float16_stay_finite(size):
    w = torch.tensor([[-1.0, 0.5, 0.25, 1.0]]) * size
    for name in RULES:
        q = quantize(w, rule(name)(w, Q4_1), Q4_1)
        assert (q.scale > 0).all()
        assert q.dequantize(torch.float32).isfinite().all()


@given(fmt=FORMATS, name=st.sampled_from(sorted(RULES)))
def test_a_block_of_zeros_is_exact(fmt, name):
    w = torch.zeros(4, 10)
    assert not quantize(w, rule(name)(w, fmt), fmt).dequantize(torch.float32).any()


def test_rows_cut_out_decode_as_they_did():
    w = matrix("far", 0, 5, 64)
    q = quantize(w, minmax(w, Q4_1), Q4_1)
    assert torch.equal(q.rows(1, 4).dequantize(torch.float32), q.dequantize(torch.float32)[1:4])


def test_blocks_far_from_zero_lose_less_than_with_integer_zero_points():
    w = matrix("far", 1, 8, 64)
    by_minima, by_integers = (
        (w - quantize(w, minmax(w, fmt), fmt).dequantize(torch.float32)).norm()
        for fmt in (Q4_1, parse("int4-g32-asym-fp16"))
    )
    assert by_minima < 0.1 * by_integers


@pytest.mark.parametrize("w", ["normal", "outliers", "one-sign", "half-zero"])
def test_solvers_store_what_the_format_says(problem, w):
    layer = problem("int4-g16-asym-fp16-min-fp16", w=w)
    losses = {}
    for solver in (RTN(), GPTQ(), HQQ()):
        q = solver.solve(layer).base
        assert q.format == layer.format
        value = q.dequantize(torch.float32)
        assert torch.equal(quantize(value, Range(q.scale.float(), q.zero_points()), q.format).codes, q.codes)
        losses[type(solver).__name__] = layer.loss(value)
    assert losses["GPTQ"] <= losses["RTN"] * (1 + 1e-6)
