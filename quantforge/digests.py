"""Digests of what a checkpoint holds: SHA-256 of each layer's numbers, of every other tensor, and of every file.

They stand in quantforge.json, so that what was changed since the checkpoint was saved is found and named:

    layers   by name, the dequantized weight, low-rank factors by themselves, and how inputs are rounded
    tensors  by name, what belongs to no quantized layer: dtype, shape and bytes; in float32 where the file is no
             safetensors, and may hold a vector in a wider dtype
    files    by path within the folder, all but quantforge.json
    record   the rest of quantforge.json

Weights are dequantized in float32, whatever the dtype of the checkpoint: bfloat16 would round away one code beside
another. So a layer has the same digest in every container that holds the same numbers. Factors are not multiplied, for
a product of matrices is not the same bit for bit on every machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.models import moe
from quantforge.models.headers import TensorInfo, file_size, read_header
from quantforge.numerics.problem import QWeight
from quantforge.numerics.residuals import LowRank
from quantforge.store import MARK
from quantforge.store.layout import letters

KEYS = ("layers", "tensors", "files", "record")
_PIECE = 2**22


def tensor_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's dtype, shape and bytes, as `stored_digest` finds it in the file."""
    found = sha256(_head(letters(tensor.dtype), tensor.shape))
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if len(flat):  # numpy knows not every dtype, but bytes
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def wide(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digests in float32 of tensors by name; of those that are one tensor only the first is told."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensor_digest(tensors[name].float()) for name in first.values()}


def stored_digest(info: TensorInfo) -> str:
    """Return the digest of a tensor in a safetensors file, which need not be loaded for it."""
    found = sha256(_head(info.dtype, info.shape))
    left = info.stop - info.start
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        while left > 0 and (part := stream.read(min(_PIECE, left))):
            found.update(part)
            left -= len(part)
    return found.hexdigest()


def layer_digest(weight: QWeight) -> str:
    """Return the digest of the numbers that a layer computes with, in whatever container they stand."""
    dense, factors = weight.base.dequantize(torch.float32), []
    for residual in weight.residuals:
        if isinstance(residual, LowRank):
            factors += [tensor_digest(factor) for factor in residual.factors()]
        else:
            dense = residual.onto(dense)
    found = sha256("\0".join((tensor_digest(dense), *factors)).encode())
    if weight.inputs is not None:
        rounds = weight.inputs
        found.update(str(rounds.inputs).encode())
        if rounds.range is not None:
            found.update("".join(tensor_digest(x.float()) for x in (rounds.range.scale, rounds.range.zero)).encode())
        if rounds.spared is not None:
            found.update(tensor_digest(rounds.spared.int()).encode())
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of a regular file's bytes; ModelError if it is none."""
    file_size(path)
    found = sha256()
    with path.open("rb") as stream:
        while part := stream.read(_PIECE):
            found.update(part)
    return found.hexdigest()


def whole(folder: Path) -> bool:
    """Tell whether every file of a checkpoint has the digest that its quantforge.json records."""
    try:
        kept = json.loads((folder / MARK).read_text(encoding="utf-8"))["digests"]["files"]
        found = {name: file_digest(folder / name) for name in names_of_files(folder)}
        return bool(found == kept)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ModelError):
        return False


def names_of_files(folder: Path) -> list[str]:
    """Return the paths within `folder` of all files below it but quantforge.json, sorted; links are not followed."""
    found = (Path(root, name).relative_to(folder) for root, _, names in os.walk(folder) for name in names)
    return sorted(path.as_posix() for path in found if path.as_posix() != MARK)


def record_digest(record: Mapping[str, Any]) -> str:
    """Return the digest of what quantforge.json says besides its digests."""
    rest = {key: value for key, value in record.items() if key != "digests"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def make(
    folder: Path,
    record: Mapping[str, Any],
    layers: Mapping[str, str],
    tensors: Mapping[str, str],
    kind: str,
) -> dict[str, Any]:
    """Return the digests of a checkpoint that was written to `folder`.

    record   what quantforge.json will hold besides them
    layers   of every quantized layer, as it was in memory
    tensors  of what else was to be written, by name; of these, what stands in a file under the same name counts as it
             was in memory, so that what a writer changed is found out. Others are taken from the files. Where the
             files are no safetensors, all of them count, and are those of `wide`
    kind     the architecture, some of which name their tensors otherwise in files
    """
    written = {info.name: info for file in folder.glob("*.safetensors") for info in read_header(file).values()}
    others = {name: info for name, info in moe.as_in_model(kind, written).items() if not is_part(name, layers)}
    kept = {n: tensors[n] if n in tensors else stored_digest(info) for n, info in others.items()}
    return {
        "layers": dict(layers),
        "tensors": kept if written else dict(tensors),
        "files": {name: file_digest(folder / name) for name in names_of_files(folder)},
        "record": record_digest(record),
    }


def is_part(name: str, layers: Collection[str]) -> bool:
    """Tell whether the tensor `name` is how one of `layers` stands in a file, such as its codes; a bias is not."""
    return layer_of(name, layers) is not None and not name.endswith(".bias")


def layer_of(name: str, layers: Collection[str]) -> str | None:
    """Return the one of `layers` (whose names are quickly looked up) that the tensor `name` belongs to, or None."""
    place = name.rpartition(".")[0]
    while place and place not in layers:
        place = place.rpartition(".")[0]
    return place or None


def _head(dtype: str, shape: Iterable[int]) -> bytes:
    return f"{dtype} {list(shape)}\0".encode()
