"""Divergence from the float model token by token: KL, agreement and flips, dense or from a small cached reference.

`TopK` keeps the k most probable tokens of each position and the rest of the mass in one bucket: it outlives the run in
one file, needs no float model, and gives a lower bound of the KL, since merging outcomes never raises it (the data
processing inequality). How far below the dense value it lies is told by `gap` on a few windows.

Logits are compared in float32, a few tokens at a time: a tensor of [tokens of a chunk, vocabulary] takes at most 16 MiB
and four of them live at once, whatever the vocabulary. Rounding is below about 1e-6 nats a token for the logits that
models give; by so much may the bound lie above the dense value, or fall from one k to a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantforge.errors import DataError

Rows = Callable[[slice], Tensor]
"""Gives the float model's logits [rows, vocab] of a slice of tokens."""

_BYTES = 2**24  # of a chunk's float32 logits


@dataclass(frozen=True)
class TokenDivergence:
    """How a model differs from the float model, for each of some tokens; all tensors are [tokens] and on the CPU.

    kl           KL(float ‖ model) in nats, float64, or a lower bound of it
    agree        whether both find the same token most probable
    float_right  whether the float model's most probable token is the one that follows
    right        whether the model's is
    """

    kl: Tensor
    agree: Tensor
    float_right: Tensor
    right: Tensor


@dataclass(frozen=True)
class Divergence:
    """What the tokens amount to.

    mean, median, p99  of the tokens' KL, nats; p99 is the least value that 99 % of the tokens do not exceed
    agreement          share of the tokens of which both models find the same one most probable
    lost, gained       how many next tokens only the float model, or only the other, finds most probable
    """

    tokens: int
    mean: float
    median: float
    p99: float
    agreement: float
    lost: int
    gained: int


@dataclass(frozen=True)
class Gap:
    """The mean KL over the same tokens, dense and as the lower bound that a cached reference gives, nats."""

    dense: float
    bound: float

    @property
    def value(self) -> float:
        """Return by how much the bound lies below the dense value, nats."""
        return self.dense - self.bound

    @property
    def share(self) -> float:
        """Return the part of the dense value that the bound misses; 0 if there is none to miss."""
        return self.value / self.dense if self.dense else 0.0


@dataclass(frozen=True)
class TopK:
    """The float model's predictions: the k most probable tokens of each position, the rest of the mass in one bucket.

    ids        [tokens, k] uint16 for a vocabulary of up to 65,536, else int32; the most probable first
    log_probs  [tokens, k + 1] float32, nats; the last is that of the rest, −inf if there is none
    top        [tokens] what the float model finds most probable, chosen among equals as argmax does; dtype of ids

    At k = 128, 48 windows of 512 tokens take 19 MB, or 25 MB with int32. The log-probabilities stay float32: halving
    them to float16 would buy a larger k, but its errors (2⁻⁹ at −4 to −8) would lift the bound above the dense value
    where models are close.
    """

    ids: Tensor
    log_probs: Tensor
    top: Tensor
    vocab: int

    def rows(self, rows: slice) -> TopK:
        """Return the part for a slice of the tokens, such as those of one window."""
        return TopK(self.ids[rows], self.log_probs[rows], self.top[rows], self.vocab)


