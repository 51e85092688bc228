"""Laws that hold for whatever solver is registered, in every format that it does not refuse."""

import copy
import json
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.numerics import grids
from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.registry import create, find, names
from quantforge.solvers.rtn import RTN

SETTINGS = {"spare": {"share": 0.2}}  # where the default leaves layers as small as these alone


def make(solver):
    """Return `solver` with its defaults, or with what makes it do something here."""
    return create("solver", solver, SETTINGS.get(solver))


SOLVERS = names("solver")
SEEING = [n for n in SOLVERS if "hessian" in make(n).needs]
FORMATS = [
    "int2-g16-asym",
    "int3-g7-sym-fp16",
    "int4-g16-asym-bf16",
    "int4-g16-sym",
    "int5-channel-asym",
    "int6-channel-sym",
    "int7-tensor-sym-bf16",
    "int8-tensor-asym",
    "nf4-g16-fp16",
    "nf3-g16",
    "e2m1-g16-bf16",
    "fp4-channel",
    "nf4-f10",  # blocks across the ends of rows
    "int4-f10-asym",
    "nf4-dq",
    "int4-f64-sym-dq",
    "spqr3-g16",
    "int3-g16-asym-fp16-zero-fp16",
    "int4-channel-asym-zero-fp32",
    "int4-f10-asym-zero-fp32",
    "int2-g7-asym-bf16-zero-bf16",
]
SHAPES = [(1, 1), (1, 17), (5, 1), (3, 16), (3, 33), (18, 20)]


def taken(solver, shape):
    """Return the formats in which `solver` takes a layer of `shape`."""
    return [f for f in FORMATS if make(solver).refuses(shape, parse(f)) is None]


@st.composite
def layers(draw, solver):
    """Draw the arguments of `problem` for a layer that `solver` takes."""
    out, width = draw(st.sampled_from([1, 2, 3, 5, 17, 20])), draw(st.integers(1, 40))
    return {
        "fmt": draw(st.sampled_from(taken(solver, (out, width)))),
        "out": out,
        "width": width,
        "seed": draw(st.integers(0, 9999)),
        "x": draw(st.sampled_from(["white", "correlated", "ar", "heavy", "deficient", "dead"])),
        "w": draw(st.sampled_from(["normal", "outliers", "one-sign", "half-zero"])),
    }


def tensors(part):
    """Return every tensor in a frozen dataclass, whatever it is made of, in order."""
    if isinstance(part, torch.Tensor):
        return [part]
    if isinstance(part, tuple):
        return [t for p in part for t in tensors(p)]
    if is_dataclass(part) and not isinstance(part, (Format, grids.Grid)):
        return [t for f in fields(part) for t in tensors(getattr(part, f.name))]
    return []


def check_stored(q, fmt, nested=False):
    """Assert that `q` holds what `fmt` stores and nothing else."""
    assert q.format == fmt
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < len(fmt.grid.values)
    blocks = counts(q.shape, fmt.block)
    for part, kept in ((q.scale, fmt.scale), (q.zero, torch.int8 if fmt.zero is None else fmt.zero)):
        if part is q.zero and fmt.symmetric:
            assert part is None
        elif isinstance(kept, Format):
            assert isinstance(part, QTensor)
            assert part.shape == blocks
            check_stored(part, kept, nested=True)
        else:
            assert (part.shape, part.dtype) == (blocks, kept)
            assert part.isfinite().all()
    if isinstance(q.scale, torch.Tensor):
        assert (q.scale > 0).all()
    if isinstance(q.zero, torch.Tensor) and fmt.zero is None:
        assert q.zero.min() >= fmt.grid.low
        assert q.zero.max() <= fmt.grid.high
    assert (q.offset is None) == (not fmt.centered)


def test_the_built_in_solvers_are_there():
    assert {"rtn", "gptq", "gptaq", "spqr", "hqq", "quantile", "obq", "spare"} <= set(SOLVERS)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_there_are_formats_to_test_it_in(solver, shape):
    assert len(taken(solver, shape)) >= 3


@pytest.mark.parametrize("solver", SOLVERS)
@given(data=st.data())
def test_the_result_holds_only_what_its_format_stores(problem, solver, data):
    p = problem(**data.draw(layers(solver)), drift=0.3)
    solved = make(solver).solve(p)
    q, shape = solved.base, tuple(p.weight.shape)
    own = q.format.grid.name == grids.CUSTOM  # the layer's own table
    fmt = replace(p.format, grid=q.format.grid) if own else p.format
    assert q.shape == shape
    check_stored(q, fmt)
    assert fmt.grid.bits <= p.format.grid.bits
    assert solver == "quantile" or not own
    assert make(solver).extends_format or not (own or solved.residuals)
    assert solved.nbits == fmt.nbits(shape) + sum(r.nbits for r in solved.residuals)
    assert solved.dequantize().isfinite().all()
    assert solved.residuals or torch.equal(solved.dequantize(), q.dequantize(torch.float32))
    json.dumps(solved.notes, allow_nan=False)


