"""Laws of every tuner, on whole tiny blocks: the float weights stay, and the rounded block errs no more than before."""

import copy

import pytest
import torch

from quantforge import pipeline, recipe
from quantforge import plan as planning
from quantforge.errors import PlanError
from quantforge.models import arch, tiny
from quantforge.numerics.formats import parse
from quantforge.numerics.inputs import Scheme
from quantforge.numerics.qtensor import fit, quantize
from quantforge.registry import create, find, names

TUNERS = names("tuner")
FORMATS = ["int3-g32-asym", "int4-channel-asym", "int4-g16-sym", "int3-tensor-asym"]


def calls_of(model: torch.nn.Module, ids: torch.Tensor) -> list[tuple[tuple[object, ...], dict[str, object]]]:
    """Return the arguments of the first decoder block for each row of `ids`."""
    found = []
    block = model.get_submodule("model.layers.0")
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    handle.remove()
    return found


def block_error(block: torch.nn.Module, weights: dict[str, torch.Tensor], calls: list) -> float:
    """Return the squared error of the block's output with these weights in place of its own."""
    with torch.no_grad():
        return sum(
            float((torch.func.functional_call(block, weights, *c) - block(*c[0], **c[1])).square().sum()) for c in calls
        )


METHODS = {part: name for name in recipe.names() for kind, part in recipe.slots(name) if kind == "tuner"}


@pytest.mark.parametrize("text", FORMATS)
def test_learned_clipping_leaves_float_weights_and_the_rounded_block_errs_no_more(text):
    model = tiny.make("llama")
    block, before = model.get_submodule("model.layers.0"), copy.deepcopy(model.state_dict())
    fmt = parse(text)
    formats = {n: fmt for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    calls = calls_of(model, torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(0)))
    schemes = {n: Scheme(fmt) for n in formats}
    found = create("tuner", "lwc", {"share": 1.0}).tune(block, schemes, calls, [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert list(found) == list(formats)
    errors = []
    for chosen in (found, {n: fit(block.get_submodule(n).weight.detach(), fmt) for n in formats}):
        weights = {
            f"{n}.weight": quantize(block.get_submodule(n).weight.detach(), chosen[n], fmt).dequantize(torch.float32)
            for n in formats
        }
        errors.append(block_error(block, weights, calls))
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_learned_clipping_gains_on_a_block_with_outlying_weights():
    model = tiny.make("llama")
    block = model.get_submodule("model.layers.0")
    for _, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[:, ::16] *= 4
    formats = {n: parse("int3-channel-asym") for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    calls = calls_of(model, torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0)))
    schemes = {n: Scheme(fmt) for n, fmt in formats.items()}
    found = create("tuner", "lwc", {"share": 1.0}).tune(block, schemes, calls, [])
    errors = []
    for trained in (True, False):
        weights = {}
        for n, fmt in formats.items():
            w = block.get_submodule(n).weight.detach()
            weights[f"{n}.weight"] = quantize(w, found[n] if trained else fit(w, fmt), fmt).dequantize(torch.float32)
        errors.append(block_error(block, weights, calls))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi3", "opt"])
def test_it_runs_in_the_pipeline_on_every_kind_of_block(tuner, kind):
    model = tiny.make(kind)
    plan = planning.make(model, recipe.load(METHODS[tuner], bits=3, group_size=32), torch.float32)
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
    rows = pipeline.quantize(model, plan, ids)
    assert [row.name for row in rows] == list(plan.layers)
    for row in rows:
        assert torch.equal(arch.get_weight(model.get_submodule(row.name)), row.weight.dequantize())


def test_trained_ranges_go_to_solvers_that_take_them_only():
    model = tiny.make("llama")
    plan = planning.make(model, recipe.load("lwc+gptq", bits=3, group_size=32), torch.float32)
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
    assert len(pipeline.quantize(model, plan, ids)) == len(plan.layers)
    with pytest.raises(PlanError, match=r"QF-257.*rtn and gptq"):
        planning.make(tiny.make("llama"), recipe.load("lwc+spare", group_size=32), torch.float32)


def test_a_model_in_half_precision_is_tuned_in_its_own_dtype():
    model = tiny.make("llama", dtype=torch.bfloat16)
    plan = planning.make(model, recipe.load("lwc", bits=3, group_size=32), torch.bfloat16)
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
    assert len(pipeline.quantize(model, plan, ids)) == len(plan.layers)


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_documents_its_options(tuner):
    cls = find("tuner", tuner)
    assert all(option in cls.__doc__ for option in cls.__dataclass_fields__)
