"""Which operator computes a quantized layer: one table, by its format, inputs and residuals, and by what there is here.

The first row that is meant for a format and has its operator here is taken; where none is, the layer is computed from
float weights, which is called reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantforge.numerics.problem import QWeight
from quantforge.numerics.residuals import Columns, Residual
from quantforge.runtime import fp8, int4, int8, nf4, w8a8
from quantforge.runtime.beside import beside, words
from quantforge.runtime.integers import spares
from quantforge.runtime.kernel import Kernel

REFERENCE = "reference"


@dataclass(frozen=True)
class Row:
    """An operator.

    name     what it is called
    here     whether this build of torch has it for a device, and computes rightly with it
    meant    whether it is for the format and the inputs of a weight
    refuses  why it cannot compute a weight that it is meant for on a device; None if it can
    pack     makes its kernel
    held     the float32 weight that it computes with, where that is not what the codes say
    """

    name: str
    here: Callable[[str], bool]
    meant: Callable[[QWeight], bool]
    refuses: Callable[[QWeight, str], str | None]
    pack: Callable[[QWeight, str], Kernel]
    held: Callable[[QWeight], Tensor] | None = None


@dataclass(frozen=True)
class Choice:
    """The operator for a layer and why it is the one; `row` is None for the reference."""

    name: str
    reason: str
    row: Row | None = None


@cache
def has_onednn(device: str) -> bool:
    """Tell whether oneDNN multiplies signed 8-bit integers exactly; without VNNI instructions its sums can saturate."""
    if device != "cpu":
        return False
    return _exact(lambda codes, x: int8.OneDNN(codes).product(x))


@cache
def has_int_mm(device: str) -> bool:
    """Tell whether `torch._int_mm` multiplies exactly."""
    return _exact(lambda codes, x: w8a8.Plain(codes.to(device)).product(x.to(device)).cpu())


def _exact(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Compare products of the largest codes with what they are."""
    ends = torch.tensor([127, -128], dtype=torch.int8)
    codes, x = ends.repeat(32, 32), torch.stack([ends.repeat(32), ends.flip(0).repeat(32), ends[:1].repeat(64)])
    try:
        found = product(codes, x)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return torch.equal(found, x.float() @ codes.float().T)


@cache
def has_int4(device: str) -> bool:
    """Tell whether there is an int4 product."""
    return _runs(lambda: int4.packed(torch.zeros(64, 128, dtype=torch.int8), device))


@cache
def has_int8(device: str) -> bool:
    """Tell whether there is a product with int8 weights and bfloat16 inputs."""
    x, codes = (
        torch.zeros(1, 64, dtype=torch.bfloat16, device=device),
        torch.zeros(64, 64, dtype=torch.int8, device=device),
    )
    return _runs(lambda: torch.ops.aten._weight_int8pack_mm(x, codes, x[0]))


@cache
def has_fp8(device: str) -> bool:
    """Tell whether there is a scaled product of E4M3; CPUs only imitate one."""
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


def has_bitsandbytes(device: str) -> bool:
    """Tell whether bitsandbytes is installed and has products for this processor."""
    return device == "cpu" and nf4.has_products(device)


def has_bitsandbytes_cuda(device: str) -> bool:
    """Tell whether bitsandbytes is installed, whose products GPUs have."""
    return device == "cuda" and nf4.has_products(device)


def _runs(call: Callable[[], object]) -> bool:
    try:
        call()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


TABLE = (
    Row(w8a8.NAME, has_onednn, w8a8.meant_for, w8a8.refuses, lambda w, d: w8a8.pack(w, d, onednn=True)),
    Row(w8a8.NAME, has_int_mm, w8a8.meant_for, w8a8.refuses, lambda w, d: w8a8.pack(w, d, onednn=False)),
    Row(int4.NAME, has_int4, int4.meant_for, int4.refuses, int4.pack, int4.held),
    Row(int8.DIGITS, has_onednn, int8.meant_for, int8.refuses, int8.pack_digits),
    Row(int8.NAME, has_int8, int8.meant_for, int8.refuses_zeros, int8.pack, int8.held),
    Row(nf4.NAME, has_bitsandbytes, nf4.meant_for, nf4.refuses, nf4.pack, nf4.held),
    Row(nf4.NAME, has_bitsandbytes_cuda, nf4.meant_for, nf4.refuses, nf4.pack),
    Row(fp8.NAME, has_fp8, fp8.meant_for, fp8.refuses, fp8.pack),
)


def choose(weight: QWeight, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Choice:
    """Return the operator that computes `weight` in a model of `dtype` on `device`, and the reason."""
    if dtype == torch.float64:
        return Choice(REFERENCE, "every operator computes in float32 or less")
    refusals = []
    for row in TABLE:
        if not row.meant(weight):
            continue
        why = row.refuses(weight, device)
        if why is None and row.here(device):
            return Choice(_called(row, weight), f"{weight.base.format.short} on {device}", row)
        refusals.append(why or f"this build of torch has no {row.name} product for {device}")
    return Choice(REFERENCE, refusals[0] if refusals else f"no operator takes {_said(weight)}")


def operator_of(weight: QWeight, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Return the name of the operator that computes `weight` in a model of `dtype` on `device`, and the reason.

    "reference" where there is none, and weights are held as floats.
    """
    found = choose(weight, device, dtype)
    return found.name, found.reason


def kernel(weight: QWeight, choice: Choice, device: str = "cpu") -> Kernel:
    """Return the kernel of a layer by the operator that was chosen for it."""
    row = choice.row
    assert row is not None
    base = row.pack(weight, device)
    rest = _rest(row, weight)
    if not rest:
        return base
    held = row.held(weight) if row.held else weight.base.dequantize(torch.float32)
    return beside(base, rest, held, weight.inputs, device)


def _rest(row: Row, weight: QWeight) -> list[Residual]:
    """Return the residuals that the operator does not compute itself."""
    own = row.name == w8a8.NAME
    return [r for r in weight.residuals if not (own and isinstance(r, Columns))]


def _called(row: Row, weight: QWeight) -> str:
    name = w8a8.LLM_INT8 if row.name == w8a8.NAME and spares(weight) else row.name
    return " + ".join((name, *words(_rest(row, weight))))


def _said(weight: QWeight) -> str:
    short = weight.base.format.short
    return short if weight.inputs is None else f"{short} x {weight.inputs.inputs}"
