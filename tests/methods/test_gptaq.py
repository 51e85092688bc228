"""GPTAQ is GPTQ where the inputs have not moved, and nearer to the float model's outputs where they have."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.problem import Problem
from quantforge.solvers.gptaq import GPTAQ, correction
from quantforge.solvers.gptq import GPTQ

FORMATS = ["int4-g16-asym", "int3-channel-sym", "nf4-g16", "spqr3-g16", "int3-g16-asym-fp16-zero-fp16"]
SEEDS = st.integers(0, 9999)


def with_drift(reference, fmt, seed, amount, kind="correlated", out=16, width=32, tokens=256):
    """Return a layer whose inputs have moved, the float model's inputs, and those it gets."""
    rng = torch.Generator().manual_seed(seed)
    x_float = reference.inputs(kind, tokens, width, rng)
    # as rounding errors of earlier layers: a shrinking that all tokens share, and what looks like noise
    x = x_float * (1 - amount) + amount * x_float.std() * torch.randn(tokens, width, generator=rng, dtype=x_float.dtype)
    w = reference.weights("normal", out, width, rng).float()
    h = (x.T @ x * (2 / tokens)).float()
    p = Problem("layer", w, reference.parse(fmt), h, drift=reference.drifted(x_float, x))
    return p, x_float, x


def output_error(p, approx, x_float, x):
    """Return the mean over tokens of ‖W x̃ − Ŵ x‖²."""
    return float((x_float @ p.weight.double().T - x @ approx.double().T).square().sum(1).mean())


@given(fmt=st.sampled_from(FORMATS), seed=SEEDS, strength=st.sampled_from([-1.0, 0.0, 0.25, 1.0]))
def test_without_drift_it_is_gptq(problem, reference, fmt, seed, strength):
    p = problem(fmt, 6, 32, seed)
    zero = torch.zeros(32, 32)
    still = replace(p, drift=reference.Drift(zero, zero, p.hessian, 0.25))
    expected = GPTQ().solve(p)
    for layer in (p, still):
        got = GPTAQ(strength=strength).solve(layer)
        assert torch.equal(got.base.codes, expected.base.codes)
        assert torch.equal(got.dequantize(), expected.dequantize())


@given(fmt=st.sampled_from(FORMATS), seed=SEEDS)
def test_with_strength_zero_it_is_gptq_whatever_the_drift(reference, fmt, seed):
    p, _, _ = with_drift(reference, fmt, seed, 0.3)
    assert torch.equal(GPTAQ(strength=0.0).solve(p).dequantize(), GPTQ().solve(p).dequantize())


@pytest.mark.parametrize("amount", [0.05, 0.2])
@pytest.mark.parametrize("kind", ["correlated", "ar", "heavy"])
def test_on_average_it_comes_nearer_to_the_float_models_outputs(reference, kind, amount):
    ratios = []
    for seed in range(20):
        p, x_float, x = with_drift(reference, "int4-g16-asym", seed, amount, kind)
        plain, moved = (output_error(p, s.solve(p).dequantize(), x_float, x) for s in (GPTQ(), GPTAQ()))
        ratios.append(moved / plain)
    assert sum(ratios) / len(ratios) < {0.05: 0.97, 0.2: 0.85}[amount]
    assert max(ratios) < 1.1


def test_the_more_of_the_drift_is_made_up_for_the_nearer_on_these_tokens(reference):
    totals = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        errors = []
        for seed in range(20):
            p, x_float, x = with_drift(reference, "int4-g16-asym", seed, 0.2)
            errors.append(output_error(p, GPTAQ(strength=strength).solve(p).dequantize(), x_float, x))
        totals.append(sum(errors))
    assert totals == sorted(totals, reverse=True)


def test_the_target_is_the_least_squares_answer_to_the_float_outputs(reference):
    p, x_float, x = with_drift(reference, "int4-g16-asym", 0, 0.2)
    cross, h = ((a.T @ x * (2 / len(x))) for a in (x_float - x, x))
    target = p.weight.double() + correction(p.weight.double(), h, cross, 0.0)
    exact = torch.linalg.lstsq(x, x_float @ p.weight.double().T).solution.T
    torch.testing.assert_close(target, exact, rtol=1e-2, atol=1e-2)
    assert (target - exact).norm() < 0.01 * (p.weight - exact).norm()


def test_the_strength_is_the_best_on_tokens_held_out(reference):
    for seed in range(6):
        p, x_float, x = with_drift(reference, "int3-g16-asym", seed, 0.2)
        held = torch.zeros(len(x), dtype=torch.bool)
        held[3::4] = True
        fitted = replace(
            p,
            hessian=(x[~held].T @ x[~held] * (2 / int((~held).sum()))).float(),
            drift=reference.drifted(x_float[~held], x[~held]),
        )
        errors = {
            s: output_error(p, GPTAQ(strength=s).solve(fitted).dequantize(), x_float[held], x[held])
            for s in (0.0, 0.25, 0.5, 1.0)
        }
        chosen = GPTAQ().solve(p).notes["strength"]
        assert errors[chosen] <= min(errors.values()) * 1.02


def test_the_tokens_that_judge_have_no_part_in_the_fit(reference):
    """With hardly more tokens than inputs any noise can be fitted, which only tokens left out of the fit can tell."""
    strengths = []
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        x = reference.inputs("white", 40, 32, rng)
        x_float = x + 0.5 * torch.randn(40, 32, generator=rng, dtype=x.dtype)
        p = Problem(
            "layer", torch.randn(8, 32, generator=rng), reference.parse("int4-g16-asym"), (x.T @ x / 20).float()
        )
        strengths.append(GPTAQ().solve(replace(p, drift=reference.drifted(x_float, x))).notes["strength"])
    assert sum(strengths) / 20 < 0.3


def test_drift_without_meaning_is_left_alone(reference):
    """Where the float inputs differ by noise that has nothing to do with x, there is nothing to make up for."""
    chosen = []
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        x = reference.inputs("white", 4096, 16, rng)
        x_float = x + 0.1 * torch.randn(4096, 16, generator=rng, dtype=x.dtype)
        p = Problem("layer", torch.randn(8, 16, generator=rng), reference.parse("int3-channel-asym"), (x.T @ x).float())
        plain = GPTQ().solve(p).dequantize()
        got = GPTAQ().solve(replace(p, drift=reference.drifted(x_float, x))).dequantize()
        chosen.append(output_error(p, got, x_float, x) / output_error(p, plain, x_float, x))
    assert max(chosen) < 1.05


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, 1e38])
def test_a_drift_that_is_no_number_gives_a_finite_result(reference, spoil):
    p, _, _ = with_drift(reference, "int4-g16-asym", 0, 0.2)
    cross = p.drift.cross.clone()
    cross[3, 4] = spoil
    for strength in (-1.0, 1.0):
        bad = replace(p, drift=replace(p.drift, cross=cross, held_cross=cross))
        assert GPTAQ(strength=strength).solve(bad).dequantize().isfinite().all()


def test_with_no_input_at_all_it_rounds(reference):
    p, _, _ = with_drift(reference, "int4-g16-asym", 0, 0.2)
    zero = torch.zeros(32, 32)
    nothing = replace(p, hessian=zero, drift=reference.Drift(zero, zero, zero, 1.0))
    assert torch.equal(
        GPTAQ().solve(nothing).dequantize(), GPTQ().solve(Problem("layer", p.weight, p.format, zero)).dequantize()
    )


def test_a_strength_above_one_is_refused():
    with pytest.raises(ValueError, match=r"strength must be at most 1, or below 0 to be searched, not 1\.5"):
        GPTAQ(strength=1.5)
