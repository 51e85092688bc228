"""Round to nearest: the baseline of every method."""

from __future__ import annotations

from dataclasses import dataclass

from quantforge.numerics import ranges
from quantforge.numerics.formats import Format
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import fit, quantize
from quantforge.registry import register
from quantforge.solvers.rows import keep_better_rows


@register("solver", "rtn")
@dataclass(frozen=True)
class RTN:
    """Round each weight to the nearest value of its block's range; needs no data, unless the range rule does.

    range  how a block's range is found: minmax, percentile, mse, or hessian (squared error weighted by diag(H))
    """

    range: str = "minmax"

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected."""
        return ("hessian",) if self.range == "hessian" else ()

    def __post_init__(self) -> None:
        ranges.rule(self.range)

    extends_format = False
    takes_ranges = True
    by_row = True

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return None: any format will do."""
        return None

    def solve(self, problem: Problem) -> QWeight:
        """Round `problem.weight` [out, in] in `problem.format`."""
        importance = None if problem.hessian is None else problem.hessian.diagonal()
        weight, fmt = problem.weight, problem.format
        r = problem.range or fit(weight, fmt, self.range, importance)
        rounded = quantize(weight, r, fmt)
        if problem.range is not None or self.range != "hessian" or problem.hessian is None:
            return QWeight(rounded, {})
        usable = problem if bool(problem.hessian.isfinite().all()) else Problem(problem.name, weight, fmt)
        best, kept = keep_better_rows(usable, rounded, [fit(weight, fmt)])  # diag(H) is not all of H
        return QWeight(best, {"rows_rounded": kept})
