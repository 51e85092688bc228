"""A matrix as the blocks that share a scale, and back.

`block` is (rows, columns) with None for the whole axis: (1, 64) groups along the input, (1, None) rows (a channel of a
weight, a token of an activation), (None, None) the tensor. A last block may be smaller than the others. `Flat(64)` cuts
the matrix as it lies in memory, row after row, across the ends of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Flat:
    """Blocks of `size` elements of the matrix read row by row; the last may be short."""

    size: int


Block = tuple[int | None, int | None] | Flat


def within_rows(shape: tuple[int, int], block: Block) -> tuple[int | None, int | None] | None:
    """Return `block` as (rows, columns), which flat blocks are only where their size divides a row; else None."""
    if not isinstance(block, Flat):
        return block
    return (1, block.size) if shape[1] % block.size == 0 else None


def extents(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Return the block's rows and columns for a matrix of `shape`, with None resolved, and none beyond the matrix.

    ValueError for flat blocks that run across the ends of rows.
    """
    found = within_rows(shape, block)
    if found is None:
        raise ValueError(f"{block} does not divide rows of {shape[1]}, so its blocks are no rectangles")
    # a block may be said to be larger than any memory: padding up to it would take as much
    high, wide = max(shape[0], 1), max(shape[1], 1)
    return min(found[0] or high, high), min(found[1] or wide, wide)


def counts(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Return how many blocks a matrix of `shape` has along rows and along columns; (1, n) where they are flat."""
    if within_rows(shape, block) is None:
        assert isinstance(block, Flat)
        return 1, -(-shape[0] * shape[1] // block.size)
    rows, cols = extents(shape, block)
    return -(-shape[0] // rows), -(-shape[1] // cols)


def tiles(x: Tensor, block: Block, *, fill: float | None = None) -> Tensor:
    """Cut `x` [rows, cols] into blocks → [row blocks, column blocks, elements of a block].

    Where the last block is short it is filled up with `fill`, or by repeating its last row or column (which leaves
    minimum and maximum as they are).
    """
    shape = (x.shape[0], x.shape[1])
    if within_rows(shape, block) is None:
        assert isinstance(block, Flat)
        x, block = x.reshape(1, -1), (1, block.size)
        shape = (1, x.shape[1])
    rows, cols = extents(shape, block)
    down, across = counts(shape, block)
    pad = (0, across * cols - shape[1], 0, down * rows - shape[0])
    if any(pad):
        x = F.pad(x[None], pad, mode="replicate")[0] if fill is None else F.pad(x, pad, value=fill)
    return x.reshape(down, rows, across, cols).transpose(1, 2).reshape(down, across, rows * cols)


def spread(stat: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """Repeat a value a block, `stat` [row blocks, column blocks], over the matrix → `shape`, to read only."""
    if within_rows(shape, block) is None:
        assert isinstance(block, Flat)
        size = min(block.size, shape[0] * shape[1])
        return stat.flatten().repeat_interleave(size)[: shape[0] * shape[1]].view(shape)
    rows, cols = extents(shape, block)
    if stat.shape[0] == 1:  # a view where one value serves a whole axis
        stat = stat.expand(shape[0], -1)
    elif rows > 1:
        stat = stat.repeat_interleave(rows, 0)[: shape[0]]
    if stat.shape[1] == 1:
        stat = stat.expand(-1, shape[1])
    elif cols > 1:
        stat = stat.repeat_interleave(cols, 1)[:, : shape[1]]
    return stat
