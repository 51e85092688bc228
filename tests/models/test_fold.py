"""Scales folded into what feeds a layer: the model computes what it did, and every weight concerned has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantforge.models import arch, fold, moe, tiny

KINDS = tiny.names()
BIASED = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}
VARIANTS = [
    *((kind, {}) for kind in [*KINDS, *tiny.mixtures()]),
    *BIASED.items(),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("mistral", {"head_dim": 32}),
    ("phi3", {"num_key_value_heads": 4}),
    ("opt", {"activation_function": "gelu"}),
    ("opt", {"enable_bias": False}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
]
IDS = [f"{kind}-{'-'.join(changes) or 'plain'}" for kind, changes in VARIANTS]


def tokens() -> Tensor:
    return torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))


def made(kind: str, changes: dict) -> nn.Module:
    """Return a tiny model whose norms and biases are no ones and zeros, which would hide a fault."""
    model = tiny.make(kind, **changes)
    moe.unfuse(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def width(model: nn.Module, name: str) -> int:
    return arch.get_weight(model.get_submodule(name)).shape[1]


def scales(model: nn.Module, group: fold.Fold, seed: int) -> Tensor:
    """Return random scales between e^-1.5 and e^1.5, tied as the group demands."""
    generator = torch.Generator().manual_seed(seed)
    return group.tie(torch.rand(width(model, group.consumers[0]), generator=generator) * 3 - 1.5).exp()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=IDS)
def test_every_fold_leaves_the_logits_and_reaches_its_producer_and_every_consumer(kind, changes):
    model = made(kind, changes)
    before, wanted = copy.deepcopy(model), logits(model)
    folds = fold.find(model)
    for seed, group in enumerate(folds):
        group.apply(model, scales(model, group, seed), torch.float32)
    assert relative(logits(model), wanted) < 1e-5
    for group in folds:
        for name in (*group.consumers, *group.extra):
            new, old = (arch.get_weight(m.get_submodule(name)) for m in (model, before))
            assert ((new - old).abs().amax(0) > 0).float().mean() > 0.95, name
        new, old = (m.get_submodule(group.producer.name).weight for m in (model, before))
        assert not torch.equal(new, old), group.producer.name


@pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("missed", ["a consumer", "the producer"])
def test_each_fold_needs_its_producer_and_each_of_its_consumers(kind, changes, missed):
    """Were a layer left out, or another producer named, the logits would say so."""
    model = made(kind, changes)
    wanted = logits(model)
    for seed, group in enumerate(fold.find(model)[:4]):
        for name in (*group.consumers, *group.extra) if missed == "a consumer" else [group.producer.name]:
            twin = copy.deepcopy(model)
            kept = copy.deepcopy(twin.get_submodule(name).state_dict())
            group.apply(twin, scales(model, group, seed), torch.float32)
            twin.get_submodule(name).load_state_dict(kept)
            assert relative(logits(twin), wanted) > 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_is_what_the_architecture_says(kind):
    model = tiny.make(kind)
    folds = fold.find(model)
    stages = [stage.names for stage in arch.find_stages(model)[0]]
    assert [group.consumers for group in folds] == [s for s in stages if kind != "gpt2" or "mlp.c_proj" not in s[0]]
    for group in folds:
        assert group.observed == group.consumers[0]
        assert group.extra == ()
        model.get_submodule(group.producer.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_stay_numbers_of_the_dtype_and_the_scales_follow_them(kind, dtype):
    model = tiny.make(kind, dtype=dtype).float()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            shifted = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(shifted.to(dtype))
    wanted = logits(model)
    norms = [group for group in fold.find(model) if group.producer.kind.startswith("norm")]
    for seed, group in enumerate(norms):
        old = arch.get_weight(model.get_submodule(group.consumers[0])).clone()
        asked = scales(model, group, seed)
        group.apply(model, asked, dtype)
        weight = model.get_submodule(group.producer.name).weight
        assert torch.equal(weight, weight.to(dtype).float())
        got = arch.get_weight(model.get_submodule(group.consumers[0]))[0] / old[0]
        scaled = (got - 1).abs() > 1e-6
        assert scaled.float().mean() > 0.9
        assert ((got / asked - 1).abs() < 0.1)[scaled].all()
    biased = any(getattr(model.get_submodule(group.producer.name), "bias", None) is not None for group in norms)
    # a bias has no slack to hide its rounding in; weights have
    assert relative(logits(model), wanted) < (0.05 if biased else 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt"])
def test_a_norm_held_in_bfloat16_and_its_scales_multiply_to_what_it_was(kind):
    model = made(kind, {})
    group = fold.find(model)[0]
    norm = model.get_submodule(group.producer.name).bfloat16()
    shift = 1 if kind == "gemma2" else 0
    old, weight = norm.weight.double() + shift, arch.get_weight(model.get_submodule(group.consumers[0])).double()
    group.apply(model, scales(model, group, 0), torch.bfloat16)
    applied = (arch.get_weight(model.get_submodule(group.consumers[0])).double() / weight).median(0).values
    torch.testing.assert_close((norm.weight.double() + shift) * applied, old, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [k for k in KINDS if k in ("opt", "gpt2", "qwen2")])
def test_biases_of_producers_become_numbers_of_the_dtype(kind):
    """They are saved in it, and what is computed is what is saved."""
    model = made(kind, {})
    for seed, group in enumerate(fold.find(model)):
        group.apply(model, scales(model, group, seed), torch.bfloat16)
        bias = getattr(model.get_submodule(group.producer.name), "bias", None)
        if bias is not None:
            part = bias[-width(model, group.consumers[0]) :] if group.producer.last else bias
            assert torch.equal(part, part.to(torch.bfloat16).float())


def test_a_channel_that_a_norm_switches_off_is_left_alone():
    model = tiny.make("llama")
    model.model.layers[0].input_layernorm.weight.data[5] = 0
    wanted, old = logits(model), model.model.layers[0].self_attn.q_proj.weight.clone()
    group = fold.find(model)[0]
    group.apply(model, scales(model, group, 0), torch.float32)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight[:, 5], old[:, 5])
    assert relative(logits(model), wanted) < 1e-5


def test_a_scale_that_the_dtype_cannot_hold_is_not_used():
    model = tiny.make("llama")
    wanted = logits(model)
    group = fold.find(model)[0]
    asked = torch.ones(64)
    asked[:3] = torch.tensor([1e-30, 1e30, 4.0])
    old = model.model.layers[0].self_attn.q_proj.weight.clone()
    group.apply(model, asked, torch.float16)
    new = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(new[:, :2], old[:, :2])
    assert torch.equal(new[:, 2], old[:, 2] * 4)
    assert relative(logits(model), wanted) < 1e-5


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_query_heads_of_one_group_share_a_scale(groups):
    group = fold.Fold(("o",), "o", fold.Producer("v", "values"), (4, groups, 2))
    x = torch.arange(8.0)
    tied = group.tie(x).view(groups, 4 // groups, 2)
    assert torch.equal(tied, x.view(groups, 4 // groups, 2).mean(1, keepdim=True).expand_as(tied))
    assert torch.equal(group.tie(tied.reshape(-1)), tied.reshape(-1))


def test_where_nothing_can_take_a_scale_there_is_no_fold():
    assert fold.find(tiny.make("opt", do_layer_norm_before=False)) == []
    gelu = [group.consumers[0] for group in fold.find(tiny.make("opt", activation_function="gelu"))]
    assert len(gelu) == 6
    assert not any(name.endswith("fc2") for name in gelu)
    assert not any(name.endswith("mlp.c_proj") for g in fold.find(tiny.make("gpt2")) for name in g.consumers)
    plain = fold.find(tiny.make("opt", layer_norm_elementwise_affine=False))
    assert {group.producer.kind for group in plain} == {"values", "rows"}


def test_an_architecture_that_the_table_lacks_has_no_folds():
    model = tiny.make("llama")
    model.config.model_type = "unheard_of"
    assert fold.find(model) == []


def test_a_conv1d_is_scaled_along_its_inputs():
    model = tiny.make("gpt2")
    group = fold.find(model)[0]
    layer = model.get_submodule(group.consumers[0])
    assert isinstance(layer, Conv1D)
    old, asked = layer.weight.clone(), scales(model, group, 0)
    group.apply(model, asked, torch.float32)
    torch.testing.assert_close(layer.weight, old * asked[:, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", tiny.mixtures())
def test_a_norm_before_experts_feeds_all_of_them_and_the_router_whose_choice_stays(kind):
    model = made(kind, {})
    chosen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, args, out: chosen.append(out[2]))
    logits(model)
    folds = fold.find(model)
    gate, up, down = (name for stage in arch.TABLE[kind].experts for name in stage)
    group = folds[2]
    block = "model.layers.0"
    assert group.producer == fold.Producer(f"{block}.post_attention_layernorm", "norm")
    assert group.consumers == tuple(f"{block}.mlp.experts.{e}.{name}" for e in range(4) for name in (gate, up))
    assert group.observed == f"{block}.mlp.gate"
    assert group.extra == (f"{block}.mlp.gate",)
    for e, own in enumerate(folds[3:7]):
        expert = f"{block}.mlp.experts.{e}"
        assert own == fold.Fold((f"{expert}.{down}",), f"{expert}.{down}", fold.Producer(f"{expert}.{up}", "rows"))
    for seed, one in enumerate(folds):
        one.apply(model, scales(model, one, seed), torch.float32)
    logits(model)
    assert len(chosen) == 4
    assert all(torch.equal(a, b) for a, b in zip(chosen[:2], chosen[2:], strict=True))
