"""What the cells say: each with its standard error, ranked, and the sum over the parts beside the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from quantforge.evaluation.significance import Change, paired_change, standard_error
from quantforge.sensitivity.results import WHOLE, Cell, Section

Verdict = Literal["the sum is higher", "the sum is lower", "no difference shown"]

LEVEL = 0.05
NOT_SHOWN: Verdict = "no difference shown"
_RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One part in one format, as it stands in the ranked list. NaN stands for what is not known.

    kl, kl_error          mean over windows with its standard error, nats per token
    change, change_error  of the perplexity, quantized minus float, with its standard error
    moved                 whether the perplexity differs from the float model's by more than noise
    apart                 whether the KL differs from the next row's by more than noise; None in the last row
    """

    part: str
    kl: float
    kl_error: float
    change: float
    change_error: float
    moved: bool
    apart: bool | None


@dataclass(frozen=True)
class Total:
    """The sum over all parts beside the whole model quantized at once, in one format.

    kl, whole_kl      nats per token
    loss, whole_loss  changes of the mean cross-entropy, nats per token
    verdict           of the sum of the KL, against noise over windows
    """

    format: str
    kl: float
    whole_kl: float
    loss: float
    whole_loss: float
    verdict: Verdict

    @property
    def share(self) -> float:
        """Return the sum of the KL as a share of the whole model's; NaN where that is 0."""
        return self.kl / self.whole_kl if self.whole_kl else math.nan


def ranked(section: Section, fmt: str) -> list[Row]:
    """Return the measured parts in one format, the one with the highest KL first; what is not finite leads."""
    cells = [cell for cell in section.cells if cell.format == fmt and cell.part != WHOLE]
    cells.sort(key=lambda cell: -kl(cell) if math.isfinite(kl(cell)) else -math.inf)
    return [_row(section, cell, after) for cell, after in zip(cells, [*cells[1:], None], strict=True)]


def kl(cell: Cell) -> float:
    """Return the mean KL of a cell's windows, nats per token."""
    return math.fsum(cell.kls) / len(cell.kls)


def change(section: Section, cell: Cell) -> float:
    """Return the perplexity of a cell minus the float model's."""
    return _perplexity(cell.losses) - _perplexity(section.losses)


def total(section: Section, fmt: str) -> Total | None:
    """Compare the sum over the parts with the whole model; None while any of these cells is not known."""
    whole = section.cell(WHOLE, fmt)
    cells = [section.cell(part.name, fmt) for part in section.parts]
    found = [cell for cell in cells if cell is not None]
    if whole is None or len(found) < len(cells):
        return None
    if not all(_finite(cell.losses) and _finite(cell.kls) for cell in (whole, *found)):
        return None
    kls = [math.fsum(values) for values in zip(*(cell.kls for cell in found), strict=True)]
    test = _changed(whole.kls, kls)
    beyond = test is not None and test.p < LEVEL
    higher = math.fsum(kls) > math.fsum(whole.kls)
    verdict: Verdict = ("the sum is higher" if higher else "the sum is lower") if beyond else NOT_SHOWN
    level = _mean(section.losses)
    losses = math.fsum(_mean(cell.losses) - level for cell in found)
    return Total(fmt, _mean(kls), kl(whole), losses, _mean(whole.losses) - level, verdict)


def _row(section: Section, cell: Cell, after: Cell | None) -> Row:
    moved, apart = _changed(section.losses, cell.losses), None if after is None else _changed(after.kls, cell.kls)
    level = _perplexity(cell.losses)
    spread = [one - other for one, other in zip(cell.losses, section.losses, strict=True)]
    return Row(
        cell.part,
        kl(cell),
        standard_error(cell.kls) if _finite(cell.kls) else math.nan,
        change(section, cell),
        level * standard_error(spread) if _finite(spread) else math.nan,
        moved is None or moved.p < LEVEL,
        None if after is None else apart is None or apart.p < LEVEL,
    )


def _changed(before: Sequence[float], after: Sequence[float]) -> Change | None:
    """Compare two lists of windows; None where one of them is not finite, which needs no test."""
    if not (_finite(before) and _finite(after)):
        return None
    return paired_change(before, after, LEVEL, _RESAMPLES)


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _perplexity(losses: Sequence[float]) -> float:
    if not losses:
        return math.nan
    mean = _mean(losses)
    return math.exp(mean) if mean < 700 else math.inf
