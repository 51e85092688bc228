"""The staged walk: every batch goes through the model once, and waits where a layer is about to be compressed.

A layer's *input* is needed before it is compressed and its *output* only afterwards. So each batch runs the model's own
forward in a greenlet (one thread, only one of them running) and parks when it reaches a stage that is not solved
yet. When all have arrived, the stage is solved and they go on, now through the compressed layers. Later stages see the
inputs that the compressed earlier ones produce, as with GPTQ's true-sequential order (arXiv:2210.17323, section 3), yet
each layer is evaluated exactly once per token, and no code here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from quantforge.numerics.products import fast_linear


@dataclass(frozen=True)
class Stage:
    """Linear layers that read the same input and are solved together.

    names    full module names, in the order in which the forward calls them
    modules  the layers themselves
    block    True for a whole decoder block, whose calls are kept instead of its input
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    block: bool = False


Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one call of a block


def output_of(block: nn.Module, weights: dict[str, Tensor], call: Call) -> Tensor:
    """Return the hidden states that `block` makes of one call, with `weights` in place of parameters of those names."""
    args, kwargs = call
    with fast_linear():
        found: Any = torch.func.functional_call(block, weights, args, kwargs)
    hidden: Tensor = found[0] if isinstance(found, tuple) else found
    return hidden


class _Parked(greenlet):
    """One batch on its way; `at` is the index of the stage it waits for."""

    at: int = -1


def walk(
    forward: Callable[[Tensor], object],
    batches: Sequence[Tensor],
    stages: Sequence[Stage],
    observe: Callable[[int, int, Any], None],
) -> Iterator[int]:
    """Yield the index of each stage, in order, when every batch has reached it; solve it before asking for the next.

    Batches wait before any other pre-hook of their layer, so that what rounds inputs may be decided meanwhile.

    forward   runs the model on one batch of token ids
    batches   token ids [sequences, seq_len], each
    stages    in the order in which the forward reaches them; a stage that no batch calls is yielded too
    observe   (stage, batch, x [..., in]): called once per batch with the input of the stage, before it is
              evaluated; of a stage that is a whole block, with its call in place of x
    """
    solved = -1

    def park(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = getcurrent()
        if index <= solved or not isinstance(current, _Parked):  # whoever solves a stage may call modules too
            return
        assert current.parent is not None
        observe(index, running.index(current), (args, kwargs) if stages[index].block else args[0])
        current.at = index
        current.parent.switch()

    running = [_Parked(forward) for _ in batches]
    hooked = [(module, partial(park, i)) for i, stage in enumerate(stages) for module in stage.modules]
    handles = [module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True) for module, hook in hooked]
    try:
        for one, batch in zip(running, batches, strict=True):
            _go_on(one, batch)
        for index in range(len(stages)):
            yield index
            solved = index
            for one in running:
                if one.at == index:  # one that is further on never calls this stage
                    _go_on(one)
    finally:
        for handle in handles:
            handle.remove()
        for one in running:
            if not one.dead:
                one.throw()


def _go_on(one: _Parked, *batch: Tensor) -> None:
    """Let a batch run until it parks or ends; gradients are off meanwhile, and only then (the mode is the thread's)."""
    if not one.dead:
        with torch.no_grad(), fast_linear():
            one.switch(*batch)
