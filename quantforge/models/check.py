"""Check that a model is what its folder says: names and shapes before it is loaded, values and token ids after."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.utils import logging

from quantforge.errors import ModelError, QuantForgeError
from quantforge.models.folder import FLOATS, Folder, read_folder
from quantforge.models.headers import TensorInfo, read_header, show, some

__all__ = [
    "Folder",
    "TensorInfo",
    "as_refusal",
    "check_finite",
    "check_ids",
    "check_names_and_shapes",
    "check_plain",
    "check_tensors",
    "check_tokenizer",
    "is_finite",
    "read_folder",
    "read_header",
]

_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_PIECE = 1 << 20  # elements that are looked at together
_Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]


@contextmanager
def as_refusal(folder: object, kind: object) -> Iterator[None]:
    """Turn whatever transformers raises where it makes a model of a config that it had accepted into a ModelError.

    folder  where the config lies
    kind    its model_type
    """
    try:
        yield
    except QuantForgeError:
        raise
    except Exception as error:  # a hostile config can make it raise anything
        why = f"{type(error).__name__}: {error}"
        raise ModelError(
            328,
            f"transformers can make no language model of the config.json in {show(folder)}, of type {show(kind)} "
            f"({why[:200]}); use the config.json of this model.",
        ) from error


def check_names_and_shapes(folder: Folder, model: torch.nn.Module) -> None:
    """Compare the folder's tensors with a model made from its config, on the meta device.

    Names are matched as transformers matches them when it loads (renamed, fused, tied, with or without the base model's
    prefix), by a rehearsal of its own loading with tensors that have no data. ModelError if a tensor is missing, is of
    another shape, is no float, or does not belong.
    """
    assert isinstance(model, PreTrainedModel)
    shapes = {name: t.shape for name, t in folder.tensors.items()}
    missing, unexpected, mismatched = _rehearse(model, shapes)
    whose = f"{show(folder.path)} does not fit its config.json ({type(model).__name__})"
    if mismatched:
        listed = some(f"{show(name)} is {list(got)}, not {list(want)}" for name, got, want in sorted(mismatched))
        raise ModelError(
            341, f"{whose}: {len(mismatched)} tensors have another shape: {listed}; download the model again."
        )
    if missing:
        # Of a tied pair the second is absent by right; it is the first that has to be found.
        tied = model.all_tied_weights_keys
        missing = {name for name in missing if tied.get(name) not in missing}
        listed = some(map(show, sorted(missing)))
        raise ModelError(340, f"{whose}: {len(missing)} tensors are missing: {listed}; download the model again.")
    if unexpected:
        listed = some(map(show, sorted(unexpected)))
        raise ModelError(
            342, f"{whose}: {len(unexpected)} tensors do not belong to it: {listed}; use the config.json of this model."
        )
    odd = {name for name, t in folder.tensors.items() if t.dtype not in FLOATS}
    if odd:
        _refuse_odd(folder, model, odd)


def _refuse_odd(folder: Folder, model: PreTrainedModel, odd: set[str]) -> None:
    """Raise ModelError if a parameter would be filled from tensors that are no floats; buffers may be of any dtype."""
    wanted = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    try:
        missing, _, mismatched = _rehearse(model, {n: t.shape for n, t in folder.tensors.items() if n not in odd})
        lost = wanted & (missing | {name for name, _, _ in mismatched})
    except ModelError:  # what is left cannot be fused
        lost = odd
    if lost:
        listed = some(f"{show(n)} is {folder.tensors[n].dtype}" for n in sorted(odd, key=lambda n: (n not in lost, n)))
        raise ModelError(343, f"weights must be {', '.join(FLOATS)}, but {listed}: use the unquantized model.")


def _rehearse(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> tuple[set[str], set[str], set[_Mismatch]]:
    """Load tensors of these shapes, without data, into a twin of `model` → missing, unexpected and mismatched names."""
    state = {name: torch.empty(shape, dtype=model.dtype, device="meta") for name, shape in shapes.items()}
    try:
        with _quiet():
            _, found = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=state,
                dtype=model.dtype,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:
        # Raised when tensors that are to be fused, such as a layer's experts, are too few or do not fit together.
        kind = type(model).__name__
        raise ModelError(
            344, f"tensors that {kind} fuses when it loads are missing or of another shape: download the model again."
        ) from error
    mismatched = {(name, tuple(got), tuple(want)) for name, got, want in found["mismatched_keys"]}
    return set(found["missing_keys"]), set(found["unexpected_keys"]), mismatched


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' report and progress bar off the terminal: a ModelError says it in a line."""
    level = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(hook)


