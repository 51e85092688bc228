"""What training computes with is bit for bit what is stored, and gradients are those of the estimators' definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantforge.distill.straight_through import (
    dequantize_trained,
    fake_quantize,
    fake_quantize_inputs,
    learned_quantize,
    range_to_train,
    trained_range,
    with_range,
)
from quantforge.errors import RecipeError
from quantforge.numerics.blocks import spread
from quantforge.numerics.formats import NAMED, Format, parse
from quantforge.numerics.grids import int_grid
from quantforge.numerics.inputs import QInput, parse_inputs
from quantforge.numerics.qtensor import encode, fit, quantize
from quantforge.numerics.ranges import RULES, minmax

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
PLAIN = ["int4-g8-asym", "int3-g7-sym", "int8-channel-sym-bf16", "int4-channel-asym-fp16", "nf4-g16", "e2m1-g8"]
PLAIN += ["int4-tensor-asym", "e4m3-channel", "int2-b2x3-asym", "int4-g8-asym-zero-fp16", "nf4", "llm-int8", "hqq3-g64"]
INPUTS = ["int8-token", "int4-token", "int8-tensor", "int8-g8", "e4m3-token", "int8-token-asym"]


def matrix(seed: int, rows: int = 4, cols: int = 20) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=rng) * torch.rand(rows, 1, generator=rng) * 10


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal to the bit, the sign of zeros included."""
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def check_fake_quantize(weight: Tensor, fmt: Format, rule: str) -> None:
    wide = weight.float()
    kept = encode(wide, fmt) if fmt.centered else quantize(wide, fit(wide, fmt, rule), fmt)
    weight = weight.clone().requires_grad_()
    found = fake_quantize(weight, fmt, rule)
    assert same_bits(found.detach(), kept.dequantize(weight.dtype))
    upstream = matrix(7, *weight.shape).to(weight.dtype)
    assert same_bits(torch.autograd.grad(found, weight, upstream)[0], upstream)


CENTERED = replace(parse("int4-g8-sym"), centered=True)
MINIMA = [parse("int4-g32-asym-fp16-min-fp16"), parse("int3-g7-asym-fp32-min-bf16")]
EVERY = [*NAMED.values(), *map(parse, PLAIN), parse("int4-f16-asym"), parse("int8-f64"), CENTERED, *MINIMA]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_every_format_rounds_to_the_bit_as_it_is_stored_and_passes_gradients_on(fmt, dtype):
    for seed in range(3):
        check_fake_quantize(matrix(seed, 48, 130).to(dtype), fmt, "minmax")


@given(
    SEEDS,
    st.builds(
        Format,
        st.builds(int_grid, st.integers(1, 8)),
        st.sampled_from([(1, 8), (1, 7), (1, None), (None, None), (2, 3)]),
        st.booleans(),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ),
    st.sampled_from(sorted(RULES)),
    DTYPES,
)
def test_so_does_every_rule_for_ranges(seed, fmt, rule, dtype):
    check_fake_quantize(matrix(seed).to(dtype), fmt, rule)


@given(
    SEEDS,
    st.sampled_from(["int8-token", "int4-token", "int8-tensor", "int8-g8", "e4m3-token", "int8-token-asym"]),
    DTYPES,
)
def test_inputs_are_rounded_to_the_bit_as_the_layer_does_it(seed, text, dtype):
    how = QInput(parse_inputs(text))
    x = matrix(seed, 6, 24).view(2, 3, 24).to(dtype).requires_grad_()
    found = fake_quantize_inputs(x, how)
    assert same_bits(found.detach(), how.round(x.detach()))
    upstream = matrix(seed + 1, 6, 24).view(2, 3, 24).to(dtype)
    assert torch.equal(torch.autograd.grad(found, x, upstream)[0], upstream)


@given(SEEDS, st.integers(0, 5), st.floats(-1e4, 1e4))
def test_a_token_does_not_change_how_another_is_rounded(seed, token, value):
    how = QInput(parse_inputs("int8-token"))
    x = matrix(seed, 6, 24)
    other = x.clone()
    other[token] = value
    kept = torch.arange(6) != token
    assert torch.equal(fake_quantize_inputs(x, how)[kept], fake_quantize_inputs(other, how)[kept])


def test_spared_channels_stay_in_float_and_get_their_gradient():
    how = QInput(replace(parse_inputs("int4-token"), threshold=6.0, dynamic=True))
    x = matrix(0, 5, 8) / 10
    x[2, 3] = 50.0
    x.requires_grad_()
    found = fake_quantize_inputs(x, how)
    assert torch.equal(found[:, 3], x[:, 3])
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], torch.ones(5, 8))


