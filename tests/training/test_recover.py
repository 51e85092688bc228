"""A trained student computes with what its checkpoint will hold, and its checkpoint is an ordinary one."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantforge
from quantforge import checkpoint
from quantforge.errors import PlanError, RecipeError
from quantforge.models import arch, tiny
from quantforge.numerics import products
from quantforge.numerics.products import fast_linear
from quantforge.numerics.qtensor import QTensor
from quantforge.numerics.residuals import LowRank
from quantforge.result import Result
from quantforge.training.layers import computed_layers
from quantforge.training.recover import PARTS, open_student, settle

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(3, 128, (12, 24), generator=torch.Generator().manual_seed(1))

MINIMA = "int4-g32-asym-bf16-min-bf16"
# method, notation, architecture, parts, how inputs are rounded
CASES = {
    "int4 groups": ("rtn", "int4-g32-asym", "llama", ("scales", "zero-points", "norms"), None),
    "int3 groups, gptq": ("gptq", "int3-g32-sym", "llama", ("scales", "norms"), None),
    "int8 channels": ("rtn", "int8-channel-sym", "llama", ("scales",), None),
    "nf4": ("rtn", "nf4", "llama", ("scales", "norms"), None),
    "e4m3": ("rtn", "e4m3-channel", "llama", ("scales", "norms"), None),
    "real zero points": ("rtn", "int4-g32-asym-bf16-zero-bf16", "llama", ("scales", "zero-points"), None),
    "blocks across rows": ("rtn", "int4-b2x32-sym", "llama", ("scales",), None),
    "short last blocks": ("rtn", "int4-g40-asym-bf16-zero-bf16", "llama", ("scales", "zero-points"), None),
    "odd flat blocks": ("rtn", "nf4-f48", "llama", ("scales",), None),
    "biases": ("rtn", "int4-g32-asym", "qwen2", ("scales", "biases"), None),
    "layer norms": ("rtn", "int4-g32-asym", "opt", ("norms", "biases"), None),
    "norms of gemma": ("rtn", "int4-g32-asym", "gemma3_text", ("norms",), None),
    "weights": ("rtn", "int4-g32-asym", "llama", ("weights",), None),
    "all of them": ("rtn", "int4-g32-asym", "qwen2", ("weights", "scales", "zero-points", "norms", "biases"), None),
    "factors": ("lorc", "int3-g32-asym", "llama", ("scales", "factors", "norms"), None),
    "rounded inputs": ("gptq", "int8-channel-sym", "llama", ("scales", "norms"), "int8-token"),
    "static inputs": ("rtn", "int8-channel-sym", "llama", ("scales", "norms"), "int8-tensor-static"),
    "experts": ("gptq", "int4-g32-sym", "mixtral", ("scales", "norms"), None),
    "experts of qwen": ("rtn", "int4-g32-sym", "qwen3_moe", ("scales", "weights"), None),
    "floats beside codes": ("spqr", None, "llama", ("norms",), None),
    "columns in float": ("spare", "int4-g32-asym", "llama", ("scales",), None),
    "nested scales": ("nf4", None, "llama", ("norms",), None),
    "minima": ("rtn", MINIMA, "llama", ("norms",), None),
    "llm.int8": ("llm-int8", None, "llama", ("weights", "norms"), None),
}


@cache
def _quantized(method: str, weights: str | None, kind: str, inputs: str | None, dynamic: bool) -> Result:
    one = {} if kind == "gemma3_text" else {"num_hidden_layers": 1}
    result = quantforge.quantize(
        tiny.make(kind, dtype=torch.bfloat16, **one),
        method,
        weights=weights,
        inputs=inputs,
        calibration=CALIBRATION,
        settings={"inputs.dynamic": True} if dynamic else None,
    )
    model = result.model.float()
    for layer in result.layers:  # as solved in float32, not rounded to bfloat16
        arch.set_weight(model.get_submodule(layer.name), layer.weight.dequantize())
    return result


def quantized(
    method: str, weights: str | None, kind: str = "llama", inputs: str | None = None, *, dynamic: bool = False
) -> Result:
    """Return a tiny model in float32, of values that bfloat16 holds, quantized with scales in bfloat16."""
    return copy.deepcopy(_quantized(method, weights, kind, inputs, dynamic))


def case(name: str) -> tuple[Result, tuple[str, ...]]:
    method, weights, kind, parts, inputs = CASES[name]
    return quantized(method, weights, kind, inputs), parts


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def loss_of(model: nn.Module) -> Tensor:
    return model(IDS, labels=IDS, use_cache=False).loss


def wanted(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, steps: int = 3, rate: float = 1e-2) -> None:
    optimizer = torch.optim.Adam(wanted(model).values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_the_student_the_settled_model_and_the_checkpoint_read_back_give_the_same_logits(name, tmp_path):
    result, parts = case(name)
    before = logits(result.model)
    student = open_student(result, parts)
    assert torch.equal(logits(student), before)
    train(student)
    trained = logits(student)
    assert not torch.equal(trained, before)
    settled = settle(result)
    assert torch.equal(logits(settled.model), trained)
    assert not computed_layers(settled.model)
    settled.save(tmp_path / "out")
    assert torch.equal(logits(quantforge.load(tmp_path / "out", torch.float32, packed=False)), trained)


@pytest.mark.parametrize("name", ["int4 groups", "int8 channels", "rounded inputs", "static inputs"])
def test_stock_transformers_gives_them_too(name, tmp_path):
    result, parts = case(name)
    student = open_student(result, parts)
    train(student)
    trained = logits(student)
    settle(result).save(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(stock), trained, atol=1e-5, rtol=0)


ENDINGS = {
    "scales": (".scale",),
    "zero-points": (".zero_point",),
    "norms": (".parametrizations.weight.original", ".parametrizations.bias.original"),
    "factors": (".factor0_a", ".factor0_b", ".factor0_a_scale", ".factor0_b_scale"),
    "weights": (".latent",),
    "biases": (".bias",),
}


@pytest.mark.parametrize("name", CASES)
def test_every_part_gets_a_gradient_and_nothing_else_asks_for_one(name):
    result, parts = case(name)
    names = {layer.name for layer in result.layers}
    student = open_student(result, parts)
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    found = wanted(student)
    endings = {ending for part in parts for ending in ENDINGS[part]}
    assert all(name.endswith(tuple(endings)) for name in found), list(found)
    assert {n.rpartition(".")[0] for n in found if "parametrizations" not in n} <= names
    assert all(p.grad is None for n, p in student.named_parameters() if n not in found)
    for part in parts:
        some = [p.grad for n, p in found.items() if n.endswith(ENDINGS[part]) and p.grad is not None]
        assert some
        # those of weights that lie on the grid are 0: LSQ's gradients are v − w / s, and 0 within the grid
        on_grid = "weights" in parts and part in ("scales", "zero-points")
        assert any(bool(g.any()) for g in some) != on_grid, part


def test_gradients_are_those_of_the_weight_written_out():
    """Autograd through (code − zero) · scale, A B on top, in float64."""
    result = quantized("lorc", "int3-g32-asym")
    twin = copy.deepcopy(result.model).double()
    leaves: dict[str, Tensor] = {}
    for layer in result.layers:
        base, (factors,) = layer.weight.base, layer.weight.residuals
        assert isinstance(base.scale, Tensor)
        assert isinstance(base.zero, Tensor)
        ratio = torch.ones(base.scale.shape, dtype=torch.float64, requires_grad=True)
        zero = base.zero.double().requires_grad_()
        leaves |= {f"{layer.name}.scale": ratio, f"{layer.name}.zero_point": zero}
        value = base.format.grid.decode(base.codes).double() - zero.repeat_interleave(32, 1)
        a, b = (f.double().requires_grad_() for f in factors.factors())
        leaves |= {f"{layer.name}.factor0_a": a, f"{layer.name}.factor0_b": b}
        module = twin.get_submodule(layer.name)
        del module.weight
        module.weight = value * (base.scale.double() * ratio).repeat_interleave(32, 1) + a @ b
    twin(IDS, labels=IDS, use_cache=False).loss.backward()
    student = open_student(result, ("scales", "zero-points", "factors"))
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    found = wanted(student)
    for name, leaf in leaves.items():
        assert torch.allclose(found[name].grad.double(), leaf.grad, rtol=1e-3, atol=1e-6), name


def test_products_are_fast_in_the_backward_pass_too(monkeypatch):
    if not products._AVAILABLE:
        pytest.skip("no oneDNN here")
    result, _ = case("int4 groups")
    found = loss_of(open_student(result, ("scales", "norms")))
    made, product = [], products._product
    monkeypatch.setattr(products, "_product", lambda *args: made.append(1) or product(*args))
    with fast_linear():
        found.backward()
    assert len(made) == 2 * len(result.layers)  # those of what enters a layer, and of its weight


def test_gradients_are_the_same_through_fast_products_and_without_inputs_that_need_them():
    result, parts = case("all of them")
    student = open_student(result, parts)
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    plain = {name: p.grad.clone() for name, p in wanted(student).items()}
    student.zero_grad()
    with fast_linear():
        student(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(torch.allclose(p.grad, plain[name], rtol=1e-3, atol=1e-5) for name, p in wanted(student).items())


@pytest.mark.parametrize("name", ["int4 groups", "int3 groups, gptq", "nf4", "experts", "biases", "nested scales"])
def test_codes_stay_where_weights_are_not_trained(name):
    result, parts = case(name)
    before = {layer.name: layer.weight.base.codes.clone() for layer in result.layers}
    train(open_student(result, parts))
    settled = settle(result)
    assert all(torch.equal(layer.weight.base.codes, before[layer.name]) for layer in settled.layers)


def test_codes_change_where_weights_are_trained():
    result, parts = case("weights")
    before = {layer.name: layer.weight.base for layer in result.layers}
    train(open_student(result, parts))
    for layer in settle(result).layers:
        assert not torch.equal(layer.weight.base.codes, before[layer.name].codes)
        assert torch.equal(layer.weight.base.scale, before[layer.name].scale)


def test_factors_keep_their_format():
    result, parts = case("factors")
    before = result.layers[0].weight.residuals[0]
    train(open_student(result, parts))
    after = settle(result).layers[0].weight.residuals[0]
    assert isinstance(before, LowRank)
    assert isinstance(after, LowRank)
    for old, new in ((before.a, after.a), (before.b, after.b)):
        assert isinstance(old, QTensor)
        assert isinstance(new, QTensor)
        assert new.format == old.format
        assert not torch.equal(new.codes, old.codes)


def test_training_lowers_the_loss_of_the_quantized_model():
    result = quantized("rtn", "int3-g32-asym")
    with torch.no_grad():
        before = float(result.model(IDS, labels=IDS).loss)
    train(open_student(result, ("scales", "norms")), steps=10)
    with torch.no_grad():
        assert float(settle(result).model(IDS, labels=IDS).loss) < before - 0.5


def test_layers_of_a_student_hold_no_float_weights():
    result, _ = case("int3 groups, gptq")
    weights = sum(layer.weight.base.codes.numel() for layer in result.layers)
    student = open_student(result, ("scales",))
    held = sum(t.numel() * t.element_size() for m in computed_layers(student).values() for t in m.held())
    floats = sum(p.numel() for n, p in student.named_parameters() if not n.endswith("embed_tokens.weight"))
    assert held < 0.6 * weights  # half a byte a code, and scales
    assert floats < 0.1 * weights


@pytest.mark.parametrize("name", ["int4 groups", "factors", "nested scales"])
def test_what_a_layer_holds_lies_where_its_weight_did(name):
    """A device without values: a result's codes are on the CPU, wherever its model is."""
    result, parts = case(name)
    open_student(Result(**{**vars(result), "model": result.model.to("meta")}), parts)
    for layer in result.layers:
        student = result.model.get_submodule(layer.name)
        assert {t.device.type for t in [*student.held(), *student.parameters()]} == {"meta"}
        x = torch.empty(2, 3, student.in_features, device="meta")
        assert student(x).shape == (2, 3, student.out_features)
        assert layer.weight.base.codes.device.type == "cpu"


