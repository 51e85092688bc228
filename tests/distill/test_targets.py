"""Losses against kept predictions: bounds of those against all logits, at most 300 bytes a token."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantforge.distill.losses import Objective, cross_entropy, distillation_loss
from quantforge.distill.targets import MOST_BYTES, K, bytes_per_token, keep, top_k_loss
from quantforge.errors import DataError, RecipeError
from quantforge.evaluation.divergence import TopK, top_k, top_k_divergence

SEEDS = st.integers(0, 2**32 - 1)
BOUNDED = st.one_of(
    st.just(Objective()),
    st.builds(Objective, st.just("skew-kl"), skew=st.floats(0.01, 0.9)),
    st.builds(Objective, st.just("jsd"), beta=st.floats(0.05, 0.95), normalized=st.booleans()),
)
ALL = st.one_of(
    st.builds(Objective, st.sampled_from(["fkl", "rkl"]), st.floats(0.5, 3), st.floats(0, 1)),
    st.builds(Objective, st.just("jsd"), st.floats(0.5, 3), beta=st.floats(0.05, 0.95), normalized=st.booleans()),
    st.builds(Objective, st.just("skew-kl"), st.floats(0.5, 3), skew=st.floats(0, 0.9)),
)


def draw(seed: int, tokens: int = 6, vocab: int = 20, noise: float = 1.0, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Return logits [tokens, vocab] of a student and of its teacher."""
    rng = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(tokens, vocab, generator=rng)
    return (teacher + noise * torch.randn(tokens, vocab, generator=rng)).to(dtype), teacher


def merged(logits: Tensor, kept: TopK) -> Tensor:
    """Return log-probabilities [tokens, k + 1] of the kept tokens and of the rest, as autograd can follow them."""
    probabilities = logits.softmax(-1)
    ids = kept.ids.long()
    inside = probabilities.gather(1, ids)
    rest = probabilities.scatter(1, ids, 0.0).sum(-1, keepdim=True)
    return torch.cat([inside, rest], 1).log()


@given(SEEDS, BOUNDED, st.floats(0.001, 4), st.data())
def test_the_loss_is_a_lower_bound_that_rises_with_k(seed, objective, noise, data):
    ks = sorted(data.draw(st.sets(st.integers(1, 20), min_size=1, max_size=4)))
    student, teacher = draw(seed, noise=noise)
    steps = [top_k_loss(student, keep(teacher, k), objective) for k in ks]
    steps.append(distillation_loss(student, teacher, objective))
    assert steps[0] >= 0
    for low, high in pairwise(steps):
        assert low <= high + 2e-6 * (1 + high)


@given(SEEDS, ALL, st.floats(0, 4))
def test_with_every_token_kept_it_is_the_dense_loss_and_all_objectives_work(seed, objective, noise):
    student, teacher = draw(seed, noise=noise)
    labels = torch.arange(6)
    student.requires_grad_()
    losses = [
        top_k_loss(student, keep(teacher, 20), objective, labels=labels),
        distillation_loss(student, teacher, objective, labels=labels),
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=2e-6 * objective.temperature**2)
    found, expected = (torch.autograd.grad(loss, student)[0] for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6 * objective.temperature)


@given(SEEDS, BOUNDED, st.integers(1, 19))
def test_loss_and_gradient_are_those_of_the_merged_outcomes(seed, objective, k):
    student, teacher = draw(seed, dtype=torch.float64)
    student.requires_grad_()
    kept = keep(teacher, k)
    losses = [
        top_k_loss(student, kept, objective),
        distillation_loss(merged(student, kept), kept.log_probs.double(), objective),
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)  # what is kept is so in float32
    found, expected = (torch.autograd.grad(loss, student)[0] for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", [Objective(), Objective("jsd", hard=0.3), Objective("skew-kl")])
def test_gradients_are_those_of_finite_differences(objective):
    student, teacher = draw(1, tokens=4, vocab=7, dtype=torch.float64)
    kept, mask, labels = keep(teacher, 3), torch.tensor([True, False, True, True]), torch.tensor([6, 0, 1, 2])
    assert torch.autograd.gradcheck(
        lambda s: top_k_loss(s, kept, objective, mask, labels=labels, chunk=2), student.requires_grad_()
    )


@given(SEEDS, st.integers(1, 20))
def test_forward_kl_is_what_evaluation_reports(seed, k):
    student, teacher = draw(seed)
    reported = top_k_divergence(student, top_k(teacher, k), torch.zeros(6, dtype=torch.long)).kl.mean()
    torch.testing.assert_close(
        top_k_loss(student, keep(teacher, k), Objective()).double(), reported, rtol=1e-5, atol=2e-6
    )


@given(SEEDS, BOUNDED, st.integers(1, 20), st.floats(0, 10))
def test_a_student_that_is_its_teacher_is_left_alone(seed, objective, k, scale):
    teacher = scale * draw(seed)[1]
    student = teacher.clone().requires_grad_()
    loss = top_k_loss(student, keep(teacher, k), objective)
    loss.backward()
    assert loss <= 1e-6
    assert student.grad.abs().max() <= 1e-6


@given(SEEDS, st.integers(1, 25), st.floats(-20, 20))
def test_neither_chunks_nor_what_is_masked_nor_a_shift_of_logits_change_it(seed, chunk, shift):
    student, teacher = (x.view(3, 8, 20) for x in draw(seed, tokens=24))
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0, 0] = True
    kept, loss = keep(teacher, 4), Objective("jsd", beta=0.3)
    student.requires_grad_()
    found = top_k_loss(student, kept, loss, mask)
    gradient = torch.autograd.grad(found, student)[0]
    assert not gradient[~mask].any()
    other = student.detach().clone()
    other[~mask] = math.nan
    spoilt = replace(kept, log_probs=kept.log_probs.masked_fill(~mask.flatten()[:, None], math.nan))
    other.requires_grad_()
    again = top_k_loss(other, spoilt, loss, mask, chunk=chunk)
    assert torch.equal(again, found)
    assert torch.equal(torch.autograd.grad(again, other)[0], gradient)
    torch.testing.assert_close(top_k_loss(student + shift, kept, loss, mask), found, rtol=1e-3, atol=1e-5)


