"""Grids: which values one code can mean, before any scale.

A code is an index into the ascending `values`, so it is never negative and packs as it is.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import NormalDist

import torch
from torch import Tensor

CUSTOM = "custom"  # the name of tables that only the file itself holds


@dataclass(frozen=True)
class Grid:
    """Any ascending table of values, at most 256 of them; encoding takes the nearest.

    A tie between two values goes to the lower one. Where the middle of two values is no float32 number it is rounded to
    one, as kernels do.
    """

    name: str
    values: tuple[float, ...]

    @cached_property
    def bits(self) -> int:
        """Bits of one code."""
        return max(1, (len(self.values) - 1).bit_length())

    @property
    def low(self) -> float:
        """Return the smallest value."""
        return self.values[0]

    @property
    def high(self) -> float:
        """Return the largest value."""
        return self.values[-1]

    def encode(self, x: Tensor) -> Tensor:
        """Return the uint8 codes of the values nearest to `x`, of any shape."""
        table = torch.tensor(self.values, dtype=torch.float32, device=x.device)
        middles = (table[1:] + table[:-1]) / 2
        return torch.bucketize(x.double().contiguous(), middles.double()).to(torch.uint8)

    def round(self, x: Tensor) -> Tensor:
        """Return the values nearest to `x`, in its shape and dtype."""
        return self.decode(self.encode(x)).to(x.dtype)

    def round_(self, x: Tensor) -> Tensor:
        """Return the values nearest to `x`, in its place if that is faster."""
        return self.round(x)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of `codes`."""
        return torch.tensor(self.values, dtype=torch.float32, device=codes.device)[codes.long()]


