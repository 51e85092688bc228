"""Codes lie where the layer's own weights do, and the table is stored with it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.blocks import spread, tiles
from quantforge.numerics.formats import parse
from quantforge.numerics.grids import CUSTOM
from quantforge.numerics.problem import Problem
from quantforge.solvers.quantile import Quantile
from quantforge.solvers.rtn import RTN

FORMATS = ["nf4-g16", "nf3-f10", "nf4-channel-fp16", "nf4-dq", "e2m1-g16"]
SEEDS = st.integers(0, 9999)
KINDS = st.sampled_from(["normal", "outliers", "one-sign", "half-zero"])


def entropy(codes):
    """Return the bits of information a code carries."""
    share = codes.flatten().bincount().double() / codes.numel()
    return float(-(share * share.clamp(min=1e-30).log2()).sum())


@given(fmt=st.sampled_from(FORMATS), out=st.integers(1, 6), width=st.integers(2, 60), seed=SEEDS, w=KINDS)
def test_the_table_is_midway_between_the_quantiles_of_the_weights(problem, fmt, out, width, seed, w):
    p = problem(fmt, out, width, seed, w=w)
    top = tiles(p.weight.abs(), p.format.block).amax(-1)
    relative = p.weight / spread(top, (out, width), p.format.block).clamp(min=1e-38)
    count = 2**p.format.grid.bits
    edges = np.quantile(relative.double().numpy(), [i / (count + 1) for i in range(count + 1)])
    middles = (edges[:-1] + edges[1:]) / 2
    middles[np.abs(middles).argmin()] = 0
    expected = middles / (np.abs(middles).max() or 1)
    got = Quantile().solve(p).base.format.grid
    assert got.name == CUSTOM
    assert all(np.abs(expected - v).min() < 1e-5 for v in got.values)
    assert all(np.abs(np.array(got.values) - v).min() < 1e-5 for v in expected)


@given(fmt=st.sampled_from(FORMATS), seed=SEEDS, w=KINDS)
def test_with_normal_quantiles_it_is_rounding(problem, fmt, seed, w):
    p = problem(fmt, 4, 48, seed, w=w)
    got, expected = Quantile(codes="normal").solve(p), RTN().solve(p)
    assert got.base.format == p.format
    assert torch.equal(got.dequantize(), expected.dequantize())


@pytest.mark.parametrize("fmt", ["nf4-g64", "nf3-g32", "nf4-f64"])
@pytest.mark.parametrize("kind", ["normal", "outliers", "one-sign"])
def test_its_codes_carry_nearly_all_they_can_and_more_than_a_fixed_tables(problem, fmt, kind):
    p = problem(fmt, 64, 256, w=kind)
    own, fixed = (entropy(s.solve(p).base.codes) for s in (Quantile(), RTN()))
    assert own > fixed
    assert own > 0.85 * p.format.grid.bits


def test_it_gains_where_weights_are_far_from_normal(problem):
    p = problem("nf4-channel", 32, 256)
    p = Problem("layer", p.weight.abs(), p.format)  # of a fixed table half the codes lie idle
    own, fixed = ((p.weight - s.solve(p).dequantize()).square().sum() for s in (Quantile(), RTN()))
    assert own < 0.5 * fixed


def test_the_table_is_paid_for(problem):
    p = problem("nf4-g16", 4, 48)
    solved = Quantile().solve(p)
    assert solved.nbits == p.format.nbits((4, 48)) + 32 * len(solved.base.format.grid.values)


@pytest.mark.parametrize("value", [1.0, -2.5, 1e-3])
def test_weights_of_one_value_are_kept(value):
    p = Problem("layer", torch.full((4, 16), value), parse("nf4-g16"))
    assert torch.equal(Quantile().solve(p).dequantize(), p.weight)


def test_weights_of_few_values_are_kept():
    w = torch.tensor([-1.0, 0.0, 1.0]).repeat(30).view(5, 18)
    got = Quantile().solve(Problem("layer", w, parse("nf4-channel"))).dequantize()
    assert torch.equal(got, w)


def test_the_order_of_weights_within_a_block_changes_no_table(problem):
    p = problem("nf4-channel", 6, 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    other = Quantile().solve(Problem("layer", p.weight[:, order], p.format))
    assert other.base.format == Quantile().solve(p).base.format
    assert torch.equal(other.dequantize(), Quantile().solve(p).dequantize()[:, order])


@pytest.mark.parametrize("fmt", ["int4-g64-asym", "int4-g64-sym", "hqq3-g64"])
def test_integers_are_refused_with_what_is_a_table(fmt):
    assert "nf4-f64 is one" in Quantile().refuses((4, 64), parse(fmt))


def test_codes_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="empirical or normal, not 'best'"):
        Quantile(codes="best")