def test_micro_batches_add_up_and_labels_are_mixed_in():
    student, teacher = draw(0)
    labels, objective = torch.arange(6), Objective(hard=0.25)
    whole = top_k_loss(student, keep(teacher, 4), objective, labels=labels)
    parts = [
        top_k_loss(student[i : i + 2], keep(teacher[i : i + 2], 4), objective, labels=labels[i : i + 2], count=6)
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(parts), whole)
    soft = top_k_loss(student, keep(teacher, 4), Objective())
    torch.testing.assert_close(whole, 0.75 * soft + 0.25 * cross_entropy(student, labels))


@pytest.mark.parametrize(("vocab", "dtype"), [(49152, torch.uint16), (2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_a_token_takes_at_most_300_bytes_and_its_ids_come_back(vocab, dtype):
    teacher = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0))
    teacher[0, -1] = 99.0
    kept = keep(teacher)
    assert kept.ids.dtype == dtype
    assert torch.equal(kept.ids.long(), teacher.topk(K).indices)
    size = sum(tensor.nbytes for tensor in (kept.ids, kept.log_probs, kept.top)) / 3
    assert size == bytes_per_token(vocab) == {torch.uint16: 198, torch.int32: 264}[dtype] <= MOST_BYTES
    assert kept.log_probs.exp().sum(-1).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("objective", [Objective(), Objective("jsd"), Objective("skew-kl")])
def test_a_rest_that_neither_model_allows_adds_nothing(objective):
    student, teacher = draw(0, vocab=9)
    student[:, 5:] = teacher[:, 5:] = -math.inf
    narrow, wide = student.clone().requires_grad_(), student.requires_grad_()
    kept = keep(teacher, 7)  # two of which are not allowed either
    losses = top_k_loss(wide, kept, objective), distillation_loss(narrow, teacher, objective)
    torch.testing.assert_close(*losses)
    found, expected = (torch.autograd.grad(*pair)[0] for pair in zip(losses, (wide, narrow), strict=True))
    torch.testing.assert_close(found, expected)


def test_what_the_bound_misses_of_reverse_kl_is_what_the_student_puts_on_the_rest():
    """Why it is refused: the student may move its mass to the rest's least likely token, and the bound stays."""
    teacher = torch.tensor([[4.0, 3.0, 1.0, -20.0]])
    near, far = torch.tensor([[4.0, 3.0, 1.0, -20.0]]), torch.tensor([[4.0, 3.0, -20.0, 1.0]])
    kept, objective = keep(teacher, 2), Objective("jsd", beta=0.999, normalized=True)
    assert float(top_k_loss(near, kept, objective)) == pytest.approx(float(top_k_loss(far, kept, objective)), abs=1e-6)
    assert distillation_loss(far, teacher, Objective("rkl")) > 100 * distillation_loss(near, teacher, Objective("rkl"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t: top_k_loss(s, keep(t, 4), Objective("rkl")), RecipeError, "4 of 20 .* reverse KL needs every"),
        (
            lambda s, t: top_k_loss(s, keep(t, 4), Objective("jsd", beta=1, normalized=True)),
            RecipeError,
            "reverse KL needs every",
        ),
        (lambda s, t: top_k_loss(s, keep(t, 4), Objective("fkl", 2.0)), RecipeError, "4 of 20 .* at temperature 2; 1"),
        (lambda s, t: keep(t, 0), RecipeError, "with 1 to 49 tokens a position, not 0"),
        (lambda s, t: keep(torch.zeros(1, 70_000), 37), RecipeError, "with 1 to 36 tokens a position, not 37"),
        (lambda s, t: keep(torch.zeros(1, 60_000), 50), RecipeError, "with 1 to 49 tokens a position, not 50"),
        (lambda s, t: keep(t * math.nan), DataError, "not finite"),
        (lambda s, t: top_k_loss(s[:5], keep(t), Objective()), DataError, r"shape \[6, 20\] do not .* \[5, 20\]"),
        (lambda s, t: top_k_loss(s[:, 1:], keep(t), Objective()), DataError, r"shape \[6, 20\] do not .* \[6, 19\]"),
        (lambda s, t: top_k_loss(s, keep(t), Objective(), torch.zeros(6)), DataError, "no token counts"),
    ],
)
def test_what_kept_predictions_cannot_do_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*draw(0))
