"""Laws that hold for whatever solver is registered."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import parse
from quantforge.numerics.problem import Problem
from quantforge.registry import create, find, names
from quantforge.solvers.rtn import RTN

SOLVERS = names("solver")
FORMATS = [
    "int2-g16-asym",
    "int3-g7-sym-fp16",
    "int4-g16-asym-bf16",
    "int4-g16-sym",
    "int5-channel-asym",
    "int6-channel-sym",
    "int7-tensor-sym-bf16",
    "int8-tensor-asym",
]
LAYERS = {
    "fmt": st.sampled_from(FORMATS),
    "out": st.integers(1, 6),
    "width": st.integers(1, 40),
    "seed": st.integers(0, 9999),
    "x": st.sampled_from(["white", "correlated", "ar", "heavy", "deficient", "dead"]),
    "w": st.sampled_from(["normal", "outliers", "one-sign", "half-zero"]),
}


def test_the_built_in_solvers_are_there():
    assert {"rtn", "gptq"} <= set(SOLVERS)


@pytest.mark.parametrize("solver", SOLVERS)
@given(**LAYERS)
def test_the_result_holds_only_what_its_format_stores(problem, solver, fmt, out, width, seed, x, w):
    p = problem(fmt, out, width, seed, x, w)
    solved = create("solver", solver).solve(p)
    q = solved.base
    assert q.format == p.format == parse(fmt)
    assert (q.codes.shape, q.codes.dtype) == ((out, width), torch.uint8)
    assert int(q.codes.max()) < 2**q.format.grid.bits
    assert (q.scale.shape, q.scale.dtype) == (counts((out, width), q.format.block), q.format.scale)
    assert (q.scale > 0).all()
    assert q.scale.isfinite().all()
    assert (q.zero is None) == q.format.symmetric
    if q.zero is not None:
        assert (q.zero.shape, q.zero.dtype) == (q.scale.shape, torch.int8)
        assert q.zero.min() >= q.format.grid.low
        assert q.zero.max() <= q.format.grid.high
    assert solved.dequantize().isfinite().all()
    assert torch.equal(solved.dequantize(), q.dequantize(torch.float32))
    json.dumps(solved.notes, allow_nan=False)


@pytest.mark.parametrize("solver", SOLVERS)
@given(**LAYERS)
def test_the_problem_is_left_alone_and_the_answer_repeats(problem, solver, fmt, out, width, seed, x, w):
    p = problem(fmt, out, width, seed, x, w)
    before = copy.deepcopy(p)
    first, second = (create("solver", solver).solve(p) for _ in range(2))
    assert torch.equal(p.weight, before.weight)
    assert torch.equal(p.hessian, before.hessian)
    assert first.notes == second.notes
    for a, b in zip((first.base.codes, first.base.scale), (second.base.codes, second.base.scale), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.dequantize(), second.dequantize())


@pytest.mark.parametrize("solver", [n for n in SOLVERS if "hessian" in create("solver", n).needs])
@given(**LAYERS)
@settings(max_examples=80)
def test_solvers_that_see_data_never_lose_to_rounding(problem, solver, fmt, out, width, seed, x, w):
    p = problem(fmt, out, width, seed, x, w)
    plain = p.loss(RTN().solve(p).dequantize())
    assert p.loss(create("solver", solver).solve(p).dequantize()) <= plain * (1 + 1e-6)


@pytest.mark.parametrize("solver", [n for n in SOLVERS if "hessian" not in create("solver", n).needs])
def test_solvers_that_see_no_data_need_none(problem, solver):
    p = problem()
    blind = create("solver", solver).solve(Problem(p.name, p.weight, p.format))
    assert torch.equal(blind.dequantize(), create("solver", solver).solve(p).dequantize())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("out", "width"), [(1, 1), (1, 17), (5, 1), (3, 16), (3, 33)])
def test_layers_of_one_row_one_column_or_a_short_group_are_solved(problem, solver, fmt, out, width):
    for seed in range(3):
        p = problem(fmt, out, width, seed)
        relative = p.loss(create("solver", solver).solve(p).dequantize()) / p.loss(torch.zeros_like(p.weight))
        assert relative < {"2": 0.9, "3": 0.35}.get(fmt[3], 0.1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_of_zero_stay_zero(problem, solver, fmt):
    p = problem(fmt)
    zero = Problem("layer", torch.zeros_like(p.weight), p.format, p.hessian)
    assert not create("solver", solver).solve(zero).dequantize().any()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("fmt", [f for f in FORMATS if "tensor" not in f])
def test_weights_that_the_format_holds_are_kept_within_a_step(problem, solver, fmt):
    p = problem(fmt)
    stored = Problem("layer", RTN().solve(p).dequantize(), p.format, p.hessian)
    again = create("solver", solver).solve(stored).dequantize()
    assert stored.loss(again) <= stored.loss(RTN().solve(stored).dequantize()) * (1 + 1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_documents_its_options(solver):
    cls = find("solver", solver)
    assert cls.__doc__
    for option in cls.__dataclass_fields__:
        assert option in cls.__doc__
