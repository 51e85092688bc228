"""Codes of any width as bytes and back, without gaps: bit k of the stream is bit k mod 8 of byte k // 8."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 `codes` of any shape, each below 2^bits, as a stream of ceil(count · bits / 8) bytes."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.reshape(-1, 1) >> shifts) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    places = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=codes.device)
    return (stream * places).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` codes that `pack` put into bytes → [count] uint8; ValueError for another number of bytes."""
    if packed.dim() != 1 or packed.dtype != torch.uint8 or len(packed) != -(-count * bits // 8):
        raise ValueError(f"{count} codes of {bits} bits are not {tuple(packed.shape)} bytes")
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, None] >> shifts) & 1).flatten()[: count * bits].view(count, bits)
    places = torch.tensor([1 << i for i in range(bits)], dtype=torch.uint8, device=packed.device)
    return (stream * places).sum(1, dtype=torch.uint8)
