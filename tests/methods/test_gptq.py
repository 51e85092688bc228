"""GPTQ chooses the codes of the published algorithm, is never worse than rounding, and survives any Hessian."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.numerics import ranges
from quantforge.numerics.blocks import spread
from quantforge.numerics.problem import Problem
from quantforge.numerics.qtensor import quantize
from quantforge.solvers.gptq import GPTQ
from quantforge.solvers.rtn import RTN
from quantforge.solvers.sweep import inverse_factor

INPUTS = ["white", "correlated", "ar", "heavy", "deficient", "dead"]
KINDS = ["normal", "outliers", "one-sign", "half-zero"]
FORMATS = ["int4-g16-asym", "int3-channel-sym", "int2-g5-asym", "int4-g7-sym-fp16", "int8-channel-asym-bf16"]
SHARED = ["int4-tensor-sym", "int3-tensor-asym-fp16"]
SEEDS = st.integers(0, 9999)
OUT, WIDTH = st.integers(1, 6), st.integers(1, 40)


def with_hessian(p, h):
    return Problem(p.name, p.weight, p.format, h)


def same(a, b):
    """Return whether two QTensors are stored alike."""
    zero = a.zero is b.zero is None or torch.equal(a.zero, b.zero)
    return zero and torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


def costs(p, solver):
    """Return 1 / U_jj² of each column in natural order."""
    order = p.hessian.diagonal().argsort(descending=True, stable=True)
    order = order if solver.act_order else torch.arange(len(order))
    f = inverse_factor(p.hessian, solver.damp_percent, order, relative=solver.damping == "relative")
    return (f.u.diagonal() ** -2)[order.argsort()]


def candidates(p, solver):
    """Return W rounded under the range that `solver` chooses and under min-max."""
    chosen = ranges.rule(solver.range)(p.weight, p.format, costs(p, solver))
    return [quantize(p.weight, r, p.format) for r in (chosen, ranges.minmax(p.weight, p.format))]


@pytest.mark.parametrize("act_order", [False, True])
@given(
    fmt=st.sampled_from(FORMATS),
    out=st.integers(1, 4),
    width=st.integers(1, 20),
    seed=SEEDS,
    x=st.sampled_from(["white", "correlated", "ar", "deficient", "dead"]),
    w=st.sampled_from(KINDS),
    damping=st.sampled_from(["relative", "mean"]),
    rule=st.sampled_from(["minmax", "mse", "hessian"]),
)
def test_each_row_is_the_papers_or_the_better_rounded_one(
    problem, reference, act_order, fmt, out, width, seed, x, w, damping, rule
):
    p = problem(fmt, out, width, seed, x, w, dtype=torch.float64)
    solver = GPTQ(damp_percent=0.02, damping=damping, act_order=act_order, block_size=7, range=rule)
    order = reference.by_falling_diagonal(p.hessian) if act_order else list(range(width))
    h = reference.damped(p.hessian, 0.02, damping == "relative")
    h = h if p.hessian.any() else torch.eye(width, dtype=torch.float64)
    cost = torch.empty(width, dtype=torch.float64)
    for k, j in enumerate(order):
        cost[j] = 1 / torch.linalg.inv(h[order[k:]][:, order[k:]])[0, 0]
    r = ranges.rule(rule)(p.weight, p.format, cost)
    scale, zero = (spread(s.double(), (out, width), p.format.block).expand(out, width) for s in (r.scale, r.zero))

    def rounded(j, column):
        value = (column / scale[:, j] + zero[:, j]).round().clamp(p.format.grid.low, p.format.grid.high)
        return (value - zero[:, j]) * scale[:, j]

    expected = [reference.obq_in_order(p.weight, h, rounded, order)]
    plain = [quantize(p.weight, r, p.format), quantize(p.weight, ranges.minmax(p.weight, p.format), p.format)]
    expected += [q.dequantize(torch.float64) for q in plain]
    losses = torch.stack([p.row_losses(e) for e in expected])
    solved = solver.solve(p)
    got = solved.base.dequantize(torch.float64)
    assert (solved.notes["damp"], solved.notes["rung"]) == (0.02, "float64" if p.hessian.any() else "diagonal")
    for i in range(out):
        best = losses[:, i].min() * (1 + 1e-6) + 1e-9
        matches = [torch.allclose(got[i], e[i], rtol=1e-6, atol=1e-9) for e in expected]
        assert any(m and losses[k, i] <= best for k, m in enumerate(matches))


@given(
    fmt=st.sampled_from(FORMATS + SHARED),
    out=OUT,
    width=WIDTH,
    seed=SEEDS,
    x=st.sampled_from(INPUTS),
    w=st.sampled_from(KINDS),
    rule=st.sampled_from(["minmax", "mse", "hessian", "percentile"]),
    act_order=st.booleans(),
)
@settings(max_examples=150)
def test_it_is_never_worse_than_rounding(problem, fmt, out, width, seed, x, w, rule, act_order):
    p = problem(fmt, out, width, seed, x, w)
    solver = GPTQ(range=rule, act_order=act_order)
    solved = solver.solve(p).dequantize()
    assert solved.isfinite().all()
    for q in candidates(p, solver):
        plain = q.dequantize(torch.float32)
        if p.format.block[0] == 1:
            assert (p.row_losses(solved) <= p.row_losses(plain)).all()
        assert p.loss(solved) <= p.loss(plain) * (1 + 1e-6)


@given(width=st.integers(1, 24), seed=SEEDS, x=st.sampled_from(["ar", "heavy"]))
@settings(max_examples=100)
def test_a_single_row_is_never_worse_than_rounding(problem, width, seed, x):
    p = problem("int3-channel-asym", 1, width, seed, x)
    assert p.loss(GPTQ(range="minmax").solve(p).dequantize()) <= p.loss(RTN().solve(p).dequantize())


def test_some_single_rows_would_be_worse_were_they_not_replaced(problem):
    kept = [GPTQ().solve(problem("int3-channel-asym", 1, 16, seed)).notes["rows_rounded"] for seed in range(60)]
    assert set(kept) == {0, 1}


@pytest.mark.parametrize("fmt", ["int4-g16-asym", "int3-channel-sym", "int4-channel-asym", "int3-g16-sym"])
@pytest.mark.parametrize("x", ["correlated", "ar"])
def test_it_beats_rounding_on_outputs_though_not_on_weights(problem, fmt, x):
    p = problem(fmt, 32, 64, x=x)
    for solver in (GPTQ(range="minmax"), GPTQ(range="minmax", act_order=False)):
        rounded, solved = RTN().solve(p).dequantize(), solver.solve(p).dequantize()
        assert p.loss(solved) < 0.8 * p.loss(rounded)
        assert (p.weight - solved).norm() > (p.weight - rounded).norm()


def test_the_heaviest_inputs_first_pays_where_scales_differ(problem):
    ratios = []
    for seed in range(50):
        p = problem("int4-channel-asym", 8, 32, seed, "heavy")
        first, natural = (p.loss(GPTQ(act_order=o, range="minmax").solve(p).dequantize()) for o in (True, False))
        ratios.append(first / natural)
    assert sum(ratios) / len(ratios) < 0.9


@given(fmt=st.sampled_from(FORMATS + SHARED), out=OUT, width=WIDTH, seed=SEEDS, act_order=st.booleans())
def test_with_independent_inputs_it_is_rounding(problem, fmt, out, width, seed, act_order):
    p = problem(fmt, out, width, seed)
    diagonal = torch.rand(width, generator=torch.Generator().manual_seed(seed)) * 100
    for h in (torch.eye(width), 7 * torch.eye(width), torch.diag(diagonal), torch.zeros(width, width)):
        solved = GPTQ(range="minmax", act_order=act_order).solve(with_hessian(p, h))
        assert same(solved.base, RTN().solve(p).base)
        assert solved.notes["rows_rounded"] == 0


@pytest.mark.parametrize("rule", ["mse", "hessian"])
@given(fmt=st.sampled_from(["int4-g8-asym", "int3-g4-sym-fp16", "int2-g8-asym-bf16"]), out=OUT, seed=SEEDS)
def test_with_independent_inputs_it_is_rounding_under_the_searched_range_too(problem, rule, fmt, out, seed):
    p = problem(fmt, out, 24, seed, dtype=torch.float64)
    diagonal = torch.ones(24, dtype=torch.float64)
    if rule == "hessian":
        diagonal = torch.rand(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    p = with_hessian(p, torch.diag(diagonal))
    expected = quantize(p.weight, ranges.rule(rule)(p.weight, p.format, diagonal), p.format)
    assert same(GPTQ(range=rule).solve(p).base, expected)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("x", ["correlated", "ar", "heavy"])
@pytest.mark.parametrize("fmt", ["int4-g48-asym", "int4-g128-sym", "int3-channel-asym"])
def test_block_size_changes_no_code(problem, fmt, x, act_order):
    p = problem(fmt, 6, 300, 1, x, dtype=torch.float64)
    expected = GPTQ(act_order=act_order, block_size=128).solve(p).base
    for block_size in (1, 17, 300, 4096):
        assert same(GPTQ(act_order=act_order, block_size=block_size).solve(p).base, expected)


def test_block_size_changes_next_to_no_code_in_float32(problem):
    for seed in range(3):
        p = problem("int4-g48-asym", 16, 300, seed)
        expected = GPTQ(block_size=128).solve(p).base.codes
        for block_size in (1, 17, 300):
            got = GPTQ(block_size=block_size).solve(p).base.codes
            assert (got == expected).float().mean() >= 0.999


@given(fmt=st.sampled_from(FORMATS + SHARED), out=OUT, width=WIDTH, seed=SEEDS, x=st.sampled_from(INPUTS))
def test_how_much_data_there_was_does_not_matter(problem, fmt, out, width, seed, x):
    p = problem(fmt, out, width, seed, x)
    expected = GPTQ().solve(p)
    for factor in (2.0**-20, 0.25, 2.0, 2.0**20):
        assert same(GPTQ().solve(with_hessian(p, p.hessian * factor)).base, expected.base)
    wide = problem(fmt, out, width, seed, x, dtype=torch.float64)
    if x in ("white", "correlated", "ar"):
        assert same(GPTQ().solve(with_hessian(wide, wide.hessian * 3)).base, GPTQ().solve(wide).base)


@given(fmt=st.sampled_from(FORMATS), out=OUT, width=WIDTH, seed=SEEDS, x=st.sampled_from(INPUTS[:3]))
def test_rows_are_independent(problem, fmt, out, width, seed, x):
    p = problem(fmt, out, width, seed, x, dtype=torch.float64)
    alone = GPTQ().solve(p).base
    order = torch.randperm(out, generator=torch.Generator().manual_seed(seed))
    permuted = GPTQ().solve(Problem("layer", p.weight[order], p.format, p.hessian)).base
    assert torch.equal(permuted.codes, alone.codes[order])
    assert torch.equal(permuted.scale, alone.scale[order])
    other = problem(fmt, 3, width, seed + 1, x, w="outliers", dtype=torch.float64)
    stacked = GPTQ().solve(Problem("layer", torch.cat([p.weight, other.weight]), p.format, p.hessian)).base
    assert same(stacked.rows(0, out), alone)
    assert same(stacked.rows(out, out + 3), GPTQ().solve(with_hessian(other, p.hessian)).base)


@given(
    fmt=st.sampled_from(FORMATS + SHARED),
    out=OUT,
    width=WIDTH,
    seed=SEEDS,
    x=st.sampled_from(INPUTS),
    rule=st.sampled_from(["minmax", "mse", "percentile"]),
)
def test_groups_keep_the_ranges_of_rounding_in_natural_order(problem, fmt, out, width, seed, x, rule):
    p = problem(fmt, out, width, seed, x)
    solved = GPTQ(range=rule, act_order=True).solve(p)
    rounded, plain = RTN(range=rule).solve(p).base, RTN().solve(p).base
    base = solved.base
    assert base.scale.shape == rounded.scale.shape
    as_rounded, as_plain = (
        (base.scale == q.scale).all(1) & (True if q.zero is None else (base.zero == q.zero).all(1))
        for q in (rounded, plain)
    )
    assert (as_rounded | as_plain).all()
    # only a replaced row may have another range than the chosen one
    assert int((~as_rounded).sum()) <= (solved.notes["rows_rounded"] if p.format.block[0] == 1 else out)


@given(fmt=st.sampled_from(FORMATS), out=OUT, width=st.integers(2, 40), seed=SEEDS, act_order=st.booleans())
def test_columns_without_input_keep_their_rounded_weight(problem, fmt, out, width, seed, act_order):
    p = problem(fmt, out, width, seed, "dead")
    dead = p.hessian.diagonal() == 0
    solved = GPTQ(act_order=act_order).solve(p)
    q = solved.base
    zero = torch.zeros_like(q.scale.float()) if q.zero is None else q.zero.float()
    expected = quantize(p.weight, ranges.Range(q.scale.float(), zero), p.format)
    assert solved.notes["dead_columns"] == int(dead.sum())
    assert torch.equal(q.codes[:, dead], expected.codes[:, dead])


def at(h, places, value):
    """Return `h` with `value` at `places` and their mirror images."""
    h = h.clone()
    for i, j in places:
        h[i, j] = h[j, i] = value
    return h


SPOILT = {
    "zero": lambda h: h * 0,
    "nan": lambda h: at(h, [(len(h) // 2, 0)], torch.nan),
    "nan diagonal": lambda h: at(h, [(-1, -1)], torch.nan),
    "inf": lambda h: at(h, [(len(h) // 2, 0)], torch.inf),
    "inf diagonal": lambda h: at(at(h, [(0, 0)], -torch.inf), [(-1, -1)], torch.inf),
    "all nan": lambda h: h * torch.nan,
    "rank one": lambda h: torch.outer(h[0], h[0]),
    "indefinite": lambda h: h - 2 * torch.diag(h.diagonal()),
    "shifted": lambda h: h - 0.05 * h.diagonal().mean() * torch.eye(len(h)),
    "tiny": lambda h: h * 1e-30,
    "huge": lambda h: h * 1e25,
}


@pytest.mark.parametrize("name", SPOILT)
@given(
    fmt=st.sampled_from(FORMATS + SHARED),
    out=OUT,
    width=WIDTH,
    seed=SEEDS,
    damp=st.sampled_from([0.0, 0.01]),
    damping=st.sampled_from(["relative", "mean"]),
    act_order=st.booleans(),
)
@settings(max_examples=25)
def test_any_hessian_gives_a_usable_result_and_a_note(problem, name, fmt, out, width, seed, damp, damping, act_order):
    p = problem(fmt, out, width, seed)
    h = SPOILT[name](p.hessian)
    before = h.clone()
    solver = GPTQ(damp_percent=damp, damping=damping, act_order=act_order)
    solved = solver.solve(with_hessian(p, h))
    assert torch.equal(h.nan_to_num(), before.nan_to_num())
    assert solved.dequantize().isfinite().all()
    assert (solved.base.scale > 0).all()
    assert solved.notes["rung"] in ("float32", "float64", "diagonal")
    assert solved.notes["damp"] >= damp
    if not h.isfinite().all() or not h.any():
        assert solved.notes["rung"] == "diagonal"
        error = (p.weight - solved.dequantize()).square().sum()
        assert error <= (p.weight - RTN().solve(p).dequantize()).square().sum() * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_of_code_is_solved_with_every_code_used(problem, bits, kind):
    p = problem(f"int{bits}-channel-{kind}", 24, 64)
    q = GPTQ(range="minmax").solve(p).base
    assert q.codes.unique().numel() > 0.9 * 2**bits
    assert p.loss(q.dequantize(torch.float32)) < 0.9 * p.loss(RTN().solve(p).dequantize())


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10])
@pytest.mark.parametrize("fmt", ["int4-g16-asym", "int4-channel-sym"])
def test_layers_of_any_size_gain_alike(problem, fmt, size):
    p = problem(fmt, 16, 32)
    small = Problem("layer", p.weight.double() * size, p.format, p.hessian.double())
    ratio = small.loss(GPTQ(range="minmax").solve(small).base.dequantize(torch.float64))
    ratio /= small.loss(RTN().solve(small).base.dequantize(torch.float64))
    assert ratio < 0.8


def test_the_notes_say_what_was_done(problem):
    notes = GPTQ(damp_percent=0.05).solve(problem(x="dead", seed=4)).notes
    assert (notes["damp"], notes["rung"]) == (0.05, "float32")
    assert notes["dead_columns"] > 0


def test_without_a_hessian_it_names_the_layer(problem):
    p = problem()
    with pytest.raises(ValueError, match="layer: GPTQ needs a Hessian"):
        GPTQ().solve(Problem(p.name, p.weight, p.format))


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"damp_percent": -0.1}, "damp_percent must lie between 0 and 1, not -0.1"),
        ({"damp_percent": 1.5}, "not 1.5"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
        ({"range": "best"}, "no range rule is called 'best'"),
    ],
)
def test_options_out_of_range_are_refused(settings_, said):
    with pytest.raises(ValueError, match=said):
        GPTQ(**settings_)
