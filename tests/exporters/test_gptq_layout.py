"""GPTQ's layout: the bytes are those that its description says, and what is read back is what was written."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import quantforge
from quantforge import api, checkpoint, recipe
from quantforge.errors import ModelError, PlanError
from quantforge.exporters.gptq import Gptq
from quantforge.models import tiny
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import int_grid
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.solvers.spare import Spare

PARTS = {"qweight", "qzeros", "scales", "g_idx"}


def weight(bits: int, group: int | None, rows: int, cols: int, seed: int) -> QTensor:
    """Return random codes, the extreme ones among them, under random scales."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=rng).to(torch.uint8)
    codes[0, 0], codes[-1, -1] = (1 << bits) - 1, 0
    scale = (torch.rand(rows, cols // (group or cols), generator=rng) + 0.01).half()
    return QTensor(Format(int_grid(bits), (1, group), True, torch.float16), codes, scale)


def config_of(bits: int, group: int | None) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": False, "sym": True}


def unpacked(parts: dict[str, Tensor], bits: int) -> np.ndarray:
    """Return the float16 weight [out, in] by the description of the layout, number by number."""
    words, zeros, scales, index = (parts[part].numpy() for part in ("qweight", "qzeros", "scales", "g_idx"))
    mask, per = (1 << bits) - 1, 32 // bits
    width, out = words.shape[0] * per, words.shape[1]
    found = np.empty((out, width), np.float16)
    for i in range(width):
        for o in range(out):
            code = int(words[i // per, o]) >> (bits * (i % per)) & mask
            zero = (int(zeros[index[i], o // per]) >> (bits * (o % per)) & mask) + 1
            found[o, i] = np.float16(code - zero) * scales[index[i], o]
    return found


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 8, 32, 64, 128]),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read_back_to_the_bit(bits, group, rows, blocks, seed):
    q = weight(bits, group, 8 * rows, blocks * (group or 24), seed)
    tensors = Gptq().tensors("a.b", QWeight(q, {})) | {"c.weight": torch.zeros(1)}
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    (out, width), per, groups = q.shape, 32 // bits, blocks if group else 1
    assert shapes.pop("c.weight") == (1,)
    assert shapes == {
        "a.b.qweight": (width // per, out),
        "a.b.qzeros": (groups, out // per),
        "a.b.scales": (groups, out),
        "a.b.g_idx": (width,),
    }
    (name, back), *others = Gptq().read(config_of(bits, group), tensors).items()
    assert (name, others, list(tensors)) == ("a.b", [], ["c.weight"])
    assert (back.base.format, back.base.zero, back.residuals) == (q.format, None, ())
    assert torch.equal(back.base.codes, q.codes)
    assert torch.equal(back.base.scale, q.scale)
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(back.base.dequantize(dtype), q.dequantize(dtype))


@given(bits=st.sampled_from([4, 8]), group=st.sampled_from([None, 16, 32]), seed=st.integers(0, 99))
def test_the_words_are_those_of_the_description(bits, group, seed):
    q = weight(bits, group, 16, 32, seed)
    tensors = Gptq().tensors("a", QWeight(q, {}))
    parts = {name.removeprefix("a."): x for name, x in tensors.items()}
    assert {name: x.dtype for name, x in parts.items()} == dict.fromkeys(PARTS, torch.int32) | {"scales": torch.float16}
    assert all(x.is_contiguous() for x in parts.values())
    assert np.array_equal(unpacked(parts, bits), q.dequantize(torch.float16).numpy())


def test_words_worked_out_by_hand():
    """An 8 x 32 matrix whose code at [n, k] is n + k, without what is beyond a digit."""
    codes = (torch.arange(8)[:, None] + torch.arange(32)) % 16
    q = QTensor(Format(int_grid(4), (1, 16), True, torch.float16), codes.byte(), torch.arange(1, 17).half().view(8, 2))
    found = Gptq().tensors("x", QWeight(q, {}))
    words = [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in found["x.qweight"].tolist()]
    low = ["76543210", "87654321", "98765432", "a9876543", "ba987654", "cba98765", "dcba9876", "edcba987"]
    high = ["fedcba98", "0fedcba9", "10fedcba", "210fedcb", "3210fedc", "43210fed", "543210fe", "6543210f"]
    assert words == [low, high, low, high]
    assert found["x.qzeros"].tolist() == [[0x77777777], [0x77777777]]
    assert found["x.scales"].tolist() == [[1, 3, 5, 7, 9, 11, 13, 15], [2, 4, 6, 8, 10, 12, 14, 16]]
    assert found["x.g_idx"].tolist() == [0] * 16 + [1] * 16


def test_words_of_8_bits_worked_out_by_hand():
    codes = torch.tensor([[0, 1, 2, 3], [16, 17, 18, 19], [128, 129, 130, 131], [252, 253, 254, 255]]).byte()
    q = QTensor(Format(int_grid(8), (1, None), True, torch.float16), codes, torch.ones(4, 1).half())
    found = Gptq().tensors("x", QWeight(q, {}))
    assert [word & 0xFFFFFFFF for word in found["x.qweight"].tolist()[0]] == [
        0x03020100,
        0x13121110,
        0x83828180,
        0xFFFEFDFC,
    ]
    assert found["x.qzeros"].tolist() == [[0x7F7F7F7F]]


@pytest.mark.parametrize(("kind", "bits", "group"), [("llama", 4, 32), ("qwen2", 8, -1), ("opt", 4, -1)])
def test_a_model_is_written_and_read_back_to_the_same_logits(tmp_path, kind, bits, group):
    model = tiny.make(kind, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    floats = {name: x.clone() for name, x in model.state_dict().items()}
    out = tmp_path / "out"
    result = quantforge.quantize(model.float(), "rtn", bits=bits, group_size=group, format="gptq", out=out)
    config = json.loads((out / "config.json").read_text())
    told = config["quantization_config"]
    assert config["dtype"] == "float16"
    assert told == json.loads((out / "quantize_config.json").read_text())
    assert told == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"quantforge:{quantforge.__version__}"]},
    }
    tensors = load_file(out / "model.safetensors")
    layers = Gptq().read(told, tensors)
    assert set(layers) == set(result.plan.layers)
    for name, x in tensors.items():  # biases, norms, embeddings
        assert torch.equal(x, floats[name].half())
    assert any(name.endswith("bias") for name in tensors) == (kind != "llama")
    for layer in result.layers:
        assert torch.equal(layers[layer.name].dequantize(torch.float32), layer.weight.dequantize(torch.float32))
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(checkpoint.read(out, torch.float32)(ids).logits, result.model(ids).logits)


def test_layers_that_stay_in_float_are_told_to_each_loader(tmp_path):
    left = "model.layers.1.mlp.down_proj"
    overrides = {left: {"skip": True}}
    model = tiny.make("llama")
    quantforge.quantize(model, "rtn", group_size=32, overrides=overrides, format="gptq", out=tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (quantized,) = told["modules_in_block_to_quantize"]
    assert len(quantized) == 13
    assert left not in quantized
    assert told["dynamic"] == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{left}.weight"].dtype == torch.float16
    assert {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")} == set(quantized)


def refused(kind: str = "llama", method: str = "rtn", **asked) -> str:
    """Return why a plan is refused that is made for the layout."""
    changes = asked.pop("changes", {})
    fixed = recipe.load(method, **{"group_size": 32, **asked}, fix=Gptq().fix)
    with pytest.raises(PlanError) as caught:
        api.lay(tiny.make(kind, **changes), fixed, torch.bfloat16, format="gptq", export=False)
    assert caught.value.number == 253
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"symmetric": False}, "int4-g32-asym-fp16 of model.layers.0.self_attn.q_proj; .*awq holds 4 bits with them"),
        ({"bits": 3}, "cannot hold int3-g32-sym-fp16 .* int4 and int8 by group or channel"),
        ({"weights": "nf4-g64", "group_size": None}, "cannot hold nf4-g64"),
        ({"weights": "int4-f64-sym-dq", "group_size": None}, "cannot hold int4-f64"),
        ({"weights": "int8-tensor", "group_size": None}, "cannot hold int8-tensor"),
        ({"method": "hqq"}, "cannot hold int4-g32-asym-fp16-zero-fp16"),
        ({"inputs": "int8-token"}, "rounded inputs .* --format compressed-tensors holds it"),
        ({"overrides": {"down_proj": {"bits": 8}}}, "one format a model, .* compressed-tensors holds several"),
        ({"overrides": {"k_proj": {"skip": True}}}, "q_proj, k_proj, v_proj of gptq as one layer, .* all of them or"),
        ({"overrides": {"layers.1.mlp.up_proj": {"skip": True}}}, "gate_proj, up_proj of gptq as one layer"),
        ({"overrides": {"*": {"skip": True}}}, "nothing is quantized"),
        ({"group_size": 64}, "64 does not divide the 96 inputs of 2 layers .* 32 and -1 .* work"),
        ({"group_size": 16}, "no kernels for groups of 16, .* 32 and -1 .* work"),
        ({"group_size": -1, "changes": {"intermediate_size": 104}}, "multiples of 32, and .*gate_proj has 104 outputs"),
        ({"kind": "mixtral"}, "not written with experts such as model.layers.0.mlp.experts.0"),
        ({"kind": "gpt2"}, "is a Conv1D"),
        ({"kind": "gemma2"}, "vLLM computes gemma2 in bfloat16, which rounds float16 scales; compressed-tensors works"),
        ({"kind": "gemma3_text"}, "vLLM computes gemma3_text in bfloat16"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_what_would_work(asked, said):
    assert re.search(said, refused(**asked))


def test_single_floats_and_scales_in_another_dtype_are_refused():
    plan = api.lay(
        tiny.make("llama"), recipe.load("rtn", group_size=32, symmetric=True), torch.float16, format=None, export=True
    )
    assert Gptq().refuses(plan) is None
    layers = {n: replace(p, solver=Spare(pick="weight")) for n, p in plan.layers.items()}
    assert "beside its codes; rtn and gptq work" in str(Gptq().refuses(replace(plan, layers=layers)))
    layers = {n: replace(p, format=p.format.with_scale(torch.bfloat16)) for n, p in plan.layers.items()}
    assert "float16, not int4-g32-sym-bf16" in str(Gptq().refuses(replace(plan, layers=layers)))
    layers = {"lm_head": replace(next(iter(plan.layers.values())), name="lm_head")}
    assert "skip lm_head" in str(Gptq().refuses(replace(plan, layers=layers)))


def test_floats_that_grew_beyond_float16_since_are_named_when_it_is_saved(tmp_path):
    made = quantforge.quantize(tiny.make("llama"), "rtn", group_size=32, format="gptq")
    made.model.model.norm.weight.data[3] = 1e5
    with pytest.raises(PlanError, match=r"QF-286.*model\.norm\.weight holds 1e\+05, beyond the 65504 of float16"):
        made.save(tmp_path / "out")


def read_changed(part: str | None, change, **told) -> ModelError:
    tensors = Gptq().tensors("a.b", QWeight(weight(4, 16, 16, 32, 0), {}))
    if part and change:
        tensors[f"a.b.{part}"] = change(tensors[f"a.b.{part}"])
    elif part:
        del tensors[f"a.b.{part}"]
    with pytest.raises(ModelError) as caught:
        Gptq().read(config_of(4, 16) | told, tensors)
    assert str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize("part", sorted(PARTS - {"qweight"}))
def test_a_missing_part_is_named(part):
    error = read_changed(part, None)
    assert error.number == 383
    assert f"a.b lacks {part}" in str(error)


@pytest.mark.parametrize(
    ("part", "change", "number"),
    [
        ("qweight", lambda x: x[:-1], 384),
        ("qweight", lambda x: x[:0], 384),
        ("qweight", lambda x: x[:, :-1], 384),
        ("qweight", lambda x: x.flatten(), 384),
        ("qweight", lambda x: x.float(), 384),
        ("qzeros", lambda x: x[:1], 384),
        ("qzeros", lambda x: x.short(), 384),
        ("qzeros", lambda x: x + 1, 395),
        ("scales", lambda x: x.T.contiguous(), 384),
        ("scales", lambda x: x.int(), 384),
        ("scales", lambda x: x * 0, 395),
        ("scales", lambda x: -x, 395),
        ("scales", lambda x: x * torch.nan, 395),
        ("scales", lambda x: x * torch.inf, 395),
        ("g_idx", lambda x: x[:-1], 384),
        ("g_idx", lambda x: x.flip(0), 395),
        ("g_idx", lambda x: x.long(), 384),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_layer(part, change, number):
    error = read_changed(part, change)
    assert error.number == number
    assert "a.b" in str(error)


@pytest.mark.parametrize(
    "told",
    [
        {"quant_method": "awq"},
        {"bits": 3},
        {"bits": "4"},
        {"bits": [4]},
        {"checkpoint_format": "gptq_v2"},
        {"desc_act": True},
        {"group_size": 0},
        {"group_size": "16"},
        {"group_size": None},
        {"dynamic": {"+:a": {"bits": 8}}},
        {"dynamic": {"a": {}}},
        {"dynamic": ["-:a"]},
    ],
)
def test_another_version_is_refused_by_name(told):
    assert read_changed(None, None, **told).number == 382
