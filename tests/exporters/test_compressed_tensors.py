"""compressed-tensors: what stock transformers computes from a checkpoint is what quantforge computes."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantforge
from quantforge import exporters, pipeline, recipe
from quantforge import plan as planning
from quantforge.errors import ModelError
from quantforge.exporters.compressed_tensors import CompressedTensors
from quantforge.models import tiny
from quantforge.numerics import ranges
from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import int_grid
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor, quantize
from quantforge.result import Result

KINDS = [kind for kind in tiny.names() if kind != "gpt2"]
BITS = (2, 3, 4, 5, 6, 8)
# Every architecture in every dtype, and every width with and without zero points, by group and by channel.
CASES = [
    (
        KINDS[i % 8],
        BITS[i % 6],
        bool(i // 6 % 2),
        (32, -1)[i // 12 % 2],
        (torch.bfloat16, torch.float16)[(i + i // 8) % 2],
    )
    for i in range(24)
]
# Keys that the format has had since compressed-tensors 0.5: a new one would keep old readers out.
KEYS = {"quant_method", "format", "quantization_status", "config_groups", "ignore"}
WEIGHT_KEYS = {"num_bits", "type", "symmetric", "strategy", "dynamic", "group_size"}


def tokens() -> Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def quantized(
    kind: str,
    dtype: torch.dtype = torch.bfloat16,
    method: str = "rtn",
    skip: tuple[str, ...] = ("lm_head",),
    **changes,
) -> Result:
    """Return a tiny model whose checkpoint is in `dtype`, quantized in float32 as when it is loaded from a folder."""
    model = tiny.make(kind, dtype=dtype)
    chosen = recipe.replace(recipe.load(method, **{"group_size": 32, **changes}), skip=skip)
    plan = planning.make(model, chosen, dtype)
    exporters.check(plan, CompressedTensors())
    rows = pipeline.quantize(model.float(), plan, tokens() if chosen.solver.needs else None)
    return Result(model, plan, tuple(rows), None, kind, {}, 0.0, None)


def parameters_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put the parameters into `dtype` and leave the buffers in float32, as loading does, unlike `Module.to`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def test_the_cases_cover_what_they_should():
    for part in (lambda c: (c[0], c[4]), lambda c: (c[1], c[2]), lambda c: (c[1], c[3]), lambda c: (c[2], c[3])):
        assert len({part(case) for case in CASES}) == len({a for a, *_ in map(part, CASES)}) * 2


@pytest.mark.parametrize(("kind", "bits", "symmetric", "group", "dtype"), CASES)
def test_stock_transformers_computes_the_same_logits(tmp_path, kind, bits, symmetric, group, dtype):
    result = quantized(kind, dtype, bits=bits, symmetric=symmetric, group_size=group)
    result.save(tmp_path / "out")
    for computed in (dtype, torch.float32):
        theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=computed))
        ours = logits(quantforge.load(tmp_path / "out", computed, packed=False))
        assert theirs.dtype == ours.dtype == computed
        assert torch.equal(theirs, ours)
        if computed == torch.float32:
            continue
        assert torch.equal(ours, logits(parameters_in(result.model, dtype)))
        assert torch.equal(ours, logits(quantforge.load(tmp_path / "out", packed=False)))
    assert not torch.equal(ours, logits(tiny.make(kind, dtype=dtype).float()))


def test_gptq_in_memory_in_float32_is_what_is_read_back(tmp_path):
    model = tiny.make("llama")
    result = quantforge.quantize(model, group_size=32, bits=3, calibration=tokens(), out=tmp_path / "out")
    assert torch.equal(logits(result.model), logits(quantforge.load(tmp_path / "out", packed=False)))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(result.model), logits(stock))


@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (32, False), (-1, True), (-1, False)])
def test_the_config_has_long_known_keys_only_and_says_what_the_file_holds(group, symmetric):
    result = quantized("llama", group_size=group, symmetric=symmetric, skip=("lm_head", "k_proj"))
    linears = [n for n, m in result.model.named_modules() if isinstance(m, nn.Linear)]
    config = CompressedTensors().config(result.plan, linears)
    assert set(config) <= KEYS
    weights = config["config_groups"]["group_0"]["weights"]
    assert set(weights) <= WEIGHT_KEYS
    assert set(config["config_groups"]["group_0"]) == {"targets", "weights"}
    assert config["ignore"] == ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "lm_head"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert (scheme.weights.num_bits, scheme.weights.symmetric) == (4, symmetric)
    assert scheme.weights.strategy == ("channel" if group == -1 else "group")
    assert scheme.weights.group_size == (None if group == -1 else group)
    assert scheme.input_activations is None


def test_a_checkpoint_with_skipped_layers_loads_in_stock_transformers(tmp_path):
    result = quantized("qwen3", skip=("lm_head", "v_proj", "model.layers.1.mlp.down_proj"))
    result.save(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(stock), logits(quantforge.load(tmp_path / "out", torch.float32, packed=False)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]


def stored(
    bits: int, group: int | None, symmetric: bool, dtype: torch.dtype, rows: int, blocks: int, seed: int
) -> QTensor:
    """Return random weights of `rows` × `blocks` groups in a format, the extreme codes among them."""
    fmt = Format(int_grid(bits), (1, group), symmetric, dtype)
    x = torch.randn(rows, blocks * (group or 7), generator=torch.Generator().manual_seed(seed))
    q = quantize(x, ranges.minmax(x, fmt), fmt)
    q.codes[0, 0], q.codes[-1, -1] = 0, (1 << bits) - 1
    return q


def config_of(fmt: Format) -> dict[str, object]:
    weights = {"num_bits": fmt.grid.bits, "type": "int", "symmetric": fmt.symmetric, "dynamic": False}
    group = fmt.block[1]
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 5, 16, 32]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    rows=st.integers(1, 35),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read_back_to_the_bit(bits, group, symmetric, dtype, rows, blocks, seed):
    q = stored(bits, group, symmetric, dtype, rows, blocks, seed)
    tensors = CompressedTensors().tensors("a.b", QWeight(q, {}))
    assert set(tensors) == {
        f"a.b.weight_{p}" for p in ("packed", "scale", "shape", *(() if symmetric else ("zero_point",)))
    }
    assert tensors["a.b.weight_packed"].shape == (rows, -(-q.shape[1] // (32 // bits)))
    (name, weight), *others = CompressedTensors().read(config_of(q.format), tensors).items()
    assert (name, others, tensors) == ("a.b", [], {})
    back = weight.base
    assert back.format == q.format
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert back.scale.shape == counts(q.shape, q.format.block)
    assert (back.zero is None) == symmetric
    assert symmetric or torch.equal(back.zero, q.zero)
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"quant_method": "gptq"}, 370),
        ({"format": "marlin-24"}, 370),
        ({"format": None}, 370),
        ({"config_groups": {}}, 371),
        ({"config_groups": {"a": {}, "b": {}}}, 371),
        ({"config_groups": {"a": {"targets": "Linear", "weights": {}}}}, 371),
    ],
)
def test_another_format_is_refused_by_name(changes, number):
    q = stored(4, 16, False, torch.bfloat16, 4, 2, 0)
    with pytest.raises(ModelError) as caught:
        CompressedTensors().read(config_of(q.format) | changes, CompressedTensors().tensors("a", QWeight(q, {})))
    assert caught.value.number == number


@pytest.mark.parametrize("part", ["scale", "shape", "zero_point"])
def test_a_missing_tensor_is_named(part):
    q = stored(4, 16, False, torch.bfloat16, 4, 2, 0)
    tensors = CompressedTensors().tensors("a.b", QWeight(q, {}))
    del tensors[f"a.b.weight_{part}"]
    with pytest.raises(ModelError, match=rf"a\.b lacks weight_{part}"):
        CompressedTensors().read(config_of(q.format), tensors)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("packed", torch.zeros(4, 5, dtype=torch.int32)),
        ("packed", torch.zeros(3, 4, dtype=torch.int32)),
        ("packed", torch.zeros(4, 4, dtype=torch.float32)),
        ("packed", torch.zeros(16, dtype=torch.int32)),
        ("scale", torch.ones(4, 3, dtype=torch.bfloat16)),
        ("scale", torch.ones(8, dtype=torch.bfloat16)),
        ("scale", torch.ones(4, 2, dtype=torch.int32)),
        ("scale", torch.full((4, 2), torch.nan, dtype=torch.bfloat16)),
        ("scale", torch.full((4, 2), torch.inf, dtype=torch.bfloat16)),
        ("scale", torch.full((4, 2), -1.0, dtype=torch.bfloat16)),
        ("scale", torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]).bfloat16()),
        ("shape", torch.tensor([4, 64])),
        ("shape", torch.tensor([8, 32])),
        ("shape", torch.tensor([4])),
        ("shape", torch.tensor([4, 32, 1])),
        ("shape", torch.tensor([-4, 32])),
        ("zero_point", torch.zeros(1, 3, dtype=torch.int32)),
        ("zero_point", torch.zeros(2, 2, dtype=torch.int32)),
        ("zero_point", torch.zeros(2, dtype=torch.int32)),
        ("zero_point", torch.zeros(1, 2)),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_layer(part, wrong):
    q = stored(4, 16, False, torch.bfloat16, 4, 2, 0)
    tensors = CompressedTensors().tensors("a.b", QWeight(q, {})) | {f"a.b.weight_{part}": wrong}
    with pytest.raises(ModelError, match=r"a\.b"):
        CompressedTensors().read(config_of(q.format), tensors)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"num_bits": "four"},
        {"num_bits": 40},
        {"num_bits": 1},
        {"num_bits": None},
        {"group_size": 0},
        {"group_size": "32"},
        {"group_size": -5},
        {"strategy": "block"},
        {"type": "float"},
        {"actorder": "group"},
    ],
)
def test_a_scheme_that_is_incomplete_or_that_nothing_here_writes_is_refused(weights):
    q = stored(4, 16, False, torch.bfloat16, 4, 2, 0)
    config = config_of(q.format)
    scheme = config["config_groups"]["group_0"]
    scheme["weights"] = scheme["weights"] | weights if weights else {}
    with pytest.raises(ModelError):
        CompressedTensors().read(config, CompressedTensors().tensors("a.b", QWeight(q, {})))
