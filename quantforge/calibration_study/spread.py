"""What the runs of a study show: each cell's spread over seeds, and whether a choice moves more than chance does.

Perplexities are compared by their logarithm, the mean cross-entropy: a change of 0.01 is one of 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from scipy import stats  # type: ignore[import-untyped]

from quantforge.calibrate import overlap
from quantforge.calibrate.overlap import Overlap
from quantforge.calibration_study.design import Cell, Pool
from quantforge.calibration_study.results import Study, StudyRun
from quantforge.evaluation import significance
from quantforge.evaluation.significance import Change

Measure = Callable[[StudyRun], Sequence[float]]

FACTORS: dict[str, tuple[str, Callable[[Cell], str | int]]] = {
    "data": ("data set", lambda cell: cell.data),
    "samples": ("samples", lambda cell: cell.samples),
    "seq_len": ("length", lambda cell: cell.seq_len),
}
UNMEASURED, ALIKE = "not measured", "no difference shown"
FEW_WINDOWS = 6  # below which no bootstrap can be trusted


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (NaN for one value) and range of some values."""

    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class CellResult:
    """One cell over its seeds.

    change   of the loss from the float model's, the windows' losses being means over seeds; None where some are not
             finite
    verdict  of that change
    overlap  of the seed that shares most with the evaluation text
    """

    cell: Cell
    runs: tuple[StudyRun, ...]
    perplexity: Spread
    kl: Spread
    change: Change | None
    verdict: str
    overlap: Overlap


@dataclass(frozen=True)
class Shift:
    """How the mean of a measure changes from one level of a factor to another, over all other choices.

    change     with its interval over windows; None where something is not finite. Its p-value is the larger of those
               over windows and over seeds: a difference counts only if it would hold on other text and in other draws
    deviation  standard deviation over seeds of that change, each seed's being a mean over all other choices
    verdict    of the change
    """

    change: Change | None
    deviation: float
    verdict: str


