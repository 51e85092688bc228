"""How large a checkpoint will be: the exporter's own tensors without data, and the headers of the files around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import exporters
from quantforge.corrections.lorc import LoRC
from quantforge.exporters.gguf import Gguf, blocks, metadata, vocabulary
from quantforge.models import moe
from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import int_grid
from quantforge.numerics.inputs import QInput
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.numerics.ranges import Range
from quantforge.numerics.residuals import LowRank, Residual
from quantforge.plan import LayerPlan, Plan
from quantforge.protocols import FileExporter
from quantforge.shards import LIMIT
from quantforge.store import layout
from quantforge.store.layout import Facts

_ALIGNMENT = 32  # of GGUF
_RECORD = 900  # bytes that quantforge.json has for a layer, about
_CONFIGS = 8_000  # bytes of the other configs together, about


@dataclass(frozen=True)
class Output:
    """Bytes of a checkpoint.

    weights  of the files of weights
    open     why `weights` is only the least that they can have; "" where it is exact
    beside   of configs, tokenizer and record, about
    packed   of the quantized layers alone, as quantforge's own container packs them
    held     in memory at once while weights are written
    """

    weights: int
    open: str
    beside: int
    packed: int
    held: int

    @property
    def total(self) -> int:
        """Return the bytes of all files."""
        return self.weights + self.beside


def size(plan: Plan, skeleton: nn.Module, tokenizer: Any = None, *, beside: int = 0) -> Output:
    """Return how large the checkpoint of `plan` will be, on a skeleton without weights.

    tokenizer  the model's, which some containers hold in their file of weights
    beside     bytes of the tokenizer's own files
    """
    exporter = exporters.choose(plan)
    others = _others(plan, skeleton)
    packed = sum(-(-p.nbits // 8) for p in plan.layers.values())
    beside += _CONFIGS + _RECORD * len(plan.layers)
    if isinstance(exporter, FileExporter):
        known = isinstance(exporter, Gguf)
        found = _gguf(plan, others, tokenizer) if known else packed + sum(map(layout.nbytes, others.values()))
        return Output(found, "" if known else f"{plan.container} writes a file of its own", beside, packed, found)
    tensors, factors = dict(others), dict[str, Facts]()

    @cache
    def kinds(key: tuple[Any, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        p = _named[key]
        weight = _blank(p)
        try:
            found = exporter.tensors("x", weight)
        except (RuntimeError, NotImplementedError):  # what looks at values needs some
            weight = _blank(p, "cpu")
            found = exporter.tensors("x", weight)
        inside = any(".residual." in name for name in found)
        beyond = {} if inside else {f"x.{i}.{part}": t for i, r in enumerate(weight.residuals) for part, t in _parts(r)}
        return {n: t.to("meta") for n, t in found.items()}, {n: t.to("meta") for n, t in beyond.items()}

    _named: dict[tuple[Any, ...], LayerPlan] = {}
    for name, p in plan.layers.items():
        key = (p.shape, p.format, p.inputs, p.corrections)
        _named.setdefault(key, p)
        stored, added = kinds(key)
        tensors |= {f"{name}{n[1:]}": _facts(t) for n, t in stored.items()}
        factors |= {f"base_model.model.{name}.lora_{n[-1].upper()}.weight": _facts(t) for n, t in added.items()}
    kind = str(getattr(plan.config, "model_type", ""))
    total = safetensors(_in_file(kind, tensors)) + (safetensors(factors) if factors else 0)
    several = "several files have a header each, and an index" if total > LIMIT else ""
    parted = "experts that stay in float are taken apart" if plan.fused else ""
    opened = "; ".join(filter(None, (_open(plan), several, parted)))
    return Output(total, opened, beside, packed, 2 * max(map(layout.nbytes, tensors.values()), default=0))


def safetensors(tensors: Mapping[str, Facts]) -> int:
    """Return the bytes of a safetensors file with these tensors, its header counted."""
    return len(layout.header(tensors)) + sum(map(layout.nbytes, tensors.values()))


def _open(plan: Plan) -> str:
    """Return what of the size only the data will tell; "" if nothing."""
    for p in plan.layers.values():
        if p.solver.extends_format:
            return "what the method keeps beside its codes comes on top"
        if p.inputs is not None and "extremes" in p.inputs.needs and not p.inputs.static:
            return "input channels that stay in float come on top"
        if any(not isinstance(c, LoRC) for c in p.corrections):
            return "what is added to the result comes on top"
        if isinstance(p.format.scale, Format) and p.format.scale.centered and plan.container != "native":
            return "a few bytes a layer depend on the weights"
    return ""


def _others(plan: Plan, skeleton: nn.Module) -> dict[str, Facts]:
    """Return what stays as it is, by name: (dtype, shape); of what is tied only the first."""
    found: dict[str, Facts] = {}
    seen: set[int] = set()
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        layer, _, part = name.rpartition(".")
        if (part == "weight" and layer in plan.layers) or id(tensor) in seen or name in tied:
            continue
        seen.add(id(tensor))
        found[name] = (plan.dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
    return found


def _in_file(kind: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors under the names that files of architecture `kind` have."""
    renamed = moe._RENAMED.get(kind)
    return {n.replace(renamed[1], renamed[0]): t for n, t in tensors.items()} if renamed else dict(tensors)


