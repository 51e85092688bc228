"""Low-rank compensation: two thin factors that make up for the part of the error that has structure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.numerics.formats import Format
from quantforge.numerics.grids import int_grid
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import encode
from quantforge.numerics.residuals import LowRank
from quantforge.registry import register

_EXACT = 4096  # inputs up to which the decomposition is exact; above, a randomized one finds the leading part


@register("correction", "lorc")
@dataclass(frozen=True)
class LoRC:
    """Low-rank compensation (ZeroQuant-V2, Yao et al., arXiv:2303.08302, section 5), plain or whitened by the Hessian.

    Lowers, for E = W − Ŵ, the squared error of the weights if plain, and that of the outputs, tr((E − AB) H (E −
    AB)ᵀ), if whitened: with H = L Lᵀ the truncated decomposition of E L, multiplied by L⁻¹, is the best there is.
    Factors are kept in 8 bits with a scale a row of A and a row of B, in the dtype of the layer's scales. A correction
    that raises the loss, as rounded factors can where there is next to nothing to correct, is left out.

    rank     columns of A and rows of B
    whiten   lower the outputs' error instead of the weights'
    bits     of a number of the factors, 2 to 8; 16 keeps them in the dtype of the scales
    damp     what is added to diag(H), as a share of its mean, so that H can be factored
    """

    rank: int = 8
    whiten: bool = True
    bits: int = 8
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}; 8 is usual")
        if self.bits not in (*range(2, 9), 16):
            raise ValueError(f"bits of the factors must be 2 to 8, or 16, not {self.bits}")
        if not 0 <= self.damp <= 1:
            raise ValueError(f"damp must lie between 0 and 1, not {self.damp}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected."""
        return ("hessian",) if self.whiten else ()

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return why a layer of `shape` cannot have factors of this rank; None if it can."""
        if self.rank > min(shape):
            return f"rank {self.rank} is larger than its {shape[0]} x {shape[1]} weight allows; at most {min(shape)}."
        return None

    def nbits(self, shape: tuple[int, int]) -> int:
        """Count the bits it adds to a layer of `shape`: factors, and 16 bits for each of their scales."""
        numbers = self.rank * (shape[0] + shape[1])
        return 16 * numbers if self.bits == 16 else self.bits * numbers + 16 * (shape[0] + self.rank)

    def correct(self, problem: Problem, solved: QWeight) -> QWeight:
        """Return `solved` with the factors that correct its error appended."""
        approx = solved.dequantize()
        error = problem.weight - approx
        root = _root(problem.hessian, self.damp) if self.whiten and problem.hessian is not None else None
        a, b = factor(error, self.rank, root)
        kept = solved.base.format.scale
        dtype = kept if isinstance(kept, torch.dtype) and kept.itemsize == 2 else torch.bfloat16
        low_rank = self._store(a, b, dtype)
        judged = problem if root is not None else replace(problem, hessian=None)
        notes = dict(solved.notes)
        if self.whiten and root is None:
            notes["factors"] = "plain, as its Hessian could not be factored"
        if judged.loss(low_rank.onto(approx)) >= judged.loss(approx):
            zero = torch.zeros_like
            low_rank = self._store(zero(a), zero(b), dtype)
            if bool(error.any()):
                notes["factors"] = "zero, as none was found that lowers its error"
        return replace(solved, notes=notes, residuals=(*solved.residuals, low_rank))

    def _store(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> LowRank:
        if self.bits == 16:
            return LowRank(a.to(dtype), b.to(dtype))
        fmt = Format(int_grid(self.bits), (1, None), True, dtype)
        return LowRank(encode(a, fmt), encode(b, fmt))


def factor(error: Tensor, rank: int, root: Tensor | None = None, *, exact: bool | None = None) -> tuple[Tensor, Tensor]:
    """Return A [out, rank] and B [rank, in] whose product is nearest to `error` [out, in].

    root   L [in, in] lower triangular, H = L Lᵀ: nearest in tr((E − AB) H (E − AB)ᵀ); None: in the sum of squares
    exact  True: by a full singular value decomposition; False: by a randomized one (Halko, Martinsson and Tropp,
           arXiv:0909.4061: ten columns more than the rank, two power iterations); None: as the size advises
    """
    wanted = error if root is None else error @ root
    if exact if exact is not None else min(wanted.shape) <= _EXACT:
        u, s, vt = torch.linalg.svd(wanted, full_matrices=False)
    else:
        u, s, vt = _randomized(wanted, min(rank + 10, min(wanted.shape)))
    share = s[:rank].sqrt()
    a, b = u[:, :rank] * share, share[:, None] * vt[:rank]
    if root is not None:
        b = torch.linalg.solve_triangular(root, b, upper=False, left=False)
    # the product is what counts: rows of B and columns of A of equal size round alike
    balance = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return a * balance, b / balance[:, None]


def _randomized(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    probe = torch.randn(x.shape[1], count, generator=generator, dtype=x.dtype).to(x.device)
    basis = torch.linalg.qr(x @ probe).Q
    for _ in range(2):
        basis = torch.linalg.qr(x @ torch.linalg.qr(x.T @ basis).Q).Q
    u, s, vt = torch.linalg.svd(basis.T @ x, full_matrices=False)
    return basis @ u, s, vt


def _root(hessian: Tensor, damp: float) -> Tensor | None:
    """Return the lower Cholesky factor of the damped Hessian, or None if it has none (then the fit is plain)."""
    damped = hessian.double()
    mean = damped.diagonal().mean()
    if not bool(mean > 0):
        return None
    damped.diagonal().add_(damp * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    return None if failed else lower.to(hessian.dtype)
