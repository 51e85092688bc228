"""Checkpoints that stay packed: the logits of the dequantized model, in a fraction of the memory."""

import copy
import json
import warnings

import pytest
import torch

import quantforge
from quantforge.errors import ModelError, PlanError, ResourceError
from quantforge.models import tiny
from quantforge.runtime import fuse, load, table
from quantforge.runtime.kernel import PackedLinear

IDS = torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(0))
INT4 = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}
W8A8 = {"method": "rtn", "bits": 8, "group_size": -1, "symmetric": True, "inputs": "int8-token"}


def saved(folder, kind, **how):
    quantforge.quantize(tiny.make(kind, dtype=torch.bfloat16), out=folder, calibration=IDS, **how)
    return folder


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("int4") / "model", "llama", **INT4)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def share(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize(
    ("kind", "how", "operator", "most"),
    [
        ("llama", INT4, "int4", 0.02),
        ("opt", INT4, "int4", 0.02),
        ("qwen2", INT4, "int4", 0.02),
        ("gemma2", INT4, "int4", 0.02),
        ("phi3", INT4, "int4", 0.02),
        ("mixtral", INT4, "int4", 0.02),
        ("llama", W8A8, "w8a8", 0.01),
        ("opt", W8A8, "w8a8", 0.01),
        ("qwen3_moe", W8A8, "w8a8", 0.01),
        ("qwen2", {"method": "rtn", "bits": 8, "group_size": -1}, "int8 in two digits", 0.001),
        ("opt", {"method": "llm-int8"}, "llm.int8", 0.01),
        ("llama", {"method": "spqr"}, "int4 + CSR", 0.02),
        ("llama", {**INT4, "method": "gptq+lorc"}, "int4 + low rank", 0.02),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logits_of_packed_models_are_those_of_dequantized_ones(kind, how, operator, most, tmp_path):
    folder = saved(tmp_path / "model", kind, **how)
    found = load.read(folder, torch.float32)
    names = {name for name, _ in found.operators.values()}
    assert names == {operator}
    assert not found.notes
    # where inputs are rounded too, products are exact: only what is nearly a tie may fall to the other side
    assert share(logits(found.model), logits(quantforge.load(folder, torch.float32, packed=False))) <= most


@pytest.mark.parametrize("dynamic", [False, True])
def test_channels_of_inputs_that_stay_in_float_do_so_beside_groups_of_4_bits(dynamic, tmp_path):
    model = tiny.make("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 60
        model.model.layers[1].post_attention_layernorm.weight[7] = 60
    how = {"weights": "int4-g32-asym", "settings": {"inputs.dynamic": dynamic}}
    quantforge.quantize(model, "llm-int8", out=tmp_path / "model", calibration=IDS, **how)
    found = load.read(tmp_path / "model", torch.float32)
    assert any("channels of its inputs stay in float" in why for _, why in found.operators.values())
    level = quantforge.load(tmp_path / "model", torch.float32, packed=False)
    assert share(logits(found.model), logits(level)) < 0.02


def test_a_packed_model_is_not_saved_without_its_weights(int4, tmp_path):
    model = quantforge.load(int4)
    for save in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(PlanError, match=r"QF-279.*packed=False") as refused:
            save()
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_codes_take_a_fraction_of_the_memory(int4):
    found, level = load.read(int4), quantforge.load(int4, torch.float32, packed=False)
    names = list(found.operators)
    assert load.linear_bytes(found.model, names) <= 0.2 * load.linear_bytes(level, names)
    weights = sum(level.get_submodule(name).weight.numel() for name in names)
    assert load.linear_bytes(level, names) == 4 * weights
    # half a byte a code, and 4 bytes for scale and offset of 32
    assert load.linear_bytes(found.model, names) == weights // 2 + weights // 32 * 4
    rest = sum(p.numel() * p.itemsize for p in found.model.parameters())
    assert load.weight_bytes(found.model) >= rest + load.linear_bytes(found.model, names)
    assert not any(p.requires_grad for p in found.model.parameters())


def test_a_model_is_loaded_in_the_dtype_asked_for(int4):
    own, wide = quantforge.load(int4), quantforge.load(int4, torch.float32)
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert logits(own).dtype == torch.bfloat16
    assert share(logits(own), logits(wide)) < 0.05


def test_a_copy_computes_on_its_own(int4):
    model = quantforge.load(int4, torch.float32)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    ours, theirs = (m.get_submodule("model.layers.0.self_attn.q_proj") for m in (model, other))
    assert ours.kernel is theirs.kernel
    assert ours.joint is not theirs.joint
    assert theirs.joint is other.get_submodule("model.layers.0.self_attn.k_proj").joint


def test_layers_of_one_input_share_a_product_and_others_do_not(int4):
    model = quantforge.load(int4)
    block = "model.layers.0."
    joined = {n for n, m in model.named_modules() if isinstance(m, fuse.JointLinear) and n.startswith(block)}
    alone = {n for n, m in model.named_modules() if type(m) is PackedLinear and n.startswith(block)}
    partners = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert joined == {block + name for name in partners}
    assert alone == {block + n for n in ("self_attn.o_proj", "mlp.down_proj")}


def test_what_no_operator_computes_is_dequantized_with_a_note_or_refused(tmp_path):
    own = {"*.v_proj": {"weights": "int4-g32-sym"}}
    folder = saved(tmp_path / "model", "llama", method="rtn", weights="mxfp4", overrides=own)
    with pytest.warns(UserWarning, match="12 of 14 quantized layers are computed from floats, model") as told:
        model = quantforge.load(folder, torch.float32)
    assert len(told) == 1
    assert share(logits(model), logits(quantforge.load(folder, torch.float32, packed=False))) < 0.02
    with pytest.raises(ResourceError, match=r"QF-543.*e2m1-g32.*--strict") as refused:
        quantforge.load(folder, strict=True)
    assert "\n" not in str(refused.value)


def test_inputs_are_rounded_in_layers_that_fall_back(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", "llama", **W8A8)
    monkeypatch.setattr(table, "TABLE", ())
    with warnings.catch_warnings(record=True):
        model = quantforge.load(folder, torch.float32)
    assert torch.equal(logits(model), logits(quantforge.load(folder, torch.float32, packed=False)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("packed", [True, False])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(int4, packed):
    with pytest.raises(ResourceError, match="QF-502"):
        quantforge.load(int4, device="cuda", packed=packed)
    with pytest.raises(ResourceError, match=r"QF-501.*tpu"):
        quantforge.load(int4, device="tpu", packed=packed)


def test_damage_is_told_as_of_dequantized_models(int4, tmp_path, change_tensors):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in int4.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))
    with pytest.raises(ModelError) as packed:
        quantforge.load(folder)
    with pytest.raises(ModelError) as dense:
        quantforge.load(folder, packed=False)
    assert str(packed.value) == str(dense.value)


def test_a_float_model_is_no_quantized_checkpoint(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ModelError, match="QF-353"):
        quantforge.load(tmp_path)
