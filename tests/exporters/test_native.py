"""quantforge's own container: whatever a weight is made of is read back bit for bit, and damage is named by layer."""

import copy
import json
from dataclasses import fields, is_dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from quantforge.errors import ModelError
from quantforge.exporters.native import Native
from quantforge.numerics.formats import NAMED, Format, parse
from quantforge.numerics.grids import CUSTOM, Grid
from quantforge.numerics.inputs import parse_inputs, settle
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import encode
from quantforge.numerics.residuals import Columns, LowRank, sparse
from quantforge.registry import create, names

FORMATS = [
    *NAMED,
    *("int4-g16-asym", "int3-g7-sym-fp16", "int8-tensor-asym-bf16", "int1-g4-sym", "nf3-f10", "e2m1-channel-bf16"),
    *("int3-g16-asym-fp16-zero-fp16", "int2-f10-asym-zero-fp32", "dynamic8-f256", "af4-f64", "e4m3-channel"),
]
SHAPES = st.tuples(st.sampled_from([1, 2, 17, 20]), st.integers(1, 40))
RESIDUALS = st.lists(st.sampled_from(["low-rank", "low-rank codes", "sparse", "nothing sparse", "columns"]), max_size=3)


def drawn(shape, fmt, kinds=(), seed=0):
    """Return a random weight of `shape` in `fmt` with residuals of `kinds`."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=rng)
    fmt = fmt if isinstance(fmt, Format) else parse(fmt)
    found, eight = [], parse("int8-channel-sym-bf16")
    for kind in kinds:
        a, b = torch.randn(shape[0], 2, generator=rng).bfloat16(), torch.randn(2, shape[1], generator=rng).bfloat16()
        index = torch.randperm(shape[1], generator=rng)[: shape[1] // 3].int()
        found.append(
            {
                "low-rank": lambda a=a, b=b: LowRank(a, b),
                "low-rank codes": lambda a=a, b=b: LowRank(encode(a.float(), eight), encode(b.float(), eight)),
                "sparse": lambda: sparse(w.abs() > 1, w, torch.float16),
                "nothing sparse": lambda: sparse(w.abs() > 99, w, torch.float16),
                "columns": lambda i=index: Columns(i, w[:, i.long()].half()),
            }[kind]()
        )
    return QWeight(encode(w, fmt), {}, tuple(found))


def written(weights):
    """Return config and tensors as they stand in the files."""
    native = Native()
    config = native.config(None, []) | {"layers": {name: native.describe(w) for name, w in weights.items()}}
    found = {}
    for name, weight in weights.items():
        found |= native.tensors(name, weight)
    return json.loads(json.dumps(config)), load(save(found))


def same(a, b):
    """Tell whether two parts are equal, bit for bit and dtype for dtype."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a) and not isinstance(a, Format):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


@given(shape=SHAPES, fmt=st.sampled_from(FORMATS), kinds=RESIDUALS, seed=st.integers(0, 99))
def test_what_is_written_is_read_bit_for_bit(shape, fmt, kinds, seed):
    weights = {"a.b": drawn(shape, fmt, kinds, seed), "a.c": drawn((3, 5), "nf4-dq", (), seed)}
    config, tensors = written(weights)
    tensors["norm"] = torch.ones(3)
    found = Native().read(config, tensors)
    assert list(tensors) == ["norm"]
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert same(found[name], weight)
        assert torch.equal(found[name].dequantize(), weight.dequantize())
        assert found[name].nbits == weight.nbits


@pytest.mark.parametrize("solver", names("solver"))
def test_what_any_solver_returns_is_read_bit_for_bit(problem, solver):
    made, tried = create("solver", solver, {"share": 0.2} if solver == "spare" else None), 0
    for fmt in FORMATS:
        if made.refuses((18, 40), parse(fmt)) is None:
            p = problem(fmt, 18, 40, w="outliers", drift=0.2)
            weight = create("correction", "lorc").correct(p, made.solve(p))
            found = Native().read(*written({"layer": weight}))["layer"]
            assert same(found.base, weight.base)
            assert same(found.residuals, weight.residuals)
            tried += 1
    assert tried >= 3


