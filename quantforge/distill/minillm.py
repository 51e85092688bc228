"""The policy gradient of the sequence-level reverse KL, as functions of the log-probabilities of a sampled batch.

MiniLLM, Gu et al., ICLR 2024, arXiv:2306.08543. For texts y that the student q writes, with r_t = log p(y_t) / q(y_t)
of the teacher p, each given what comes before,

    ∇ KL(q ‖ p) = E[Σ_t ∇ KL_t(q ‖ p)] − E[Σ_t R_{t+1} ∇ log q(y_t)],   R_{t+1} = Σ_{t' > t} r_{t'}.

The first sum is the single-step part, exact over the vocabulary; the second, the long part, is what one token does to
all after it. With texts sampled from p̃ = αp + (1 − α)q each token is weighed by q(y_t) / p̃(y_t), at most 1 / (1 − α).
That is biased, for what was drawn before t matters too; `exact` multiplies the weights of all tokens that a term
depends on, which is not biased and may vary without limit.

Length normalization, weights and ratio clip are our reading of the paper's formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantforge.distill.losses import Objective, dense_terms, label_terms
from quantforge.distill.tokens import check_shape, mean, per_token
from quantforge.errors import DataError, RecipeError


@dataclass(frozen=True)
class Sampled:
    """What is known of a batch of texts when they are sampled; all tensors are [batch, tokens] and carry no gradient.

    ids        the tokens that were drawn
    mask       which of them count; the others, padding, come before or after them
    log_old    log-probability of each under the student that then was, q_old
    log_drawn  under what it was drawn from: the student, or the mixture with the teacher
    """

    ids: Tensor
    mask: Tensor
    log_old: Tensor
    log_drawn: Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The two parts, scalars whose gradients add up to the policy gradient; neither value is itself a divergence.

    single   the reverse KL of single tokens
    long     the surrogate of the long part
    """

    single: Tensor
    long: Tensor

    @property
    def total(self) -> Tensor:
        """Return their sum, which is what is differentiated."""
        return self.single + self.long


def mixed_log_probs(student: Tensor, teacher: Tensor, alpha: float = 0.2) -> Tensor:
    """Return the log-probabilities of αp + (1 − α)q [..., vocab], to be drawn from as logits at temperature 1.

    Raises RecipeError unless 0 ≤ alpha < 1; at 1 the weights would have no bound.
    """
    if not 0 <= alpha < 1:
        raise RecipeError(244, f"alpha, the teacher's share in sampling, must be at least 0 and below 1, not {alpha}.")
    log_q = student.to(torch.promote_types(student.dtype, torch.float32)).log_softmax(-1)
    if alpha == 0:
        return log_q
    shares = torch.tensor([alpha, 1 - alpha], dtype=torch.float64).log().tolist()
    return torch.logaddexp(teacher.to(log_q.dtype).log_softmax(-1) + shares[0], log_q + shares[1])


def token_log_probs(logits: Tensor, ids: Tensor, mask: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """Return the log-probability [...] of each id under the logits [..., vocab] at its place, 0 where masked out.

    Differentiable, and a few tokens at a time. Logits at a place predict the next token: `ids` are then the labels of
    `next_tokens`.
    """
    return -per_token(logits, label_terms(logits, ids), mask, chunk)


def future_returns(ratios: Tensor, mask: Tensor, *, normalized: bool = True) -> Tensor:
    """Return what comes after each token: Σ r over the later ones [batch, tokens], 0 after the last and in padding.

    ratios      [batch, tokens], r_t = log p(y_t) − log q(y_t), or these weighed
    normalized  divided by how many tokens come later, so that long texts do not outweigh short ones
    """
    kept = ratios.masked_fill(~mask, 0.0)
    later = _later(kept).masked_fill(~mask, 0.0)
    return later / _later(mask.to(kept.dtype)).clamp(min=1) if normalized else later


def importance(log_q: Tensor, log_drawn: Tensor, mask: Tensor, *, exact: bool = False) -> Tensor:
    """Return how much each token counts [batch, tokens]: q / p̃ of it, or with `exact` of it and all before it."""
    found = (log_q - log_drawn).masked_fill(~mask, 0.0)
    return (found.cumsum(-1) if exact else found).exp().masked_fill(~mask, 0.0)


def policy_loss(
    student: Tensor,
    teacher: Tensor,
    sampled: Sampled,
    *,
    normalized: bool = True,
    clip: float | None = 0.2,
    most: float | None = 100.0,
    exact: bool = False,
    count: int | None = None,
    chunk: int | None = None,
) -> PolicyLoss:
    """Return the loss whose gradient is MiniLLM's, the sum over tokens divided by their number.

    student     logits [batch, tokens, vocab] that predict the sampled tokens; they alone get a gradient
    teacher     logits of the same shape
    normalized  length normalization of the returns; without it, clip and most, and with texts drawn from the student
                itself or exact weights, the gradient times `count` / batch is unbiased
    clip        ε: what is gained by moving log q(y_t) away from when the texts were sampled ends at a ratio of 1 ± ε
                (PPO, arXiv:1707.06347)
    most        largest |r_t|, so that a token which the teacher rules out does not make all infinite
    exact       weights that are products over all tokens a term depends on
    count       what the sums are divided by; all counted tokens if None
    Raises DataError if the shapes differ or, unless `count` is given, no token counts.
    """
    _check(student, teacher, sampled)
    mask = sampled.mask
    log_q = token_log_probs(student, sampled.ids, mask, chunk)
    with torch.no_grad():
        log_p = token_log_probs(teacher, sampled.ids, mask, chunk).to(log_q.dtype)
        ratios = log_p - sampled.log_old.to(log_q.dtype)
        ratios = ratios if most is None else ratios.clamp(-most, most)
        weights = importance(sampled.log_old, sampled.log_drawn, mask, exact=exact).to(log_q.dtype)
        if exact:  # a later r counts as much as all that was drawn up to it; a single step, as what was before it
            gains = future_returns(ratios * weights, mask, normalized=normalized)
            weights = _before(weights, mask)
        else:
            gains = future_returns(ratios, mask, normalized=normalized) * weights
    steps = per_token(student, dense_terms(Objective("rkl"), teacher), mask, chunk)
    moved = (log_q - sampled.log_old.to(log_q.dtype)).masked_fill(~mask, 0.0).exp()
    gained = moved * gains
    if clip is not None:
        gained = torch.minimum(gained, moved.clamp(1 - clip, 1 + clip) * gains)
    return PolicyLoss(mean(steps * weights, mask, count), -mean(gained, mask, count))


def _later(x: Tensor) -> Tensor:
    """Return the sum over what comes after each place of the last axis."""
    return F.pad(x.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))


def _before(weights: Tensor, mask: Tensor) -> Tensor:
    """Return for each token the weight of the one before it, 1 for the first."""
    first = mask & (mask.long().cumsum(-1) == 1)
    return weights.roll(1, -1).masked_fill(first, 1.0).masked_fill(~mask, 0.0)


def _check(student: Tensor, teacher: Tensor, sampled: Sampled) -> None:
    check_shape("the teacher's logits", teacher, student.shape)
    for name in ("ids", "mask", "log_old", "log_drawn"):
        check_shape(f"{name} of the sampled texts", getattr(sampled, name), student.shape[:-1])
    inside = sampled.mask
    if inside.dtype != torch.bool or (inside.long().diff(dim=-1).abs().sum(-1) > 2 - inside[:, 0].long()).any():
        raise DataError(470, "the counted tokens of a sampled text must follow each other: its mask has gaps.")
