"""The same code on a GPU: run by `pytest -m gpu` where there is one."""

import pytest
import torch

from quantforge import pipeline, recipe
from quantforge import plan as planning
from quantforge.models import tiny

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
