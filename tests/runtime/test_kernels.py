"""Every operator gives the product of the plain path, within what its own rounding may change; some give just that."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.numerics.blocks import spread
from quantforge.numerics.formats import NAMED, parse
from quantforge.numerics.inputs import Inputs, QInput, integer_product, parse_inputs, settle
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import encode
from quantforge.numerics.residuals import Columns, LowRank, sparse
from quantforge.runtime import fp8, int4, int8, nf4, table, w8a8
from quantforge.runtime.integers import groups
from quantforge.runtime.kernel import PackedLinear

HALF = 2.0**-8  # of a number, the most that rounding to bfloat16 changes it by
SINGLE = 2.0**-24  # the same of float32

seeds = st.integers(0, 10_000)
tokens = st.sampled_from([1, 2, 5, 33])
needs = {
    "int4": pytest.mark.skipif(not table.has_int4("cpu"), reason="no int4 product"),
    "onednn": pytest.mark.skipif(not table.has_onednn("cpu"), reason="no exact int8 product of oneDNN"),
    "int8": pytest.mark.skipif(not table.has_int8("cpu"), reason="no int8 product"),
    "nf4": pytest.mark.skipif(not table.has_bitsandbytes("cpu"), reason="no bitsandbytes for this processor"),
}


def weight(fmt, out, width, seed, inputs=None, residuals=()):
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(out, width, generator=rng) * torch.randn(out, 1, generator=rng).exp()
    return QWeight(encode(w, NAMED.get(fmt) or parse(fmt)), {}, residuals, inputs)


def inputs_of(count, width, seed):
    """Return inputs of which some channels are a hundred times as large, and one token is zero."""
    rng = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(count, width, generator=rng) * (3 * torch.randn(width, generator=rng)).exp().clamp(max=100)
    x[count // 2 :][:1] *= float(count < 3)
    return x


def exact(w, x):
    """Return the product of the plain path in float64."""
    rounded = x if w.inputs is None else w.inputs.round(x)
    return rounded.double() @ w.dequantize(torch.float64).T


def sizes(w):
    """Return the sizes of the parts that make up an integer weight: |code| · scale, and |offset|."""
    parts = groups(w.base)
    shape = w.base.shape
    scale = spread(parts.scale, shape, (1, parts.size)).double()
    offset = torch.zeros(shape) if parts.offset is None else spread(parts.offset, shape, (1, parts.size))
    return parts.codes.double().abs() * scale, offset.double().abs()


def bf16_bound(w, x, parts):
    """Return by how much bfloat16 scales, offsets, inputs and outputs may change a product: three roundings.

    parts  [out, in], the sizes of what a weight is the sum of, each of which is rounded once
    Sums are in float32, whatever their order.
    """
    ax = (x if w.inputs is None else w.inputs.round(x)).double().abs()
    product = ax @ parts.T
    change = product * ((1 + HALF) ** 2 - 1)
    sums = (x.shape[1] + 4) * SINGLE * (product + change)
    return change + sums + HALF * (exact(w, x).abs() + change + sums) + 1e-30


INT4 = st.builds(
    "int{}-{}-{}-{}".format,
    st.sampled_from([2, 3, 4]),
    st.sampled_from(["g16", "g32", "g64", "g96", "g128", "g192", "channel"]),
    st.sampled_from(["sym", "asym"]),
    st.sampled_from(["fp32", "bf16", "fp16"]),
)


@needs["int4"]
@given(INT4, st.sampled_from([16, 48, 80]), tokens, seeds, st.sampled_from([torch.float32, torch.bfloat16]))
def test_int4_in_any_groups_errs_by_bfloat16_alone(fmt, out, count, seed, dtype):
    w, x = weight(fmt, out, 384, seed), inputs_of(count, 384, seed).to(dtype)
    choice = table.choose(w)
    assert choice.name == int4.NAME
    y = table.kernel(w, choice).product(x)
    assert y.dtype == dtype
    assert ((y - exact(w, x)).abs() <= bf16_bound(w, x.float(), sum(sizes(w)))).all()


@needs["int4"]
@pytest.mark.parametrize("fmt", ["spqr3-g16", "hqq3-g64", "int4-g32-asym-fp16-min-fp16", "int4-b4x32-sym"])
def test_int4_takes_scales_and_offsets_of_any_kind(fmt):
    w, x = weight(fmt, 64, 128, 0), inputs_of(3, 128, 0)
    choice = table.choose(w)
    assert choice.name == int4.NAME
    assert ((table.kernel(w, choice).product(x) - exact(w, x)).abs() <= bf16_bound(w, x, sum(sizes(w)))).all()


@needs["int4"]
@given(st.sampled_from(["int8-token", "int8-tensor", "int6-token", "int8-token-asym", "int8-g32"]), tokens, seeds)
def test_int4_with_rounded_inputs(rounds, count, seed):
    w = weight("int4-g64-asym", 32, 128, seed, QInput(parse_inputs(rounds)))
    x = inputs_of(count, 128, seed)
    choice = table.choose(w)
    assert choice.name == int4.NAME
    assert ((table.kernel(w, choice).product(x) - exact(w, x)).abs() <= bf16_bound(w, x, sum(sizes(w)))).all()


@needs["int4"]
def test_the_weight_that_the_int4_operator_holds_is_told():
    w = weight("int4-g32-asym", 32, 64, 3)
    kernel = int4.pack(w, "cpu")
    columns = kernel.product(torch.eye(64)).T  # each is rounded to bfloat16 once more
    held = int4.held(w)
    assert torch.equal(columns, held.to(torch.bfloat16).float())
    assert not torch.equal(held, w.dequantize())


def rows(name, device="cpu"):
    """Return the rows of the table called `name` that are for `device`."""
    return [row for row in table.TABLE if row.name == name and row.here(device)]


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        pytest.param(int8.NAME, "int8-channel-sym", marks=needs["int8"]),
        *(pytest.param(nf4.NAME, fmt, marks=needs["nf4"]) for fmt in ("nf4", "nf4-dq", "fp4", "fp4-dq")),
    ],
)
def test_what_replaces_weights_replaces_those_that_an_operator_holds(name, fmt):
    w = weight(fmt, 32, 64, 3)
    (row,) = rows(name)
    held = row.held(w)
    assert torch.equal(row.pack(w, "cpu").product(torch.eye(64)).T, held.to(torch.bfloat16).float())
    assert not torch.equal(held, w.dequantize())


OPERATORS = [
    ("int4-g32-asym", None),
    ("int4-g16-asym", None),
    ("int4-g32-sym", "int8-token"),
    ("int4-g32-sym", "int8-token-asym"),
    ("spqr3-g16", None),
    ("int8-channel-sym", None),
    ("int8-channel-asym", None),
    ("int8-channel-sym", "int8-token"),
    ("nf4", None),
]


@pytest.mark.parametrize(("fmt", "inputs"), OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_in_any_order_of_memory_have_the_same_product(fmt, inputs, dtype):
    w = weight(fmt, 64, 128, 0, None if inputs is None else QInput(parse_inputs(inputs)))
    choice = table.choose(w)
    if choice.row is None:
        pytest.skip(choice.reason)
    layer = PackedLinear(table.kernel(w, choice))
    for x in (torch.randn(1, 128, 7).to(dtype).transpose(1, 2), torch.randn(128, 3).to(dtype).T):
        assert not x.is_contiguous()
        assert torch.equal(layer(x), layer(x.contiguous()))


INT8 = st.builds(
    "int{}-{}-{}-{}".format,
    st.sampled_from([5, 6, 8]),
    st.sampled_from(["channel", "tensor"]),
    st.sampled_from(["sym", "asym"]),
    st.sampled_from(["fp32", "bf16", "fp16"]),
)


@needs["onednn"]
@given(INT8, st.sampled_from([1, 16, 37]), st.sampled_from([1, 48, 129]), tokens, seeds)
def test_int8_in_two_digits_errs_by_their_last_place(fmt, out, width, count, seed):
    w, x = weight(fmt, out, width, seed), inputs_of(count, width, seed)
    choice = table.choose(w)
    assert choice.name == int8.DIGITS
    y = table.kernel(w, choice).product(x)
    steps = x.abs().amax(1, keepdim=True).double() / 32639
    parts = sum(sizes(w)).sum(1)
    last_place = steps * (0.5 + 2.0**-8) * parts  # half a step, and what the division errs by
    single = 8 * SINGLE * 32896 * steps * parts + width * SINGLE * x.double().abs() @ sizes(w)[1].T
    assert ((y - exact(w, x)).abs() <= last_place + single + 1e-30).all()


@needs["int8"]
@given(st.sampled_from(["int8-channel-sym", "int8-channel-sym-bf16", "int6-channel-sym"]), tokens, seeds)
def test_torchs_own_int8_errs_by_bfloat16_alone(fmt, count, seed):
    w, x = weight(fmt, 32, 96, seed), inputs_of(count, 96, seed)
    y = int8.pack(w, "cpu").product(x)
    assert ((y - exact(w, x)).abs() <= bf16_bound(w, x, sizes(w)[0])).all()


@pytest.mark.parametrize("onednn", [pytest.param(True, marks=needs["onednn"]), False])
@given(
    st.sampled_from(["int8-channel-sym", "int8-channel-sym-bf16", "int4-channel-sym", "llm-int8", "int8-tensor-sym"]),
    st.sampled_from(["int8-token", "int8-tensor", "narrow8-token", "int4-token", "int8-token-bf16"]),
    tokens,
    seeds,
)
def test_w8a8_is_the_integer_product_bit_by_bit(onednn, fmt, rounds, count, seed):
    w, x = weight(fmt, 32, 96, seed, QInput(parse_inputs(rounds))), inputs_of(count, 96, seed)
    codes, _ = w.inputs.quantize(x)
    assert torch.equal(w8a8.pack(w, "cpu", onednn=onednn).product(x), integer_product(codes, w.base))


@given(tokens, seeds)
def test_static_ranges_stay(count, seed):
    x = inputs_of(count, 96, seed)
    rounds = settle(parse_inputs("int8-tensor-static"), x.amin(0) / 2, x.amax(0) / 2, torch.float32)
    w = weight("int8-channel-sym", 32, 96, seed, rounds)
    choice = table.choose(w)
    assert choice.name == w8a8.NAME if rounds.inputs.format.symmetric else True
    codes, _ = rounds.quantize(x)
    assert torch.equal(table.kernel(w, choice).product(x), integer_product(codes, w.base))


def llm_int8(seed, threshold, dynamic, x):
    inputs = Inputs(parse_inputs("narrow8-token").format, threshold=threshold, dynamic=dynamic)
    if dynamic:
        return weight("llm-int8", 32, 96, seed, QInput(inputs))
    rounds = settle(inputs, x.amin(0), x.amax(0), torch.float32)
    w = weight("llm-int8", 32, 96, seed, rounds)
    values = torch.randn(32, len(rounds.spared), generator=torch.Generator().manual_seed(seed))
    return QWeight(w.base, {}, (Columns(rounds.spared, values),) if len(rounds.spared) else (), rounds)


@pytest.mark.parametrize("onednn", [pytest.param(True, marks=needs["onednn"]), False])
@given(st.sampled_from([0.5, 20.0, 1e9]), st.booleans(), tokens, seeds)
def test_llm_int8_keeps_wide_channels_in_float(onednn, threshold, dynamic, count, seed):
    x = inputs_of(count, 96, seed)
    w = llm_int8(seed, threshold, dynamic, x)
    y = w8a8.pack(w, "cpu", onednn=onednn).product(x)
    sums = w.inputs.round(x).double().abs() @ w.dequantize(torch.float64).abs().T
    assert ((y - exact(w, x)).abs() <= 100 * SINGLE * sums + 1e-30).all()


@needs["nf4"]
@given(st.sampled_from(["nf4", "nf4-dq", "fp4", "fp4-dq"]), st.sampled_from([32, 96]), tokens, seeds)
def test_four_bits_of_bitsandbytes_err_by_bfloat16_alone(fmt, out, count, seed):
    w, x = weight(fmt, out, 128, seed), inputs_of(count, 128, seed)
    choice = table.choose(w)
    assert choice.name == nf4.NAME
    parts = w.dequantize(torch.float64).abs()
    # the library rounds weights to bfloat16 as well, after their scales
    bound = bf16_bound(w, x, parts * (1 + HALF)) + HALF * x.double().abs() @ parts.T
    assert ((table.kernel(w, choice).product(x) - exact(w, x)).abs() <= bound).all()


@needs["int4"]
@given(st.permutations(["low rank", "sparse", "columns"]), st.sampled_from([None, "int8-token"]), tokens, seeds)
def test_residuals_are_put_on_in_their_order(kinds, rounds, count, seed):
    rng = torch.Generator().manual_seed(seed)
    w = weight("int4-g32-asym", 32, 96, seed, None if rounds is None else QInput(parse_inputs(rounds)))
    dense = torch.randn(32, 96, generator=rng)
    made = {
        "low rank": LowRank(torch.randn(32, 3, generator=rng), torch.randn(3, 96, generator=rng)),
        "sparse": sparse(torch.rand(32, 96, generator=rng) < 0.05, dense, torch.float16),
        "columns": Columns(torch.tensor([3, 50], dtype=torch.int32), dense[:, :2].clone()),
    }
    w, x = QWeight(w.base, {}, tuple(made[kind] for kind in kinds), w.inputs), inputs_of(count, 96, seed)
    choice = table.choose(w)
    kernel = table.kernel(w, choice)
    assert choice.name == kernel.operator
    assert all(word in choice.name for word in ("low rank", "CSR", "columns"))
    parts = sum(sizes(w)) + sum(part.onto(torch.zeros(32, 96)).double().abs() for part in w.residuals)
    # what a sparse part replaces, the sum has once and takes off again
    assert ((kernel.product(x) - exact(w, x)).abs() <= 2 * bf16_bound(w, x, 3 * parts)).all()


@given(st.sampled_from(["e4m3-token", "e4m3-tensor", "e4m3-token-bf16"]), tokens, seeds)
def test_fp8_codes_of_inputs_are_those_of_the_grid(notation, count, seed):
    rounds, x = QInput(parse_inputs(notation)), inputs_of(count, 96, seed)
    wanted, _ = rounds.quantize(x)
    values, scale = fp8.input_codes(x, rounds)
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(values.float(), wanted.format.grid.decode(wanted.codes))
    assert torch.equal(scale, wanted.scale.float().expand(count, 1))


def test_fp8_rounds_every_number_as_the_grid_does():
    """In the middle between two values, too, and beyond the largest one."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    x = every[every.isfinite() & (every.abs() < 1e6)]
    rounds = settle(parse_inputs("e4m3-tensor-static"), torch.tensor([-448.0]), torch.tensor([448.0]), torch.float32)
    assert float(rounds.range.scale) == 1
    wanted, _ = rounds.quantize(x[:, None])
    values, _ = fp8.input_codes(x[:, None], rounds)
    assert torch.equal(values.float(), wanted.format.grid.decode(wanted.codes))


