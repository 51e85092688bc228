"""8-bit checkpoints of bitsandbytes: what stock transformers loads, and what comes back here bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantforge
from quantforge.errors import ModelError
from quantforge.exporters import choose
from quantforge.exporters.bitsandbytes8 import Bitsandbytes8
from quantforge.exporters.native import Native
from quantforge.models import tiny

IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
DYNAMIC = {"inputs.dynamic": True, "inputs.threshold": 2.0}


def saved(folder, dtype=torch.float32, settings=DYNAMIC):
    model = tiny.make("llama", dtype=dtype)
    return quantforge.quantize(model, "llm-int8", calibration=IDS, settings=settings, out=folder)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("settings", [DYNAMIC, {"inputs.threshold": float("inf")}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back_bit_for_bit(dtype, settings, tmp_path):
    result = saved(tmp_path / "q", dtype, settings)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["load_in_8bit"]) == ("bitsandbytes", True)
    assert config["llm_int8_threshold"] == (2.0 if settings is DYNAMIC else 0.0)
    assert torch.equal(logits(quantforge.load(tmp_path / "q", packed=False)), logits(result.model))


def test_stock_transformers_computes_the_same_but_for_its_casts_to_float16(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    result = saved(tmp_path / "q")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ours, theirs, exact = logits(result.model), logits(stock).float(), logits(tiny.make("llama"))
    assert float((theirs - ours).norm() / ours.norm()) < 0.01
    assert float((theirs - exact).norm()) < 1.2 * float((ours - exact).norm())


def test_fixed_features_go_to_a_container_that_holds_their_float_columns(tmp_path):
    saved(tmp_path / "q", settings={"inputs.threshold": 2.0})
    assert (
        json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["quant_method"] == "quantforge"
    )


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("SCB", lambda x: x[:-1].clone(), "a number a row in SCB"),
        ("SCB", lambda x: -x, "out of range"),
        ("weight", lambda x: x.float(), "lacks its int8 weight"),
        ("weight_format", lambda x: x + 1, "weight_format is 1"),
        ("weight_format", lambda x: torch.zeros(2, dtype=torch.uint8), r"weight_format is \[0, 0\]"),
    ],
)
def test_damage_is_told_in_one_line(part, change, said, tmp_path):
    saved(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    key = f"model.layers.0.self_attn.q_proj.{part}"
    tensors[key] = change(tensors[key])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=said):
        quantforge.load(tmp_path / "q", packed=False)


def test_a_layer_without_its_scales_is_not_taken_for_floats(tmp_path):
    saved(tmp_path / "q")
    file, key = tmp_path / "q" / "model.safetensors", "model.layers.0.self_attn.q_proj"
    tensors = {k: t for k, t in load_file(file).items() if k not in (f"{key}.SCB", f"{key}.weight_format")}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{key}\.weight is torch\.int8, but nothing says") as caught:
        quantforge.load(tmp_path / "q", packed=False)
    assert caught.value.number == 358


def test_a_layer_of_no_rows_is_refused():
    parts = {"a.weight": torch.zeros(0, 4, dtype=torch.int8), "a.SCB": torch.zeros(0)}
    with pytest.raises(ModelError, match="out of range"):
        Bitsandbytes8().read({"load_in_8bit": True}, parts)


def test_scales_that_are_not_the_largest_of_a_row_go_to_a_container_that_holds_them(tmp_path):
    result = saved(tmp_path / "q", settings={**DYNAMIC, "solver.range": "mse"})
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quantforge"
    assert torch.equal(logits(quantforge.load(tmp_path / "q", packed=False)), logits(result.model))
    plan = saved(tmp_path / "plain").plan
    assert isinstance(choose(plan), Bitsandbytes8)
    trained = replace(plan, recipe=replace(plan.recipe, tuners=(object(),)))
    assert isinstance(choose(trained), Native)
