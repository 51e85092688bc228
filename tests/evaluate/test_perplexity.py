"""Perplexity and divergence against what the definitions give by hand in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantforge import api
from quantforge.errors import DataError, QuantForgeError
from quantforge.evaluation.perplexity import Score, evaluate, make_reference
from quantforge.models import tiny


def tokens(windows: int = 3, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(seed))


class Table(nn.Module):
    """A model whose logits [vocab] depend on the last token only: row `token` of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def changed(kind: str, **changes: float) -> nn.Module:
    """Return a tiny model whose weights are slightly off."""
    model = tiny.make(kind, **changes)
    rng = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=rng)
    return model


def other(kind: str, seed: int = 0, **changes: float) -> nn.Module:
    """Return a random model of an architecture that `tiny` lacks."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes, **heads, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("vocab", [2, 100, 1024])
@pytest.mark.parametrize("value", [0.0, -3.5, 40.0])
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(vocab, value):
    ids = torch.arange(200).reshape(2, 100) % vocab
    assert evaluate(Table(torch.full((vocab, vocab), value)), ids).perplexity == pytest.approx(vocab, rel=1e-6)


def test_a_model_that_is_right_has_perplexity_one_and_one_that_is_wrong_has_infinity():
    step = torch.roll(torch.eye(8), 1, 1) * 1e4
    ids = torch.arange(16)[None] % 8
    assert evaluate(Table(step), ids).perplexity == 1
    assert evaluate(Table(-step), ids).perplexity == math.inf


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "gpt2"])
def test_perplexity_is_that_of_the_tokens_one_by_one_in_float64(kind):
    model, ids = tiny.make(kind), tokens(2, 12)
    total, count = 0.0, 0
    with torch.no_grad():
        for window in ids:
            for end in range(1, len(window)):
                logits = model(window[None, :end], use_cache=False).logits[0, -1].double()
                total -= float(logits.log_softmax(-1)[window[end]])
                count += 1
    assert count == 22
    assert evaluate(model, ids).perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("length", [2, 128, 129, 130, 257, 300])
def test_windows_longer_than_a_chunk_lose_no_token(length):
    table = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    ids = tokens(2, length)
    losses = -table.double().log_softmax(-1)[ids[:, :-1], ids[:, 1:]].mean(1)
    score = evaluate(Table(table), ids)
    torch.testing.assert_close(torch.tensor(score.losses, dtype=torch.float64), losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_windows_do_not_depend_on_each_other_or_on_their_number(kind):
    model, ids = tiny.make(kind), tokens(4)
    together = evaluate(model, ids)
    assert together.losses == tuple(evaluate(model, window[None]).losses[0] for window in ids)
    assert evaluate(model, ids.flip(0)).losses == together.losses[::-1]
    assert evaluate(model, ids.flip(0)).perplexity == together.perplexity
    with torch.no_grad():
        batch = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    dense = -batch.gather(-1, ids[:, 1:, None]).mean()
    assert together.perplexity == pytest.approx(math.exp(dense), rel=1e-5)


@pytest.mark.parametrize("kind", tiny.names())
def test_a_model_does_not_diverge_from_itself(kind):
    model, ids = tiny.make(kind), tokens()
    reference, score = make_reference(model, ids)
    again = evaluate(model, ids, reference)
    assert again.losses == score.losses
    assert again.kl == pytest.approx(0, abs=1e-9)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0


@pytest.mark.parametrize("kind", tiny.names())
def test_divergence_is_that_of_dense_logits_in_float64(kind):
    model, other, ids = tiny.make(kind), changed(kind), tokens()
    reference, _ = make_reference(model, ids)
    with torch.no_grad():
        p, q = (m(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    dense = (p.exp() * (p - q)).sum(-1).mean(1)
    score = evaluate(other, ids, reference)
    assert dense.min() > 1e-3
    torch.testing.assert_close(torch.tensor(score.kls, dtype=torch.float64), dense, rtol=1e-4, atol=1e-7)
    assert score.kl == pytest.approx(float(dense.mean()), rel=1e-4)


def test_soft_capping_is_part_of_the_reference():
    model, ids = tiny.make("gemma2", final_logit_softcapping=2.0), tokens()
    reference, _ = make_reference(model, ids)
    with torch.no_grad():
        logits = model(ids[:1], use_cache=False).logits[0, :-1]
        assert torch.equal(reference.dense.logits(reference.dense.hidden[0]), logits)
        assert not torch.allclose(model.get_output_embeddings()(reference.dense.hidden[0]), logits, atol=0.1)
    assert evaluate(changed("gemma2", final_logit_softcapping=2.0), ids, reference).kl > 1e-4


def test_what_the_config_does_not_tell_about_the_head_costs_the_gap_and_nothing_else():
    ids = tokens()
    model = other("hyperclovax", logits_scaling=8.0)  # a factor here
    reference, score = make_reference(model, ids)
    assert reference.dense is None
    assert score == evaluate(model, ids)
    again = evaluate(other("hyperclovax", seed=1, logits_scaling=8.0), ids, reference)
    assert again.gap is None
    assert again.kl > 1e-3
    model = tiny.make("llama")
    model.lm_head.forward = lambda x: x @ model.lm_head.weight.T  # hooks see this, and nothing else is changed
    assert make_reference(model, ids)[0].dense is not None
    model.get_output_embeddings = lambda: None
    reference, score = make_reference(model, ids)
    assert reference.dense is None
    assert score.losses == evaluate(model, ids, reference).losses


def test_the_gap_is_that_between_the_dense_divergence_and_the_bound_of_the_first_windows():
    model, ids = tiny.make("llama"), tokens(6)
    reference, _ = make_reference(model, ids, k=8)
    worse = changed("llama")
    score = evaluate(worse, ids, reference)
    whole = evaluate(worse, ids, make_reference(model, ids)[0])
    assert score.gap.bound == pytest.approx(math.fsum(score.kls[:4]) / 4)
    assert score.gap.dense == pytest.approx(math.fsum(whole.kls[:4]) / 4, rel=1e-4)
    assert 0 < score.gap.bound < score.gap.dense
    assert score.divergence.tokens == 6 * 39
    assert score.divergence.mean == pytest.approx(score.kl)


def test_a_reference_of_other_windows_is_refused():
    model = tiny.make("llama")
    reference, _ = make_reference(model, tokens(2))
    for ids in (tokens(3), tokens(2, 39)):
        with pytest.raises(DataError, match="the reference is of 2 windows"):
            evaluate(model, ids, reference)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("granite", {"logits_scaling": 0.25}),
        ("cohere", {"logit_scale": 0.0625}),
        ("cohere", {"logit_scale": 4.0}),
        ("cohere2", {"logit_scale": 0.5}),
    ],
)
def test_a_scale_of_the_logits_is_part_of_the_reference(kind, scale):
    model, ids = other(kind, **scale), tokens()
    reference, score = make_reference(model, ids)
    assert reference.dense is not None
    assert score == evaluate(model, ids)
    again = evaluate(model, ids, reference)
    assert again.losses == score.losses
    assert again.kl == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        logits = model(ids[:1], use_cache=False).logits[0, :-1]
        assert torch.equal(reference.dense.logits(reference.dense.hidden[0]), logits)
        assert not torch.allclose(model.get_output_embeddings()(reference.dense.hidden[0]), logits, rtol=0.1)
    assert evaluate(other(kind, seed=1, **scale), ids, reference).kl > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_model_in_half_precision_has_a_reference_too(kind, dtype):
    model, ids = tiny.make(kind, dtype=dtype), tokens()
    reference, _ = make_reference(model, ids)
    assert reference.dense is not None
    assert evaluate(model, ids, reference).kl == pytest.approx(0, abs=1e-3)


def test_a_reference_stays_what_it_was_when_the_model_is_quantized_in_place():
    model, ids = tiny.make("llama"), tokens()
    reference, before = make_reference(model, ids)
    api.quantize(model, "rtn", bits=3, group_size=32)
    fresh, _ = make_reference(tiny.make("llama"), ids)
    score = evaluate(model, ids, reference)
    assert score == evaluate(model, ids, fresh)
    assert score.kl > 1e-3
    assert score.losses != before.losses


def test_progress_gets_the_loss_of_each_window():
    told: list[float] = []
    score = evaluate(tiny.make("llama"), tokens(), progress=told.append)
    assert tuple(told) == score.losses
    assert len(told) == 3


def test_without_a_reference_there_is_no_divergence():
    assert math.isnan(evaluate(tiny.make("llama"), tokens(1)).kl)
    assert Score((1.0, 3.0)).perplexity == pytest.approx(math.exp(2))
    assert Score((1.0,), (0.25, 0.75)).kl == 0.5


@pytest.mark.parametrize("shape", [(0, 12), (3, 1), (3, 0)])
def test_too_few_tokens_are_refused(shape):
    with pytest.raises(DataError) as caught:
        evaluate(tiny.make("llama"), torch.zeros(shape, dtype=torch.int64))
    assert str(shape[0]) in str(caught.value)


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(3, 8), torch.zeros(8, dtype=torch.int64), torch.zeros(0, 8, dtype=torch.int64)],
    ids=["floats", "one window without its axis", "no window"],
)
def test_token_ids_of_the_wrong_kind_are_refused(ids):
    with pytest.raises(QuantForgeError):
        api.evaluate(tiny.make("llama"), data=ids)


def test_evaluating_leaves_the_grad_mode_and_the_model_alone():
    model = tiny.make("llama")
    evaluate(model, tokens(1))
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