@dataclass(frozen=True)
class Effect:
    """What it does to the loss and to the KL to go from one level of a factor, its first, to another."""

    factor: str
    before: str | int
    after: str | int
    loss: Shift
    kl: Shift


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of `values`, at least one; NaN throughout if one is not finite."""
    if not all(map(math.isfinite, values)):
        return Spread(math.nan, math.nan, math.nan, math.nan)
    return Spread(fmean(values), stdev(values) if len(values) > 1 else math.nan, min(values), max(values))


def cells(study: Study) -> list[CellResult]:
    """Return the cells that have runs, in the order of the design."""
    found = []
    for cell in study.design.cells:
        runs = tuple(run for run in study.runs if run.cell == cell and run.seed in study.design.seeds)
        if not runs:
            continue
        change = _change(study.float_losses, _window_means(runs, _losses))
        found.append(
            CellResult(
                cell,
                runs,
                spread([run.perplexity for run in runs]),
                spread([run.kl for run in runs]),
                change,
                UNMEASURED if change is None else significance.verdict(change),
                max((run.overlap for run in runs), key=lambda found: (found.same, found.share)),
            )
        )
    return found


def effects(study: Study) -> list[Effect]:
    """Return the change from the first level of each factor that has several to each other; none before all are done.

    A seed's draws in the cells of one set are not independent, so that the seeds themselves are what is counted: each
    gives one change, and Student's t-test asks whether their mean differs from 0. Where the seeds of a cell share most
    of their windows they agree whatever chance does: that cell and the one it would be compared with are left out, and
    where that leaves none, all are taken and the test is not made: p = 1.
    """
    done = {(run.cell, run.seed): run for run in study.runs}
    if any((cell, seed) not in done for cell in study.design.cells for seed in study.design.seeds):
        return []
    found = []
    for factor, (_, level_of) in FACTORS.items():
        first, *others = dict.fromkeys(map(level_of, study.design.cells))
        for other in others:
            moved: dict[str, Any] = {factor: other}
            pairs = [(c, replace(c, **moved)) for c in study.design.cells if level_of(c) == first]
            apart = [pair for pair in pairs if not any(shares_most(study, cell) for cell in pair)]
            before, after = (
                [[done[cell, seed] for cell in level] for seed in study.design.seeds]
                for level in zip(*(apart or pairs), strict=True)
            )
            shifts = (_shift(measure, before, after, apart=bool(apart)) for measure in (_losses, _kls))
            found.append(Effect(factor, first, other, *shifts))
    return found


def shares_most(study: Study, cell: Cell) -> bool:
    """Tell whether two seeds of a cell share, on average, more than half of the windows that each draws.

    A second draw finds each window of the first with the chance samples / available.
    """
    return any(2 * cell.samples > _available(pool, cell.seq_len) for pool in study.texts if pool.name == cell.data)


def _available(pool: Pool, length: int) -> int:
    return pool.tokens // length


def noise(study: Study) -> float:
    """Return the standard deviation of the loss over seeds, pooled over cells; NaN with one seed."""
    each = [spread([run.loss for run in result.runs]).deviation for result in cells(study)]
    return math.sqrt(fmean(value**2 for value in each)) if each and all(map(math.isfinite, each)) else math.nan


def percent(change: float) -> float:
    """Return the change of perplexity, in percent, that a change of the loss means."""
    return 100 * math.expm1(change) if change < 700 else math.inf


def notes(study: Study) -> list[str]:
    """Return what has to be known to read the study, overlap apart."""
    found = list(study.model_notes)
    if not study.needs:
        found.append(f"{study.method} looks at no calibration data: all its runs are the same.")
    if len(study.design.seeds) < 3:
        count = "One seed tells" if len(study.design.seeds) == 1 else "Two seeds tell"
        found.append(f"{count} next to nothing of chance: give --seeds three or more before any difference can count.")
    if len(study.float_losses) < FEW_WINDOWS:
        found.append(f"{len(study.float_losses)} evaluation windows are too few for an interval; use 48.")
    pools = {pool.name: pool for pool in study.texts}
    for cell in filter(lambda cell: shares_most(study, cell), study.design.cells):
        found.append(
            f"{cell.samples} of the {_available(pools[cell.data], cell.seq_len)} windows of {cell.seq_len} tokens in "
            f"{cell.data} are drawn: the seeds share most of them and tell too little of chance. Their spread is too "
            "small, and choices are compared without that cell and its counterparts, or, where nothing else is left, "
            "not shown to differ (p = 1): use a longer text, or fewer windows."
        )
    return found


def overlaps(study: Study) -> list[str]:
    """Return a warning for each calibration text that shares too much with the evaluation text."""
    found = ((result.cell.data, result.overlap) for result in cells(study))
    return overlap.warnings(found, str(study.evaluation.get("name")))


def lead(study: Study) -> str:
    """Say the result in words: how far each choice moves perplexity, whether that was shown, and how far seeds do."""
    parts = []
    found = [effect for effect in effects(study) if effect.loss.change is not None]
    for factor, (name, _) in FACTORS.items():
        own = [effect for effect in found if effect.factor == factor]
        if own:
            most = max(abs(percent(effect.loss.change.mean.value)) for effect in own if effect.loss.change)
            parts.append(f"{name} by up to {most:.2f} % ({_shown(own)})")
    said = f"The choice of {'; of '.join(parts)}. " if parts else ""
    level = noise(study)
    if math.isfinite(level):
        said += f"The seed alone moves it by {percent(level):.2f} % (standard deviation within a cell)."
    return (
        said.strip().replace(" by up to", " moves perplexity by up to", 1)
        or "There is nothing to compare: one run a cell."
    )


def _shown(found: Sequence[Effect]) -> str:
    """Say by what measure any of the effects was shown."""
    loss, kl = (any(s.verdict not in (ALIKE, UNMEASURED) for s in shifts)
                for shifts in ([e.loss for e in found], [e.kl for e in found]))  # fmt: skip
    return "shown" if loss else "shown by KL only" if kl else ALIKE


def _shift(measure: Measure, before: list[list[StudyRun]], after: list[list[StudyRun]], *, apart: bool) -> Shift:
    """Return the shift of a value per window from runs of one level to those of another, both by seed.

    apart  whether seeds draw windows of their own; else p = 1
    """
    means = [[fmean(_window_means(runs, measure)) for runs in level] for level in (before, after)]
    by_seed = [theirs - ours for ours, theirs in zip(*means, strict=True)]
    change = _change(*(_window_means([run for runs in level for run in runs], measure) for level in (before, after)))
    if change is None:
        return Shift(None, math.nan, UNMEASURED)
    change = Change(change.mean, max(change.p, _t_test(by_seed)) if apart else 1.0)
    return Shift(change, spread(by_seed).deviation, significance.verdict(change))


def _change(before: Sequence[float], after: Sequence[float]) -> Change | None:
    if not all(map(math.isfinite, (*before, *after))):
        return None
    return significance.paired_change(before, after)


def _losses(run: StudyRun) -> Sequence[float]:
    return run.losses


def _kls(run: StudyRun) -> Sequence[float]:
    return run.kls or [math.nan] * len(run.losses)


def _window_means(runs: Sequence[StudyRun], measure: Measure) -> list[float]:
    """Return a value for each window, its mean over runs."""
    return [fmean(values) for values in zip(*map(measure, runs), strict=True)]


def _t_test(values: Sequence[float]) -> float:
    """Return the two-sided p-value of the mean being 0; 1 for one value, which tells nothing, or values all 0."""
    if len(values) < 2 or not any(values):
        return 1.0
    if len(set(values)) == 1:
        return 0.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)
