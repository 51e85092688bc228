"""Definitions: where they are found, and that a wrong one is refused with the key and what would work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from quantforge import resources
from quantforge.errors import DataError, ResourceError


@dataclass(frozen=True)
class Example:
    """A definition to test with."""

    about: str
    split: str
    documents: int | None = None

    def __post_init__(self) -> None:
        """Refuse what the types allow and the meaning does not."""
        if self.documents == 0:
            raise ValueError("documents must be at least 1, not 0")


def pretend_at(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(resources, "__file__", str(package / "resources.py"))


def test_every_kind_has_definitions_and_a_readme() -> None:
    for kind in resources.KINDS:
        assert resources.definitions(kind)
        assert (resources.data_dir(kind) / "README.md").is_file()


def test_the_installed_copy_goes_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_at(tmp_path / "quantforge", monkeypatch)
    (tmp_path / "calib").mkdir()
    assert resources.data_dir("calib") == tmp_path / "calib"
    (tmp_path / "quantforge/data/calib").mkdir(parents=True)
    assert resources.data_dir("calib") == tmp_path / "quantforge/data/calib"


def test_a_missing_folder_and_an_unknown_kind_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_at(tmp_path / "quantforge", monkeypatch)
    with pytest.raises(ResourceError, match=r"'eval'.*install"):
        resources.data_dir("eval")
    with pytest.raises(ValueError, match="calib, eval"):
        resources.data_dir("../secrets")


def test_definitions_are_the_yaml_files_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_at(tmp_path / "quantforge", monkeypatch)
    (tmp_path / "calib").mkdir()
    for name in ("b.yaml", "a.yaml", "README.md", "c.yml"):
        (tmp_path / "calib" / name).write_text("about: x")
    assert list(resources.definitions("calib").items()) == [
        ("a", tmp_path / "calib/a.yaml"),
        ("b", tmp_path / "calib/b.yaml"),
    ]


@pytest.mark.parametrize(
    "content", ["", "- a\n- b", "1: a", "a: [", "a: !!python/object/apply:os.getcwd []", "a: \x00", b"\xff\xfe"]
)
def test_what_is_no_mapping_with_text_keys_is_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"odd\.yaml") as error:
        resources.read_mapping(path)
    assert "\n" not in str(error.value)


def test_a_mapping_becomes_a_definition(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text('about: "\\n\\n"\nsplit: train\n')
    assert resources.build(Example, resources.read_mapping(path), path.name) == Example("\n\n", "train", None)
    assert resources.build(Example, {"about": "x", "split": "y", "documents": 3}, "f").documents == 3
    assert resources.build(Example, {"about": "x", "split": "y", "documents": None}, "f").documents is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"about": "x", "spilt": "train"}, "f.yaml has an unknown key 'spilt': did you mean 'split'?"),
        ({"about": "x"}, "f.yaml lacks the key 'split'"),
        ({"about": "x", "split": 3}, "split must be of type str, not 3"),
        ({"about": "x", "split": None}, "split must be of type str, not None"),
        ({"about": "x", "split": "y", "documents": "9"}, "documents must be of type int, not '9'"),
        ({"about": "x", "split": "y", "documents": True}, "documents must be of type int, not True"),
        ({"about": "x", "split": "y", "documents": 0}, "f.yaml: documents must be at least 1"),
    ],
)
def test_wrong_keys_and_types_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as error:
        resources.build(Example, values, "f.yaml")
    assert message in str(error.value)
