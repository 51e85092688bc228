"""Scales and zero points that are quantized themselves, real zero points, and blocks that run across rows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.blocks import Flat, counts, spread, tiles
from quantforge.numerics.formats import NAMED, Format, from_json, parse, to_json
from quantforge.numerics.grids import dynamic8, int_grid
from quantforge.numerics.qtensor import QTensor, encode, fit, quantize
from quantforge.numerics.ranges import RULES, minmax

SHAPES = st.tuples(st.sampled_from([1, 2, 5, 16, 17, 40]), st.sampled_from([1, 7, 16, 40, 64]))
DOUBLE = NAMED["nf4-dq"].scale
REAL = ["int3-g16-asym-fp16-zero-fp16", "int4-channel-asym-zero-fp32", "int2-g7-asym-bf16-zero-bf16"]


def matrix(shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng) * (torch.rand(shape[0], 1, generator=rng) + 0.1)


def test_double_quantization_costs_an_eighth_of_a_bit_where_plain_scales_cost_half_a_bit():
    shape = (256, 1024)
    codes = 4 * shape[0] * shape[1]
    assert parse("nf4").nbits(shape) - codes == 0.5 * shape[0] * shape[1]
    extra = parse("nf4-dq").nbits(shape) - codes
    assert extra == (8 / 64 + 32 / (64 * 256)) * shape[0] * shape[1] + 32  # and the mean
    assert (extra - 32) / (shape[0] * shape[1]) == pytest.approx(0.126953, abs=1e-6)


def test_a_few_blocks_still_cost_a_whole_scale_of_scales():
    assert parse("nf4-dq").nbits((2, 64)) == 2 * 64 * 4 + 2 * 8 + 32 + 32


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_doubly_quantized_scales_are_the_block_maxima_to_half_a_step_of_their_table(shape, seed):
    w = matrix(shape, seed)
    q = encode(w, parse("nf4-dq"))
    maxima = tiles(w.abs(), Flat(64), fill=0.0).amax(-1)
    centered = maxima - maxima.mean()
    top = spread(tiles(centered.abs(), Flat(256), fill=0.0).amax(-1), tuple(centered.shape), Flat(256))
    values = torch.tensor(dynamic8().values)
    # the widest gap, and what −1 is rounded up to
    bound = top * max(float(values.diff().max()) / 2, float(values[0]) + 1) * (1 + 1e-5) + 1e-7
    assert ((q.scale.dequantize() - maxima).abs() <= bound).all()
    assert float(q.scale.offset) == pytest.approx(float(maxima.mean()))


def test_doubly_quantized_scales_of_normal_weights_err_by_a_percent_at_most():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    maxima = tiles(w.abs(), Flat(64)).amax(-1)
    error = (encode(w, parse("nf4-dq")).scale.dequantize() - maxima).abs() / maxima
    assert error.mean() < 2e-3
    assert error.max() < 1.2e-2


def test_double_quantization_leaves_the_codes_and_moves_values_by_a_percent():
    w = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    plain, double = encode(w, parse("nf4")), encode(w, parse("nf4-dq"))
    assert torch.equal(plain.codes, double.codes)
    assert ((double.dequantize() - plain.dequantize()).abs() <= 0.012 * plain.dequantize().abs()).all()


@pytest.mark.parametrize("fmt", ["nf4", "nf4-g16", "fp4", "nf3-f10", "e2m1-g16"])
def test_the_largest_of_each_block_is_kept_if_the_table_has_it_on_that_side(fmt):
    fmt, w = parse(fmt), matrix((5, 48))
    error = tiles((encode(w, fmt).dequantize() - w).abs(), fmt.block, fill=0.0)
    top = tiles(w.abs(), fmt.block, fill=0.0).max(-1, keepdim=True)
    assert (error.gather(-1, top.indices) <= 1e-6 * top.values).all()


def test_an_error_in_nf4_is_at_most_half_the_widest_gap():
    w = torch.linspace(-1, 1, 64)[None]
    assert (encode(w, parse("nf4")).dequantize() - w).abs().max() <= 0.152


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_flat_blocks_are_those_of_the_matrix_laid_out_as_one_row(shape, seed):
    w = matrix(shape, seed)
    flat, row = encode(w, parse("nf4-f10")), encode(w.reshape(1, -1), parse("nf4-g10"))
    assert flat.shape == shape
    assert (flat.dequantize() - row.dequantize().view(shape)).abs().max() <= 1e-6
    assert torch.equal(flat.scale.flatten(), row.scale.flatten())
    assert flat.nbits == row.nbits


def test_each_flat_block_stands_alone():
    w = matrix((5, 33))
    other = w.clone()
    other.view(-1)[20:30] *= 100
    a, b = (encode(x, parse("nf4-f10")).dequantize().flatten() for x in (w, other))
    assert torch.equal(a[:20], b[:20])
    assert torch.equal(a[30:], b[30:])


@pytest.mark.parametrize("fmt", REAL)
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_real_zero_points_span_each_block_from_end_to_end(fmt, shift):
    fmt, w = parse(fmt), matrix((6, 33)) + shift
    r = minmax(w, fmt)
    error = (quantize(w, r, fmt).dequantize(torch.float32) - w).abs()
    size = tiles(w.abs(), fmt.block).amax(-1)
    steps = fmt.grid.high - fmt.grid.low
    eps = torch.finfo(fmt.scale).eps
    # half a step, and what rounding scale and zero point to their dtype moves it
    allowed = r.scale * (0.5 + steps * eps) + 2 * size * eps
    assert (error <= spread(allowed, (6, 33), fmt.block) * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    "group",
    [[10.0, 10.001], [10.0, 10.5], [0.02], [-0.3], [1e-4], [0.5, 0.5001], [-7.0, -7.0001], [1e-30], [3e4, 3.1e4]],
)
def test_groups_whose_values_hardly_differ_are_kept_as_well_as_the_dtypes_allow(group, dtype):
    w, fmt = torch.tensor([group * 4]), parse(f"int4-channel-asym-fp32-zero-{dtype}")
    error = (encode(w, fmt).dequantize() - w).abs().max()
    allowed = 1.01 * torch.finfo(fmt.zero).eps * w.abs().max() + (w.max() - w.min()) / 30 * 1.01
    assert error <= allowed


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_bilevel_scales_of_a_lone_row_and_of_rows_all_alike_are_kept(rows):
    row = torch.randn(1, 48, generator=torch.Generator().manual_seed(0)) * 0.02
    plain, nested = (
        float((encode(row, fmt).dequantize() - row).norm())
        for fmt in (parse("int3-g16-asym-zero-fp32"), NAMED["spqr3-g16"])
    )
    w = row.expand(rows, 48).contiguous()
    assert nested < 1.1 * plain
    assert float((encode(w, NAMED["spqr3-g16"]).dequantize() - w).norm()) < 1.1 * plain * rows**0.5


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("fmt", REAL)
def test_every_rule_keeps_real_zero_points_as_they_are_stored(name, fmt):
    fmt, w = parse(fmt), matrix((6, 33)) + 1
    q = quantize(w, fit(w, fmt, name), fmt)
    assert (q.scale.dtype, q.zero.dtype) == (fmt.scale, fmt.zero)
    r = fit(w, fmt, name)
    assert torch.equal(q.zero.float(), r.zero)
    assert torch.equal(q.scale.float(), r.scale)


def test_real_zero_points_gain_over_integer_ones_where_zero_is_far():
    w = matrix((16, 64)) + 5
    real, integer = ((encode(w, parse(f"int3-g16-asym{zero}")).dequantize() - w).norm() for zero in ("-zero-fp32", ""))
    assert real < 0.5 * integer


@given(shape=SHAPES, seed=st.integers(0, 99), half=st.booleans())
def test_bilevel_scales_decode_to_what_codes_were_chosen_against(shape, seed, half):
    w = matrix(shape, seed)
    if half:
        w[::2] = 0
    fmt = NAMED["spqr3-g16"]
    r = fit(w, fmt)
    q = quantize(w, r, fmt)
    assert q.scale.shape == q.zero.shape == counts(shape, (1, 16))
    assert q.scale.scale.shape == counts(counts(shape, (1, 16)), (16, 1))
    stored = q.scale.dequantize(torch.float32)
    assert torch.equal(torch.where(stored == 0, r.scale, stored), r.scale)
    assert torch.equal(q.zero.dequantize(torch.float32), r.zero)
    values = fmt.grid.decode(q.codes) - spread(r.zero, shape, (1, 16))
    assert torch.equal(q.dequantize(), values * spread(stored, shape, (1, 16)))
    assert q.dequantize().isfinite().all()
    assert not half or not q.dequantize()[::2].any()


def test_bilevel_scales_of_like_rows_lose_little():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    nested, plain = (
        (encode(w, fmt).dequantize() - w).square().sum()
        for fmt in (NAMED["spqr3-g16"], parse("int3-g16-asym-fp16-zero-fp16"))
    )
    assert plain < nested < 1.3 * plain


def test_a_group_that_hardly_is_does_not_spoil_the_zero_points_of_its_neighbours():
    w = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    whole = (encode(w, NAMED["spqr3-g16"]).dequantize() - w)[1:].norm()
    w[1] = 0
    for size in (0.1, 0.03, 1e-3, 1e-6, 1e-20):
        w[0] = torch.linspace(-1, 1, 16) * size
        assert encode(w, NAMED["spqr3-g16"]).dequantize().isfinite().all()
        assert (encode(w, NAMED["spqr3-g16"]).dequantize() - w)[1:].norm() < 1.5 * whole


def test_bilevel_bits_are_those_of_the_paper():
    shape = (256, 512)
    assert NAMED["spqr3-g16"].nbits(shape) / (256 * 512) == 3 + (3 + 3) / 16 + 64 / (16 * 16)
    four = replace(NAMED["spqr3-g16"], grid=int_grid(4))
    assert four.nbits(shape) / (256 * 512) == 4.625


def test_rows_of_a_bilevel_matrix_are_cut_where_its_scales_end():
    w = matrix((40, 20))
    q = encode(w, NAMED["spqr3-g16"])
    assert q.format.row_unit == 16
    for start, stop in ((0, 16), (16, 32), (32, 40), (0, 40), (16, 40)):
        assert torch.equal(q.rows(start, stop).dequantize(), q.dequantize()[start:stop])
    for start, stop in ((0, 8), (8, 24), (16, 20)):
        with pytest.raises(ValueError, match="shares scales between rows"):
            q.rows(start, stop)


def test_rows_take_the_one_scale_of_all_scales_along():
    q = encode(matrix((5, 48)), NAMED["nvfp4"])
    assert (q.format.row_unit, q.format.cut_unit) == (None, 1)
    for start, stop in ((0, 1), (1, 5), (0, 5)):
        assert torch.equal(q.rows(start, stop).dequantize(), q.dequantize()[start:stop])


def test_rows_stand_alone_only_where_all_parts_of_the_format_agree():
    inner = Format(int_grid(3), (4, 1), True)
    other = Format(int_grid(3), (6, 1), True)
    assert Format(int_grid(4), (1, 8), False, inner, other).row_unit == 12
    assert Format(int_grid(4), (2, 8), True, inner).row_unit == 8
    assert Format(int_grid(4), (1, 8), True, DOUBLE).row_unit is None
    assert parse("nf4").row_unit is None


@pytest.mark.parametrize("name", NAMED)
def test_moving_a_nested_matrix_moves_all_of_it(name):
    q = encode(matrix((5, 48)), NAMED[name])
    moved = q.to("meta")
    parts = [moved]
    while parts:
        part = parts.pop()
        for value in (part.codes, part.scale, part.zero, part.offset):
            if isinstance(value, QTensor):
                parts.append(value)
            else:
                assert value is None or value.device.type == "meta"


@pytest.mark.parametrize("name", [*NAMED, *REAL, "nf4-f10", "int4-tensor-sym", "e2m1-channel-bf16"])
def test_a_format_reads_back_from_its_json(name):
    fmt = parse(name)
    assert from_json(to_json(fmt)) == fmt


@pytest.mark.parametrize(
    "change",
    [
        {"grid": "nf99"},
        {"grid": []},
        {"grid": [1.0, 0.0]},
        {"grid": [0.0, float("nan")]},
        {"grid": [0.0, float("inf")]},
        {"grid": [float(i) for i in range(257)]},
        {"grid": ["a"]},
        {"grid": 4},
        {"block": [1, 0]},
        {"block": [1]},
        {"block": {"flat": -4}},
        {"block": {"flat": True}},
        {"block": [1.5, 2]},
        {"scale": "fp8"},
        {"scale": {"grid": "int3"}},
        {"zero": 3},
        {"scale": None},
    ],
)
def test_json_that_is_no_format_is_refused(change):
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json(to_json(parse("int4-g16-asym")) | change)
