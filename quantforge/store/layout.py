"""How safetensors lays a file out: a length, a header of JSON, and the bytes of the tensors in an order of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

Facts = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape

_LETTERS = {"float": "F", "int": "I", "uint": "U", "complex": "C"}
_NAMES = {
    torch.bool: "BOOL",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32"),
    *("C64", "F64", "I64", "U64"),
)


def ordered(tensors: Mapping[str, Facts]) -> list[str]:
    """Return names in the order of their bytes in safetensors' own files: the widest dtype first, then by name."""
    return sorted(tensors, key=lambda name: (-_ORDER.index(letters(tensors[name][0])), name))


def header(tensors: Mapping[str, Facts]) -> bytes:
    """Return what a safetensors file of these tensors begins with: the length of its header, and its header."""
    listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in ordered(tensors):
        dtype, shape = tensors[name]
        end = at + nbytes(tensors[name])
        listed[name] = {"dtype": letters(dtype), "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes(facts: Facts) -> int:
    """Return the bytes of a tensor's data."""
    return facts[0].itemsize * torch.Size(facts[1]).numel()


def letters(dtype: torch.dtype) -> str:
    """Return what safetensors calls a dtype: "BF16"."""
    text = str(dtype).removeprefix("torch.")
    return _NAMES.get(dtype) or _LETTERS[text.rstrip("0123456789")] + text.lstrip("abcdefghijklmnopqrstuvwxyz")
