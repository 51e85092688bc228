"""Losses of hidden states: the mean over tokens and width, blind to what the mask leaves out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quantforge.distill.layers import hidden_loss, layerwise_loss, matching_layers
from quantforge.errors import DataError


def draw(seed: int, width: int = 5, tokens: int = 6) -> Tensor:
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[True, False, True, True, False, True], [False, False, False, True, True, True]])


def test_it_is_the_squared_error_of_the_counted_tokens():
    student, teacher = draw(0), draw(1)
    torch.testing.assert_close(hidden_loss(student, teacher, MASK), F.mse_loss(student[MASK], teacher[MASK]))
    torch.testing.assert_close(hidden_loss(student, teacher), F.mse_loss(student, teacher))
    assert hidden_loss(student, student) == 0
    torch.testing.assert_close(
        hidden_loss(0 * student, teacher, MASK, relative=True), torch.ones((), dtype=torch.double)
    )
    sizes = teacher.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(
        hidden_loss(student, teacher, MASK, relative=True), hidden_loss(student / sizes, teacher / sizes, MASK)
    )


def test_a_teacher_that_gives_zeros_divides_by_no_zero():
    assert hidden_loss(0 * draw(0), 0 * draw(1), relative=True) == 0


def test_gradients_reach_the_student_and_its_projection_alone():
    student, teacher = draw(0, 3).requires_grad_(), draw(1, 5).requires_grad_()
    projection = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, p: hidden_loss(s, teacher.detach(), MASK, projection=p), (student, projection)
    )
    hidden_loss(student, teacher, MASK, projection=projection).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 7.0])
def test_what_the_mask_leaves_out_changes_neither_loss_nor_gradient(value):
    results = []
    for changed in (False, True):
        student, teacher = draw(0), draw(1)
        if changed:
            student[~MASK] = teacher[~MASK] = value
        student.requires_grad_()
        loss = hidden_loss(student, teacher, MASK)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert not results[1][1][~MASK].any()


@given(st.integers(0, 999), st.booleans())
def test_micro_batches_add_up_to_the_batch(seed, relative):
    student, teacher = draw(seed), draw(seed + 1)
    count = int(MASK.sum())
    parts = [hidden_loss(student[i], teacher[i], MASK[i], count=count, relative=relative) for i in range(2)]
    torch.testing.assert_close(sum(parts), hidden_loss(student, teacher, MASK, relative=relative))


def test_half_precision_is_compared_in_float32():
    student, teacher = draw(0).bfloat16(), draw(1).bfloat16()
    assert torch.equal(hidden_loss(student, teacher), hidden_loss(student.float(), teacher.float()))


def test_layers_count_alike_and_blocks_fed_by_the_teacher_do_not_touch_each_other():
    torch.manual_seed(0)
    blocks, goals = ([nn.Linear(5, 5).double() for _ in range(3)] for _ in range(2))
    streams = [draw(0)]
    for goal in goals:
        streams.append(goal(streams[-1]).detach())
    outputs = [block(x) for block, x in zip(blocks, streams, strict=False)]
    loss = layerwise_loss(outputs, streams[1:], MASK)
    each = [hidden_loss(y, goal, MASK) for y, goal in zip(outputs, streams[1:], strict=True)]
    torch.testing.assert_close(loss, sum(each) / 3)
    alone = torch.autograd.grad(each[1], blocks[1].weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, blocks[1].weight)[0], alone / 3)


@given(st.integers(1, 40), st.integers(0, 40))
def test_layers_are_paired_in_order_and_the_last_with_the_last(students, more):
    found = matching_layers(students, students + more)
    assert found == sorted(set(found))
    assert (len(found), found[-1]) == (students, students + more - 1)
    assert found[0] >= 0
    assert matching_layers(students, students) == list(range(students))


def test_half_as_many_layers_are_paired_with_every_second():
    assert matching_layers(3, 6) == [1, 3, 5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hidden_loss(draw(0), draw(0), torch.zeros(2, 6)), "no token counts"),
        (lambda: hidden_loss(draw(0), draw(0, 4)), r"hidden states of shape \[2, 6, 4\] do not .* \[2, 6, 5\]"),
        (lambda: hidden_loss(draw(0), draw(0), torch.ones(2, 5)), "mask of shape"),
        (lambda: layerwise_loss([draw(0)], []), "1 layers of the student do not pair with 0"),
        (lambda: layerwise_loss([], []), "0 layers"),
        (lambda: matching_layers(4, 3), "student of 4 layers cannot be paired with a teacher of 3"),
        (lambda: matching_layers(0, 3), "student of 0 layers"),
    ],
)
def test_what_does_not_go_together_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
