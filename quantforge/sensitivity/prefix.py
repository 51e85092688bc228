"""Running a model from any of its blocks on, by its own forward, from hidden states that were kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.evaluation import perplexity
from quantforge.evaluation.reference import Reference
from quantforge.numerics.products import fast_linear

_EQUAL = 1e-4  # nats by which the float model may differ from itself when it is run from a block on


class Prefix:
    """What the float model's blocks before one of them make of every window.

    The states of one block are kept, and are moved forward block by block: memory is that of one layer of hidden
    states. The model runs its own forward; the blocks before the current one return what was kept, without running. A
    model that hands more from block to block than its blocks return is told by its losses, and is run whole.

    model      in float whenever `advance` is called
    blocks     its decoder blocks in order
    ids        token ids [windows, seq_len]
    reference  the float model's predictions over them
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, reference: Reference) -> None:
        self.model, self.blocks, self.ids, self.reference = model, list(blocks), ids, reference
        self.at = 0
        self.reusable = True
        self._kept: list[Any] = [None] * len(ids)  # outputs of the block before

    def advance(self, index: int) -> None:
        """Move the states on to block `index`; never back."""
        while self.at < index and self.reusable:
            kept = []
            for window, before in zip(self.ids, self._kept, strict=True):
                with _skipping(self.blocks[: self.at], before):
                    kept.append(_output(self.model, self.blocks[self.at], window))
            self._kept, self.at = kept, self.at + 1
            self.reusable = all(output is not None for output in kept) and self._equals_itself()
        if not self.reusable:
            self.at, self._kept = 0, [None] * len(self.ids)

    def score(self, windows: int | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Run the model as it is from the current block on; return each window's mean cross-entropy and KL, nats."""
        losses, kls = [], []
        for i, before in enumerate(self._kept[:windows]):
            own = Reference(self.reference.window(i), self.reference.losses[i : i + 1])
            with _skipping(self.blocks[: self.at], before), fast_linear():
                found = perplexity.evaluate(self.model, self.ids[i : i + 1], own)
            losses.append(found.losses[0])
            kls.append(found.kls[0])
        return tuple(losses), tuple(kls)

    def _equals_itself(self) -> bool:
        try:
            (loss,), (kl,) = self.score(windows=1)
        except Exception:  # whatever a model does that misses what its skipped blocks would have left
            return False
        return abs(loss - self.reference.losses[0]) < _EQUAL and kl < _EQUAL


@contextmanager
def _skipping(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let each of `blocks` return a copy of `output` at once, whatever it is called with."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *args, **kwargs: output
    if blocks:
        blocks[-1].forward = lambda *args, **kwargs: _copied(output)  # the next one may write into its input
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output


class _Reached(Exception):  # noqa: N818, it is no error
    """A block has returned, and nothing behind it need run."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _output(model: nn.Module, block: nn.Module, window: Tensor) -> Any:
    """Return what `block` makes of one window [seq_len] of token ids; None if it is not called."""

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Reached(output)

    handle = block.register_forward_hook(stop)
    try:
        with torch.no_grad(), fast_linear():
            model(input_ids=window[None].to(next(model.parameters()).device), use_cache=False)
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    return None
