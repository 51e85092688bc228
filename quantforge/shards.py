"""The safetensors files of a checkpoint, written as their tensors come: no more than one tensor is in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from quantforge.store import disk, stream, write_text
from quantforge.store.layout import Facts, header, nbytes, ordered

LIMIT = 10**9  # bytes of one file, which one tensor may exceed
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PIECE = 1 << 22  # bytes that are copied at a time


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, limit: int | None = None) -> None:
    """Write named tensors into `folder`: as one file, or, beyond `limit` bytes (None: LIMIT), as several with an index.

    Their names are those in the files; each must come once. What a file holds, and in which file a tensor stands,
    depends on nothing but the tensors and their order; a file is the same as safetensors' own of its tensors. They lie
    on the disk as they come until a file's header is known: that much more room is taken meanwhile. Raises
    ResourceError if the disk is full or fails.
    """
    limit = LIMIT if limit is None else limit
    files: list[tuple[Path, list[str]]] = []
    waiting, total = iter(tensors), 0
    first = next(waiting, None)
    while first is not None or not files:
        path, raw = folder / f"model-{len(files) + 1:05}.safetensors", folder / "model.raw"
        held: dict[str, Facts] = {}
        size = 0
        with stream(raw) as put:
            while first is not None:
                name, tensor = first
                assert name not in held, name
                more = tensor.numel() * tensor.element_size()
                if held and size + more > limit:
                    break
                held[name] = tensor.dtype, tuple(tensor.shape)
                if more:
                    put(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                size += more
                first = next(waiting, None)
        _arrange(path, raw, held)
        disk.remove("raw.remove", raw)
        files.append((path, sorted(held)))
        total += size
    _name(folder, files, total)


def _arrange(path: Path, raw: Path, held: Mapping[str, Facts]) -> None:
    """Write the safetensors file of tensors whose bytes lie in `raw`, in the order of `held`."""
    places, at = {}, 0
    for name, facts in held.items():
        places[name] = at
        at += nbytes(facts)
    with raw.open("rb") as source, stream(path) as put:
        put(header(held))
        for name in ordered(held):
            source.seek(places[name])
            rest = nbytes(held[name])
            while rest:
                piece = source.read(min(rest, _PIECE))
                assert piece, raw
                put(piece)
                rest -= len(piece)


def _name(folder: Path, files: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the files the names by which loaders find them, now that it is known how many there are."""
    if len(files) == 1:
        disk.rename("file.rename", files[0][0], folder / WHOLE)
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        final = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        disk.rename("file.rename", path, final)
        places |= dict.fromkeys(names, final.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def in_files(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return float tensors of `model` as its files have them: renamed, and what is fused in memory taken apart."""
    found: dict[str, Tensor] = revert_weight_conversion(_bare(model), dict(tensors))
    return {name: tensor if name in tensors else tensor.clone() for name, tensor in found.items()}


def _bare(model: nn.Module) -> nn.Module:
    """Return the model as its architecture has it, and not the files that it was loaded from."""
    bare = copy.copy(model)
    vars(bare).pop("_weight_conversions", None)
    return bare


def names_in_files(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return what tensors that `model` has in memory under `names` are called in files, as transformers saves them.

    These may be tensors of quantized layers, which begin with the layer's name.
    """
    marks = {name: torch.tensor([number]) for number, name in enumerate(names)}
    listed = list(marks)
    renamed: dict[str, Any] = revert_weight_conversion(_bare(model), marks)
    found = {listed[int(mark)]: name for name, mark in renamed.items()}
    assert len(found) == len(listed), "transformers would fuse tensors of quantized layers"
    return found
