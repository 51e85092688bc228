"""The plug-in table: looked up by name, options checked against the dataclass's fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantforge import registry
from quantforge.errors import RecipeError
from quantforge.exporters.compressed_tensors import CompressedTensors
from quantforge.solvers.gptq import GPTQ
from quantforge.solvers.rtn import RTN


@dataclass(frozen=True)
class Example:
    """A solver with an option of every type."""

    share: float = 0.5
    count: int = 3
    flag: bool = False
    word: str = "a"

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count must be at least 0, not {self.count}; 3 is usual")


@pytest.fixture
def example(monkeypatch) -> str:
    """Enter `Example` for the length of a test; return its name."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    registry.names("solver")  # what is built in has to be there first
    assert registry.register("solver", "example")(Example) is Example
    return "example"


def test_what_is_built_in_is_there():
    assert registry.names("solver") == sorted(registry.names("solver"))
    assert registry.find("solver", "gptq") is GPTQ
    assert registry.find("solver", "rtn") is RTN
    assert registry.find("exporter", "compressed-tensors") is CompressedTensors


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_plug_in_is_a_documented_frozen_dataclass_that_can_be_made_without_options(kind):
    for name in registry.names(kind):
        cls: Any = registry.find(kind, name)
        assert cls.__dataclass_params__.frozen, name
        assert cls.__doc__, name
        assert not cls.__doc__.startswith(f"{cls.__name__}("), name  # what dataclass writes if there is none
        made = registry.create(kind, name)
        assert registry.options(kind, name).keys() == {f.name for f in fields(cls)}
        for option, (_, default) in registry.options(kind, name).items():
            assert getattr(made, option) == default
            assert option in cls.__doc__, f"{name}: {option} is not documented"


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(RecipeError, match=r"no solver is called 'gtpq': did you mean 'gptq'\?"):
        registry.find("solver", "gtpq")
    with pytest.raises(RecipeError, match="compressed-tensors"):
        registry.create("exporter", "compressed_tensors")


def test_an_unknown_kind_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="exporter"):
        registry.register("sorcerer", "x")(Example)


def test_options_in_order_with_types_and_defaults(example):
    assert registry.options("solver", example) == {
        "share": ("float", 0.5), "count": ("int", 3), "flag": ("bool", False), "word": ("str", "a"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), ("on", True), ("True", True), ("TRUE", True), ("no", False), ("off", False), ("false", False)],
)
def test_words_for_truth(example, text, value):
    assert registry.create("solver", example, {"flag": text}).flag is value


@given(share=st.floats(allow_nan=False), count=st.integers(min_value=0), word=st.text(), flag=st.booleans())
def test_options_given_as_text_are_those_given_as_values(share, count, word, flag):
    with pytest.MonkeyPatch.context() as patch:
        registry.names("solver")
        patch.setattr(registry, "_TABLE", {("solver", "example"): Example})
        given_as_values = {"share": share, "count": count, "word": word, "flag": flag}
        as_text = {"share": repr(share), "count": str(count), "word": word, "flag": str(flag)}
        made = registry.create("solver", "example", as_text)
        assert made == registry.create("solver", "example", given_as_values) == Example(share, count, flag, word)
        assert type(made.count) is int


def test_a_whole_number_will_do_for_a_fraction(example):
    made = registry.create("solver", example, {"share": 1})
    assert made.share == 1.0
    assert type(made.share) is float


@pytest.mark.parametrize(
    ("option", "value"),
    [("share", "abc"), ("share", True), ("share", None), ("count", "1.5"), ("count", 1.0), ("count", True),
     ("flag", "perhaps"), ("flag", 1), ("word", 3), ("share", [0.5])],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_with_the_option_and_the_type(example, option, value):
    with pytest.raises(RecipeError, match=rf"solver\.{option} must be of type \w+, not ") as caught:
        registry.create("solver", example, {option: value})
    assert repr(value) in str(caught.value)


def test_an_unknown_option_gives_the_nearest_and_all(example):
    with pytest.raises(RecipeError, match=r"did you mean 'count'\? it has: share, count, flag, word") as caught:
        registry.create("solver", example, {"cuont": 1})
    assert caught.value.number == 202


def test_a_value_out_of_range_is_refused_in_the_words_of_the_plug_in(example):
    with pytest.raises(RecipeError, match="solver 'example': count must be at least 0, not -1; 3 is usual"):
        registry.create("solver", example, {"count": -1})


def test_entry_points_of_other_packages_are_imported_once(monkeypatch):
    loaded = []

    class Point:
        def load(self) -> None:
            loaded.append(registry.register("solver", "foreign")(Example))

    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()] if group == "quantforge.plugins" else [])
    registry._load.cache_clear()
    try:
        assert "foreign" in registry.names("solver")
        assert registry.find("solver", "foreign") is Example
        assert loaded == [Example]
    finally:
        registry._load.cache_clear()