def test_bytes_are_counted_exactly():
    w = weight("int4-g64-asym", 64, 256, 0)
    # half a byte a code, and two bytes each of scale and offset a group
    assert table.kernel(w, table.choose(w)).nbytes == 64 * 256 // 2 + 64 * 4 * 4
    assert table.kernel(w, table.choose(w)).nbytes / (64 * 256 * 4) <= 0.2
    both = weight("int8-channel-sym", 64, 256, 0, QInput(parse_inputs("int8-token")))
    assert w8a8.pack(both, "cpu", onednn=False).nbytes == 64 * 256 + 64 * 4


@pytest.mark.parametrize(
    ("fmt", "inputs", "out", "width", "said"),
    [
        ("int4-g20-sym", None, 32, 100, "groups of 20"),
        ("int4-g32-sym", None, 33, 64, "33 outputs"),
        ("int8-g32-sym", None, 32, 64, "more than one scale a row"),
        ("int8-channel-asym", "int8-token", 32, 64, "zero points"),
        ("int8-channel-sym", "int8-token-asym", 32, 64, "no symmetric integers"),
        ("nf4", None, 33, 64, "33 x 64"),
        ("mxfp4", None, 32, 64, "no operator takes"),
        ("e4m3-channel", None, 32, 64, "e4m3"),
        ("int4-g32-asym", Inputs(parse("int8-channel"), threshold=6), 32, 64, "stay in float"),
        ("int4-g32-sym", Inputs(parse("int8-channel"), threshold=6, dynamic=True), 32, 64, "stay in float"),
        ("int4-channel-asym", Inputs(parse("int8-channel"), threshold=6), 32, 64, "zero points"),
        ("e4m3-channel", Inputs(parse("e4m3-channel"), threshold=6, dynamic=True), 32, 64, "stay in float"),
    ],
)
def test_what_no_operator_takes_is_left_to_the_reference_with_the_reason(fmt, inputs, out, width, said):
    inputs = parse_inputs(inputs) if isinstance(inputs, str) else inputs
    w = weight(fmt, out, width, 0, None if inputs is None else QInput(inputs))
    name, reason = table.operator_of(w)
    assert name == table.REFERENCE
    assert said in reason


