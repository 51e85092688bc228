"""Losses of single tokens worked out a few tokens at a time, forwards and backwards.

A vocabulary of 256k makes one tensor of a batch's logits a gigabyte. So the counted tokens are taken out a chunk at a
time, 16 MiB a tensor, and the backward pass works the gradient out anew: beside the logits themselves it makes one
tensor as large as them, their gradient. Tokens that the mask leaves out are never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantforge.errors import DataError
from quantforge.evaluation.divergence import chunk_tokens


@dataclass(frozen=True)
class Terms:
    """A loss of single tokens, from their logits [n, vocab] and their places [n] among all tokens counted in a row.

    values    → the losses [n]
    gradient  → the gradient of each token's loss with respect to its logits [n, vocab]
    """

    values: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def per_token(student: Tensor, terms: Terms, mask: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """Return the loss of each token [...] of logits [..., vocab], 0 where the mask leaves it out; a few at a time."""
    places = places_of(mask, student.shape[:-1], student.device)
    found: Tensor = _PerToken.apply(student, places, chunk or chunk_tokens(student.shape[-1]), terms)  # type: ignore[no-untyped-call]
    return found


def mean(rows: Tensor, mask: Tensor | None, count: int | None) -> Tensor:
    """Return the sum of the tokens' losses divided by `count`, or by how many the mask counts.

    Raises DataError for none; with a count given, a micro-batch without tokens adds 0.
    """
    tokens = count if count is not None else rows.numel() if mask is None else int(mask.bool().sum())
    if tokens < 1:
        raise DataError(
            471, "no token counts: the mask is empty." if count is None else f"{count} tokens have no mean."
        )
    return rows.sum() / tokens


def rows_at(x: Tensor, places: Tensor, lead: Sequence[int]) -> Tensor:
    """Return what `x` [*lead, ...] has at places counted in a row, on their device; only that is copied."""
    return x[torch.unravel_index(places.to(x.device), lead)].to(places.device)


def places_of(mask: Tensor | None, lead: torch.Size, device: torch.device) -> Tensor:
    """Return where the counted tokens are [n], counted in a row."""
    if mask is None:
        return torch.arange(math.prod(lead), device=device)
    check_shape("the mask", mask, lead)
    return mask.to(device).flatten().nonzero()[:, 0]


def precision(x: Tensor) -> torch.dtype:
    """Return the dtype in which `x` is compared: float32, or float64 of float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_shape(what: str, found: Tensor, expected: Sequence[int]) -> None:
    """Raise DataError unless the shape of `found` is the expected one."""
    if found.shape != torch.Size(expected):
        raise DataError(470, f"{what} of shape {list(found.shape)} do not go with the student's {list(expected)}.")


class _PerToken(torch.autograd.Function):
    """Gives the loss of each token, and works the gradient out anew rather than keep anything of a chunk."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, places: Tensor, step: int, terms: Terms) -> Tensor:
        ctx.save_for_backward(student, places)
        ctx.step, ctx.terms = step, terms
        found = student.new_zeros(student.shape[:-1], dtype=precision(student))
        for part in torch.split(places, step):
            where = torch.unravel_index(part, student.shape[:-1])
            found[where] = terms.values(student[where].to(found.dtype), part)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        student, places = ctx.saved_tensors
        found = torch.zeros_like(student)
        for part in torch.split(places, ctx.step):
            where = torch.unravel_index(part, student.shape[:-1])
            rows = ctx.terms.gradient(student[where].to(upstream.dtype), part)
            found[where] = rows.mul_(upstream[where][:, None]).to(found.dtype)
        return found, None, None, None
