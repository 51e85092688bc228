"""Losses between a student's and a teacher's logits: KL either way, JSD, skew KL and cross-entropy.

All are sums over tokens divided by their number, so that micro-batches add up to the batch if they are given the number
of tokens of all. Tokens that the mask leaves out are never read. Logits of half precision are compared in float32.
Logits are worked on a few tokens at a time, forwards and backwards; `from_hidden` never holds all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quantforge.distill.tokens import Terms, check_shape, mean, per_token, places_of, rows_at
from quantforge.errors import DataError, RecipeError, pick

KINDS = ("fkl", "rkl", "jsd", "skew-kl")


@dataclass(frozen=True)
class Objective:
    """What is to be small, for teacher P and student Q of each token.

    kind         fkl: KL(P ‖ Q). rkl: KL(Q ‖ P). jsd: β KL(P ‖ M) + (1 − β) KL(Q ‖ M), M = βP + (1 − β)Q (GKD,
                 arXiv:2306.13649). skew-kl: KL(P ‖ λP + (1 − λ)Q) (DistiLLM, arXiv:2402.03898)
    temperature  T: both logits are divided by it and the result is multiplied by T², which keeps the size of gradients
                 (Hinton et al., arXiv:1503.02531)
    hard         share of the cross-entropy with the labels, at temperature 1; the divergence has the rest
    beta         β of jsd
    normalized   JSD / (β (1 − β)), which is continuous: forward KL at β = 0 and reverse KL at β = 1, where JSD is 0
    skew         λ of skew-kl
    """

    kind: str = "fkl"
    temperature: float = 1.0
    hard: float = 0.0
    beta: float = 0.5
    normalized: bool = False
    skew: float = 0.1

    def __post_init__(self) -> None:
        pick("divergence", self.kind, KINDS)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RecipeError(240, f"temperature must be above 0 and finite, not {self.temperature}.")
        if not 0 <= self.hard <= 1:
            raise RecipeError(240, f"the share of cross-entropy must lie from 0 to 1, not be {self.hard}.")
        if not 0 <= self.skew < 1:
            raise RecipeError(240, f"skew must be at least 0 and below 1, not {self.skew}; DistiLLM has 0.1.")
        if not 0 <= self.beta <= 1:
            raise RecipeError(240, f"beta must lie from 0 to 1, not be {self.beta}; 0.5 is symmetric.")
        if self.kind == "jsd" and self.beta in (0, 1) and not self.normalized:
            known = "normalized=True makes it forward KL at 0 and reverse KL at 1"
            raise RecipeError(240, f"JSD at beta {self.beta:g} is 0 whatever the models; {known}.")

    @property
    def limit(self) -> str:
        """Return the kind, with that of the limit where this is one."""
        if self.kind == "skew-kl" and self.skew == 0:
            return "fkl"
        if self.kind == "jsd" and self.normalized and not 1e-30 < self.beta < 1:  # below, 1 / β overflows in float32
            return "rkl" if self.beta == 1 else "fkl"
        return self.kind


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean of `objective` over the tokens, a scalar in float32, or float64 of float64 logits.

    student  logits [..., vocab]; the gradient goes to them alone
    teacher  logits of the same shape
    mask     [...], the tokens that count; all if None. Give all logits with a mask rather than a part of them: a part
             is a copy, and so is its gradient
    labels   [...], the tokens that follow, needed where `objective.hard` is above 0; `next_tokens` makes them
    count    what the sum is divided by, such as the tokens of all micro-batches; those of `mask` if None
    chunk    tokens at once, those that fit into 16 MiB if None
    The loss is NaN where counted logits are, and infinite where a token that only one of the models allows makes it so.
    Raises DataError if the shapes differ or, unless `count` is given, no token counts.
    """
    check_shape("the teacher's logits", teacher, student.shape)
    rows = per_token(student, with_labels(dense_terms(objective, teacher), objective, student, labels), mask, chunk)
    return mean(rows, mask, count)


