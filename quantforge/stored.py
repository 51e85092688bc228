"""What stands in the files of a quantized checkpoint: its config, its record, and its layers as they are stored."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantforge import registry
from quantforge.errors import ModelError
from quantforge.exporters import gguf, native, peft
from quantforge.models import check, load, moe
from quantforge.models.folder import contained, read_config
from quantforge.models.headers import MAX_HEADER, read_json
from quantforge.numerics.problem import QWeight
from quantforge.numerics.residuals import LowRank
from quantforge.protocols import Exporter
from quantforge.store import MARK

# what a config that was changed by hand can make a reader raise
DAMAGE = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, ArithmeticError, re.error)
SCHEMA = 1
CONTAINERS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "bitsandbytes8", "gguf", "native")
_METHODS = {native.METHOD: "native", "gptq": "gptq", "awq": "awq"}
_FLOATS = (*load.DTYPES.values(), torch.float64)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in load.DTYPES.values()}


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose config and headers have been checked; none of its tensors is read yet.

    files         the folder with its config and the header of every tensor
    settings      the transformers config, which says nothing of the quantization
    quantization  the `quantization_config`
    container     the name of the exporter that reads it
    dtype         that of the checkpoint: of its floats, and of its scales where a format does not say otherwise
    trust_remote_code  whether code of the folder's own may run
    """

    files: check.Folder
    settings: Any
    quantization: dict[str, Any]
    container: str
    dtype: torch.dtype
    trust_remote_code: bool = False

    @property
    def exporter(self) -> Exporter:
        """Return what reads, and wrote, its layers; ModelError if this version lacks it."""
        if self.container not in registry.names("exporter"):
            raise ModelError(
                349, f"{self.files.path} is stored by {self.container!r}, which this version of quantforge lacks."
            )
        found: Exporter = registry.create("exporter", self.container)
        return found

    @property
    def kind(self) -> object:
        """Return the model_type of its config."""
        return self.files.config.get("model_type")


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `save` wrote about how the checkpoint was made; ModelError if there is nothing or it is damaged."""
    file = folder / MARK
    if not os.path.lexists(file):
        raise ModelError(350, f"{folder} has no {MARK}, so it was not written by quantforge.")
    try:
        record = read_json(contained(folder, MARK, ".json"), MAX_HEADER)
    except ModelError as error:
        raise ModelError(351, f"{file} cannot be read ({error.args[0].rstrip('.')}).") from error
    if record.get("schema") != SCHEMA:
        raise ModelError(352, f"{file} is not of schema {SCHEMA}, the one that this version reads.")
    return record


def container_of(quantization: Mapping[str, Any]) -> str:
    """Return the name of the exporter that reads what a `quantization_config` describes."""
    method = str(quantization.get("quant_method"))
    if method == "bitsandbytes":
        return "bitsandbytes8" if quantization.get("load_in_8bit") is True else "bitsandbytes"
    return _METHODS.get(method, "compressed-tensors")


def reads(exporter: Exporter) -> bool:
    """Tell whether what `exporter` writes is read here; the format of another package's plug-in is not."""
    known = registry.names("exporter")
    return any(name in known and type(exporter) is registry.find("exporter", name) for name in CONTAINERS)


def open_folder(folder: Path, *, trust_remote_code: bool = False) -> Stored:
    """Check the config and all headers of a checkpoint; no tensor is read. ModelError for a damaged or foreign one."""
    if os.path.lexists(folder / gguf.FILE):
        return _open_gguf(folder, trust_remote_code)
    found = check.read_folder(folder, trust_remote_code=trust_remote_code, quantized=True)
    config = dict(found.config)
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict):
        raise ModelError(353, f"{folder} is not a quantized checkpoint: its config.json has no quantization_config.")
    settings = load.make_config(folder, config, trust_remote_code=trust_remote_code)
    if hasattr(settings, "quantization_config"):  # a config of the folder's own code read it again
        del settings.quantization_config
    # scales in float32 may outweigh the floats of the model, so the config knows better than the tensors
    dtype = _dtype(config) or load.DTYPES[found.dtype]
    return Stored(found, settings, quantization, container_of(quantization), dtype, trust_remote_code)


def _dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    return _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))))


def _open_gguf(folder: Path, trusted: bool) -> Stored:
    """Check the config of a folder whose weights stand in one GGUF file, of which nothing is read."""
    contained(folder, gguf.FILE, ".gguf")
    config, stripped = read_config(folder, trusted, quantized=False)
    settings = load.make_config(folder, config, trust_remote_code=trusted)
    found = check.Folder(folder, config, {}, stripped)
    return Stored(found, settings, {"quant_method": "gguf"}, "gguf", _dtype(config) or torch.float32, trusted)


def skeleton(stored: Stored) -> nn.Module:
    """Return the model of a checkpoint's config on the meta device, as transformers makes it."""
    with check.as_refusal(stored.files.path, stored.kind), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            stored.settings, dtype=stored.dtype, trust_remote_code=stored.trust_remote_code
        )
    return model


def read_layers(stored: Stored) -> tuple[dict[str, QWeight], dict[str, torch.Tensor]]:
    """Return the quantized layers, as they are stored, and all other tensors, both by the names of the model in memory.

    Factors of an adapter beside the checkpoint are put on their layers. Raises ModelError for layers that are damaged,
    and for codes that nothing says the meaning of.
    """
    folder = stored.files.path
    if stored.container == "gguf":
        return gguf.read_file(contained(folder, gguf.FILE, ".gguf"), stored.settings, skeleton(stored).state_dict())
    tensors = moe.as_in_model(stored.kind, load.read_tensors(stored.files))
    with as_damage(folder):
        layers = stored.exporter.read(stored.quantization, tensors)
    for key, tensor in tensors.items():
        # transformers would cast codes to floats as if they were weights
        if key.endswith(".weight") and tensor.dtype not in _FLOATS:
            raise ModelError(
                358, f"{folder}: {key} is {tensor.dtype}, but nothing says what its codes mean; it is incomplete."
            )
    for name, factors in read_adapter(folder).items():
        layers[name] = corrected(folder, name, layers.get(name), factors)
    return layers, tensors


@contextmanager
def as_damage(folder: Path) -> Iterator[None]:
    """Turn whatever a reader raises for a config that was changed by hand into a ModelError that names `folder`."""
    try:
        yield
    except DAMAGE as error:
        what = f"{type(error).__name__}: {error}"
        raise ModelError(357, f"{folder}: its layers cannot be read ({what}); the checkpoint is damaged.") from error


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """Return the factors of the checkpoint's adapter by layer; none if it has no adapter."""
    return peft.read(folder / peft.FOLDER) if (folder / peft.FOLDER).is_dir() else {}


def corrected(folder: Path, name: str, weight: QWeight | None, factors: LowRank) -> QWeight:
    """Return the layer `name` with the factors of the adapter in `folder` put on it; ModelError if they do not fit."""
    a, b = factors.factors()
    if weight is None or (a.shape[0], b.shape[1]) != tuple(weight.base.shape):
        raise ModelError(356, f"{folder / peft.FOLDER} corrects {name}, which is no such layer of the model.")
    return replace(weight, residuals=(*weight.residuals, factors))
