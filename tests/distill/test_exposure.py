"""Excess accumulated error and distinct n-grams against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.distill.exposure import distinct, exposure
from quantforge.errors import DataError


def test_it_is_what_accumulates_on_own_prefixes_beyond_what_does_on_the_teachers():
    own = torch.tensor([[9.0, 0.1, 0.3, 0.5], [9.0, 0.3, 0.5, 9.0]])
    own_mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    teacher = torch.tensor([[0.1, 0.2, 9.0], [0.3, 0.2, 9.0], [0.2, 0.2, 9.0]])
    teacher_mask = torch.tensor([[1, 1, 0]] * 3).bool()
    found = exposure(own, own_mask, teacher, teacher_mask)
    assert found.own.tolist() == pytest.approx([0.2, 0.6])  # a third place is no teacher's
    assert found.teacher.tolist() == pytest.approx([0.2, 0.4])
    assert found.excess.tolist() == pytest.approx([0.0, 0.5], abs=1e-6)


@given(st.integers(0, 999), st.floats(0.1, 10), st.integers(1, 20))
def test_a_student_that_errs_alike_on_both_has_no_excess_and_one_that_errs_more_by_a_factor_has_it(
    seed, factor, length
):
    kl = torch.rand(5, length, generator=torch.Generator().manual_seed(seed)) + 0.01
    everywhere = torch.ones_like(kl, dtype=torch.bool)
    assert not exposure(kl, everywhere, kl, everywhere).excess.any()
    found = exposure(factor * kl, everywhere, kl, everywhere).excess
    assert found.tolist() == pytest.approx([factor - 1] * length, rel=1e-5, abs=1e-5)


def test_texts_that_ended_do_not_count_as_errors_of_0():
    kl = torch.ones(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1:, 2:] = False
    assert exposure(kl, mask, kl, torch.ones(4, 6)).own.tolist() == [1, 2, 3, 4, 5, 6]


def test_padding_before_or_after_a_text_changes_nothing():
    kl = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 4, dtype=torch.bool)
    wide, wide_mask = torch.full((3, 9), math.nan), torch.zeros(3, 9, dtype=torch.bool)
    wide[:, 2:6], wide_mask[:, 2:6] = kl, True
    assert torch.equal(exposure(wide, wide_mask, kl, mask).own, exposure(kl, mask, kl, mask).own)


def test_a_student_without_error_on_the_teachers_texts():
    zero, one, mask = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2)
    assert exposure(zero, mask, zero, mask).excess.tolist() == [0, 0]
    assert exposure(one, mask, zero, mask).excess.tolist() == [math.inf, math.inf]
    assert exposure(zero, mask, one, mask).excess.tolist() == [-1, -1]


def test_distinct_is_the_share_of_different_n_grams():
    assert distinct([[1, 2, 1, 2, 1]]) == 2 / 4
    assert distinct([[1, 2, 3], [1, 2, 4]]) == 3 / 4
    assert distinct([[1, 2], [2, 1], [5]], 1) == 3 / 5
    assert distinct([[7] * 11]) == 1 / 10
    assert distinct([[1, 2, 3, 4]], 3) == 1


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=20), min_size=1, max_size=5))
def test_distinct_lies_above_0_and_is_at_most_1_and_falls_if_texts_are_repeated(texts):
    once = distinct(texts)
    assert 0 < once <= 1
    assert distinct(texts + texts) == pytest.approx(once / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda kl, m: exposure(kl, m & False, kl, m), "the student wrote counts: the mask is empty"),
        (lambda kl, m: exposure(kl, m, kl, m & False), "the teacher wrote counts: the mask is empty"),
        (lambda kl, m: exposure(kl * math.nan, m, kl, m), "the student wrote is NaN or negative"),
        (lambda kl, m: exposure(kl, m, -kl, m), "the teacher wrote is NaN or negative"),
        (
            lambda kl, m: exposure(kl, m[:, 1:], kl, m),
            r"KL of shape \[2, 3\] does not go with a mask",
        ),
        (lambda kl, m: distinct([[1]]), "no text has 2 tokens"),
        (lambda kl, m: distinct([]), "no text has 2 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
