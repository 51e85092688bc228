"""Layer-by-layer distillation: blocks that, rounded, come nearer to the float ones; nothing else is touched."""

import pytest
import torch

from quantforge import pipeline, recipe
from quantforge import plan as planning
from quantforge.errors import RecipeError
from quantforge.models import activations, arch, tiny
from quantforge.numerics.inputs import QInput, parse_inputs
from quantforge.tuners import lkd

IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))


def distilled(method="zeroquant", kind="llama", **settings):
    model = tiny.make(kind)
    options = {f"tuner.{key}": value for key, value in settings.items()}
    chosen = recipe.load(method, bits=3, group_size=32, settings=options)
    rows = pipeline.quantize(model, planning.make(model, chosen, torch.float32), IDS)
    return model, rows


def error(model):
    with torch.no_grad():
        return float((model(IDS).logits - tiny.make("llama")(IDS).logits).square().mean())


@pytest.mark.parametrize("teacher", [True, False])
def test_it_lowers_the_error_of_what_the_model_computes(teacher):
    plain, _ = distilled(steps=0)
    trained, rows = distilled(steps=40, rate=2e-3, teacher=teacher)
    assert error(trained) < 0.9 * error(plain)
    for row in rows:
        assert torch.equal(arch.get_weight(trained.get_submodule(row.name)), row.weight.dequantize())


def test_no_steps_are_plain_rounding_with_rounded_inputs():
    plain, rows = distilled(steps=0)
    model = tiny.make("llama")
    chosen = recipe.load("rtn", bits=3, group_size=32, symmetric=True, inputs="int8-token")
    others = pipeline.quantize(model, planning.make(model, chosen, torch.float32), IDS)
    for one, other in zip(rows, others, strict=True):
        assert torch.equal(one.weight.base.codes, other.weight.base.codes)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, model(IDS).logits)


def test_forced_by_the_teacher_a_block_does_not_depend_on_those_before_it():
    """Skipping block 0 changes nothing about what block 1 learns; on the student's own inputs it does."""
    for teacher, same in ((True, True), (False, False)):
        codes = []
        for overrides in ({}, {"*.layers.0.*": {"skip": True}}):
            model = tiny.make("llama")
            options = {"tuner.steps": 10, "tuner.rate": 1e-3, "tuner.teacher": teacher}
            chosen = recipe.load("zeroquant", bits=3, group_size=32, settings=options, overrides=overrides)
            rows = pipeline.quantize(model, planning.make(model, chosen, torch.float32), IDS)
            codes.append({row.name: row.weight.base.codes for row in rows if ".layers.1." in row.name})
        assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0]) == same


def test_norms_embeddings_and_gradients_are_left_alone():
    model, rows = distilled(steps=5, rate=1e-3)
    before = tiny.make("llama").state_dict()
    tuned = {f"{row.name}.weight" for row in rows}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k not in tuned)
    assert all(p.grad is None for p in model.parameters())
    assert all(activations.find(model.get_submodule(row.name)).rounds is row.weight.inputs for row in rows)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi3", "opt", "mixtral"])
def test_it_runs_on_every_kind_of_block(kind):
    _, rows = distilled(kind=kind, steps=3, rate=1e-3)
    assert all(torch.isfinite(row.weight.dequantize()).all() for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rate": 0.0}, "rate must be positive"), ({"steps": -1}, "steps must be"), ({"windows": 0}, "windows must")],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(RecipeError, match=said):
        distilled(**options)


def test_gradients_pass_straight_through_the_rounding_of_inputs_and_weights():
    rounds = lkd._Through(parse_inputs("int4-token"))
    x = torch.randn(3, 16, requires_grad=True)
    rounds.round(x).square().sum().backward()
    assert torch.equal(x.grad, 2 * rounds.round(x).detach())
    assert torch.equal(rounds.round(x), QInput(parse_inputs("int4-token")).round(x.detach()))


def test_nothing_to_round_is_nothing_to_learn():
    """Weights that lie on their grid and inputs in float: the student is the teacher, and stays it."""
    model = tiny.make("llama")
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    rng = torch.Generator().manual_seed(0)
    for name in names:
        codes = torch.randint(-128, 128, model.get_submodule(name).weight.shape, generator=rng)
        codes[:, 0], codes[:, 1] = -128, 127  # both ends of the range, so that the step is 2⁻⁹ exactly
        model.get_submodule(name).weight.data = codes * 2.0**-9
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    options = {"tuner.steps": 5, "tuner.rate": 1e-2}
    chosen = recipe.load("zeroquant", bits=8, group_size=-1, symmetric=False, inputs="float", settings=options)
    rows = pipeline.quantize(model, planning.make(model, chosen, torch.float32), IDS)
    for row in rows:
        assert torch.equal(arch.get_weight(model.get_submodule(row.name)), before[row.name])


def test_weights_that_training_spoils_stay_as_they_were():
    plain, _ = distilled(steps=0)
    spoiled, _ = distilled(steps=8, rate=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), spoiled.parameters(), strict=True))


def test_a_step_takes_windows_from_several_batches_where_one_has_fewer(monkeypatch):
    """Sums of another order turn under 1 % of the codes here; steps of two windows turn 3 %."""
    codes = {}
    for batch in (8, 2):
        monkeypatch.setattr(pipeline, "BATCH_TOKENS", 24 * batch)
        for windows in (4, 2):
            _, rows = distilled(steps=6, rate=1e-3, windows=windows)
            codes[batch, windows] = torch.cat([row.weight.base.codes.flatten() for row in rows])
    assert (codes[8, 4] == codes[2, 4]).double().mean() > 0.985
    assert (codes[2, 2] == codes[2, 4]).double().mean() < 0.985


def test_a_model_in_half_precision_keeps_what_was_judged_in_it():
    def gap(steps):
        model = tiny.make("llama").bfloat16()
        options = {"tuner.steps": steps, "tuner.rate": 2e-3}
        chosen = recipe.load("zeroquant", bits=3, group_size=32, settings=options)
        pipeline.quantize(model, planning.make(model, chosen, torch.bfloat16), IDS)
        with torch.no_grad():
            return float((model(IDS).logits.float() - tiny.make("llama")(IDS).logits).square().mean())

    assert gap(40) < 0.95 * gap(0)