def test_the_gradient_of_the_latent_weight_is_that_of_the_rounded_one_through_a_layer():
    weight, x = matrix(0).requires_grad_(), matrix(1, 7)
    rounded = fake_quantize(weight.detach(), parse("int4-g8-asym")).requires_grad_()
    losses = [(x @ w.T).square().mean() for w in (fake_quantize(weight, parse("int4-g8-asym")), rounded)]
    assert torch.equal(torch.autograd.grad(losses[0], weight)[0], torch.autograd.grad(losses[1], rounded)[0])


def test_beyond_a_limit_no_gradient_passes():
    weight = torch.tensor([[0.5, -1.9, 2.0, -7.0]], requires_grad=True)
    for found in (
        fake_quantize(weight, parse("int8-channel"), limit=2.0),
        fake_quantize_inputs(weight, QInput(parse_inputs("int8-token")), limit=2.0),
    ):
        assert torch.autograd.grad(found.sum(), weight)[0].tolist() == [[1, 1, 0, 0]]


def start(seed: int, fmt: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a weight, and scales and zero points somewhat off those of its range, so that some of it is clipped."""
    weight = matrix(seed)
    r = minmax(weight, fmt)
    rng = torch.Generator().manual_seed(seed + 1)
    scale = r.scale * (0.4 + torch.rand(r.scale.shape, generator=rng))
    return weight, scale, None if fmt.symmetric else r.zero + torch.randn(r.zero.shape, generator=rng)


def by_definition(weight: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """Return LSQ's quantizer in operations whose gradients autograd knows: clip, then round straight through."""
    shape = (weight.shape[0], weight.shape[1])
    s, z = (spread(x, shape, fmt.block) for x in (scale, zero))
    exact = (weight / s + z).clamp(fmt.grid.low, fmt.grid.high)
    return (exact + (fmt.grid.round(exact) - exact).detach() - z) * s


LEARNED = st.sampled_from([parse(text) for text in PLAIN])


@given(SEEDS, LEARNED, DTYPES)
def test_under_trained_ranges_the_value_is_that_of_the_codes_to_be_saved(seed, fmt, dtype):
    weight, scale, zero = start(seed, fmt)
    weight = weight.to(dtype)
    saved = quantize(weight.float(), trained_range(scale, zero, fmt), fmt)
    assert same_bits(learned_quantize(weight, scale, zero, fmt), saved.dequantize(dtype))


@given(SEEDS, LEARNED)
def test_their_gradients_are_those_of_the_definition(seed, fmt):
    weight, scale, zero = start(seed, fmt)
    r = trained_range(scale, zero, fmt)  # as stored, so that both stand at the same values
    upstream = matrix(seed + 2)
    ours = [weight.clone(), r.scale.clone(), *([] if zero is None else [r.zero.clone()])]
    theirs = [weight.double(), r.scale.double(), r.zero.double()]
    for x in ours + theirs:
        x.requires_grad_()
    found = learned_quantize(ours[0], ours[1], None if zero is None else ours[2], fmt)
    expected = by_definition(theirs[0], theirs[1], theirs[2], fmt)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(found, ours, upstream), torch.autograd.grad(expected, theirs, upstream.double())
    for a, b in zip(*gradients, strict=False):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max() + 1))


def test_by_hand_the_gradients_of_scale_and_zero_point():
    fmt = parse("int4-channel-asym")  # −8 … 7
    weight = torch.tensor([[0.3, 1.6, 40.0, -40.0]], requires_grad=True)
    scale, zero = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)
    found = learned_quantize(weight, scale, zero, fmt)
    assert found.tolist() == [[0, 2, 6, -9]]
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    by_weight, by_scale, by_zero = torch.autograd.grad(found, (weight, scale, zero), upstream)
    assert by_weight.tolist() == [[1, 10, 0, 0]]
    assert float(by_scale) == pytest.approx((0 - 0.3) + 10 * (2 - 1.6) + 100 * 6 - 1000 * 9)
    assert float(by_zero) == -1100


def test_balanced_gradients_of_scales_are_divided_as_lsq_says():
    fmt = parse("int4-g8-sym")
    weight, scale, _ = start(0, fmt)
    weight = weight[:, :16]
    scale = scale[:, :2].clone().requires_grad_()
    plain, balanced = (
        torch.autograd.grad(learned_quantize(weight, scale, None, fmt, balanced=b).sum(), scale)[0]
        for b in (False, True)
    )
    torch.testing.assert_close(balanced * math.sqrt(8 * 7), plain)


