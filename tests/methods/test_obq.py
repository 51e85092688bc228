"""The line of optimal brain surgery: what removing a weight costs, and GPTQ as a forced order of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.problem import Problem
from quantforge.solvers.gptq import GPTQ
from quantforge.solvers.obq import LARGEST, OBQ, obd_saliency, obs_saliency, obs_update
from quantforge.solvers.rtn import RTN
from quantforge.solvers.sweep import inverse_factor

FORMATS = ["int4-g16-asym", "int3-channel-sym", "int2-g5-asym", "nf4-g7", "int3-g16-asym-fp16-zero-fp16"]
SEEDS = st.integers(0, 9999)


def least_squares_loss(p, row, fixed):
    """Return ½ (w − v) H (w − v)ᵀ for the best v with v_j as `fixed` says, by solving for the others."""
    w, h = p.weight[row].double(), p.hessian.double()
    free = [j for j in range(len(w)) if j not in fixed]
    change = torch.zeros_like(w)
    for j, value in fixed.items():
        change[j] = value - w[j]
    if free:
        taken = list(fixed)
        change[free] = torch.linalg.solve(h[free][:, free], -h[free][:, taken] @ change[taken])
    return 0.5 * float(change @ h @ change), w + change


@given(width=st.integers(1, 8), seed=SEEDS, kind=st.sampled_from(["white", "correlated", "ar"]))
def test_surgeons_saliency_is_what_the_loss_rises_by_when_the_others_are_refitted(problem, width, seed, kind):
    p = problem("int4-channel-sym", 3, width, seed, kind, dtype=torch.float64)
    inverse = torch.linalg.inv(p.hessian)
    saliency = obs_saliency(p.weight, inverse)
    for row in range(3):
        for j in range(width):
            loss, rest = least_squares_loss(p, row, {j: 0.0})
            assert float(saliency[row, j]) == pytest.approx(loss, rel=1e-6, abs=1e-12)
            moved = obs_update(p.weight, inverse, j)[row]
            torch.testing.assert_close(moved, rest, rtol=1e-6, atol=1e-9)


@given(width=st.integers(1, 8), seed=SEEDS)
def test_damages_saliency_is_what_the_loss_rises_by_when_nothing_answers(problem, width, seed):
    p = problem("int4-channel-sym", 3, width, seed, dtype=torch.float64)
    saliency = obd_saliency(p.weight, p.hessian)
    for j in range(width):
        without = p.weight.clone()
        without[:, j] = 0
        torch.testing.assert_close(saliency[:, j], p.row_losses(without) / 2)
    assert (obs_saliency(p.weight, torch.linalg.inv(p.hessian)) <= saliency * (1 + 1e-9)).all()


def test_with_independent_inputs_damage_and_surgery_agree(problem):
    p = problem("int4-channel-sym", 3, 8, dtype=torch.float64)
    h = torch.diag(torch.rand(8, dtype=torch.float64) + 0.1)
    torch.testing.assert_close(obs_saliency(p.weight, torch.linalg.inv(h)), obd_saliency(p.weight, h))


@given(width=st.integers(2, 8), seed=SEEDS, value=st.floats(-2, 2))
def test_setting_a_weight_to_any_value_lets_the_others_answer_as_well_as_they_can(problem, width, seed, value):
    p = problem("int4-channel-sym", 2, width, seed, dtype=torch.float64)
    moved = obs_update(p.weight, torch.linalg.inv(p.hessian), 1, value)
    for row in range(2):
        torch.testing.assert_close(moved[row], least_squares_loss(p, row, {1: value})[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", ["relative", "mean"])
@given(
    fmt=st.sampled_from(FORMATS),
    out=st.integers(1, 5),
    width=st.integers(1, 24),
    seed=SEEDS,
    x=st.sampled_from(["white", "correlated", "ar", "deficient", "dead"]),
    w=st.sampled_from(["normal", "outliers", "one-sign"]),
    rule=st.sampled_from(["minmax", "mse"]),
)
def test_in_the_order_of_the_columns_it_is_gptq(problem, damping, fmt, out, width, seed, x, w, rule):
    p = problem(fmt, out, width, seed, x, w, dtype=torch.float64)
    got = OBQ(0.02, damping, greedy=False, range=rule).solve(p)
    expected = GPTQ(0.02, damping, act_order=False, range=rule).solve(p)
    assert torch.equal(got.base.codes, expected.base.codes)
    assert torch.equal(got.base.scale, expected.base.scale)


@given(fmt=st.sampled_from(FORMATS), seed=SEEDS, x=st.sampled_from(["white", "correlated", "ar", "heavy"]))
def test_rows_are_independent(problem, fmt, seed, x):
    p = problem(fmt, 4, 20, seed, x, dtype=torch.float64)
    whole = OBQ().solve(p).base
    for i in range(4):
        alone = OBQ().solve(replace(p, weight=p.weight[i : i + 1])).base
        assert torch.equal(alone.codes[0], whole.codes[i])


@given(fmt=st.sampled_from(FORMATS), seed=SEEDS)
def test_with_independent_inputs_it_is_rounding(problem, fmt, seed):
    p = problem(fmt, 4, 20, seed, dtype=torch.float64)
    diagonal = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    p = Problem("layer", p.weight, p.format, torch.diag(diagonal))
    assert torch.equal(OBQ().solve(p).base.codes, RTN().solve(p).base.codes)


def by_the_book(p, damp):
    """Quantize by OBQ as its paper says, each row on the inverse of H over what is left, computed anew."""
    w, fmt = p.weight.clone(), p.format
    h = p.hessian + damp * torch.diag(p.hessian.diagonal())
    r = RTN().solve(p).base
    scale = r.scale.double()
    zero = torch.zeros_like(scale) if r.zero is None else r.zero.double()
    for i in range(w.shape[0]):
        left = list(range(w.shape[1]))
        while left:
            inverse = torch.linalg.inv(h[left][:, left])
            row = w[i, left]
            error = row - (fmt.grid.round(row / scale[i] + zero[i]) - zero[i]) * scale[i]
            outside = error.abs() > scale[i] / 2 * (1 + 1e-9)
            cost = error.square() / inverse.diagonal()
            k = int(error.abs().where(outside, -1).argmax()) if bool(outside.any()) else int(cost.argmin())
            w[i, left] = row - error[k] / inverse[k, k] * inverse[k]
            left.pop(k)
    return w


@given(seed=SEEDS, kind=st.sampled_from(["white", "correlated", "ar"]), weights=st.sampled_from(["normal", "outliers"]))
def test_the_order_is_the_papers(problem, seed, kind, weights):
    p = problem("int3-channel-asym", 3, 10, seed, kind, weights, dtype=torch.float64)
    expected = by_the_book(p, 0.1)
    solved = OBQ(0.1).solve(p)
    losses = p.row_losses(expected), p.row_losses(RTN().solve(p).dequantize())
    for i in range(3):
        if losses[0][i] < losses[1][i] * (1 - 1e-6):
            torch.testing.assert_close(solved.dequantize(torch.float64)[i], expected[i], rtol=1e-6, atol=1e-6)


def test_on_average_it_beats_rounding_by_far_and_is_near_gptq(problem):
    rounded, gptq = [], []
    for seed in range(30):
        p = problem("int3-channel-asym", 8, 24, seed, dtype=torch.float64)
        loss = p.loss(OBQ(0.01).solve(p).dequantize())
        rounded.append(loss / p.loss(RTN().solve(p).dequantize()))
        gptq.append(loss / p.loss(GPTQ(0.01, act_order=False, range="minmax").solve(p).dequantize()))
    assert sum(rounded) / 30 < 0.75
    assert 0.7 < sum(gptq) / 30 < 1.2


@pytest.mark.parametrize("spoil", [0.0, torch.nan, torch.inf])
def test_a_hessian_that_is_none_gives_a_finite_result(problem, spoil):
    p = problem("int4-g16-asym", 4, 20)
    h = p.hessian * 0 if spoil == 0 else p.hessian.clone()
    h[3, 3] = spoil
    assert OBQ().solve(replace(p, hessian=h)).dequantize().isfinite().all()


def test_the_notes_say_how_the_hessian_was_damped(problem):
    p = problem(dtype=torch.float64)
    notes = OBQ(0.05).solve(p).notes
    assert (notes["damp"], notes["rung"]) == (0.05, inverse_factor(p.hessian, 0.05).rung)


@pytest.mark.parametrize(
    ("shape", "fmt", "said"),
    [
        ((4, LARGEST + 1), "int4-g64-asym", f"at most {LARGEST} inputs, and this has {LARGEST + 1}; gptq"),
        ((4, 64), "int4-tensor-sym", "shares scales between rows; gptq takes it"),
        ((4, 64), "spqr3-g16", "shares scales between rows"),
        ((4, 64), "nf4", "shares scales between rows"),
    ],
)
def test_what_it_cannot_solve_it_refuses_with_what_can(reference, shape, fmt, said):
    assert said in OBQ().refuses(shape, reference.parse(fmt))


@pytest.mark.parametrize(("options", "said"), [({"damp_percent": 2.0}, "not 2.0"), ({"damping": "most"}, "'most'")])
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        OBQ(**options)
