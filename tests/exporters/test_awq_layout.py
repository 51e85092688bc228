"""AWQ's layout: the bytes are those that its description says, and what is read back is what was written."""

from __future__ import annotations

import json
import re

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
from quantforge.exporters.awq import Awq
from quantforge.models import tiny
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import int_grid
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor

COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the digits of a word, from its low end


def weight(group: int | None, rows: int, cols: int, seed: int) -> QTensor:
    """Return random codes and zero points, the extreme ones among them, under random scales."""
    rng = torch.Generator().manual_seed(seed)
    blocks = cols // (group or cols)
    codes = torch.randint(0, 16, (rows, cols), generator=rng).to(torch.uint8)
    zero = torch.randint(-8, 8, (rows, blocks), generator=rng).to(torch.int8)
    codes[0, 0], codes[-1, -1], zero[0, 0], zero[-1, -1] = 15, 0, -8, 7
    scale = (torch.rand(rows, blocks, generator=rng) + 0.01).half()
    return QTensor(Format(int_grid(4), (1, group), False, torch.float16), codes, scale, zero)


def config_of(group: int | None) -> dict[str, object]:
    return {"quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm"}


def digits(words: Tensor) -> np.ndarray:
    """Return what the words [rows, columns / 8] hold, [rows, columns], by the description of the layout."""
    found = np.empty((words.shape[0], words.shape[1] * 8), np.int64)
    for row, packed in enumerate(words.tolist()):
        for at, word in enumerate(packed):
            for digit, column in enumerate(COLUMNS):
                found[row, 8 * at + column] = word >> (4 * digit) & 15
    return found


