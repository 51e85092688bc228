"""What is kept beside the codes comes back exactly, counts every bit, and multiplies as the dense matrix does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.formats import parse
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import encode
from quantforge.numerics.residuals import Columns, LowRank, Sparse, sparse

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 20))
KINDS = ["low-rank", "low-rank codes", "sparse", "columns"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def draw(kind, shape, seed, dtype=torch.float16):
    """Return a residual of `kind` for a matrix of `shape`."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=rng)
    if kind.startswith("low-rank"):
        a, b = torch.randn(shape[0], 2, generator=rng).to(dtype), torch.randn(2, shape[1], generator=rng).to(dtype)
        fmt = parse("int8-channel-sym").with_scale(dtype)
        return LowRank(encode(a.float(), fmt), encode(b.float(), fmt)) if kind.endswith("codes") else LowRank(a, b)
    if kind == "sparse":
        return sparse(torch.rand(shape, generator=rng) < 0.3, w, dtype)
    index = (torch.rand(shape[1], generator=rng) < 0.3).nonzero()[:, 0].int()
    return Columns(index, w[:, index.long()].to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@given(shape=SHAPES, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_rows_cut_out_act_on_those_rows(kind, shape, seed, dtype):
    residual, base = draw(kind, shape, seed, dtype), torch.randn(shape)
    before = base.clone()
    whole = residual.onto(base)
    assert torch.equal(base, before)
    for start in range(shape[0]):
        for stop in (start + 1, shape[0]):
            part = residual.rows(start, stop).onto(base[start:stop])
            torch.testing.assert_close(part, whole[start:stop], rtol=1e-6, atol=1e-6)


@given(shape=SHAPES, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_sparse_weights_come_back_in_their_places_and_nowhere_else(shape, seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    w, places = torch.randn(shape, generator=rng), torch.rand(shape, generator=rng) < 0.3
    kept = sparse(places, w, dtype)
    got = kept.onto(torch.full(shape, 7.0))
    assert torch.equal(got[places], w[places].to(dtype).float())
    assert (got[~places] == 7).all()
    assert kept.start.dtype == kept.columns.dtype == torch.int32
    assert int(kept.start[-1]) == len(kept.columns) == len(kept.values)
    for i in range(shape[0]):
        mine = slice(int(kept.start[i]), int(kept.start[i + 1]))
        assert kept.columns[mine].tolist() == places[i].nonzero()[:, 0].tolist()
        assert torch.equal(kept.values[mine], w[i, places[i]].to(dtype))


def test_sparse_weights_replace_even_by_zero():
    w = torch.zeros(2, 3)
    assert not sparse(torch.ones(2, 3, dtype=torch.bool), w, torch.float16).onto(torch.ones(2, 3)).any()


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_columns_come_back_whole(shape, seed):
    kept = draw("columns", shape, seed)
    got, index = kept.onto(torch.full(shape, 7.0)), kept.index.long()
    assert torch.equal(got[:, index], kept.values.float())
    others = torch.ones(shape[1], dtype=torch.bool)
    others[index] = False
    assert (got[:, others] == 7).all()


def test_every_bit_is_counted():
    w, places = torch.randn(4, 10), torch.zeros(4, 10, dtype=torch.bool)
    places[0, :3] = True
    assert sparse(places, w, torch.float16).nbits == 5 * 32 + 3 * (16 + 16)
    assert sparse(places, w, torch.float32).nbits == 5 * 32 + 3 * (16 + 32)
    wide = Sparse(torch.tensor([0, 1]), torch.tensor([70000]), torch.ones(1, dtype=torch.float16), 1 << 17)
    assert wide.nbits == 2 * 32 + 32 + 16
    assert Columns(torch.tensor([1, 5]), torch.ones(4, 2, dtype=torch.float16)).nbits == 2 * 32 + 8 * 16
    assert LowRank(torch.ones(4, 2, dtype=torch.float16), torch.ones(2, 10, dtype=torch.bfloat16)).nbits == 16 * 28
    fmt = parse("int8-channel-sym-fp16")
    assert LowRank(encode(torch.randn(4, 2), fmt), encode(torch.randn(2, 10), fmt)).nbits == 8 * 28 + 16 * (4 + 2)


@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=3),
    shape=SHAPES,
    seed=st.integers(0, 99),
    base=st.sampled_from(["int4-g7-asym", "nf4", "nf4-dq", "spqr3-g16", "int3-g7-asym-fp16-zero-fp16"]),
)
def test_a_weight_is_its_codes_and_its_residuals_in_order(kinds, shape, seed, base):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    residuals = tuple(draw(kind, shape, seed + i) for i, kind in enumerate(kinds))
    weight = QWeight(encode(w, parse(base)), {}, residuals)
    dense = weight.base.dequantize(torch.float64)
    for residual in residuals:
        dense = residual.onto(dense)
    assert torch.equal(weight.dequantize(torch.float64), dense)
    assert weight.nbits == weight.base.nbits + sum(r.nbits for r in residuals)
    x = torch.randn(5, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(weight.product(x), x @ dense.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weight.product(x.float()), (x @ dense.T).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_had_in_half_precision_too(kind, dtype):
    shape = (6, 16)
    weight = QWeight(encode(torch.randn(shape), parse("int4-g16-sym")), {}, (draw(kind, shape, 1),))
    x = torch.randn(5, 16).to(dtype)
    got = weight.product(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), x.float() @ weight.dequantize().T, rtol=0.05, atol=0.2)


def test_no_sparse_weights_at_all_change_nothing():
    kept = sparse(torch.zeros(3, 5, dtype=torch.bool), torch.randn(3, 5), torch.float16)
    base, x = torch.randn(3, 5), torch.randn(2, 5)
    assert torch.equal(kept.onto(base), base)
    assert not kept.product(x, base).any()