def forward_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean of KL(teacher ‖ student) · T²; see `distillation_loss`."""
    return distillation_loss(student, teacher, Objective("fkl", temperature), mask, count=count, chunk=chunk)


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean of KL(student ‖ teacher) · T²; see `distillation_loss`."""
    return distillation_loss(student, teacher, Objective("rkl", temperature), mask, count=count, chunk=chunk)


def jsd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    normalized: bool = False,
    temperature: float = 1.0,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean Jensen-Shannon divergence JSD(β) · T²; see `Objective` and `distillation_loss`."""
    objective = Objective("jsd", temperature, beta=beta, normalized=normalized)
    return distillation_loss(student, teacher, objective, mask, count=count, chunk=chunk)


def skew_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean of KL(P ‖ λP + (1 − λ)Q) · T² with λ = `skew`; see `distillation_loss`."""
    return distillation_loss(
        student, teacher, Objective("skew-kl", temperature, skew=skew), mask, count=count, chunk=chunk
    )


def cross_entropy(
    student: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean of −log Q(label), nats; see `distillation_loss`, which mixes it with a divergence by `hard`."""
    return mean(per_token(student, label_terms(student, labels), mask, chunk), mask, count)


def next_tokens(ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the labels, and the mask of the predictions of the tokens that `mask` [batch, tokens] marks.

    Logits at a place predict the token after it: the last place of a window predicts none, and its label is 0.
    """
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return F.pad(ids[:, 1:], (0, 1)), F.pad(counted[:, 1:], (0, 1))


def from_hidden(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    mask: Tensor | None = None,
    *,
    chunk: int = 64,
) -> Tensor:
    """Return the sum of a loss over chunks of tokens whose logits exist only while they are worked on.

    hidden  [..., width], the inputs of the output head
    head    [n, width] → logits [n, vocab]; run again in the backward pass, where its parameters get gradients too
    loss    (logits [n, vocab], places [n] of their tokens counted in a row) → their part of the loss: one of this
            module with `count` set to all tokens of the step
    chunk   tokens at once
    """
    places = places_of(mask, hidden.shape[:-1], hidden.device)

    def part_of_loss(rows: Tensor, part: Tensor) -> Tensor:
        return loss(head(rows), part)

    kept = hidden.reshape(-1, hidden.shape[-1])[places]
    parts = zip(torch.split(kept, chunk), torch.split(places, chunk), strict=True)
    losses = [checkpoint(part_of_loss, rows, part, use_reentrant=False) for rows, part in parts if len(part)]
    if not losses:
        raise DataError(471, "no token counts: the mask is empty.")
    return torch.stack(losses).sum()


def dense_terms(objective: Objective, teacher: Tensor) -> Terms:
    """Return the divergence from all of the teacher's logits [..., vocab], without labels."""
    t = objective.temperature

    def both(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        theirs = rows_at(teacher, places, teacher.shape[:-1]).to(logits.dtype)
        return log_probs(theirs, t), log_probs(logits, t)

    def values(logits: Tensor, places: Tensor) -> Tensor:
        return divergence(objective, *both(logits, places)).mul_(t * t)

    def gradient(logits: Tensor, places: Tensor) -> Tensor:
        log_p, log_q = both(logits, places)
        pull = divergence_pull(objective, log_p, log_q)
        return pull.addcmul_(log_q.exp_(), pull.sum(-1, keepdim=True), value=-1).mul_(t)

    return Terms(values, gradient)


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities [n, vocab] of logits at a temperature."""
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def label_terms(student: Tensor, labels: Tensor) -> Terms:
    """Return −log Q(label) of each token; labels [...] of logits [..., vocab]."""
    check_shape("the labels", labels, student.shape[:-1])
    vocab = student.shape[-1]

    def chosen(places: Tensor) -> Tensor:
        found = rows_at(labels, places, labels.shape)
        if len(wrong := found[(found < 0) | (found >= vocab)]):
            raise DataError(470, f"label {int(wrong[0])} of a counted token is not in a vocabulary of {vocab}.")
        return found.long()[:, None]

    def values(logits: Tensor, places: Tensor) -> Tensor:
        return -logits.log_softmax(-1).gather(1, chosen(places))[:, 0]

    def gradient(logits: Tensor, places: Tensor) -> Tensor:
        found = logits.softmax(-1)
        return found.scatter_add_(1, chosen(places), found.new_full((len(places), 1), -1.0))

    return Terms(values, gradient)


def with_labels(soft: Terms, objective: Objective, student: Tensor, labels: Tensor | None) -> Terms:
    """Return `soft` mixed with cross-entropy as `objective.hard` says."""
    share = objective.hard
    if share == 0:
        return soft
    if labels is None:
        raise DataError(470, f"a share of {share:g} of cross-entropy needs labels.")
    hard = label_terms(student, labels)
    if share == 1:
        return hard
    return Terms(
        lambda z, places: soft.values(z, places).mul_(1 - share).add_(hard.values(z, places), alpha=share),
        lambda z, places: soft.gradient(z, places).mul_(1 - share).add_(hard.gradient(z, places), alpha=share),
    )


def divergence(objective: Objective, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the divergence [n] of log-probabilities [n, outcomes], P the teacher's and Q the student's."""
    kind, beta = objective.limit, objective.beta
    if kind == "fkl":
        found = _weighed(log_p.exp(), log_p - log_q).sum(-1)
    elif kind == "rkl":
        found = _weighed(log_q.exp(), log_q - log_p).sum(-1)
    elif kind == "skew-kl":
        found = -_weighed(log_p.exp(), _lift(log_q - log_p, 1 - objective.skew)).sum(-1)
    else:
        ratio = log_p - log_q
        found = _weighed(log_q.exp(), _lift(ratio, beta)).sum(-1).mul_(beta - 1)
        found -= _weighed(log_p.exp(), _lift(ratio.neg_(), 1 - beta)).sum(-1).mul_(beta)
        found = found / (beta * (1 - beta)) if objective.normalized else found
    return found.clamp_(min=0)  # below it only by rounding


def divergence_pull(objective: Objective, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return Q · ∂/∂Q of the divergence [n, outcomes]; h − Q Σh is then the gradient with respect to the logits of Q.

    A constant added to ∂/∂Q cancels there, and is left out.
    """
    kind = objective.limit
    if kind == "fkl":
        return log_p.exp().neg_()
    if kind == "rkl":
        return _weighed(log_q.exp(), log_q - log_p)
    if kind == "skew-kl":  # Q / M is at most 1 / (1 − λ)
        kept = _lift(log_p - log_q, objective.skew).neg_().exp_()
        return _weighed(log_p.exp(), kept).mul_(objective.skew - 1)
    beta = objective.beta
    scale = 1 / beta if objective.normalized else 1 - beta
    return _weighed(log_q.exp(), _lift(log_p - log_q, beta)).mul_(-scale)


def _lift(ratio: Tensor, weight: float) -> Tensor:
    """Return log(weight · e^ratio + 1 − weight) with the relative precision that a small weight or ratio needs.

    The ratio is cut where no probability of the dtype can lie any more, so that what is infinite stays a number.
    """
    info = torch.finfo(ratio.dtype)
    most = -math.log(info.tiny * info.eps)
    ratio = ratio.clamp(-most, most)
    if weight > 0.5:
        return _lift(-ratio, 1 - weight).add_(ratio)
    top = math.log(info.max) - 8  # e^ratio overflows beyond
    return ratio.clamp(max=top).expm1_().mul_(weight).log1p_().add_(ratio.sub_(top).clamp_(min=0))


def _weighed(weight: Tensor, x: Tensor) -> Tensor:
    """Return weight · x in the place of `x`, 0 where the weight is 0 even if x is not finite there."""
    return x.mul_(weight).masked_fill_(weight == 0, 0.0)
