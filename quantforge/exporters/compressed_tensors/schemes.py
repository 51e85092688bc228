"""What a config group says of weights and inputs, to and from formats.

What is written is what stock transformers reads. vLLM takes E4M3 weights with inputs in E4M3 by a static scale, by
token where the weights have a scale a row or one in all, and by groups of 128 beside blocks of 128 x 128; inputs whose
scale is found anew by tensor, or by other groups, it would compute otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.exporters.compressed_tensors import fp4
from quantforge.numerics.blocks import Flat
from quantforge.numerics.formats import E8M0, SCALE_DTYPES, Format
from quantforge.numerics.grids import IntGrid, int_grid, minifloat
from quantforge.numerics.inputs import Inputs, QInput
from quantforge.numerics.ranges import Range

PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MXFP4, NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
_FP4 = {MXFP4: fp4.MXFP4, NVFP4: fp4.NVFP4}
_INTEGERS = tuple(int_grid(bits) for bits in range(2, 9))
_E4M3 = minifloat(4, 3)
_FLOAT_BLOCKS = ((1, None), (None, None), (128, 128))


def layout(fmt: Format, inputs: Inputs | None) -> str | None:
    """Return the layout that holds weights in `fmt` with `inputs` exactly, or None.

    Bytes of int8 are for inputs that are integers too, the one case that compressed-tensors knows the layout for.
    """
    named = next((name for name, known in _FP4.items() if fmt == known), None)
    if named:
        return None if inputs else named
    scaled = isinstance(fmt.scale, torch.dtype) and fmt.scale != E8M0 and fmt.zero is None and not fmt.centered
    if not scaled or isinstance(fmt.block, Flat) or (inputs and not _holds(inputs)):
        return None
    if fmt.grid == _E4M3:
        same = inputs is None or inputs.format.grid == _E4M3
        return FLOAT if fmt.symmetric and fmt.block in _FLOAT_BLOCKS and same else None
    if fmt.grid not in _INTEGERS or (fmt.block[0] != 1 and fmt.block != (None, None)):
        return None
    if fmt.grid.bits == 8 and fmt.symmetric and inputs and inputs.format.grid in _INTEGERS:
        return INT
    return PACK if fmt.block[0] == 1 else None


def _holds(inputs: Inputs) -> bool:
    """Tell whether `inputs` are rounded as compressed-tensors rounds them, in float32."""
    fmt = inputs.format
    sound = not math.isfinite(inputs.threshold) and not inputs.dynamic
    sound = sound and fmt.scale == torch.float32 and fmt.zero is None and not fmt.centered
    sound = sound and (fmt.grid in _INTEGERS or (fmt.grid == _E4M3 and fmt.symmetric))
    return sound and not isinstance(fmt.block, Flat) and (fmt.block[0] == 1 or fmt.block == (None, None))


def scheme(fmt: Format, inputs: Inputs | None) -> dict[str, Any]:
    """Return what a config group says of weights in `fmt` and of `inputs`, in long-known keys."""
    found = {"weights": _args(fmt, "channel", dynamic=False)}
    if inputs:
        found["input_activations"] = _args(inputs.format, "token", dynamic=not inputs.static)
    return found


def _args(fmt: Format, row: str, *, dynamic: bool) -> dict[str, Any]:
    assert not isinstance(fmt.block, Flat)
    down, across = fmt.block
    args: dict[str, Any] = {
        "num_bits": fmt.grid.bits,
        "type": "int" if isinstance(fmt.grid, IntGrid) else "float",
        "symmetric": fmt.symmetric,
        "strategy": "tensor",
        "dynamic": dynamic,
    }
    if down not in (1, None):
        args |= {"strategy": "block", "block_structure": [down, across]}
    elif across:
        args |= {"strategy": "tensor_group" if isinstance(fmt.scale, Format) else "group", "group_size": across}
    elif down:
        args["strategy"] = row
    return args


def read_weights(name: str, args: object) -> Format:
    """Return the format of weights in the layout `name`; the dtype of scales is known from the tensors only."""
    fmt = _format(args)
    if fmt is not None and not isinstance(fmt.block, Flat):
        integers = isinstance(fmt.grid, IntGrid)
        known = {
            PACK: integers and fmt.block[0] == 1,
            INT: integers and fmt.grid.bits == 8 and fmt.symmetric,
            FLOAT: layout(fmt, None) == FLOAT,
        }
        if known.get(name, _FP4.get(name) == fmt):
            return fmt
    raise ModelError(374, f"weights stored as {args} in {name} cannot be read; int2 to int8 by group or channel can.")


def read_inputs(args: object) -> Inputs | None:
    """Return how a config group says that inputs are rounded; None: not at all."""
    if args is None:
        return None
    fmt, dynamic = _format(args), isinstance(args, Mapping) and args.get("dynamic", False)
    with suppress(ValueError):  # blocks of rows, quantized scales and static tokens are no inputs
        found = Inputs(fmt, static=not dynamic) if fmt is not None and type(dynamic) is bool else None
        if found is not None and _holds(found):
            return found
    raise ModelError(378, f"inputs rounded as {args} cannot be read; int8 or E4M3 by token or by tensor can.")


def _format(args: object) -> Format | None:
    """Return the format that quantization arguments stand for; None if it is none of those here."""
    args = args if isinstance(args, Mapping) else {}
    bits, symmetric, size = args.get("num_bits"), args.get("symmetric"), args.get("group_size")
    if type(bits) is not int or type(symmetric) is not bool or args.get("actorder"):
        return None
    blocks: dict[object, tuple[int | None, int | None]] = {
        "channel": (1, None),
        "token": (1, None),
        "tensor": (None, None),
    }
    if type(size) is int and size > 0:
        blocks |= {"group": (1, size), "tensor_group": (1, size)}
    if args.get("block_structure") == [128, 128]:
        blocks["block"] = (128, 128)
    strategy, kind = str(args.get("strategy")), args.get("type")
    block = blocks.get(strategy)
    if block is None:
        return None
    if kind == "float" and bits == 4 and symmetric:
        nested = strategy == "tensor_group"
        return next((f for f in _FP4.values() if f.block == block and isinstance(f.scale, Format) == nested), None)
    # scales that are found anew are in float32 here, and stored ones in the dtype of their tensor
    if strategy == "tensor_group" or args.get("scale_dtype") is not None:
        return None
    if kind == "float" and bits == 8 and symmetric:
        return Format(_E4M3, block, True)
    return Format(int_grid(bits), block, symmetric) if kind == "int" and 2 <= bits <= 8 else None


def input_tensors(rounds: QInput | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what calibration found about a layer's inputs, as it stands in the file; its scale is exact in `dtype`."""
    if rounds is None or rounds.range is None:
        return {}
    found = {"input_scale": rounds.range.scale.reshape(1).to(dtype, copy=True)}  # layers of one stage share it
    if not rounds.inputs.format.symmetric:
        found["input_zero_point"] = rounds.range.zero.reshape(1).to(torch.int8)
    return found


def read_input_tensors(name: str, inputs: Inputs | None, tensors: dict[str, Tensor]) -> QInput | None:
    """Return how the layer `name` rounds its inputs, taking what calibration found out of `tensors`."""
    if inputs is None or not inputs.static:
        return None if inputs is None else QInput(inputs)
    scale, zero = tensors.pop(f"{name}.input_scale", None), torch.zeros(1, dtype=torch.int8)
    if not inputs.format.symmetric:
        zero = tensors.pop(f"{name}.input_zero_point", torch.zeros(0))
    sound = scale is not None and scale.shape == (1,) and scale.dtype in SCALE_DTYPES.values()
    if scale is None or not sound or not 0 < float(scale) < math.inf:
        raise ModelError(379, f"{name}.input_scale is missing or no number above 0; the checkpoint is damaged.")
    grid = inputs.format.grid
    if zero.shape != (1,) or zero.dtype != torch.int8 or not grid.low <= int(zero) <= grid.high:
        raise ModelError(379, f"{name}.input_zero_point is missing or outside {grid.name}; the checkpoint is damaged.")
    return QInput(inputs, Range(scale.float().view(1, 1), zero.float().view(1, 1)))