def check_finite(model: torch.nn.Module) -> None:
    """Raise ModelError naming the parameters that hold NaN or Inf, and how many of each.

    Parameters on the meta device, which are yet to be read, are left to `check_tensors`.
    """
    check_tensors(model.named_parameters())


def check_tensors(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> None:
    """Raise ModelError naming those of the tensors that hold NaN or Inf, and how many, or one beyond `dtype`.

    dtype  in which they will be held; None: their own
    """
    bad = []
    for name, tensor in tensors:
        x = tensor.detach()
        if not is_finite(x):
            nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
            bad.append(f"{show(name)} has {nan:,} NaN and {inf:,} Inf of {x.numel():,}")
        elif dtype is not None and not is_finite(x, dtype):
            most, what = float(x.abs().max()), str(dtype).removeprefix("torch.")
            raise ModelError(365, f"{show(name)} holds {most:.3g}, which {what}, the model's dtype, cannot hold.")
    if bad:
        are = "tensor is" if len(bad) == 1 else "tensors are"
        raise ModelError(345, f"{len(bad)} {are} not finite: {some(bad)}; download the model again or repair it.")


def is_finite(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Tell whether a tensor, rounded to `dtype`, holds no NaN and no Inf; true of integers, and on the meta device."""
    if x.is_meta or not x.is_floating_point():
        return True
    if x.numel() and not any(x.stride()):  # one number, expanded
        x = x[(0,) * x.dim()]
    # A sum is finite only if every term is; the converse fails when it overflows, so a bad sum is only a suspicion.
    # Piece by piece, for the sum of a narrow dtype makes a copy in the wide one.
    wide = torch.promote_types(dtype or x.dtype, torch.float32)
    pieces = (piece.to(dtype or x.dtype) for piece in torch.split(x.detach().reshape(-1), _PIECE))
    return all(bool(torch.isfinite(p.sum(dtype=wide))) or bool(torch.isfinite(p.to(wide)).all()) for p in pieces)


def check_plain(model: torch.nn.Module) -> None:
    """Raise ModelError if a layer's weight is computed anew from other parameters: what is set in its place is lost."""
    for name, module in model.named_modules():
        if is_parametrized(module):
            raise ModelError(
                329,
                f"{show(name)} is parametrized ({some(module.parametrizations)}), so that its weight cannot be set: "
                "make it an ordinary one first, by torch.nn.utils.parametrize.remove_parametrizations.",
            )


def check_tokenizer(tokenizer: Any, model_config: Any, folder_name: str) -> None:
    """Raise ModelError if the tokenizer can give an id that has no row in the model's embedding.

    Special tokens without a role in text (such as an image marker in the text-only member of a family) may lie beyond
    the rows, since text does not yield them; `check_ids` tells if it does after all.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise ModelError(
            325, f"the tokenizer in {show(folder_name)} is a {type(tokenizer).__name__}: use the one of this model."
        )
    rows = model_config.get_text_config().vocab_size
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    names.update({i: str(token) for i, token in added.items()})
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    marks = {i for i, token in added.items() if getattr(token, "special", False)} - roles
    beyond = sorted(i for i in names if i >= rows and i not in marks)
    if beyond:
        raise ModelError(
            346,
            f"the tokenizer in {show(folder_name)} has {len(beyond)} tokens beyond the {rows:,} rows of the embedding, "
            f"first {show(names[beyond[0]])} with id {beyond[0]:,}: use the tokenizer that belongs to the model.",
        )


def check_ids(ids: Tensor, tokenizer: Any, model_config: Any) -> None:
    """Raise ModelError if token ids [...] reach beyond the rows of the embedding, naming the first token that does."""
    rows = model_config.get_text_config().vocab_size
    beyond = ids[ids >= rows]
    if beyond.numel():
        first = int(beyond.flatten()[0])
        token = tokenizer.convert_ids_to_tokens(first) if tokenizer is not None else "?"
        raise ModelError(
            347,
            f"the text holds the token {show(token)}, id {first:,}, but the embedding has {rows:,} rows: remove it.",
        )
