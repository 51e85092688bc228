"""MiniLLM's gradient against the reverse KL of all texts that a vocabulary of three tokens allows."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantforge.distill.gkd import draw
from quantforge.distill.losses import reverse_kl
from quantforge.distill.minillm import (
    PolicyLoss,
    Sampled,
    future_returns,
    importance,
    mixed_log_probs,
    policy_loss,
    token_log_probs,
)
from quantforge.errors import DataError, RecipeError

SEEDS = st.integers(0, 2**32 - 1)
VOCAB, LENGTH, END = 3, 3, 0
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(1, VOCAB), repeat=n)]
ROW = {prefix: i for i, prefix in enumerate(PREFIXES)}
TEXTS = [(*p, t) for p in PREFIXES for t in range(VOCAB) if t == END or len(p) == LENGTH - 1]
EXACT = {"normalized": False, "clip": None, "most": None}


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """Return the logits [prefixes, vocab] that a student and a teacher give after each prefix."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(len(PREFIXES), VOCAB, generator=rng, dtype=torch.float64) for _ in range(2))


def text_log_prob(table: Tensor, text: tuple[int, ...]) -> Tensor:
    log = table.log_softmax(-1)
    return torch.stack([log[ROW[text[:i]], token] for i, token in enumerate(text)]).sum()


def enumerated(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(q ‖ p) over all texts; the probabilities are followed by autograd."""
    log_q, log_p = (torch.stack([text_log_prob(table, text) for text in TEXTS]) for table in (student, teacher))
    torch.testing.assert_close(log_q.exp().sum(), torch.ones((), dtype=torch.float64))
    return (log_q.exp() * (log_q - log_p)).sum()


def laid_out(texts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row of the tables for each place, the ids and the mask, all [texts, LENGTH]."""
    rows = [[ROW[text[:i]] if i < len(text) else 0 for i in range(LENGTH)] for text in texts]
    ids = [[text[i] if i < len(text) else END for i in range(LENGTH)] for text in texts]
    mask = [[i < len(text) for i in range(LENGTH)] for text in texts]
    return torch.tensor(rows), torch.tensor(ids), torch.tensor(mask)


def loss_of(
    student: Tensor, teacher: Tensor, texts: list[tuple[int, ...]], alpha: float = 0.0, **options
) -> PolicyLoss:
    """Return the loss of texts drawn from the mixture, with `count` such that sums over tokens are means over texts."""
    rows, ids, mask = laid_out(texts)
    ours, theirs = student[rows], teacher[rows]
    with torch.no_grad():
        log_old = token_log_probs(ours, ids, mask)
        log_drawn = mixed_log_probs(ours, theirs, alpha).gather(-1, ids[..., None])[..., 0].masked_fill(~mask, 0)
    return policy_loss(ours, theirs, Sampled(ids, mask, log_old, log_drawn), count=len(texts), **options)


def expected_gradient(student: Tensor, teacher: Tensor, alpha: float, part: str, **options) -> Tensor:
    """Return the expectation over all texts, drawn from the mixture, of the gradient of one text."""
    drawn_from = mixed_log_probs(student, teacher, alpha).detach()
    total = torch.zeros_like(student)
    for text in TEXTS:
        loss = loss_of(student, teacher, [text], alpha, **options)
        gradient = torch.autograd.grad(getattr(loss, part), student, allow_unused=True)[0]
        total += text_log_prob(drawn_from, text).exp() * gradient
    return total


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([0.0, 0.2, 0.7]))
def test_the_expected_gradient_is_that_of_the_reverse_kl_of_texts(seed, alpha):
    student, teacher = tables(seed)
    student.requires_grad_()
    exact = torch.autograd.grad(enumerated(student, teacher), student)[0]
    found = expected_gradient(student, teacher, alpha, "total", exact=True, **EXACT)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    if alpha == 0:  # all weights are 1 then
        plain = expected_gradient(student, teacher, 0.0, "total", **EXACT)
        torch.testing.assert_close(plain, exact, rtol=1e-9, atol=1e-12)


@settings(max_examples=5)
@given(SEEDS)
def test_both_parts_are_needed_and_the_single_step_is_the_mean_reverse_kl_of_tokens(seed):
    student, teacher = tables(seed)
    student.requires_grad_()
    single = expected_gradient(student, teacher, 0.0, "single", **EXACT)
    weights = torch.tensor([math.exp(text_log_prob(student.detach(), text)) for text in TEXTS], dtype=torch.float64)
    direct = torch.zeros_like(student)
    for text, weight in zip(TEXTS, weights, strict=True):
        rows = [ROW[text[:i]] for i in range(len(text))]
        loss = reverse_kl(student[rows], teacher[rows], count=1)
        direct += weight * torch.autograd.grad(loss, student)[0]
    torch.testing.assert_close(single, direct, rtol=1e-9, atol=1e-12)
    exact = torch.autograd.grad(enumerated(student, teacher), student)[0]
    assert (single - exact).abs().max() > 1e-3


