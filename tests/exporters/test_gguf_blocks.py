"""Blocks of GGUF: our codes as they are, which the library's own readers give the same numbers, bit for bit."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from quantforge.exporters.gguf.blocks import FORMATS, kind, pack, unpack
from quantforge.numerics.formats import parse
from quantforge.numerics.qtensor import QTensor, fit, quantize

TYPES = st.sampled_from(list(FORMATS))


def matrix(seed, rows, blocks, size=1.0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 32 * blocks, generator=rng) * size + torch.randn(rows, 1, generator=rng)


def same(a, b):
    parts = [(a.codes, b.codes), (a.scale, b.scale), *([(a.zero, b.zero)] if a.format.minimum else [])]
    return a.format == b.format and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in parts)


@given(
    held=TYPES,
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-6, 1, 1e4]),
)
def test_blocks_come_back_and_decode_as_the_library_decodes_them(held, rows, blocks, seed, size):
    fmt, w = FORMATS[held], matrix(seed, rows, blocks, size)
    q = quantize(w, fit(w, fmt), fmt)
    raw = pack(q)
    assert raw.dtype == np.uint8
    assert np.array_equal(dequantize(raw, held), q.dequantize(torch.float32).numpy())
    assert same(unpack(raw, held), q)


@given(held=TYPES, seed=st.integers(0, 99))
def test_any_codes_under_any_scales_come_back(held, seed):
    fmt, rng = FORMATS[held], torch.Generator().manual_seed(seed)
    codes = torch.randint(0, len(fmt.grid.values), (3, 64), generator=rng).to(torch.uint8)
    scale = torch.randint(1, 0x7C00, (3, 2), generator=rng).to(torch.int16).view(torch.float16)
    zero = torch.randint(-0x8000, -0x400, (3, 2), generator=rng).to(torch.int16).view(torch.float16)
    q = QTensor(fmt, codes, scale, zero if fmt.minimum else None)
    assert same(unpack(pack(q), held), q)
    assert np.array_equal(dequantize(pack(q), held), q.dequantize(torch.float32).numpy())


def test_codes_stand_where_ggml_looks_for_them():
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    scale, low = torch.tensor([[0.5]]).half(), torch.tensor([[-3.0]]).half()
    pairs = [i * 17 for i in range(16)]
    q4_0 = pack(QTensor(FORMATS[GGMLQuantizationType.Q4_0], codes, scale))[0].tolist()
    q4_1 = pack(QTensor(FORMATS[GGMLQuantizationType.Q4_1], codes, scale, low))[0].tolist()
    q8_0 = pack(QTensor(FORMATS[GGMLQuantizationType.Q8_0], codes + 120, scale))[0].tolist()
    assert q4_0 == [0, 0x38, *pairs]
    assert q4_1 == [0, 0x38, 0, 0xC2, *pairs]
    assert q8_0 == [0, 0x38, *[(i % 16 - 8) % 256 for i in range(32)]]


def test_other_formats_have_no_type():
    for text in ("int4-g32-sym-bf16", "int4-g32-asym-fp16", "int4-g32-asym-fp16-zero-fp16", "int4-g64-sym-fp16"):
        assert kind(parse(text)) is None
    assert [kind(fmt) for fmt in FORMATS.values()] == list(FORMATS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw[:, :-1], "no rows of Q4_0"),
        (lambda raw: raw[0], "no rows of Q4_0"),
        (lambda raw: raw[:0], "no rows of Q4_0"),
        (lambda raw: raw.view(np.int8), "no rows of Q4_0"),
        (lambda raw: np.concatenate([np.uint8([[0, 0x7C]]), raw[:, 2:]], 1), "not all finite and above 0"),
        (lambda raw: np.concatenate([np.uint8([[0, 0]]), raw[:, 2:]], 1), "not all finite and above 0"),
        (lambda raw: np.concatenate([np.uint8([[0, 0xB8]]), raw[:, 2:]], 1), "not all finite and above 0"),
    ],
)
def test_other_bytes_are_refused(change, said):
    held = GGMLQuantizationType.Q4_0
    w = matrix(0, 1, 2)
    with pytest.raises(ValueError, match=said):
        unpack(change(pack(quantize(w, fit(w, FORMATS[held]), FORMATS[held]))), held)
