"""The same code on a GPU: run by `pytest -m gpu` where there is one."""

import pytest
import torch

import quantforge
from quantforge import checkpoint, pipeline, recipe
from quantforge import plan as planning
from quantforge.models import tiny
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
    loaded = quantforge.load(tmp_path / "trained", torch.float32).to("cuda")
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