def test_a_build_without_an_operator_falls_back(monkeypatch):
    w = weight("int8-channel-sym", 32, 64, 0)
    rows = [row for row in table.TABLE if row.name != int8.DIGITS]
    monkeypatch.setattr(table, "TABLE", tuple(rows))
    assert table.operator_of(w)[0] == int8.NAME
    gone = [replace(row, here=lambda device: False) for row in rows]
    monkeypatch.setattr(table, "TABLE", tuple(gone))
    name, reason = table.operator_of(w)
    assert name == table.REFERENCE
    assert "no int8 product for cpu" in reason


def test_a_product_that_saturates_is_not_taken_for_exact():
    def saturating(codes, x):
        return (x.float() @ codes.float().T).clamp(-(2**15), 2**15 - 1)

    assert not table._exact(saturating)
    assert table._exact(lambda codes, x: x.float() @ codes.float().T)


def test_a_model_in_float64_is_computed_by_the_reference():
    assert table.operator_of(weight("int4-g32-sym", 32, 64, 0), dtype=torch.float64)[0] == table.REFERENCE


@needs["int4"]
def test_the_bounds_are_no_empty_promise():
    w, x = weight("int4-g32-sym-bf16", 16, 64, 0), torch.full((1, 64), 1 + HALF * 0.99)
    y = table.kernel(w, table.choose(w)).product(x)
    share = ((y - exact(w, x)).abs() / bf16_bound(w, x, sum(sizes(w)))).max()
    assert math.isfinite(share)
    assert share > 0.05


@pytest.mark.skipif(nf4.library() is None, reason="no bitsandbytes")
@pytest.mark.parametrize("fmt", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_bitsandbytes_has_the_weights_as_they_are_where_nothing_is_packed_for_a_processor(fmt, monkeypatch):
    """What a GPU is given, computed on a CPU."""
    library = nf4.library()
    monkeypatch.setattr(library.functional, "_convert_weight_packed_for_cpu", lambda packed, state: (packed, state))
    w, x = weight(fmt, 24, 128, 0), torch.eye(128)
    assert nf4.refuses(w, "cuda") is None
    y = library.matmul_4bit(x, nf4.pack(w, "cpu").packed, quant_state=nf4.pack(w, "cpu").state)
    assert torch.equal(y.T, w.dequantize())
