"""A format's notation says all there is to it, and its bits are counted in full."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.formats import SCALE_DTYPES, Format, parse
from quantforge.numerics.grids import int_grid

FORMATS = st.builds(
    Format,
    st.builds(int_grid, st.integers(1, 8)),
    st.one_of(st.just((1, None)), st.just((None, None)), st.integers(1, 4096).map(lambda n: (1, n))),
    st.booleans(),
    st.sampled_from(list(SCALE_DTYPES.values())),
)


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


def test_with_scale_changes_the_stored_dtype_only():
    assert parse("int4-g64-asym").with_scale(torch.bfloat16) == parse("int4-g64-asym-bf16")
