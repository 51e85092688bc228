"""Recipes: every bundled one holds what it should, and every change to one is checked."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantforge import recipe, registry
from quantforge.errors import RecipeError
from quantforge.models.kvcache import parse_kv
from quantforge.numerics.blocks import Flat
from quantforge.numerics.grids import IntGrid, nf_grid

NAMES = recipe.names()


def test_the_baseline_and_the_default_are_there():
    assert {"gptq", "rtn"} <= set(NAMES)
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_bundled_recipe_loads_and_leaves_the_head_alone(name):
    found = recipe.load(name)
    assert found.name == name
    assert found.about
    assert "arXiv" in found.paper or re.search(r", 20\d\d$", found.paper)
    assert "lm_head" in found.skip
    assert type(found.solver) in {registry.find("solver", n) for n in registry.names("solver")}


def test_the_catalogue_is_json_and_has_every_recipe_with_the_settings_of_its_parts():
    found = json.loads(json.dumps(recipe.catalogue()))
    assert [entry["name"] for entry in found] == NAMES
    for entry in found:
        parts = recipe.load(entry["name"]).options()
        there = {f"{part}.{option}": value for part, options in parts.items() for option, value in options.items()}
        inputs = recipe.load(entry["name"]).inputs
        there |= {f"inputs.{option}": getattr(inputs, option) for option in recipe.INPUT_OPTIONS if inputs}
        assert {option: default for option, (_, default) in entry["options"].items()} == there
        for option, (_, default) in entry["options"].items():
            assert recipe.load(entry["name"], settings={option: default}) == recipe.load(entry["name"])


def test_unchanged_means_unchanged():
    assert recipe.load("gptq") == recipe.load("gptq", bits=4, group_size=64, symmetric=False, settings={})
    assert str(recipe.load("gptq").weights).startswith("int4-g64-asym")


def test_the_options_of_transforms_and_corrections_have_their_own_prefix():
    options = {entry["name"]: entry["options"] for entry in recipe.catalogue()}
    assert options["awq"]["transform.steps"] == ("int", 10)
    assert options["awq"]["solver.range"] == ("str", "hessian")
    assert options["lorc"]["correction.rank"] == ("int", 8)
    assert not any(key.startswith(("transform.", "correction.")) for key in options["gptq"])


@given(
    name=st.sampled_from([n for n in NAMES if isinstance(recipe.load(n).weights.grid, IntGrid)]),
    bits=st.integers(2, 8),
    group_size=st.one_of(st.just(-1), st.integers(1, 4096)),
    symmetric=st.booleans(),
)
def test_changes_of_the_format_do_not_touch_one_another(name, bits, group_size, symmetric):
    plain = recipe.load(name).weights
    if symmetric and plain.zero is not None:  # SpQR's and HQQ's zero points are part of them
        with pytest.raises(RecipeError, match="needs its zero points"):
            recipe.load(name, symmetric=True)
        symmetric = False
    fmt = recipe.load(name, bits=bits, group_size=group_size, symmetric=symmetric).weights
    assert fmt.grid.bits == bits
    assert fmt.block == (1, None if group_size == -1 else group_size)
    assert fmt.symmetric is symmetric
    assert (fmt.scale, fmt.zero) == (plain.scale, plain.zero)
    assert recipe.load(name, bits=bits).weights.block == plain.block
    assert recipe.load(name, group_size=group_size).weights.grid == plain.grid


def test_tables_keep_their_family_and_have_no_zero_points():
    assert recipe.load("nf4", bits=3).weights.grid == nf_grid(3)
    assert recipe.load("nf4", group_size=128).weights.block == Flat(128)
    assert recipe.load("nf4", group_size=-1).weights.block == (1, None)
    assert recipe.load("nf4", symmetric=True) == recipe.load("nf4")
    with pytest.raises(RecipeError, match="nf4 has no zero points; leave --asymmetric out"):
        recipe.load("nf4", symmetric=False)
    assert recipe.load("fp4", bits=4) == recipe.load("fp4")
    with pytest.raises(RecipeError, match="fp4 has 4 bits, not 3"):
        recipe.load("fp4", bits=3)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 7.5, 4.0, True, "4"])
def test_bits_other_than_2_to_8_are_refused(bits):
    with pytest.raises(RecipeError, match="2 to 8") as caught:
        recipe.load("gptq", bits=bits)
    assert repr(bits) in str(caught.value)


@pytest.mark.parametrize("size", [0, -2, -64, 64.0, True, "64"])
def test_group_sizes_that_are_none_are_refused(size):
    with pytest.raises(RecipeError, match="at least 1, or -1") as caught:
        recipe.load("gptq", group_size=size)
    assert repr(size) in str(caught.value)


def test_settings_change_the_options_that_they_name():
    plain, changed = recipe.load("gptq"), recipe.load("gptq", settings={"solver.damp_percent": "0.05"})
    assert changed.solver.damp_percent == 0.05
    assert changed.solver.act_order == plain.solver.act_order
    assert changed.weights == plain.weights


def test_a_method_keeps_its_own_solver_so_that_its_name_and_paper_stay_true():
    with pytest.raises(RecipeError, match="no setting 'solver'"):
        recipe.load("gptq", settings={"solver": "rtn"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"solver.damp_percnt": 1}, "did you mean 'damp_percent'"),
        ({"solvr.damp_percent": 1}, "did you mean 'solver.damp_percent'"),
        ({"damp_percent": 1}, "did you mean 'solver.damp_percent'"),
        ({"solver.": 1}, "no setting 'solver.'"),
        ({"": 1}, "no setting ''"),
        ({"solver.damp_percent": "abc"}, "float, not 'abc'"),
        ({"solver.damp_percent": 2}, "between 0 and 1, not 2"),
        ({"solver.damp_percent": "inf"}, "between 0 and 1, not inf"),
        ({"solver.block_size": 0}, "at least 1, not 0"),
        ({"solver.range": "nearest"}, "'nearest'"),
        ({"weights": "int4"}, "there are: solver"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_do_not_exist_are_refused(settings, says):
    with pytest.raises(RecipeError) as caught:
        recipe.load("gptq", settings=settings)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["gtpq", "", "../rtn", "RTN", "rtn.yaml", "rtn\0"])
def test_unknown_methods_are_refused_and_never_used_as_a_path(name):
    with pytest.raises(RecipeError, match="no method is called"):
        recipe.load(name)


@pytest.mark.parametrize(
    ("name", "solver", "transforms", "corrections", "weights"),
    [
        ("awq+gptq", "gptq", ["awq"], [], "int4-g64-asym"),
        ("gptq+awq", "gptq", ["awq"], [], "int4-g64-asym"),
        ("gptq+lorc", "gptq", [], ["lorc"], "int4-g64-asym"),
        ("lorc+gptq", "gptq", [], ["lorc"], "int4-g64-asym"),
        ("rtn+lorc", "rtn", [], ["lorc"], "int4-g64-asym"),
        ("awq+gptq+lorc", "gptq", ["awq"], ["lorc"], "int4-g64-asym"),
        ("nf4+gptq", "gptq", [], [], "nf4-f64-dq"),
        ("awq+rtn", "rtn", ["awq"], [], "int4-g64-asym"),
    ],
)
def test_joined_methods_fill_each_slot_from_the_one_that_has_something_of_its_own(
    name, solver, transforms, corrections, weights
):
    found = recipe.load(name)
    assert found.name == name
    assert type(found.solver) is registry.find("solver", solver)
    assert [type(t) for t in found.transforms] == [registry.find("transform", t) for t in transforms]
    assert [type(c) for c in found.corrections] == [registry.find("correction", c) for c in corrections]
    assert found.label == f"{name}-{weights}"
    for part in name.split("+"):
        assert recipe.load(part).paper in found.paper
    assert set(found.needs) == {need for p in (found.solver, *found.transforms, *found.corrections) for need in p.needs}


def test_a_joined_method_keeps_the_options_of_its_parts_and_takes_settings_for_each():
    assert recipe.load("awq+rtn").solver.range == "hessian"
    settings = {"solver.damp_percent": "0.02", "transform.steps": "5", "correction.rank": "3"}
    found = recipe.load("awq+gptq+lorc", bits=3, settings=settings)
    assert (found.solver.damp_percent, found.transforms[0].steps, found.corrections[0].rank) == (0.02, 5, 3)
    assert found.weights.grid.bits == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gptq+spqr", "each say how codes are chosen"),
        ("gptaq+gptq", "each say how codes are chosen"),
        ("nf4+fp4", "each say how weights are stored"),
        ("awq+gtpq", "did you mean 'gptq'?"),
        ("lorcc+gptq", "did you mean 'lorc'?"),
        ("gptq+", "no method is called ''"),
        ("+", "no method is called ''"),
        ("gptq + awq", "no method is called 'gptq '"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(name, says):
    with pytest.raises(RecipeError) as caught:
        recipe.load(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_recipes_with_the_users_own_changes_as_their_defaults():
    found = recipe.load(
        "gptq", bits=3, overrides={"a": {"group_size": 32}, "b": {"method": "rtn"}, "c": {"skip": True}}
    )
    (_, a), (_, b), (_, c) = found.overrides
    assert [pattern for pattern, _ in found.overrides] == ["a", "b", "c"]
    assert a == recipe.load("gptq", bits=3, group_size=32)
    assert b == recipe.load("rtn", bits=3)
    assert c is None
    assert recipe.load("rtn", overrides={"a": {"method": "gptq"}}).needs == ("hessian",)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"bit": 8}, "did you mean 'bits'?"),
        ({"groupsize": 8}, "did you mean 'group_size'?"),
        ({"": True}, "has no ''"),
        ({"bits": 9}, "2 to 8, not 9"),
        ({"bits": True}, "2 to 8, not True"),
        ({"bits": "many"}, "2 to 8, not 'many'"),
        ({"group_size": 0}, "at least 1, or -1"),
        ({"method": "gtpq"}, "did you mean 'gptq'?"),
        ({"method": "nf4", "symmetric": False}, "nf4 has no zero points"),
    ],
    ids=str,
)
def test_overrides_that_cannot_be_are_refused(wish, says):
    with pytest.raises(RecipeError) as caught:
        recipe.load("gptq", overrides={"q_proj": wish})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe.suites())
def test_every_row_of_a_suite_is_a_recipe_of_its_own(name):
    rows = recipe.suite(name)
    labels = [row.label for row in rows]
    assert len(labels) == len(set(labels)) > 1
    for row in rows:
        if row.cache is not None:
            assert str(parse_kv(row.cache)) == str(parse_kv(str(parse_kv(row.cache))))
            continue
        assert row.recipe().name == row.method
        assert row.bits is None or row.recipe().weights.grid.bits == row.bits
