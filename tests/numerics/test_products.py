"""Products by oneDNN are those of F.linear but for rounding, with their gradients, wherever they are taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantforge.numerics import products
from quantforge.numerics.products import fast_linear, linear


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_torch_has_the_operator_or_this_machine_computes_as_ever():
    if torch.backends.mkldnn.is_available():
        assert products._AVAILABLE, "torch has oneDNN, but its operator has another name now"


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 50), st.booleans(), st.integers(0, 2**16))
def test_products_are_those_in_float64(rows, width, out, has_bias, seed):
    x, weight = draw(rows, width, seed=seed), draw(out, width, seed=seed + 1)
    bias = draw(out, seed=seed + 2) if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-4)


@given(st.integers(1, 3), st.integers(16, 30), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_gradients_are_those_of_f_linear(batch, rows, width, out, has_bias):
    leaves = [draw(batch, rows, width), draw(out, width, seed=1), *([draw(out, seed=2)] if has_bias else [])]
    found = []
    for function in (linear, F.linear):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        result = function(*inputs)
        found.append([result.detach(), *torch.autograd.grad(result.square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_gradient_is_told_for_what_wants_one_only():
    x, weight = draw(20, 8).requires_grad_(), draw(6, 8)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert not linear(x.detach(), weight).requires_grad


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (draw(20, 8, dtype=torch.bfloat16), draw(6, 8, dtype=torch.bfloat16)),
        (draw(20, 8, dtype=torch.float64), draw(6, 8, dtype=torch.float64)),
        (draw(8, 20).T, draw(6, 8)),
        (draw(20, 8), draw(8, 6).T),
        (draw(3, 8), draw(6, 8)),
        (draw(0, 8), draw(6, 8)),
        (draw(20, 8), draw(0, 8)),
    ],
    ids=["bfloat16", "float64", "strided input", "strided weight", "few rows", "no rows", "no outputs"],
)
def test_what_onednn_is_not_asked_for_is_torchs_own(x, weight):
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("shape", [(), (1,), (1, 6)])
def test_a_bias_of_another_shape_is_torchs_own_matter(shape):
    x, weight, bias = draw(20, 8), draw(6, 8), draw(*shape) if shape else torch.tensor(1.5)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_weight_of_one_row_and_no_axis_is_torchs_own_matter():
    x = draw(20, 8)
    assert torch.equal(linear(x, draw(8)), F.linear(x, draw(8)))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(x, draw(6, 7))


def test_autocast_is_obeyed():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(draw(20, 8), draw(6, 8)).dtype == torch.bfloat16


def test_models_compute_their_linear_layers_so_within_and_as_ever_outside(monkeypatch):
    asked = []
    monkeypatch.setattr(products, "linear", lambda *args: asked.append(1) or F.linear(*args))
    layer, x = torch.nn.Linear(8, 6), draw(20, 8)
    with fast_linear():
        layer(x)
        F.linear(x, weight=layer.weight)  # by name: not seen
    layer(x)
    assert len(asked) == (1 if products._AVAILABLE else 0)


def test_where_torch_lacks_onednn_its_own_products_are_used(monkeypatch):
    monkeypatch.setattr(products, "_AVAILABLE", False)
    x, weight = draw(20, 8), draw(6, 8)
    with fast_linear():
        assert torch.equal(F.linear(x, weight), linear(x, weight))