@pytest.mark.parametrize("solver", SOLVERS)
@given(data=st.data())
def test_the_problem_is_left_alone_and_the_answer_repeats(problem, solver, data):
    p = problem(**data.draw(layers(solver)), drift=0.3)
    before = copy.deepcopy(p)
    first, second = (make(solver).solve(p) for _ in range(2))
    for a, b in zip(tensors(p), tensors(before), strict=True):
        assert torch.equal(a, b)
    assert first.notes == second.notes
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("solver", SEEING)
@given(data=st.data())
@settings(max_examples=60)
def test_solvers_that_see_data_never_lose_to_rounding(problem, solver, data):
    p = problem(**data.draw(layers(solver)))
    plain = p.loss(RTN().solve(p).dequantize())
    assert p.loss(make(solver).solve(p).dequantize()) <= plain * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("solver", [n for n in SOLVERS if not make(n).needs])
def test_solvers_that_see_no_data_need_none(problem, solver):
    for fmt in taken(solver, (8, 48)):
        p = problem(fmt)
        blind = make(solver).solve(Problem(p.name, p.weight, p.format))
        assert torch.equal(blind.dequantize(), make(solver).solve(p).dequantize())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_layers_of_one_row_one_column_or_a_short_group_are_solved(problem, solver, shape, size):
    for fmt in taken(solver, shape):
        for seed in range(2):
            p = problem(fmt, *shape, seed)
            p = replace(p, weight=p.weight * size)
            relative = p.loss(make(solver).solve(p).dequantize()) / p.loss(torch.zeros_like(p.weight))
            assert relative < {2: 0.9, 3: 0.35}.get(p.format.grid.bits, 0.1), fmt


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_of_zero_stay_zero(problem, solver):
    for fmt in taken(solver, (8, 48)):
        p = problem(fmt)
        zero = replace(p, weight=torch.zeros_like(p.weight))
        assert not make(solver).solve(zero).dequantize().any(), fmt


@pytest.mark.parametrize("solver", ["rtn", *SEEING])
def test_weights_that_the_format_holds_are_kept_within_a_step(problem, solver):
    for fmt in taken(solver, (8, 48)):
        p = problem(fmt)
        stored = Problem("layer", RTN().solve(p).dequantize(), p.format, p.hessian)
        again = make(solver).solve(stored).dequantize()
        assert stored.loss(again) <= stored.loss(RTN().solve(stored).dequantize()) * (1 + 1e-6), fmt


@pytest.mark.parametrize("solver", SOLVERS)
@given(data=st.data())
@settings(max_examples=25)
def test_rows_cut_out_are_rows_of_the_matrix(problem, solver, data):
    p = problem(**data.draw(layers(solver)))
    solved = make(solver).solve(p)
    unit, out = p.format.row_unit, p.weight.shape[0]
    if unit is None:
        with pytest.raises(ValueError, match="shares scales between rows"):
            solved.rows(0, out)
        return
    start = data.draw(st.integers(0, (out - 1) // unit)) * unit
    stop = min(data.draw(st.integers(start // unit + 1, -(-out // unit))) * unit, out)
    part = solved.rows(start, stop)
    assert isinstance(part, QWeight)
    assert torch.equal(part.dequantize(), solved.dequantize()[start:stop])
    check_stored(part.base, solved.base.format)


@pytest.mark.parametrize("solver", SOLVERS)
@given(data=st.data())
@settings(max_examples=25)
def test_the_product_is_that_with_the_dense_matrix(problem, solver, data):
    p = problem(**data.draw(layers(solver)))
    solved = make(solver).solve(p)
    x = torch.randn(5, p.weight.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = x @ solved.dequantize(torch.float64).T
    torch.testing.assert_close(solved.product(x), expected, rtol=1e-9, atol=1e-9 * float(1 + expected.abs().max()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_it_refuses_it_refuses_with_a_reason_and_a_way_out(solver):
    for shape in [*SHAPES, (4, 4096)]:
        for fmt in FORMATS:
            said = make(solver).refuses(shape, parse(fmt))
            assert said is None or (said.endswith(".") and "\n" not in said and len(said) > 30)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_documents_its_options(solver):
    cls = find("solver", solver)
    assert cls.__doc__
    for option in fields(cls):
        assert option.name in cls.__doc__
