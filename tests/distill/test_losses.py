"""The losses against their definitions in float64, their gradients against autograd's, and what memory they take."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantforge.distill.losses import (
    Objective,
    cross_entropy,
    dense_terms,
    distillation_loss,
    forward_kl,
    from_hidden,
    jsd,
    next_tokens,
    reverse_kl,
    skew_kl,
)
from quantforge.distill.tokens import per_token
from quantforge.errors import DataError, RecipeError

SEEDS = st.integers(0, 2**32 - 1)
BETAS = st.one_of(st.floats(0.001, 0.999), st.sampled_from([0.0, 1e-96, 1e-8, 1 - 1e-8, 1.0]))
OBJECTIVES = st.one_of(
    st.builds(Objective, st.sampled_from(["fkl", "rkl"]), st.floats(0.5, 4)),
    st.builds(Objective, st.just("jsd"), st.floats(0.5, 4), beta=st.floats(0.01, 0.99)),
    st.builds(Objective, st.just("jsd"), st.floats(0.5, 4), beta=BETAS, normalized=st.just(True)),
    st.builds(Objective, st.just("skew-kl"), st.floats(0.5, 4), skew=st.floats(0, 0.9)),
)
FEW = [
    Objective("fkl", 2.0),
    Objective("rkl"),
    Objective("jsd", 1.5, beta=0.3),
    Objective("jsd", beta=0.9, normalized=True),
    Objective("skew-kl", skew=0.2),
    Objective("fkl", 3.0, hard=0.4),
    Objective("rkl", hard=1.0),
]


def draw(seed: int, tokens: int = 6, vocab: int = 11, noise: float = 1.0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Return logits [tokens, vocab] of a student and of its teacher."""
    rng = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(tokens, vocab, generator=rng, dtype=torch.float64)
    student = teacher + noise * torch.randn(tokens, vocab, generator=rng, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def some_mask(seed: int, *shape: int) -> Tensor:
    found = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    found[..., 0] = True
    return found


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def plain(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """Return the divergence of each token as it is defined, by probabilities, and differentiable by autograd."""
    t = objective.temperature
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    if objective.kind == "fkl":
        found = kl(p, q)
    elif objective.kind == "rkl":
        found = kl(q, p)
    elif objective.kind == "skew-kl":
        found = kl(p, objective.skew * p + (1 - objective.skew) * q)
    else:
        b = objective.beta
        m = b * p + (1 - b) * q
        found = b * kl(p, m) + (1 - b) * kl(q, m)
        if objective.normalized:
            found = kl(p, q) if b == 0 else kl(q, p) if b == 1 else found / (b * (1 - b))
    return found * t * t


@given(SEEDS, OBJECTIVES, st.integers(2, 40), st.floats(0.01, 2))
def test_each_divergence_and_its_gradient_are_those_of_the_definition(seed, objective, vocab, noise):
    student, teacher = draw(seed, vocab=vocab, noise=noise)
    student.requires_grad_()
    assume(objective.beta in (0, 1) or 0.001 <= objective.beta <= 0.999)  # nearer, the plain definition is inexact
    ours, theirs = distillation_loss(student, teacher, objective), plain(student, teacher, objective).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    found, expected = (torch.autograd.grad(loss, student)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", FEW, ids=lambda o: f"{o.kind}-{o.beta}-{o.hard}")
def test_gradients_are_those_of_finite_differences(objective):
    student, teacher = draw(1, tokens=4, vocab=5)
    mask, labels = torch.tensor([True, False, True, True]), torch.tensor([4, 0, 1, 2])
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, teacher, objective, mask, labels=labels, chunk=2), student.requires_grad_()
    )


@given(SEEDS, OBJECTIVES, st.floats(0, 5), st.integers(2, 300))
def test_in_float32_they_are_those_of_float64(seed, objective, noise, vocab):
    student, teacher = draw(seed, vocab=vocab, noise=noise, dtype=torch.float32)
    student.requires_grad_()
    wide = student.detach().double().requires_grad_()
    ours, exact = distillation_loss(student, teacher, objective), distillation_loss(wide, teacher.double(), objective)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=1e-5 * objective.temperature**2)
    ours.backward()
    exact.backward()
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-4, atol=1e-6 * objective.temperature)


@given(SEEDS, OBJECTIVES, st.floats(0.01, 5), st.floats(-50, 50), st.floats(-50, 50))
def test_they_are_at_least_0_and_blind_to_a_shift_of_all_logits(seed, objective, noise, a, b):
    student, teacher = draw(seed, noise=noise)
    found = distillation_loss(student, teacher, objective)
    assert found > 0
    torch.testing.assert_close(distillation_loss(student + a, teacher + b, objective), found, rtol=1e-6, atol=1e-9)


