"""Architectures: the table's rows against what the models really do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import quantforge
from quantforge import pipeline, recipe
from quantforge import plan as planning
from quantforge.errors import ModelError
from quantforge.models import arch, tiny
from quantforge.numerics.formats import parse
from quantforge.numerics.problem import Problem
from quantforge.solvers.gptq import GPTQ

KINDS = [*tiny.names(), *tiny.mixtures()]
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
UNKNOWN = {
    "stablelm": [
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
    ],
    "gpt_neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
}


def tokens(windows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(0))


def calls(model: nn.Module, modules: dict[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """Run `model` once; return (name, input) of each call of `modules`, in order."""
    found: list[tuple[str, Tensor]] = []
    handles = [m.register_forward_pre_hook(lambda m, args, n=n: found.append((n, args[0]))) for n, m in modules.items()]
    with torch.no_grad():
        model(tokens())
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_of_a_block_is_in_one_stage(kind):
    model = tiny.make(kind)
    stages, note = arch.find_stages(model)
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    named = [name for stage in stages for name in stage.names]
    assert sorted(named) == sorted(linear)
    assert all(model.get_submodule(n) is m for s in stages for n, m in zip(s.names, s.modules, strict=True))
    assert note == ""
    assert {arch.block_index(name) for name in named} == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_in_the_order_of_the_forward_and_their_layers_read_one_tensor(kind):
    model = tiny.make(kind)
    stages, _ = arch.find_stages(model)
    called = calls(model, {n: m for s in stages for n, m in zip(s.names, s.modules, strict=True)})
    assert [name for name, _ in called] == [name for stage in stages for name in stage.names]
    read = dict(called)
    flat = {}
    for stage in stages:
        first = flat[stage] = read[stage.names[0]].reshape(
            -1, stage.modules[0].weight.shape[isinstance(stage.modules[0], nn.Linear)]
        )
        assert all(torch.equal(read[name].reshape(first.shape), first) for name in stage.names)
    shown = list(flat.values())
    for i, x in enumerate(shown):
        assert not any(x.shape == y.shape and torch.equal(x, y) for y in shown[:i]), (
            f"stage {i} reads what another does"
        )


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_architecture_that_the_table_lacks_is_taken_layer_by_layer_with_a_note(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL)).eval()
    stages, note = arch.find_stages(model)
    assert [s.names for s in stages] == [
        (f"{'gpt_neox' if kind == 'gpt_neox' else 'model'}.layers.{i}.{name}",)
        for i in (0, 1)
        for name in UNKNOWN[kind]
    ]
    assert kind in note
    assert "one by one" in note
    result = quantforge.quantize(model, "gptq", group_size=32, calibration=tokens())
    assert result.plan.notes == (note,)
    assert note in result.summary()
    assert [layer.name for layer in result.layers] == [s.names[0] for s in stages]
    assert all(layer.tokens == 36 for layer in result.layers)
    assert result.fallbacks() == []


def test_the_text_part_of_a_multimodal_gemma_is_found():
    text = {**SMALL, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stages, note = arch.find_stages(model)
    assert note == ""
    assert len(stages) == 8
    assert all(name.startswith("model.language_model.layers.") for stage in stages for name in stage.names)


class Toy(nn.Module):
    """A model with a config and whatever else it is given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.config = AutoConfig.for_model("stablelm")
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize(
    ("model", "number", "words"),
    [
        (Toy(layers=nn.ModuleList([nn.LayerNorm(4)])), 330, ("stablelm", "no linear layers", "layers")),
        (Toy(proj=nn.Linear(4, 4)), 331, ("no decoder blocks", "stablelm", *arch.TABLE)),
    ],
)
def test_a_model_with_nothing_to_quantize_is_refused_in_a_line(model, number, words):
    with pytest.raises(ModelError) as caught:
        arch.find_stages(model)
    assert caught.value.number == number
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", [nn.Linear(5, 3), Conv1D(3, 5)], ids=["Linear", "Conv1D"])
def test_a_weight_is_read_as_out_by_in_and_written_back_the_same_way(module, dtype):
    module = module.to(dtype)
    module.bias.data.zero_()  # so that no sum is rounded
    x = torch.eye(5, dtype=dtype)
    assert torch.equal(arch.get_weight(module).to(dtype), module(x).T)
    new = torch.arange(15.0).reshape(3, 5)
    pointer = module.weight.data_ptr()
    arch.set_weight(module, new)
    assert torch.equal(arch.get_weight(module), new)
    assert torch.equal(module(x), new.T.to(dtype) + module.bias)
    assert (module.weight.dtype, module.weight.data_ptr()) == (dtype, pointer)


def test_a_conv1d_gets_the_codes_of_the_linear_layer_that_computes_the_same():
    conv = Conv1D(24, 32)
    linear = nn.Linear(32, 24)
    linear.weight.data = conv.weight.data.T.contiguous()
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    solved = [
        GPTQ().solve(Problem("layer", arch.get_weight(m), parse("int4-g16-asym"), x.T @ x / 100)).base
        for m in (conv, linear)
    ]
    assert torch.equal(solved[0].codes, solved[1].codes)
    assert torch.equal(solved[0].scale, solved[1].scale)


def test_gpt2_is_quantized_as_its_twin_of_linear_layers():
    model, twin = tiny.make("gpt2"), tiny.make("gpt2")
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1])
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            twin.set_submodule(name, linear)
    rows = []
    for one in (model, twin):
        plan = planning.make(one, recipe.load("gptq", group_size=32), torch.float32)
        assert all(p.transposed == (one is model) for p in plan.layers.values())
        rows.append(pipeline.quantize(one, plan, tokens(8)))
    for a, b in zip(*rows, strict=True):
        assert a.weight.base.shape == b.weight.base.shape
        assert (a.weight.base.codes == b.weight.base.codes).double().mean() > 0.999
    assert torch.equal(rows[0][0].weight.base.codes, rows[1][0].weight.base.codes)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, twin(tokens()).logits, rtol=1e-3, atol=1e-2)
