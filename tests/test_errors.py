"""Errors: one line, whatever is in them; an exit code per class; the nearest name."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantforge import errors
from quantforge.errors import (
    DataError,
    IdentityError,
    LockedError,
    ModelError,
    PlanError,
    QuantForgeError,
    RecipeError,
    ResourceError,
    Stopped,
    nearest,
    pick,
)

RANGES = {
    RecipeError: range(200, 250),
    PlanError: range(250, 300),
    ModelError: range(300, 400),
    DataError: range(400, 500),
    ResourceError: range(500, 600),
    IdentityError: range(600, 610),
    LockedError: range(610, 620),
    Stopped: range(620, 630),
}
SOURCE = Path(inspect.getfile(errors)).parent


def test_each_class_has_its_exit_code():
    codes = {cls.__name__: cls.exit_code for cls in QuantForgeError.__subclasses__()}
    assert codes == {
        "RecipeError": 2,
        "PlanError": 2,
        "ModelError": 3,
        "DataError": 4,
        "ResourceError": 5,
        "IdentityError": 6,
        "LockedError": 7,
        "Stopped": 75,
    }


def test_every_number_in_the_source_lies_in_the_range_of_its_class():
    """Found in the source, so that a new error with a number of another class's range is noticed."""
    known = {cls.__name__: numbers for cls, numbers in RANGES.items()}
    known |= {"damaged": RANGES[ModelError], "Finding": RANGES[ModelError]}
    seen = 0
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known):
                continue
            at = 1 if node.func.id == "Finding" else 0
            if at == len(node.args):  # a note
                continue
            number = node.args[at]
            if getattr(number, "id", getattr(number, "attr", "")) == "number":  # passed on, by `damaged` or a finding
                continue
            assert isinstance(number, ast.Constant), f"{file.name}:{node.lineno} has no plain number"
            assert number.value in known[node.func.id], f"{file.name}:{node.lineno}"
            seen += 1
    assert seen > 50


@given(st.text(), st.sampled_from(sorted(RANGES, key=lambda cls: cls.__name__)))
def test_whatever_the_message_holds_it_is_one_printable_line(message, cls):
    line = str(cls(RANGES[cls].start, message))
    assert line.startswith(f"error[QF-{RANGES[cls].start}]: ")
    assert line.isprintable()


def test_control_characters_are_spelled_out_and_line_breaks_are_spaces():
    assert str(ModelError(300, "a\x1b[31mb\nc\td\u202e")) == "error[QF-300]: a\\x1b[31mb c d\\u202e"


def test_the_number_and_the_bare_message_stay_at_hand():
    error = DataError(403, "'x' is empty.")
    assert (error.number, error.args) == (403, ("'x' is empty.",))


@pytest.mark.parametrize(
    ("name", "hint"), [("gtpq", "did you mean 'gptq'? "), ("rtm", "did you mean 'rtn'? "), ("zebra", ""), ("", "")]
)
def test_nearest(name, hint):
    assert nearest(name, ["gptq", "rtn"]) == hint


def test_pick_returns_what_is_known_and_lists_all_otherwise():
    assert pick("method", "rtn", iter(["gptq", "rtn"])) == "rtn"
    with pytest.raises(RecipeError) as caught:
        pick("method", "gtpq", iter(["gptq", "rtn"]))
    assert str(caught.value) == (
        "error[QF-201]: no method is called 'gtpq': did you mean 'gptq'? there are: gptq, rtn."
    )
    with pytest.raises(RecipeError, match="there are: none"):
        pick("method", "gptq", [])