@given(SEEDS, OBJECTIVES, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.floats(0, 30))
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(seed, objective, dtype, scale):
    student = (scale * draw(seed)[0]).to(dtype).requires_grad_()
    found = distillation_loss(student, student.detach().clone(), objective)
    found.backward()
    assert found == 0
    assert student.grad.abs().max() <= 1e-6 * objective.temperature / len(student)


@given(SEEDS, st.floats(0.001, 0.999), st.floats(0, 20))
def test_jsd_is_at_most_the_entropy_of_its_beta_and_symmetric_in_it(seed, beta, noise):
    student, teacher = draw(seed, noise=noise)
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert jsd(student, teacher, beta=beta) <= most + 1e-9 <= math.log(2) + 1e-8
    torch.testing.assert_close(jsd(student, teacher, beta=beta), jsd(teacher, student, beta=1 - beta))


@given(SEEDS, st.sampled_from([torch.float64, torch.float32]), st.sampled_from([1e-3, 1e-6, 1e-9]))
def test_normalized_jsd_goes_over_into_forward_and_reverse_kl(seed, dtype, small):
    student, teacher = draw(seed, noise=0.5, dtype=dtype)
    student.requires_grad_()
    for beta, limit in ((small, forward_kl), (1 - small, reverse_kl)):
        near, end = jsd(student, teacher, beta=beta, normalized=True), limit(student, teacher)
        torch.testing.assert_close(near, end, rtol=20 * small, atol=2e-6)
        found, expected = (torch.autograd.grad(loss, student)[0] for loss in (near, end))
        torch.testing.assert_close(found, expected, rtol=50 * small, atol=5e-6 + small)
    assert jsd(student, teacher, beta=small) < 2 * small * forward_kl(student, teacher) + 1e-12
    assert jsd(student, teacher, beta=0, normalized=True) == forward_kl(student, teacher)
    assert jsd(student, teacher, beta=1e-96, normalized=True) == forward_kl(student, teacher)  # no float32 number
    assert jsd(student, teacher, beta=1, normalized=True) == reverse_kl(student, teacher)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6])
def test_in_float32_it_is_exact_where_the_models_hardly_overlap(beta):
    student, teacher = torch.tensor([[0.0, 40.0, 3.0]]), torch.tensor([[40.0, 0.0, 5.0]])
    for normalized in (False, True):
        losses = []
        for dtype in (torch.float32, torch.float64):
            logits = student.to(dtype).requires_grad_()
            loss = jsd(logits, teacher.to(dtype), beta=beta, normalized=normalized)
            losses.append((loss.detach().double(), torch.autograd.grad(loss, logits)[0].double()))
        torch.testing.assert_close(losses[0], losses[1], rtol=2e-6, atol=2e-6)


@given(SEEDS)
def test_without_skew_it_is_forward_kl_and_with_it_less(seed):
    student, teacher = draw(seed)
    full = forward_kl(student, teacher)
    assert skew_kl(student, teacher, skew=0) == full
    assert skew_kl(student, teacher, skew=0.1) < full
    torch.testing.assert_close(skew_kl(student, teacher, skew=1e-7), full, rtol=1e-3, atol=0)


@given(SEEDS)
def test_at_high_temperature_both_kls_are_the_squared_distance_of_the_logits(seed):
    student, teacher = draw(seed)
    apart = student - teacher
    limit = (apart - apart.mean(-1, keepdim=True)).square().mean(-1).mean() / 2
    for loss in (forward_kl, reverse_kl):
        torch.testing.assert_close(loss(student, teacher, temperature=1e5), limit, rtol=1e-3, atol=0)


def test_a_known_value():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert float(forward_kl(q, p)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(reverse_kl(q, p)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


@given(SEEDS, st.floats(0, 1))
def test_cross_entropy_is_mixed_in_at_temperature_1(seed, hard):
    student, teacher = draw(seed)
    labels = torch.arange(6)
    plainly = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(cross_entropy(student, labels), plainly)
    found = distillation_loss(student, teacher, Objective("fkl", 2.0, hard), labels=labels)
    torch.testing.assert_close(found, (1 - hard) * forward_kl(student, teacher, temperature=2.0) + hard * plainly)


@given(SEEDS, st.sampled_from(FEW), st.integers(1, 30))
def test_the_size_of_chunks_changes_nothing(seed, objective, chunk):
    student, teacher = (x.view(3, 8, 7) for x in draw(seed, tokens=24, vocab=7, dtype=torch.float32))
    mask, labels = some_mask(seed, 3, 8), torch.randint(7, (3, 8), generator=torch.Generator().manual_seed(seed % 999))
    student.requires_grad_()
    whole, parts = (distillation_loss(student, teacher, objective, mask, labels=labels, chunk=c) for c in (99, chunk))
    assert torch.equal(whole, parts)
    assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in (whole, parts)))


