"""The column loop and its factor obey the identities of GPTQ, in float64 and against plain references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.calibrate.stats import Hessian
from quantforge.numerics.blocks import spread
from quantforge.numerics.ranges import minmax, round_to
from quantforge.solvers.sweep import inverse_factor, sweep

INPUTS = ["white", "correlated", "ar", "heavy", "deficient", "dead"]
FORMATS = ["int4-g16-asym", "int3-channel-sym", "int2-g5-asym", "int8-tensor-sym", "int4-g7-sym-fp16"]
SEEDS = st.integers(0, 9999)


def rounder(p, clamp=True):
    """Return the function (natural column, its values) → the column as stored under the layer's min-max range."""
    shape = tuple(p.weight.shape)
    r = minmax(p.weight, p.format)
    scale, zero = (spread(s, shape, p.format.block).expand(shape).double() for s in (r.scale, r.zero))

    def rounded(j, column):
        if clamp:
            return round_to(column, scale[:, j], zero[:, j], p.format)
        return ((column / scale[:, j] + zero[:, j]).round() - zero[:, j]) * scale[:, j]

    return rounded, scale


def run(p, damp=0.01, block_size=128, order=None, clamp=True):
    """Return Ŵ of the sweep with columns in `order`, in natural order, and the factor."""
    factor = inverse_factor(p.hessian, damp, order)
    order = torch.arange(p.weight.shape[1]) if order is None else order
    rounded, _ = rounder(p, clamp)
    swept = sweep(p.weight.T[order].clone(), factor.u, lambda j, c: rounded(int(order[j]), c).to(c.dtype), block_size)
    out = torch.empty_like(swept)
    out[order] = swept
    return out.T, factor


@pytest.mark.parametrize("kind", INPUTS)
@given(width=st.integers(1, 40), seed=SEEDS, damp=st.sampled_from([0.003, 0.01, 0.1]))
def test_the_factor_is_upper_triangular_and_inverts_the_damped_hessian(problem, reference, kind, width, seed, damp):
    h = problem(width=width, seed=seed, x=kind, dtype=torch.float64).hessian
    order = h.diagonal().argsort(descending=True)
    for taken, relative in ((None, False), (order, False), (None, True), (order, True)):
        f = inverse_factor(h, damp, taken, relative=relative)
        if not h.any():
            assert f.rung == "diagonal"
            continue
        expected = reference.damped(h, f.damp, relative)
        expected = expected if taken is None else expected[taken][:, taken]
        assert (f.damp, f.rung) == (damp, "float64")
        assert torch.equal(f.u, f.u.triu())
        assert (f.u.diagonal() > 0).all()
        # scaled so that the largest input does not hide the others
        size = expected.diagonal().sqrt()
        unit = (f.u * size).T @ (f.u * size) @ (expected / torch.outer(size, size))
        torch.testing.assert_close(unit, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-6)


@given(width=st.integers(2, 40), seed=SEEDS, kind=st.sampled_from(INPUTS[:3]))
def test_a_float32_factor_is_the_float64_one_rounded(problem, width, seed, kind):
    p = problem(width=width, seed=seed, x=kind)
    narrow, wide = inverse_factor(p.hessian, 0.01), inverse_factor(p.hessian.double(), 0.01)
    assert (narrow.rung, narrow.u.dtype) == ("float32", torch.float32)
    torch.testing.assert_close(narrow.u.double(), wide.u, rtol=1e-3, atol=1e-4 * float(wide.u.abs().max()))


@pytest.mark.parametrize("kind", INPUTS)
@given(fmt=st.sampled_from(FORMATS), out=st.integers(1, 6), width=st.integers(1, 40), seed=SEEDS)
def test_the_error_is_the_rounding_errors_carried_forward(problem, reference, kind, fmt, out, width, seed):
    p = problem(fmt, out, width, seed, kind, dtype=torch.float64)
    w_hat, f = run(p)
    delta = p.weight - w_hat
    errors = torch.linalg.solve_triangular(f.u, delta, upper=True, left=False)
    # what each column lacked when its turn came: W_j less the errors carried to it so far
    at_turn = p.weight - errors @ (f.u - f.u.diagonal().diag())
    torch.testing.assert_close((at_turn - w_hat) / f.u.diagonal(), errors, rtol=1e-8, atol=1e-8)
    rounded, _ = rounder(p)
    again = torch.stack([rounded(j, at_turn[:, j]) for j in range(width)], 1)
    assert ((again - w_hat).abs() < 1e-9).float().mean() >= 0.99
    if f.rung != "diagonal":
        h = reference.damped(p.hessian, f.damp)
        torch.testing.assert_close(errors.square().sum(), ((delta @ h) * delta).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["white", "correlated", "ar", "deficient", "dead"])
