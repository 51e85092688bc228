"""Inputs rounded when a layer is called: every granularity, static ranges, channels that stay in float."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.formats import parse
from quantforge.numerics.inputs import Inputs, QInput, integer_product, parse_inputs, settle
from quantforge.numerics.qtensor import fit, quantize

# of int8 and its like, the largest value lies half a step outside, so that another range is found the second time
NOTATIONS = ["narrow8-token", "int4-token-asym", "int8-tensor-asym", "e4m3-token", "e5m2-tensor", "narrow4-g16"]
SEEDS = st.integers(0, 9999)


def sample(seed, tokens=6, width=32, outliers=True):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    if outliers:
        x[:, ::9] *= 20
    return x


def asks(threshold, **options):
    return Inputs(parse("narrow8-token"), threshold=threshold, **options)


@pytest.mark.parametrize("text", NOTATIONS)
@given(seed=SEEDS)
def test_rounding_again_changes_nothing_and_zeros_stay(text, seed):
    rounds = QInput(parse_inputs(text))
    once = rounds.round(sample(seed))
    torch.testing.assert_close(rounds.round(once), once, rtol=1e-5, atol=1e-6)
    assert torch.equal(rounds.round(torch.zeros(3, 32)), torch.zeros(3, 32))
    assert rounds.round(torch.zeros(0, 32)).shape == (0, 32)


@given(seed=SEEDS)
def test_by_token_no_token_looks_at_another(seed):
    x, rounds = sample(seed), QInput(parse_inputs("int8-token"))
    changed = x.clone()
    changed[0] *= 100
    assert torch.equal(rounds.round(changed)[1:], rounds.round(x)[1:])
    assert torch.equal(rounds.round(x.view(2, 3, 32)).view(6, 32), rounds.round(x))


@given(seed=SEEDS)
def test_finer_granularity_errs_less(seed):
    x = sample(seed, tokens=64) * torch.rand(64, 1).exp()
    errors = [
        float((QInput(parse_inputs(t)).round(x) - x).square().sum()) for t in ("int8-tensor", "int8-token", "int8-g16")
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("text", ["int8-tensor-static", "int8-tensor-asym-static", "e4m3-tensor-static"])
@given(seed=SEEDS)
def test_a_static_range_is_what_the_tensor_itself_would_have_and_clips_what_lies_beyond(text, seed):
    x = sample(seed)
    rounds = settle(parse_inputs(text), x.amin(0).clamp(max=0), x.amax(0).clamp(min=0), torch.float32)
    torch.testing.assert_close(rounds.round(x), QInput(parse_inputs(text.removesuffix("-static"))).round(x))
    assert float(rounds.round(100 * x).abs().max()) <= float(x.abs().max()) * 1.01


@given(seed=SEEDS)
def test_a_threshold_of_infinity_is_plain_rounding(seed):
    x = sample(seed)
    assert torch.equal(QInput(asks(math.inf)).round(x), QInput(parse_inputs("narrow8-token")).round(x))
    wide = settle(asks(1e9), x.amin(0), x.amax(0), torch.float32)
    assert torch.equal(wide.round(x), QInput(asks(math.inf)).round(x))
    assert torch.equal(QInput(asks(1e9, dynamic=True)).round(x), QInput(asks(math.inf)).round(x))


@given(seed=SEEDS)
def test_a_threshold_near_zero_keeps_everything(seed):
    x = sample(seed)
    assert torch.equal(QInput(asks(1e-9, dynamic=True)).round(x), x)
    assert torch.equal(settle(asks(1e-9), x.amin(0), x.amax(0), torch.float32).round(x), x)


@pytest.mark.parametrize("dynamic", [False, True])
@given(seed=SEEDS)
def test_channels_with_outliers_stay_exact_and_the_others_are_rounded_without_them(dynamic, seed):
    x = sample(seed)
    x[0, 3] = 6.0  # the threshold itself is reached
    rounds = QInput(asks(6.0, dynamic=True)) if dynamic else settle(asks(6.0), x.amin(0), x.amax(0), torch.float32)
    found, wide = rounds.round(x), (x.abs() >= 6).any(0)
    assert wide[3]
    assert torch.equal(found[:, wide], x[:, wide])
    counted = x.masked_fill(x.abs() >= 6, 0) if dynamic else x.masked_fill(wide, 0)
    scale = counted.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(found[:, ~wide], (x / scale).round()[:, ~wide] * scale, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, x)


@given(seed=SEEDS)
def test_the_integer_product_is_the_product_of_what_is_rounded(seed):
    x, w = sample(seed, tokens=20), sample(seed + 1, tokens=24)
    weight = quantize(w, fit(w, parse("llm-int8")), parse("llm-int8"))
    codes, kept = QInput(asks(6.0, dynamic=True)).quantize(x)
    rest = QInput(asks(6.0, dynamic=True)).round(x).index_fill(1, kept, 0.0)
    exact = rest.double() @ weight.dequantize(torch.float64).T
    torch.testing.assert_close(integer_product(codes, weight).double(), exact, rtol=1e-5, atol=1e-5)


def test_integers_with_a_scale_of_one_multiply_exactly():
    x = torch.randint(-127, 128, (20, 32)).float()
    w = torch.randint(-127, 128, (24, 32)).float()
    x[:, 0], w[:, 0] = 127, 127
    q = quantize(w, fit(w, parse("llm-int8")), parse("llm-int8"))
    assert torch.equal(integer_product(QInput(asks(math.inf)).quantize(x)[0], q), x @ w.T)


def test_sums_beyond_what_float32_counts_in_ones_are_exact_until_the_last_rounding():
    x, w = torch.randint(64, 128, (20, 4096)).float(), torch.randint(64, 128, (24, 4096)).float()
    x[:, 0], w[:, 0] = 127, 127
    q = quantize(w, fit(w, parse("llm-int8")), parse("llm-int8"))
    exact = (x.double() @ w.double().T).float()
    assert float(exact.min()) > 2**24
    assert torch.equal(integer_product(QInput(asks(math.inf)).quantize(x)[0], q), exact)


def test_codes_and_row_statistics_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    for seed in range(20):
        x = sample(seed, tokens=7, width=64)
        theirs, statistics, columns = functional.int8_vectorwise_quant(x.half(), threshold=6.0)
        codes, kept = QInput(asks(6.0, dynamic=True)).quantize(x.half().float())
        assert torch.equal(kept, columns.long())
        torch.testing.assert_close(codes.scale[:, 0] * 127, statistics.float(), rtol=1e-6, atol=0)
        ours = codes.format.grid.decode(codes.codes).to(torch.int8)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parse_inputs("int8-token-static"), "static ranges are for inputs by tensor"),
        (lambda: parse_inputs("int9-token"), "'int9-token' is no format"),
        (lambda: asks(0.0), "threshold must be above 0, not 0.0; LLM.int8"),
        (lambda: asks(math.nan), "threshold must be above 0"),
        (lambda: parse_inputs("int8-token-asym-zero-fp32"), "integer zero points or none"),
    ],
)
def test_what_makes_no_sense_is_refused(make, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make()


def test_weights_have_the_codes_and_row_statistics_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).half()
    theirs, statistics, _ = functional.int8_vectorwise_quant(w)
    fmt = parse("llm-int8").with_scale(torch.bfloat16)
    ours = quantize(w.float(), fit(w.float(), fmt), fmt)
    assert ours.scale.dtype == torch.float32
    torch.testing.assert_close(ours.scale[:, 0] * 127, statistics.float(), rtol=1e-6, atol=0)
    assert torch.equal(fmt.grid.decode(ours.codes).to(torch.int8), theirs)


def test_rounding_leaves_its_argument_alone_and_keeps_its_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = sample(0).to(dtype)
        before = x.clone()
        for text in NOTATIONS:
            assert QInput(parse_inputs(text)).round(x).dtype == dtype
            assert torch.equal(x, before)


@pytest.mark.parametrize("text", ["nf4-f64", "int8-b8x8", "fp4-m2-g64", "nvfp4"])
def test_blocks_that_reach_across_tokens_are_refused(text):
    with pytest.raises(ValueError, match="inputs are rounded by token, tensor or group"):
        parse_inputs(text)
