"""Intervals cover what they should, tests give p-values known by hand, and words follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.errors import DataError
from quantforge.evaluation.significance import (
    Change,
    Interval,
    accuracy,
    mcnemar,
    mean_accuracy,
    mean_interval,
    paired_change,
    perplexity_interval,
    standard_error,
    verdict,
)

SEEDS = st.integers(0, 2**32 - 1)


def normals(count: int, seed: int = 0, mean: float = 0.0, sd: float = 1.0) -> list[float]:
    return np.random.default_rng(seed).normal(mean, sd, count).tolist()


def test_the_standard_error_is_that_of_the_textbook():
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt((2.25 + 0.25) * 2 / 3 / 4))
    assert standard_error(torch.tensor([5.0, 5.0])) == 0
    assert math.isnan(standard_error([5.0]))


@pytest.mark.parametrize(("count", "draw"), [(12, "normal"), (48, "normal"), (48, "exponential")])
def test_intervals_cover_the_known_mean_95_times_in_100(count, draw):
    rng = np.random.default_rng(5)
    samples = rng.normal(1, 2, (800, count)) if draw == "normal" else rng.exponential(1, (800, count))
    found = [mean_interval(sample.tolist(), resamples=1000, seed=i) for i, sample in enumerate(samples)]
    covered = sum(one.low <= 1 <= one.high for one in found) / len(found)
    assert (0.93 if draw == "normal" else 0.915) <= covered <= 0.97  # skew costs every bootstrap a little
    wide = sum(mean_interval(s.tolist(), 0.5, 1000).low > 1 for s in samples[:400]) / 400
    assert 0.19 <= wide <= 0.31


def test_equal_models_are_told_apart_no_more_often_than_the_level_says():
    rng = np.random.default_rng(6)
    pairs = rng.normal(0, 1, (800, 2, 24))
    found = [paired_change(a.tolist(), b.tolist(), resamples=1000, seed=i) for i, (a, b) in enumerate(pairs)]
    shown = sum(verdict(one) != "no difference shown" for one in found) / len(found)
    assert 0.03 <= shown <= 0.07


@given(SEEDS, st.integers(2, 60), st.floats(0.001, 0.5))
def test_an_interval_holds_its_estimate_and_narrows_as_the_level_grows(seed, count, level):
    values = normals(count, seed)
    found, narrow = (mean_interval(values, at, 2000) for at in (level, min(0.99, 2 * level)))
    assert found.value == pytest.approx(sum(values) / count)
    assert found.low <= narrow.low <= narrow.high <= found.high
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12


def test_perplexity_is_exp_of_the_mean_and_its_interval_exp_of_that_interval():
    losses = normals(48, mean=2.5, sd=0.3)
    found, mean = perplexity_interval(torch.tensor(losses, dtype=torch.float64)), mean_interval(losses)
    assert found.value == pytest.approx(math.exp(sum(losses) / 48))
    assert (found.low, found.high) == (math.exp(mean.low), math.exp(mean.high))
    assert perplexity_interval([math.log(7.0)] * 5).low == pytest.approx(7)
    assert perplexity_interval([1e4, 1e4]) == Interval(math.inf, math.inf, math.inf)


def test_one_window_has_an_estimate_but_no_interval_and_shows_no_difference():
    found = perplexity_interval([1.0])
    assert found.value == pytest.approx(math.e)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    change = paired_change([1.0], [0.0])
    assert change.p == 1
    assert verdict(change, 0.99) == "no difference shown"


def test_pairing_sees_a_small_common_shift_that_two_intervals_do_not():
    hard = np.array(normals(48, 1, 3.0, 0.5))
    before, after = hard.tolist(), (hard + 0.01 + np.array(normals(48, 2, sd=0.01))).tolist()
    found = paired_change(before, after)
    assert verdict(found, 1e-3) == "worse"
    assert verdict(paired_change(after, before), 1e-3) == "better"
    assert found.mean.low < 0.01 < found.mean.high
    assert found.ratio.value == pytest.approx(perplexity_interval(after).value / perplexity_interval(before).value)
    assert 1 < found.ratio.low < found.ratio.value < found.ratio.high
    alone = mean_interval(before), mean_interval(after)
    assert alone[1].low < alone[0].value < alone[1].value < alone[0].high
    shuffled = np.random.default_rng(3).permutation(after).tolist()
    assert verdict(paired_change(before, shuffled)) == "no difference shown"


@given(SEEDS, st.integers(2, 60), st.floats(-1, 1))
def test_swapping_the_runs_changes_the_sign_and_nothing_else(seed, count, shift):
    before, after = normals(count, seed), normals(count, seed + 1, shift)
    there, back = paired_change(before, after, resamples=1000), paired_change(after, before, resamples=1000)
    assert there.p == back.p
    assert there.gain == -back.gain
    assert (there.mean.low, there.mean.high) == pytest.approx((-back.mean.high, -back.mean.low))
    assert there.ratio.value * back.ratio.value == pytest.approx(1)


@given(SEEDS, st.integers(8, 60), st.floats(-1, 1))
def test_the_p_value_is_below_the_level_where_the_interval_leaves_out_0(seed, count, shift):
    found = paired_change([0.0] * count, normals(count, seed, shift))
    assert 0 < found.p <= 1
    if abs(found.p - 0.05) > 0.005:  # else the quantiles of 10,000 draws decide
        assert (found.p < 0.05) == (not found.mean.low <= 0 <= found.mean.high)


def test_a_few_windows_show_nothing_however_equal_their_signs():
    assert paired_change([0.0] * 3, [1.0, 1.1, 1.2]).p == 0.25
    assert verdict(paired_change([0.0] * 5, [1.0, 1.1, 1.2, 1.0, 0.9])) == "no difference shown"
    six = paired_change([0.0] * 6, [1.0, 1.1, 1.2, 1.0, 0.9, 1.1])
    assert six.p == 2 / 2**6
    assert verdict(six) == "worse"


def test_equal_runs_have_no_difference_at_any_level():
    losses = normals(48)
    found = paired_change(losses, losses)
    assert found == Change(Interval(0, 0, 0), 1)
    assert verdict(found, 0.999) == "no difference shown"


def test_draws_depend_on_their_seed_and_touch_no_other_generator():
    values = normals(30)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (mean_interval(values, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == legacy).all()


def test_many_windows_are_drawn_in_blocks():
    values = normals(300_000, mean=2.0)
    found = mean_interval(values, resamples=40)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(300_000), rel=0.5)
    assert found.low < found.value < found.high


def answers(lost: int, gained: int, both: int = 5, neither: int = 3) -> tuple[list[bool], list[bool]]:
    pairs = [(True, False)] * lost + [(False, True)] * gained + [(True, True)] * both + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(9, 1, 22 / 1024), (1, 9, 22 / 1024), (3, 2, 1.0), (5, 0, 2 / 32), (0, 8, 2 / 256), (0, 0, 1.0), (4, 4, 1.0)],
)
def test_mcnemar_is_a_fair_coin_over_the_flips(lost, gained, p):
    before, after = answers(lost, gained)
    found = mcnemar(before, torch.tensor(after))
    assert (found.items, found.lost, found.gained) == (8 + lost + gained, lost, gained)
    assert found.p == pytest.approx(p)
    assert found.gain == pytest.approx((sum(after) - sum(before)) / len(after))
    expected = "no difference shown" if p > 0.05 else "better" if gained > lost else "worse"
    assert verdict(found) == expected
    assert mcnemar(*answers(lost, gained, 500, 0)).p == found.p  # items that both answer alike tell nothing


def test_the_level_decides_the_verdict():
    found = mcnemar(*answers(9, 1))
    assert [verdict(found, level) for level in (0.01, 0.02, 0.03)] == ["no difference shown"] * 2 + ["worse"]


def test_accuracy_against_chance_is_the_binomial_tail():
    found = accuracy([1] * 8 + [0] * 2, chance=0.5)
    assert found.p == pytest.approx(56 / 1024)
    assert found.share.value == 0.8
    assert found.error == pytest.approx(math.sqrt(0.16 / 9))
    z, n, share = 1.959964, 10, 0.8
    middle, half = (share + z**2 / 2 / n), z * math.sqrt(share * (1 - share) / n + z**2 / 4 / n**2)
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert (found.share.low, found.share.high) == pytest.approx((low, high), rel=1e-5)
    assert accuracy([True] * 4, 0.25).p == pytest.approx(1 / 256)
    assert accuracy([False] * 4, 0.25).p == 1


def test_the_mean_over_tasks_counts_each_alike_and_its_interval_is_made_of_theirs():
    few, many = accuracy([1] * 9 + [0], 0.5), accuracy([1] * 60 + [0] * 40, 0.5)
    (one, both) = mean_accuracy([few]), mean_accuracy([few, many])
    assert one.share == Interval(few.share.value, pytest.approx(few.share.low), pytest.approx(few.share.high))
    assert one.error == pytest.approx(few.error)
    assert both.share.value == pytest.approx(0.75)
    assert both.error == pytest.approx(math.hypot(few.error, many.error) / 2)
    four = mean_accuracy([few] * 4)
    assert four.share.value - four.share.low == pytest.approx((few.share.value - few.share.low) / 2)
    with pytest.raises(DataError, match="list"):
        mean_accuracy([])


def test_the_interval_of_a_mean_over_tasks_covers_it_though_one_is_nearly_always_right():
    rng, chances = np.random.default_rng(1), (0.97, 0.5, 0.3)
    hits = 0
    for _ in range(200):
        share = mean_accuracy([accuracy((rng.random(30) < p).tolist(), 0.5) for p in chances]).share
        hits += share.low <= sum(chances) / 3 <= share.high
    assert 182 <= hits <= 199


def test_chance_may_differ_between_items():
    found = accuracy([1, 1, 0, 1], [0.5, 0.25, 0.5, 0.25])
    assert found.chance == 0.375
    assert found.p == pytest.approx(4 * 0.375**3 * 0.625 + 0.375**4)
    with pytest.raises(DataError, match="4 values cannot be paired with 3"):
        accuracy([1, 1, 0, 1], [0.5, 0.25, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_change([1.0, 2.0], [1.0]), "2 values cannot be paired with 1"),
        (lambda: mcnemar([1, 0], [1, 0, 1]), "2 values cannot be paired with 3"),
        (lambda: standard_error([]), r"not one of shape \[0\]"),
        (lambda: mcnemar([], []), r"not one of shape \[0\]"),
        (lambda: mean_interval(torch.zeros(2, 2)), r"not one of shape \[2, 2\]"),
        (lambda: paired_change([1.0, math.nan], [1.0, 1.0]), "value 1 of 2 is nan"),
        (lambda: perplexity_interval([math.inf, 1.0]), "value 0 of 2 is inf"),
        (lambda: mcnemar([1, 0.5], [1, 0]), "answer 1 of 2 is 0.5"),
        (lambda: accuracy([1, 0], 1.0), "chance must lie between 0 and 1, not be 1.0"),
        (lambda: mean_interval([1.0, 2.0], level=0.0), "level must lie between 0 and 1"),
        (lambda: verdict(mcnemar([1], [0]), 5), "level must lie between 0 and 1"),
    ],
)
def test_lists_that_cannot_be_compared_are_refused_in_one_line(call, message):
    with pytest.raises(DataError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
