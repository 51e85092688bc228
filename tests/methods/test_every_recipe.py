"""Laws that hold for every bundled recipe on a whole tiny model, from memory to the disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantforge
from quantforge import recipe
from quantforge.models import load as loading
from quantforge.models import tiny
from quantforge.result import Result

TRAINED = Path(__file__).parents[1] / "data" / "tiny-llama"
JOINED = ["awq+gptq", "gptq+lorc", "spqr+lorc", "awq+nf4"]


def tokens(windows: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (windows, 24), generator=torch.Generator().manual_seed(seed))


def original(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    return tiny.make("llama", dtype=dtype, vocab_size=259)


def made(method: str, out: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> Result:
    """Quantize a tiny model by `method`, in groups that divide its widths of 64 and 96."""
    group = 32 if recipe.load(method).weights.block == (1, 64) else None
    tokenizer = loading.read_tokenizer(TRAINED)
    return quantforge.quantize(
        original(dtype), method, group_size=group, calibration=tokens(), tokenizer=tokenizer, out=out
    )


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens(4, 1)).logits


@pytest.fixture(scope="module", params=[*recipe.names(), *JOINED])
def saved(request, tmp_path_factory) -> tuple[str, Result, Path]:
    """Return a method, what it makes of the model, and the checkpoint of that."""
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    return request.param, made(request.param, folder), folder


def test_the_checkpoint_computes_what_the_model_in_memory_does(saved):
    _, result, folder = saved
    loaded = quantforge.load(folder, packed=False)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not torch.equal(logits(loaded), logits(original()))
    assert torch.equal(logits(loaded), logits(result.model))


@pytest.mark.parametrize("method", ["lorc", *JOINED])
def test_and_in_float32(method, tmp_path):
    result = made(method, tmp_path / "checkpoint", torch.float32)
    loaded = quantforge.load(tmp_path / "checkpoint", packed=False)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(result.model))


def test_bits_per_weight_counts_what_every_layer_stores(saved):
    _, result, _ = saved
    assert len(result.layers) == 14
    weights = sum(layer.weight.base.codes.numel() for layer in result.layers)
    assert weights == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert result.bits_per_weight == sum(layer.weight.nbits for layer in result.layers) / weights
    assert 3 < result.bits_per_weight < 16


def test_the_same_call_again_gives_the_same_weights(saved):
    method, first, _ = saved
    second = made(method)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.name == b.name
        assert torch.equal(a.weight.base.codes, b.weight.base.codes), a.name
        assert torch.equal(a.weight.dequantize(), b.weight.dequantize()), a.name
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


def test_the_checkpoint_is_evaluated_on_token_ids(saved):
    _, result, folder = saved
    found = quantforge.evaluate(folder, data=tokens(4, 1))
    assert found.data == {"name": "token ids", "seq_len": 24, "count": 4}
    in_float32 = quantforge.load(folder, torch.float32, packed=False)
    assert found.perplexity == quantforge.evaluate(in_float32, data=tokens(4, 1)).perplexity
    assert found.perplexity == pytest.approx(quantforge.evaluate(result.model, data=tokens(4, 1)).perplexity, rel=0.02)


def test_a_checkpoint_without_a_tokenizer_is_evaluated_on_token_ids_too(tmp_path):
    quantforge.quantize(original(), "rtn", group_size=32, out=tmp_path / "checkpoint")
    quantforge.evaluate(tmp_path / "checkpoint", data=tokens(4, 1))