@settings(max_examples=8)
@given(fmt=st.sampled_from(FORMATS), out=st.integers(1, 4), width=st.integers(1, 20), seed=SEEDS, ordered=st.booleans())
def test_the_sweep_is_the_papers_gptq_and_obq_in_a_fixed_order(
    problem, reference, kind, fmt, out, width, seed, ordered
):
    p = problem(fmt, out, width, seed, kind, dtype=torch.float64)
    order = reference.by_falling_diagonal(p.hessian) if ordered else None
    w_hat, f = run(p, 0.01, 7, None if order is None else torch.tensor(order))
    if f.rung == "diagonal":
        return  # no input at all
    rounded, scale = rounder(p)
    for plain in (reference.gptq_by_inverse, reference.obq_in_order):
        expected = plain(p.weight, reference.damped(p.hessian, f.damp), rounded, order)
        assert torch.equal((w_hat / scale).round(), (expected / scale).round())
        torch.testing.assert_close(w_hat, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["correlated", "ar", "heavy"])
@pytest.mark.parametrize("width", [300, 33])
def test_block_size_changes_nothing_in_float64(problem, kind, width):
    p = problem("int4-g48-asym", 6, width, 1, kind, dtype=torch.float64)
    expected, _ = run(p, block_size=128)
    for block_size in (1, 16, 17, 32, 100, width, 1000):
        torch.testing.assert_close(run(p, block_size=block_size)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["correlated", "ar"])
def test_block_size_changes_next_to_nothing_in_float32(problem, kind):
    for seed in range(3):
        p = problem("int4-g48-asym", 16, 300, seed, kind)
        expected, _ = run(p, block_size=128)
        for block_size in (1, 17, 300):
            same = (run(p, block_size=block_size)[0] - expected).abs() < 1e-4
            assert same.float().mean() >= 0.999


@given(out=st.integers(1, 6), width=st.integers(1, 50), seed=SEEDS, kind=st.sampled_from(INPUTS))
def test_without_clamping_the_error_obeys_babais_bound(problem, out, width, seed, kind):
    p = problem("int3-g16-asym", out, width, seed, kind, dtype=torch.float64)
    w_hat, f = run(p, clamp=False)
    _, scale = rounder(p)
    errors = torch.linalg.solve_triangular(f.u, p.weight - w_hat, upper=True, left=False)
    bound = (scale / f.u.diagonal()).square() / 4
    assert (errors.square() <= bound * (1 + 1e-6) + 1e-9).all()
    assert errors.square().sum() <= bound.sum() * (1 + 1e-6)


@given(fmt=st.sampled_from(FORMATS), out=st.integers(1, 6), width=st.integers(1, 40), seed=SEEDS)
def test_with_independent_inputs_the_sweep_is_plain_rounding(problem, fmt, out, width, seed):
    p = problem(fmt, out, width, seed)
    diagonal = torch.rand(width, generator=torch.Generator().manual_seed(seed)) * 100
    rounded, _ = rounder(p)
    for h in (torch.eye(width), torch.diag(diagonal), torch.zeros(width, width)):
        u = inverse_factor(h, 0.01).u
        got = sweep(p.weight.T.clone(), u, lambda j, c: rounded(j, c).float()).T
        expected = torch.stack([rounded(j, p.weight[:, j]) for j in range(width)], 1).float()
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("kind", "ratio"), [("correlated", 0.8), ("ar", 0.5), ("heavy", 0.85)])
def test_on_average_the_sweep_beats_rounding_by_far(problem, kind, ratio):
    ratios = []
    for seed in range(60):
        p = problem("int4-channel-asym", 8, 32, seed, kind, dtype=torch.float64)
        rounded, _ = rounder(p)
        plain = torch.stack([rounded(j, p.weight[:, j]) for j in range(32)], 1)
        ratios.append(p.loss(run(p)[0]) / p.loss(plain))
    assert sum(ratios) / len(ratios) < ratio


def test_the_sweep_works_in_place_and_leaves_the_factor_alone(problem):
    p = problem(dtype=torch.float64)
    wt, u = p.weight.T.clone(), inverse_factor(p.hessian, 0.01).u
    before = u.clone()
    rounded, _ = rounder(p)
    assert sweep(wt, u, rounded) is wt
    assert torch.equal(u, before)


def contaminated():
    """Return name → (Hessian [12, 12] float32, the rungs it may end on)."""
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(40, 12, generator=rng)
    good = x.T @ x
    low = x[:2].T @ x[:2]
    cases = {"zero": (torch.zeros(12, 12), {"diagonal"}), "rank two": (low, {"float32", "float64"})}
    for name, value in {"nan": torch.nan, "inf": torch.inf}.items():
        for where in ((3, 3), (2, 5)):
            h = good.clone()
            h[where] = h[where[::-1]] = value
            cases[f"{name} at {where}"] = (h, {"diagonal"})
    cases["slightly indefinite"] = (low - 0.02 * low.diagonal().mean() * torch.eye(12), {"float32", "float64"})
    cases["far from definite"] = (good - 3 * torch.diag(good.diagonal()), {"diagonal"})
    cases["huge off the diagonal"] = (torch.eye(12) + 10 * (1 - torch.eye(12)), {"diagonal"})
    return cases


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("name", contaminated())
def test_no_hessian_breaks_the_factor_and_the_rung_is_told(name, damp):
    h, rungs = contaminated()[name]
    before = h.clone()
    f = inverse_factor(h, damp)
    assert torch.equal(h.nan_to_num(), before.nan_to_num())
    assert f.u.isfinite().all()
    assert (f.u.diagonal() > 0).all()
    assert f.rung in rungs
    assert f.damp >= damp
    if f.rung == "diagonal":
        assert torch.equal(f.u, f.u.diagonal().diag())


