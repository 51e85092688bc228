"""LoRC's factors are the best of their rank, in the norm that they are fitted in."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.corrections.lorc import LoRC, factor
from quantforge.numerics.formats import parse
from quantforge.solvers.rtn import RTN

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 16))
SEEDS = st.integers(0, 9999)


def drawn(shape, seed):
    """Return an error E [out, in] and a Hessian H [in, in] in float64."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * shape[1], shape[1], generator=rng, dtype=torch.float64)
    x = x @ torch.randn(shape[1], shape[1], generator=rng, dtype=torch.float64)
    return torch.randn(shape, generator=rng, dtype=torch.float64), x.T @ x + 1e-3 * torch.eye(shape[1])


def norm(error, h):
    """Return tr(E H Eᵀ)."""
    return float(((error @ h) * error).sum())


@given(shape=SHAPES, seed=SEEDS)
def test_full_rank_is_exact_plain_or_whitened(shape, seed):
    error, h = drawn(shape, seed)
    for root in (None, torch.linalg.cholesky(h)):
        a, b = factor(error, min(shape), root)
        torch.testing.assert_close(a @ b, error, rtol=1e-6, atol=1e-6)


@given(shape=SHAPES, seed=SEEDS)
def test_the_rest_is_the_singular_values_that_were_left_out(shape, seed):
    error, h = drawn(shape, seed)
    root = torch.linalg.cholesky(h)
    for metric, wanted, lower in ((torch.eye(shape[1], dtype=torch.float64), error, None), (h, error @ root, root)):
        s = torch.linalg.svdvals(wanted)
        for rank in range(1, min(shape) + 1):
            a, b = factor(error, rank, lower)
            assert (a.shape, b.shape) == ((shape[0], rank), (rank, shape[1]))
            expected = float(s[rank:].square().sum())
            assert norm(error - a @ b, metric) == pytest.approx(expected, rel=1e-6, abs=1e-8 * float(s[0]) ** 2)


@given(shape=SHAPES, seed=SEEDS)
def test_whitened_is_never_worse_on_outputs_and_plain_never_worse_on_weights(shape, seed):
    error, h = drawn(shape, seed)
    for rank in range(1, min(shape) + 1):
        plain, white = (error - torch.matmul(*factor(error, rank, r)) for r in (None, torch.linalg.cholesky(h)))
        slack = 1e-7 * norm(error, h)
        assert norm(white, h) <= norm(plain, h) + slack
        assert plain.norm() <= white.norm() + 1e-6


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_higher_rank_leaves_less(problem, whiten, bits):
    p = problem("int3-g16-asym", 24, 48, x="ar")
    solved, losses = RTN().solve(p), []
    judged = p if whiten else replace(p, hessian=None)
    for rank in (1, 2, 4, 8, 16, 24):
        losses.append(judged.loss(LoRC(rank, whiten, bits).correct(p, solved).dequantize()))
    assert losses[0] < judged.loss(solved.dequantize())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("kind", ["white", "correlated", "ar", "heavy"])
def test_whitening_lowers_the_loss_of_the_report_further(problem, kind):
    for seed in range(5):
        p = problem("int3-g16-asym", 24, 48, seed, kind)
        solved = RTN().solve(p)
        plain, white = (p.loss(LoRC(4, w, 16, damp=1e-6).correct(p, solved).dequantize()) for w in (False, True))
        assert white <= plain * 1.001
        assert white < p.loss(solved.dequantize())


def test_eight_bits_lose_next_to_nothing_of_the_gain(problem):
    p = problem("int3-g16-asym", 64, 128, x="ar")
    solved = RTN().solve(p)
    corrected = [LoRC(8, bits=bits).correct(p, solved) for bits in (8, 16)]
    before, eight, sixteen = (p.loss(q.dequantize()) for q in (solved, *corrected))
    assert before - eight > 0.97 * (before - sixteen)


def test_the_randomized_decomposition_is_near_the_exact_one():
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(120, 200, generator=rng)
    part = torch.randn(120, 6, generator=rng) @ torch.randn(6, 200, generator=rng)
    for error in (noise, noise + part, part):
        for rank in (1, 6, 20):
            rest = [float((error - torch.matmul(*factor(error, rank, exact=e))).norm()) for e in (True, False)]
            assert rest[1] <= rest[0] * 1.02 + 1e-2
            assert rest[1] >= rest[0] * (1 - 1e-4) - 1e-3


def test_the_randomized_decomposition_repeats_and_leaves_the_global_generator_alone():
    error = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, second = factor(error, 3, exact=False), factor(error, 3, exact=False)
    assert torch.equal(first[0], second[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_on_the_grid_are_left_as_they_are(problem, whiten, bits):
    p = problem("int4-g16-sym", 8, 48)
    solved = RTN().solve(p)
    exact = replace(p, weight=solved.dequantize())
    corrected = LoRC(4, whiten, bits).correct(exact, solved)
    a, b = corrected.residuals[-1].factors()
    assert not a.any()
    assert not b.any()
    assert torch.equal(corrected.dequantize(), solved.dequantize())


def test_columns_of_a_and_rows_of_b_are_of_equal_size():
    error, h = drawn((10, 14), 0)
    for root in (None, torch.linalg.cholesky(h)):
        a, b = factor(error, 5, root)
        torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [("int4-g16-sym-fp16", torch.float16), ("int4-g16-sym-bf16", torch.bfloat16), ("nf4-dq", torch.bfloat16)],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_factors_are_kept_in_the_dtype_of_the_scales_if_that_is_a_half_one(problem, fmt, dtype, bits):
    p = problem(fmt, 8, 48)
    for layer in (p, replace(p, weight=RTN().solve(p).dequantize())):
        low_rank = LoRC(4, bits=bits).correct(layer, RTN().solve(layer)).residuals[-1]
        assert {f.dtype for f in low_rank.factors()} == {dtype}


def test_a_rank_larger_than_the_weight_is_refused():
    assert "rank 8 is larger than its 4 x 64 weight allows; at most 4" in LoRC(8).refuses((4, 64), parse("nf4"))
    assert LoRC(4).refuses((4, 64), parse("nf4")) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "at least 1, not 0; 8 is usual"),
        ({"bits": 9}, "2 to 8, or 16, not 9"),
        ({"damp": -0.5}, "between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        LoRC(**options)
