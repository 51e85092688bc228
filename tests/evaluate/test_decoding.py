"""Perplexity token by token: that of ordinary evaluation with a float cache, and of what a quantized cache holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quantforge.errors import DataError, ModelError
from quantforge.evaluation.decoding import evaluate_decoding
from quantforge.evaluation.perplexity import evaluate
from quantforge.models import tiny
from quantforge.models.kvcache import KVCache, parse_kv


def tokens(windows: int = 3, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(seed))


def through(model: nn.Module, ids: Tensor, text: str):
    """Return the score of decoding through a cache of format `text`, and the bytes per token."""
    return evaluate_decoding(model, ids, lambda: KVCache(parse_kv(text), model.config))


@pytest.mark.parametrize("kind", [*tiny.names(), "mixtral"])
@pytest.mark.parametrize("settled", [False, True])
def test_a_float_cache_gives_the_ordinary_perplexity(kind, settled):
    """With the config the cache of transformers drops what a sliding window does not see."""
    model, ids = tiny.make(kind), tokens()
    score, _ = evaluate_decoding(model, ids, lambda: DynamicCache(config=model.config) if settled else DynamicCache())
    ordinary = evaluate(model, ids)
    assert score.losses == pytest.approx(ordinary.losses, rel=1e-4)
    assert score.perplexity == pytest.approx(ordinary.perplexity, rel=1e-4)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_that_holds_for_any_number_of_key_heads(heads):
    model, ids = tiny.make("llama", num_key_value_heads=heads), tokens()
    score, held = evaluate_decoding(model, ids, DynamicCache)
    assert score.losses == pytest.approx(evaluate(model, ids).losses, rel=1e-4)
    assert held == 2 * 2 * heads * 16 * 4  # keys and values of two layers in float32


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_window_that_holds_everything_changes_nothing_and_fewer_bits_change_more(kind):
    model, ids = tiny.make(kind), tokens()
    exact, _ = evaluate_decoding(model, ids, DynamicCache)
    assert through(model, ids, "int2-kivi-g8-w64")[0].losses == exact.losses
    errors = []
    for bits in (8, 4, 2):
        score, _ = through(model, ids, f"int{bits}-token-asym")
        errors.append(max(abs(a - b) for a, b in zip(score.losses, exact.losses, strict=True)))
    assert 0 < errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.005 * min(exact.losses)


def test_without_a_window_it_is_the_loss_of_one_call_through_the_cache():
    model, ids = tiny.make("llama", dtype=torch.float64), tokens()
    cache = KVCache(parse_kv("int4-token-g8"), model.config)
    with torch.no_grad():
        logits = model(ids[:, :-1], past_key_values=cache, use_cache=True).logits.log_softmax(-1)
    losses = -logits.gather(-1, ids[:, 1:, None])[..., 0].mean(1)
    score, held = through(model, ids, "int4-token-g8")
    assert score.losses == pytest.approx(losses.tolist(), rel=1e-5)
    assert held == cache.nbytes / (3 * 39)


def test_what_the_cache_holds_decides_the_score():
    class Noise(KVCache):
        """A cache whose codes are noise from the 20th token on."""

        def update(self, keys, values, layer_idx, *args, **kwargs):
            if self.get_seq_length(layer_idx) == 20:
                for stream in self.layers[layer_idx].streams:
                    stream.codes.random_(generator=torch.Generator().manual_seed(0))
            return super().update(keys, values, layer_idx, *args, **kwargs)

    model, ids = tiny.make("llama"), tokens()
    honest, _ = through(model, ids, "int8-token")
    noisy, _ = evaluate_decoding(model, ids, lambda: Noise(parse_kv("int8-token"), model.config))
    assert all(abs(a - b) > 1e-3 for a, b in zip(honest.losses, noisy.losses, strict=True))


def test_windows_do_not_depend_on_each_other():
    model, ids = tiny.make("llama", dtype=torch.float64), tokens()
    together, held = through(model, ids, "int4-kivi-g8-w8")
    for i in range(3):
        alone, bytes_alone = through(model, ids[i : i + 1], "int4-kivi-g8-w8")
        assert alone.losses[0] == pytest.approx(together.losses[i], rel=1e-6)
        assert bytes_alone == held


def test_bytes_of_a_token_are_measured_at_the_end():
    """Of 39 tokens 4 are sinks; 8 values and 11 keys stay in the window, the others are stored."""
    _, held = through(tiny.make("llama"), tokens(), "int4-kivi-g8-w8")
    keys = 15 * 16 * 4 + 24 * 8 + 3 * 16 * 4
    values = 12 * 16 * 4 + 27 * 8 + 27 * 2 * 4
    assert held == pytest.approx(2 * 2 * (keys + values) / 39)


def test_progress_is_the_mean_loss_of_each_token():
    model, ids, seen = tiny.make("llama"), tokens(length=12), []
    score, _ = evaluate_decoding(model, ids, DynamicCache, seen.append)
    assert len(seen) == 11
    assert sum(seen) / 11 == pytest.approx(sum(score.losses) / 3, rel=1e-6)


@pytest.mark.parametrize("shape", [(0, 10), (2, 1)])
def test_windows_that_predict_nothing_are_refused(shape):
    with pytest.raises(DataError, match=f"at least one window of two tokens, not {shape[0]} of {shape[1]}"):
        evaluate_decoding(tiny.make("llama"), torch.ones(shape, dtype=torch.long), DynamicCache)


def test_a_model_that_does_not_use_the_cache_is_refused():
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(128, 128))

        def forward(self, input_ids: Tensor, past_key_values: DynamicCache, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table[input_ids])

    with pytest.raises(ModelError, match="Forgetful did not put its keys and values into the cache"):
        evaluate_decoding(Forgetful(), tokens(), DynamicCache)
