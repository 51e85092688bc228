"""`quantforge formats`: values, cost and error of every format, against figures worked out elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import json
import math

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.cli import main
from quantforge.errors import RecipeError
from quantforge.numerics import catalogue, formats, grids


def run(*args):
    result = CliRunner().invoke(main, ["formats", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def listing():
    return json.loads(run("--json").stdout)


@pytest.fixture(scope="module")
def stored(listing):
    return {row["notation"]: row for entry in listing for row in entry["stored"]}


def error(name):
    rows = catalogue.measure(catalogue.find(name)).stored
    return {row.notation: row.error for row in rows}


@pytest.mark.parametrize(
    ("name", "notation", "figure"),
    [
        ("table:" + ",".join(map(str, range(-7, 8))), "custom-g64-sym-bf16", 0.01155),
        ("int4", "int4-g64-sym-bf16", 0.01055),
        ("int4", "int4-g64-asym-bf16", 0.00828),
        ("nf4", "nf4-g64-sym-bf16", 0.00846),
        ("e2m1", "e2m1-g64-sym-bf16", 0.01118),
        ("fp4", "fp4-g64-sym-bf16", 0.01489),
        ("e2m1", "e2m1-g128-sym-bf16", 0.01186),
    ],
)
def test_the_errors_on_normal_data_are_the_known_ones(name, notation, figure):
    assert error(name)[notation] == pytest.approx(figure, rel=0.005)


@pytest.mark.parametrize("bits", [6, 8])
def test_the_error_of_many_bits_is_that_of_uniform_noise(bits):
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).view(-1, 64)
    step = 2 * x.abs().amax(1) / (2**bits - 1)
    # of 64 errors one is that of the largest number, which lies half a step off
    expected = float((step**2).mean() * (63 / 64 / 12 + 1 / 64 / 4))
    assert error(f"int{bits}-g64-sym-fp32") == {f"int{bits}-g64-sym-fp32": pytest.approx(expected, rel=0.005)}


@pytest.mark.parametrize(("name", "mantissa"), [("fp32", 24), ("fp16", 11), ("bf16", 8)])
def test_float_types_have_no_scale_and_err_by_their_mantissa(name, mantissa):
    (entry,) = json.loads(run(name, "--json").stdout)
    (row,) = entry["stored"]
    assert row["bits_per_weight"] == entry["bits"] == {"fp32": 32}.get(name, 16)
    assert 4**-mantissa / 12 < row["error"] < 4**-mantissa  # between 1/3 of the square of half the least relative step
    assert entry["high"] == -entry["low"] == torch.finfo(getattr(torch, {"fp32": "float32", "fp16": "float16",
                                                                         "bf16": "bfloat16"}[name])).max  # fmt: skip


def test_the_listing_has_every_grid_and_every_named_format_once(listing, stored):
    assert [entry["name"] for entry in listing] == catalogue.names()
    notations = [row["notation"] for entry in listing for row in entry["stored"]]
    assert len(notations) == len(set(notations))
    assert set(formats.NAMED) <= set(notations)
    for kind in ("sym", "asym"):
        assert {f"int{b}-g{n}-{kind}-bf16" for b in range(2, 9) for n in (32, 64, 128)} <= set(notations)


def test_every_row_of_the_listing_can_be_asked_for_by_its_notation(stored):
    for notation in (
        "int3-g32-asym-bf16",
        "nf4-dq",
        "spqr3-g16",
        "hqq3-g64",
        "dynamic8-f256-sym",
        "e5m2-g128-sym-bf16",
    ):
        (row,) = json.loads(run(notation, "--json").stdout)[0]["stored"]
        assert (row["bits_per_weight"], row["error"]) == (
            stored[notation]["bits_per_weight"],
            stored[notation]["error"],
        )


def test_values_are_those_of_the_grid_and_the_step_is_the_smallest(listing):
    for entry in listing:
        if entry["values"] is None:
            continue
        grid = grids.find(entry["name"])
        values = entry["values"]
        assert values == list(grid.values) == sorted(values)
        assert (entry["low"], entry["high"], entry["bits"]) == (values[0], values[-1], grid.bits)
        apart = sorted(set(values))
        assert entry["step"] == min(b - a for a, b in itertools.pairwise(apart)) > 0


def test_more_bits_and_smaller_groups_err_less_and_cost_more(stored):
    for kind in ("sym", "asym"):
        for size in (32, 64, 128):
            rows = [stored[f"int{bits}-g{size}-{kind}-bf16"] for bits in range(2, 9)]
            assert [r["error"] for r in rows] == sorted((r["error"] for r in rows), reverse=True)
        for bits in range(2, 9):
            rows = [stored[f"int{bits}-g{size}-{kind}-bf16"] for size in (32, 64, 128)]
            assert [r["error"] for r in rows] == sorted(r["error"] for r in rows)
            zero = bits if kind == "asym" else 0
            assert [r["bits_per_weight"] for r in rows] == [bits + (16 + zero) / size for size in (32, 64, 128)]


def test_the_text_shows_all_values_of_few_and_the_ends_of_many():
    text = run("int4", "int8", "table:1,-1,0.5,0").stdout
    assert "int4: 16 values from -8 to 7, smallest step 1\n  -8 -7 -6 -5 -4 -3 -2 -1 0 1 2 3 4 5 6 7\n" in text
    assert "  -128 -127 -126 -125 … 124 125 126 127\n" in text
    assert "4 values from -1 to 1, smallest step 0.5\n  -1 0 0.5 1\n" in text
    assert "int4-g64-asym-bf16            4.312 bits/weight" in text


@pytest.mark.parametrize("notation", ["int4-g96-asym-fp32", "int4-f100", "int8-channel", "int8-tensor-sym", "int2-g1",
                                      "int4-g1048576"])  # fmt: skip
def test_blocks_of_any_size_that_there_are_numbers_for_can_be_measured(notation):
    (row,) = catalogue.measure(catalogue.find(notation)).stored
    assert 0 <= row.error < 1
    assert math.isfinite(row.bits_per_weight)


def test_names_are_read_in_any_case_and_a_dtype_that_is_named_is_kept():
    assert catalogue.measure(catalogue.find("BF16")) == catalogue.measure(catalogue.find("bf16"))
    assert catalogue.find("INT4-G64-ASYM").formats[0][0] == "int4-g64-asym-bf16"
    assert catalogue.find("int4-g64-asym-fp16").formats[0][0] == "int4-g64-asym-fp16"
    assert catalogue.find("int4-g64-asym-fp32").formats[0][0] == "int4-g64-asym-fp32"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nf44", ["QF-201", "'nf44'", "did you mean 'nf4'?", "int4"]),
        ("", ["QF-201", "''"]),
        ("e9m9", ["QF-201", "'e9m9'"]),
        ("int4-g64-asmy", ["QF-218", "'int4-g64-asmy'", "did you mean 'int4-g64-asym'?"]),
        ("nf4-g64-asym", ["QF-218", "only integer grids", "did you mean 'nf4-g64-sym'?"]),
        ("int4-g0", ["QF-218", "'int4-g0'"]),
        ("int4-g2097152", ["QF-219", "2097152", "1048576"]),
        ("int4-f99999999999", ["QF-219", "99999999999"]),
        ("table:", ["QF-218", "table:-1,0,0.5,1"]),
        ("table:-1,a", ["QF-218", "'a'"]),
        ("table:0,1", ["QF-218", "of either sign"]),
        ("table:-1,nan,1", ["QF-218", "2 to 256 numbers"]),
        ("table:-1,inf", ["QF-218", "2 to 256 numbers"]),
        ("table:-1e-40,1e-40", ["QF-218", "1e-30"]),
        ("table:-1e300,1", ["QF-218", "1e30"]),
        ("table:" + ",".join(map(str, range(-200, 200))), ["QF-218", "2 to 256"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_no_format_is_one_line_before_any_work(name, says, monkeypatch):
    monkeypatch.setattr(catalogue, "measure", lambda *a: pytest.fail("work was done"))
    result = run("int4", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in says), result.stderr


@settings(max_examples=10)
@given(
    values=st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True),
    power=st.integers(-20, 20),
)
def test_a_table_errs_the_same_whatever_its_unit(values, power):
    both = [*values, *(-v for v in values)]
    plain, scaled = (
        catalogue.measure(catalogue.find("table:" + ",".join(str(v * 2.0**p) for v in both))) for p in (0, power)
    )
    for a, b in zip(plain.stored, scaled.stored, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-6)


@given(st.one_of(st.text(max_size=12), st.text("intfe0123456789-gasymb:,.table", max_size=20)))
def test_any_other_text_is_read_or_refused(text):
    with contextlib.suppress(RecipeError):
        wanted = catalogue.find(text)
        assert wanted.grid is not None or wanted.name in catalogue.FLOATS
