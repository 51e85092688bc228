"""The same code on a GPU: run by `pytest -m gpu` where there is one."""

import pytest
import torch

import quantforge
from quantforge import checkpoint, pipeline, recipe
from quantforge import plan as planning
from quantforge.models import tiny
from quantforge.numerics.blocks import spread
from quantforge.numerics.formats import NAMED, parse
from quantforge.numerics.inputs import Inputs, QInput, parse_inputs, settle
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import encode
from quantforge.numerics.residuals import Columns, LowRank, sparse
from quantforge.runtime import load, table, w8a8
from quantforge.runtime.integers import groups
from quantforge.training import qlora, recover
from quantforge.training.loop import Settings
from quantforge.training.loop import train as run
from quantforge.training.steps import language_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "gpt2"])
def test_codes_agree_with_the_cpu(kind, bits):
    """At least 99.9 % of one block's codes are the same: float32 sums differ in order only."""
    ids = torch.randint(0, 128, (16, 64), generator=torch.Generator().manual_seed(0))
    codes = {}
    for device in ("cpu", "cuda"):
        model = tiny.make(kind, num_hidden_layers=1).to(device)
        plan = planning.make(model, recipe.load("gptq", bits=bits, group_size=32), torch.bfloat16)
        layers = pipeline.quantize(model, plan, ids)
        codes[device] = torch.cat([layer.weight.base.codes.flatten().cpu() for layer in layers])
    assert (codes["cpu"] == codes["cuda"]).double().mean() >= 0.999


IDS = torch.randint(0, 128, (8, 24), generator=torch.Generator().manual_seed(1))
STEPS = Settings(steps=2, batch_size=4, lr=1e-2)


def opened(tmp_path, method, **how):
    """Return a checkpoint as a result whose model is on the GPU; its codes are not."""
    quantforge.quantize(tiny.make("llama", intermediate_size=128), method, calibration=IDS, **how).save(tmp_path / "q")
    result = checkpoint.open_result(tmp_path / "q")
    result.model.to("cuda")
    return result


def logits(model):
    with torch.no_grad():
        return model(IDS[:2].to("cuda"), use_cache=False).logits


@pytest.mark.parametrize(
    ("method", "parts"), [("gptq", ("scales", "norms")), ("lorc", ("scales", "factors")), ("rtn", ("weights",))]
)
def test_a_quantized_student_is_trained_and_settled(tmp_path, method, parts):
    result = opened(tmp_path, method, weights="int4-g32-asym")
    before = logits(result.model)
    student = recover.open_student(result, parts)
    assert {t.device.type for t in [*student.parameters(), *student.buffers()] if not t.is_meta} == {"cuda"}
    run(student, IDS, language_model(), STEPS)
    trained = logits(student)
    assert not torch.equal(trained, before)
    settled = recover.settle(result)
    torch.testing.assert_close(logits(settled.model), trained, rtol=0, atol=1e-4)
    assert {layer.weight.base.codes.device.type for layer in settled.layers} == {"cpu"}
    settled.save(tmp_path / "trained")
    loaded = quantforge.load(tmp_path / "trained", torch.float32, packed=False).to("cuda")
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", ["zero", "lorc"])
def test_adapters_are_trained_on_a_quantized_base(tmp_path, start):
    result = opened(tmp_path, "nf4")
    before = logits(result.model)
    floats = tiny.make("llama", intermediate_size=128) if start == "lorc" else None
    student = qlora.open_student(result, qlora.Adapters(rank=4, start=start, checkpointing=True), floats)
    run(student, IDS, language_model(), STEPS)
    assert not torch.equal(logits(student), before)
    torch.testing.assert_close(logits(qlora.settle(result, student).model), before, rtol=0, atol=1e-4)


HALF, SINGLE = 2.0**-8, 2.0**-24  # the most that rounding to bfloat16, or to float32, changes a number by
TOKENS = [1, 5, 33, 130]
NEEDS = {"int4": table.has_int4, "int8": table.has_int8, "w8a8": table.has_int_mm, "fp8": table.has_fp8}


def weight(fmt, out, width, inputs=None):
    rng = torch.Generator().manual_seed(2)
    w = torch.randn(out, width, generator=rng) * torch.randn(out, 1, generator=rng).exp()
    return QWeight(encode(w, NAMED.get(fmt) or parse(fmt)), {}, (), inputs)


def inputs_of(count, width):
    rng = torch.Generator().manual_seed(3)
    return torch.randn(count, width, generator=rng) * torch.randn(width, generator=rng).exp()


