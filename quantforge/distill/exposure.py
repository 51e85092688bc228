"""What a student's own prefixes cost it, and how much its texts repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.errors import DataError


@dataclass(frozen=True)
class Exposure:
    """Errors accumulated over the first tokens of texts; all are [longest] float64, at 1, 2, … tokens.

    own      R(l): the sum over the first l tokens of the mean KL(teacher ‖ student) after what the student wrote
    teacher  l ε(l): the same after what the teacher wrote
    excess   ExAccErr(l) = R(l) / (l ε(l)) − 1; 0.1 is 10 % more than the student errs on the teacher's prefixes
    """

    own: Tensor
    teacher: Tensor
    excess: Tensor


def exposure(own: Tensor, own_mask: Tensor, teacher: Tensor, teacher_mask: Tensor) -> Exposure:
    """Return the excess accumulated error (Arora et al., ACL Findings 2022, arXiv:2204.01171; MiniLLM, section 3.3).

    own      [texts, tokens] KL(teacher ‖ student), nats, of each token of texts that the student wrote
    teacher  the same of texts that the teacher wrote, as many or not
    masks    the tokens that count, of which a text's first is its first; texts may have ended early
    Our reading: at each place the mean is over the texts that reach it, and sums end where either side has none left.
    Where the student never errs on the teacher's texts the excess is 0 if it errs on its own neither, else infinite.
    Raises DataError if one side has no text, or a KL is NaN or negative.
    """
    means = [_means("student", own, own_mask), _means("teacher", teacher, teacher_mask)]
    length = min(map(len, means))
    r, base = (mean[:length].cumsum(0) for mean in means)
    excess = torch.where(base > 0, r / base, torch.where(r > 0, torch.inf, 1.0)) - 1
    return Exposure(r, base, excess)


def distinct(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """Return the share of different ones among all n-grams of the texts' tokens (Li et al., arXiv:1510.03055).

    Over all texts together; it falls as texts grow, so only samples of as many tokens are comparable.
    Raises DataError if no text has n tokens.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    if n < 1 or not grams:
        raise DataError(474, f"no text has {n} tokens, so there is no {n}-gram to count.")
    return len(set(grams)) / len(grams)


def _means(who: str, kl: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over texts at each place, for as many places as any text has."""
    if kl.shape != mask.shape or kl.dim() != 2:
        raise DataError(474, f"KL of shape {list(kl.shape)} does not go with a mask of shape {list(mask.shape)}.")
    rows = [row[kept].double().cpu() for row, kept in zip(kl.detach(), mask.bool(), strict=True)]
    longest = max(map(len, rows), default=0)
    if not longest:
        raise DataError(474, f"no token that the {who} wrote counts: the mask is empty.")
    total, count = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest, dtype=torch.float64)
    for row in rows:
        total[: len(row)] += row
        count[: len(row)] += 1
    found = total / count
    if not (found >= 0).all():
        raise DataError(474, f"the KL of what the {who} wrote is NaN or negative.")
    return found
