"""Plain rounding: exactly the range and the nearest code, whatever the data."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics import ranges
from quantforge.numerics.qtensor import quantize
from quantforge.solvers.rtn import RTN

FORMATS = ["int4-g16-asym", "int3-g7-sym-fp16", "int8-channel-sym-bf16", "int2-tensor-asym"]


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
@given(fmt=st.sampled_from(FORMATS), out=st.integers(1, 6), width=st.integers(1, 40), seed=st.integers(0, 999))
def test_it_is_the_range_rule_and_the_nearest_code(problem, rule, fmt, out, width, seed):
    p = problem(fmt, out, width, seed, w="outliers")
    got = RTN(range=rule).solve(p).base
    expected = quantize(p.weight, ranges.rule(rule)(p.weight, p.format), p.format)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scale, expected.scale)
    assert got.zero is expected.zero is None or torch.equal(got.zero, expected.zero)


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_weight_moves_by_more_than_half_a_step(problem, fmt):
    p = problem(fmt, w="one-sign")
    q = RTN().solve(p).base
    step = q.scale.float().max()
    slack = 2**q.format.grid.bits * torch.finfo(q.format.scale).eps
    assert (p.weight - q.dequantize(torch.float32)).abs().max() <= step * (0.5 + slack)


def test_the_inputs_play_no_part(problem):
    a, b = problem(x="ar", seed=1), problem(x="heavy", seed=1)
    solved = RTN().solve(type(a)(a.name, a.weight, a.format, b.hessian)).base
    assert torch.equal(solved.codes, RTN().solve(type(a)(a.name, a.weight, a.format)).base.codes)


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_one_more_bit_at_least_halves_the_squared_error(problem, kind):
    losses = []
    for bits in range(2, 9):
        p = problem(f"int{bits}-g16-{kind}", 32, 64, x="white")
        losses.append(float((p.weight - RTN().solve(p).dequantize()).square().sum()))
    assert all(b < a / 2 for a, b in pairwise(losses))


def test_a_zero_point_gains_on_rows_of_one_sign(problem):
    sym, asym = (problem(f"int4-g16-{kind}", 32, 64, w="one-sign") for kind in ("sym", "asym"))
    assert sym.loss(RTN().solve(sym).dequantize()) > 2 * asym.loss(RTN().solve(asym).dequantize())


def test_an_unknown_range_is_refused():
    with pytest.raises(ValueError, match="no range rule is called 'max'"):
        RTN(range="max")


@pytest.mark.parametrize("fmt", FORMATS)
def test_ranges_weighted_by_the_inputs_lose_no_more_on_the_diagonal(problem, fmt):
    p = problem(fmt, 8, 48, x="heavy", w="outliers")
    importance = p.hessian.diagonal()
    losses = [
        float(((p.weight - RTN(range=rule).solve(p).dequantize()).square() * importance).sum())
        for rule in ("minmax", "hessian")
    ]
    assert RTN(range="hessian").needs == ("hessian",)
    assert RTN().needs == ()
    assert losses[1] <= losses[0]
