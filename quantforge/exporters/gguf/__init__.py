"""GGUF: one file that llama.cpp loads, and stock transformers by `from_pretrained(DIR, gguf_file="model.gguf")`.

Layers stand in blocks of 32 weights: Q4_0 (4 bits, symmetric), Q4_1 (4 bits, a minimum a block) or Q8_0 (8 bits,
symmetric), with scales in float16 (`blocks`). All else stays in float: in float32 what has one dimension, and the rest
in the dtype of the checkpoint. Metadata says what llama.cpp must know of the model (`metadata`) and of its tokenizer
(`vocabulary`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PreTrainedModel

from quantforge.errors import ModelError, PlanError
from quantforge.exporters.gguf import blocks, metadata, vocabulary
from quantforge.exporters.gguf.blocks import BLOCK, FORMATS
from quantforge.models.headers import show
from quantforge.numerics.blocks import Flat
from quantforge.numerics.formats import E8M0, Format
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.plan import LayerPlan, Plan
from quantforge.registry import register

FILE = "model.gguf"
_Q4_0, _Q4_1, _Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
_FILE_TYPES = {
    _Q4_0: LlamaFileType.MOSTLY_Q4_0,
    _Q4_1: LlamaFileType.MOSTLY_Q4_1,
    _Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# what a file that was changed by hand can make the library's reader raise
_DAMAGE = (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, AttributeError, RecursionError)


@register("exporter", "gguf")
@dataclass(frozen=True)
class Gguf:
    """GGUF files of the llama family, for llama.cpp and for transformers."""

    def takes(self, plan: Plan) -> bool:
        """Tell whether all of `plan` can stand in such a file."""
        return bool(plan.layers) and self.refuses(plan) is None

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be held exactly, and what could; None if it can."""
        if plan.config is not None and (reason := metadata.refuses(plan.config)):
            return reason
        return next((reason for p in plan.layers.values() if (reason := _refuses(p))), None)

    def fix(self, fmt: Format) -> Format:
        """Return what `fmt` becomes in such a file: integers of 4 or 8 bits in blocks of 32; others stay as is."""
        nested = isinstance(fmt.scale, Format) or isinstance(fmt.zero, Format)
        if fmt.grid.name not in ("int4", "int8") or isinstance(fmt.block, Flat) or nested or fmt.scale == E8M0:
            return fmt
        if fmt.grid.bits == 8:
            return FORMATS[_Q8_0]
        return FORMATS[_Q4_0 if fmt.symmetric else _Q4_1]

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of floats and of scales for a model in `own`."""
        return own, torch.float16

    def refuses_tokenizer(self, tokenizer: Any) -> str | None:
        """Return why the file cannot hold a tokenizer; None if it can."""
        return vocabulary.refuses(tokenizer)

    def notes(self, config: Any, tokenizer: Any) -> list[str]:
        """Return what a user should know before a model with this config and tokenizer is written."""
        return [*metadata.notes(config), *vocabulary.notes(tokenizer)]

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return nothing: all tensors stand in the file that `write` makes."""
        return {}

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return nothing: the file says itself how it is to be read."""
        return {}

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Refuse: `read_file` reads what `write` wrote."""
        raise ModelError(398, f"a quantization_config says nothing of GGUF, whose layers stand in {FILE}.")

    def write(
        self,
        folder: Path,
        model: PreTrainedModel,
        plan: Plan,
        layers: Mapping[str, QWeight],
        tensors: Mapping[str, Tensor],
        tokenizer: Any,
        source: str,
    ) -> None:
        """Write `model.gguf` into `folder`; PlanError for a model or tokenizer that it has no place for.

        model    only its config is looked at
        layers   what was quantized, by full name
        tensors  all else by full name; where the head is the embedding itself it is left out
        source   what people call the model
        """
        config: Any = model.config
        reason = metadata.refuses(config) or vocabulary.refuses(tokenizer) or self.refuses(plan)
        if reason:
            raise PlanError(288, reason)
        architecture = metadata.ARCHITECTURES[config.model_type]
        names = architecture.names(config.num_hidden_layers)
        writer = gguf.GGUFWriter(folder / FILE, architecture.name)
        try:
            metadata.write(writer, config, source, _file_type(layers))
            vocabulary.write(writer, tokenizer, config.vocab_size)
            embedding = tensors.get("model.embed_tokens.weight")
            for name, tensor in tensors.items():
                if name != "lm_head.weight" or tensor is not embedding:
                    rows = metadata.order(name, config)
                    data, held = _raw(tensor if rows is None else tensor[rows])
                    writer.add_tensor(_named(name, names), data, raw_dtype=held)
            for name, weight in layers.items():
                rows = metadata.order(f"{name}.weight", config)
                base = weight.base if rows is None else _reordered(weight.base, rows)
                held = blocks.kind(base.format)
                writer.add_tensor(_named(f"{name}.weight", names), blocks.pack(base), raw_dtype=held)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """The library's reader, but where the file ends too early it stops, and does not go on with nothing for ever."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, override_order)


def read_file(file: Path, config: Any, names: Iterable[str]) -> tuple[dict[str, QWeight], dict[str, Tensor]]:
    """Return the quantized layers and all other tensors of a file that `Gguf.write` made, by transformers' names.

    config  the transformers config of the model
    names   of all tensors of the model; the file need not hold each of them
    Tensors of one dimension come in float32. Raises ModelError for a damaged file and for one of another model.
    """
    try:
        reader = _Reader(file)
        architecture = _check(reader, config)
        found = architecture.names(config.num_hidden_layers)
        known = {_named(name, found): name for name in names}
        layers, tensors = {}, {}
        for tensor in reader.tensors:
            if tensor.name == metadata.ROPE_FREQUENCIES:
                continue  # the config says it too
            name = known.get(tensor.name)
            if name is None:
                raise ValueError(f"{show(tensor.name)} is no tensor of the model")
            rows = metadata.order(name, config)
            back = None if rows is None else rows.argsort()
            if tensor.tensor_type in FORMATS and name.endswith(".weight"):
                base = blocks.unpack(tensor.data, tensor.tensor_type)
                layers[name.removesuffix(".weight")] = QWeight(base if back is None else _reordered(base, back), {})
            elif tensor.tensor_type in _FLOATS:
                value = _value(tensor.data, tensor.tensor_type)
                tensors[name] = value if back is None else value[back]
            else:
                raise ValueError(f"{show(tensor.name)} is {tensor.tensor_type.name}, which quantforge does not write")
        return layers, tensors
    except (*_DAMAGE, PlanError) as error:
        what = error.args[0] if isinstance(error, PlanError) else error
        raise ModelError(397, f"{show(file)} cannot be read ({what}); it is damaged or of another model.") from error


def _refuses(p: LayerPlan) -> str | None:
    """Return why one layer cannot stand in such a file, and what could."""
    if p.transposed:
        return (
            f"GGUF as quantforge writes it holds nn.Linear only, and {p.name} is a Conv1D; quantize in memory from "
            "Python, or use `quantforge compare`, which needs no checkpoint."
        )
    if p.inputs is not None:
        return f"GGUF holds no rounded inputs, such as {p.inputs} of {p.name}."
    if p.solver.extends_format or p.corrections:
        return f"GGUF holds nothing beside the codes of {p.name}; native can."
    if blocks.kind(p.format) is None:
        return _refuses_format(p)
    if p.shape[1] % BLOCK:
        return (
            f"the {p.shape[1]} inputs of {p.name} are no multiple of {BLOCK}, the block of GGUF; skip it, or native "
            "can hold it."
        )
    return None


def _refuses_format(p: LayerPlan) -> str:
    fmt, name = p.format, p.name
    nearest = Gguf().fix(fmt)
    if nearest == fmt:
        return (
            f"GGUF as quantforge writes it holds integers of 4 bits, or of 8 if symmetric, in blocks of {BLOCK}, not "
            f"{fmt} of {name}; --bits 4 works, and native can hold it."
        )
    if fmt.block != nearest.block:
        return f"GGUF stores blocks of {BLOCK}, not {fmt} of {name}; leave --group-size out."
    if fmt.symmetric != nearest.symmetric:
        return f"GGUF's 8 bits are symmetric, not {fmt} of {name}; leave --asymmetric out, or --bits 4 works."
    return f"GGUF stores {nearest}, not {fmt} of {name}; quantize with --format gguf, which sees to it."


def _file_type(layers: Mapping[str, QWeight]) -> LlamaFileType:
    """Return what the file is said to be mostly: the type of most weights."""
    held: Counter[GGMLQuantizationType] = Counter()
    for weight in layers.values():
        kind = blocks.kind(weight.base.format)
        assert kind is not None
        held[kind] += weight.base.codes.numel()
    return _FILE_TYPES[held.most_common(1)[0][0]] if held else LlamaFileType.GUESSED


def _named(name: str, names: Any) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise PlanError(289, f"GGUF has no place for the tensor {show(name)}; native can hold the model.")
    return str(found)


def _reordered(q: QTensor, rows: Tensor) -> QTensor:
    """Return `q` with its rows in another order."""
    assert isinstance(q.scale, Tensor)
    assert not isinstance(q.zero, QTensor)
    rows = rows.to(q.codes.device)
    return replace(q, codes=q.codes[rows], scale=q.scale[rows], zero=None if q.zero is None else q.zero[rows])


def _raw(tensor: Tensor) -> tuple[np.ndarray, GGMLQuantizationType | None]:
    """Return a float tensor as the array that the library writes, and its type where the array does not say it."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dim() < 2:
        tensor = tensor.float()  # where llama.cpp looks for float32
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint8).numpy(), GGMLQuantizationType.BF16
    return tensor.numpy(), None


def _value(data: np.ndarray, held: GGMLQuantizationType) -> Tensor:
    return torch.from_numpy(np.array(data)).view(_FLOATS[held])


def _check(reader: _Reader, config: Any) -> metadata.Architecture:
    """Return the architecture of a file; ValueError if it is not that of `config`, by which its rows are put back."""
    if reason := metadata.refuses(config):
        raise ValueError(reason.rstrip("."))
    architecture = metadata.ARCHITECTURES[config.model_type]
    keys = {
        "general.architecture": architecture.name,
        f"{architecture.name}.block_count": config.num_hidden_layers,
        f"{architecture.name}.attention.head_count": config.num_attention_heads,
        f"{architecture.name}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture.name}.attention.key_length": metadata.head_dim(config),
    }
    for key, wanted in keys.items():
        field = reader.get_field(key)
        held = None if field is None else field.contents()
        if held != wanted:
            raise ValueError(f"{key} is {held!r}, and config.json says {wanted!r}")
    return architecture