def drawn(table: Tensor, count: int, rng: torch.Generator) -> list[tuple[int, ...]]:
    """Draw texts from log-probabilities [prefixes, vocab], all of them at once."""
    chances = torch.rand(count, LENGTH, generator=rng, dtype=torch.float64)
    texts: list[tuple[int, ...]] = [()] * count
    for i in range(LENGTH):
        going = [j for j, text in enumerate(texts) if END not in text]
        tokens = draw(table[[ROW[texts[j]] for j in going]], chances[going, i]).tolist()
        for j, token in zip(going, tokens, strict=True):
            texts[j] = (*texts[j], token)
    return texts


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_the_sampled_gradient_agrees_with_the_enumerated_one(alpha):
    student, teacher = tables(3)
    student.requires_grad_()
    exact = torch.autograd.grad(enumerated(student, teacher), student)[0]
    rng, gradients = torch.Generator().manual_seed(0), []
    mixture = mixed_log_probs(student, teacher, alpha).detach()
    for _ in range(40):
        loss = loss_of(student, teacher, drawn(mixture, 500, rng), alpha, exact=True, **EXACT)
        gradients.append(torch.autograd.grad(loss.total, student)[0])
    found = torch.stack(gradients)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() <= 4 * error + 1e-12).all()
    assert error.max() < 0.01
    assert exact.abs().max() > 0.05  # far from nothing, so that agreeing says something


@settings(max_examples=5)
@given(SEEDS, st.sampled_from([0.0, 0.2]), st.booleans())
def test_a_student_that_is_its_teacher_has_no_gradient(seed, alpha, normalized):
    student = tables(seed)[0].requires_grad_()
    teacher = student.detach().clone()
    for part in ("single", "long", "total"):
        found = expected_gradient(student, teacher, alpha, part, normalized=normalized)
        assert found.abs().max() < 1e-12


