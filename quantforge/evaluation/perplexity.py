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

    hidden   [windows, seq_len − 1, width] float32
    logits   hidden → logits, by the float model's own head and what follows it
    missing  why the predictions could not be kept, so that no divergence from them can be told; "" if they were
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]
    missing: str = ""


def evaluate(
    model: nn.Module,
    ids: Tensor,
    reference: Reference | None = None,
    progress: Callable[[float], None] = lambda loss: None,
) -> Score:
    """Score `model` on token ids [windows, seq_len], one window at a time; logits are compared in float32.

    reference  with it, the divergence from the float model is measured too, unless it is `missing`
    progress   called with the loss of each window
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
            if reference is not None and not reference.missing:
                kls.append(float(_divergence(logits, reference, i)))
            progress(losses[-1])
    return Score(tuple(losses), tuple(kls))


def make_reference(
    model: nn.Module, ids: Tensor, progress: Callable[[float], None] = lambda loss: None
) -> tuple[Reference, Score]:
    """Run the float `model` over ids [windows, seq_len]; return its predictions for later comparison, and its score.

    The reference is `missing`, and says why, where the model's logits are not what its head and the scale or the soft
    cap of its config make of the head's inputs.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    follow = _after_head(model)
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args:
            caught.append(args[0].flatten(end_dim=-2)[:-1].float().clone())

    def logits(hidden: Tensor) -> Tensor:
        return follow(head(hidden.to(head.weight.dtype)))

    handle = head.register_forward_pre_hook(catch) if head is not None else None
    try:
        score = evaluate(model, ids, progress=progress)
    finally:
        if handle is not None:
            handle.remove()
    if [len(hidden) for hidden in caught] != [ids.shape[1] - 1] * len(ids):
        return _missing("the model does not call its output head once for all tokens"), score
    hidden = torch.stack(caught)
    with torch.no_grad():
        direct, replayed = _logits(model, ids[:1].to(hidden.device))[0, :-1], logits(hidden[0])
    if not _agree(direct, replayed):
        return _missing("the model's logits are not what its output head and config make of the head's inputs"), score
    return Reference(hidden, logits), score


def _missing(reason: str) -> Reference:
    return Reference(torch.empty(0), lambda hidden: hidden, f"no divergence from the float model: {reason}")


def _after_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what the config says happens to the head's outputs: a divisor, a factor or a soft cap."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    fields = (getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"))
    divisor, factor, cap = (value if isinstance(value, int | float) else None for value in fields)

    def follow(logits: Tensor) -> Tensor:
        if divisor:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    return follow


def _agree(direct: Tensor, replayed: Tensor) -> bool:
    """Tell whether logits are the same but for rounding; a batch of another shape may be summed in another order."""
    if direct.shape != replayed.shape:
        return False
    close = max(1e-3, 2 * torch.finfo(direct.dtype).eps) * float(direct.abs().max())
    return float((direct.float() - replayed.float()).abs().max()) <= close


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
