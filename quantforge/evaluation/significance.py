"""Whether a difference is more than noise: standard errors, bootstrap over windows, McNemar's and the binomial test.

Windows are the unit of resampling, since the tokens of one window depend on each other. Two runs over the same windows
are compared pair by pair: what makes a window hard is common to both and drops out. Every test is of one comparison;
of many made at level 0.05, one in twenty finds a difference where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from quantforge.errors import DataError

Values = Sequence[float] | Sequence[bool] | Tensor
Verdict = Literal["better", "worse", "no difference shown"]

_BLOCK = 2**20  # values that are drawn at once


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval for it; the interval is NaN where one value alone tells nothing of the spread."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """How the mean of a loss or divergence changes from one run to another over the same windows; below 0 is better.

    mean  the mean of after − before, with its interval
    p     two-sided p-value of there being no change
    """

    mean: Interval
    p: float

    @property
    def ratio(self) -> Interval:
        """Return exp of the change: for mean losses in nats, perplexity after / perplexity before."""
        return exponential(self.mean)

    @property
    def gain(self) -> float:
        """Return how much better the second run is; negative if it is worse."""
        return -self.mean.value


@dataclass(frozen=True)
class Flips:
    """How right and wrong answers changed from one run to another over the same items.

    lost    right before, wrong after
    gained  wrong before, right after
    p       two-sided p-value of a flip being as likely one way as the other
    """

    items: int
    lost: int
    gained: int
    p: float

    @property
    def gain(self) -> float:
        """Return the change of the share of right answers; negative if there are fewer."""
        return (self.gained - self.lost) / self.items


@dataclass(frozen=True)
class Accuracy:
    """The share of right answers.

    share   with Wilson's interval
    error   its standard error
    chance  the share that guessing gives
    p       one-sided p-value of guessing being right this often or more
    """

    share: Interval
    error: float
    items: int
    chance: float
    p: float


@dataclass(frozen=True)
class Mean:
    """The mean over several tasks of their shares of right answers, its interval and its standard error."""

    share: Interval
    error: float


def standard_error(values: Values) -> float:
    """Return the standard error of the mean of independent values, such as one per window; NaN for one value.

    Raises DataError for no values, or some that are not finite.
    """
    data = _numbers(values)
    return float(data.std(ddof=1)) / math.sqrt(len(data)) if len(data) > 1 else math.nan


def mean_interval(values: Values, level: float = 0.05, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of values, such as one per window, and its bootstrap interval of confidence 1 − level.

    The interval is Hesterberg's expanded percentile interval (2015, "What Teachers Should Know About the Bootstrap"):
    the percentiles are moved out to where Student's t has them, else a dozen windows give too narrow a one. Below six
    values no bootstrap can be trusted. The random numbers come from a generator of its own, made from `seed`.
    Raises DataError for no values, some that are not finite, or a level outside of (0, 1).
    """
    data = _numbers(values)
    return _interval(data, _resampled_means(data, resamples, seed), level)