def test_a_table_of_the_layers_own_is_read_bit_for_bit():
    table = Grid(CUSTOM, tuple(torch.tensor([-1.0, -1 / 3, 0.0, 0.1, 1.0]).tolist()))
    weight = drawn((4, 10), Format(table, (1, 5), True))
    config, tensors = written({"layer": weight})
    assert len(tensors["layer.codes"]) == 4 * 10 * 3 // 8
    assert same(Native().read(config, tensors)["layer"], weight)


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_take_no_byte_more_than_they_must(fmt):
    weight = drawn((17, 40), fmt)
    _, tensors = written({"layer": weight})
    used = 8 * sum(t.numel() * t.dtype.itemsize for t in tensors.values())
    # int8 holds the zero points that are counted with fewer bits; a stream ends with a whole byte
    spare = 8 * len(tensors) + (8 * tensors["layer.zero"].numel() if "layer.zero" in tensors else 0)
    assert weight.nbits <= used <= weight.nbits + spare


def test_the_names_in_the_file_are_those_of_the_documentation():
    _, tensors = written({"m": drawn((4, 64), "nf4-dq", ("low-rank codes", "sparse", "columns"))})
    assert set(tensors) == {
        *("m.codes", "m.scale.codes", "m.scale.scale", "m.scale.offset"),
        *("m.residual.0.a.codes", "m.residual.0.a.scale", "m.residual.0.b.codes", "m.residual.0.b.scale"),
        *("m.residual.1.start", "m.residual.1.columns", "m.residual.1.values"),
        *("m.residual.2.index", "m.residual.2.values"),
    }


KINDS = ("low-rank", "sparse", "columns", "low-rank codes")


def sound():
    """Return config and tensors of two layers with everything in them."""
    return written({"good": drawn((4, 64), "nf4"), "bad": drawn((4, 64), "nf4-dq", KINDS)})


@pytest.mark.parametrize("part", sorted(k for k in sound()[1] if k.startswith("bad")))
@pytest.mark.parametrize(
    "damage",
    [
        lambda t: None,
        lambda t: t[:-1] if t.dim() else t[None],
        lambda t: torch.cat([t, t]) if t.dim() else torch.stack([t, t]),
        lambda t: t.to(torch.float64) if t.is_floating_point() else t.to(torch.int64),
        lambda t: t.to(torch.bool),
        lambda t: t[None],
    ],
    ids=["missing", "short", "long", "wide", "bool", "deeper"],
)
def test_a_part_that_is_missing_or_of_another_shape_or_kind_is_refused_by_layer(part, damage):
    config, tensors = sound()
    damaged = damage(tensors.pop(part))
    if damaged is not None:
        tensors[part] = damaged
    with pytest.raises(ModelError, match=r"^error\[QF-381\]: bad cannot be read from the checkpoint \(.*it is damaged"):
        Native().read(config, tensors)


@pytest.mark.parametrize(
    "part",
    sorted(k for k, t in sound()[1].items() if k.startswith("bad") and t.is_floating_point()),
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused_by_layer(part, value):
    config, tensors = sound()
    tensors[part].view(-1)[0] = value
    with pytest.raises(ModelError, match="bad cannot be read"):
        Native().read(config, tensors)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("residual.1.columns", lambda t: t + 64),
        ("residual.1.columns", lambda t: t - 64),
        ("residual.1.columns", lambda t: t * 0),
        ("residual.1.start", lambda t: t + 1),
        ("residual.1.start", lambda t: t.flip(0)),
        ("residual.1.start", lambda t: t * torch.tensor([1, -1, 1, 1, 1], dtype=torch.int32)),
        ("residual.1.start", lambda t: t * torch.tensor([1, 1, 1, 1, 2], dtype=torch.int32)),
        ("residual.2.index", lambda t: t + 64),
        ("residual.2.index", lambda t: t - 64),
        ("residual.2.index", lambda t: t * 0),
    ],
)
def test_indices_that_point_elsewhere_are_refused_by_layer(part, change):
    config, tensors = sound()
    tensors[f"bad.{part}"] = change(tensors[f"bad.{part}"].int())  # arithmetic lacks 16-bit unsigned integers
    with pytest.raises(ModelError, match="bad cannot be read"):
        Native().read(config, tensors)


def test_codes_that_the_table_lacks_are_refused():
    table = Grid(CUSTOM, (-1.0, 0.0, 1.0))
    config, tensors = written({"bad": drawn((4, 8), Format(table, (1, 8), True))})
    tensors["bad.codes"] = tensors["bad.codes"] | 255
    with pytest.raises(ModelError, match="codes that custom lacks"):
        Native().read(config, tensors)


