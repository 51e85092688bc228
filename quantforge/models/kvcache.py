"""A transformers cache that holds keys and values as codes, the first and the latest tokens in float.

What a layer holds depends on the keys and values given to it, not on how their stream was cut into calls: groups of
tokens that share a scale begin behind the first tokens, and what has left the window is stored once, from the floats.
Attention sees new tokens as they are held. In a prefill that is longer than the window, early tokens thus see as codes
what they would see in float if decoded one at a time: of the whole model that is another result, the coarser one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from quantforge.errors import ModelError
from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import SCALE_DTYPES, Format
from quantforge.numerics.grids import int_grid
from quantforge.numerics.packing import pack
from quantforge.numerics.qtensor import QTensor, encode

_KIVI_GROUP, _KIVI_SINKS = 32, 4
_ATTENTION = ("full_attention", "sliding_attention")
_NOTATION = re.compile(
    r"int(\d)-(token|kivi)(?:-g([1-9]\d{0,8}))?(?:-w(\d{1,9}))?(?:-s(\d{1,9}))?(?:-(sym|asym))?(?:-(fp32|bf16|fp16))?"
)


@dataclass(frozen=True)
class KVFormat:
    """How the keys and values of a layer, [batch, heads, tokens, channels] each, are held.

    bits       2, 4 or 8
    keys       "token": channels of a token share a scale; "channel": tokens of a channel do, as in KIVI,
               arXiv:2402.02750. Values are always stored by token
    group      how many channels share a scale, within a head, of which the last may be fewer, None being all; and how
               many tokens do where keys are by channel
    window     latest tokens that stay in float. Keys by channel leave it by whole groups, so up to group − 1 more do;
               KIVI itself empties a full window at once, and then has no key in float
    sinks      first tokens that stay in float, because attention to them is strong whatever they say
    symmetric  no zero points; otherwise they are real numbers, as in KIVI
    scale      dtype of scales and zero points
    """

    bits: int
    keys: str = "token"
    group: int | None = None
    window: int = 0
    sinks: int = 0
    symmetric: bool = True
    scale: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"a KV cache has 2, 4 or 8 bits, not {self.bits}")
        if self.keys not in ("token", "channel"):
            raise ValueError(f"keys are stored by token or by channel, not by {self.keys!r}")
        if self.scale not in SCALE_DTYPES.values() or self.scale == SCALE_DTYPES["e8m0"]:
            raise ValueError(f"scales of a KV cache are fp32, bf16 or fp16, not {self.scale}")
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of a KV cache must be 0 or more, not {getattr(self, name)}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group of a KV cache must be 1 or more, not {self.group}")
        if self.keys == "channel":
            self._check_window()

    def _check_window(self) -> None:
        if self.group is None:
            raise ValueError("keys by channel need a group, the number of tokens that share a scale; 32 works")
        if self.window < self.group:
            raise ValueError(
                f"a window of {self.window} tokens is shorter than the group of {self.group}: use -w{self.group}"
            )
        if self.window % self.group:
            fits = self.window // self.group * self.group
            raise ValueError(
                f"a window of {self.window} tokens is no multiple of the group of {self.group}: "
                f"use -w{fits} or -w{fits + self.group}"
            )

    @property
    def key_format(self) -> Format:
        """Return the format of keys as a matrix [tokens, channels]."""
        return self.value_format if self.keys == "token" else replace(self.value_format, block=(self.group, 1))

    @property
    def value_format(self) -> Format:
        """Return the format of values as a matrix [tokens, channels]."""
        zero = None if self.symmetric else self.scale
        return Format(int_grid(self.bits), (1, self.group), self.symmetric, self.scale, zero)

    def __str__(self) -> str:
        kivi = self.keys == "channel"
        text = f"int{self.bits}-{'kivi' if kivi else 'token'}"
        text += f"-g{self.group}" if self.group else ""
        text += f"-w{self.window}" if kivi or self.window else ""
        text += f"-s{self.sinks}" if self.sinks != (_KIVI_SINKS if kivi else 0) else ""
        if self.symmetric == kivi:
            text += "-sym" if self.symmetric else "-asym"
        dtype = next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.scale)
        return text + (f"-{dtype}" if self.scale != torch.float16 else "")


def parse_kv(text: str) -> KVFormat:
    """Read a notation such as `int8-token`, `int4-token-g32-asym` or `int4-kivi-g32-w32`; ValueError if it is none.

    The forms are int(2|4|8)-(token|kivi)[-gN][-wN][-sN][-sym|-asym][-fp32|-bf16|-fp16], for group, window, sinks and
    what scales are stored in, fp16 if left out. `token` is symmetric, has no window and no sinks, and a scale a token
    and head, if nothing else is said. `kivi` has keys by channel, groups of 32, a window as long as the group, 4 sinks
    and zero points.
    """
    m = _NOTATION.fullmatch(text)
    if not m:
        raise ValueError(
            f"{text!r} is no format of a KV cache; write for example int8-token, int4-token-g32-asym or "
            "int4-kivi-g32-w32"
        )
    bits, kind, group, window, sinks, sign, scale = m.groups()
    kivi = kind == "kivi"
    size = int(group or _KIVI_GROUP)
    return KVFormat(
        int(bits),
        keys="channel" if kivi else "token",
        group=size if group or kivi else None,
        window=int(window) if window else size * kivi,
        sinks=int(sinks) if sinks else _KIVI_SINKS * kivi,
        symmetric=sign == "sym" if sign else not kivi,
        scale=SCALE_DTYPES[scale or "fp16"],
    )


class KVStream:
    """The keys, or the values, of a layer: the first tokens in float, then codes, then the latest tokens in float.

    first, recent  [batch, heads, tokens, channels] in the dtype in which they came
    codes          [batch, heads, tokens, bytes] uint8, the codes of a token packed from the lowest bit up
    scale, zero    [batch, heads, row blocks, column blocks] as `format` stores them; zero None when it is symmetric
    """

    def __init__(self, like: Tensor, fmt: Format, window: int, sinks: int) -> None:
        assert isinstance(fmt.scale, torch.dtype)
        batch, heads, _, self.width = like.shape
        self.format, self.window, self.sinks = fmt, window, sinks
        self.unit = fmt.row_unit or 1
        across = counts((self.unit, self.width), fmt.block)[1]
        self.first = self.recent = like.new_empty(batch, heads, 0, self.width)
        self.codes = like.new_empty(batch, heads, 0, -(-self.width * fmt.grid.bits // 8), dtype=torch.uint8)
        self.scale = like.new_empty(batch, heads, 0, across, dtype=fmt.scale)
        self.zero = None if fmt.symmetric else self.scale

    def __len__(self) -> int:
        """Return how many tokens are held."""
        return self.first.shape[2] + self.codes.shape[2] + self.recent.shape[2]

    def write(self, x: Tensor) -> None:
        """Append tokens `x` [batch, heads, tokens, channels], and store as codes what thereby leaves the window."""
        early = min(self.sinks - self.first.shape[2], x.shape[2])
        if early:
            self.first = torch.cat([self.first, x[:, :, :early]], 2)
        recent = torch.cat([self.recent, x[:, :, early:]], 2)
        leaving = max(recent.shape[2] - self.window, 0) // self.unit * self.unit
        if leaving:
            self._store(recent[:, :, :leaving])
            recent = recent[:, :, leaving:].clone()  # a view would keep all of it in memory
        self.recent = recent

    def _store(self, x: Tensor) -> None:
        q = encode(x.reshape(-1, self.width).float(), self.format)
        assert isinstance(q.scale, Tensor)
        blocks = (*x.shape[:2], -1, q.scale.shape[1])
        packed = _pack_rows(q.codes, self.format.grid.bits).view(*x.shape[:3], -1)
        self.codes = torch.cat([self.codes, packed], 2)
        self.scale = torch.cat([self.scale, q.scale.view(blocks)], 2)
        if self.zero is not None:
            assert isinstance(q.zero, Tensor)
            self.zero = torch.cat([self.zero, q.zero.view(blocks)], 2)

    def read(self) -> Tensor:
        """Return all tokens as attention is to see them, [batch, heads, tokens, channels]."""
        if not self.codes.shape[2]:
            return torch.cat([self.first, self.recent], 2)
        codes = _unpack_rows(self.codes.flatten(0, 2), self.format.grid.bits, self.width)
        zero = None if self.zero is None else self.zero.flatten(0, 2)
        stored = QTensor(self.format, codes, self.scale.flatten(0, 2), zero).dequantize(torch.float32)
        shape = (*self.codes.shape[:3], self.width)
        return torch.cat([self.first, stored.to(self.recent.dtype).view(shape), self.recent], 2)

    def tensors(self) -> list[Tensor]:
        """Return all that is held."""
        kept = [self.first, self.codes, self.scale, self.recent]
        return kept if self.zero is None else [*kept, self.zero]

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, whose first axis is the batch, by what `change` makes of it."""
        self.first, self.codes = change(self.first), change(self.codes)
        self.scale, self.recent = change(self.scale), change(self.recent)
        self.zero = None if self.zero is None else change(self.zero)


class KVLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not type checked
    """The cache of one attention layer; its two streams come into being with the first keys and values."""

    is_sliding = False  # all tokens are held; the mask leaves out what a sliding window does not see

    def __init__(self, fmt: KVFormat) -> None:
        super().__init__()
        self.format = fmt
        self.streams: tuple[KVStream, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty streams for keys and values like these."""
        fmt, self.dtype, self.device = self.format, key_states.dtype, key_states.device
        self.streams = (
            KVStream(key_states, fmt.key_format, fmt.window, fmt.sinks),
            KVStream(value_states, fmt.value_format, fmt.window, fmt.sinks),
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, tokens, channels]; return all of them as they are now held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.streams
        keys.write(key_states)
        values.write(value_states)
        return keys.read(), values.read()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens `query_length` new ones will see, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens are held."""
        return len(self.streams[0]) if self.streams else 0

    def get_max_length(self) -> int:
        """Return −1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.streams, self.is_initialized = (), False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back: what they pushed out of the window is no longer there in float."""
        if tokens_to_remove:
            raise ValueError(f"a KV cache in {self.format} cannot take {abs(tokens_to_remove)} tokens back")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these items of the batch."""
        for stream in self.streams:
            stream.rearrange(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every item of the batch."""
        for stream in self.streams:
            stream.rearrange(lambda x: x.repeat_interleave(repeats, 0))


class KVCache(Cache):  # type: ignore[misc]  # transformers is not type checked
    """Keys, after rotation, and values of all attention layers in the format `fmt`; for `past_key_values`.

    Padding on the left counts as tokens: it takes the place of sinks, and keys by channel share scales with it.
    """

    def __init__(self, fmt: KVFormat, config: Any) -> None:
        """Make an empty cache for models of `config`; ModelError if a layer keeps something else than these."""
        text = config.get_text_config()
        for i, kind in enumerate(getattr(text, "layer_types", None) or ()):
            if kind not in _ATTENTION:
                raise ModelError(
                    390,
                    f"layer {i} of {text.model_type!r} is {kind!r}; {fmt} is for layers of full or sliding attention.",
                )
        super().__init__(layer_class_to_replicate=partial(KVLayer, fmt))
        self.format = fmt

    def tensors(self) -> list[Tensor]:
        """Return all that is held, layer by layer."""
        return [x for layer in self.layers for stream in layer.streams for x in stream.tensors()]

    @property
    def nbytes(self) -> int:
        """Return how many bytes all that is held takes, whole storages and not only what tensors show of them."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors() if x.numel()}
        return sum(storages.values())


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack every row of codes [rows, width] into whole bytes → [rows, bytes]."""
    if bits == 8:
        return codes
    return pack(F.pad(codes, (0, -codes.shape[1] % (8 // bits))), bits).view(len(codes), -1)


def _unpack_rows(packed: Tensor, bits: int, width: int) -> Tensor:
    """Return the codes [rows, width] of what `_pack_rows` gave.

    Every token decoded unpacks the whole past, so this is several times as fast as `unpack` is for any number of bits.
    """
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :width]