def far_from_ties(count, width, steps=127.5):
    """Return inputs that 8 bits round to the same codes whatever the last place of their scale, largest / `steps`.

    GPUs divide by a constant as they multiply by its inverse, so that this place is another one than a CPU's.
    """
    rng = torch.Generator().manual_seed(3)
    codes = (
        torch.randint(-120, 121, (count, width), generator=rng) + 0.8 * torch.rand(count, width, generator=rng) - 0.4
    )
    codes[:, 0] = steps
    return codes * torch.randn(count, 1, generator=rng).exp()


def product(w, x, needs, called=None):
    """Return x [tokens, in] times `w` by the operator that the table chooses on the GPU."""
    if not NEEDS[needs]("cuda"):
        pytest.skip(f"torch has no {needs} product for this GPU")
    choice = table.choose(w, "cuda")
    assert choice.name == (called or needs)
    kernel = table.kernel(w, choice, "cuda")
    assert kernel.operator == choice.name
    y = kernel.product(x.to("cuda"))
    assert (y.device.type, y.dtype) == ("cuda", x.dtype)
    return y.cpu()


def exact(w, x):
    """Return the product of the plain path on the CPU, in float64."""
    rounded = x if w.inputs is None else w.inputs.round(x)
    return rounded.double() @ w.dequantize(torch.float64).T


