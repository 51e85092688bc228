"""What strangers write is read by parsers that refuse in one line whatever they are fed, and never do anything else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.errors import DataError, QuantForgeError
from quantforge.resources import MAX_ALIASES, MAX_YAML, parse_mapping, read_mapping

ROOT = Path(__file__).parents[1]
NAMES = ("header", "index", "recipe", "tasks")


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """Return tools/fuzz.py, whose parts lie beside it."""
    if not (ROOT / "tools" / "fuzz.py").exists():
        pytest.skip("the tool stands in the source tree")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import fuzz  # type: ignore[import-not-found]

        yield fuzz
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module", params=NAMES)
def target(request: pytest.FixtureRequest, fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the name of a target, and what feeds it."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    folder.mkdir()
    return request.param, fuzz.TARGETS[request.param](folder)


def fed(check: Callable[[bytes], object], raw: bytes) -> bool:
    """Tell whether `raw` is accepted; every refusal is one line that a terminal can show."""
    try:
        check(raw)
    except QuantForgeError as error:
        said = str(error)
    else:
        return True
    assert said.isprintable()
    return False


def test_the_first_thousand_inputs_bring_nothing_unexpected(fuzz: ModuleType, tmp_path: Path) -> None:
    for name in NAMES:
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        found = fuzz.fuzz(name, 0, 300 if name == "tasks" else 1000, folder)
        assert found["unexpected"] == []
        assert name == "tasks" or found["came"]["accepted"] > 0
        assert len(found["came"]) >= 5  # and the inputs reach more than the first check


def test_what_is_unexpected_slow_or_huge_is_counted_and_kept(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(folder: Path) -> Callable[[bytes], object]:
        def check(raw: bytes) -> object:
            if fuzz.mutated("header", 7) == raw:
                raise ZeroDivisionError
            while fuzz.mutated("header", 8) == raw:
                pass
            return bytearray(2**40) if fuzz.mutated("header", 9) == raw else None

        return check

    monkeypatch.setitem(fuzz.TARGETS, "header", fragile)
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    found = fuzz.fuzz("header", 0, 20, tmp_path)
    assert [(u["number"], u["error"].partition(":")[0]) for u in found["unexpected"]] == [
        (7, "ZeroDivisionError"),
        (8, "SlowError"),
        (9, "MemoryError"),
    ]
    assert found["came"] == {"accepted": 17}


def test_a_run_that_was_stopped_goes_on_where_it_was(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "CHUNK", 40)
    out = tmp_path / "fuzz.json"

    def run(inputs: int) -> dict[str, Any]:
        command = ["fuzz.py", "--targets", "header", "--inputs", str(inputs), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            fuzz.main()
        assert ended.value.code == 0
        found: dict[str, Any] = json.loads(out.read_text())["targets"]["header"]
        return found

    run(60)
    assert run(60)["inputs"] == {"mutate": 60}
    at_once, out = run(130), tmp_path / "other.json"
    assert run(130)["came"] == at_once["came"]


@given(st.binary(max_size=300))
@settings(max_examples=150)
def test_bytes_of_any_kind(target: tuple[str, Callable[[bytes], object]], raw: bytes) -> None:
    fed(target[1], raw)


names = st.sampled_from(["a", "b", "c", "../3", "\ud800", "__proto__"]) | st.text(max_size=6)
files = st.sampled_from(["1.safetensors", "2.safetensors", "../3.safetensors", "/1.safetensors", "1.bin"]) | names
leaf = st.none() | st.booleans() | st.integers() | st.floats() | files
anything = st.recursive(leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(names, x, max_size=3), max_leaves=8)


@given(
    st.dictionaries(names, files | anything, max_size=4), st.dictionaries(names, anything, max_size=2), st.booleans()
)
@settings(max_examples=150)
def test_indexes_of_any_shape(
    target: tuple[str, Callable[[bytes], object]], places: dict[str, Any], more: dict[str, Any], named: bool
) -> None:
    name, check = target
    if name == "index":
        accepted = fed(check, json.dumps({**more, "weight_map": places} if named else more).encode())
        sound = {"a": "1.safetensors", "b": "2.safetensors"}
        assert accepted == (named and bool(places) and places.items() <= sound.items())


NOTATION = "int4 e4m3 nf4 mxfp4 -g64 -asym -channel -token -dq rtn gptq + * : = , skip bits 8 -1"
notation = st.sampled_from(NOTATION.split())
words = st.lists(notation | st.text(max_size=4), max_size=6).map("".join)
lines = st.tuples(st.sampled_from(["settings", "overrides", "weights", "inputs", "bits", "group_size"]), words)


@given(st.sampled_from(["gptq", "rtn", "awq+gptq", "llm-int8"]) | words, st.lists(lines, max_size=4))
@settings(max_examples=150)
def test_recipes_of_any_words(
    target: tuple[str, Callable[[bytes], object]], method: str, changes: list[tuple[str, str]]
) -> None:
    name, check = target
    if name == "recipe":
        text = "\n".join([method, *(f"{key} {value}" for key, value in changes)])
        fed(check, text.encode("utf-8", "surrogatepass"))


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
YAMLS = {
    "code": ("a: !!python/object/apply:os.system ['touch ran']\n", "could not determine a constructor", 1),
    "another tag": ("a: 1\nb: !function x.y\n", "could not determine a constructor", 2),
    "laughs": (BOMB, f"more than {MAX_ALIASES} aliases", 8),
    "a key twice": ("task: a\nother: 1\ntask: b\n", "the key 'task' twice", 3),
    "a key twice inside": ("a:\n  b: 1\n  b: 2\n", "the key 'b' twice", 3),
    "no date": ("a: 2001-99-99\n", "month must be in 1..12", None),
    "no number": ("a: !!int x\n", "invalid literal", None),
    "a number of 10,000 digits": ("a: " + "9" * 10_000 + "\n", "digits", None),
    "deep": ("a: " + "[" * 20_000, "nested too deeply", None),
    "deep by lines": ("".join(" " * i + "a:\n" for i in range(500)), "nested too deeply", None),
    "two documents": ("a: 1\n---\nb: 2\n", "but found another document", 2),
    "a list": ("- a\n", "must hold one mapping", None),
    "keys that are no text": ("1: a\n", "must hold one mapping", None),
    "half a surrogate pair": ('a: "\\ud800"\n', "", None),
    "control characters": ("a: \x07\n", "special characters are not allowed", None),
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_of_strangers_is_refused_with_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, says, line = YAMLS[name]
    if not says:  # what YAML allows, and a terminal is never shown
        assert parse_mapping(text.encode(), "x.yaml") == yaml.safe_load(text)
        return
    with pytest.raises(DataError) as caught:
        parse_mapping(text.encode(), "x.yaml")
    assert str(caught.value).isprintable()
    assert "x.yaml" in str(caught.value)
    assert says in str(caught.value)
    assert line is None or f"line {line}, column" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_few_aliases_are_what_they_stand_for() -> None:
    assert parse_mapping(b"a: &x {b: 1}\nc: *x\nd:\n  <<: *x\n  e: 2\n", "x.yaml") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }


def test_a_yaml_file_must_be_small_and_a_file(tmp_path: Path) -> None:
    import os

    large, pipe = tmp_path / "large.yaml", tmp_path / "pipe.yaml"
    large.write_bytes(b"a: 1\n" + b"#" * MAX_YAML)
    os.mkfifo(pipe)
    for path in (large, pipe, tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(DataError, match=f"{path.name} (must be an ordinary file|cannot be read)"):
            read_mapping(path)