def chunk_tokens(vocab: int) -> int:
    """Return how many tokens' logits are held in float32 at once: those that fit into 16 MiB, at least one."""
    return max(1, _BYTES // (4 * vocab))


@torch.no_grad()
def dense_divergence(logits: Tensor, float_logits: Rows, targets: Tensor, chunk: int | None = None) -> TokenDivergence:
    """Compare a model's logits [tokens, vocab] with all of the float model's.

    float_logits  for a tensor of logits, its `__getitem__`
    targets       [tokens], the tokens that follow
    chunk         tokens at once, `chunk_tokens` of the vocabulary if None
    The KL of a token is NaN where logits are, and infinite where a token that the float model allows has none.
    Raises DataError if the shapes differ.
    """
    parts = []
    for rows in _chunks(logits, targets, chunk):
        ours, theirs = logits[rows], float_logits(rows)
        _check_shapes(ours, theirs.shape)
        kl = _kl(theirs.float().log_softmax(-1), ours.float().log_softmax(-1))
        parts.append(_compared(kl, theirs.argmax(-1), ours.argmax(-1), targets[rows]))
    return joined(parts)


@torch.no_grad()
def top_k(logits: Tensor, k: int = 128, chunk: int | None = None) -> TopK:
    """Keep of the float model's logits [tokens, vocab] the k largest, or all if they are fewer, and the rest's mass.

    chunk  tokens at once, `chunk_tokens` of the vocabulary if None
    Raises DataError for k below 1 or logits that are NaN or +inf.
    """
    tokens, vocab = logits.shape
    if k < 1:
        raise DataError(444, f"a cached reference keeps at least 1 token of each position, not {k}.")
    dtype = id_dtype(vocab)
    ids = torch.empty(tokens, min(k, vocab), dtype=dtype)
    log_probs = torch.empty(tokens, min(k, vocab) + 1)
    top = torch.empty(tokens, dtype=dtype)
    for rows in _chunks(logits, None, chunk):
        part = logits[rows].float()
        found = part.topk(min(k, vocab)).indices
        ids[rows], log_probs[rows], top[rows] = found.to(dtype), _buckets(part, found), part.argmax(-1).to(dtype)
    bad = log_probs.isnan().any(-1).nonzero()
    if len(bad):
        raise DataError(444, f"the float model's logits are not finite at prediction {int(bad[0])} of {tokens}.")
    return TopK(ids, log_probs, top, vocab)


@torch.no_grad()
def top_k_divergence(logits: Tensor, reference: TopK, targets: Tensor, chunk: int | None = None) -> TokenDivergence:
    """Compare a model's logits [tokens, vocab] with what is kept of the float model's; the KL is a lower bound.

    It is the KL of the k + 1 buckets: 0 ≤ bound ≤ dense, higher for larger k, dense at k = vocab; but for rounding.
    targets  [tokens], the tokens that follow
    chunk    tokens at once, `chunk_tokens` of the vocabulary if None
    Raises DataError if the shapes differ.
    """
    _check_shapes(logits, (len(reference.ids), reference.vocab))
    parts = []
    for rows in _chunks(logits, targets, chunk):
        part, kept = logits[rows].float(), reference.rows(rows)
        ours = _buckets(part, kept.ids.to(part.device, torch.int64))
        kl = _kl(kept.log_probs.to(part.device).double(), ours.double())
        parts.append(_compared(kl, kept.top.to(part.device, torch.int64), part.argmax(-1), targets[rows]))
    return joined(parts)


def joined(parts: Sequence[TokenDivergence]) -> TokenDivergence:
    """Put the tokens of several parts, such as windows, one after the other. Raises DataError for none."""
    if not any(len(part.kl) for part in parts):
        raise DataError(444, "there is no token to compare.")
    names = ("kl", "agree", "float_right", "right")
    return TokenDivergence(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def joined_top_k(parts: Sequence[TopK]) -> TopK:
    """Put the references of several parts, such as windows, one after the other; all of the same k and vocabulary."""
    if not parts:
        raise DataError(444, "there is no token to keep.")
    ids, log_probs, top = ([p.ids for p in parts], [p.log_probs for p in parts], [p.top for p in parts])
    return TopK(torch.cat(ids), torch.cat(log_probs), torch.cat(top), parts[0].vocab)


def summarize(found: TokenDivergence) -> Divergence:
    """Reduce the tokens to the numbers of a report; a KL of NaN in one token makes all three of the KL NaN."""
    kl = np.sort(found.kl.numpy())  # NaN comes last
    return Divergence(
        tokens=len(kl),
        mean=float(kl.mean()),
        median=float(np.median(kl)),
        p99=math.nan if np.isnan(kl[-1]) else float(kl[-1 - len(kl) // 100]),
        agreement=float(found.agree.double().mean()),
        lost=int((found.float_right & ~found.right).sum()),
        gained=int((found.right & ~found.float_right).sum()),
    )


def gap(dense: TokenDivergence, bound: TokenDivergence) -> Gap:
    """Tell how far the bound of a cached reference lies below the dense KL of the same tokens.

    Raises DataError if the tokens are not as many.
    """
    if len(dense.kl) != len(bound.kl):
        raise DataError(444, f"a gap is between values of the same tokens, not of {len(dense.kl)} and {len(bound.kl)}.")
    return Gap(float(dense.kl.mean()), float(bound.kl.mean()))


def _chunks(logits: Tensor, targets: Tensor | None, chunk: int | None) -> Iterator[slice]:
    """Yield the slices of tokens that are worked on at once."""
    tokens, vocab = logits.shape
    if targets is not None and targets.shape != (tokens,):
        raise DataError(444, f"{list(targets.shape)} next tokens do not go with logits of {tokens} tokens.")
    step = chunk or chunk_tokens(vocab)
    yield from (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _check_shapes(logits: Tensor, expected: tuple[int, ...]) -> None:
    if logits.shape != expected:
        raise DataError(444, f"logits of shape {list(logits.shape)} do not go with the float model's {list(expected)}.")


def id_dtype(vocab: int) -> torch.dtype:
    """Return the dtype that keeps the ids of a vocabulary."""
    return torch.uint16 if vocab <= 2**16 else torch.int32


def _buckets(part: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities [rows, k + 1] of ids [rows, k] and of all others together; float32.

    The others' is summed over themselves, since 1 − Σ of the k keeps no digit of a small rest.
    """
    rest = part.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([part.gather(1, ids), rest], 1).double().log_softmax(-1).float()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p ‖ q) [rows] in float64 from log-probabilities [rows, outcomes], both of which are overwritten."""
    q.neg_().add_(p)
    p.exp_()
    q.mul_(p).masked_fill_(p == 0, 0.0)  # what never happens adds nothing, even where −inf − −inf is NaN
    return q.sum(-1).double().clamp_(min=0)


def _compared(kl: Tensor, theirs: Tensor, ours: Tensor, targets: Tensor) -> TokenDivergence:
    """Put together what is known of some tokens; theirs, ours: what each model finds most probable [rows]."""
    kl, theirs, ours, targets = (tensor.cpu() for tensor in (kl, theirs, ours, targets))
    return TokenDivergence(kl, theirs == ours, theirs == targets, ours == targets)