def _blank(p: LayerPlan, device: str = "meta") -> QWeight:
    """Return a layer as it will be stored, all codes zero; by default without data."""
    rounds = None
    if p.inputs is not None:
        one = torch.ones(1, 1, device=device)
        spared = None
        if "extremes" in p.inputs.needs and not p.inputs.static:
            spared = torch.zeros(0, dtype=torch.int32, device=device)
        rounds = QInput(p.inputs, Range(one, one) if p.inputs.static else None, spared)
    residuals = tuple(_low_rank(c, p, device) for c in p.corrections if isinstance(c, LoRC))
    return QWeight(_matrix(p.format, p.shape, device), {}, residuals, rounds)


def _matrix(fmt: Format, shape: tuple[int, int], device: str) -> QTensor:
    codes = torch.zeros(shape, dtype=torch.uint8, device=device)
    blocks_of = counts(shape, fmt.block)

    def kept(how: torch.dtype | Format) -> Tensor | QTensor:
        if isinstance(how, Format):
            return _matrix(how, blocks_of, device)
        return torch.ones(blocks_of, device=device).to(how)

    zero = None if fmt.symmetric else kept(torch.int8 if fmt.zero is None else fmt.zero)
    offset = torch.zeros((), device=device) if fmt.centered else None
    return QTensor(fmt, codes, kept(fmt.scale), zero, offset)


def _low_rank(c: LoRC, p: LayerPlan, device: str) -> LowRank:
    kept = p.format.scale
    dtype = kept if isinstance(kept, torch.dtype) and kept.itemsize == 2 else torch.bfloat16
    shapes = (p.shape[0], c.rank), (c.rank, p.shape[1])
    if c.bits == 16:
        a, b = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
        return LowRank(a, b)
    fmt = Format(int_grid(c.bits), (1, None), True, dtype)
    first, second = (_matrix(fmt, shape, device) for shape in shapes)
    return LowRank(first, second)


def _parts(residual: Residual) -> Iterable[tuple[str, Tensor]]:
    """Return the factors as an adapter holds them: its A is our B."""
    if not isinstance(residual, LowRank):
        return ()
    a, b = (x if isinstance(x, Tensor) else torch.empty(x.shape, dtype=_scale(x), device="meta")
            for x in (residual.a, residual.b))  # fmt: skip
    return (("A", b), ("B", a))


def _scale(x: QTensor) -> torch.dtype:
    assert isinstance(x.format.scale, torch.dtype)
    return x.format.scale


def _facts(tensor: Tensor) -> Facts:
    return tensor.dtype, tuple(tensor.shape)


def _gguf(plan: Plan, others: Mapping[str, Facts], tokenizer: Any) -> int:
    """Return the bytes of a GGUF file: header, metadata, an entry a tensor, and the tensors, each padded."""
    import gguf

    config: Any = plan.config
    architecture = metadata.ARCHITECTURES[config.model_type]
    names = architecture.names(config.num_hidden_layers)
    writer = gguf.GGUFWriter(None, architecture.name)
    metadata.write(writer, config, "x", gguf.LlamaFileType.GUESSED)
    vocabulary.write(writer, tokenizer, config.vocab_size)
    total = 24 + sum(8 + len(k.encode()) + 4 + _value(v) for part in writer.kv_data for k, v in part.items())
    data = 0
    tensors: dict[str, tuple[int, int]] = {}
    for name, (dtype, shape) in others.items():
        item = 4 if len(shape) < 2 else dtype.itemsize
        tensors[name] = (len(shape), item * torch.Size(shape).numel())
    for name, p in plan.layers.items():
        kind = blocks.kind(p.format)
        assert kind is not None
        length, stored = gguf.GGML_QUANT_SIZES[kind]
        tensors[f"{name}.weight"] = (2, p.shape[0] * p.shape[1] // length * stored)
    for name, (dims, content) in tensors.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        total += 8 + len(str(found).encode()) + 4 + 8 * dims + 4 + 8
        data += content + -content % _ALIGNMENT
    return total + -total % _ALIGNMENT + data


def _value(field: Any) -> int:
    """Return the bytes of one value of GGUF's metadata."""
    if isinstance(field.value, str | bytes):
        raw = field.value.encode() if isinstance(field.value, str) else field.value
        return 8 + len(raw)
    if isinstance(field.value, list | tuple):
        first = field.value[0]
        each = type(field)(first, field.sub_type or type(field.type).get_type(first)) if len(field.value) else None
        if isinstance(first, str | bytes):
            return 4 + 8 + sum(8 + len(v.encode() if isinstance(v, str) else v) for v in field.value)
        assert each is not None
        return 4 + 8 + len(field.value) * _value(each)
    return _WIDTHS[field.type.name]


_WIDTHS = {
    **dict.fromkeys(("UINT8", "INT8", "BOOL"), 1),
    **dict.fromkeys(("UINT16", "INT16"), 2),
    **dict.fromkeys(("UINT32", "INT32", "FLOAT32"), 4),
    **dict.fromkeys(("UINT64", "INT64", "FLOAT64"), 8),
}
