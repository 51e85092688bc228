"""The better of several results, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from quantforge.numerics.formats import E8M0
from quantforge.numerics.problem import Problem
from quantforge.numerics.qtensor import QTensor, quantize
from quantforge.numerics.ranges import Range


def keep_better_rows(problem: Problem, solved: QTensor, candidates: list[Range]) -> tuple[QTensor, int]:
    """Replace each row of `solved` by plain rounding under one of `candidates` where that has less loss.

    Returns the result and how many rows were replaced. Where rows share a scale, they are replaced together.
    """
    fmt = problem.format
    alone = fmt.row_unit == 1
    least = problem.row_losses(solved.dequantize(torch.float32))
    least = least if alone else least.sum(0, keepdim=True)
    best, replaced = solved, torch.zeros_like(least, dtype=torch.bool)
    for r in candidates:
        rounded = quantize(problem.weight, r, fmt)
        losses = problem.row_losses(rounded.dequantize(torch.float32))
        losses = losses if alone else losses.sum(0, keepdim=True)
        better = losses < least
        least = torch.where(better, losses, least)
        replaced |= better
        if better.any():
            best = choose_rows(better[:, None], rounded, best)
    return best, int(replaced.sum())


def choose_rows(rows: Tensor, a: QTensor, b: QTensor) -> QTensor:
    """Take the rows of `a` where `rows` [out or 1, 1] is true, else those of `b`."""
    if rows.numel() == 1:
        return a if bool(rows) else b
    zero = None if a.zero is None or b.zero is None else _choose(rows, a.zero, b.zero)
    return QTensor(a.format, torch.where(rows, a.codes, b.codes), _choose(rows, a.scale, b.scale), zero)


def _choose(rows: Tensor, a: Tensor | QTensor, b: Tensor | QTensor) -> Tensor | QTensor:
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return choose_rows(rows, a, b)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    if a.dtype == E8M0:  # torch knows no choice between powers of two
        return torch.where(rows, a.view(torch.uint8), b.view(torch.uint8)).view(E8M0)
    return torch.where(rows, a, b)
