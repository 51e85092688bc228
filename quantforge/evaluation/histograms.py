"""How the weights of layers and what they are called with are spread, as histograms of few bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BINS = 61  # odd, so that one bin is centred on 0


@dataclass(frozen=True)
class Spread:
    """Shares of values in BINS bins of equal width from −edge to edge; values beyond lie in the outermost."""

    edge: float
    shares: tuple[float, ...]


def spread(values: Tensor, edge: float | None = None) -> Spread:
    """Return the histogram of `values` that are finite; `edge` is their largest magnitude if not given."""
    data = values.detach().float().flatten()
    data = data[data.isfinite()]
    if edge is None:
        edge = float(data.abs().max()) if data.numel() else 0.0
    if not data.numel() or edge == 0:
        shares = torch.zeros(BINS)
        shares[BINS // 2] = float(data.numel() > 0)
        return Spread(edge, tuple(shares.tolist()))
    counts = torch.histc(data.clamp(-edge, edge), BINS, -edge, edge)
    return Spread(edge, tuple((counts.double() / data.numel()).tolist()))


@torch.no_grad()
def layers(
    model: nn.Module, names: Sequence[str], ids: Tensor, edges: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, tuple[Spread, Spread]]:
    """Return for each named layer of `model` the spread of its weights and of its inputs over ids [windows, seq_len].

    edges  of both, by layer, for spreads that are to be compared with others
    The inputs are what the layer's own product sees, after any rounding. A layer that no token reaches is left out.
    """
    found: dict[str, tuple[Spread, Spread]] = {}
    handles = []
    for name in names:
        weight_edge, input_edge = edges[name] if edges else (None, None)

        def look(
            module: nn.Module,
            args: tuple[Any, ...],
            name: str = name,
            weight_edge: float | None = weight_edge,
            input_edge: float | None = input_edge,
        ) -> None:
            weight = module.weight
            if name not in found and args and args[0].numel() and isinstance(weight, Tensor):
                found[name] = spread(weight, weight_edge), spread(args[0], input_edge)

        handles.append(model.get_submodule(name).register_forward_pre_hook(look))  # after a gate that rounds
    try:
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
