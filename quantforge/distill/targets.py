"""A teacher's predictions kept as its k most probable tokens with the rest in one bucket, and losses against them.

What is kept is a `TopK`, as for evaluation: float32 log-probabilities, and ids in two bytes where the vocabulary has at
most 65,536 tokens, else in four. At k = 32 that is 198 or 264 bytes a token, of which the log-probabilities take 132;
half precision would buy half as many tokens again, and lose what makes the losses bounds: they err by up to 2⁻⁹ there,
more than a good student's whole divergence, so that a student equal to its teacher would be pulled away from it.

The losses are the divergences of the k + 1 outcomes. Merging outcomes never raises one, so each is a lower bound of the
loss against all logits, higher for larger k and equal to it at k = vocab. What the bound misses is how the mass of the
rest is spread: for forward KL the teacher's mass there times the KL within it, little if k is large enough. For reverse
KL it would be the student's own mass there, which training on the bound does not see and so does not reduce: that is
refused. So is another temperature than 1, which needs the partition function of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantforge.distill.losses import Objective, divergence, divergence_pull, log_probs, with_labels
from quantforge.distill.tokens import Terms, check_shape, mean, per_token, rows_at
from quantforge.errors import DataError, RecipeError
from quantforge.evaluation.divergence import TopK, id_dtype, top_k

K = 32  # most probable tokens kept of each position
MOST_BYTES = 300  # of a position


def bytes_per_token(vocab: int, k: int = K) -> int:
    """Return how many bytes a position takes: k ids, the most probable token's again, k + 1 log-probabilities."""
    k = min(k, vocab)
    return (k + 1) * (id_dtype(vocab).itemsize + torch.float32.itemsize)


def keep(logits: Tensor, k: int = K, chunk: int | None = None) -> TopK:
    """Keep of the teacher's logits [..., vocab] what `top_k_loss` needs: k tokens a position and the rest's mass.

    Tokens are counted in a row. Raises RecipeError for k below 1 or more than 300 bytes a token, and DataError if the
    logits are not finite.
    """
    vocab = logits.shape[-1]
    if k < 1 or bytes_per_token(vocab, k) > MOST_BYTES:
        most = MOST_BYTES // bytes_per_token(vocab, 0) - 1
        raise RecipeError(
            241, f"a teacher's predictions are kept with 1 to {most} tokens a position, not {k}; {K} is usual."
        )
    return top_k(logits.detach().reshape(-1, vocab), k, chunk)


def top_k_loss(
    student: Tensor,
    kept: TopK,
    objective: Objective,
    mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean over the tokens of a lower bound of `objective`, against what was kept of the teacher.

    student  logits [..., vocab]
    kept     of as many tokens, counted in a row
    The other arguments are those of `distillation_loss`.
    Raises RecipeError for reverse KL, or a temperature other than 1, unless all tokens of the vocabulary are kept;
    DataError if the shapes differ or no token counts.
    """
    tokens = student.shape[:-1].numel()
    if (len(kept.ids), kept.vocab) != (tokens, student.shape[-1]):
        shape = [len(kept.ids), kept.vocab]
        raise DataError(
            472, f"kept predictions of shape {shape} do not go with the student's logits {list(student.shape)}."
        )
    rows = per_token(student, with_labels(top_k_terms(objective, kept), objective, student, labels), mask, chunk)
    return mean(rows, mask, count)


def top_k_terms(objective: Objective, kept: TopK) -> Terms:
    """Return the divergence from what was kept of the teacher, without labels; see `top_k_loss`."""
    check_shape("kept log-probabilities", kept.log_probs, (len(kept.ids), kept.ids.shape[1] + 1))
    _refuse_what_needs_all(objective, kept)
    t, lead = objective.temperature, (len(kept.ids),)

    def both(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log P and log Q [n, k + 1], the ids [n, k], and log Q [n, vocab] of all tokens."""
        ids = rows_at(kept.ids, places, lead).long()
        log_p = rows_at(kept.log_probs, places, lead).to(logits.dtype)
        log_p = log_p if t == 1 else log_probs(log_p, t)
        log_q = log_probs(logits, t)
        # summed over themselves: 1 − Σ of the k keeps no digit of a small rest
        rest = log_q.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return log_p, torch.cat([log_q.gather(1, ids), rest], 1), ids, log_q

    def values(logits: Tensor, places: Tensor) -> Tensor:
        log_p, log_q, _, _ = both(logits, places)
        return divergence(objective, log_p, log_q).mul_(t * t)

    def gradient(logits: Tensor, places: Tensor) -> Tensor:
        log_p, buckets, ids, log_q = both(logits, places)
        pull, rest = divergence_pull(objective, log_p, buckets), buckets[:, -1:]
        q = log_q.exp()
        within = log_q.sub_(rest).exp_().masked_fill_(rest == -torch.inf, 0.0)  # how the rest is spread
        found = within.mul_(pull[:, -1:]).scatter_(1, ids, pull[:, :-1])
        return found.addcmul_(q, pull.sum(-1, keepdim=True), value=-1).mul_(t)

    return Terms(values, gradient)


def _refuse_what_needs_all(objective: Objective, kept: TopK) -> None:
    count = kept.ids.shape[1]
    if count == kept.vocab:
        return
    known = f"the teacher's predictions hold {count} of {kept.vocab} tokens"
    if objective.temperature != 1:
        raise RecipeError(
            242,
            f"{known}, not how the rest would be at temperature {objective.temperature:g}; 1 works, or a live teacher.",
        )
    if objective.limit == "rkl":
        raise RecipeError(
            242, f"{known}, and reverse KL needs every token the student may choose; fkl works, or a live teacher."
        )
