"""Formats: what may be stored. A grid, the block that shares a scale, and how scale and zero point are kept."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantforge.numerics import grids
from quantforge.numerics.blocks import Block, Flat, counts
from quantforge.numerics.grids import Grid, IntGrid

E8M0 = torch.float8_e8m0fnu  # powers of two, of which only the exponent is stored (OCP microscaling, revision 1.0)
SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "e8m0": E8M0}
_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}
_WHERE = {(None, None): "tensor", (1, None): "channel", (None, 1): "column"}


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: x ≈ scale · (grid[code] − zero_point), one scale and zero point a block.

    grid       the values a code can mean
    block      (rows, columns) sharing a scale, None being the whole axis; or Flat blocks
    symmetric  True: no zero point
    scale      the dtype in which scales are stored, or the format of the matrix of scales; codes are chosen against the
               stored value; but against the unquantized one where the nested format is centered, as QLoRA's is
    zero       asymmetric formats only. None: one integer of the grid a block, in as many bits as a code. A dtype: a
               real number in units of a code. A format: such real numbers, quantized
    centered   the mean of the matrix is taken off before all else, and stored in float32
    minimum    where `zero` is a dtype: what is stored in it is no zero point but the value of the lowest code, in units
               of the weight, as in GGUF: x ≈ scale · (grid[code] − grid low) + minimum
    """

    grid: Grid
    block: Block
    symmetric: bool = False
    scale: torch.dtype | Format = torch.float32
    zero: torch.dtype | Format | None = None
    centered: bool = False
    minimum: bool = False

    def with_scale(self, dtype: torch.dtype) -> Format:
        """Return this format with scales, and real zero points, stored in `dtype`.

        Scales that are quantized themselves or powers of two stay, and so do those of flat blocks and of narrow
        integers, which bitsandbytes keeps in float32.
        """
        own = isinstance(self.block, Flat) or self.grid.name.startswith("narrow")
        if isinstance(self.scale, Format) or own or self.scale == E8M0:
            return self
        return replace(self, scale=dtype, zero=dtype if isinstance(self.zero, torch.dtype) else self.zero)

    @property
    def row_unit(self) -> int | None:
        """Return how many rows are stored independently of all others; None if no rows are."""
        if self.centered or isinstance(self.block, Flat) or self.block[0] is None:
            return None
        unit = self.block[0]
        for part in (self.scale, self.zero):
            if isinstance(part, Format):
                inner = part.row_unit
                if inner is None:
                    return None
                unit = math.lcm(unit, self.block[0] * inner)
        return unit

    @property
    def cut_unit(self) -> int | None:
        """Return how many rows can be cut from the others if a scale of all scales goes along; None if no rows can."""
        nested = isinstance(self.scale, Format) and self.scale.block == (None, None)
        return replace(self, scale=torch.float32).row_unit if nested else self.row_unit

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Return the narrow floats of torch in which its codes or scales are stored."""
        own = {_FLOATS[self.grid.name]} if self.grid.name in _FLOATS else set()
        own |= {E8M0} if self.scale == E8M0 else set()
        return frozenset(own | (self.scale.dtypes if isinstance(self.scale, Format) else set()))

    def nbits(self, shape: tuple[int, int]) -> int:
        """Count the bits of a matrix of `shape`: codes, scales and zero points; a container may pad them."""
        blocks = counts(shape, self.block)
        total = shape[0] * shape[1] * self.grid.bits + _bits(self.scale, blocks) + 32 * self.centered
        if not self.symmetric:
            total += blocks[0] * blocks[1] * self.grid.bits if self.zero is None else _bits(self.zero, blocks)
        return total + (32 * len(self.grid.values) if self.grid.name == grids.CUSTOM else 0)

    @property
    def short(self) -> str:
        """Return the notation without the dtypes that a plan sets: `int4-g64-asym`, `nf4-f64-dq`.

        "zero" stands for real zero points, "min" for minima.
        """
        kind = ("sym" if self.symmetric else "asym",) if isinstance(self.grid, IntGrid) else ()
        kept = ("dq",) if isinstance(self.scale, Format) else ("e8m0",) if self.scale == E8M0 else ()
        real = (self._real,) if isinstance(self.zero, torch.dtype) else ()
        return "-".join((self.grid.name, _where(self.block), *kind, *kept, *real))

    def __str__(self) -> str:
        zero = f"-{self._real}-{_kept(self.zero)}" if self.zero is not None else ""
        text = f"{self.grid.name}-{_where(self.block)}-{'sym' if self.symmetric else 'asym'}-{_kept(self.scale)}{zero}"
        return text + ("-centered" if self.centered else "")

    @property
    def _real(self) -> str:
        return "min" if self.minimum else "zero"


def _bits(kept: torch.dtype | Format, shape: tuple[int, int]) -> int:
    return kept.nbits(shape) if isinstance(kept, Format) else shape[0] * shape[1] * kept.itemsize * 8


def _kept(kept: torch.dtype | Format) -> str:
    return f"({kept})" if isinstance(kept, Format) else _DTYPE_NAMES[kept]


def _where(block: Block) -> str:
    if isinstance(block, Flat):
        return f"f{block.size}"
    return _WHERE.get(block) or (f"g{block[1]}" if block[0] == 1 else f"b{block[0]}x{block[1]}")


# What bitsandbytes calls nested or double quantization: block maxima, their mean taken off, in 8 bits of its own table
_DOUBLE = Format(grids.dynamic8(), Flat(256), True, centered=True)
# SpQR, section 4.2: scales and zero points of 16 neighbouring rows in 3 bits
_BILEVEL = Format(grids.int_grid(3), (16, 1), scale=torch.float16, zero=torch.float16)

NAMED = {
    "nf4": Format(grids.nf_grid(4), Flat(64), True),
    "nf4-dq": Format(grids.nf_grid(4), Flat(64), True, _DOUBLE),
    "int4-f64-sym-dq": Format(grids.int_grid(4), Flat(64), True, _DOUBLE),
    "e2m1-dq": Format(grids.minifloat(2, 1), Flat(64), True, _DOUBLE),
    "fp4": Format(grids.bnb_fp4(), Flat(64), True),
    "fp4-dq": Format(grids.bnb_fp4(), Flat(64), True, _DOUBLE),
    "hqq3-g64": Format(grids.int_grid(3), (1, 64), zero=torch.float32),
    "llm-int8": Format(grids.narrow_grid(8), (1, None), True),
    "fp8-block": Format(grids.minifloat(4, 3), (128, 128), True),
    "mxfp4": Format(grids.minifloat(2, 1), (1, 32), True, E8M0),
    "mxfp8": Format(grids.minifloat(4, 3), (1, 32), True, E8M0),
    # the one scale of the whole is a power of two, so that its reciprocal, which files hold, is exact
    "nvfp4": Format(grids.minifloat(2, 1), (1, 16), True, Format(grids.minifloat(4, 3), (None, None), True, E8M0)),
    # ZeroQuant-FP, section 3: a scale a group that differs from the row's largest by a shift (M2)
    "fp4-m2-g64": Format(grids.minifloat(2, 1), (1, 64), True, Format(grids.shift_grid(8), (1, None), True)),
    "spqr3-g16": Format(grids.int_grid(3), (1, 16), scale=_BILEVEL, zero=_BILEVEL),
}


def parse(text: str) -> Format:
    """Read a notation such as `int4-g64-asym`, `nf4-g64` or `int8-channel-sym-bf16`, or a name; ValueError if it is
    none.

    The forms are GRID-(gN|fN|bNxM|channel|token|tensor)[-sym|-asym][-fp32|-bf16|-fp16|-e8m0][-zero-DTYPE|-min-DTYPE],
    where GRID is intB, nfK or another of `quantforge formats`; symmetric and fp32 if left out. The names are those of
    `NAMED`.
    """
    if text in NAMED:
        return NAMED[text]
    m = re.fullmatch(
        r"([a-z]+[a-z0-9]*)-(?:g([1-9]\d*)|f([1-9]\d*)|b([1-9]\d*)x([1-9]\d*)|(channel|token|tensor))"
        r"(?:-(sym|asym))?(?:-(fp32|bf16|fp16|e8m0))?(?:-(zero|min)-(fp32|bf16|fp16))?",
        text,
    )
    grid = grids.find(m[1]) if m else None
    if not m or grid is None:
        raise ValueError(f"{text!r} is no format; write for example int4-g64-asym, int8-channel-sym or nf4-g64")
    _, group, flat, rows, cols, whole, kind, scale, real, zero = m.groups()
    block: Block = (None if whole == "tensor" else 1, None)
    if flat:
        block = Flat(int(flat))
    elif group or rows:
        block = (int(rows or 1), int(group or cols))
    symmetric = kind != "asym" if kind else True
    if scale == "e8m0" and not symmetric:
        raise ValueError(f"{text!r} is no format: scales that are powers of two go with symmetric formats")
    if symmetric and zero:
        raise ValueError(f"{text!r} is no format: what is symmetric has no zero points")
    if not symmetric and not isinstance(grid, IntGrid):
        raise ValueError(f"{text!r} is no format: only integer grids have zero points")
    kept = SCALE_DTYPES[zero] if zero else None
    return Format(grid, block, symmetric, SCALE_DTYPES[scale or "fp32"], kept, minimum=real == "min")


def to_json(fmt: Format) -> dict[str, Any]:
    """Return all of `fmt` as plain JSON values, which `from_json` reads back."""
    block = {"flat": fmt.block.size} if isinstance(fmt.block, Flat) else list(fmt.block)
    grid: Any = list(fmt.grid.values) if fmt.grid.name == grids.CUSTOM else fmt.grid.name
    return {
        "grid": grid,
        "block": block,
        "symmetric": fmt.symmetric,
        "scale": _kept_json(fmt.scale),
        "zero": None if fmt.zero is None else _kept_json(fmt.zero),
        "centered": fmt.centered,
        "minimum": fmt.minimum,
    }


def _kept_json(kept: torch.dtype | Format) -> Any:
    return to_json(kept) if isinstance(kept, Format) else _DTYPE_NAMES[kept]


def from_json(value: Any) -> Format:
    """Read what `to_json` wrote; ValueError, KeyError or TypeError if it is something else."""
    grid = _read_table(value["grid"]) if isinstance(value["grid"], list) else grids.find(value["grid"])
    if grid is None:
        raise ValueError(f"there is no grid {value['grid']!r}")
    block = value["block"]
    if isinstance(block, dict):
        found: Block = Flat(_size(block["flat"]))
    else:
        rows, cols = (None if n is None else _size(n) for n in block)
        found = (rows, cols)
    zero = None if value["zero"] is None else _read_kept(value["zero"])
    minimum = bool(value.get("minimum", False))  # which earlier versions did not write
    if minimum and (not isinstance(zero, torch.dtype) or value["symmetric"]):
        raise ValueError("only what is asymmetric has minima, and they are plain floats")
    scale, symmetric = _read_kept(value["scale"]), bool(value["symmetric"])
    return Format(grid, found, symmetric, scale, zero, bool(value["centered"]), minimum)


def _read_kept(value: Any) -> torch.dtype | Format:
    return SCALE_DTYPES[value] if isinstance(value, str) else from_json(value)


def _read_table(values: list[Any]) -> Grid:
    table = tuple(map(float, values))
    if not 1 <= len(table) <= 256 or not all(a < b for a, b in itertools.pairwise((-math.inf, *table, math.inf))):
        raise ValueError("a table has 1 to 256 finite values, and they ascend")
    return Grid(grids.CUSTOM, table)


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"a block has no size {value!r}")
    return value