def test_the_record_says_what_was_trained_and_keeps_the_rest():
    result, parts = case("int3 groups, gptq")
    before = result.record()
    train(open_student(result, parts))
    after = settle(result).record()
    assert all(row.pop("trained") == "scales" for row in after["layers"])
    assert after["notes"].pop(0) == "trained after quantizing: norms, scales; losses of layers are those before"
    assert after == before


def test_a_settled_student_can_be_trained_again():
    result, parts = case("int4 groups")
    train(open_student(result, parts))
    once = settle(result)
    before = logits(once.model)
    student = open_student(once, ("weights",))
    assert torch.equal(logits(student), before)
    train(student)
    trained = logits(student)
    assert torch.equal(logits(settle(once).model), trained)


def test_a_copy_of_a_student_is_a_student_of_its_own():
    result, parts = case("biases")
    student = open_student(result, parts)
    before = logits(student)
    twin = copy.deepcopy(student)
    train(twin)
    assert torch.equal(logits(student), before)
    assert not torch.equal(logits(twin), before)


@pytest.mark.parametrize("part", ["scales", "zero-points", "weights"])
@pytest.mark.parametrize(("method", "weights"), [("nf4", None), ("rtn", "nvfp4"), ("rtn", "mxfp4"), ("rtn", MINIMA)])
def test_scales_that_are_no_plain_numbers_are_refused_by_name_and_nothing_is_changed(method, weights, part):
    result = quantized(method, weights)
    before = logits(result.model)
    with pytest.raises(PlanError, match=r"QF-294.*layers\.0\.self_attn\.q_proj.*norms can be trained"):
        open_student(result, ("norms", part))
    assert not computed_layers(result.model)
    assert torch.equal(logits(result.model), before)


