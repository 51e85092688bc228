"""The plan: everything that can be told before a weight is read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import quantforge
from quantforge import exporters, recipe
from quantforge import plan as planning
from quantforge.errors import PlanError
from quantforge.exporters.compressed_tensors import CompressedTensors
from quantforge.models import arch, tiny

LLAMA = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def make(model: nn.Module, chosen: recipe.Recipe) -> planning.Plan:
    """Plan for a checkpoint of compressed-tensors."""
    plan = planning.make(model, chosen, torch.bfloat16)
    exporters.check(plan, CompressedTensors())
    return plan


def skeleton(**changes: int) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**LLAMA, **changes}))


@pytest.mark.parametrize(
    ("widths", "group", "parts"),
    [
        ({}, 128, ("group size 128", "576 inputs", "model.layers.0.self_attn.q_proj", ": 96, 64, 48, 32, 16.")),
        ({}, 100, ("group size 100", "576 and 1536 inputs of 210 layers", ": 96, 64, 48, 32, 16.")),
        ({"intermediate_size": 1500}, 64, ("1500 inputs of 30 layers", "model.layers.0.mlp.down_proj")),
        ({"intermediate_size": 1501}, 64, ("1501", "-1 (a whole row)")),
    ],
)
def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(widths, group, parts):
    with pytest.raises(PlanError) as caught:
        make(skeleton(**widths), recipe.load("gptq", group_size=group))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group", [96, 64, 48, 32, 16, -1])
def test_the_sizes_named_do_divide(group):
    plan = planning.make(skeleton(), recipe.load("gptq", group_size=group), torch.bfloat16)
    exporters.check(plan, CompressedTensors())
    assert len(plan.layers) == 210
    blocks = 576 * 576 // (576 if group == -1 else group)
    assert plan.layers["model.layers.0.self_attn.q_proj"].bits_per_weight == 4 + 20 * blocks / 576**2


def test_a_model_that_stays_in_memory_may_have_an_uneven_last_group():
    plan = planning.make(tiny.make("llama"), recipe.load("rtn", group_size=40), torch.float32)
    layer = plan.layers["model.layers.0.self_attn.q_proj"]
    assert layer.format.nbits(layer.shape) == 64 * 64 * 4 + 64 * 2 * (32 + 4)
    result = quantforge.quantize(tiny.make("llama"), "rtn", group_size=40)
    assert result.layers[0].weight.base.scale.shape == (64, 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("kind", "group", "dtype"), [("llama", 32, torch.bfloat16), ("opt", -1, torch.float16)])
def test_bytes_after_are_the_bytes_of_the_tensors_in_the_file_but_for_each_layers_shape(
    tmp_path, bits, symmetric, kind, group, dtype
):
    model = tiny.make(kind, dtype=dtype)
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    result = quantforge.quantize(model, "rtn", bits=bits, group_size=group, symmetric=symmetric, out=tmp_path / "out")
    written = 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            tensor = file.get_tensor(name)
            written += tensor.numel() * tensor.itemsize
    plan = result.plan
    assert written == plan.bytes_after + 16 * len(plan.layers)  # two int64 a layer say its shape
    assert plan.bytes_before == size


def test_totals_agree_with_the_layers():
    plan = planning.make(tiny.make("llama"), recipe.load("gptq", group_size=32), torch.bfloat16)
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert plan.bits_per_weight == 4 + 20 / 32
    assert plan.kept == (128 * 64 + 5 * 64, 2 * (128 * 64 + 5 * 64))
    assert plan.bytes_before == 2 * (128 * 64 + 5 * 64 + weights)
    assert plan.bytes_after == plan.kept[1] + weights * 37 // 64
    record = json.loads(json.dumps(plan.record()))
    assert [row["name"] for row in record["layers"]] == list(plan.layers)
    assert record["bytes_after"] == plan.bytes_after
    lines = plan.table().splitlines()
    assert len(lines) == 2 + len(plan.layers)
    assert lines[-1].startswith("14 layers at 4.625 bits")


def test_gpt2_is_refused_for_a_checkpoint_but_planned_in_memory(tmp_path):
    model = tiny.make("gpt2")
    plan = planning.make(model, recipe.load("rtn", group_size=32), torch.float32)
    assert plan.layers["transformer.h.0.attn.c_attn"].shape == (192, 64)
    assert plan.layers["transformer.h.1.mlp.c_proj"].shape == (64, 96)
    with pytest.raises(PlanError, match=r"transformer\.h\.0\.attn\.c_attn .with 7 more. is a Conv1D"):
        quantforge.quantize(model, "rtn", group_size=32, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, tiny.make("gpt2").transformer.h[0].attn.c_attn.weight)


def test_scales_shared_between_rows_are_refused_for_a_checkpoint():
    chosen = recipe.load("rtn")
    chosen = replace(chosen, weights=replace(chosen.weights, block=(None, None)))
    with pytest.raises(PlanError, match=r"cannot hold int4-tensor-asym-bf16 of model.layers.0.self_attn.q_proj"):
        make(tiny.make("llama"), chosen)


@pytest.mark.parametrize("kind", tiny.names())
def test_planning_needs_no_weights_and_gives_what_the_loaded_model_gives(kind):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny.make(kind).config)
    plans = [planning.make(m, recipe.load("gptq", group_size=32), torch.bfloat16) for m in (empty, tiny.make(kind))]
    assert plans[0] == plans[1]
    assert all(p.is_meta for p in empty.parameters())


def test_layers_that_share_a_weight_are_refused_unless_both_are_skipped():
    model = tiny.make("llama")
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    chosen = recipe.load("rtn", group_size=32)
    with pytest.raises(PlanError) as caught:
        planning.make(model, chosen, torch.float32)
    assert "model.layers.0.mlp.up_proj" in str(caught.value)
    assert "model.layers.1.mlp.up_proj" in str(caught.value)
    plan = planning.make(model, replace(chosen, skip=("lm_head", "up_proj")), torch.float32)
    assert len(plan.layers) == 12
    with pytest.raises(PlanError, match=r"share one weight"):
        planning.make(model, replace(chosen, skip=("lm_head", "model.layers.0.mlp.up_proj")), torch.float32)


def test_a_module_under_two_names_is_refused():
    model = tiny.make("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(PlanError, match=r"share one weight"):
        planning.make(model, recipe.load("rtn", group_size=32), torch.float32)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), 14),
        (("lm_head",), 14),
        (("q_proj",), 12),
        (("mlp.down_proj", "k_proj"), 10),
        (("model.layers.0.self_attn.q_proj",), 13),
        (("proj", "_proj", "own_proj", "layers.0", "model"), 14),  # whole parts of a name only
    ],
)
def test_skip_takes_full_names_and_whole_last_parts(skip, left):
    model = tiny.make("llama")
    plan = planning.make(model, replace(recipe.load("rtn", group_size=32), skip=skip), torch.float32)
    assert len(plan.layers) == left
    assert not any(name == s or name.endswith(f".{s}") for name in plan.layers for s in skip)
    assert [name for stage in plan.stages for name in stage] == list(plan.layers)
    total = sum(p.numel() for p in model.parameters())
    assert plan.kept[0] + sum(p.shape[0] * p.shape[1] for p in plan.layers.values()) == total


def test_select_cuts_the_models_stages_to_the_plan():
    model = tiny.make("llama")
    plan = planning.make(model, replace(recipe.load("rtn", group_size=32), skip=("k_proj", "o_proj")), torch.float32)
    chosen = plan.select(arch.find_stages(model)[0])
    assert tuple(s.names for s in chosen) == plan.stages
    assert len(chosen) == 6
    assert all(model.get_submodule(n) is m for s in chosen for n, m in zip(s.names, s.modules, strict=True))


def test_notes_are_added_in_front():
    plan = planning.make(tiny.make("llama"), recipe.load("rtn", group_size=32), torch.float32)
    assert plan.notes == ()
    plan = planning.with_notes(planning.with_notes(plan, ["b"]), ["a"])
    assert plan.notes == ("a", "b")
    assert plan.table().endswith("note: a\nnote: b")


def overridden(**wishes: dict[str, object]) -> planning.Plan:
    """Plan GPTQ in 4 bits and groups of 32 for a tiny Llama, with overrides of layers by their last part."""
    chosen = recipe.load("gptq", group_size=32, overrides=wishes)
    return planning.make(tiny.make("llama"), chosen, torch.bfloat16)


def test_an_override_changes_the_layers_that_it_names_and_no_other():
    plain, changed = overridden(), overridden(down_proj={"bits": 8, "group_size": 16, "symmetric": True})
    assert list(changed.layers) == list(plain.layers)
    for name, layer in changed.layers.items():
        if name.endswith(".down_proj"):
            assert str(layer.format) == "int8-g16-sym-bf16"
            assert layer.solver == plain.layers[name].solver
        else:
            assert layer == plain.layers[name]


def test_bits_per_weight_count_overrides():
    plan = overridden(down_proj={"bits": 8})
    down, all_of_them = 2 * 96 * 64, 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert plan.bits_per_weight == pytest.approx(4 + 20 / 32 + (4 + 4 / 32) * down / all_of_them)


def test_an_override_may_take_another_method_and_its_needs_count():
    plan = planning.make(
        tiny.make("llama"),
        recipe.load("rtn", group_size=32, overrides={"*.0.*": {"method": "gptq"}, "k_proj": {"method": "hqq"}}),
        torch.bfloat16,
    )
    kinds = {name: type(layer.solver).__name__ for name, layer in plan.layers.items()}
    for name, kind in kinds.items():
        assert kind == ("HQQ" if name.endswith("k_proj") else "GPTQ" if ".0." in name else "RTN")
    assert plan.needs == {"hessian"}
    assert str(plan.layers["model.layers.1.self_attn.k_proj"].format) == "int4-g32-asym-bf16-zero-bf16"


def test_skipped_layers_are_kept_and_counted_as_such():
    plan = overridden(o_proj={"skip": True})
    assert len(plan.layers) == 12
    assert plan.kept[0] == overridden().kept[0] + 2 * 64 * 64
    assert overridden(o_proj={"skip": False}).layers == overridden().layers


def test_the_last_override_that_matches_wins():
    first = {"*.0.*": {"bits": 8}, "q_proj": {"bits": 3}}
    plan = overridden(**first)
    bits = {name: layer.format.grid.bits for name, layer in plan.layers.items()}
    assert bits["model.layers.0.self_attn.q_proj"] == 3
    assert bits["model.layers.0.self_attn.k_proj"] == 8
    assert bits["model.layers.1.self_attn.k_proj"] == 4
    turned = overridden(**dict(reversed(first.items())))
    assert turned.layers["model.layers.0.self_attn.q_proj"].format.grid.bits == 8
    back = overridden(**{"*.0.*": {"skip": True}, "q_proj": {"bits": 3}})
    assert "model.layers.0.self_attn.q_proj" in back.layers
    assert "model.layers.0.self_attn.k_proj" not in back.layers


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.0.self_attn.q_proj", 1),
        ("self_attn.q_proj", 2),
        ("q_proj", 2),
        ("*.self_attn.*", 8),
        ("*", 14),
        ("*.[kv]_proj", 4),
    ],
)
def test_a_pattern_is_a_name_its_last_parts_or_has_wildcards(pattern, count):
    plan = overridden(**{pattern: {"bits": 2}})
    assert sum(layer.format.grid.bits == 2 for layer in plan.layers.values()) == count


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("dwon_proj", "did you mean 'down_proj'?"), ("proj", ""), ("*.Q_PROJ", ""), ("model.layers.7.*", "")],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(pattern, near):
    with pytest.raises(PlanError) as caught:
        overridden(q_proj={"bits": 8}, **{pattern: {"bits": 8}})
    assert f"override {pattern!r} matches no layer" in str(caught.value)
    assert near in str(caught.value)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_that_no_matrix_of_the_layer_has_is_refused():
    def laid(rank: int, **overrides: dict[str, object]) -> planning.Plan:
        chosen = recipe.load("rtn+lorc", group_size=32, settings={"correction.rank": rank}, overrides=overrides)
        return planning.make(tiny.make("llama"), chosen, torch.bfloat16)

    layer = laid(32).layers["model.layers.0.self_attn.k_proj"]
    assert layer.shape == (32, 64)
    assert layer.nbits == layer.format.nbits((32, 64)) + 8 * 32 * (32 + 64) + 16 * (32 + 32)
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn\.k_proj: rank 33 .* at most 32"):
        laid(33)
    skipping = laid(33, k_proj={"skip": True}, v_proj={"skip": True})
    assert len(skipping.layers) == 10
