"""Divergences against their definitions in float64, and the laws of the bound."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantforge.errors import DataError
from quantforge.evaluation import divergence
from quantforge.evaluation.divergence import (
    Gap,
    TokenDivergence,
    chunk_tokens,
    dense_divergence,
    gap,
    joined,
    joined_top_k,
    summarize,
    top_k,
    top_k_divergence,
)
from quantforge.evaluation.perplexity import evaluate, make_reference
from quantforge.models import tiny

SEEDS = st.integers(0, 2**32 - 1)
TOKENS = 12


def draw(vocab: int, seed: int, scale: float = 3.0, noise: float = 0.5, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Return logits [tokens, vocab] of a float model and of one that is off by some noise."""
    rng = torch.Generator().manual_seed(seed)
    theirs = scale * torch.randn(tokens, vocab, generator=rng)
    return theirs, theirs + noise * torch.randn(tokens, vocab, generator=rng)


def targets(vocab: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1))


def dense(theirs: Tensor, ours: Tensor, chunk: int | None = None) -> Tensor:
    return dense_divergence(ours, theirs.__getitem__, targets(theirs.shape[1], len(theirs)), chunk).kl


def bound(theirs: Tensor, ours: Tensor, k: int, chunk: int | None = None) -> Tensor:
    return top_k_divergence(ours, top_k(theirs, k, chunk), targets(theirs.shape[1], len(theirs)), chunk).kl


def rounding(kl: Tensor) -> Tensor:
    return 2e-6 * (1 + kl)


def by_hand(theirs: Tensor, ours: Tensor, k: int) -> list[float]:
    """Return for each token Σ p log(p / q) over the k most probable tokens and the rest, with Python's floats."""
    found = []
    for a, b in zip(theirs.double().tolist(), ours.double().tolist(), strict=True):
        p, q = ([math.exp(x - max(row)) for x in row] for row in (a, b))
        p, q = ([x / math.fsum(row) for x in row] for row in (p, q))
        order = sorted(range(len(p)), key=lambda i: -p[i])
        pairs = [(p[i], q[i]) for i in order[:k]]
        if k < len(p):
            pairs.append((math.fsum(p[i] for i in order[k:]), math.fsum(q[i] for i in order[k:])))
        found.append(math.fsum(x * math.log(x / y) for x, y in pairs))
    return found


@given(SEEDS, st.integers(2, 200), st.floats(0.1, 5), st.floats(0.001, 3))
def test_dense_divergence_is_its_definition(seed, vocab, scale, noise):
    theirs, ours = draw(vocab, seed, scale, noise)
    assert dense(theirs, ours).tolist() == pytest.approx(by_hand(theirs, ours, vocab), rel=1e-5, abs=2e-6)


@given(SEEDS, st.integers(2, 200), st.floats(0.1, 5), st.floats(0.001, 3), st.data())
def test_the_bound_is_the_divergence_of_k_tokens_and_the_rest(seed, vocab, scale, noise, data):
    k = data.draw(st.integers(1, vocab))
    theirs, ours = draw(vocab, seed, scale, noise)
    assert bound(theirs, ours, k).tolist() == pytest.approx(by_hand(theirs, ours, k), rel=1e-5, abs=2e-6)


@given(SEEDS, st.integers(2, 200), st.floats(0.1, 8), st.floats(0.0001, 5), st.data())
def test_the_bound_lies_between_0_and_dense_and_rises_with_k(seed, vocab, scale, noise, data):
    ks = sorted(data.draw(st.sets(st.integers(1, vocab), min_size=1, max_size=5)))
    theirs, ours = draw(vocab, seed, scale, noise)
    steps = [bound(theirs, ours, k) for k in ks] + [dense(theirs, ours)]
    assert (steps[0] >= 0).all()
    for low, high in pairwise(steps):
        assert (low <= high + rounding(high)).all()


@given(SEEDS, st.integers(2, 200), st.floats(0.1, 8), st.floats(0, 5))
def test_the_bound_is_dense_where_every_token_is_kept(seed, vocab, scale, noise):
    theirs, ours = draw(vocab, seed, scale, noise)
    torch.testing.assert_close(bound(theirs, ours, vocab), dense(theirs, ours), rtol=1e-6, atol=1e-5)
    assert torch.equal(bound(theirs, ours, 10 * vocab), bound(theirs, ours, vocab))