def test_damping_rises_until_the_hessian_can_be_factored():
    h, _ = contaminated()["slightly indefinite"]
    h = h.double()
    mean = h.diagonal().mean()
    f = inverse_factor(h, 0.001)
    assert 0.001 < f.damp <= 1
    assert torch.linalg.eigvalsh(h + f.damp * mean * torch.eye(12))[0] > 0
    unit = f.u.T @ f.u @ (h + f.damp * mean * torch.eye(12))
    torch.testing.assert_close(unit, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)


def test_what_float32_cannot_factor_float64_can():
    rungs = set()
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 1, generator=rng, dtype=torch.float64)
        x = x + 7e-4 * torch.randn(60, 40, generator=rng, dtype=torch.float64)
        h = (x.T @ x).float()
        f = inverse_factor(h, 2e-7)
        if f.damp == 2e-7:
            rungs.add(f.rung)
        if f.rung == "float64":
            assert f.u.dtype == torch.float32
            wide = inverse_factor(h.double(), f.damp).u.float()
            torch.testing.assert_close(f.u, wide, rtol=1e-3, atol=1e-4 * float(wide.max()))
    assert "float64" in rungs


def test_columns_never_used_are_named_dead(problem):
    p = problem(x="dead", seed=4)
    f = inverse_factor(p.hessian, 0.01)
    dead = p.hessian.diagonal() == 0
    assert dead.any()
    assert torch.equal(f.dead, dead)
    assert not f.u[dead][:, ~dead].any()
    assert not f.u[~dead][:, dead].any()


@given(width=st.integers(1, 40), tokens=st.integers(1, 60), seed=SEEDS, kind=st.sampled_from(INPUTS))
def test_the_hessian_is_twice_the_mean_outer_product(reference, width, tokens, seed, kind):
    rng = torch.Generator().manual_seed(seed)
    x = reference.inputs(kind, tokens, width, rng).float()
    stats = Hessian(width)
    stats.add(x)
    h = stats.value()
    expected = 2 / tokens * (x.double().T @ x.double())
    size = expected.diagonal().sqrt()
    assert (h.dtype, stats.tokens, stats.skipped) == (torch.float32, tokens, 0)
    assert torch.equal(h, h.T)
    assert ((h.double() - expected).abs() <= 1e-5 * torch.outer(size, size) + 1e-30).all()


@given(width=st.integers(1, 20), cuts=st.lists(st.integers(0, 50), max_size=5), seed=SEEDS)
def test_how_tokens_are_batched_does_not_matter(width, cuts, seed):
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(seed))
    whole, split, shaped = Hessian(width), Hessian(width), Hessian(width)
    whole.add(x)
    for part in x.tensor_split(sorted(cuts)):
        split.add(part)
    shaped.add(x.reshape(5, 10, width))
    for other in (split, shaped):
        assert other.tokens == 50
        torch.testing.assert_close(other.value(), whole.value(), rtol=1e-5, atol=1e-5)


@given(width=st.integers(1, 20), seed=SEEDS, bad=st.sets(st.integers(0, 29), max_size=8))
def test_tokens_that_are_not_finite_are_left_out_and_counted(width, seed, bad):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(30, width, generator=rng)
    good = [i for i in range(30) if i not in bad]
    spoilt, clean = Hessian(width), Hessian(width)
    for i in bad:
        x[i, int(torch.randint(width, (1,), generator=rng))] = [torch.nan, torch.inf, -torch.inf][i % 3]
    spoilt.add(x)
    clean.add(x[good])
    assert (spoilt.tokens, spoilt.skipped) == (len(good), len(bad))
    assert torch.equal(spoilt.value(), clean.value())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_near_their_limit_do_not_overflow(dtype):
    x = torch.full((64, 9), 6e4).to(dtype)
    stats = Hessian(9)
    stats.add(x)
    torch.testing.assert_close(stats.value(), torch.full((9, 9), 2 * float(x[0, 0]) ** 2), rtol=1e-6, atol=0)


def test_tokens_whose_sum_overflows_are_still_counted():
    x = torch.zeros(4, 3)
    x[:, 0] = 1e18
    x[0, 1] = 3e38
    x[1, 1] = 3e38
    stats = Hessian(3)
    stats.add(x)
    assert (stats.tokens, stats.skipped) == (4, 0)


def test_no_tokens_make_a_hessian_of_zeros():
    stats = Hessian(5)
    assert not stats.value().any()
    stats.add(torch.zeros(0, 5))
    stats.add(torch.full((2, 5), torch.nan))
    assert (stats.tokens, stats.skipped) == (0, 2)
    assert torch.equal(stats.value(), torch.zeros(5, 5))
