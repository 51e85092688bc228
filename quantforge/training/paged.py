"""Optimizer states in memory-mapped files, of which only what a step works on lies in memory.

A step of Adam reads and writes the states of each parameter once, one after the other, so memory need only hold those
of one. What has been worked on is given back to the kernel, which keeps it in its file cache as long as nothing else
needs the memory, and writes it to the disk otherwise. So the process's peak is that of its weights, gradients and
activations and of the largest parameter's states. (QLoRA, arXiv:2305.14314, pages between a GPU and main memory to the
same end.) Writing a checkpoint reads all of them, but the kernel may take back what has been read at any time; resuming
reads them into memory once. Where the folder lies in memory, as /tmp may, nothing is gained.

The files lose their names as soon as they are made, so nothing is left of them, however the process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantforge.errors import ResourceError


@dataclass(frozen=True, eq=False)
class Page:
    """Tensors that lie one after the other in a mapped file; it goes with the last of them."""

    tensors: dict[str, Tensor]
    memory: mmap.mmap

    def rest(self) -> None:
        """Let the kernel take the memory back; the next use reads what was written."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)


def new_page(folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Page:
    """Map a new file in `folder` that holds tensors of these shapes and dtypes, all 0.

    Raises ResourceError if the folder cannot be written to or has no room for them.
    """
    places, size = {}, 0
    for name, (shape, dtype) in shapes.items():
        places[name] = size
        size += -(-torch.Size(shape).numel() * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk is an error here, and a crash later
            memory = mmap.mmap(file.fileno(), max(size, 1))
    except OSError as error:
        why = error.strerror or str(error)
        raise ResourceError(
            540,
            f"{folder} cannot hold {size:,} bytes of optimizer states: {why}; adamw8bit needs a quarter or no file.",
        ) from error
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        count = torch.Size(shape).numel()
        flat = (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=places[name])
            if count
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
    return Page(tensors, memory)
