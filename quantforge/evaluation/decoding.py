"""Perplexity as decoding sees it: every token through the cache, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantforge.errors import DataError, ModelError
from quantforge.evaluation.perplexity import Score
from quantforge.numerics.products import fast_linear


def evaluate_decoding(
    model: nn.Module,
    ids: Tensor,
    make_cache: Callable[[], Any],
    progress: Callable[[float], None] = lambda loss: None,
) -> tuple[Score, float]:
    """Score `model` on token ids [windows, seq_len], all windows as one batch; logits are compared in float32.

    make_cache  returns an empty transformers cache, such as a `KVCache` or a `DynamicCache`
    progress    called after each of the seq_len − 1 tokens with its mean loss over the windows
    Returns the score, and how many bytes the cache held at the end for each token of a window, all layers together.
    Raises DataError for windows of fewer than two tokens, or none, and ModelError if the model does not fill the cache.
    """
    windows, length = ids.shape
    if windows == 0 or length < 2:
        raise DataError(440, f"perplexity needs at least one window of two tokens, not {windows} of {length}.")
    ids = ids.to(next(model.parameters()).device)
    total = torch.zeros(windows, dtype=torch.float64, device=ids.device)
    cache = make_cache()
    with torch.no_grad(), fast_linear():
        for t in range(length - 1):
            output: Any = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            losses = F.cross_entropy(output.logits[:, -1].float(), ids[:, t + 1], reduction="none").double()
            total += losses
            progress(float(losses.mean()))
            if t == 0 and cache.get_seq_length() != 1:
                raise ModelError(
                    391, f"{type(model).__name__} did not put its keys and values into the cache it was given."
                )
    score = Score(tuple((total / (length - 1)).tolist()))
    return score, _held(cache) / (windows * (length - 1))


def _held(cache: Any) -> int:
    """Return how many bytes the cache holds: what it says itself, or the keys and values of its layers."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
