"""GPTAQ's statistics as the pipeline gathers them: what the float model feeds a layer, against what it gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quantforge import pipeline, recipe
from quantforge import plan as planning
from quantforge.models import tiny
from quantforge.numerics.problem import Problem
from quantforge.solvers.gptaq import GPTAQ

LAST = "model.layers.1.mlp.down_proj"
HELD = (14, 15)  # of sixteen windows, two a batch, the last batch: every eighth one


def tokens(windows: int = 16) -> Tensor:
    return torch.randint(3, 128, (windows, 24), generator=torch.Generator().manual_seed(0))


def quantized(method: str, ids: Tensor, **settings: object) -> tuple[nn.Module, list[pipeline.Layer]]:
    model = tiny.make("llama")
    plan = planning.make(model, recipe.load(method, bits=3, group_size=32, settings=settings), torch.float32)
    return model, pipeline.quantize(model, plan, ids)


@pytest.fixture
def problems(monkeypatch) -> dict[str, Problem]:
    """Return what GPTAQ is given, by the name of the layers, filled as it is used."""
    found, solve = {}, GPTAQ.solve

    def spy(self, problem):
        found[problem.name] = problem
        return solve(self, problem)

    monkeypatch.setattr(GPTAQ, "solve", spy)
    return found


def inputs(model: nn.Module, layer: str, ids: Tensor) -> Tensor:
    """Return what `layer` gets for each window [windows, seq_len, in], in float64."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0].double()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.cat(seen)


def moment(a: Tensor, b: Tensor) -> Tensor:
    """Return (2 / N) Σ a bᵀ over all tokens."""
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    return a.T @ b * (2 / len(a))


def near(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected).norm()) < 1e-4 * float(expected.norm())


def test_the_last_layer_gets_how_far_its_inputs_are_from_the_float_models(problems):
    """The layers before it are quantized by then, so the finished model feeds it what it got."""
    ids = tokens()
    model, _ = quantized("gptaq", ids)
    assert list(problems)[-1] == LAST
    problem, x, x_float = problems[LAST], inputs(model, LAST, ids), inputs(tiny.make("llama"), LAST, ids)
    cross = moment(x_float - x, x)
    assert cross.norm() > 0.01 * moment(x, x).norm()
    assert near(problem.hessian, moment(x, x))
    assert near(problem.drift.cross, cross)
    assert not near(problem.drift.cross, moment(x_float - x, x_float))


def test_every_eighth_batch_is_held_out_to_judge_by(problems):
    ids = tokens()
    model, _ = quantized("gptaq", ids)
    x, x_float = (inputs(m, LAST, ids)[list(HELD)] for m in (model, tiny.make("llama")))
    drift = problems[LAST].drift
    assert drift.held_share == len(HELD) / len(ids)
    assert near(drift.held_hessian, moment(x, x))
    assert near(drift.held_cross, moment(x_float - x, x))


def test_the_first_layers_get_what_the_float_model_feeds_them(problems):
    quantized("gptaq", tokens())
    first, *later = problems.values()
    assert first.name.count("layers.0.self_attn") == 3
    assert not first.drift.cross.any()
    assert not first.drift.held_cross.any()
    assert all(problem.drift.cross.any() for problem in later)


def test_the_first_layers_get_the_codes_of_gptq_and_the_others_do_not():
    by_gptaq, by_gptq = (quantized(method, tokens())[1] for method in ("gptaq", "gptq"))
    same = [torch.equal(a.weight.base.codes, b.weight.base.codes) for a, b in zip(by_gptaq, by_gptq, strict=True)]
    # what is fitted to fewer tokens is only for the search: at strength 0 the codes come from all of them
    assert all(row.weight.notes["strength"] == 0 for row in by_gptaq[:3])
    assert all(same[:3])
    assert not all(same[3:])


def test_with_a_single_window_there_is_nothing_to_judge_by_and_the_codes_are_those_of_gptq(problems):
    one = tokens(1)
    by_gptaq, by_gptq = (quantized(method, one)[1] for method in ("gptaq", "gptq"))
    assert all(problem.drift.held_share == 0 for problem in problems.values())
    assert problems[LAST].drift.cross.any()
    for a, b in zip(by_gptaq, by_gptq, strict=True):
        assert a.weight.notes["strength"] == 0
        assert torch.equal(a.weight.base.codes, b.weight.base.codes), a.name
        assert torch.equal(a.weight.base.scale, b.weight.base.scale), a.name


def test_two_windows_are_one_to_fit_and_one_to_judge(problems):
    quantized("gptaq", tokens(2))
    assert {problem.drift.held_share for problem in problems.values()} == {0.5}


def test_float_inputs_are_gathered_for_no_method_that_does_not_ask_for_them(monkeypatch):
    monkeypatch.setattr(pipeline, "_float_walk", lambda *a: pytest.fail("the float model was run again"))
    quantized("gptq", tokens(2))
    with pytest.raises(pytest.fail.Exception):
        quantized("gptaq", tokens(2))


def test_a_drift_of_zero_is_gptq_at_any_strength(problems):
    quantized("gptaq", tokens(2))
    problem = problems[LAST]
    none = replace(problem, drift=replace(problem.drift, cross=torch.zeros_like(problem.drift.cross)))
    plain = GPTAQ(strength=0.0).solve(problem).dequantize()
    assert torch.equal(GPTAQ(strength=1.0).solve(none).dequantize(), plain)
    assert not torch.equal(GPTAQ(strength=1.0).solve(problem).dequantize(), plain)
