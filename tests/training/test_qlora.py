"""QLoRA: the base stays as it is to the byte, and what is trained is an ordinary adapter."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache

import peft
import pytest
import torch
from torch import Tensor, nn

import quantforge
from quantforge.errors import PlanError, RecipeError
from quantforge.models import arch, tiny
from quantforge.numerics.products import fast_linear
from quantforge.numerics.residuals import LowRank
from quantforge.result import Result
from quantforge.store import MARK
from quantforge.training.coded import CodedLinear
from quantforge.training.layers import computed_layers
from quantforge.training.qlora import Adapters, open_student, save, settle, without_factors

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(3, 128, (12, 24), generator=torch.Generator().manual_seed(1))
WIDE = {"intermediate_size": 128}  # rows of whole blocks of 64
BASES = {
    "nf4": {},
    "nf4, no double quantization": {"method": "rtn", "weights": "nf4"},
    "odd blocks": {"method": "rtn", "weights": "nf4-f48"},
    "gptq": {"method": "gptq", "weights": "int3-g32-asym"},
    "int8": {"method": "rtn", "weights": "int8-channel-sym", "inputs": "int8-token"},
    "e4m3": {"method": "rtn", "weights": "e4m3-channel"},
    "spqr": {},
    "nf4+lorc": {},
}


@cache
def _quantized(name: str, kind: str) -> Result:
    asked = {"method": name, "calibration": CALIBRATION, **BASES[name]}
    return quantforge.quantize(tiny.make(kind, **WIDE), asked.pop("method"), **asked)


def quantized(name: str = "nf4", kind: str = "llama") -> Result:
    return copy.deepcopy(_quantized(name, kind))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(adapters(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def held(model: nn.Module) -> list[bytes]:
    """Return every byte of what is not trained."""
    tensors = [t for layer in computed_layers(model).values() for t in layer.held()]
    tensors += [p for p in model.parameters() if not p.requires_grad]
    return [t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors if t.numel()]


@pytest.mark.parametrize("name", BASES)
def test_before_training_the_outputs_are_the_bases_exactly(name):
    result = quantized(name)
    before = logits(result.model)
    assert torch.equal(logits(open_student(result, Adapters(rank=8))), before)


@pytest.mark.parametrize("name", BASES)
def test_training_changes_adapters_and_no_byte_of_the_base(name):
    result = quantized(name)
    student = open_student(result, Adapters(rank=8))
    before, base = logits(student), held(student)
    own = {layer.name: layer.weight.base.codes.clone() for layer in result.layers}
    train(student)
    assert held(student) == base
    assert sum(map(len, base)) > 30_000
    assert not torch.equal(logits(student), before)
    assert all(torch.equal(layer.weight.base.codes, own[layer.name]) for layer in result.layers)


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2"])
def test_every_quantized_layer_has_an_adapter_and_nothing_else_is_trained(kind):
    result = quantized(kind=kind)
    student = open_student(result, Adapters(rank=8))
    found = adapters(student)
    assert sum(p.numel() for p in found.values()) == sum(8 * sum(p.shape) for p in result.plan.layers.values())
    layers = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in found}
    assert layers == set(result.plan.layers)
    assert "lm_head" not in layers


@pytest.mark.parametrize("name", ["nf4", "gptq", "odd blocks", "nf4+lorc"])
def test_gradients_are_those_of_float_layers_with_the_dequantized_weights(name):
    result = quantized(name)
    layer = result.layers[0]
    weight, own = layer.weight.dequantize(), copy.deepcopy(result.model.get_submodule(layer.name))
    coded = CodedLinear(own, layer.weight, frozenset(), torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    x, upstream = (torch.randn(3, 5, n, generator=generator) for n in (coded.in_features, coded.out_features))
    a, b = (torch.randn(shape, generator=generator) for shape in ((8, coded.in_features), (coded.out_features, 8)))
    grads = []
    for linear in (coded, lambda x: nn.functional.linear(x, weight)):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        out = linear(leaves[0]) + leaves[0] @ leaves[1].T @ leaves[2].T
        grads.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-5) for p, q in zip(*grads, strict=True))


def test_gradients_of_the_whole_model_are_those_of_stock_peft_on_the_float_model(tmp_path):
    result = quantized()
    student = open_student(result, Adapters(rank=8))
    train(student)
    save(student, tmp_path / "adapter")
    floats = copy.deepcopy(_quantized("nf4", "llama").model)
    stock = peft.PeftModel.from_pretrained(floats, tmp_path / "adapter", is_trainable=True)
    loss(stock).backward()
    theirs = adapters(stock)
    assert set(theirs) == set(adapters(student))
    student.zero_grad()
    loss(student).backward()
    for name, p in adapters(student).items():
        assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("name", ["nf4", "gptq", "nf4+lorc"])
def test_stock_peft_loads_the_adapter_onto_the_dequantized_base(name, tmp_path):
    result = quantized(name)
    plain = logits(result.model)
    student = open_student(result, Adapters(rank=8))
    train(student)
    trained = logits(student)
    save(student, tmp_path / "adapter")
    base = settle(result, student)
    assert torch.equal(logits(base.model), plain)
    base.save(tmp_path / "base")
    loaded = quantforge.load(tmp_path / "base", torch.float32, packed=False)
    stock = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert torch.allclose(logits(stock), trained, rtol=0, atol=1e-5)
    assert (trained - plain).abs().max() > 0.1


def test_experts_get_adapters_too(tmp_path):
    result = quantized("gptq", "qwen3_moe")
    student = open_student(result, Adapters(rank=4))
    train(student)
    trained = logits(student)
    save(student, tmp_path / "adapter")
    base = settle(result, student).model
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits(stock), trained, rtol=0, atol=1e-5)


def test_the_base_is_held_in_half_a_byte_a_weight_and_its_scales():
    result = quantized()
    weights = sum(layer.weight.base.codes.numel() for layer in result.layers)
    student = open_student(result, Adapters(rank=8))
    layers = computed_layers(student).values()
    size = sum(t.numel() * t.element_size() for layer in layers for t in layer.held())
    assert weights * 0.5 < size < weights * 0.53
    known = {id(p) for p in student.parameters()} | {id(t) for t in student.buffers()}
    inside = [v for layer in layers for v in vars(layer).values() if isinstance(v, Tensor) and id(v) not in known]
    assert not [t for t in inside if t.is_floating_point() and t.numel() > 256]
    rest = sum(p.numel() for name, p in student.named_parameters() if "lora" not in name)
    assert rest < student.get_input_embeddings().weight.numel() + 1000


def test_one_weight_at_a_time_exists_during_a_step(monkeypatch):
    """What a pass keeps for the backward pass is none of the weights made in it."""
    student = open_student(quantized(), Adapters(rank=4))
    made: list[Tensor] = []
    own = CodedLinear.computed

    def noted(self, trained):
        made.append(own(self, trained))  # which keeps its place in memory from being used again
        return made[-1]

    monkeypatch.setattr(CodedLinear, "computed", noted)
    kept: list[int] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        found = loss(student)
    assert len(made) == len(computed_layers(student))
    assert not {w.untyped_storage().data_ptr() for w in made} & set(kept)
    assert student.get_output_embeddings().weight.data_ptr() in kept
    found.backward()
    assert len(made) == 2 * len(computed_layers(student)) - 3  # embeddings, the first layers' inputs, get no gradient


def test_the_start_from_the_bases_error_lowers_it():
    result = quantized("gptq")
    floats = tiny.make("llama", **WIDE)
    target = logits(floats)
    before = float((logits(result.model) - target).square().mean())
    student = open_student(result, Adapters(rank=16, start="lorc"), floats)
    after = float((logits(student) - target).square().mean())
    assert after < 0.9 * before
    for layer in result.layers:
        module = student.get_submodule(f"base_model.model.{layer.name}")
        error = arch.get_weight(floats.get_submodule(layer.name)) - layer.weight.dequantize()
        assert (error - module.get_delta_weight("default")).norm() < 0.9 * error.norm()


def test_of_full_rank_the_start_gives_the_float_model():
    result = quantized("gptq", "qwen2")  # whose narrowest layers have 32 outputs
    floats = tiny.make("qwen2", **WIDE)
    layer = result.layers[1]
    student = open_student(result, Adapters(rank=32, start="lorc"), floats)
    module = student.get_submodule(f"base_model.model.{layer.name}")
    assert layer.name.endswith("k_proj")
    error = arch.get_weight(floats.get_submodule(layer.name)) - layer.weight.dequantize()
    assert torch.allclose(module.get_delta_weight("default"), error, atol=1e-5)


def test_the_start_from_factors_takes_them_out_of_the_base(tmp_path):
    result = quantized("nf4+lorc")
    before = logits(result.model)
    student = open_student(result, Adapters(rank=12, start="lorc"))  # more than the factors have
    assert torch.allclose(logits(student), before, rtol=0, atol=1e-4)
    loss(student).backward()
    grads = [p.grad for name, p in adapters(student).items() if "lora_B" in name]
    assert all(bool(g.any(0).all()) for g in grads)  # columns without a start can learn
    train(student)
    trained = logits(student)
    save(student, tmp_path / "adapter")
    base = settle(result, student)
    assert not any(isinstance(r, LowRank) for layer in base.layers for r in layer.weight.residuals)
    assert [x.weight.residuals for x in base.layers] == [x.weight.residuals for x in without_factors(result).layers]
    base.save(tmp_path / "base")
    loaded = quantforge.load(tmp_path / "base", torch.float32, packed=False)
    stock = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert torch.allclose(logits(stock), trained, rtol=0, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for on in (False, True):
        student = open_student(quantized(), Adapters(rank=8, checkpointing=on))
        torch.nn.init.constant_(next(p for n, p in adapters(student).items() if "lora_B" in n), 0.01)
        with fast_linear():
            loss(student).backward()
        found.append({name: p.grad for name, p in adapters(student).items()})
        assert any(module.training for module in student.modules()) == on
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(g.any() for g in found[0].values())


def test_nothing_is_printed_where_it_is_imported():
    """In a process of its own: bitsandbytes, which peft imports, warns of a kernel that it cannot download."""
    code = (
        "import logging, quantforge.training.qlora;"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops'); assert not log.filters; log.warning('a real one')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "a real one\n"


def test_dropout_is_that_of_the_adapters_alone():
    result = quantforge.quantize(tiny.make("opt", dropout=0.5, attention_dropout=0.5), "rtn", weights="int4-g32-asym")
    student = open_student(result, Adapters(rank=4, dropout=0.5, checkpointing=True))
    assert torch.equal(logits(student), logits(student))
    train(student, 1)
    assert not torch.equal(logits(student), logits(student))


def test_the_draw_is_that_of_the_seed_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    one, same, other = (open_student(quantized(), Adapters(rank=4, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (next(iter(adapters(model).values())) for model in (one, same, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_an_adapter_replaces_only_what_was_written_as_one(tmp_path):
    student = open_student(quantized(), Adapters(rank=4, alpha=8))
    folder = save(student, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "LlamaForCausalLM")
    with pytest.raises(PlanError, match="QF-262"):
        save(student, folder)
    save(student, folder, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(PlanError, match="QF-264"):
        save(student, tmp_path / "other", overwrite=True)
    assert (folder / MARK).is_file()


def test_a_rank_above_the_width_is_refused_before_anything_is_changed():
    result = quantized()
    with pytest.raises(PlanError, match=r"QF-295.*rank 33 is more than the width 32 of model.*k_proj; use at most 32"):
        open_student(result, Adapters(rank=33))
    assert not computed_layers(result.model)
    assert open_student(result, Adapters(rank=32))


@pytest.mark.parametrize(
    ("change", "number"),
    [({"rank": 0}, 248), ({"alpha": 0.0}, 248), ({"alpha": float("nan")}, 248), ({"dropout": 1.0}, 248)],
)
def test_options_out_of_range_are_refused(change, number):
    with pytest.raises(RecipeError, match=f"QF-{number}"):
        Adapters(**change)
    with pytest.raises(RecipeError, match="did you mean 'lorc'"):
        Adapters(start="lorcs")


def test_what_cannot_have_adapters_or_a_start_is_refused():
    result = quantforge.quantize(tiny.make("gpt2"), "rtn", weights="int4-g32-asym")
    with pytest.raises(PlanError, match=r"QF-295.*Conv1D"):
        open_student(result, Adapters(rank=4))
    with pytest.raises(PlanError, match=r"QF-295.*lorc needs the float model"):
        open_student(quantized(), Adapters(rank=4, start="lorc"))