@dataclass(frozen=True)
class IntGrid(Grid):
    """The integers −2^(bits−1) … 2^(bits−1)−1; encoding rounds half to even and clamps."""

    def encode(self, x: Tensor) -> Tensor:
        """Return round(x) clamped to the grid, as uint8 codes."""
        return self.round(x).sub_(self.low).to(torch.uint8)

    def round(self, x: Tensor) -> Tensor:
        """Return round(x) clamped to the grid."""
        return x.round().clamp_(self.low, self.high)

    def round_(self, x: Tensor) -> Tensor:
        """Round `x` in its place."""
        return x.round_().clamp_(self.low, self.high)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the integers that `codes` mean, as float32."""
        return codes.float().add_(self.low)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """The finite values of a small float; encoding rounds half to even, as hardware does, and clamps.

    Powers of two alone (no mantissa) round half to the larger.

    mantissa  bits of it
    smallest  exponent of the smallest normal number
    """

    mantissa: int
    smallest: int

    def encode(self, x: Tensor) -> Tensor:
        """Return the uint8 codes of the values nearest to `x`, of any shape."""
        table = torch.tensor(self.values, dtype=torch.float32, device=x.device)
        return torch.searchsorted(table, self.round(x).float().contiguous()).to(torch.uint8)

    def round(self, x: Tensor) -> Tensor:
        """Return the values nearest to `x`, in its shape and dtype."""
        return self.round_(x.clone())

    def round_(self, x: Tensor) -> Tensor:
        """Round `x` in its place."""
        x.clamp_(self.low, self.high)
        if x.dtype == torch.float32:  # the power of two below each number is its bits without sign and mantissa
            step = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        else:
            step = torch.ldexp(torch.ones_like(x), torch.frexp(x)[1] - 1)
        step.clamp_(min=2.0**self.smallest).mul_(2.0**-self.mantissa)
        return x.div_(step).round_().mul_(step)


def narrow_grid(bits: int) -> IntGrid:
    """Return the integers −(2^(bits−1) − 1) … 2^(bits−1) − 1, which leave out the lowest; 2 to 8 `bits`."""
    if bits not in range(2, 9):
        raise ValueError(f"narrow integer grids have 2 to 8 bits, not {bits}")
    top = (1 << (bits - 1)) - 1
    return IntGrid(f"narrow{bits}", tuple(float(v) for v in range(-top, top + 1)))


@cache
def shift_grid(steps: int) -> Grid:
    """Return the powers of two 2^−steps … 2^0: scales that differ from the largest of their block by a shift."""
    if steps not in range(1, 32):
        raise ValueError(f"shifts go from 1 to 31 steps, not {steps}")
    return Grid(f"shift{steps}", tuple(2.0**-k for k in range(steps, -1, -1)))


def int_grid(bits: int) -> IntGrid:
    """Return the signed integers of 1 to 8 `bits`; ValueError otherwise."""
    if bits not in range(1, 9):
        raise ValueError(f"integer grids have 1 to 8 bits, not {bits}")
    half = 1 << (bits - 1)
    return IntGrid(f"int{bits}", tuple(float(v) for v in range(-half, half)))


@cache
def nf_grid(bits: int) -> Grid:
    """Return NormalFloat of 2 to 8 `bits`: quantiles of the normal distribution, with an exact zero, scaled to [−1, 1].

    QLoRA, arXiv:2305.14314, section 3, in the construction of bitsandbytes: 2^(bits−1) positive and 2^(bits−1) − 1
    negative values at equally spaced probabilities up to 1 − ½ (1 / 2^(bits+1) + 1 / (2 (2^bits − 1))). Probabilities,
    values and their division are rounded to float32 as there, so that the table of 4 bits is the published one.
    """
    if bits not in range(2, 9):
        raise ValueError(f"NormalFloat has 2 to 8 bits, not {bits}")
    count, half = 1 << bits, 1 << (bits - 1)
    top = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    top = round(top, 7)

    def side(points: int) -> list[float]:
        return [NormalDist().inv_cdf(p) for p in torch.linspace(top, 0.5, points)[:-1].tolist()]

    values = torch.tensor(sorted([*side(half + 1), 0.0, *(-v for v in side(half))]))
    return Grid(f"nf{bits}", tuple((values / values.max()).tolist()))


@cache
def af4() -> Grid:
    """Return AbnormalFloat, the table for 4 bits and blocks of 64 (arXiv:2306.06965), as bitsandbytes has it."""
    negative = (-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812)
    positive = (0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0)
    return Grid("af4", _float32((*negative, 0.0, *positive)))


@cache
def bnb_fp4() -> Grid:
    """Return the table that bitsandbytes calls FP4: like E2M1, but with a subnormal of 1/192 of the largest value.

    Its two zeros are two codes, the upper of which bitsandbytes takes on a CPU for what is positive and rounds to zero.
    """
    magnitudes = (0.0625, 2, 3, 4, 6, 8, 12)
    return Grid("fp4", _float32(sorted([0.0, 0.0, *(v / 12 for v in magnitudes), *(-v / 12 for v in magnitudes)])))


@cache
def minifloat(exponent: int, mantissa: int) -> Grid:
    """Return the finite values of a signed float with so many `exponent` and `mantissa` bits; its two zeros are one
    value.

    The bias is 2^(exponent−1) − 1 and there are subnormals. E5M2 keeps its largest exponent for infinity and NaN as in
    IEEE 754; E4M3 has one code a sign for NaN (OCP 8-bit floating point, revision 1.0); narrower ones have neither (OCP
    microscaling, revision 1.0).
    """
    if exponent < 1 or mantissa < 0 or 1 + exponent + mantissa > 8:
        raise ValueError(f"a float of {exponent} exponent and {mantissa} mantissa bits does not fit into 8 bits")
    bias, steps = (1 << (exponent - 1)) - 1, 1 << mantissa
    found = []
    for e in range(1 << exponent):
        for m in range(steps):
            found.append((m / steps) * 2.0 ** (1 - bias) if e == 0 else (1 + m / steps) * 2.0 ** (e - bias))
    if (exponent, mantissa) == (5, 2):
        found = found[:-steps]
    if (exponent, mantissa) == (4, 3):
        found = found[:-1]
    values = tuple(sorted({*found, *(-v for v in found)}))
    return FloatGrid(f"e{exponent}m{mantissa}", values, mantissa, 1 - bias)


@cache
def dynamic8() -> Grid:
    """Return the signed dynamic 8-bit table of bitsandbytes: seven decades, finer steps in the upper ones.

    Decade i of 0 … 6 holds the middles of 2^i equal parts of [0.1, 1], times 10^(i−6), with either sign; then 0 and 1.
    Dettmers, arXiv:1511.04561. −1 is not among them.
    """
    values = [0.0, 1.0]
    for i in range(7):
        parts = 1 << i
        edges = torch.linspace(0.1, 1, parts + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += [*middles, *(-v for v in middles)]
    return Grid("dynamic8", _float32(sorted(values)))


def quantile_grid(bits: int, quantile: Callable[[float], float], name: str = CUSTOM) -> Grid:
    """Return 2^bits codes midway between neighbouring quantiles, scaled to [−1, 1] (QLoRA, arXiv:2305.14314, equation
    4).

    The code nearest to zero is made zero (our reading), so that zeros stay. Codes that coincide become one.

    quantile  from a probability in [0, 1) to a value: of the normal distribution, or of the weights at hand; the
              lowest, at 0, may be infinite, and the next then stands for it
    """
    count = 1 << bits
    at = [quantile(i / (count + 1)) for i in range(count + 1)]
    at[0] = at[0] if math.isfinite(at[0]) else at[1]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(at)]
    middles[min(range(count), key=lambda i: abs(middles[i]))] = 0.0
    top = max(map(abs, middles)) or 1.0
    return Grid(name, tuple(sorted(set(_float32(v / top for v in middles)))))


def _float32(values: object) -> tuple[float, ...]:
    return tuple(torch.tensor(list(values), dtype=torch.float64).float().tolist())  # type: ignore[call-overload]


def find(name: str) -> Grid | None:
    """Return the grid called `name` ("int4", "nf4", "fp4", "af4", "e2m1", "dynamic8"), or None."""
    if m := re.fullmatch(r"int([1-8])", name):
        return int_grid(int(m[1]))
    if m := re.fullmatch(r"narrow([2-8])", name):
        return narrow_grid(int(m[1]))
    if m := re.fullmatch(r"shift([1-9]|[12]\d|3[01])", name):
        return shift_grid(int(m[1]))
    if m := re.fullmatch(r"nf([2-8])", name):
        return nf_grid(int(m[1]))
    if (m := re.fullmatch(r"e([1-6])m([0-6])", name)) and 1 + int(m[1]) + int(m[2]) <= 8:
        return minifloat(int(m[1]), int(m[2]))
    known = {"fp4": bnb_fp4, "af4": af4, "dynamic8": dynamic8}
    return known[name]() if name in known else None
