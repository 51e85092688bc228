"""The staged walk: every batch goes through the model once, and waits where a layer is about to be compressed.

A layer's *input* is needed before it is compressed and its *output* only afterwards. So each batch runs the model's own
forward in a greenlet (one thread, only one of them running) and parks when it reaches a stage that is not solved
yet. When all have arrived, the stage is solved and they go on, now through the compressed layers. Later stages see the
inputs that the compressed earlier ones produce, as with GPTQ's true-sequential order (arXiv:2210.17323, section 3), yet
each layer is evaluated exactly once per token, and no code here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
    """One batch on its way; `at` is the index of the stage it waits for, `number` its own."""

    at: int = -1
    number: int = -1


class Entries:
    """The door to the middle of a model: a walk with these begins at a decoder block instead of at the embeddings.

    The model's own forward is run, for its masks and positions, but the blocks before `at` pass on what they are given,
    and the block `at` is given `hidden`. Whoever calls a block outside of a walk gets the block itself.

    at       the block at which batches begin
    hidden   what each batch enters it with, as it was when it was first seen there; empty: what the forward brings
    outputs  how many values blocks return in a tuple; 0 where they return the hidden states themselves
    """

    def __init__(self, blocks: Iterable[nn.Module], outputs: int = 0) -> None:
        self.blocks = list(blocks)
        self.at = 0
        self.hidden: Sequence[Tensor] = ()
        self.outputs = outputs

    @contextmanager
    def open(self) -> Iterator[None]:
        """Stand in for the forward of every block meanwhile, behind the hooks that are there."""
        own = [vars(block).get("forward") for block in self.blocks]
        handles = []
        for index, block in enumerate(self.blocks):
            block.forward = partial(self._forward, index, block.forward)
            hook = partial(self._enter, index)
            handles.append(block.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, forward in zip(self.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        current = getcurrent()
        if index != self.at or not len(self.hidden) or not isinstance(current, _Parked):
            return None
        return _with_hidden((args, kwargs), self.hidden[current.number])

    def _forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index < self.at and isinstance(getcurrent(), _Parked):
            passed = hidden_of((args, kwargs))
            return (passed, *[None] * (self.outputs - 1)) if self.outputs else passed
        found = forward(*args, **kwargs)
        self.outputs = len(found) if isinstance(found, tuple) else 0
        return found


def hidden_of(call: Call) -> Tensor:
    """Return the hidden states with which a block is called."""
    args, kwargs = call
    hidden: Tensor = args[0] if args else kwargs[_first(kwargs)]
    return hidden


def finite(call: Call, output: Tensor) -> bool:
    """Tell whether the hidden states with which a block is called, and what it makes of them, are finite."""
    return all(bool(x.isfinite().all()) for x in (hidden_of(call), output))


def _with_hidden(call: Call, hidden: Tensor) -> Call:
    args, kwargs = call
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, _first(kwargs): hidden})


def _first(kwargs: Mapping[str, Any]) -> str:
    """Return what a block that is called by names alone calls its hidden states."""
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def walk(
    forward: Callable[[Tensor], object],
    batches: Sequence[Tensor],
    stages: Sequence[Stage],
    observe: Callable[[int, int, Any], None],
    entries: Entries | None = None,
    again: bool = False,
) -> Iterator[int]:
    """Yield the index of each stage, in order, when every batch has reached it; solve it before asking for the next.

    Batches wait before any other pre-hook of their layer, so that what rounds inputs may be decided meanwhile.

    forward   runs the model on one batch of token ids
    batches   token ids [sequences, seq_len], each
    stages    in the order in which the forward reaches them; a stage that no batch calls is yielded too
    observe   (stage, batch, x [..., in]): called once per batch with the input of the stage, before it is
              evaluated; of a stage that is a whole block, with its call in place of x
    entries   where batches begin; None: at the embeddings
    again     do not wait: what a batch has computed is thrown away when it reaches a stage, and it comes back from
              where `entries` say, which the caller moves on at every block. The same numbers, from the memory of one
              batch and more work
    """
    solved = -1

    def park(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = getcurrent()
        if index <= solved or not isinstance(current, _Parked):  # whoever solves a stage may call modules too
            return
        assert current.parent is not None
        observe(index, current.number, (args, kwargs) if stages[index].block else args[0])
        current.at = index
        current.parent.switch()

    running = [_started(forward, number) for number in range(len(batches))]
    hooked = [(module, partial(park, i)) for i, stage in enumerate(stages) for module in stage.modules]
    handles = [module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True) for module, hook in hooked]
    try:
        with nullcontext() if entries is None else entries.open():  # opened last, and so asked first
            for one, batch in zip(running, batches, strict=True):
                _go_on(one, batch, stay=not again)
            for index in range(len(stages)):
                yield index
                solved = index
                for number in [one.number for one in running if one.at == index]:  # others never call this stage
                    if again:
                        running[number] = _started(forward, number)
                        _go_on(running[number], batches[number], stay=False)
                    else:
                        _go_on(running[number])
    finally:
        for handle in handles:
            handle.remove()
        for one in running:
            if not one.dead:
                one.throw()


def _started(forward: Callable[[Tensor], object], number: int) -> _Parked:
    one = _Parked(forward)
    one.number = number
    return one


def _go_on(one: _Parked, *batch: Tensor, stay: bool = True) -> None:
    """Let a batch run until it parks or ends; gradients are off meanwhile, and only then (the mode is the thread's).

    stay  False: give up what it has computed when it parks
    """
    if not one.dead:
        with torch.no_grad(), fast_linear():
            one.switch(*batch)
            if not stay and not one.dead:
                one.throw()
