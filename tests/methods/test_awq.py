"""AWQ's scales never lose to no scales, and depend on nothing that they should not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.problem import Problem
from quantforge.solvers.rtn import RTN
from quantforge.transforms.awq import AWQ

FORMATS = ["int3-g16-asym", "int4-channel-sym", "nf4-f10", "int2-g7-asym-bf16", "e2m1-g16"]
INPUTS = st.sampled_from(["white", "correlated", "ar", "heavy", "deficient", "dead"])
SEEDS = st.integers(0, 9999)
LAYERS = {
    "fmt": st.sampled_from(FORMATS),
    "out": st.integers(1, 8),
    "width": st.integers(1, 40),
    "seed": SEEDS,
    "x": INPUTS,
    "w": st.sampled_from(["normal", "outliers", "one-sign", "half-zero"]),
}


def alone(x):
    """Tie nothing."""
    return x


def loss(p, scales, range="hessian"):
    """Return the layer's loss when its weight is rounded with `scales`."""
    h = p.hessian / torch.outer(scales, scales)
    scaled = Problem("layer", p.weight * scales, p.format, h)
    return p.loss(RTN(range).solve(scaled).dequantize() / scales)


@pytest.mark.parametrize("duo", [False, True])
@given(**LAYERS)
def test_the_loss_is_never_above_that_of_rounding_without_scales(problem, duo, fmt, out, width, seed, x, w):
    p = problem(fmt, out, width, seed, x, w)
    for steps in (1, 20):
        assert loss(p, AWQ(steps, duo).scales(p, alone)) <= loss(p, torch.ones(width)) * (1 + 1e-5) + 1e-9


@given(**LAYERS)
def test_the_largest_times_the_smallest_is_one(problem, fmt, out, width, seed, x, w):
    scales = AWQ().scales(problem(fmt, out, width, seed, x, w), alone)
    assert float((scales.max() * scales.min()).sqrt()) == pytest.approx(1, rel=1e-5)


@given(**LAYERS, power=st.integers(-12, 12))
def test_the_unit_of_the_inputs_does_not_matter(problem, fmt, out, width, seed, x, w, power):
    p = problem(fmt, out, width, seed, x, w)
    c = 2.0**power
    other = replace(p, hessian=p.hessian * c * c, magnitude=p.magnitude * c)
    assert torch.equal(AWQ().scales(other, alone), AWQ().scales(p, alone))


@given(out=st.integers(1, 8), width=st.integers(1, 40), seed=SEEDS, x=INPUTS)
def test_channels_in_another_order_get_the_same_scales(problem, out, width, seed, x):
    p = problem("int3-channel-asym", out, width, seed, x, dtype=torch.float64)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    moved = Problem("layer", p.weight[:, order], p.format, p.hessian[order][:, order], p.magnitude[order])
    torch.testing.assert_close(AWQ().scales(moved, alone), AWQ().scales(p, alone)[order], rtol=1e-5, atol=0)


@pytest.mark.parametrize("duo", [False, True])
def test_it_finds_the_best_of_its_candidates(problem, duo):
    for seed in range(5):
        p = problem("int3-g16-asym", 8, 48, seed, "heavy")
        a, tried = p.magnitude / p.magnitude.mean(), [torch.ones(48)]
        groups = p.weight.abs().view(8, 3, 16)
        size = (groups / groups.amax(-1, keepdim=True)).view(8, 48).mean(0)
        for step in range(21):
            r = step / 20
            tried.append(a.clamp(min=1e-4) ** r)
            if duo:
                tried.append(a.clamp(min=1e-4) ** r / (size ** (1 - r) + 1e-4))
        tried = [s / (s.max() * s.min()).sqrt() for s in tried]
        best = min(loss(p, s) for s in tried)
        assert loss(p, AWQ(20, duo).scales(p, alone)) == pytest.approx(best, rel=1e-5)


def test_it_gains_much_where_some_inputs_are_large_and_nothing_where_all_are_alike(problem):
    heavy, white = [], []
    for seed in range(10):
        for kind, ratios in (("heavy", heavy), ("white", white)):
            p = problem("int3-g16-asym", 16, 64, seed, kind)
            ratios.append(loss(p, AWQ().scales(p, alone)) / loss(p, torch.ones(64)))
    assert sum(heavy) / 10 < 0.6
    assert sum(white) / 10 > 0.8


def test_the_channels_that_carry_most_are_enlarged_most(problem):
    p = problem("int3-g16-asym", 16, 64, 0, "heavy")
    scales = AWQ(duo=False).scales(p, alone)
    order = p.magnitude.argsort()
    assert (scales[order].diff() >= 0).all()
    assert scales.max() > 1.5 * scales.min()


@pytest.mark.parametrize("rule", ["minmax", "mse", "hessian"])
def test_the_search_rounds_with_the_range_rule_it_is_given(problem, rule):
    for seed in range(4):
        p = problem("int3-g16-asym", 8, 48, seed, "heavy", "outliers")
        own = loss(p, AWQ(range=rule).scales(p, alone), rule)
        assert own <= loss(p, torch.ones(48), rule) * (1 + 1e-5)
        assert own <= loss(p, AWQ().scales(p, alone), rule) * (1 + 1e-4)


def test_a_sample_of_the_rows_keeps_most_of_what_all_of_them_gain(problem):
    sampled, every = 0.0, 0.0
    for seed in range(5):
        p = problem("int3-g16-asym", 96, 48, seed, "heavy", "outliers")
        alike = AWQ(rows=96).scales(p, alone)
        assert torch.equal(alike, AWQ(rows=-1).scales(p, alone))
        sampled += loss(p, AWQ(rows=24).scales(p, alone)) / loss(p, torch.ones(48))
        every += loss(p, alike) / loss(p, torch.ones(48))
    assert every <= sampled
    assert 5 - sampled > 0.7 * (5 - every)


def test_without_any_input_it_leaves_the_layer_alone(problem):
    p = problem()
    none = replace(p, hessian=p.hessian * 0, magnitude=p.magnitude * 0)
    assert torch.equal(AWQ().scales(none, alone), torch.ones(48))


def test_ties_are_made_before_the_search_so_that_tied_scales_are_the_best_tied_ones(problem):
    def pairs(x):
        return x.view(-1, 2).mean(1).repeat_interleave(2)

    for seed in range(5):
        p = problem("int3-g16-asym", 8, 48, seed, "heavy")
        assert loss(p, AWQ().scales(p, pairs)) <= loss(p, torch.ones(48)) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "at least 1, not 0; 20 is usual"),
        ({"range": "best"}, "no range rule is called 'best'"),
        ({"rows": 0}, "rows must be at least 1, or -1"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        AWQ(**options)