def bf16_bound(w, x):
    """Return by how much bfloat16 inputs, scales and offsets, weights and outputs may change a product."""
    parts = groups(w.base)
    spreads = [spread(p, w.base.shape, (1, parts.size)).abs() for p in (parts.scale, parts.offset) if p is not None]
    sizes = parts.codes.double().abs() * spreads[0] + sum(spreads[1:])
    ax = (x if w.inputs is None else w.inputs.round(x)).double().abs()
    change = ax @ sizes.T * ((1 + HALF) ** 3 - 1 + 2 * x.shape[1] * SINGLE)
    return change + HALF * (exact(w, x).abs() + change)


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize(
    "fmt", ["int4-g32-sym", "int4-g64-asym", "int4-g128-asym-bf16", "int3-g64-asym", "int4-channel-sym", "hqq3-g64"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_on_a_gpu_errs_by_bfloat16_alone(fmt, count, dtype):
    w, x = weight(fmt, 24, 384), inputs_of(count, 384).to(dtype)
    assert ((product(w, x, "int4").double() - exact(w, x.float())).abs() <= bf16_bound(w, x.float())).all()


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("rounds", ["int8-token", "int8-tensor"])
def test_int4_on_a_gpu_takes_rounded_inputs(rounds, count):
    w, x = weight("int4-g64-asym", 32, 256, QInput(parse_inputs(rounds))), far_from_ties(count, 256)
    assert ((product(w, x, "int4") - exact(w, x)).abs() <= bf16_bound(w, x)).all()


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("fmt", ["int8-channel-sym", "int6-channel-sym-bf16"])
def test_int8_on_a_gpu_errs_by_bfloat16_alone(fmt, count):
    w, x = weight(fmt, 48, 256), inputs_of(count, 256)
    assert ((product(w, x, "int8") - exact(w, x)).abs() <= bf16_bound(w, x)).all()


@pytest.mark.parametrize("count", [*TOKENS, 16, 17, 32])
def test_integers_are_multiplied_exactly_on_a_gpu(count):
    rng = torch.Generator().manual_seed(4)
    codes, x = (torch.randint(-128, 128, (n, 264), generator=rng).to(torch.int8) for n in (40, count))
    found = w8a8.Plain(codes.to("cuda")).product(x.to("cuda"))
    assert torch.equal(found.cpu(), (x.double() @ codes.double().T).float())


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("rounds", ["int8-token", "int8-tensor", "int8-tensor-static"])
@pytest.mark.parametrize("fmt", ["int8-channel-sym", "int8-tensor-sym", "int4-channel-sym"])
def test_w8a8_on_a_gpu_is_the_integer_product(fmt, rounds, count):
    x = far_from_ties(count, 264)
    x = x / x[:, :1] if "tensor" in rounds else x  # one scale for all tokens
    inputs = QInput(parse_inputs(rounds))
    if inputs.inputs.static:
        inputs = settle(inputs.inputs, x.amin(0), x.amax(0), torch.float32)
    w = weight(fmt, 40, 264, inputs)
    sums = w.inputs.round(x).double().abs() @ w.dequantize(torch.float64).abs().T
    assert ((product(w, x, "w8a8") - exact(w, x)).abs() <= 16 * SINGLE * sums).all()


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_llm_int8_on_a_gpu_keeps_wide_channels_in_float(dynamic, count):
    x = far_from_ties(count, 264, steps=127)
    x *= 5 / x[:, :1]
    x[:, 3], x[0, 50] = 40.0, -50.0
    inputs = Inputs(parse_inputs("narrow8-token").format, threshold=6.0, dynamic=dynamic)
    rounds = QInput(inputs) if dynamic else settle(inputs, x.amin(0), x.amax(0), torch.float32)
    w = weight("llm-int8", 40, 264, rounds)
    if not dynamic:
        assert rounds.spared.tolist() == [3, 50]
        w = QWeight(w.base, {}, (Columns(rounds.spared, torch.randn(40, 2)),), rounds)
    sums = w.inputs.round(x).double().abs() @ w.dequantize(torch.float64).abs().T
    assert ((product(w, x, "w8a8", "llm.int8") - exact(w, x)).abs() <= 100 * SINGLE * sums).all()


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("rounds", ["e4m3-token", "e4m3-tensor", "e4m3-tensor-static"])
@pytest.mark.parametrize("fmt", ["e4m3-channel", "e4m3-tensor"])
def test_fp8_on_a_gpu_is_the_product_of_the_rounded_numbers(fmt, rounds, count):
    rng = torch.Generator().manual_seed(5)
    values = (50 * torch.randn(count, 256, generator=rng)).to(torch.float8_e4m3fn).float()
    x = values * (0.98 + 0.04 * torch.rand(count, 256, generator=rng))  # far from the middle of two values
    x[:, 0] = 448
    x = x * torch.randn(count, 1, generator=rng).exp() if rounds == "e4m3-token" else x
    inputs = QInput(parse_inputs(rounds))
    if inputs.inputs.static:
        inputs = settle(inputs.inputs, x.amin(0), x.amax(0), torch.float32)
    w = weight(fmt, 48, 256, inputs)
    sums = w.inputs.round(x).double().abs() @ w.dequantize(torch.float64).abs().T
    # outputs are bfloat16, and tensor cores add products of 8 bits up with fewer digits than float32 has
    bound = HALF * exact(w, x).abs() + 2.0**-11 * sums
    assert ((product(w, x, "fp8") - exact(w, x)).abs() <= bound).all()


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("kinds", [["low rank"], ["CSR"], ["columns"], ["CSR", "columns", "low rank"]])
def test_residuals_are_put_on_on_a_gpu(kinds, count):
    rng = torch.Generator().manual_seed(6)
    w, x, dense = weight("int4-g32-asym", 32, 256), inputs_of(count, 256), torch.randn(32, 256, generator=rng)
    made = {
        "low rank": LowRank(torch.randn(32, 3, generator=rng), torch.randn(3, 256, generator=rng)),
        "CSR": sparse(torch.rand(32, 256, generator=rng) < 0.05, dense, torch.float16),
        "columns": Columns(torch.tensor([3, 50], dtype=torch.int32), dense[:, :2].clone()),
    }
    w = QWeight(w.base, {}, tuple(made[kind] for kind in kinds))
    beside = sum(part.onto(torch.zeros(32, 256)).double().abs() for part in w.residuals)
    # float32 sums, and what a part replaces, which the codes' product has and the part takes off again
    bound = 2 * bf16_bound(QWeight(w.base, {}), x) + 1e-3 * x.double().abs() @ beside.T + HALF * exact(w, x).abs()
    y = product(w, x, "int4", " + ".join(["int4", *kinds]))
    assert ((y - exact(w, x)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("needs", "how", "most"),
    [
        ("int4", {"weights": "int4-g32-asym"}, 0.02),
        ("int8", {"weights": "int8-channel-sym"}, 0.02),
        ("w8a8", {"weights": "int8-channel-sym", "inputs": "int8-token"}, 0.02),
        ("fp8", {"weights": "e4m3-channel", "inputs": "e4m3-token"}, 0.12),
    ],
)
def test_a_packed_model_on_a_gpu_has_the_logits_of_the_dequantized_one(tmp_path, needs, how, most):
    if not NEEDS[needs]("cuda"):
        pytest.skip(f"torch has no {needs} product for this GPU")
    model = tiny.make("llama", hidden_size=128, head_dim=32, intermediate_size=256, dtype=torch.bfloat16)
    quantforge.quantize(model, "rtn", out=tmp_path / "q", calibration=IDS, **how)
    found = load.read(tmp_path / "q", torch.float32, strict=True, device="cuda")
    assert {name for name, _ in found.operators.values()} == {needs}
    wanted = logits(quantforge.load(tmp_path / "q", torch.float32, packed=False, device="cuda"))
    assert (logits(found.model) - wanted).norm() <= most * wanted.norm()
