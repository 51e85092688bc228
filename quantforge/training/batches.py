"""Which windows of the training text make a step, and the parts that a step is worked on in."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts to train on, in rows of one length.

    ids        [batch, tokens] int64
    attention  [batch, tokens] bool, False for what is padding
    counted    [batch, tokens] bool, the tokens whose prediction counts; a row's first has none
    windows    which windows of the training text the rows come from
    """

    ids: Tensor
    attention: Tensor
    counted: Tensor
    windows: tuple[int, ...]

    @property
    def predictions(self) -> int:
        """Return how many predictions count."""
        return int(self.counted[:, 1:].sum())

    @property
    def tokens(self) -> int:
        """Return how many tokens are read, padding left out."""
        return int(self.attention.sum())

    def to(self, device: torch.device) -> Batch:
        """Return the same on `device`."""
        return Batch(self.ids.to(device), self.attention.to(device), self.counted.to(device), self.windows)


def batch_of_step(ids: Tensor, size: int, seed: int, step: int) -> Batch:
    """Return the windows of a step, counted from 0; they are settled by seed and step alone.

    ids   [windows, tokens] int64
    size  windows of a step, all of them different
    Each epoch takes the windows in a random order of its own, and leaves out the last that do not fill a step. Every
    token counts but the first of a window, which nothing predicts.
    Raises RecipeError if there are fewer windows than `size`.
    """
    if len(ids) < size:
        raise RecipeError(246, f"batch_size {size} is more than the {len(ids)} windows of the training text.")
    epoch, place = divmod(step, len(ids) // size)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed_of("windows", seed, epoch)))
    chosen = order[place * size : (place + 1) * size]
    counted = torch.ones(size, ids.shape[1], dtype=torch.bool)
    counted[:, 0] = False
    return Batch(ids.cpu()[chosen], torch.ones_like(counted), counted, tuple(chosen.tolist()))


def split(batch: Batch, parts: int) -> list[Batch]:
    """Return the rows of `batch` in order, in parts whose sizes differ by one row at most; none is empty."""
    parts = min(parts, len(batch.ids))
    rows = torch.tensor_split(torch.arange(len(batch.ids)), parts)
    return [
        Batch(batch.ids[at], batch.attention[at], batch.counted[at], tuple(batch.windows[i] for i in at.tolist()))
        for at in rows
    ]


def seed_of(what: str, *numbers: int) -> int:
    """Return a seed for what is random in one place, unrelated to those of other names and numbers."""
    return random.Random(" ".join([what, *map(str, numbers)])).getrandbits(63)
