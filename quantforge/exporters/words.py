"""What the GPTQ and the AWQ layout share: codes in 32-bit words, one format a model, float16, and what is refused.

Their loaders compute (q − z) · s in float16, in which `QTensor.dequantize` computes the same from float16 scales; so a
checkpoint holds scales and the floats of the model in float16, whatever the model's own dtype was. A model with a float
beyond 65504 does not fit, and is refused before anything is solved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.models import arch, moe
from quantforge.numerics.formats import Format
from quantforge.numerics.qtensor import QTensor
from quantforge.plan import LayerPlan, Plan

GROUPS = (128, 64, 32)  # that vLLM has kernels for; -1, a whole row, besides
PARTS = ("qweight", "qzeros", "scales")
_MULTIPLE = 32  # of the inputs and outputs of a layer, for the kernels on CPUs and those of exllama
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # which vLLM reads as one layer
_SCALES = (torch.float16, torch.bfloat16)
_NEVER_HALF = ("gemma2", "gemma3", "gemma3_text", "glm4")  # which vLLM does not compute in float16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return `codes` [rows, cols] uint8 of 4 or 8 bits as int32 [rows, cols · bits / 32], the first in the low bits."""
    if bits == 4:
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    return codes.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes [rows, cols] uint8 that `pack` put into words [rows, cols · bits / 32]."""
    codes = words.contiguous().view(torch.uint8)
    return torch.stack([codes & 15, codes >> 4], -1).flatten(1) if bits == 4 else codes


def group_of(fmt: Format) -> int:
    """Return the group size as configs say it: -1 for a whole row."""
    assert isinstance(fmt.block, tuple)
    return fmt.block[1] or -1


def refuses(plan: Plan, container: str, formats: tuple[Format, ...], works: str) -> str | None:
    """Return why files of `container` cannot hold `plan` in one of `formats`, or None.

    formats  what they hold, but for the block and the dtype of scales
    works    what would, as the end of a sentence
    """
    if not plan.layers:
        return f"nothing is quantized, so {container} has nothing to hold; leave fewer layers out."
    kind = getattr(plan.config, "model_type", None)
    if kind in _NEVER_HALF:
        return f"vLLM computes {kind} in bfloat16, which rounds float16 scales; compressed-tensors works."
    others = next((name for name in (*plan.fused, *plan.floats, *plan.layers) if _is_expert(name, plan)), None)
    if others:
        return f"{container} checkpoints are not written with experts such as {others}; compressed-tensors can be."
    first = next(iter(plan.layers.values()))
    for p in plan.layers.values():
        reason = _refuses_layer(p, container) or _refuses_format(p.name, p.format, container, formats, works)
        if reason:
            return reason
        if p.format != first.format:
            return (
                f"{container} holds one format a model, not {first.format} and {p.format} of {p.name}; "
                "compressed-tensors holds several."
            )
    return _refuses_shapes(plan, container) or _refuses_parted(plan, container)


def _refuses_layer(p: LayerPlan, container: str) -> str | None:
    """Return why one layer is none that is held, whatever its format."""
    if p.transposed:
        return (
            f"{container} holds nn.Linear only, and {p.name} is a Conv1D; quantize in memory from Python, or use "
            "`quantforge compare`, which needs no checkpoint."
        )
    if p.inputs:
        return f"{container} cannot hold the rounded inputs ({p.inputs}) of {p.name}."
    if p.solver.extends_format:
        return f"{container} cannot hold what the solver of {p.name} keeps beside its codes; rtn and gptq work."
    if arch.block_path(p.name) is None:
        return f"loaders of {container} look for quantized layers in decoder blocks only; skip {p.name}."
    return None


def _is_expert(name: str, plan: Plan) -> bool:
    return name in plan.fused or moe.expert_of(name) is not None


def _refuses_format(name: str, fmt: Format, container: str, formats: tuple[Format, ...], works: str) -> str | None:
    """Return why the format of one layer is none that is held."""
    plain = isinstance(fmt.block, tuple) and fmt.block[0] == 1 and not fmt.centered
    kept = (fmt.grid, fmt.symmetric, fmt.zero)
    if not plain or isinstance(fmt.scale, Format) or kept not in {(f.grid, f.symmetric, f.zero) for f in formats}:
        return f"{container} cannot hold {fmt} of {name}; {works}"
    if fmt.scale != torch.float16:
        return f'{container} holds scales in float16, not {fmt} of {name}; quantize with format="{container}".'
    return None


def _refuses_shapes(plan: Plan, container: str) -> str | None:
    layers = list(plan.layers.values())
    for p in layers:
        for count, what in ((p.shape[1], "inputs"), (p.shape[0], "outputs")):
            if count % _MULTIPLE:
                return (
                    f"loaders of {container} take multiples of {_MULTIPLE}, and {p.name} has {count} {what}; skip it, "
                    "or take compressed-tensors."
                )
    group = group_of(layers[0].format)
    uneven = [p for p in layers if group > 0 and p.shape[1] % group]
    if group in (-1, *GROUPS) and not uneven:
        return None
    fitting = [size for size in GROUPS if all(p.shape[1] % size == 0 for p in layers)]
    works = f"{', '.join(map(str, fitting))} and -1 (a whole row) work."
    if uneven:
        widths = " and ".join(str(width) for width in sorted({p.shape[1] for p in uneven}))
        return (
            f"group size {group} does not divide the {widths} inputs of {len(uneven)} layers (first {uneven[0].name}); "
            f"{works}"
        )
    return f"loaders of {container} have no kernels for groups of {group}, as those of {layers[0].name}; {works}"


def _refuses_parted(plan: Plan, container: str) -> str | None:
    """Return why layers that loaders read as one do not go together: some are quantized, and some are not."""
    for name in plan.floats:
        parent, _, own = name.rpartition(".")
        partners = next((names for names in FUSED if own in names), ())
        quantized = [f"{parent}.{partner}" for partner in partners if f"{parent}.{partner}" in plan.layers]
        if quantized:
            return (
                f"vLLM reads {', '.join(partners)} of {container} as one layer, but {name} stays in float and "
                f"{quantized[0]} does not; skip all of them or none."
            )
    return None


def take(tensors: dict[str, Tensor], names: tuple[str, ...], last: str) -> dict[str, dict[str, Tensor]]:
    """Take the parts of every layer that has a part `last` out of `tensors`; ModelError for one that lacks another."""
    found = {}
    for key in [key for key in tensors if key.endswith(f".{last}")]:
        layer = key.rpartition(".")[0]
        missing = [part for part in names if f"{layer}.{part}" not in tensors]
        if missing:
            raise ModelError(383, f"{layer} lacks {', '.join(missing)}; the checkpoint is incomplete.")
        found[layer] = {part: tensors.pop(f"{layer}.{part}") for part in names}
    return found


def check(name: str, parts: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless the parts of a layer have these shapes, words are int32 and scales are above 0."""
    for part, shape in wanted.items():
        x = parts[part]
        dtypes = _SCALES if part == "scales" else (torch.int32,)
        if tuple(x.shape) != shape or x.dtype not in dtypes or not x.numel():
            raise ModelError(
                384, f"{name}.{part} is {x.dtype} {list(x.shape)}, not {dtypes[0]} {list(shape)}; it is damaged."
            )
    scales = parts["scales"].float()
    if not ((scales > 0) & scales.isfinite()).all():
        raise ModelError(395, f"{name}.scales holds scales that are not above 0 or no numbers; it is damaged.")


def matrix(fmt: Format, codes: Tensor, scales: Tensor, zero: Tensor | None = None) -> QTensor:
    """Return a weight from its codes [out, in] and its scales [groups, out], as files hold them."""
    return QTensor(fmt.with_scale(scales.dtype), codes.contiguous(), scales.T.contiguous(), zero)


def read_group(config: Mapping[str, object], container: str) -> int | None:
    """Return the group size that a config says, None for a whole row; ModelError for what is none."""
    size = config.get("group_size")
    if type(size) is not int or (size != -1 and size < 1):
        raise ModelError(382, f"the {container} checkpoint has a group_size of {size!r}; a number above 0 or -1 works.")
    return None if size == -1 else size