@given(
    group=st.sampled_from([None, 8, 32, 64, 128]),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read_back_to_the_bit(group, rows, blocks, seed):
    q = weight(group, 8 * rows, blocks * (group or 24), seed)
    tensors = Awq().tensors("a.b", QWeight(q, {})) | {"c.weight": torch.zeros(1)}
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    (out, width), groups = q.shape, blocks if group else 1
    assert shapes.pop("c.weight") == (1,)
    assert shapes == {"a.b.qweight": (width, rows), "a.b.qzeros": (groups, rows), "a.b.scales": (groups, out)}
    (name, back), *others = Awq().read(config_of(group), tensors).items()
    assert (name, others, list(tensors)) == ("a.b", [], ["c.weight"])
    assert (back.base.format, back.residuals) == (q.format, ())
    for part in ("codes", "scale", "zero"):
        assert torch.equal(getattr(back.base, part), getattr(q, part))
        assert getattr(back.base, part).dtype == getattr(q, part).dtype
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(back.base.dequantize(dtype), q.dequantize(dtype))


@given(group=st.sampled_from([None, 16, 32]), seed=st.integers(0, 99))
def test_the_words_are_those_of_the_description(group, seed):
    q = weight(group, 16, 32, seed)
    found = Awq().tensors("a", QWeight(q, {}))
    assert {name: x.dtype for name, x in found.items()} == {
        "a.qweight": torch.int32,
        "a.qzeros": torch.int32,
        "a.scales": torch.float16,
    }
    assert all(x.is_contiguous() for x in found.values())
    each = np.arange(32) // (group or 32)
    zeros, scales = digits(found["a.qzeros"])[each], found["a.scales"].numpy()[each]
    exact = (digits(found["a.qweight"]) - zeros).astype(np.float16) * scales
    assert np.array_equal(exact.T, q.dequantize(torch.float16).numpy())


def test_words_worked_out_by_hand():
    """An 8 x 32 matrix whose code at [n, k] is n + k, without what is beyond a digit, and whose zero points are n."""
    codes = (torch.arange(8)[:, None] + torch.arange(32)) % 16
    zero = (torch.arange(8) - 8).to(torch.int8)[:, None].repeat(1, 2)
    scale = torch.arange(1, 17).half().view(8, 2)
    q = QTensor(Format(int_grid(4), (1, 16), False, torch.float16), codes.byte(), scale, zero)
    found = Awq().tensors("x", QWeight(q, {}))
    words = [f"{word & 0xFFFFFFFF:08x}" for (word,) in found["x.qweight"].tolist()]
    first = ["75316420", "86427531", "97538642", "a8649753", "b975a864", "ca86b975", "db97ca86", "eca8db97"]
    then = ["fdb9eca8", "0ecafdb9", "1fdb0eca", "20ec1fdb", "31fd20ec", "420e31fd", "531f420e", "6420531f"]
    assert words == 2 * (first + then)
    assert found["x.qzeros"].tolist() == [[0x75316420], [0x75316420]]
    assert found["x.scales"].tolist() == [[1, 3, 5, 7, 9, 11, 13, 15], [2, 4, 6, 8, 10, 12, 14, 16]]


@pytest.mark.parametrize(("kind", "group"), [("llama", 32), ("qwen2", -1), ("phi3", 32)])
def test_a_model_is_written_and_read_back_to_the_same_logits(tmp_path, kind, group):
    model, out = tiny.make(kind, dtype=torch.bfloat16), tmp_path / "out"
    overrides = {"model.layers.1.mlp.down_proj": {"skip": True}}
    result = quantforge.quantize(
        model.float(), "rtn", group_size=group, symmetric=None, overrides=overrides, format="awq", out=out
    )
    config = json.loads((out / "config.json").read_text())
    told = config["quantization_config"]
    assert config["dtype"] == "float16"
    assert told == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["model.layers.1.mlp.down_proj", "lm_head"],
    }
    tensors = load_file(out / "model.safetensors")
    layers = Awq().read(told, tensors)
    assert set(layers) == set(result.plan.layers)
    assert "model.layers.1.mlp.down_proj" not in layers
    assert {x.dtype for x in tensors.values()} == {torch.float16}
    for layer in result.layers:
        assert torch.equal(layers[layer.name].dequantize(torch.float32), layer.weight.dequantize(torch.float32))
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(checkpoint.read(out, torch.float32)(ids).logits, result.model(ids).logits)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"symmetric": True}, "int4-g32-sym-fp16 of .*q_proj; .*gptq holds 4 and 8 bits without them"),
        ({"bits": 8}, "cannot hold int8-g32-asym-fp16 .* int4 by group or channel with zero points works"),
        ({"weights": "nf4-g64", "group_size": None}, "cannot hold nf4-g64"),
        ({"method": "hqq"}, "cannot hold int4-g32-asym-fp16-zero-fp16"),
        ({"inputs": "int8-token"}, "rounded inputs .* --format compressed-tensors holds it"),
        ({"overrides": {"v_proj": {"skip": True}}}, "q_proj, k_proj, v_proj of awq as one layer"),
        ({"group_size": 48}, "groups of 48|48 does not divide the 64 inputs"),
        ({"kind": "qwen3_moe"}, "not written with experts"),
        ({"kind": "gpt2"}, "is a Conv1D"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_what_would_work(asked, said):
    asked = dict(asked)
    kind, method = asked.pop("kind", "llama"), asked.pop("method", "rtn")
    chosen = recipe.load(method, **{"group_size": 32, **asked}, fix=Awq().fix)
    with pytest.raises(PlanError) as caught:
        api.lay(tiny.make(kind), chosen, torch.bfloat16, format="awq", export=False)
    assert caught.value.number == 253
    assert re.search(said, str(caught.value))


@pytest.mark.parametrize(
    ("part", "change", "number"),
    [
        ("qzeros", None, 383),
        ("scales", None, 383),
        ("qweight", lambda x: x[:-1], 384),
        ("qweight", lambda x: x[:0], 384),
        ("qweight", lambda x: x[:, :-1], 384),
        ("qweight", lambda x: x.flatten(), 384),
        ("qweight", lambda x: x.float(), 384),
        ("qzeros", lambda x: x[:1], 384),
        ("qzeros", lambda x: x.short(), 384),
        ("scales", lambda x: x.T.contiguous(), 384),
        ("scales", lambda x: x * 0, 395),
        ("scales", lambda x: x * torch.nan, 395),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_layer(part, change, number):
    tensors = Awq().tensors("a.b", QWeight(weight(16, 16, 32, 0), {}))
    if change:
        tensors[f"a.b.{part}"] = change(tensors[f"a.b.{part}"])
    else:
        del tensors[f"a.b.{part}"]
    with pytest.raises(ModelError) as caught:
        Awq().read(config_of(16), tensors)
    assert caught.value.number == number
    assert "a.b" in str(caught.value)


@pytest.mark.parametrize(
    "told",
    [
        {"quant_method": "gptq"},
        {"bits": 8},
        {"version": "gemv"},
        {"version": ["gemm"]},
        {"zero_point": False},
        {"group_size": 0},
        {"group_size": None},
    ],
)
def test_another_version_is_refused_by_name(told):
    with pytest.raises(ModelError) as caught:
        Awq().read(config_of(16) | told, Awq().tensors("a.b", QWeight(weight(16, 16, 32, 0), {})))
    assert caught.value.number == 382
