"""Tensors kept in one file with the facts they were made from; a file of other facts is refused, and says of which."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantforge.errors import DataError
from quantforge.store import write_tensors

ADVICE = "delete it to have it made anew"
_SHOWN = 16  # characters of a fact that a message shows: a digest is longer, and nobody reads it


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors and facts to one safetensors file, whole or not at all; parents are made.

    facts  what the tensors were made from, by a name that reads well after "another": {"tokenizer": its digest}
    Raises ResourceError if it cannot be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, held, {**facts, "content": _content(held)})


def read(path: Path, facts: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors that `write` wrote with the same facts.

    Raises DataError, naming the file, if it cannot be read, is damaged, or differs in a fact, which it names.
    """
    try:
        with safe_open(path, framework="pt") as file:
            known: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as error:
        raise DataError(445, f"{path.name!r} cannot be read as what was kept in it: {error}; {ADVICE}.") from error
    for name, value in facts.items():
        if (found := known.get(name)) != value:
            said = "nothing" if found is None else repr(found[:_SHOWN])
            raise DataError(
                445, f"{path.name!r} was made with another {name}: {said}, not {value[:_SHOWN]!r}; {ADVICE}."
            )
    if known.get("content") != _content(tensors):
        raise DataError(445, f"{path.name!r} is damaged: its tensors are not the ones written; {ADVICE}.")
    return tensors


def name_of(facts: Mapping[str, str]) -> str:
    """Return a file name that is the same for the same facts only."""
    return f"{sha256(repr(sorted(facts.items())).encode()).hexdigest()[:32]}.safetensors"


def _content(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes."""
    found = sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
