"""Mixtures of experts: transformers holds all experts of a block in two tensors; here each is a few linear layers.

Every expert sees tokens of its own, and is quantized by their statistics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

# what the layers of one expert are called in checkpoints: (gate, up), (down,)
NAMES: dict[str, tuple[tuple[str, str], tuple[str]]] = {
    "mixtral": (("w1", "w3"), ("w2",)),
    "qwen3_moe": (("gate_proj", "up_proj"), ("down_proj",)),
}
EXPERTS = "mlp.experts"
ROUTER = "mlp.gate"
# (in the file, in the model): what transformers renames when it loads and saves
_RENAMED = {"mixtral": (".block_sparse_moe.", ".mlp.")}

_Value = TypeVar("_Value")


class Expert(nn.Module):
    """One gated expert, its linear layers called as in checkpoints: down(act(gate(x)) · up(x))."""

    def __init__(self, kind: str, gate_up: Tensor, down: Tensor, act: nn.Module) -> None:
        """Take copies of gate and up [2 · inner, width] and of down [width, inner]."""
        super().__init__()
        self.names = (*NAMES[kind][0], *NAMES[kind][1])
        self.act_fn = act
        for name, weight in zip(self.names, (*gate_up.chunk(2), down), strict=True):
            self.add_module(name, _linear(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [tokens, width] for `x` [tokens, width]."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        result: Tensor = down(self.act_fn(gate(x)) * up(x))
        return result


class Experts(nn.ModuleList):
    """The experts of one block; what the router sends to each goes through its own layers."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, as transformers' own loop adds it up.

        hidden_states  [tokens, width]
        top_k_index    [tokens, k], the experts that the router chose
        top_k_weights  [tokens, k], their shares
        """
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            place, token = torch.where(top_k_index.T.eq(index))
            if len(token):  # an expert without tokens is not called
                out = expert(hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, out.to(total.dtype))
        return total


def unfuse(model: nn.Module) -> None:
    """Replace each module of fused experts in `model` by one of linear layers per expert, in place.

    The same function of the same numbers. Names become those of the architecture's checkpoints; a model without
    fused experts stays as it is. Weights may be on the meta device; a block at a time is held twice.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind not in NAMES:
        return
    for name, module in list(model.named_modules()):
        gate_up, down = (getattr(module, n, None) for n in ("gate_up_proj", "down_proj"))
        if name.endswith(f".{EXPERTS}") and isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            act = module.act_fn
            assert isinstance(act, nn.Module)
            experts = Experts(Expert(kind, *pair, act) for pair in zip(gate_up, down, strict=True))
            model.set_submodule(name, experts.train(module.training))


def expert_of(name: str) -> str | None:
    """Return the full name of the expert that the layer `name` belongs to, or None."""
    found = re.match(rf"(.*\.{re.escape(EXPERTS)}\.\d+)\.", name)
    return found[1] if found else None


def starved(name: str, tokens: int, width: int, total: int) -> bool:
    """Tell whether the layer `name` is an expert's that saw fewer tokens than its inputs, or under 1 % of `total`."""
    return expert_of(name) is not None and tokens < max(width, total / 100)


def as_in_model(kind: object, tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return what a file of architecture `kind` holds under the names that the model in memory has."""
    old, new = _RENAMED.get(str(kind), ("", ""))
    return {name.replace(old, new) if old else name: value for name, value in tensors.items()}


def routers(model: nn.Module) -> list[str]:
    """Return the names of the routers of a model whose experts are layers of their own, as its checkpoints have them.

    They stay in float: what other libraries hold as linear layers must be told so.
    """
    old, new = _RENAMED.get(getattr(getattr(model, "config", None), "model_type", ""), ("", ""))
    names = [n.removesuffix(EXPERTS) + ROUTER for n, m in model.named_modules() if isinstance(m, Experts)]
    return [name.replace(new, old) if old else name for name in names]


def _linear(weight: Tensor) -> nn.Linear:
    out, width = weight.shape
    layer = nn.Linear(width, out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return layer
