"""Recipes: every bundled one holds what it should, and every change to one is checked."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantforge import recipe, registry
from quantforge.errors import RecipeError

NAMES = recipe.names()


def test_the_baseline_and_the_default_are_there():
    assert {"gptq", "rtn"} <= set(NAMES)
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_bundled_recipe_loads_and_leaves_the_head_alone(name):
    found = recipe.load(name)
    assert found.name == name
    assert found.about
    assert "arXiv" in found.paper
    assert "lm_head" in found.skip
    assert type(found.solver) in {registry.find("solver", n) for n in registry.names("solver")}


def test_the_catalogue_is_json_and_has_every_recipe_with_the_defaults_of_its_solver():
    found = json.loads(json.dumps(recipe.catalogue()))
    assert [entry["name"] for entry in found] == NAMES
    for entry in found:
        solver = recipe.load(entry["name"]).solver
        for option, (_, default) in entry["options"].items():
            assert getattr(solver, option) == default


def test_unchanged_means_unchanged():
    assert recipe.load("gptq") == recipe.load("gptq", bits=4, group_size=64, symmetric=False, settings={})
    assert str(recipe.load("gptq").weights).startswith("int4-g64-asym")


@given(
    name=st.sampled_from(NAMES),
    bits=st.integers(2, 8),
    group_size=st.one_of(st.just(-1), st.integers(1, 4096)),
    symmetric=st.booleans(),
)
def test_changes_of_the_format_do_not_touch_one_another(name, bits, group_size, symmetric):
    fmt = recipe.load(name, bits=bits, group_size=group_size, symmetric=symmetric).weights
    assert fmt.grid.bits == bits
    assert fmt.block == (1, None if group_size == -1 else group_size)
    assert fmt.symmetric is symmetric
    assert recipe.load(name, bits=bits).weights.block == recipe.load(name).weights.block
    assert recipe.load(name, group_size=group_size).weights.grid == recipe.load(name).weights.grid


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
