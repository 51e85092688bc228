"""Perplexity over fixed windows, and the mean divergence from the float model, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantforge.errors import DataError

_CHUNK = 128  # tokens whose log-probabilities are held at once


@dataclass(frozen=True)
class Score:
    """What one pass over the windows found.

    losses  mean cross-entropy of each window's seq_len − 1 predictions, nats per token
    kls     mean KL(float ‖ model) of the same predictions, nats per token; empty without a reference
    """

    losses: tuple[float, ...]
    kls: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """Return exp of the mean over windows of their mean cross-entropy."""
        mean = math.fsum(self.losses) / len(self.losses)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def kl(self) -> float:
        """Return the mean KL to the float model; NaN without a reference."""
        return math.fsum(self.kls) / len(self.kls) if self.kls else math.nan


@dataclass(frozen=True)
class Reference:
    """The float model's predictions, kept as the inputs of its output head, which is far smaller than logits.

    hidden  [windows, seq_len − 1, width] float32
    logits  hidden → logits, by the float model's own head and what follows it
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]


def evaluate(
    model: nn.Module,
    ids: Tensor,
    reference: Reference | None = None,
    progress: Callable[[float], None] = lambda loss: None,
) -> Score:
    """Score `model` on token ids [windows, seq_len], one window at a time; logits are compared in float32.

    progress  called with the loss of each window
    Raises DataError for windows of fewer than two tokens, or none.
    """
    if ids.shape[0] == 0 or ids.shape[1] < 2:
        raise DataError(
            440, f"perplexity needs at least one window of two tokens, not {ids.shape[0]} of {ids.shape[1]}."
        )
    device = next(model.parameters()).device
    losses, kls = [], []
    with torch.no_grad():
        for i, window in enumerate(ids):
            tokens = window[None].to(device)
            logits = _logits(model, tokens)[0, :-1]
            losses.append(float(_cross_entropy(logits, tokens[0, 1:])))
            if reference is not None:
                kls.append(float(_divergence(logits, reference, i)))
            progress(losses[-1])
    return Score(tuple(losses), tuple(kls))


def make_reference(
    model: nn.Module, ids: Tensor, progress: Callable[[float], None] = lambda loss: None
) -> tuple[Reference, Score]:
    """Run the float `model` over ids [windows, seq_len]; return its predictions for later comparison, and its score."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[union-attr, operator]
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0][0, :-1].float().clone())

    def logits(hidden: Tensor) -> Tensor:
        out: Tensor = head(hidden.to(head.weight.dtype))
        return cap * torch.tanh(out / cap) if cap else out

    handle = head.register_forward_pre_hook(catch)
    try:
        score = evaluate(model, ids, progress=progress)
    finally:
        handle.remove()
    hidden = torch.stack(caught)
    with torch.no_grad():
        direct = _logits(model, ids[:1].to(hidden.device))[0, :-1]
        replayed = logits(hidden[0])
    assert torch.allclose(direct.float(), replayed.float(), rtol=1e-3, atol=1e-3), "the head does more than was thought"
    return Reference(hidden, logits), score


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    output: Any = model(input_ids=tokens, use_cache=False)
    logits: Tensor = output.logits
    return logits


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, target in zip(torch.split(logits, _CHUNK), torch.split(targets, _CHUNK), strict=True):
        total += F.cross_entropy(part.float(), target, reduction="sum").double()
    return total / len(targets)


def _divergence(logits: Tensor, reference: Reference, index: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    hidden = reference.hidden[index]
    for part, h in zip(torch.split(logits, _CHUNK), torch.split(hidden, _CHUNK), strict=True):
        theirs = reference.logits(h).float().log_softmax(-1)
        ours = part.float().log_softmax(-1)
        total += (theirs.exp() * (theirs - ours)).sum(-1).double().sum()
    return total / len(logits)