@given(SEEDS, st.sampled_from(PLAIN), DTYPES)
def test_under_codes_that_stay_the_value_is_that_of_the_checkpoint_to_be_saved(seed, text, dtype):
    fmt = parse(text)
    weight, scale, zero = start(seed, fmt)
    kept = quantize(weight, minmax(weight, fmt), fmt)
    saved = with_range(kept, scale, zero)
    assert saved.codes is kept.codes
    assert saved.scale.dtype == fmt.scale
    assert same_bits(dequantize_trained(kept, scale, zero, dtype), saved.dequantize(dtype))
    again = quantize(saved.dequantize(torch.float32), trained_range(scale, zero, fmt), fmt)
    torch.testing.assert_close(again.dequantize(torch.float32), saved.dequantize(torch.float32))


@given(SEEDS, st.sampled_from(PLAIN))
def test_training_starts_at_the_checkpoint_itself(seed, text):
    kept = quantize(matrix(seed), minmax(matrix(seed), parse(text)), parse(text))
    scale, zero = range_to_train(kept)
    assert scale.dtype == torch.float32
    assert same_bits(dequantize_trained(kept, scale, zero), kept.dequantize(torch.float32))
    assert same_bits(dequantize_trained(kept, scale), kept.dequantize(torch.float32))
    same = with_range(kept, scale, zero)
    assert torch.equal(same.scale, kept.scale)
    assert (same.zero is None) == (kept.zero is None)
    assert kept.zero is None or torch.equal(same.zero, kept.zero)
    scale.zero_()
    assert (kept.scale.float() > 0).all()  # a copy was trained


@given(SEEDS, st.sampled_from(PLAIN))
def test_the_gradients_of_scales_under_codes_that_stay_are_autograds(seed, text):
    fmt = parse(text)
    kept = quantize(matrix(seed), minmax(matrix(seed), fmt), fmt)
    scale, zero = range_to_train(kept)
    trained = [scale] if zero is None else [scale, zero]
    for x in trained:
        x.requires_grad_()
    upstream = matrix(seed + 1)
    found = torch.autograd.grad(dequantize_trained(kept, *trained), trained, upstream)
    plain = [x.detach().double().requires_grad_() for x in trained]
    s, z = (spread(x, kept.shape, fmt.block) for x in (plain[0], plain[-1] if zero is not None else 0 * plain[0]))
    expected = torch.autograd.grad((fmt.grid.decode(kept.codes) - z) * s, plain, upstream.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max() + 1))


def test_scales_trained_by_gradient_descent_bring_the_values_nearer():
    """What recovery does: codes of a too narrow range, scales and zero points trained towards the weight."""
    weight, fmt = matrix(0), parse("int3-g8-asym")
    kept = quantize(weight, minmax(weight * 0.5, fmt), fmt)
    scale, zero = (x.requires_grad_() for x in range_to_train(kept))
    optimizer = torch.optim.Adam([scale, zero], lr=0.02)
    losses = []
    for _ in range(60):
        loss = (dequantize_trained(kept, scale, zero) - weight).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert float((with_range(kept, scale, zero).dequantize(torch.float32) - weight).square().mean()) < 0.5 * losses[0]


def test_scales_that_training_made_negative_are_stored_positive():
    fmt = parse("int4-g8-sym-fp16")
    kept = quantize(matrix(0), minmax(matrix(0), fmt), fmt)
    found = with_range(kept, -torch.ones(4, 3)).scale
    assert (found > 0).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("text", ["nf4-dq", "spqr3-g16", "mxfp4", "nvfp4", "fp4-m2-g64"])
def test_scales_that_are_not_plain_numbers_are_refused(text):
    fmt = NAMED[text]
    weight = matrix(0, 16, 64)
    kept = encode(weight, fmt)
    for call in (
        lambda: range_to_train(kept),
        lambda: learned_quantize(weight, torch.ones(1, 1), None, fmt),
        lambda: with_range(kept, torch.ones(1, 1)),
    ):
        with pytest.raises(RecipeError, match="cannot be trained"):
            call()


@given(SEEDS, st.sampled_from(MINIMA), st.sampled_from(sorted(RULES)), DTYPES, st.floats(-9, 9))
def test_latent_weights_through_minima_compute_what_is_stored_far_from_zero_too(seed, fmt, rule, dtype, shift):
    check_fake_quantize((matrix(seed) + shift).to(dtype), fmt, rule)


@pytest.mark.parametrize("fmt", MINIMA, ids=str)
def test_minima_are_no_ranges_to_train(fmt):
    weight = matrix(0, 4, 64)
    kept = encode(weight, fmt)
    one = torch.ones(kept.scale.shape)
    for call in (
        lambda: range_to_train(kept),
        lambda: learned_quantize(weight, one, one, fmt),
        lambda: with_range(kept, one, one),
        lambda: dequantize_trained(kept, one, one),
    ):
        with pytest.raises(RecipeError, match=r"stores minima, which cannot be trained; int4-g32-sym") as found:
            call()
        assert found.value.number == 245