@given(SEEDS, st.integers(2, 100), st.integers(1, 100), st.floats(-30, 30), st.floats(-30, 30))
def test_a_shift_of_all_logits_of_a_token_changes_nothing(seed, vocab, k, a, b):
    theirs, ours = (logits.double() for logits in draw(vocab, seed))
    moved = (theirs + a).float(), (ours + b).float()
    torch.testing.assert_close(bound(*moved, k), bound(theirs.float(), ours.float(), k), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(dense(*moved), dense(theirs.float(), ours.float()), rtol=1e-4, atol=2e-5)


@given(SEEDS, st.integers(2, 100), st.integers(1, 100), st.integers(1, TOKENS + 3))
def test_the_size_of_chunks_changes_nothing(seed, vocab, k, chunk):
    theirs, ours = draw(vocab, seed)
    torch.testing.assert_close(dense(theirs, ours, chunk), dense(theirs, ours), rtol=0, atol=1e-6)
    torch.testing.assert_close(bound(theirs, ours, k, chunk), bound(theirs, ours, k), rtol=0, atol=1e-6)
    whole, parts = top_k(theirs, k), top_k(theirs, k, chunk)
    assert torch.equal(whole.ids, parts.ids)
    assert torch.equal(whole.top, parts.top)


@given(SEEDS, st.integers(2, 300), st.floats(0, 20), st.integers(1, 300))
def test_a_model_does_not_diverge_from_itself_not_even_by_rounding(seed, vocab, scale, k):
    theirs, _ = draw(vocab, seed, scale)
    theirs = theirs.round()  # so that there are ties
    next_tokens = targets(vocab)
    for found in (
        dense_divergence(theirs, theirs.__getitem__, next_tokens),
        top_k_divergence(theirs, top_k(theirs, k), next_tokens),
    ):
        assert not found.kl.any()
        assert found.agree.all()
        assert torch.equal(found.float_right, found.right)


def test_a_rest_too_small_for_1_minus_the_sum_is_still_compared():
    theirs = torch.tensor([[30.0, 1.0, 0.0, -5.0]])
    assert float(top_k(theirs, 1).log_probs[0, 1]) == pytest.approx(math.log(math.e + 1 + math.exp(-5)) - 30, rel=1e-6)
    far = torch.tensor([[0.0, 30.0, 30.0, 30.0]])
    assert bound(far, theirs, 3).tolist() == pytest.approx(by_hand(far, theirs, 3), rel=1e-6)


def test_tokens_that_neither_model_allows_add_nothing_and_one_that_only_the_float_model_allows_is_infinite():
    theirs, ours = draw(20, 0)
    theirs[:, 15:] = ours[:, 15:] = -math.inf
    expected = pytest.approx(by_hand(theirs[:, :15], ours[:, :15], 15), rel=1e-5, abs=2e-6)
    assert dense(theirs, ours).tolist() == expected
    assert bound(theirs, ours, 15).tolist() == expected
    assert bound(theirs, ours, 17).tolist() == expected
    best = int(theirs[3].argmax())
    ours[3, best] = -math.inf
    for kl in (dense(theirs, ours), bound(theirs, ours, 4)):
        assert kl[3] == math.inf
        assert kl.isfinite().sum() == TOKENS - 1


def test_logits_that_are_nan_make_their_token_and_the_summary_nan():
    theirs, ours = draw(20, 0)
    ours[5, 2] = math.nan
    for kl in (dense(theirs, ours), bound(theirs, ours, 4)):
        assert kl.isnan().tolist() == [i == 5 for i in range(TOKENS)]
    found = summarize(top_k_divergence(ours, top_k(theirs), targets(20)))
    assert all(math.isnan(value) for value in (found.mean, found.median, found.p99))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_float_model_that_overflowed_is_no_reference(value):
    theirs, _ = draw(20, 0)
    theirs[7, 3] = value
    with pytest.raises(DataError, match="not finite at prediction 7 of 12"):
        top_k(theirs, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_compared_in_float32(dtype):
    theirs, ours = (logits.to(dtype) for logits in draw(50, 0))
    exact = by_hand(theirs, ours, 50)
    assert dense(theirs, ours).tolist() == pytest.approx(exact, rel=1e-5, abs=2e-6)
    assert bound(theirs, ours, 50).tolist() == pytest.approx(exact, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize(("vocab", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_ids_take_two_bytes_where_they_fit_and_48_windows_less_than_30_megabytes(vocab, dtype):
    theirs = torch.zeros(2, vocab)
    theirs[0, -1], theirs[1, 40_000] = 9.0, 9.0
    kept = top_k(theirs)
    assert kept.ids.dtype == kept.top.dtype == dtype
    assert kept.ids[:, 0].tolist() == kept.top.tolist() == [vocab - 1, 40_000]
    size = sum(tensor.nbytes for tensor in (kept.ids, kept.log_probs, kept.top)) / 2
    assert size * 48 * 512 < 30e6


class Largest(TorchDispatchMode):
    """Keep the size of the largest tensor that an operation gives, in bytes; views count as what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_no_tensor_is_larger_than_the_float32_logits_of_a_chunk(chunk, dtype):
    theirs, ours = (logits.to(dtype) for logits in draw(4000, 0, tokens=28))
    after = targets(4000, 28)
    with Largest() as seen:
        kept = top_k(theirs, 16, chunk)
    assert seen.bytes == chunk * 4000 * 4
    for compare in (
        lambda: top_k_divergence(ours, kept, after, chunk),
        lambda: dense_divergence(ours, theirs.__getitem__, after, chunk),
    ):
        with Largest() as seen:
            compare()
        assert seen.bytes == chunk * 4000 * 4


@given(st.integers(1, 2**21))
def test_a_chunk_is_the_most_tokens_that_fit_into_16_mebibytes(vocab):
    chunk = chunk_tokens(vocab)
    assert chunk * vocab * 4 <= 2**24 < (chunk + 1) * vocab * 4


def test_chunks_are_used_if_none_is_given(monkeypatch):
    monkeypatch.setattr(divergence, "_BYTES", 3 * 4 * 50)
    theirs, ours = draw(50, 0)
    asked = []
    dense_divergence(ours, lambda rows: asked.append(rows) or theirs[rows], targets(50))
    assert asked == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)]


def test_agreement_and_flips_are_counted_against_the_next_token():
    theirs, ours = torch.eye(4)[[0, 1, 2, 3, 0]], torch.eye(4)[[0, 2, 1, 3, 1]]
    after = torch.tensor([0, 1, 1, 2, 2])  # right by both; by float only; by the other only; by neither, twice
    for found in (
        dense_divergence(ours, theirs.__getitem__, after),
        top_k_divergence(ours, top_k(theirs, 2), after),
    ):
        assert found.agree.tolist() == [True, False, False, True, False]
        assert found.float_right.tolist() == [True, True, False, False, False]
        assert found.right.tolist() == [True, False, True, False, False]
        summary = summarize(found)
        assert (summary.tokens, summary.agreement, summary.lost, summary.gained) == (5, 0.4, 1, 1)


def tokens_with(kl: list[float]) -> TokenDivergence:
    no = torch.zeros(len(kl), dtype=torch.bool)
    return TokenDivergence(torch.tensor(kl, dtype=torch.float64), no, no, no)


def test_the_summary_of_the_divergence_is_mean_median_and_99th_percentile():
    found = summarize(tokens_with([float(i) for i in range(200, 0, -1)]))
    assert (found.mean, found.median, found.p99) == (100.5, 100.5, 198)
    assert summarize(tokens_with([3.0])) == divergence.Divergence(1, 3, 3, 3, 0, 0, 0)
    rare = summarize(tokens_with([1.0] * 200 + [math.inf]))
    assert (rare.mean, rare.median, rare.p99) == (math.inf, 1, 1)


def test_the_gap_is_what_the_bound_misses():
    assert gap(tokens_with([1.0, 3.0]), tokens_with([1.0, 2.0])) == Gap(2, 1.5)
    assert (Gap(2, 1.5).value, Gap(2, 1.5).share, Gap(0, 0).share) == (0.5, 0.25, 0)
    with pytest.raises(DataError, match="not of 1 and 2"):
        gap(tokens_with([1.0]), tokens_with([1.0, 2.0]))


def test_a_cached_reference_bounds_what_the_pass_over_windows_measures():
    model, ids = tiny.make("llama"), torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    changed = tiny.make("llama")
    for parameter in changed.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    reference, _ = make_reference(model, ids)
    kls = evaluate(changed, ids, reference).kls
    with torch.no_grad():
        theirs, ours = (m(ids, use_cache=False).logits[:, :-1] for m in (model, changed))
    exact = [
        dense_divergence(ours[i], lambda rows, i=i: reference.dense.logits(reference.dense.hidden[i][rows]), ids[i, 1:])
        for i in range(3)
    ]
    assert [float(found.kl.mean()) for found in exact] == pytest.approx(kls, rel=1e-4)
    kept = joined_top_k([top_k(window, 16) for window in theirs])
    cached = [top_k_divergence(ours[i], kept.rows(slice(39 * i, 39 * i + 39)), ids[i, 1:]) for i in range(3)]
    found = gap(joined(exact), joined(cached))
    assert 0 < found.value < found.dense
    for one, other in zip(exact, cached, strict=True):
        assert torch.equal(one.agree, other.agree)
        assert torch.equal(one.float_right, other.float_right)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a, kept: dense_divergence(a, a[:, :-1].__getitem__, targets(20)),
            r"\[12, 20\] do not go .* \[12, 19\]",
        ),
        (lambda a, kept: top_k_divergence(a[:, :-1], kept, targets(20)), r"\[12, 19\] do not go .* \[12, 20\]"),
        (lambda a, kept: top_k_divergence(a[:5], kept, targets(20, 5)), r"\[5, 20\] do not go .* \[12, 20\]"),
        (lambda a, kept: top_k_divergence(a, kept, targets(20, 5)), r"\[5\] next tokens do not go .* 12 tokens"),
        (lambda a, kept: top_k(a, 0), "at least 1 token of each position, not 0"),
        (lambda a, kept: dense_divergence(a[:0], a.__getitem__, targets(20, 0)), "no token to compare"),
        (lambda a, kept: joined([]), "no token to compare"),
        (lambda a, kept: joined_top_k([]), "no token to keep"),
    ],
)
def test_what_does_not_belong_together_is_refused(call, message):
    theirs, _ = draw(20, 0)
    with pytest.raises(DataError, match=message):
        call(theirs, top_k(theirs, 4))