@given(SEEDS, st.sampled_from(FEW), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]))
def test_what_the_mask_leaves_out_is_never_read(seed, objective, value):
    student, teacher = (x.view(2, 5, 11) for x in draw(seed, tokens=10))
    mask, labels = some_mask(seed, 2, 5), torch.full((2, 5), 3)
    results = []
    for changed in (False, True):
        a, b, c = student.clone(), teacher.clone(), labels.clone()
        if changed:
            a[~mask], b[~mask], c[~mask] = value, value, -100
        a.requires_grad_()
        loss = distillation_loss(a, b, objective, mask, labels=c)
        loss.backward()
        assert not a.grad[~mask].any()
        results.append((loss.detach(), a.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@given(SEEDS, st.sampled_from(FEW), st.integers(2, 4))
def test_micro_batches_normalised_by_all_tokens_are_the_batch(seed, objective, parts):
    student, teacher = (x.view(4, 6, 11) for x in draw(seed, tokens=24))
    mask, labels = some_mask(seed, 4, 6), torch.full((4, 6), 2)
    mask[3] = False  # one without a token to count
    student.requires_grad_()
    whole = distillation_loss(student, teacher, objective, mask, labels=labels)
    expected = torch.autograd.grad(whole, student)[0]
    total, count = 0.0, int(mask.sum())
    for rows in torch.arange(4).tensor_split(parts):
        loss = distillation_loss(student[rows], teacher[rows], objective, mask[rows], labels=labels[rows], count=count)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(whole.detach()), rel=1e-12)
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-15)


def test_an_empty_mask_is_refused_and_adds_nothing_where_the_count_is_given():
    student, teacher = draw(0)
    nothing = torch.zeros(6, dtype=torch.bool)
    with pytest.raises(DataError, match="no token counts"):
        forward_kl(student, teacher, nothing)
    with pytest.raises(DataError, match="no token counts"):
        cross_entropy(student[:0], torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="0 tokens have no mean"):
        forward_kl(student, teacher, count=0)
    student.requires_grad_()
    forward_kl(student, teacher, nothing, count=5).backward()
    assert not student.grad.any()


def test_the_teacher_gets_no_gradient_and_the_backward_pass_can_be_repeated():
    student, teacher = (x.requires_grad_() for x in draw(0))
    loss = forward_kl(student, teacher)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(2 * loss, student)[0] / 2)
    with pytest.raises(RuntimeError, match=r"unused|not have been used"):
        torch.autograd.grad(forward_kl(student, teacher), teacher)


@pytest.mark.parametrize("objective", FEW, ids=lambda o: f"{o.kind}-{o.beta}-{o.hard}")
def test_tokens_that_neither_model_allows_change_nothing(objective):
    student, teacher = draw(0, vocab=9)
    labels, gone = torch.zeros(6, dtype=torch.long), torch.full((6, 3), -math.inf, dtype=torch.float64)
    wide = torch.cat([student, gone], 1).requires_grad_()
    narrow = student.requires_grad_()
    losses = [
        distillation_loss(narrow, teacher, objective, labels=labels),
        distillation_loss(wide, torch.cat([teacher, gone], 1), objective, labels=labels),
    ]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(wide.grad[:, :9], narrow.grad)
    assert not wide.grad[:, 9:].any()


def test_a_token_that_only_one_model_allows_makes_kl_infinite_but_not_jsd():
    student, teacher = draw(0)
    less = teacher.clone()
    less[2, 5] = -math.inf
    assert forward_kl(less, teacher) == reverse_kl(teacher, less) == math.inf
    for a, b in ((less, teacher), (teacher, less)):
        a.requires_grad_()
        for loss in (jsd(a, b.detach(), beta=0.7), skew_kl(a, b.detach())):
            assert 0 < loss < math.log(20)
            assert torch.autograd.grad(loss, a)[0].isfinite().all()
    student[1, 1] = math.nan
    assert forward_kl(student, teacher).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_compared_in_float32_and_get_gradients_of_their_own_dtype(dtype):
    student, teacher = draw(0, vocab=50, dtype=dtype)
    wide = student.float().requires_grad_()
    student.requires_grad_()
    losses = forward_kl(student, teacher), forward_kl(wide, teacher.float())
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)
    for loss in losses:
        (loss * 1024).backward()  # as loss scaling does: rounded after it
    assert torch.equal(student.grad, wide.grad.to(dtype))


def test_logits_that_are_a_part_of_others_are_worked_on_in_place():
    student, teacher = (x.view(2, 12, 11) for x in draw(0, tokens=24))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, -1] = False
    torch.testing.assert_close(forward_kl(student[:, :-1], teacher[:, :-1]), forward_kl(student, teacher, mask))


