"""Laws that hold for whatever transform is registered."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.registry import create, find, names

TRANSFORMS = names("transform")
STATISTICS = {"hessian", "magnitude", "drift", "extremes", "samples"}
LAYERS = {
    "fmt": st.sampled_from(["int3-g16-asym", "int4-channel-sym", "nf4-f10", "spqr3-g16", "nf4-dq", "int4-tensor-sym"]),
    "out": st.integers(1, 6),
    "width": st.integers(1, 12).map(lambda n: 2 * n),
    "seed": st.integers(0, 9999),
    "x": st.sampled_from(["white", "correlated", "ar", "heavy", "deficient", "dead"]),
    "w": st.sampled_from(["normal", "outliers", "one-sign", "half-zero"]),
}


def alone(x):
    """Tie nothing."""
    return x


def in_pairs(x):
    """Tie every two neighbours by their mean."""
    return x.view(-1, 2).mean(1).repeat_interleave(2)


def test_the_built_in_transforms_are_there():
    assert {"awq", "smoothquant"} <= set(TRANSFORMS)


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(**LAYERS)
def test_scales_are_positive_finite_and_one_a_channel_and_the_answer_repeats(
    problem, transform, fmt, out, width, seed, x, w
):
    p = problem(fmt, out, width, seed, x, w)
    before = copy.deepcopy(p)
    first, second = (create("transform", transform).scales(p, alone) for _ in range(2))
    assert first.shape == (width,)
    assert (first > 0).all()
    assert first.isfinite().all()
    assert torch.equal(first, second)
    assert torch.equal(p.weight, before.weight)
    assert torch.equal(p.hessian, before.hessian)
    assert torch.equal(p.magnitude, before.magnitude)


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(**LAYERS)
def test_channels_that_must_share_a_scale_do(problem, transform, fmt, out, width, seed, x, w):
    scales = create("transform", transform).scales(problem(fmt, out, width, seed, x, w), in_pairs)
    assert torch.equal(scales[::2], scales[1::2])


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(**LAYERS)
def test_the_float_layer_stays_the_same(problem, transform, fmt, out, width, seed, x, w):
    p = problem(fmt, out, width, seed, x, w)
    scales = create("transform", transform).scales(p, alone).double()
    inputs = torch.randn(7, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = (inputs / scales) @ (p.weight.double() * scales).T
    torch.testing.assert_close(moved, inputs @ p.weight.double().T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_it_looks_at_nothing_that_it_does_not_ask_for(problem, transform):
    p = problem("int3-g16-asym", 6, 48, drift=0.2)
    made = create("transform", transform)
    assert set(made.needs) <= STATISTICS
    blind = replace(p, **dict.fromkeys(STATISTICS - set(made.needs)))
    assert torch.equal(made.scales(blind, alone), made.scales(p, alone))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("spoil", [0.0, torch.nan, torch.inf])
def test_statistics_that_say_nothing_give_usable_scales(problem, transform, spoil):
    p = problem("int3-g16-asym", 6, 48)
    for part in ("hessian", "magnitude", "extremes"):
        kept = getattr(p, part)
        bad = (
            tuple(torch.full_like(x, spoil) for x in kept) if isinstance(kept, tuple) else torch.full_like(kept, spoil)
        )
        scales = create("transform", transform).scales(replace(p, **{part: bad}), alone)
        assert (scales > 0).all()
        assert scales.isfinite().all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_documents_its_options(transform):
    cls = find("transform", transform)
    for option in fields(cls):
        assert option.name in cls.__doc__
