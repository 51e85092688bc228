"""Rounding with a few whole input channels kept in float: what activation-aware methods start from."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.numerics import ranges
from quantforge.numerics.formats import Format
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import fit, quantize
from quantforge.numerics.residuals import Columns
from quantforge.registry import register

PICKS = ("activation", "weight", "random")


@register("solver", "spare")
@dataclass(frozen=True)
class Spare:
    """Round to nearest, but keep a share of the input channels in float (Lin et al., arXiv:2306.00978, table 1).

    The motive of AWQ: a hundredth of the channels, picked by how large their inputs are, is worth more than the same
    share picked by their weights, or at random.

    share  of the input channels of each layer that stay in float, in 16 bits
    pick   activation: the largest mean |x|; weight: the largest norm of the column; random: drawn
    range  how the range of the others is found: minmax, percentile or mse
    seed   of the draw, which is each layer's own
    """

    share: float = 0.01
    pick: str = "activation"
    range: str = "minmax"
    seed: int = 0

    extends_format = True
    takes_ranges = False
    by_row = False

    def __post_init__(self) -> None:
        ranges.rule(self.range)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie between 0 and 1, not {self.share}; 0.01 is usual")
        if self.pick not in PICKS:
            raise ValueError(f"pick is activation, weight or random, not {self.pick!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected."""
        return ("magnitude",) if self.pick == "activation" else ()

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return None: any format will do."""
        return None

    def solve(self, problem: Problem) -> QWeight:
        """Round `problem.weight` [out, in], and keep the picked columns."""
        weight, fmt = problem.weight, problem.format
        count = round(self.share * weight.shape[1])
        index = self._score(problem).argsort(descending=True, stable=True)[:count].sort().values
        rest = weight.index_fill(1, index, 0.0)  # what is kept in float widens no range
        base = quantize(weight, fit(rest, fmt, self.range), fmt)
        if not count:
            return QWeight(base, {"kept_columns": 0})
        dtype = fmt.scale if isinstance(fmt.scale, torch.dtype) and fmt.scale.itemsize == 2 else torch.bfloat16
        kept = Columns(index.int(), weight[:, index].to(dtype))
        return QWeight(base, {"kept_columns": count}, (kept,))

    def _score(self, problem: Problem) -> Tensor:
        weight = problem.weight
        if self.pick == "weight":
            norms: Tensor = weight.norm(dim=0)
            return norms
        if self.pick == "random":
            own = torch.Generator().manual_seed(zlib.crc32(problem.name.encode()) ^ self.seed)
            return torch.rand(weight.shape[1], generator=own).to(weight.device)
        if problem.magnitude is None:
            raise ValueError(f"{problem.name}: the size of its inputs was not collected")
        return problem.magnitude
