"""The words of compressed-tensors: nothing is lost, for any width of code and matrix; the library's own layout."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from quantforge.errors import ModelError
from quantforge.exporters.compressed_tensors import CompressedTensors
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import int_grid
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_codes(bits, rows, cols, group, symmetric, dtype, seed):
    """Return a QTensor in which every code and zero point is drawn, the extremes among them."""
    rng = torch.Generator().manual_seed(seed)
    groups = -(-cols // group) if group else 1
    codes = torch.randint(0, 2**bits, (rows, cols), generator=rng).to(torch.uint8)
    codes[0, 0], codes[-1, -1] = 2**bits - 1, 0
    scale = (torch.rand(rows, groups, generator=rng) + 0.1).to(dtype)
    zero = None
    if not symmetric:
        zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, groups), generator=rng).to(torch.int8)
    return QTensor(Format(int_grid(bits), (1, group), symmetric, dtype), codes, scale, zero)


def config(fmt):
    """Return the quantization_config that describes `fmt`."""
    weights = {"num_bits": fmt.grid.bits, "type": "int", "symmetric": fmt.symmetric, "strategy": "channel"}
    if fmt.block[1]:
        weights |= {"strategy": "group", "group_size": fmt.block[1]}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


STORED = st.builds(
    random_codes,
    bits=st.integers(2, 8),
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    group=st.none() | st.integers(1, 40),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)


@given(STORED)
def test_what_is_written_is_what_is_read(q):
    tensors = CompressedTensors().tensors("a.b", QWeight(q, {}))
    back = CompressedTensors().read(config(q.format), tensors)["a.b"].base
    assert back.format == q.format
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert (back.zero is None) == (q.zero is None)
    if q.zero is not None:
        assert torch.equal(back.zero, q.zero)
    assert torch.equal(back.dequantize(), q.dequantize())


@given(STORED)
def test_the_library_unpacks_the_integers_that_codes_mean(q):
    tensors = CompressedTensors().tensors("a.b", QWeight(q, {}))
    packed, shape = tensors["a.b.weight_packed"], tensors["a.b.weight_shape"]
    assert shape.tolist() == list(q.shape)
    got = unpack_from_int32(packed, q.format.grid.bits, torch.Size(q.shape))
    assert torch.equal(got.float(), q.format.grid.decode(q.codes))


@given(STORED)
def test_each_word_holds_as_many_whole_codes_as_fit_from_its_lowest_bit(q):
    packed = CompressedTensors().tensors("a.b", QWeight(q, {}))["a.b.weight_packed"]
    bits, (rows, cols) = q.format.grid.bits, q.shape
    per_word = 32 // bits
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-cols // per_word))
    words = packed.long() & 0xFFFFFFFF
    for j in range(cols):
        assert torch.equal(words[:, j // per_word] >> (bits * (j % per_word)) & (2**bits - 1), q.codes[:, j].long())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("cols", [1, 3, 31, 32, 33, 64, 65])
def test_every_code_survives_in_every_place(bits, cols):
    fmt = Format(int_grid(bits), (1, None), True)
    codes = (torch.arange(2**bits)[:, None] + torch.arange(cols)) % 2**bits
    q = QTensor(fmt, codes.to(torch.uint8), torch.ones(2**bits, 1))
    back = CompressedTensors().read(config(fmt), CompressedTensors().tensors("l", QWeight(q, {})))["l"].base
    assert torch.equal(back.codes, q.codes)


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_a_layer_with_a_part_missing_is_refused_by_name(part):
    q = random_codes(4, 4, 32, 16, False, torch.float32, 0)
    tensors = CompressedTensors().tensors("a.b", QWeight(q, {}))
    del tensors[f"a.b.{part}"]
    with pytest.raises(ModelError, match=rf"a\.b lacks {part}"):
        CompressedTensors().read(config(q.format), tensors)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_parts_that_do_not_fit_together_are_refused(part):
    q = random_codes(4, 4, 32, 16, False, torch.float32, 0)
    tensors = CompressedTensors().tensors("a.b", QWeight(q, {}))
    tensors[f"a.b.{part}"] = tensors[f"a.b.{part}"][:-1]
    with pytest.raises(ModelError, match="do not fit a weight of"):
        CompressedTensors().read(config(q.format), tensors)
