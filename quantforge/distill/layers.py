"""Losses between what the layers of a student and of its teacher give: squared errors of hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quantforge.distill.tokens import check_shape, mean, places_of, precision
from quantforge.errors import DataError


def hidden_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    projection: Tensor | None = None,
    relative: bool = False,
    count: int | None = None,
) -> Tensor:
    """Return the squared error between hidden states [..., width], the mean over width and tokens, in float32.

    projection  [teacher's width, student's width], where these differ (FitNets, arXiv:1412.6550)
    relative    each token's error is divided by the mean square of the teacher's state there: a student that gives
                zeros then has 1, and micro-batches add up
    Raises DataError if the shapes differ or, unless `count` is given, no token counts.
    """
    kept = student.reshape(-1, student.shape[-1])[places_of(mask, student.shape[:-1], student.device)]
    kept = kept.to(precision(student))
    kept = kept if projection is None else F.linear(kept, projection.to(kept.dtype))
    check_shape("the teacher's hidden states", teacher, (*student.shape[:-1], kept.shape[-1]))
    goal = teacher.detach().reshape(-1, teacher.shape[-1])[places_of(mask, teacher.shape[:-1], teacher.device)]
    goal = goal.to(kept.dtype)
    rows = (kept - goal).square().mean(-1)
    if relative:
        rows = rows / goal.square().mean(-1).clamp_min(torch.finfo(goal.dtype).tiny)
    return mean(rows, None, count)


def layerwise_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    relative: bool = False,
    count: int | None = None,
) -> Tensor:
    """Return the mean of `hidden_loss` over layers: what each block gives against what the teacher's gives.

    With each block fed by the teacher's output of the block before it, this is the loss of layer-by-layer distillation
    (ZeroQuant, arXiv:2206.01861, section 4.3), and no block's gradient reaches another.
    students  of each layer [..., width]; teachers: of the layers that `matching_layers` pairs with them
    """
    if len(students) != len(teachers) or not students:
        raise DataError(470, f"{len(students)} layers of the student do not pair with {len(teachers)} of the teacher.")
    pairs = zip(students, teachers, strict=True)
    return torch.stack([hidden_loss(s, t, mask, relative=relative, count=count) for s, t in pairs]).mean()


def matching_layers(students: int, teachers: int) -> list[int]:
    """Return for each of the student's layers the teacher's at the same share of its depth; the last is the last."""
    if not 0 < students <= teachers:
        raise DataError(470, f"a student of {students} layers cannot be paired with a teacher of {teachers}.")
    return [(i + 1) * teachers // students - 1 for i in range(students)]