def perplexity_interval(losses: Values, level: float = 0.05, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return exp of the mean of the windows' losses (nats per token) and its interval, as `mean_interval` makes it."""
    return exponential(mean_interval(losses, level, resamples, seed))


def paired_change(before: Values, after: Values, level: float = 0.05, resamples: int = 10_000, seed: int = 0) -> Change:
    """Compare two runs by a loss or divergence per window, in the same order; windows are drawn with their pair.

    The interval is that of `mean_interval` for the differences, and the p-value is the level at which that interval
    ends at 0. It is never below 2 / 2ⁿ for n windows: by chance alone n differences have one sign that often. Runs that
    are equal in every window have p = 1.
    Raises DataError for lists of different length, and as `mean_interval` does.
    """
    first, second = _numbers(before), _numbers(after)
    _check_lengths(first, second)
    differences = second - first
    means = _resampled_means(differences, resamples, seed)
    return Change(_interval(differences, means, level), _p_value(len(differences), means))


def mcnemar(before: Values, after: Values) -> Flips:
    """Compare two runs by their right (1, True) and wrong (0, False) answers to the same items: McNemar's exact test.

    Only items whose answer flipped tell the runs apart; without a difference each flip is a fair coin. The items must
    be independent: for the tokens of a text, which are not, the p-value is too small.
    Raises DataError for lists of different length, empty ones, or values other than 0 and 1.
    """
    first, second = _answers(before), _answers(after)
    _check_lengths(first, second)
    lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
    p = float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0
    return Flips(len(first), lost, gained, p)


def accuracy(answers: Values, chance: float | Sequence[float], level: float = 0.05) -> Accuracy:
    """Return the share of right answers (1, True), its interval, and the binomial test against guessing.

    chance  how often guessing is right, such as 1 / choices; or that of each item, where their choices differ in
            number: the test then uses the mean, which can only make the p-value larger above chance
    Raises DataError for no answers, values other than 0 and 1, or a chance or level outside of (0, 1).
    """
    right = _answers(answers)
    _check_level(level)
    if isinstance(chance, Iterable):
        _check_lengths(right, _numbers(chance))
        chance = float(_numbers(chance).mean())
    if not 0 < chance < 1:
        raise DataError(443, f"chance must lie between 0 and 1, not be {chance}.")
    test = stats.binomtest(int(right.sum()), len(right), chance, alternative="greater")
    both = stats.binomtest(int(right.sum()), len(right), chance)
    low, high = both.proportion_ci(1 - level, method="wilson")
    share = Interval(float(right.mean()), float(low), float(high))
    return Accuracy(share, standard_error(right.tolist()), len(right), chance, float(test.pvalue))


def mean_accuracy(found: Sequence[Accuracy]) -> Mean:
    """Return the mean of the shares of several tasks, each of which counts the same however many items it has.

    The interval is made of the tasks' own (Zou and Donner 2008, doi:10.1002/sim.3095), so that of one task it is
    Wilson's; it tells of the items that were drawn, not of the tasks. The items must be independent.
    Raises DataError for no tasks.
    """
    count, value = len(found), _numbers([one.share.value for one in found]).mean()
    below, above = (
        math.sqrt(math.fsum((getattr(one.share, end) - one.share.value) ** 2 for one in found)) / count
        for end in ("low", "high")
    )
    error = math.sqrt(math.fsum(one.error**2 for one in found)) / count
    return Mean(Interval(float(value), float(value) - below, float(value) + above), error)


def verdict(found: Change | Flips, level: float = 0.05) -> Verdict:
    """Say in words what a comparison has shown of the second run; a difference counts if its p-value is below level."""
    _check_level(level)
    if not found.p < level or found.gain == 0:
        return "no difference shown"
    return "better" if found.gain > 0 else "worse"


def _resampled_means(data: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Return the means of `resamples` draws of len(data) values with replacement, sorted."""
    rng = np.random.default_rng(seed)
    count = len(data)
    step = max(1, _BLOCK // count)
    sizes = [min(step, resamples - done) for done in range(0, resamples, step)]
    return np.sort(np.concatenate([data[rng.integers(0, count, (size, count))].mean(1) for size in sizes]))


def _interval(data: NDArray[np.float64], means: NDArray[np.float64], level: float) -> Interval:
    _check_level(level)
    count, value = len(data), math.fsum(data) / len(data)
    if count < 2:
        return Interval(value, math.nan, math.nan)
    tail = stats.norm.cdf(stats.t.ppf(level / 2, count - 1) * math.sqrt(count / (count - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _p_value(count: int, means: NDArray[np.float64]) -> float:
    """Return the level at which the interval of `_interval` ends at 0, from the share of means beyond 0."""
    if count < 2:
        return 1.0
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    share = min(0.5, (beyond + 1) / (len(means) + 1))
    p = 2 * stats.t.cdf(stats.norm.ppf(share) / math.sqrt(count / (count - 1)), count - 1)
    return float(max(p, 2.0 ** (1 - count)))


def _numbers(values: Values) -> NDArray[np.float64]:
    data = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise DataError(443, f"a list of one value per window or item is needed, not one of shape {list(data.shape)}.")
    bad = np.flatnonzero(~np.isfinite(data))
    if len(bad):
        raise DataError(443, f"value {bad[0]} of {len(data)} is {data[bad[0]]}: it must be finite to be compared.")
    return data


def _answers(values: Values) -> NDArray[np.bool_]:
    data = _numbers(values)
    bad = np.flatnonzero((data != 0) & (data != 1))
    if len(bad):
        raise DataError(443, f"answer {bad[0]} of {len(data)} is {data[bad[0]]:g}: it must be 0 (wrong) or 1 (right).")
    right: NDArray[np.bool_] = data == 1
    return right


def _check_lengths(first: NDArray[Any], second: NDArray[Any]) -> None:
    if len(first) != len(second):
        raise DataError(443, f"{len(first)} values cannot be paired with {len(second)}: use the same windows or items.")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise DataError(443, f"level must lie between 0 and 1, such as 0.05, not be {level}.")


def exponential(interval: Interval) -> Interval:
    """Return exp of an estimate and of its interval, such as the perplexity of a loss in nats; inf above 10³⁰⁴."""
    return _mapped(interval, _exp)


def scaled(interval: Interval, factor: float) -> Interval:
    """Return an estimate and its interval times a factor above 0."""
    return _mapped(interval, lambda value: value * factor)


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)


def _mapped(interval: Interval, function: Callable[[float], float]) -> Interval:
    return Interval(function(interval.value), function(interval.low), function(interval.high))
