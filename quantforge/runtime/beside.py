"""What is kept beside the codes, computed beside their product: single weights, whole columns, low-rank factors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantforge.numerics.inputs import QInput
from quantforge.numerics.residuals import Columns, LowRank, Residual, Sparse
from quantforge.runtime.kernel import Kernel, nbytes


class Term(Protocol):
    """What one residual adds to the outputs."""

    @property
    def nbytes(self) -> int:
        """Count the bytes of all that is held."""

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """Return `out` [tokens, out] with this part for float32 `x` [tokens, in] added, perhaps in place."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Low-rank factors A [out, rank] and B [rank, in] in float32."""

    a: Tensor
    b: Tensor

    @property
    def nbytes(self) -> int:
        """Count the bytes of both."""
        return nbytes((self.a, self.b))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """Return `out` + x Bᵀ Aᵀ."""
        return out.addmm_(x @ self.b.T, self.a.T)


@dataclass(frozen=True, eq=False)
class WeightDifferences:
    """Differences of single weights from what the codes say, a sparse matrix [out, in] float32 in compressed rows."""

    matrix: Tensor

    @property
    def nbytes(self) -> int:
        """Count the bytes of rows, columns and values."""
        m = self.matrix
        return nbytes((m.crow_indices(), m.col_indices(), m.values()))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """Return `out` with the sparse product added."""
        if len(x) == 1:
            return out.add_((self.matrix @ x[0])[None])
        return out.add_((self.matrix @ x.T).T)


@dataclass(frozen=True, eq=False)
class ColumnDifferences:
    """Differences of whole columns from what the codes say: index [count], values [out, count] float32."""

    index: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Count the bytes of both."""
        return nbytes((self.index, self.values))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """Return `out` with the product of these columns added."""
        return out.addmm_(x[:, self.index], self.values.T)


@dataclass(frozen=True, eq=False)
class Beside:
    """A kernel for the codes, and terms for what is beside them, which get the inputs as the layer rounds them."""

    base: Kernel
    terms: tuple[Term, ...]
    rounds: QInput | None = None

    @property
    def operator(self) -> str:
        """Return the operator of the codes, and what there is beside it."""
        return " + ".join((self.base.operator, *dict.fromkeys(_WORDS[type(t)] for t in self.terms)))

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Count the bytes of all parts."""
        return self.base.nbytes + sum(term.nbytes for term in self.terms)

    def product(self, x: Tensor) -> Tensor:
        """Return x [tokens, in] times the weight → [tokens, out]."""
        wide = x.float()
        out = self.base.product(wide)
        rounded = wide if self.rounds is None else self.rounds.round(wide)
        for term in self.terms:
            out = term.add(rounded, out)
        return out.to(x.dtype)


_WORDS: dict[type, str] = {Factors: "low rank", WeightDifferences: "CSR", ColumnDifferences: "columns"}


def words(residuals: Sequence[Residual]) -> tuple[str, ...]:
    """Return what the parts are called beside an operator's name."""
    kinds: dict[type, str] = {LowRank: "low rank", Sparse: "CSR", Columns: "columns"}
    return tuple(dict.fromkeys(kinds[type(r)] for r in residuals))


def beside(
    base: Kernel, residuals: Sequence[Residual], held: Tensor, rounds: QInput | None, device: str = "cpu"
) -> Kernel:
    """Put the residuals of a weight beside the kernel of its codes.

    held    [out, in] float32: the weight that the kernel computes with, so that what replaces a part of it does so
    device  where the kernel computes
    """
    terms: list[Term] = []
    for residual in residuals:
        if isinstance(residual, LowRank):
            a, b = (factor.float().contiguous().to(device) for factor in residual.factors())
            terms.append(Factors(a, b))
        elif isinstance(residual, Sparse):
            row = torch.arange(len(held)).repeat_interleave(residual.start.diff().long())
            change = residual.values.float() - held[row, residual.columns.long()]
            shape = tuple(held.shape)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                matrix = torch.sparse_csr_tensor(
                    residual.start, residual.columns, change, shape, check_invariants=False
                )
            terms.append(WeightDifferences(matrix.to(device)))
        else:
            assert isinstance(residual, Columns)
            index = residual.index.long()
            change = residual.values.float() - held[:, index]
            terms.append(ColumnDifferences(index.to(device), change.to(device)))
        held = residual.onto(held)
    return Beside(base, tuple(terms), rounds) if terms else base