def put(path, value):
    """Return a function that puts `value` at `path` of a layer's description."""

    def change(about):
        for key in path[:-1]:
            about = about[key]
        if value is ...:
            del about[path[-1]]
        else:
            about[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(put([key], value) for key in ("shape", "format", "residuals") for value in (..., None, 3, "x", [1], {})),
        *(put(["shape"], value) for value in ([4, 63], [64, 4], [0, 0], [-4, -64], [4, 64, 1], [1e99, 4], ["a", "b"])),
        *(put(["format", key], ...) for key in ("grid", "block", "symmetric", "scale", "zero", "centered")),
        put(["format", "grid"], "nf5"),
        put(["format", "grid"], "nf3"),
        put(["format", "block"], {"flat": 32}),
        put(["format", "block"], [1, 64.5]),
        put(["format", "scale"], "fp32"),
        put(["format", "symmetric"], False),
        put(["format", "centered"], True),
        put(["format", "scale", "grid"], "int6"),
        put(["residuals", 0, "kind"], "dense"),
        put(["residuals", 0, "kind"], "sparse"),
        put(["residuals", 0, "a"], 3),
        put(["residuals", 1, "width"], 63),
        put(["residuals", 1, "width"], "tensor"),
        put(["residuals", 1, "start"], ...),
        put(["residuals", 3, "a", "shape"], [5, 2]),
        put(["residuals", 3, "a", "format", "grid"], "int4"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_by_layer(change):
    config, tensors = sound()
    change(config["layers"]["bad"])
    with pytest.raises(ModelError, match="bad cannot be read"):
        Native().read(config, tensors)


@pytest.mark.parametrize(
    "config", [{}, {"version": 1}, {"version": 2, "layers": {}}, {"version": 1, "layers": []}, {"layers": {}}]
)
def test_another_version_is_refused(config):
    with pytest.raises(ModelError, match="not of version 1 of quantforge's container"):
        Native().read(config, {})


def test_a_description_nested_without_end_is_refused():
    config, tensors = sound()
    about = config["layers"]["bad"]["format"]
    inner = about
    for _ in range(100_000):
        inner["scale"] = copy.copy(about)
        inner = inner["scale"]
    with pytest.raises(ModelError, match="bad cannot be read"):
        Native().read(config, tensors)


def test_columns_of_single_weights_take_16_bits_in_the_file_as_they_are_counted():
    weight = drawn((4, 64), "int4-g16-sym-bf16", ("sparse",))
    _, tensors = written({"m": weight})
    stored = {k: v.numel() * v.dtype.itemsize * 8 for k, v in tensors.items() if "residual" in k}
    assert tensors["m.residual.0.columns"].dtype == torch.uint16
    assert sum(stored.values()) == weight.residuals[0].nbits


def rounded(inputs):
    """Return config and tensors of a layer with calibrated inputs."""
    low, high = torch.linspace(-1, 0, 64), torch.linspace(0, 3, 64)
    rounds = settle(parse_inputs(inputs), low, high, torch.float32)
    return written({"bad": QWeight(drawn((4, 64), "int8-channel-sym").base, {}, (), rounds)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("static", "dynamic") for value in (1, 0, "false", None, [])),
        *(("threshold", value) for value in ("6", True, [6])),
    ],
)
def test_inputs_described_in_words_of_another_kind_are_refused(key, value):
    config, tensors = rounded("int8-tensor-static")
    Native().read(config, dict(tensors))
    config["layers"]["bad"]["inputs"][key] = value
    with pytest.raises(ModelError, match=r"bad cannot be read .*no truth values and a number"):
        Native().read(config, tensors)


@pytest.mark.parametrize(
    ("inputs", "zero"),
    [("int8-tensor-static", 1), *(("int8-tensor-asym-static", zero) for zero in (0.5, 128, -129, 1e30))],
)
def test_zero_points_of_inputs_that_the_grid_lacks_are_refused(inputs, zero):
    config, tensors = rounded(inputs)
    Native().read(config, dict(tensors))
    tensors["bad.input.zero"] = torch.full((1, 1), float(zero))
    with pytest.raises(ModelError, match=r"bad\.input\.zero is"):
        Native().read(config, tensors)
