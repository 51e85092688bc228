"""Layers that round their inputs when they are called: a pre-hook on each, which passes inputs on until it is told how.

The layer itself stays the model's own, so that any architecture computes x̂ Ŵᵀ in its own forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from quantforge.numerics.inputs import QInput


class Gate:
    """A pre-hook that rounds the input of its layer once `rounds` says how."""

    def __init__(self, rounds: QInput | None = None) -> None:
        self.rounds = rounds

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the arguments with the first one rounded; None leaves them as they are."""
        return None if self.rounds is None else (self.rounds.round(args[0]), *args[1:])


def gate(module: nn.Module, rounds: QInput | None = None) -> Gate:
    """Put a gate before `module` that has `rounds` to say, in place of one that is there; return it."""
    found = find(module)
    if found is None:
        found = Gate()
        module.register_forward_pre_hook(found)
    found.rounds = rounds
    return found


def find(module: nn.Module) -> Gate | None:
    """Return the gate before `module`, or None."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Gate)), None)


def remove(modules: Iterable[nn.Module]) -> None:
    """Take away the gates of `modules`, which compute in float again."""
    for module in modules:
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Gate):
                del module._forward_pre_hooks[key]
