"""One forward of a batch through a model as training needs it: logits, inputs of the head, or outputs of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from quantforge.distill.generate import last_logits
from quantforge.distill.gkd import positions_of
from quantforge.errors import ModelError
from quantforge.evaluation.reference import after_head
from quantforge.training.batches import Batch

Head = Callable[[Tensor], Tensor]
"""Inputs of the output head [n, width] → logits [n, vocab]."""


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits [batch, tokens, vocab]; padding, on either side, is attended to by nothing."""
    found: Tensor = _run(model, batch).logits
    return found


def head_inputs(model: Any, batch: Batch) -> tuple[Tensor, Head]:
    """Return what the output head is to be given [batch, tokens, width], and the head with what follows it.

    The logits of all tokens are never made, where the model can leave them.
    """
    caught = list[Tensor]()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0])

    handle = model.get_decoder().register_forward_hook(keep)
    try:
        _run(model, batch, last_only=True)
    finally:
        handle.remove()
    head, follow = model.get_output_embeddings(), after_head(model)
    return caught[-1], lambda rows: follow(head(rows))


def without_logits(model: nn.Module, batch: Batch) -> None:
    """Run a batch for the sake of what hooks see, without logits where the model can leave them."""
    _run(model, batch, last_only=True)


def blocks(model: Any) -> nn.ModuleList:
    """Return the decoder blocks of a model, adapters in them or not; ModelError if there are none."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(331, f"no list of {count} decoder blocks was found in {type(model).__name__}.")


@contextmanager
def block_outputs(model: nn.Module, fed: Sequence[Tensor] | None = None) -> Iterator[dict[int, Tensor]]:
    """Yield what each block gives [batch, tokens, width] by its number, filled by the forwards within.

    fed  what each block is given in place of what the block before it gave; gradient checkpointing, which runs blocks
         again later, does not go with it
    """
    found: dict[int, Tensor] = {}
    handles = []

    def keep(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def feed(index: int) -> Callable[[nn.Module, Any, Any], tuple[Any, Any]]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            assert fed is not None
            if args:
                return (fed[index], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": fed[index]}

        return hook

    for i, block in enumerate(blocks(model)):
        handles.append(block.register_forward_hook(keep(i)))
        if fed is not None:
            handles.append(block.register_forward_pre_hook(feed(i), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, batch: Batch, *, last_only: bool = False) -> Any:
    """Call the model on a batch, without a cache; where nothing is padded, as if there were no mask."""
    device = next(model.parameters()).device
    given: dict[str, Any] = {"input_ids": batch.ids.to(device), "use_cache": False}
    if not bool(batch.attention.all()):
        attention = batch.attention.to(device)
        given |= {"attention_mask": attention.long(), "position_ids": positions_of(attention)}
    return model(**given, **(last_logits(model) if last_only else {}))
