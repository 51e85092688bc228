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
    "gpt_neo": [  # defined k, v, q
        *(f"attn.attention.{n}_proj" for n in ("q", "k", "v", "out")),
        *("mlp.c_fc", "mlp.c_proj"),
    ],
}
BLOCKS = {"stablelm": "model.layers", "gpt_neox": "gpt_neox.layers", "gpt_neo": "transformer.h"}
OWN = {"gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8}}


def unknown(kind: str, **changes: object) -> nn.Module:
    settings = {**SMALL, **OWN.get(kind, {}), **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


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
    model, rounded = unknown(kind), unknown(kind)
    stages, note = arch.find_stages(model)
    assert [s.names for s in stages] == [(f"{BLOCKS[kind]}.{i}.{name}",) for i in (0, 1) for name in UNKNOWN[kind]]
    assert kind in note
    assert "one by one" in note
    assert "stay in float" not in note
    result = quantforge.quantize(model, "gptq", bits=3, group_size=32, calibration=tokens(8))
    assert result.plan.notes == (note,)
    assert note in result.summary()
    assert [layer.name for layer in result.layers] == [s.names[0] for s in stages]
    assert all(layer.tokens == 96 for layer in result.layers)
    assert result.fallbacks() == []
    plain = quantforge.quantize(rounded, "rtn", bits=3, group_size=32).layers
    assert [layer.name for layer in plain] == [layer.name for layer in result.layers]
    assert not any(
        torch.equal(a.weight.base.codes, b.weight.base.codes) for a, b in zip(result.layers, plain, strict=True)
    )


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_plan_made_without_weights_has_the_same_layers(kind):
    model = unknown(kind)
    with torch.device("meta"):
        skeleton = unknown(kind)
    chosen = recipe.load("gptq", group_size=32)
    early, late = (planning.make(m, chosen, torch.float32) for m in (skeleton, model))
    assert early.layers == late.layers
    assert early.notes == late.notes
    stages = early.select(arch.find_stages(model)[0])
    assert tuple(s.names for s in stages) == late.stages
    rows = pipeline.quantize(model, early, tokens())
    assert [(row.name, row.tokens) for row in rows] == [(name, 36) for name in late.layers]


def test_looking_for_the_order_leaves_nothing_behind_but_the_order():
    model = unknown("gpt_neo", resid_dropout=0.5, embed_dropout=0.5).train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    arch.find_stages(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["olmoe", "granitemoe"])
def test_experts_that_cannot_be_taken_apart_are_told(kind):
    model = unknown(kind, num_experts=4, num_local_experts=4, num_experts_per_tok=2)
    _, note = arch.find_stages(model)
    place = {"olmoe": "mlp.experts", "granitemoe": "block_sparse_moe.experts"}[kind]
    count = 2 * 4 * 3 * 64 * 96  # blocks, experts, matrices
    assert note.endswith(f"{count:,} parameters of fused experts in {place} stay in float")
    result = quantforge.quantize(model, "rtn", group_size=32)
    assert not any("experts" in layer.name for layer in result.layers)
    assert note in result.summary()


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


class Block(nn.Module):
    """Linear layers that are called in the order of `calls`, by name."""

    def __init__(self, calls: tuple[str, ...], **parts: nn.Module) -> None:
        super().__init__()
        self.calls = calls
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.calls:
            x = self.get_submodule(name)(x)
        return x


class Sequence(Toy):
    """A toy that embeds its tokens and runs its blocks."""

    def __init__(self, blocks: list[Block], broken: bool = False) -> None:
        super().__init__(embed=nn.Embedding(32, 4), layers=nn.ModuleList(blocks))
        self.broken = broken

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        if self.broken:
            raise RuntimeError("cannot run here")
        return x


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(4, 4) for name in names}


@pytest.mark.parametrize("broken", [False, True])
def test_layers_that_the_short_forward_does_not_call_follow_those_defined_before_them(broken):
    blocks = [
        Block(("c", "a"), **linears("a", "b", "c", "d")),
        Block((), **linears("a", "b")),
        Block(("b", "a", "b"), **linears("a", "b")),
    ]
    names = [s.names[0].removeprefix("layers.") for s in arch.find_stages(Sequence(blocks, broken))[0]]
    assert names == ["0.c", "0.d", "1.a", "1.b", "0.a", "0.b", "2.b", "2.a"]
    assert not any(m._forward_pre_hooks for block in blocks for m in block.modules())


def moe_block(experts: int) -> Block:
    return Block(("q",), **linears("q"), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(experts)))


@pytest.mark.parametrize(
    ("parts", "blocks", "path"),
    [
        ({"layers": nn.ModuleList(moe_block(8) for _ in range(3))}, 3, "layers"),
        ({"layers": nn.ModuleList(moe_block(8) for _ in range(3))}, 32, "layers"),
        ({"layers": nn.ModuleList(moe_block(3) for _ in range(3))}, 3, "layers"),
        ({"layers": nn.ModuleList(moe_block(3) for _ in range(2))}, 2, "layers"),
        ({"eyes": nn.ModuleList(moe_block(2) for _ in range(5)), "z": nn.ModuleList([moe_block(1)] * 4)}, 4, "z"),
        ({"eyes": nn.ModuleList(moe_block(2) for _ in range(5)), "z": nn.ModuleList([moe_block(1)] * 4)}, 9, "eyes"),
        ({"norms": nn.ModuleList(nn.LayerNorm(4) for _ in range(4)), "z": nn.ModuleList([moe_block(1)] * 3)}, 4, "z"),
    ],
)
def test_the_list_of_blocks_is_not_one_of_experts_or_of_another_tower(parts, blocks, path):
    model = Toy(**parts)
    model.config.num_hidden_layers = blocks
    stages, note = arch.find_stages(model)
    assert f"layers of {path} are" in note
    assert len(stages) == len([m for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)])


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
