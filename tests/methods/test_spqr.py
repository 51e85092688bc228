"""SpQR is GPTQ with the same ranges where no weight is spared, and W itself where all are."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.numerics import ranges
from quantforge.numerics.blocks import spread
from quantforge.numerics.formats import NAMED, parse
from quantforge.numerics.qtensor import fit, quantize
from quantforge.solvers.gptq import GPTQ
from quantforge.solvers.rtn import RTN
from quantforge.solvers.spqr import SpQR, leave_one_out
from quantforge.solvers.sweep import inverse_factor

FORMATS = ["spqr3-g16", "int3-g16-asym", "int4-channel-sym", "nf4-g16-fp16", "int3-g7-asym-fp16-zero-fp16"]
SEEDS = st.integers(0, 9999)
OUT = st.sampled_from([1, 3, 16, 18])


def spared(solved, shape):
    """Return where weights are kept in float, [out, in]."""
    places = torch.zeros(shape, dtype=torch.bool)
    for r in solved.residuals:
        row = torch.arange(shape[0]).repeat_interleave((r.start[1:] - r.start[:-1]).long())
        places[row, r.columns.long()] = True
    return places


def planted(problem, fmt="spqr3-g16", seed=0):
    """Return a layer in which every group of 16 has one weight twenty times the others, and where those are."""
    p = problem(fmt, 16, 64, seed)
    rng = torch.Generator().manual_seed(seed)
    places = torch.zeros(16, 64, dtype=torch.bool)
    places.view(16, 4, 16).scatter_(-1, torch.randint(0, 16, (16, 4, 1), generator=rng), value=True)
    return replace(p, weight=torch.where(places, p.weight.sign() * 20, p.weight)), places


@pytest.mark.parametrize("act_order", [False, True])
@given(
    fmt=st.sampled_from(FORMATS),
    out=OUT,
    width=st.integers(1, 24),
    seed=SEEDS,
    x=st.sampled_from(["white", "correlated", "ar", "deficient", "dead"]),
    rule=st.sampled_from(["minmax", "hessian"]),
)
@settings(max_examples=25)
def test_without_outliers_it_is_gptq_with_the_same_ranges(
    problem, reference, act_order, fmt, out, width, seed, x, rule
):
    p = problem(fmt, out, width, seed, x, dtype=torch.float64)
    order = reference.by_falling_diagonal(p.hessian) if act_order else list(range(width))
    h = reference.damped(p.hessian, 0.02, relative=True)
    h = h if p.hessian.any() else torch.eye(width, dtype=torch.float64)
    u = inverse_factor(p.hessian, 0.02, torch.tensor(order), relative=True).u
    cost = torch.empty(width, dtype=torch.float64)
    cost[order] = u.diagonal() ** -2
    r = fit(p.weight, p.format, rule, cost)
    scale, zero = (spread(s.double(), (out, width), p.format.block).expand(out, width) for s in (r.scale, r.zero))
    expected = reference.gptq_by_inverse(
        p.weight, h, lambda j, c: ranges.round_to(c, scale[:, j], zero[:, j], p.format), order
    )
    solved = SpQR(torch.inf, 0.02, act_order=act_order, block_size=5, range=rule).solve(p)
    assert not solved.residuals
    assert solved.notes["outlier_share"] == 0
    got = solved.dequantize(torch.float64)
    plain = RTN().solve(p).dequantize(torch.float64)
    wanted = plain if solved.notes["rounded"] else expected
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert p.loss(got) <= min(p.loss(plain), p.loss(expected)) * (1 + 1e-4) + 1e-9


@given(fmt=st.sampled_from(FORMATS), out=OUT, width=st.integers(1, 40), seed=SEEDS)
def test_with_a_threshold_of_zero_it_is_the_weight_to_half_precision(problem, fmt, out, width, seed):
    p = problem(fmt, out, width, seed)
    got = SpQR(0.0).solve(p).dequantize()
    # rounding to half precision is an error like any other, and carried forward
    torch.testing.assert_close(got, p.weight, rtol=2e-2, atol=2e-2)
    assert p.loss(got) <= 1e-5 * p.loss(torch.zeros_like(got))


@pytest.mark.parametrize("fmt", ["spqr3-g16", "int3-g7-asym", "int4-channel-sym", "nf4-g7", "int3-g5-asym-zero-fp32"])
@pytest.mark.parametrize("width", [1, 16, 33])
def test_leaving_one_out_gains_what_fitting_without_it_says(fmt, width):
    fmt, rng = parse(fmt), torch.Generator().manual_seed(width)
    w, cost = torch.randn(3, width, generator=rng) ** 3, torch.rand(width, generator=rng) + 0.1
    plain = ranges.plain_format(fmt)
    got, size = leave_one_out(w, fmt, cost), fmt.block[1] or width
    for start in range(0, width, size):
        group, price = w[:, start : start + size], cost[start : start + size]
        alone = replace(plain, block=(1, None))

        def loss(part, weights, alone=alone):
            error = quantize(part, ranges.minmax(part, alone), alone).dequantize(torch.float32) - part
            return (error.square() * weights).sum(1)

        for k in range(group.shape[1]):
            others = [j for j in range(group.shape[1]) if j != k]
            rest = loss(group[:, others], price[others]) if others else torch.zeros(3)
            torch.testing.assert_close(got[:, start + k], loss(group, price) - rest, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fmt", ["spqr3-g16", "int3-g16-asym", "int3-g16-sym"])
def test_the_weights_that_spoil_their_groups_are_found(problem, fmt):
    p, places = planted(problem, fmt)
    solved = SpQR(outlier_threshold=0.2).solve(p)
    found = spared(solved, (16, 64))
    assert (found & places).sum() >= 0.95 * places.sum()
    assert found.sum() < 1.5 * places.sum()
    assert p.loss(solved.dequantize()) < 0.1 * p.loss(SpQR(torch.inf).solve(p).dequantize())


def test_without_the_outliers_groups_are_as_fine_as_if_there_were_none(problem):
    p, places = planted(problem)
    clean = torch.where(places, torch.zeros_like(p.weight), p.weight)
    steps, wanted = (SpQR(**o).solve(replace(p, weight=w)).base.scale.dequantize() for o, w in
                     (({"outlier_threshold": 0.2}, p.weight), ({"outlier_threshold": torch.inf}, clean)))  # fmt: skip
    assert steps.mean() < 1.3 * wanted.mean()


def test_a_spared_weight_is_kept_in_half_precision_and_its_code_means_about_nothing(problem):
    p, _ = planted(problem)
    solved = SpQR().solve(p)
    (kept,) = solved.residuals
    found = spared(solved, (16, 64))
    assert kept.values.dtype == torch.float16
    assert torch.equal(solved.dequantize()[found], kept.values.float())
    assert (kept.values.float() - p.weight[found]).abs().max() < 3
    step = spread(solved.base.scale.dequantize().abs(), (16, 64), (1, 16))
    base = solved.base.dequantize()
    zero_inside = spread(solved.base.zero.dequantize().float(), (16, 64), (1, 16)).abs() <= 3
    assert (base.abs() <= 0.51 * step)[found & zero_inside].all()


def test_the_bits_are_those_of_the_paper(problem):
    p, _ = planted(problem)
    solved = SpQR().solve(p)
    share = float(spared(solved, (16, 64)).float().mean())
    assert share == pytest.approx(solved.notes["outlier_share"])
    pointers = 32 * (16 + 1)
    assert solved.nbits == pytest.approx((3 + 6 / 16 + 64 / 256 + 32 * share) * 16 * 64 + pointers)


def test_the_lower_the_threshold_the_more_is_spared_and_the_less_is_lost(problem):
    shares, losses = [], []
    for threshold in (1.0, 0.4, 0.2, 0.1, 0.0):
        solved = [(p, SpQR(threshold).solve(p)) for p in (problem("spqr3-g16", 16, 64, s) for s in range(10))]
        shares.append(sum(q.notes["outlier_share"] for _, q in solved))
        losses.append(sum(p.loss(q.dequantize()) for p, q in solved))
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert losses == sorted(losses, reverse=True)


def test_on_average_it_beats_gptq_in_its_own_format(problem):
    ratios = []
    for seed in range(20):
        p = problem("spqr3-g16", 16, 64, seed, w="outliers")
        ratios.append(p.loss(SpQR().solve(p).dequantize()) / p.loss(GPTQ().solve(p).dequantize()))
    assert sum(ratios) / 20 < 0.5


def test_a_single_row_is_not_kept_whole(problem):
    for seed in range(10):
        p = problem("int3-g16-asym", 1, 64, seed)
        assert SpQR().solve(p).notes["outlier_share"] < 0.2


def test_what_half_precision_cannot_hold_is_rounded(problem):
    p = problem("int3-g16-asym", 4, 32)
    w = p.weight.clone()
    w[1, 5] = 1e6
    solved = SpQR(0.0).solve(replace(p, weight=w))
    assert solved.dequantize().isfinite().all()
    assert not spared(solved, (4, 32))[1, 5]
    assert float(solved.dequantize()[1, 5]) == pytest.approx(1e6, rel=0.2)


@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_changes_nothing(problem, act_order):
    p = problem("spqr3-g16", 16, 200, 1, dtype=torch.float64)
    expected = SpQR(act_order=act_order).solve(p)
    for block_size in (1, 17, 200):
        got = SpQR(act_order=act_order, block_size=block_size).solve(p)
        assert torch.equal(got.base.codes, expected.base.codes)
        assert torch.equal(spared(got, (16, 200)), spared(expected, (16, 200)))


@pytest.mark.parametrize("spoil", [0.0, torch.nan, torch.inf])
def test_a_hessian_that_is_none_gives_a_finite_result(problem, spoil):
    p = problem("spqr3-g16", 4, 20)
    h = p.hessian * 0 if spoil == 0 else p.hessian.clone()
    h[3, 3] = spoil
    solved = SpQR().solve(replace(p, hessian=h))
    assert solved.dequantize().isfinite().all()
    assert solved.notes["rung"] == "diagonal"


def test_blocks_across_rows_are_refused():
    assert "blocks of 64 do not divide its 40 inputs" in SpQR().refuses((4, 40), NAMED["nf4"])
    assert SpQR().refuses((4, 128), NAMED["nf4"]) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outlier_threshold": -0.1}, "at least 0, not -0.1; 0.1 to 0.45"),
        ({"outlier_threshold": float("nan")}, "not nan"),
        ({"damp_percent": 2.0}, "not 2.0"),
        ({"damping": "most"}, "'most'"),
        ({"block_size": 0}, "not 0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SpQR(**options)
