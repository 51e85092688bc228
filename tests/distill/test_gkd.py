"""On-policy batches: as many as asked, never at λ = 0; and what is sampled does not depend on how it is batched."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantforge.distill.gkd import (
    batch_of_step,
    draw,
    gkd_objective,
    is_on_policy,
    left_pad,
    positions_of,
    sample,
)
from quantforge.distill.losses import distillation_loss, forward_kl, jsd, next_tokens, reverse_kl
from quantforge.errors import DataError, RecipeError
from quantforge.models import tiny

SEEDS = st.integers(0, 2**32 - 1)
PROMPTS = [[5, 9, 23], [7], [11, 4, 60, 33, 2, 8]]


def never(batch: Tensor) -> Tensor:
    raise AssertionError("the student was asked to write")


def stepping(model: torch.nn.Module):
    """Return what gives a model's next logits, from its cache."""

    def next_logits(ids, attention, positions, state):
        out = model(ids, attention_mask=attention.long(), position_ids=positions, past_key_values=state, use_cache=True)
        return out.logits[:, -1], out.past_key_values

    return next_logits


@given(SEEDS, st.integers(0, 10**6))
def test_lambda_0_never_writes_and_1_always_does(seed, step):
    given_batch = torch.zeros(3)
    assert batch_of_step(0, seed, step, given_batch, never) is given_batch
    assert batch_of_step(1, seed, step, given_batch, lambda batch: "written") == "written"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_on_policy_batches_is_lambda(share):
    found = sum(is_on_policy(share, 0, step) for step in range(2000))
    assert abs(found - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


@given(SEEDS, st.integers(0, 1000))
def test_a_step_decides_alike_when_it_is_run_again_and_touches_no_other_random_numbers(seed, step):
    before = random.getstate(), torch.get_rng_state()
    first = [is_on_policy(0.5, seed, s) for s in range(step, step + 20)]
    assert first == [is_on_policy(0.5, seed, s) for s in range(step, step + 20)]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert first != [is_on_policy(0.5, seed + 1, s) for s in range(step, step + 20)] or len(set(first)) == 1


def test_lambda_0_is_supervised_distillation_to_the_bit():
    rng = torch.Generator().manual_seed(0)
    weight, teacher = (torch.randn(30, 8, generator=rng) for _ in range(2))
    hidden = torch.randn(4, 6, 8, generator=rng)

    def train(share: float) -> list[Tensor]:
        student, curve = weight.clone().requires_grad_(), []
        for step in range(5):
            x = batch_of_step(share, 0, step, hidden, never)
            loss = distillation_loss(x @ student.T, x @ teacher.T, gkd_objective(0.5))
            (gradient,) = torch.autograd.grad(loss, student)
            student = (student - 0.1 * gradient).detach().requires_grad_()
            curve.append(loss.detach())
        return curve

    supervised, student = [], weight.clone().requires_grad_()
    for _ in range(5):
        loss = jsd(hidden @ student.T, hidden @ teacher.T, beta=0.5)
        student = (student - 0.1 * torch.autograd.grad(loss, student)[0]).detach().requires_grad_()
        supervised.append(loss.detach())
    assert train(0) == supervised


@given(SEEDS, st.floats(0.01, 0.99))
def test_the_ends_of_beta_are_forward_and_reverse_kl(seed, beta):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, 9, generator=rng) for _ in range(2))
    assert distillation_loss(student, teacher, gkd_objective(0)) == forward_kl(student, teacher)
    assert distillation_loss(student, teacher, gkd_objective(1)) == reverse_kl(student, teacher)
    assert distillation_loss(student, teacher, gkd_objective(beta)) == jsd(student, teacher, beta=beta)