class Sizes(TorchDispatchMode):
    """Count the tensors that operations give by their number of elements, in bytes; views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.made.append(tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", FEW, ids=lambda o: f"{o.kind}-{o.beta}-{o.hard}")
def test_only_the_gradient_is_larger_than_the_float32_logits_of_a_chunk(objective, dtype):
    student, teacher = (x.view(4, 7, 3000) for x in draw(0, tokens=28, vocab=3000, dtype=dtype))
    student, labels = student[:, :-1].requires_grad_(), torch.zeros(4, 6, dtype=torch.long)
    teacher, chunk = teacher[:, :-1], 3
    with Sizes() as forwards:
        loss = distillation_loss(student, teacher, objective, labels=labels, chunk=chunk)
    assert max(forwards.made) == chunk * 3000 * 4
    with Sizes() as backwards:
        torch.autograd.grad(loss, student)
    large = [size for size in backwards.made if size > chunk * 3000 * 4]
    assert large == [student.numel() * student.element_size()]


def test_chunks_of_16_mebibytes_are_used_if_none_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr("quantforge.distill.tokens.chunk_tokens", lambda vocab: asked.append(vocab) or 2)
    student, teacher = draw(0)
    torch.testing.assert_close(forward_kl(student, teacher), plain(student, teacher, Objective()).mean())
    assert asked == [11]


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_logits_can_be_made_from_hidden_states_as_they_are_needed(chunk):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(4, 500, dtype=torch.float64)
    teacher = torch.randn(2, 9, 500, generator=rng, dtype=torch.float64)
    mask = some_mask(3, 2, 9)
    flat, count = teacher.flatten(0, 1), int(mask.sum())
    inputs = (hidden, head.weight, head.bias)
    whole = forward_kl(head(hidden), teacher, mask)
    expected = torch.autograd.grad(whole, inputs)
    runs = []
    handle = head.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    with Sizes() as seen:
        parts = from_hidden(
            hidden, head, lambda logits, places: forward_kl(logits, flat[places], count=count), mask, chunk=chunk
        )
        forwards = len(runs)
        found = torch.autograd.grad(parts, inputs)
    handle.remove()
    assert forwards == -(-count // chunk)
    assert len(runs) == 2 * forwards  # nothing was kept for the backward pass
    assert max(runs) <= chunk
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, expected)
    assert max(seen.made) <= max(min(chunk, count), 4) * 500 * 8  # the head's own weight has 4 rows
    with pytest.raises(DataError, match="no token counts"):
        from_hidden(hidden, head, lambda logits, places: logits.sum(), torch.zeros(2, 9))


def test_the_labels_are_the_tokens_after_and_the_last_place_has_none():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    labels, kept = next_tokens(ids, torch.tensor([[False, False, True, True], [True, True, False, False]]))
    assert labels[:, :-1].tolist() == [[6, 7, 8], [2, 3, 4]]
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert next_tokens(ids)[1].sum() == 6


def test_the_losses_of_single_tokens_can_be_weighed():
    student, teacher = draw(0)
    weights = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = dense_terms(Objective(), teacher)
    assert torch.autograd.gradcheck(lambda s: per_token(s, terms) * weights, student.requires_grad_())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: forward_kl(a, a[:, :-1]), DataError, r"teacher's logits of shape \[6, 10\] do not .* \[6, 11\]"),
        (lambda a: forward_kl(a, a, torch.ones(5)), DataError, r"mask of shape \[5\] do not .* \[6\]"),
        (lambda a: cross_entropy(a, torch.zeros(5, dtype=torch.long)), DataError, r"labels of shape \[5\]"),
        (lambda a: cross_entropy(a, torch.full((6,), -100)), DataError, "label -100 of a counted .* vocabulary of 11"),
        (lambda a: cross_entropy(a, torch.full((6,), 11)), DataError, "label 11"),
        (lambda a: distillation_loss(a, a, Objective(hard=0.5)), DataError, "0.5 of cross-entropy needs labels"),
        (lambda a: Objective("fk"), RecipeError, "did you mean 'fkl'"),
        (lambda a: jsd(a, a, beta=1.5), RecipeError, "beta must lie from 0 to 1, not be 1.5"),
        (lambda a: jsd(a, a, beta=0), RecipeError, "normalized=True makes it forward KL"),
        (lambda a: skew_kl(a, a, skew=1), RecipeError, "skew .* below 1, not 1"),
        (lambda a: forward_kl(a, a, temperature=0), RecipeError, "temperature must be above 0 and finite, not 0"),
        (lambda a: Objective(hard=1.1), RecipeError, "from 0 to 1, not be 1.1"),
        (lambda a: Objective(beta=math.nan), RecipeError, "not be nan"),
    ],
)
def test_what_does_not_go_together_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(draw(0)[0])
