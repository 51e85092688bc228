"""Perplexity over fixed windows, and the divergence from the float model, in one pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantforge.errors import DataError
from quantforge.evaluation.divergence import (
    Divergence,
    Gap,
    TokenDivergence,
    dense_divergence,
    gap,
    joined,
    joined_top_k,
    summarize,
    top_k,
    top_k_divergence,
)
from quantforge.evaluation.reference import DENSE, Dense, K, Reference, after_head
from quantforge.numerics.products import fast_linear

_CHUNK = 128  # tokens whose log-probabilities are held at once


@dataclass(frozen=True)
class Score:
    """What one pass over the windows found.

    losses             mean cross-entropy of each window's seq_len − 1 predictions, nats per token
    kls                mean KL(float ‖ model) of the same predictions, nats per token; empty without a reference. Lower
                       bounds, from the most probable tokens that the reference keeps
    divergence         of all predictions; None without a reference
    gap                how far below the dense mean the bound lies, over the first windows; None where that is unknown
    tokens_per_second  that went through the model, the comparing left out
    """

    losses: tuple[float, ...]
    kls: tuple[float, ...] = ()
    divergence: Divergence | None = None
    gap: Gap | None = None
    tokens_per_second: float = field(default=math.nan, compare=False)

    @property
    def perplexity(self) -> float:
        """Return exp of the mean over windows of their mean cross-entropy."""
        mean = math.fsum(self.losses) / len(self.losses)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def kl(self) -> float:
        """Return the mean KL to the float model; NaN without a reference."""
        return math.fsum(self.kls) / len(self.kls) if self.kls else math.nan


def evaluate(
    model: nn.Module,
    ids: Tensor,
    reference: Reference | None = None,
    progress: Callable[[float], None] = lambda loss: None,
) -> Score:
    """Score `model` on token ids [windows, seq_len], one window at a time; logits are compared in float32.

    reference  with it, the divergence from the float model is measured too
    progress   called with the loss of each window
    Raises DataError for windows of fewer than two tokens, or none, or a reference of others.
    """
    _check(ids)
    if reference is not None and (len(ids), ids[:, 1:].numel()) != (len(reference.losses), len(reference.kept.ids)):
        raise DataError(440, f"the reference is of {len(reference.losses)} windows, not of {len(ids)} like these.")
    losses, seconds = [], 0.0
    found: list[TokenDivergence] = []
    whole: list[TokenDivergence] = []
    for i, window in enumerate(ids):
        logits, targets, took = _predictions(model, window)
        seconds += took
        losses.append(float(cross_entropy(logits, targets)))
        if reference is not None:
            found.append(top_k_divergence(logits, reference.window(i), targets))
            if reference.dense is not None and i < len(reference.dense.hidden):
                whole.append(_dense(logits, reference.dense, i, targets))
        progress(losses[-1])
    return Score(
        tuple(losses),
        tuple(float(part.kl.mean()) for part in found),
        summarize(joined(found)) if found else None,
        gap(joined(whole), joined(found[: len(whole)])) if whole else None,
        ids.numel() / max(seconds, 1e-9),
    )


def make_reference(
    model: nn.Module, ids: Tensor, progress: Callable[[float], None] = lambda loss: None, k: int = K
) -> tuple[Reference, Score]:
    """Run the float `model` over ids [windows, seq_len]; keep its predictions for later comparison, with its score.

    Whole distributions are kept of the first windows only, and of none where the model's logits are not what its head
    and the scale or the soft cap of its config make of the head's inputs.
    """
    _check(ids)
    parts, losses, seconds = [], [], 0.0
    with _head_inputs(model) as caught:
        for window in ids:
            logits, targets, took = _predictions(model, window)
            seconds += took
            losses.append(float(cross_entropy(logits, targets)))
            parts.append(top_k(logits, k))
            progress(losses[-1])
            if len(losses) == 1:
                first = logits[:_CHUNK].clone()
            if len(losses) >= DENSE:
                caught.closed = True
    reference = Reference(joined_top_k(parts), tuple(losses), _whole(model, caught.hidden, first, ids))
    return reference, Score(reference.losses, tokens_per_second=ids.numel() / max(seconds, 1e-9))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [tokens, vocab] for targets [tokens], nats in float64."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, target in zip(torch.split(logits, _CHUNK), torch.split(targets, _CHUNK), strict=True):
        total += F.cross_entropy(part.float(), target, reduction="sum").double()
    return total / len(targets)


def _check(ids: Tensor) -> None:
    if ids.shape[0] == 0 or ids.shape[1] < 2:
        raise DataError(
            440, f"perplexity needs at least one window of two tokens, not {ids.shape[0]} of {ids.shape[1]}."
        )


@torch.no_grad()
def _predictions(model: nn.Module, window: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the logits [seq_len − 1, vocab] of one window, the tokens that follow, and the seconds it took."""
    tokens = window[None].to(next(model.parameters()).device)
    start = time.perf_counter()
    with fast_linear():
        output: Any = model(input_ids=tokens, use_cache=False)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return output.logits[0, :-1], tokens[0, 1:], time.perf_counter() - start


class _Caught:
    """The inputs that the output head was called with, in order, until it is closed."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.closed = False

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and not self.closed:
            self.hidden.append(args[0].flatten(end_dim=-2)[:-1].float().clone())


@contextmanager
def _head_inputs(model: nn.Module) -> Iterator[_Caught]:
    caught = _Caught()
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(caught) if head is not None else None
    try:
        yield caught
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def _whole(model: nn.Module, caught: list[Tensor], first: Tensor, ids: Tensor) -> Dense | None:
    """Return the whole predictions over the first windows; None if `first`, those of one, cannot be had from it."""
    if [len(hidden) for hidden in caught] != [ids.shape[1] - 1] * min(DENSE, len(ids)):
        return None  # the head is not called once for all tokens
    head, follow = model.get_output_embeddings(), after_head(model)  # type: ignore[operator]

    def logits(hidden: Tensor) -> Tensor:
        return follow(head(hidden.to(head.weight.dtype)))

    return Dense(torch.stack(caught), logits) if _agree(first, logits(caught[0][:_CHUNK])) else None


def _agree(direct: Tensor, replayed: Tensor) -> bool:
    """Tell whether logits are the same but for rounding; a batch of another shape may be summed in another order."""
    if direct.shape != replayed.shape:
        return False
    close = max(1e-3, 2 * torch.finfo(direct.dtype).eps) * float(direct.abs().max())
    return float((direct.float() - replayed.float()).abs().max()) <= close


def _dense(logits: Tensor, dense: Dense, index: int, targets: Tensor) -> TokenDivergence:
    return dense_divergence(logits, lambda rows: dense.logits(dense.hidden[index][rows]), targets)