def test_prompts_end_at_the_right_and_positions_count_from_their_first_token():
    ids, attention = left_pad(PROMPTS, 99)
    assert ids.tolist() == [[99, 99, 99, 5, 9, 23], [99, 99, 99, 99, 99, 7], [11, 4, 60, 33, 2, 8]]
    assert attention.long().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1] * 6]
    assert positions_of(attention).tolist() == [[0, 0, 0, 0, 1, 2], [0] * 6, [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_a_prompt_is_continued_as_if_it_were_alone(arch):
    model = tiny.make(arch).eval()
    together = sample(stepping(model), PROMPTS, 8, temperature=0, pad=1)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(stepping(model), [prompt], 8, temperature=0, pad=1)
        assert together.ids[i][together.completion[i]].tolist() == alone.ids[0][alone.completion[0]].tolist()
        ids = torch.tensor([prompt])  # and as the model does without cache, padding and mask
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert alone.ids.tolist() == ids.tolist()


def test_what_is_drawn_for_a_prompt_does_not_depend_on_the_prompts_after_it():
    model = tiny.make("llama").eval()
    few, many = (
        sample(stepping(model), prompts, 8, generator=torch.Generator().manual_seed(5))
        for prompts in (PROMPTS[:1], PROMPTS)
    )
    assert few.ids[0].tolist() == many.ids[0, 3:].tolist()


def test_a_text_ends_after_its_stop_token_and_only_padding_follows():
    order = {0: 3, 3: 4, 4: 5, 5: 2, 1: 2, 2: 6}  # 0 3 4 5 2 and 1 2, then 6 if it went on

    def next_logits(ids, attention, positions, state):
        return torch.nn.functional.one_hot(torch.tensor([order.get(int(i), 6) for i in ids[:, -1]]), 7).float(), None

    found = sample(next_logits, [[0], [1]], 10, stop=[2], pad=0, temperature=0)
    assert found.ids.tolist() == [[0, 3, 4, 5, 2], [1, 2, 0, 0, 0]]
    assert found.attention.long().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert found.completion.long().tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]
    labels, kept = next_tokens(found.ids, found.completion)
    assert labels[kept].tolist() == [3, 4, 5, 2, 2]


def test_sampling_has_no_gradient_and_leaves_other_random_numbers_alone():
    weight = torch.randn(5, 5, requires_grad=True)
    before = torch.get_rng_state()
    seen = []

    def next_logits(ids, attention, positions, state):
        seen.append((ids.shape[1], torch.is_grad_enabled(), positions[:, -1].tolist()))
        return weight[ids[:, -1]], None

    found = sample(next_logits, [[1], [2, 3]], 3, generator=torch.Generator().manual_seed(0))
    assert not found.ids.requires_grad
    assert seen == [(2, False, [0, 1]), (1, False, [1, 2]), (1, False, [2, 3])]
    assert torch.equal(torch.get_rng_state(), before)


@given(SEEDS, st.floats(0.5, 2))
def test_tokens_are_drawn_as_often_as_they_are_probable_and_never_without_probability(seed, temperature):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, generator=rng)
    logits[[0, 3, 5]] = -torch.inf
    found = Counter(draw(logits.expand(4000, 6), torch.rand(4000, generator=rng), temperature).tolist())
    assert not {0, 3, 5} & set(found)
    for token, p in enumerate((logits / temperature).softmax(-1).tolist()):
        assert abs(found[token] - 4000 * p) <= 5 * (4000 * p * (1 - p)) ** 0.5
    ends = draw(logits.expand(2, 6), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), temperature)
    assert ends.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: is_on_policy(1.5, 0, 0), RecipeError, "lambda, .*, must lie from 0 to 1, not be 1.5"),
        (lambda: is_on_policy(-0.1, 0, 0), RecipeError, "not be -0.1"),
        (lambda: batch_of_step(float("nan"), 0, 0, None, never), RecipeError, "not be nan"),
        (lambda: gkd_objective(2), RecipeError, "beta must lie from 0 to 1, not be 2"),
        (lambda: left_pad([[1], []], 0), DataError, "at least one token"),
        (lambda: left_pad([], 0), DataError, "at least one token"),
        (lambda: sample(never, [[1]], 0), RecipeError, "at least 1 token at a temperature of 0 or more, not 0 at 1.0"),
        (lambda: sample(never, [[1]], 1, temperature=-1), RecipeError, "not 1 at -1"),
        (lambda: draw(torch.tensor([[0.0, 1], [0, torch.nan]]), torch.zeros(2)), DataError, "not finite in row 1"),
    ],
)
def test_what_cannot_be_done_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
