"""Codes as a stream of bits: nothing lost, nothing wasted, for any width and any number of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.packing import pack, unpack


def drawn(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    return codes.to(torch.uint8)


@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 999))
def test_what_is_packed_is_what_is_unpacked_in_the_fewest_bytes(bits, count, seed):
    codes = drawn(bits, count, seed)
    before = codes.clone()
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (-(-count * bits // 8),))
    assert torch.equal(unpack(packed, bits, count), codes)
    assert torch.equal(codes, before)


@given(bits=st.integers(1, 8), count=st.integers(1, 40), seed=st.integers(0, 999))
def test_bit_k_of_the_stream_is_bit_k_mod_8_of_byte_k_over_8(bits, count, seed):
    codes = drawn(bits, count, seed)
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(-(-count * bits // 8), "little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_survives_in_every_place(bits):
    codes = ((torch.arange(2**bits)[:, None] + torch.arange(9)) % 2**bits).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, codes.numel()).view(codes.shape), codes)


def test_a_matrix_is_packed_row_after_row_whatever_its_strides():
    codes = drawn(3, 35, 0).view(5, 7)
    assert torch.equal(pack(codes, 3), pack(codes.flatten(), 3))
    assert torch.equal(pack(codes.T, 3), pack(codes.T.contiguous(), 3))


@pytest.mark.parametrize(
    "spoil", [lambda p: p[:-1], lambda p: torch.cat([p, p[:1]]), lambda p: p.int(), lambda p: p[None]]
)
def test_another_number_or_kind_of_bytes_is_refused(spoil):
    packed = pack(drawn(3, 35, 0), 3)
    with pytest.raises(ValueError, match="35 codes of 3 bits are not"):
        unpack(spoil(packed), 3, 35)
