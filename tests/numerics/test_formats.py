"""A format's notation says all there is to it, and its bits are counted in full."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.formats import E8M0, NAMED, SCALE_DTYPES, Format, parse
from quantforge.numerics.grids import CUSTOM, Grid, int_grid

FORMATS = st.builds(
    Format,
    st.builds(int_grid, st.integers(1, 8)),
    st.one_of(st.just((1, None)), st.just((None, None)), st.integers(1, 4096).map(lambda n: (1, n))),
    st.booleans(),
    st.sampled_from(list(SCALE_DTYPES.values())),
).filter(lambda fmt: fmt.symmetric or fmt.scale != E8M0)  # powers of two go with symmetric formats alone


@given(FORMATS)
def test_a_format_reads_back_from_its_own_name(fmt):
    assert parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    ("text", "block", "symmetric", "scale"),
    [
        ("int4-g64-asym", (1, 64), False, torch.float32),
        ("int8-channel", (1, None), True, torch.float32),
        ("int8-token-asym-bf16", (1, None), False, torch.bfloat16),
        ("int3-tensor-fp16", (None, None), True, torch.float16),
    ],
)
def test_what_is_left_out_is_symmetric_and_float32(text, block, symmetric, scale):
    assert parse(text) == Format(int_grid(int(text[3])), block, symmetric, scale)


@pytest.mark.parametrize(
    "text", ["", "int4", "int9-channel", "int0-g64", "int4-g0", "int4-g064", "int4-g-4", "INT4-g64", "int4-g64-fp8"]
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ValueError, match=f"^'{text}' is no format"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("int4-g128-sym-fp16", 4.125),
        ("int4-g128-asym-fp16", 4.15625),
        ("int4-g64-sym-fp16", 4.25),
        ("int4-g64-asym-fp16", 4.3125),
        ("int3-g128-sym-fp16", 3.125),
        ("int8-channel-sym-fp32", 8 + 32 / 256),
        ("int8-tensor-asym-fp32", 8 + 40 / (16 * 256)),
    ],
)
def test_bits_per_weight_count_codes_scales_and_zero_points(text, bits):
    assert parse(text).nbits((16, 256)) / (16 * 256) == bits


def test_a_short_last_group_costs_a_whole_scale():
    assert parse("int4-g64-asym-fp16").nbits((2, 65)) == 2 * 65 * 4 + 2 * 2 * (16 + 4)


@pytest.mark.parametrize(
    "text",
    [
        *("nf4-f64", "nf3-g16-sym-fp16", "e2m1-g16-sym-bf16", "fp4-channel-sym-fp32", "int4-f10-asym-fp32"),
        *("int3-g16-asym-fp16-zero-fp16", "int4-channel-asym-bf16-zero-fp32", "dynamic8-f256-sym-fp32"),
        *("int3-b64x1-asym-fp32-zero-fp32", "e4m3-b128x128-sym-fp32"),
    ],
)
def test_tables_flat_blocks_and_real_zero_points_have_a_notation_too(text):
    fmt = parse(text)
    assert parse(str(fmt)) == fmt
    assert str(fmt).startswith(text)


@pytest.mark.parametrize(
    "text",
    [
        "int4-b0x1-asym",
        "int4-b64-asym",
        "nf4-g64-asym",
        "fp4-channel-asym",
        "nf1-g64",
        "nf4-f0",
        "int4-g64-zero-int8",
        "custom-g64",
    ],
)
def test_tables_have_no_zero_points_and_names_must_be_known(text):
    with pytest.raises(ValueError, match=f"^'{text}' is no format"):
        parse(text)


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_its_format(name):
    assert parse(name) is NAMED[name]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("nf4-f64", 4.5),
        ("nf4-g64-fp16", 4.25),
        ("e2m1-g32-fp16", 4.5),
        ("int4-g64-asym-fp16-zero-fp16", 4.5),
        ("int3-g16-asym-fp16-zero-fp32", 6.0),
        ("hqq3-g64", 4.0),
        ("spqr3-g16", 3.625),
    ],
)
def test_bits_of_tables_real_zero_points_and_nested_scales_are_counted(text, bits):
    assert parse(text).nbits((16, 256)) / (16 * 256) == bits


def test_a_table_that_only_the_file_holds_is_counted_with_it():
    table = Format(Grid(CUSTOM, (-1.0, 0.0, 0.5, 1.0)), (1, 64), True)
    assert table.nbits((2, 64)) == 2 * 64 * 2 + 2 * 32 + 4 * 32


def test_flat_blocks_count_the_matrix_as_one_row():
    assert parse("nf4-f10").nbits((3, 7)) == 21 * 4 + 3 * 32


def test_with_scale_leaves_what_has_its_scales_by_definition():
    for name in ("nf4", "nf4-dq", "spqr3-g16"):
        assert parse(name).with_scale(torch.bfloat16) == parse(name)
    assert parse("int4-g8-asym-zero-fp16").with_scale(torch.bfloat16) == parse("int4-g8-asym-bf16-zero-bf16")


def test_with_scale_changes_the_stored_dtype_only():
    assert parse("int4-g64-asym").with_scale(torch.bfloat16) == parse("int4-g64-asym-bf16")
