"""Round to nearest: the baseline of every method."""

from __future__ import annotations

from dataclasses import dataclass

from quantforge.numerics import ranges
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import quantize
from quantforge.registry import register


@register("solver", "rtn")
@dataclass(frozen=True)
class RTN:
    """Round each weight to the nearest value of its block's range; needs no data.

    range  how a block's range is found: minmax, percentile or mse
    """

    range: str = "minmax"

    needs = ()

    def __post_init__(self) -> None:
        ranges.rule(self.range)

    def solve(self, problem: Problem) -> QWeight:
        """Round `problem.weight` [out, in] in `problem.format`."""
        r = ranges.rule(self.range)(problem.weight, problem.format)
        return QWeight(quantize(problem.weight, r, problem.format), {})
