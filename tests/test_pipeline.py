"""The pipeline: what it hands to a solver, puts into the model and reports."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import quantforge
from quantforge import course, pipeline, recipe, solving
from quantforge import plan as planning
from quantforge.errors import QuantForgeError
from quantforge.models import arch, tiny

KINDS = tiny.names()


def tokens(windows: int = 16, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(seed))


def quantized(kind: str, method: str = "gptq", ids: Tensor | None = None, **changes):
    """Return a tiny model of architecture `kind`, quantized, and its rows."""
    model = tiny.make(kind)
    plan = planning.make(model, recipe.load(method, **{"group_size": 32, **changes}), torch.float32)
    needed = bool(plan.recipe.solver.needs)
    return model, pipeline.quantize(model, plan, (tokens() if ids is None else ids) if needed else None)


def divergence(model: nn.Module, reference: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (reference, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_stays_closer_to_the_float_model_than_rounding(kind):
    held_out = tokens(16, seed=1)
    ids = tokens(96)
    loss = {m: divergence(quantized(kind, m, ids, bits=3)[0], tiny.make(kind), held_out) for m in ("rtn", "gptq")}
    assert 0 < loss["gptq"] < loss["rtn"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_become_the_dequantized_codes_and_nothing_else_changes(kind):
    model, rows = quantized(kind)
    before = tiny.make(kind)
    done = {row.name for row in rows}
    for row in rows:
        weight = arch.get_weight(model.get_submodule(row.name))
        assert torch.equal(weight, row.weight.dequantize())
        assert not torch.equal(weight, arch.get_weight(before.get_submodule(row.name)))
    for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert name.removesuffix(".weight") in done or torch.equal(a, b), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rows_and_progress_come_in_the_order_of_the_plan(kind, method):
    model = tiny.make(kind)
    plan = planning.make(model, recipe.load(method, group_size=32), torch.float32)
    told = []
    rows = pipeline.quantize(model, plan, tokens(2) if method == "gptq" else None, told.append)
    assert [row.name for row in rows] == list(plan.layers)
    assert told == rows
    assert all(row.tokens == (48 if method == "gptq" else 0) for row in rows)
    assert all(row.seconds >= 0 for row in rows)


def test_losses_are_those_of_the_inputs_that_the_layer_gets():
    model, rows = quantized("llama", bits=3)
    original, row = tiny.make("llama"), rows[0]
    seen: list[Tensor] = []
    layer = original.get_submodule(row.name)
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64).double()))
    with torch.no_grad():
        original(tokens())
    x = torch.cat(seen)
    weight, approx = arch.get_weight(layer).double(), arch.get_weight(model.get_submodule(row.name)).double()
    lost, all_of_it = (float(((x @ w.T) ** 2).sum(1).mean() * 2) for w in (weight - approx, weight))
    assert row.loss == pytest.approx(lost, rel=1e-4)
    assert row.relative_loss == pytest.approx(lost / all_of_it, rel=1e-4)
    assert all(0 < r.relative_loss < 0.5 for r in rows)


def test_without_data_losses_are_those_of_the_weights():
    model, rows = quantized("llama", "rtn")
    for row in rows:
        weight = arch.get_weight(tiny.make("llama").get_submodule(row.name)).double()
        lost = float(((weight - arch.get_weight(model.get_submodule(row.name)).double()) ** 2).sum())
        assert row.loss == pytest.approx(lost, rel=1e-4)
        assert row.relative_loss == pytest.approx(lost / float((weight**2).sum()), rel=1e-4)


def test_with_data_rounding_gives_the_same_codes_and_the_losses_of_the_outputs():
    model = tiny.make("llama")
    plan = planning.make(model, recipe.load("rtn", bits=3, group_size=32), torch.float32)
    rows = pipeline.quantize(model, plan, tokens(), collect=frozenset({"hessian"}))
    plain, solved = quantized("llama", "rtn", bits=3)[1], quantized("llama", bits=3)[1]
    for row, blind in zip(rows, plain, strict=True):
        assert torch.equal(row.weight.base.codes, blind.weight.base.codes)
        assert row.tokens == 384
        assert row.loss != blind.loss
    assert rows[0].loss > solved[0].loss


def test_what_needs_no_inputs_walks_no_model(monkeypatch):
    """SmoothQuant looks at inputs once, before; its layers are then rounded by their weights alone."""
    walks = []
    real = course.walk
    monkeypatch.setattr(course, "walk", lambda *args: walks.append(1) or real(*args))
    for method, count in (("smoothquant", 1), ("smoothquant+gptq", 2), ("rtn", 0)):
        walks.clear()
        model = tiny.make("llama")
        plan = planning.make(model, recipe.load(method), torch.float32)
        rows = pipeline.quantize(model, plan, tokens())
        assert len(walks) == count
        assert all(row.relative_loss > 0 for row in rows)


def test_a_layer_of_zeros_has_no_relative_loss():
    model = tiny.make("llama")
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    result = quantforge.quantize(model, group_size=32, calibration=tokens(2))
    row = next(r for r in result.layers if r.name == "model.layers.0.mlp.up_proj")
    assert (row.loss, row.relative_loss) == (0, 0)
    assert all(math.isfinite(r.relative_loss) for r in result.layers)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_layers_solved_as_one_matrix_get_the_codes_of_layers_solved_alone(monkeypatch, group_size, symmetric):
    together = quantized("llama", group_size=group_size, symmetric=symmetric)[1]
    sizes = []
    monkeypatch.setattr(solving, "_stacks", lambda layers: [sizes.append(1) or [p] for p in layers])
    alone = quantized("llama", group_size=group_size, symmetric=symmetric)[1]
    assert len(sizes) == 14
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.weight.base.codes, b.weight.base.codes)
        assert torch.equal(a.weight.base.scale, b.weight.base.scale)
        assert symmetric or torch.equal(a.weight.base.zero, b.weight.base.zero)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_layers_that_read_one_input_are_stacked():
    model = tiny.make("llama")
    plan = planning.make(model, recipe.load("gptq", group_size=32), torch.float32)
    sizes = [
        [len(s) for s in solving._stacks([plan.layers[name] for name in stage.names])]
        for stage in arch.find_stages(model)[0]
    ]
    assert sizes == [[3], [1], [2], [1]] * 2


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_same_inputs_give_the_same_codes_and_no_random_number_is_drawn(method):
    state = torch.get_rng_state()
    first, second = (quantized("qwen2", method)[1] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.weight.base.codes, b.weight.base.codes)
        assert torch.equal(a.weight.base.scale, b.weight.base.scale)
        assert (a.loss, a.relative_loss, a.weight.notes) == (b.loss, b.relative_loss, b.weight.notes)


def test_other_data_give_other_codes():
    a, b = (quantized("llama", ids=tokens(seed=seed))[1] for seed in (0, 1))
    assert any(not torch.equal(x.weight.base.codes, y.weight.base.codes) for x, y in zip(a, b, strict=True))


def test_a_layer_that_is_never_called_is_rounded_and_named():
    model = tiny.make("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x))
    result = quantforge.quantize(model, group_size=32, calibration=tokens(4), settings={"solver.range": "minmax"})
    idle = result.layers[-3]
    assert (idle.name, idle.tokens) == ("model.layers.1.mlp.gate_proj", 96)  # it shares the input of up_proj
    mlp.forward = lambda x: x
    model = tiny.make("llama")
    model.model.layers[1].mlp.forward = lambda x: x
    result = quantforge.quantize(model, group_size=32, calibration=tokens(4), settings={"solver.range": "minmax"})
    names = [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert result.fallbacks() == [f"{name} saw no calibration token and was rounded" for name in names]
    rounded = tiny.make("llama")
    rows = quantforge.quantize(rounded, "rtn", group_size=32).layers
    for row, plain in zip(result.layers[-3:], rows[-3:], strict=True):
        assert row.tokens == 0
        assert torch.equal(row.weight.base.codes, plain.weight.base.codes)


def test_inputs_that_are_nowhere_finite_are_named_and_nothing_becomes_nan():
    model = tiny.make("llama")
    model.model.layers[1].input_layernorm.weight.data.fill_(3e38)  # finite itself, its outputs are not
    result = quantforge.quantize(model, group_size=32, calibration=tokens(4))
    assert [row.tokens for row in result.layers] == [96] * 7 + [0] * 7
    assert len(result.fallbacks()) == 7
    assert all(arch.get_weight(model.get_submodule(row.name)).isfinite().all() for row in result.layers)


def test_fewer_tokens_than_inputs_is_no_obstacle():
    model, rows = quantized("llama", ids=tokens(1, 2))
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()
    assert {row.tokens for row in rows} == {2}


def test_a_skipped_layer_stays_as_it_is_and_the_others_of_its_stage_do_not():
    model = tiny.make("llama")
    chosen = recipe.load("gptq", group_size=32)
    chosen = recipe.replace(chosen, skip=("lm_head", "k_proj", "model.layers.0.mlp.down_proj"))
    plan = planning.make(model, chosen, torch.float32)
    rows = pipeline.quantize(model, plan, tokens(2))
    assert len(rows) == 11
    for name, module in tiny.make("llama").named_modules():
        if isinstance(module, nn.Linear):
            same = torch.equal(module.weight, model.get_submodule(name).weight)
            assert same == (name == "lm_head" or name.endswith("k_proj") or name == "model.layers.0.mlp.down_proj"), (
                name
            )


@pytest.mark.parametrize(
    "ids", [torch.zeros(0, 8, dtype=torch.int64), torch.full((1, 8), 4000), torch.full((1, 8), -1)]
)
def test_token_ids_that_no_model_can_read_are_an_error_of_one_line(ids):
    with pytest.raises(QuantForgeError):
        quantforge.quantize(tiny.make("llama"), group_size=32, calibration=ids)


def test_losses_on_float_inputs_are_those_of_the_float_model_which_stays():
    model, ids = tiny.make("llama"), torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = planning.make(model, recipe.load("rtn", bits=3, group_size=32), torch.float32)
    found = pipeline.float_losses(model, {"a": plan}, ids)["a"]
    assert list(found) == list(plan.layers)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    seen = {}
    for name in plan.layers:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, n=name: seen.__setitem__(n, args[0].detach())
        )
    with torch.no_grad():
        model(ids)
    rounded = {row.name: row.weight.dequantize() for row in pipeline.quantize(tiny.make("llama"), plan)}
    for name, (loss, relative) in found.items():
        x, weight = seen[name].flatten(0, 1).double(), before[f"{name}.weight"].double()
        error, energy = ((x @ w.T).square().sum() * 2 / len(x) for w in (weight - rounded[name].double(), weight))
        assert loss == pytest.approx(float(error), rel=1e-4)
        assert relative == pytest.approx(float(error / energy), rel=1e-4)
