"""The loss of a layer, computed tile by tile where its Hessian is large, against the whole product in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.numerics import problem
from quantforge.numerics.formats import parse
from quantforge.numerics.problem import Problem


@given(st.integers(1, 40), st.integers(1, 30), st.booleans(), st.integers(0, 5))
@settings(deadline=None)
def test_losses_are_those_of_the_whole_product_however_the_hessian_is_cut(width, rows, tiled, seed):
    draw = torch.Generator().manual_seed(seed)
    x, weight, approx = (torch.randn(n, width, generator=draw) for n in (2 * width, rows, rows))
    hessian = x.T @ x
    hessian = (hessian + hessian.T) / 2
    layer = Problem("x", weight, parse("int4-channel-sym"), hessian=hessian)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "WIDE", 0 if tiled else 1000)
        losses, energies = layer.row_losses(approx), layer.row_energies()
    for found, error in ((losses, weight - approx), (energies, weight)):
        exact = ((error.double() @ hessian.double()) * error.double()).sum(1)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, weight)


def test_without_a_hessian_it_is_the_squared_error():
    layer = Problem("x", torch.tensor([[1.0, 2.0], [3.0, 5.0]]), parse("int4-channel-sym"))
    assert layer.row_losses(torch.zeros(2, 2)).tolist() == [5.0, 34.0]
    assert layer.row_energies().tolist() == [5.0, 34.0]
    assert layer.loss(torch.ones(2, 2)) == 21.0
