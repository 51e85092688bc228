"""SmoothQuant: the identities of its scales, exact folding, and what it gains on inputs with a few wide channels."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quantforge
from quantforge import pipeline, recipe
from quantforge import plan as planning
from quantforge.models import arch, tiny
from quantforge.numerics.inputs import parse_inputs
from quantforge.transforms.smoothquant import SmoothQuant, smooth

SEEDS = st.integers(0, 9999)


def alone(x):
    return x


def sizes(p):
    """Return max|x| and max|w| of each channel."""
    low, high = p.extremes
    return torch.maximum(low.abs(), high.abs()), p.weight.abs().amax(0)


@given(seed=SEEDS, x=st.sampled_from(["white", "heavy", "ar"]), w=st.sampled_from(["normal", "outliers"]))
def test_alpha_says_where_the_difficulty_goes(problem, seed, x, w):
    p = problem("int8-channel-sym", 8, 48, seed, x, w)
    inputs, weights = sizes(p)
    for alpha in (0.0, 0.5, 1.0):
        s = SmoothQuant(alpha).scales(p, alone)
        if alpha == 0.0:
            torch.testing.assert_close(weights * s, torch.ones(48))
        elif alpha == 1.0:
            torch.testing.assert_close(inputs / s, torch.ones(48))
        else:
            torch.testing.assert_close(inputs / s, weights * s)


@given(seed=SEEDS)
def test_at_one_half_a_smoothed_layer_is_left_alone(problem, seed):
    p = problem("int8-channel-sym", 8, 48, seed, "heavy")
    s = SmoothQuant(0.5).scales(p, alone)
    again = replace(p, weight=p.weight * s, extremes=tuple(x / s for x in p.extremes))
    torch.testing.assert_close(SmoothQuant(0.5).scales(again, alone), torch.ones(48), rtol=1e-4, atol=1e-4)


def test_dead_channels_and_dead_weights_have_usable_scales():
    s = smooth(torch.tensor([0.0, 1.0, 3e4]), torch.tensor([[1.0, 0.0, 1e-9]]), 0.8)
    assert (s > 0).all()
    assert s.isfinite().all()


def test_the_search_is_never_worse_than_a_fixed_alpha_on_the_samples(problem):
    for seed in range(5):
        p = replace(problem("int4-channel-sym", 8, 48, seed, "heavy"), inputs=parse_inputs("int8-token"))
        own = SmoothQuant(search=True)
        errors = [own._error(p, SmoothQuant(alpha).scales(p, alone)) for alpha in (0.5, 0.8)]
        assert own._error(p, own.scales(p, alone)) <= min(errors)


def wide(kind="llama"):
    """Return a model in which a few channels of every norm's output are fifty times as large."""
    model = tiny.make(kind)
    for name, module in model.named_modules():
        if name.endswith("layernorm") and "post_feedforward" not in name:
            module.weight.data[::16] = 50.0
    return model


@pytest.mark.parametrize("granularity", ["int8-token", "int8-tensor", "int8-tensor-static"])
def test_it_gains_where_a_few_channels_are_wide(granularity):
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = wide()(ids).logits
    errors = []
    for method in ("rtn", "smoothquant"):
        model = wide()
        made = recipe.load(method, bits=8, group_size=-1, symmetric=True, inputs=granularity)
        pipeline.quantize(model, planning.make(model, made, torch.float32), ids)
        with torch.no_grad():
            errors.append(float((model(ids).logits - wanted).square().mean()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("kind", sorted(set(arch.TABLE) - {"gemma3"}))
@pytest.mark.parametrize("down", [False, True])
def test_in_float_the_smoothed_model_computes_what_it_did(kind, down):
    """Its layers left in float: only the folding is done."""
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
    model = tiny.make(kind)
    with torch.no_grad():
        wanted = model(ids).logits
    chosen = recipe.load("smoothquant", settings={"transform.down": down})
    plan = planning.make(model, chosen, torch.float32)
    batches = [ids]
    for transform in chosen.transforms:
        pipeline._rescale(model, plan, transform, batches)
    with torch.no_grad():
        found = model(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert not torch.equal(found, wanted)


def test_alpha_out_of_range_is_refused():
    with pytest.raises(quantforge.errors.RecipeError, match=r"alpha must lie between 0 and 1, not 1\.5"):
        recipe.load("smoothquant", settings={"transform.alpha": 1.5})
