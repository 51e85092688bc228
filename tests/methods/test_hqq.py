"""HQQ's norm is never above that of rounding, in any block, and falls with every step."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.blocks import tiles
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.grids import int_grid
from quantforge.numerics.problem import Problem
from quantforge.solvers.hqq import HQQ
from quantforge.solvers.rtn import RTN

FORMATS = ["int3-g16-asym-fp16-zero-fp16", "int4-channel-asym-zero-fp32", "int2-g7-asym-bf16-zero-bf16", "hqq3-g64"]
FORMATS += ["int4-f10-asym-zero-fp32"]
SEEDS = st.integers(0, 9999)
KINDS = st.sampled_from(["normal", "outliers", "one-sign", "half-zero"])


def norms(p, solved, power):
    """Return Σ |error|^power of each block."""
    error = (p.weight - solved.dequantize(torch.float32)).abs().double().pow(power)
    return tiles(error, p.format.block, fill=0.0).sum(-1)


@given(
    fmt=st.sampled_from(FORMATS),
    out=st.integers(1, 6),
    width=st.integers(1, 70),
    seed=SEEDS,
    w=KINDS,
    norm=st.sampled_from([0.3, 0.7, 1.0]),
)
def test_no_block_has_a_larger_norm_than_by_rounding(problem, fmt, out, width, seed, w, norm):
    p = problem(fmt, out, width, seed, w=w)
    got, rounded = (norms(p, s.solve(p), norm) for s in (HQQ(norm=norm), RTN()))
    assert (got <= rounded * (1 + 1e-4) + 1e-4).all()


@given(fmt=st.sampled_from(FORMATS), seed=SEEDS, w=KINDS)
def test_more_steps_never_raise_the_norm(problem, fmt, seed, w):
    p = problem(fmt, 4, 48, seed, w=w)
    totals = [float(norms(p, HQQ(iterations=n).solve(p), 0.7).sum()) for n in (0, 1, 5, 20)]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(totals))


@given(fmt=st.sampled_from(FORMATS), seed=SEEDS, w=KINDS)
def test_scales_are_those_of_a_range_from_end_to_end_with_zero_in_it_or_not(problem, fmt, seed, w):
    p = problem(fmt, 4, 48, seed, w=w)
    scale = HQQ().solve(p).base.scale
    real, integer = (RTN().solve(replace(p, format=f)).base.scale for f in (p.format, replace(p.format, zero=None)))
    assert ((scale == real) | (scale == integer)).all()


@given(fmt=st.sampled_from(["int3-g16-asym", "int4-channel-asym-fp16"]), seed=SEEDS, w=KINDS)
def test_integer_zero_points_stay_integers_and_no_step_is_rounding(problem, fmt, seed, w):
    p = problem(fmt, 4, 48, seed, w=w)
    assert torch.equal(HQQ(iterations=0).solve(p).dequantize(), RTN().solve(p).dequantize())
    assert HQQ().solve(p).base.zero.dtype == torch.int8


def test_weights_of_zero_are_mostly_kept_where_half_of_them_are(problem):
    p = problem(FORMATS[0], 16, 64)
    w = p.weight * (torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.5)
    got = HQQ().solve(replace(p, weight=w)).dequantize()
    assert (got[w == 0] == 0).float().mean() > 0.9


@pytest.mark.parametrize("fmt", FORMATS[:3])
def test_the_norm_falls_by_percents_and_squared_errors_do_not_rise(problem, fmt):
    p = problem(fmt, 64, 256)
    assert float(norms(p, HQQ().solve(p), 0.7).sum()) < 0.98 * float(norms(p, RTN().solve(p), 0.7).sum())
    for weights in ("normal", "outliers"):
        p = problem(fmt, 64, 256, w=weights)
        assert float(norms(p, HQQ().solve(p), 2).sum()) < float(norms(p, RTN().solve(p), 2).sum())


def by_the_book(w, bits, norm, beta, kappa, iterations):
    """Return the least Σ |error|^norm met for one block by half-quadratic steps.

    They start from the range that spans the block, and from that which includes zero, with an integer zero point.
    """
    top, least = 2**bits - 1, torch.inf
    for low, high, whole in ((w.min(), w.max(), False), (w.min().clamp(max=0), w.max().clamp(min=0), True)):
        scale, grown = (high - low) / top, beta
        zero = (-low / scale).round() if whole else -low / scale
        for _ in range(iterations + 1):
            codes = (w / scale + zero).round().clamp(0, top)
            error = w - (codes - zero) * scale
            least = min(least, float(error.abs().pow(norm).sum()))
            sparse = error.sign() * (error.abs() - error.abs().clamp(min=1e-12).pow(norm - 1) / grown).clamp(min=0)
            zero = (codes - (w - sparse) / scale).mean()
            grown *= kappa
    return least


@pytest.mark.parametrize("options", [{}, {"kappa": 1.5}, {"beta": 2.0, "norm": 0.5}, {"norm": 1.0, "iterations": 3}])
@pytest.mark.parametrize("w", ["normal", "outliers"])
def test_the_steps_are_the_half_quadratic_ones(problem, options, w):
    p = problem("int3-g16-asym-zero-fp32", 32, 64, w=w)
    p = replace(p, weight=3 * p.weight)
    solver = HQQ(**options)
    settings = (solver.norm, solver.beta, solver.kappa, solver.iterations)
    blocks = p.weight.double().view(32, 4, 16)
    expected = torch.tensor([[by_the_book(block, 3, *settings) for block in row] for row in blocks])
    got = norms(p, solver.solve(p), solver.norm)
    # a rounding error may turn a tie and with it the way
    assert ((got - expected).abs() <= 1e-3 * expected).float().mean() > 0.95


def test_rows_are_independent(problem):
    p = problem(FORMATS[0], 6, 48)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    permuted = HQQ().solve(Problem("layer", p.weight[order], p.format)).dequantize()
    assert torch.equal(permuted, HQQ().solve(p).dequantize()[order])


@pytest.mark.parametrize("fmt", ["int4-g64-sym", "nf4-g64", "spqr3-g16", "nf4-dq"])
def test_formats_without_zero_points_to_move_are_refused(fmt):
    assert "int3-g64-asym-fp16-zero-fp16" in HQQ().refuses((4, 64), parse(fmt))


@pytest.mark.parametrize("part", ["scale", "zero"])
def test_scales_and_zero_points_that_are_quantized_are_refused(part):
    inner = Format(int_grid(8), (16, 1), True, torch.float16)
    fmt = replace(parse("int3-g16-asym-fp16-zero-fp16"), **{part: inner})
    assert "quantizes anew" in HQQ().refuses((16, 48), fmt)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": 0.0}, r"at most 1, not 0\.0"),
        ({"norm": 1.5}, r"not 1\.5"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"kappa": 0.5}, "kappa at least 1"),
        ({"iterations": -1}, "at least 0, not -1"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        HQQ(**options)