@given(SEEDS, st.floats(0.01, 0.95))
def test_weights_of_single_tokens_are_bounded_by_the_share_of_the_student(seed, alpha):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (20 * torch.randn(4, 8, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    mixture = mixed_log_probs(student, teacher, alpha)
    torch.testing.assert_close(mixture.exp(), alpha * teacher.softmax(-1) + (1 - alpha) * student.softmax(-1))
    everywhere = torch.ones(4, 8, dtype=torch.bool)
    for token in range(5):
        weights = importance(student.log_softmax(-1)[..., token], mixture[..., token], everywhere)
        assert (weights >= 0).all()
        assert weights.max() <= 1 / (1 - alpha) * (1 + 1e-12)


def test_returns_are_what_comes_after_and_as_a_mean_if_normalized():
    ratios = torch.tensor([[9.0, 1.0, 2.0, 4.0, 7.0], [9.0, 9.0, 3.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    assert future_returns(ratios, mask, normalized=False).tolist() == [[0, 6, 4, 0, 0], [0, 0, 0, 0, 0]]
    assert future_returns(ratios, mask).tolist() == [[0, 3, 4, 0, 0], [0, 0, 0, 0, 0]]


def test_exact_weights_are_products_over_all_tokens_so_far():
    mask = torch.tensor([[False, True, True, True]])
    log_q, log_drawn = torch.tensor([[5.0, 2.0, 3.0, 0.5]]).log(), torch.tensor([[1.0, 1.0, 2.0, 1.0]]).log()
    torch.testing.assert_close(importance(log_q, log_drawn, mask), torch.tensor([[0, 2.0, 1.5, 0.5]]))
    torch.testing.assert_close(importance(log_q, log_drawn, mask, exact=True), torch.tensor([[0, 2.0, 3.0, 1.5]]))


def batch(seed: int) -> tuple[Tensor, Tensor, Sampled]:
    """Return logits of a student and a teacher over 3 texts of 4 tokens, and what was sampled of them."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, 4, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(6, (3, 4), generator=rng)
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    log_old = token_log_probs(student, ids, mask)
    log_drawn = mixed_log_probs(student, teacher, 0.2).gather(-1, ids[..., None])[..., 0]
    return student, teacher, Sampled(ids, mask, log_old, log_drawn)


@pytest.mark.parametrize("options", [{}, {"normalized": False, "clip": None}, {"exact": True}])
def test_the_gradient_is_that_of_the_value_and_reaches_the_student_alone(options):
    student, teacher, sampled = batch(0)
    moved = student + 0.1 * torch.randn(student.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: policy_loss(s, teacher, sampled, **options).total, moved.requires_grad_())
    teacher.requires_grad_()
    policy_loss(moved, teacher, sampled, **options).total.backward()
    assert teacher.grad is None


def test_when_the_texts_are_fresh_the_parts_are_weighed_sums():
    student, teacher, sampled = batch(5)
    mask = sampled.mask
    log_p = token_log_probs(teacher, sampled.ids, mask)
    kl = torch.stack(
        [reverse_kl(student[i, j : j + 1], teacher[i, j : j + 1]) for i in range(3) for j in range(4)]
    ).view(3, 4)
    weights = (sampled.log_old - sampled.log_drawn).exp()
    for i, j in itertools.product(range(3), range(4)):
        assert not mask[i, j] or weights[i, j] <= 1.25
    returns = future_returns(log_p - sampled.log_old, mask)
    found = policy_loss(student, teacher, sampled)
    torch.testing.assert_close(found.long, -(weights * returns)[mask].mean())
    torch.testing.assert_close(found.single, (weights * kl)[mask].mean())


def test_with_exact_weights_what_a_first_token_was_drawn_as_does_not_weigh_its_own_step():
    student, teacher, sampled = batch(5)
    first = replace(sampled, mask=torch.tensor([[1, 0, 0, 0]] * 3).bool())
    found = policy_loss(student, teacher, first, exact=True).single
    torch.testing.assert_close(found, reverse_kl(student[:, 0], teacher[:, 0]))


def test_the_clip_ends_what_is_gained_by_moving_further():
    """A token whose gain is positive gets no more gradient once its ratio is above 1.2; its loss still rises below."""
    teacher = torch.zeros(1, 2, 2, dtype=torch.float64)
    teacher[0, 1, 0] = 5.0  # what follows is good, so the first token is to become more probable
    ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    old = torch.zeros(1, 2, 2, dtype=torch.float64)
    log_old = token_log_probs(old, ids)
    sampled = Sampled(ids, mask, log_old, log_old)
    for first, clipped in ((0.3, False), (1.0, True), (-1.0, False)):
        student = old.clone()
        student[0, 0, 0] = first
        student.requires_grad_()
        gradient = torch.autograd.grad(policy_loss(student, teacher, sampled).long, student)[0]
        free = torch.autograd.grad(policy_loss(student, teacher, sampled, clip=None).long, student)[0]
        assert free[0, 0, 0] < 0
        assert torch.equal(gradient, torch.zeros_like(free) if clipped else free)


@pytest.mark.parametrize("value", [math.nan, math.inf, 50.0])
def test_what_the_mask_leaves_out_changes_neither_loss_nor_gradient(value):
    results = []
    for changed in (False, True):
        student, teacher, sampled = batch(2)
        if changed:
            out = ~sampled.mask
            student[out], teacher[out] = value, value
            sampled = replace(
                sampled,
                ids=sampled.ids.masked_fill(out, -100),
                log_old=sampled.log_old.masked_fill(out, value),
                log_drawn=sampled.log_drawn.masked_fill(out, value),
            )
        student.requires_grad_()
        for options in ({}, {"exact": True}):
            loss = policy_loss(student, teacher, sampled, **options)
            results.append((loss.total.detach(), torch.autograd.grad(loss.total, student)[0]))
    assert all(gradient.isfinite().all() for _, gradient in results)
    torch.testing.assert_close(results[:2], results[2:], rtol=0, atol=0)


def test_micro_batches_and_chunks_add_up_to_the_batch():
    student, teacher, sampled = batch(4)
    whole = policy_loss(student, teacher, sampled).total
    torch.testing.assert_close(policy_loss(student, teacher, sampled, chunk=2).total, whole)
    names = ("ids", "mask", "log_old", "log_drawn")
    parts = [
        policy_loss(
            student[i : i + 1],
            teacher[i : i + 1],
            Sampled(*(getattr(sampled, name)[i : i + 1] for name in names)),
            count=int(sampled.mask.sum()),
        ).total
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_token_that_the_teacher_rules_out_counts_only_so_much():
    student, teacher, sampled = batch(1)
    teacher[2, 3, sampled.ids[2, 3]] = -math.inf
    student.requires_grad_()
    loss = policy_loss(student, teacher, sampled)
    assert loss.long.isfinite()
    assert torch.autograd.grad(loss.long, student)[0].isfinite().all()
    assert loss.single == math.inf  # the exact part says what it is


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t, b: mixed_log_probs(s, t, 1), RecipeError, "alpha, .* at least 0 and below 1, not 1"),
        (lambda s, t, b: mixed_log_probs(s, t, -0.1), RecipeError, "not -0.1"),
        (lambda s, t, b: policy_loss(s, t[:2], b), DataError, r"teacher's logits of shape \[2, 4, 6\]"),
        (lambda s, t, b: policy_loss(s[:, :3], t[:, :3], b), DataError, r"ids of the sampled texts of shape \[3, 4\]"),
        (lambda s, t, b: policy_loss(s, t, replace(b, mask=b.mask & False)), DataError, "no token counts"),
        (
            lambda s, t, b: policy_loss(s, t, replace(b, mask=torch.tensor([[1, 0, 1, 1]] * 3).bool())),
            DataError,
            "its mask has gaps",
        ),
        (lambda s, t, b: policy_loss(s, t, replace(b, mask=b.mask.long())), DataError, "its mask has gaps"),
    ],
)
def test_what_does_not_go_together_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*batch(0))
