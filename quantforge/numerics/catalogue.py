"""The catalogue of formats: what each one's values are, what a weight costs in it, and what rounding to it loses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantforge.errors import RecipeError, nearest, pick
from quantforge.numerics import formats, grids
from quantforge.numerics.blocks import Flat
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import Grid, IntGrid
from quantforge.numerics.qtensor import fit, quantize

COUNT = 1 << 20  # normal numbers that errors are measured on
WIDTH = 1 << 10  # of a row of them, for formats that have a scale a row
SIZES = (32, 64, 128)
TABLE = "table:"
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GRIDS = (
    *(f"int{bits}" for bits in range(2, 9)),
    "narrow8",
    *(f"nf{bits}" for bits in range(2, 9)),
    *("af4", "fp4", "e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "dynamic8"),
)
_OWN_BLOCK = {"dynamic8": "f256"}
_LARGEST, _SMALLEST = 1e30, 1e-30  # of a custom table, so that scales stay far from float32's ends


@dataclass(frozen=True)
class Wanted:
    """What a name stands for: a float type, or a grid with the formats to show it in."""

    name: str
    grid: Grid | None
    formats: tuple[tuple[str, Format], ...] = ()


@dataclass(frozen=True)
class Stored:
    """One way to store weights.

    notation         what `formats.parse` reads; of a custom table, how its blocks and scales are kept
    bits_per_weight  codes, scales and zero points
    error            Σ (x − x̂)² / Σ x² on normal numbers, ranges spanning each block's extremes
    """

    notation: str
    bits_per_weight: float
    error: float


@dataclass(frozen=True)
class Entry:
    """A grid or float type.

    values  ascending, before any scale; None for the float types
    step    the smallest distance between two values
    """

    name: str
    bits: int
    values: tuple[float, ...] | None
    low: float
    high: float
    step: float
    stored: tuple[Stored, ...]


def names() -> list[str]:
    """Return the names of all entries of the whole listing, in its order."""
    return [*FLOATS, *GRIDS]


def find(name: str) -> Wanted:
    """Return what `name` stands for: a float type, grid, named format, notation, or `table:` and numbers.

    Scales are bfloat16 where the notation names no dtype. Raises RecipeError with the nearest name.
    """
    low = name.lower()
    if low.startswith(TABLE):
        grid = _table(name)
        return Wanted(low, grid, tuple((str(fmt), fmt) for fmt in (_blocks(grid, size) for size in SIZES)))
    if low in FLOATS:
        return Wanted(low, None)
    bare = grids.find(low)
    if bare is not None:
        return Wanted(low, bare, tuple(_usual(bare)))
    if low in formats.NAMED or grids.find(low.partition("-")[0]) is None:
        pick("format", low, dict.fromkeys([*names(), *formats.NAMED]))
        return Wanted(low, formats.NAMED[low].grid, ((low, _plain(formats.NAMED[low])),))
    return _notation(low)


def measure(wanted: Wanted) -> Entry:
    """Measure what rounding to `wanted` loses on the same 2^20 normal numbers whatever it is."""
    if wanted.grid is None:
        dtype = FLOATS[wanted.name]
        info = torch.finfo(dtype)
        x = _normal(torch.float64)
        stored = Stored(wanted.name, info.bits, _relative(x, x.to(dtype)))
        return Entry(wanted.name, info.bits, None, info.min, info.max, info.smallest_normal * info.eps, (stored,))
    grid = wanted.grid
    rows = tuple(Stored(notation, *_cost(fmt)) for notation, fmt in wanted.formats)
    step = min(b - a for a, b in itertools.pairwise(grid.values) if b > a)  # of two zeros, the step is none
    return Entry(wanted.name, grid.bits, grid.values, grid.low, grid.high, step, rows)


def text(entries: Iterable[Entry]) -> str:
    """Show entries as lines of text, with all values of those that have at most 16."""
    lines = ["error: squared, relative to the squares, on normal numbers; ranges span each block's extremes"]
    for entry in entries:
        count = "floats" if entry.values is None else f"{len(entry.values)} values"
        lines.append(f"{entry.name}: {count} from {entry.low:.6g} to {entry.high:.6g}, smallest step {entry.step:.4g}")
        if entry.values is not None:
            shown = [f"{value:.6g}" for value in entry.values]
            lines.append("  " + " ".join(shown if len(shown) <= 16 else [*shown[:4], "…", *shown[-4:]]))
        for row in entry.stored:
            lines.append(f"  {row.notation:28} {row.bits_per_weight:6.3f} bits/weight  error {row.error:.4g}")
    return "\n".join(lines)


def _usual(grid: Grid) -> Iterable[tuple[str, Format]]:
    """Yield the formats that a grid is shown in: groups of the usual sizes, and the named formats that it is in."""
    blocks = [*(f"g{size}" for size in SIZES), *([_OWN_BLOCK[grid.name]] if grid.name in _OWN_BLOCK else [])]
    for kind in _kinds(grid):
        for block in blocks:
            notation = f"{grid.name}-{block}-{kind}"
            notation = notation if block.startswith("f") else f"{notation}-bf16"
            yield notation, formats.parse(notation)
    for name, fmt in formats.NAMED.items():
        if fmt.grid == grid:
            yield name, _plain(fmt)


def _kinds(grid: Grid | None) -> tuple[str, ...]:
    return ("sym", "asym") if isinstance(grid, IntGrid) else ("sym",)


def _notation(name: str) -> Wanted:
    try:
        fmt = formats.parse(name)
    except ValueError as error:
        known = [f"{grid}-g{size}-{kind}" for grid in GRIDS for size in SIZES for kind in _kinds(grids.find(grid))]
        raise RecipeError(218, f"{error}. {nearest(name, known)}") from error
    if _size(fmt) > COUNT:
        raise RecipeError(219, f"{name!r} has blocks of {_size(fmt)}; errors are measured on {COUNT} numbers at most.")
    said = any(part in formats.SCALE_DTYPES for part in name.split("-"))
    fmt = fmt if said else _plain(fmt)
    return Wanted(name, fmt.grid, ((str(fmt), fmt),))


def _plain(fmt: Format) -> Format:
    """Store scales as a checkpoint does that holds bfloat16."""
    return fmt.with_scale(torch.bfloat16)


def _blocks(grid: Grid, size: int) -> Format:
    return Format(grid, (1, size), True, torch.bfloat16)


def _table(name: str) -> Grid:
    """Read `table:-1,0,0.5,1` as a grid."""
    numbers = name[len(TABLE) :].split(",")
    try:
        values = sorted({float(number) + 0.0 for number in numbers})  # which makes −0 zero
    except ValueError as error:
        raise RecipeError(218, f"{name!r} is no table: {error}; write for example table:-1,0,0.5,1.") from error
    top = max(map(abs, values))
    if not (2 <= len(values) <= 256 and all(map(math.isfinite, values)) and values[0] < 0 < values[-1]):
        raise RecipeError(218, f"{name!r} is no table: it needs 2 to 256 numbers, of either sign, such as -1,0,0.5,1.")
    if not _SMALLEST <= top <= _LARGEST:
        raise RecipeError(218, f"{name!r} is no table: its largest number must lie between 1e-30 and 1e30.")
    return Grid(grids.CUSTOM, tuple(values))


def _size(fmt: Format) -> int:
    if isinstance(fmt.block, Flat):
        return fmt.block.size
    return (fmt.block[0] or 1) * (fmt.block[1] or 1)


def _cost(fmt: Format) -> tuple[float, float]:
    """Return bits per weight and the relative squared error, in a matrix whose rows hold whole blocks."""
    x, width = _normal(torch.float32), WIDTH
    if not isinstance(fmt.block, Flat) and fmt.block[1] is not None:
        size = fmt.block[1]
        width = max(WIDTH // size, 1) * size
    x = x[: COUNT // width * width].view(-1, width)
    stored = quantize(x, fit(x, fmt), fmt)
    return stored.nbits / x.numel(), _relative(x, stored.dequantize(torch.float32))


@cache
def _normal(dtype: torch.dtype) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _relative(x: Tensor, approx: Tensor) -> float:
    return float((x - approx).double().square().sum() / x.double().square().sum())
