"""Laws that hold for whatever correction is registered."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.formats import parse
from quantforge.registry import create, find, names
from quantforge.solvers.rtn import RTN
from quantforge.solvers.spqr import SpQR

CORRECTIONS = names("correction")
FORMATS = ["int3-g16-asym", "int4-channel-sym-fp16", "nf4-f10", "spqr3-g16", "int3-g16-asym-bf16-zero-bf16", "nf4-dq"]
SHAPES = [(8, 8), (9, 40), (18, 20), (40, 12)]
LAYERS = {
    "fmt": st.sampled_from(FORMATS),
    "shape": st.sampled_from(SHAPES),
    "seed": st.integers(0, 9999),
    "x": st.sampled_from(["white", "correlated", "ar", "heavy", "deficient", "dead"]),
    "w": st.sampled_from(["normal", "outliers", "one-sign", "half-zero"]),
}


def test_the_built_in_corrections_are_there():
    assert "lorc" in CORRECTIONS


@pytest.mark.parametrize("correction", CORRECTIONS)
@given(**LAYERS)
def test_codes_stay_and_the_loss_does_not_rise(problem, correction, fmt, shape, seed, x, w):
    p = problem(fmt, *shape, seed, x, w)
    solved = RTN().solve(p)
    before = copy.deepcopy((p, solved))
    made = create("correction", correction)
    assert made.refuses(shape, p.format) is None
    first, second = (made.correct(p, solved) for _ in range(2))
    assert torch.equal(first.base.codes, before[1].base.codes)
    assert first.base is solved.base
    assert first.residuals[: len(solved.residuals)] == solved.residuals
    assert p.loss(first.dequantize()) <= p.loss(solved.dequantize()) * (1 + 1e-6)
    assert first.dequantize().isfinite().all()
    assert torch.equal(first.dequantize(), second.dequantize())
    assert torch.equal(p.weight, before[0].weight)
    assert torch.equal(p.hessian, before[0].hessian)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_adds_the_bits_it_says(problem, correction, fmt, shape):
    p, made = problem(fmt, *shape), create("correction", correction)
    for layer in (p, replace(p, weight=RTN().solve(p).dequantize())):
        solved = RTN().solve(layer)
        assert made.correct(layer, solved).nbits - solved.nbits == made.nbits(shape)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_it_comes_after_what_is_there_already(problem, correction):
    p = problem("spqr3-g16", 16, 32, w="outliers")
    solved = SpQR().solve(p)
    assert solved.residuals
    corrected = create("correction", correction).correct(p, solved)
    assert corrected.residuals[0] is solved.residuals[0]
    assert len(corrected.residuals) == 2
    assert corrected.notes.items() >= solved.notes.items()
    assert p.loss(corrected.dequantize()) < p.loss(solved.dequantize())


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_it_looks_at_nothing_that_it_does_not_ask_for(problem, correction):
    p, made = problem("int3-g16-asym", 16, 32, drift=0.2), create("correction", correction)
    blind = replace(p, **dict.fromkeys({"hessian", "magnitude", "drift"} - set(made.needs)))
    solved = RTN().solve(p)
    assert torch.equal(made.correct(blind, solved).dequantize(), made.correct(p, solved).dequantize())


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("spoil", [0.0, torch.nan, torch.inf])
def test_a_hessian_that_is_none_gives_a_finite_result(problem, correction, spoil):
    p = problem("int3-g16-asym", 16, 32)
    solved = RTN().solve(p)
    h = p.hessian.clone()
    h[...] = spoil
    assert create("correction", correction).correct(replace(p, hessian=h), solved).dequantize().isfinite().all()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_what_it_refuses_it_refuses_in_one_sentence(correction):
    said = create("correction", correction).refuses((1, 1), parse("int4-g16-asym"))
    assert said is None or (said.endswith(".") and "\n" not in said)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_every_correction_documents_its_options(correction):
    cls = find("correction", correction)
    for option in fields(cls):
        assert option.name in cls.__doc__
