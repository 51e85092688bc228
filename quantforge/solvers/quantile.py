"""Quantile quantization: codes where a layer's own weights are, found by sorting them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantforge.numerics import grids
from quantforge.numerics.blocks import spread, tiles
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import IntGrid, quantile_grid
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import fit, quantize
from quantforge.registry import register

_SAMPLE = 1 << 20  # weights from which quantiles are taken, evenly spaced


@register("solver", "quantile")
@dataclass(frozen=True)
class Quantile:
    """Quantile quantization (Dettmers et al., NeurIPS 2023, arXiv:2305.14314, equation 4); needs no data.

    Every code of the table is the middle between two neighbouring quantiles of the weights, each taken relative to the
    largest of its block, so that all codes are used about equally often. The table is the layer's own and is stored
    with it. With the normal distribution's quantiles instead, the table is that of the format, such as NF4.

    codes  empirical: quantiles of the layer's weights; normal: the format's own table
    """

    codes: str = "empirical"

    needs = ()
    takes_ranges = False
    by_row = False

    def __post_init__(self) -> None:
        if self.codes not in ("empirical", "normal"):
            raise ValueError(f"codes are empirical or normal, not {self.codes!r}")

    @property
    def extends_format(self) -> bool:
        """Tell whether the layer's table is its own."""
        return self.codes == "empirical"

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return why `fmt` does not do; None if it is a symmetric table."""
        if isinstance(fmt.grid, IntGrid) or not fmt.symmetric:
            return f"quantiles need a table of values, which {fmt} is not; nf4-f64 is one, with any number of bits."
        return None

    def solve(self, problem: Problem) -> QWeight:
        """Choose a table for `problem.weight` [out, in] and round to it."""
        weight, fmt = problem.weight, problem.format
        if self.codes == "empirical":
            fmt = replace(fmt, grid=self._table(problem))
        return QWeight(quantize(weight, fit(weight, fmt), fmt), {})

    def _table(self, problem: Problem) -> grids.Grid:
        weight, fmt = problem.weight, problem.format
        shape = (weight.shape[0], weight.shape[1])
        top = spread(tiles(weight.abs(), fmt.block).amax(-1), shape, fmt.block)
        relative = (weight / top.clamp(min=torch.finfo(top.dtype).tiny)).flatten()
        ordered = relative[:: len(relative) // _SAMPLE | 1].sort().values

        def quantile(p: float) -> float:
            place = p * (len(ordered) - 1)
            low = int(place)
            high = min(low + 1, len(ordered) - 1)
            return float(torch.lerp(ordered[low], ordered[high], place - low))

        return quantile_grid(fmt.grid.bits, quantile)
