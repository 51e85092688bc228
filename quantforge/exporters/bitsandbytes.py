"""bitsandbytes 4-bit: NF4 and FP4 in blocks of 64, which stock transformers loads where bitsandbytes is installed.

A weight X of [out, in] stands as

    X.weight                                 uint8 [⌈out · in / 2⌉, 1], two codes a byte, the first in the high nibble
    X.weight.absmax                          float32, the scale of each block of 64; or uint8, its code
    X.weight.quant_map                       float32 [16], the table
    X.weight.nested_absmax, nested_quant_map float32, the scales of 256 scales each, and the table of their codes
    X.weight.quant_state.bitsandbytes__nf4   uint8, a JSON object: shape, sizes of blocks, the mean of the scales

The library multiplies in float32 and rounds once, and so does `QTensor.dequantize` for flat blocks: the same weights,
bit for bit, in any dtype. Blocks of zeros have a scale of 0 in the file, as the library writes it.

Blocks that run across the ends of rows are read, but not written: release 0.50 computes other weights from them on CPUs
with AVX-512, and those of the library itself are as wrong there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.models import moe
from quantforge.numerics.blocks import Flat, counts, tiles
from quantforge.numerics.formats import NAMED, Format
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.plan import Plan
from quantforge.registry import register

_BLOCK = 64
_FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq")
# The nibble of each value in ascending order. FP4 has a sign bit, and orders magnitudes by its own exponent; of its two
# zeros the one without the sign is the lower.
_NIBBLES = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
_STATE = "quant_state.bitsandbytes__"
_PLAIN, _NESTED = ("absmax", "quant_map"), ("nested_absmax", "nested_quant_map")
_MAX_STATE = 4096  # bytes of JSON


@register("exporter", "bitsandbytes")
@dataclass(frozen=True)
class Bitsandbytes:
    """4-bit checkpoints of the bitsandbytes library."""

    def takes(self, plan: Plan) -> bool:
        """Tell whether all of `plan` is in one format of this container; low-rank factors go beside it."""
        found = {p.format for p in plan.layers.values()}
        floats = any(p.solver.extends_format or p.inputs for p in plan.layers.values())
        whole = all(p.shape[1] % _BLOCK == 0 for p in plan.layers.values())
        dense = not any(moe.expert_of(name) for name in plan.layers)
        return dense and len(found) == 1 and _name(found.pop()) is not None and whole and not floats

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be held exactly, and what could; None if it can."""
        first: Format | None = None
        for p in plan.layers.values():
            if p.transposed:
                return (
                    f"bitsandbytes checkpoints hold nn.Linear only, and {p.name} is a Conv1D; quantize in memory from "
                    "Python, or use `quantforge compare`, which needs no checkpoint."
                )
            if _name(p.format) is None:
                return f"bitsandbytes cannot hold {p.format} of {p.name}; {', '.join(_FORMATS)} it can."
            if moe.expert_of(p.name):
                return f"bitsandbytes checkpoints hold nn.Linear only, not experts such as {p.name}; native can."
            if p.inputs:
                return f"4 bits of bitsandbytes cannot hold the rounded inputs ({p.inputs}) of {p.name}; native can."
            if p.solver.extends_format:
                return f"bitsandbytes cannot hold the single floats of {p.name} beside its codes; native can."
            if p.shape[1] % _BLOCK:
                return (
                    f"the {p.shape[1]} inputs of {p.name} are no multiple of {_BLOCK}, and bitsandbytes reads blocks "
                    "across the ends of rows wrongly on some CPUs; native can hold them."
                )
            first = first or p.format
            if p.format != first:
                return f"bitsandbytes holds one format a model, not {first} and {p.format} of {p.name}; native can."
        return None

    def fix(self, fmt: Format) -> Format:
        """Return `fmt` as it is."""
        return fmt

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """Return the model's own dtype for floats; scales may have any."""
        return own, None

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name; factors stand elsewhere.

        The dtype in the state, in which the library hands out the weight, is float32, so that nothing is lost.
        """
        q = weight.base
        kind = q.format.grid.name
        state = {"quant_type": kind, "blocksize": _size(q.format), "dtype": "float32", "shape": list(q.shape)}
        parts = {"quant_map": _table(kind)}
        if isinstance(q.scale, QTensor):
            nested = q.scale
            assert nested.offset is not None
            parts["absmax"] = nested.codes.flatten()
            parts["nested_absmax"] = _absmax(nested)
            parts["nested_quant_map"] = torch.tensor(nested.format.grid.values)
            state |= {"nested_blocksize": _size(nested.format), "nested_dtype": "float32"}
            state["nested_offset"] = float(nested.offset)
        else:
            parts["absmax"] = _absmax(q)
        parts[f"{_STATE}{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {f"{name}.weight": _pack(q)} | {f"{name}.weight.{part}": value for part, value in parts.items()}

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config`; `linears` that the plan leaves alone are listed to be skipped."""
        fmt = next(iter(plan.layers.values())).format
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": fmt.grid.name,
            "bnb_4bit_use_double_quant": isinstance(fmt.scale, Format),
            "bnb_4bit_compute_dtype": str(plan.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [name for name in linears if name not in plan.layers],
        }

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Return the quantized layers by name, taking their tensors out of `tensors`, all those of a checkpoint.

        Raises ModelError for another format, and for tensors that are missing or do not fit together.
        """
        if config.get("quant_method") != "bitsandbytes" or config.get("load_in_4bit") is not True:
            raise ModelError(385, "the checkpoint is not in 4 bits of bitsandbytes, the ones that quantforge reads.")
        kinds = {f"{_STATE}{kind}": kind for kind in _NIBBLES}
        places: dict[str, dict[str, str]] = {}  # by layer, the full name of each part
        for key in tensors:
            name, cut, part = key.rpartition(".weight.")
            if cut and part in (*_PLAIN, *_NESTED, *kinds):
                places.setdefault(name, {})[part] = key
        layers = {}
        for name, keys in places.items():
            kind = next((kinds[part] for part in kinds if part in keys), None)
            if kind is None or f"{name}.weight" not in tensors:
                raise ModelError(386, f"{name} lacks its {'weight' if kind else 'quant_state'}; it is incomplete.")
            parts = {part: tensors.pop(key) for part, key in keys.items()}
            layers[name] = QWeight(_read(name, kind, tensors.pop(f"{name}.weight"), parts), {})
        return layers


def _name(fmt: Format) -> str | None:
    return next((name for name in _FORMATS if NAMED[name] == fmt), None)


def _size(fmt: Format) -> int:
    assert isinstance(fmt.block, Flat)
    return fmt.block.size


def _table(kind: str) -> Tensor:
    """Return the float32 values of the nibbles 0 to 15."""
    table = torch.empty(16)
    table[list(_NIBBLES[kind])] = torch.tensor(NAMED[kind].grid.values)
    return table


def _zero(fmt: Format) -> int:
    """Return the code of zero."""
    return int(fmt.grid.encode(torch.zeros(1)))


def _absmax(q: QTensor) -> Tensor:
    """Return the scales of flat blocks, 0 where all values of a block are."""
    assert isinstance(q.scale, Tensor)
    empty = (tiles(q.format.grid.decode(q.codes), q.format.block, fill=0.0) == 0).all(-1)
    return q.scale.masked_fill(empty, 0.0).flatten()


def _pack(q: QTensor) -> Tensor:
    """Return two codes a byte, the first in the high nibble; an odd number of them is filled up with a zero."""
    order = torch.tensor(_NIBBLES[q.format.grid.name], dtype=torch.uint8, device=q.codes.device)
    codes = q.codes.flatten()
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=_zero(q.format))
    pairs = order[codes.long()].view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def _unpack(packed: Tensor, fmt: Format, shape: tuple[int, int]) -> Tensor:
    order = torch.empty(16, dtype=torch.uint8)
    order[list(_NIBBLES[fmt.grid.name])] = torch.arange(16, dtype=torch.uint8)
    nibbles = torch.cat([packed >> 4, packed & 15], 1).flatten()[: shape[0] * shape[1]]
    return order[nibbles.long()].view(shape)


def _read(name: str, kind: str, packed: Tensor, parts: dict[str, Tensor]) -> QTensor:
    """Return one layer from its tensors, each checked against what the state says."""
    state = _read_state(name, kind, parts.pop(f"{_STATE}{kind}"))
    nested = "nested_offset" in state
    wanted = (*_PLAIN, *_NESTED) if nested else _PLAIN
    missing, extra = [p for p in wanted if p not in parts], [p for p in parts if p not in wanted]
    if missing or extra:
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(extra)} too"
        raise ModelError(386, f"{name} {what}, against its quant_state; the checkpoint is damaged.")
    fmt, shape = NAMED[f"{kind}-dq" if nested else kind], state["shape"]
    blocks = counts(shape, fmt.block)
    total = blocks[0] * blocks[1]
    held = {"weight": packed, **parts}
    sizes = {
        "weight": (torch.uint8, (-(-shape[0] * shape[1] // 2), 1)),
        "absmax": (torch.uint8 if nested else torch.float32, (total,)),
        "quant_map": (torch.float32, (16,)),
        "nested_absmax": (torch.float32, (-(-total // 256),)),
        "nested_quant_map": (torch.float32, (256,)),
    }
    for part, tensor in held.items():
        dtype, size = sizes[part]
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ModelError(388, f"{name}: {part} is {found}; a weight of {shape} has {dtype} {list(size)}.")
    maps = {"quant_map": _table(kind)}
    if isinstance(fmt.scale, Format):
        maps["nested_quant_map"] = torch.tensor(fmt.scale.grid.values)
    for part, table in maps.items():
        if not torch.equal(parts[part], table):
            raise ModelError(389, f"{name}: {part} is not the table of {kind} that bitsandbytes has.")
    scale: Tensor | QTensor
    codes = _unpack(packed, fmt, shape)
    if isinstance(fmt.scale, Format):
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        inner, places = _scales(name, parts["nested_absmax"], parts["absmax"].view(blocks), fmt.scale)
        scale = QTensor(fmt.scale, places, inner, offset=offset)
    else:
        scale, codes = _scales(name, parts["absmax"], codes, fmt)
    return QTensor(fmt, codes, scale)


def _scales(name: str, absmax: Tensor, codes: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Return scales and codes from the file, in which a scale may be 0: it becomes 1, and its codes those of zero."""
    shape = (codes.shape[0], codes.shape[1])
    if not bool((absmax.isfinite() & (absmax >= 0)).all()):
        raise ModelError(389, f"{name}: scales are negative or not finite; the checkpoint is damaged.")
    if not bool((absmax == 0).any()):
        return absmax.view(counts(shape, fmt.block)), codes
    empty = (absmax == 0).repeat_interleave(_size(fmt))[: codes.numel()].view(shape)
    scale = torch.where(absmax == 0, 1.0, absmax).view(counts(shape, fmt.block))
    return scale, codes.masked_fill(empty, _zero(fmt))


def _read_state(name: str, kind: str, stored: Tensor) -> dict[str, Any]:
    """Return the state of a layer: its "shape" as two numbers, and "nested_offset" if its scales are codes."""
    damaged = ModelError(387, f"{name}: its quant_state cannot be read; the checkpoint is damaged.")
    if stored.dtype != torch.uint8 or stored.dim() != 1 or len(stored) > _MAX_STATE:
        raise damaged
    try:
        state = json.loads(bytes(stored.tolist()))
    except (ValueError, RecursionError) as error:
        raise damaged from error
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise damaged
    sizes = {"blocksize": _BLOCK, "nested_blocksize": 256}
    other = [f"{key} {state[key]!r}" for key, size in sizes.items() if state.get(key, size) != size]
    if other or state.get("quant_type") != kind or "blocksize" not in state:
        found = ", ".join(other) or f"quant_type {state.get('quant_type')!r}"
        raise ModelError(387, f"{name} is stored with {found}; quantforge reads {kind} in blocks of 64, nested of 256.")
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:  # nor NaN
        raise damaged
    return {**state, "shape": (shape[0], shape[1])}
