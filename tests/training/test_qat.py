"""Quantization-aware training: the student computes with what is stored, and gradients pass straight through."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import quantforge
from quantforge import plan as planning
from quantforge import recipe
from quantforge.errors import PlanError, RecipeError
from quantforge.models import activations, arch, moe, tiny
from quantforge.models.kvcache import KVCache, parse_kv
from quantforge.numerics.qtensor import fit, quantize
from quantforge.plan import Plan
from quantforge.training.layers import computed_layers
from quantforge.training.qat import open_student, settle

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def prepared(
    kind: str = "llama", weights: str = "int4-channel-sym", inputs: str | None = "int8-token", method: str = "rtn"
) -> tuple[nn.Module, Plan]:
    """Return a tiny model of values that bfloat16 holds, and the plan to round it in a checkpoint in bfloat16."""
    model = tiny.make(kind, dtype=torch.bfloat16).float()
    return model, planning.make(model, recipe.load(method, weights=weights, inputs=inputs), torch.bfloat16)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()


def decode(model: nn.Module, cache: object) -> Tensor:
    with torch.no_grad():
        steps = [model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(IDS.shape[1])]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("kind", tiny.names())
def test_with_nothing_rounded_the_student_is_the_teacher(kind):
    model, plan = prepared(kind, inputs=None)
    before = logits(model)
    assert torch.equal(logits(open_student(model, plan, weights=False, inputs=False)), before)


def test_each_rounding_changes_the_student():
    for rounds in ({"weights": True}, {"inputs": True}, {"kv": parse_kv("int4-token")}):
        model, plan = prepared()
        before = logits(model)
        student = open_student(model, plan, **{"weights": False, "inputs": False, **rounds})
        assert not torch.equal(logits(student), before), rounds


@pytest.mark.parametrize("weights", ["int4-channel-sym", "int3-g32-asym", "nf4-dq", "int4-g32-asym-fp16-min-fp16"])
def test_the_gradient_of_a_weight_is_that_of_the_rounded_weight(weights):
    model, plan = prepared(weights=weights, inputs=None)
    twin = copy.deepcopy(model)
    for name, p in plan.layers.items():
        weight = arch.get_weight(twin.get_submodule(name))
        rounded = quantize(weight, fit(weight, p.format), p.format).dequantize(torch.float32)
        arch.set_weight(twin.get_submodule(name), rounded)
    twin(IDS, labels=IDS, use_cache=False).loss.backward()
    student = open_student(model, plan)
    assert torch.equal(logits(student), logits(twin))
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, layer in computed_layers(student).items():
        assert torch.allclose(layer.latent.grad, twin.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-7), name


def test_beyond_the_limit_weights_get_no_gradient():
    model, plan = prepared(inputs=None)
    student = open_student(model, plan, limit=0.2)
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    for layer in computed_layers(student).values():
        large = layer.latent.abs() >= 0.2
        assert large.any()
        assert not layer.latent.grad[large].any()
        assert layer.latent.grad[~large].any()


def test_gradients_pass_rounded_inputs_keys_and_values():
    """To the first layer, all of them lie in between."""
    model, plan = prepared()
    student = open_student(model, plan, kv=parse_kv("int4-token"))
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, layer in computed_layers(student).items():
        assert layer.latent.grad.any(), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3_text", "phi3"])
@pytest.mark.parametrize("kv", ["int8-token", "int4-token", "int4-token-g16-asym"])
def test_decoding_through_a_rounded_cache_gives_what_the_prefill_gives(kind, kv):
    """In float64, where a token alone and a token among others differ too little for rounding to tell."""
    model, plan = prepared(kind)
    fmt = parse_kv(kv)
    student = open_student(model, plan, kv=fmt).double()
    prefill = logits(student)
    for cache in (DynamicCache(config=model.config), KVCache(fmt, model.config)):
        assert torch.allclose(decode(student, cache), prefill, rtol=0, atol=1e-5), type(cache)


def test_a_cache_holds_what_is_rounded_already():
    model, plan = prepared()
    student = open_student(model, plan, weights=False, inputs=False, kv=parse_kv("int2-token"))
    cache = DynamicCache(config=model.config)
    decode(student, cache)
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            tokens = held.flatten(0, 2)
            assert tokens.shape[1] == 16
            assert all(1 < len(token.unique()) <= 4 for token in tokens)  # floats would have 16 values


@pytest.mark.parametrize("inputs", ["int8-token", "e4m3-token"])
def test_the_rounding_of_a_token_depends_on_no_other(inputs):
    model, plan = prepared(inputs=inputs)
    student = open_student(model, plan, kv=parse_kv("int4-token"))
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 128
    assert torch.equal(logits(student, changed)[:, :-1], logits(student)[:, :-1])
    assert not torch.equal(logits(student, changed)[:, -1], logits(student)[:, -1])


@pytest.mark.parametrize(
    ("kind", "weights", "inputs"),
    [
        ("llama", "int4-channel-sym", "int8-token"),
        ("qwen2", "int4-g32-asym", None),
        ("gemma2", "int3-g32-asym-bf16-zero-bf16", "int8-token"),
        ("opt", "nf4-g32", "e4m3-token"),
        ("llama", "nf4-dq", None),
        ("llama", "mxfp4", None),
        ("llama", "int4-g32-asym-fp16-min-fp16", None),
        ("qwen3_moe", "int4-g32-sym", "int8-token"),
    ],
)
def test_the_student_its_result_and_the_checkpoint_give_the_same_logits(kind, weights, inputs, tmp_path):
    model, plan = prepared(kind, weights, inputs)
    student = open_student(model, plan)
    train(student)
    trained = logits(student)
    result = settle(student, plan, source="tiny")
    assert not computed_layers(result.model)
    assert torch.equal(logits(result.model), trained)
    assert [layer.name for layer in result.layers] == list(plan.layers)
    result.save(tmp_path / "out")
    assert torch.equal(logits(quantforge.load(tmp_path / "out", torch.float32, packed=False)), trained)


def test_stock_transformers_reads_it_and_the_record_says_what_it_is(tmp_path: Path):
    model, plan = prepared()
    student = open_student(model, plan, kv=parse_kv("int8-token"))
    train(student)
    result = settle(student, plan, source="tiny")
    result.save(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(stock), logits(result.model), rtol=0, atol=1e-5)
    assert any("trained for keys and values in int8-token" in note for note in result.record()["notes"])


def test_the_settled_model_through_the_trained_cache_gives_what_the_student_gave():
    model, plan = prepared()
    fmt = parse_kv("int4-token-g16-asym")
    student = open_student(model, plan, kv=fmt)
    train(student)
    trained = logits(student)
    settled = settle(student, plan, source="tiny").model
    assert not torch.equal(logits(settled), trained)
    with torch.no_grad():
        found = settled(IDS, past_key_values=KVCache(fmt, settled.config), use_cache=True).logits
    assert torch.equal(found, trained)


def test_weights_biases_and_norms_are_trained_and_nothing_else():
    model, plan = prepared("qwen2")
    names = {name for name, p in open_student(model, plan).named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"latent", "bias", "original"}
    assert not any("embed" in name or "lm_head" in name for name in names)
    assert {name.rpartition(".")[0] for name in names if name.endswith("latent")} == set(plan.layers)


def test_gradient_checkpointing_keeps_the_rounding_of_keys_and_values():
    grads = []
    for on in (False, True):
        model, plan = prepared()
        student = open_student(model, plan, kv=parse_kv("int4-token"))
        if on:
            student.activation_checkpointing_enable({"use_reentrant": False})
            student.train()
        student(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize(
    ("method", "inputs", "what"),
    [
        ("gptq", None, "GPTQ"),
        ("smoothquant", None, "SmoothQuant"),
        ("lorc", None, "LoRC"),
        ("rtn", "int8-tensor-static", "calibration"),
    ],
)
def test_what_does_more_than_plain_rounding_is_refused(method, inputs, what):
    model, plan = prepared(inputs=inputs, method=method)
    with pytest.raises(PlanError, match=f"QF-295.*{what}"):
        open_student(model, plan)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_leaves_nothing_or_everything_is_refused(limit):
    model, plan = prepared()
    with pytest.raises(RecipeError, match=rf"QF-247\]: limit must be above 0 and finite, not {limit}; 2 is usual"):
        open_student(model, plan, limit=limit)
    assert not computed_layers(model)


@pytest.mark.parametrize("kv", ["int4-kivi-g32-w32", "int8-token-s4", "int8-token-w8"])
def test_a_cache_that_looks_beyond_a_token_is_refused(kv):
    model, plan = prepared()
    with pytest.raises(PlanError, match=r"QF-295.*int8-token works"):
        open_student(model, plan, kv=parse_kv(kv))
    assert not computed_layers(model)
    assert activations.find(model.get_submodule(next(iter(plan.layers)))) is None


def test_a_model_in_half_precision_is_refused():
    model, plan = prepared()
    with pytest.raises(PlanError, match=r"QF-294.*float32"):
        open_student(model.bfloat16(), plan)


def test_fused_experts_are_taken_apart_by_their_plan():
    model, plan = prepared("mixtral", weights="int4-g32-sym", inputs=None)
    student = open_student(model, plan)
    assert any(moe.expert_of(name) for name in computed_layers(student))
