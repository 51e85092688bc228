"""What serving takes: weights, and the keys and values of a context, in float and in each format of the cache."""

from __future__ import annotations

from typing import Any

import torch

from quantforge.models.kvcache import KVFormat, parse_kv
from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import Format

FORMATS = ("int8-token", "int4-token-g32-asym", "int4-kivi-g32-w32", "int2-kivi-g32-w32")
_FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def caches(config: Any, context: int, dtype: torch.dtype) -> dict[str, int] | None:
    """Return the bytes of keys and values of `context` tokens, by format; the first is `dtype`, of a float model.

    layers · key/value heads · head size · bits / 8 · 2 a token; with codes come their scales, and the tokens that a
    format keeps in float. All tokens are held, also by layers with a sliding window. None for a model that keeps
    something else than keys and values of equal width.
    """
    text = config.get_text_config()
    if any(kind not in ("full_attention", "sliding_attention") for kind in getattr(text, "layer_types", None) or ()):
        return None
    if getattr(text, "kv_lora_rank", None):
        return None
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    streams = int(text.num_hidden_layers) * heads
    found = {_FLOATS.get(dtype, str(dtype)): 2 * streams * context * width * dtype.itemsize}
    for name in FORMATS:
        fmt = parse_kv(name)
        each = (_stream(fmt, part, context, width, dtype) for part in (fmt.key_format, fmt.value_format))
        found[name] = streams * sum(each)
    return found


def table(weights: int, context: int, found: dict[str, int] | None) -> list[str]:
    """Return what serving takes as lines of text: `weights` bytes, and the caches as `caches` gives them."""
    if found is None:
        return [f"serving: {show(weights)} of weights; this model keeps something else than keys and values"]
    lines = [f"serving with {context:,} tokens: {show(weights)} of weights and their keys and values"]
    return lines + [f"  {name:20} {show(size):>9}, together {show(weights + size)}" for name, size in found.items()]


def show(size: float) -> str:
    """Return a number of bytes for people: `8.1 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"


def _stream(fmt: KVFormat, part: Format, tokens: int, width: int, dtype: torch.dtype) -> int:
    """Return the bytes of the keys, or the values, of one head."""
    unit = part.row_unit or 1
    first = min(fmt.sinks, tokens)
    coded = max(tokens - first - fmt.window, 0) // unit * unit
    rows, columns = counts((unit, width), part.block)
    scales = coded // unit * rows * columns * fmt.scale.itemsize * (1 if part.symmetric else 2)
    return (tokens - coded) * width * dtype.itemsize + coded * -(-width * fmt.bits // 8) + scales