@pytest.mark.parametrize(
    ("part", "weights"), [("zero-points", "int4-g32-sym"), ("factors", "int4-g32-sym"), ("biases", "int4-g32-sym")]
)
def test_a_part_that_the_student_has_not_is_refused(part, weights):
    with pytest.raises(PlanError, match=f"QF-294.*no {part} to train; it has norms, scales, weights"):
        open_student(quantized("rtn", weights), (part,))


def test_scales_that_a_container_computes_itself_are_refused():
    with pytest.raises(PlanError, match=r"QF-294.*largest weight of a row.*int8-channel"):
        open_student(quantized("llm-int8", None, dynamic=True), ("scales",))


def test_unknown_and_missing_parts_are_refused():
    result = quantized("rtn", "int4-g32-sym")
    with pytest.raises(RecipeError, match="did you mean 'scales'"):
        open_student(result, ("scale",))
    with pytest.raises(RecipeError, match=f"QF-247.*{', '.join(PARTS)}"):
        open_student(result, ())


def test_a_model_in_half_precision_is_refused():
    result = quantforge.quantize(tiny.make("llama", dtype=torch.bfloat16), "rtn", weights="int4-g32-sym")
    with pytest.raises(PlanError, match=r"QF-294.*bfloat16.*\.float\(\)"):
        open_student(result)


def test_a_checkpoint_is_opened_trained_and_saved_again(tmp_path: Path):
    first, _ = case("int3 groups, gptq")
    first.save(tmp_path / "first")
    result = checkpoint.open_result(tmp_path / "first")
    student = open_student(result)
    assert torch.equal(logits(student), logits(first.model))
    train(student)
    trained = logits(student)
    settle(result).save(tmp_path / "second")
    assert torch.equal(logits(quantforge.load(tmp_path / "second", torch.float32, packed=False)), trained)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert {k: (v.dtype, v.shape) for k, v in old.items()} == {k: (v.dtype, v.shape) for k, v in new.items()}
    again = checkpoint.open_result(tmp_path / "second")
    assert any("trained after quantizing" in note for note in again.plan.notes)
    assert again.layers[0].weight.notes["trained"] == "scales"
