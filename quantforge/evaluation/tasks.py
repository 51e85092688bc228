"""Task files of lm-eval that lie in a folder: read as data, never run, their items checked line by line.

A task file is YAML as lm-eval has it. Here it may not call Python (`!function`), its items are JSON lines in the same
folder, and what it says of them is checked before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge import resources
from quantforge.errors import DataError, nearest

_RUNS_CODE = ("class", "custom_dataset", "process_docs", "process_results")
_KINDS = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class TaskFile:
    """One task: its name, the file, and its configuration for lm-eval without the items.

    items  rows of the test split, in order
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    items: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Folder:
    """The tasks and groups of one folder by name; a group names tasks."""

    tasks: Mapping[str, TaskFile]
    groups: Mapping[str, tuple[str, ...]]

    def find(self, name: str) -> tuple[TaskFile, ...]:
        """Return the tasks that `name`, a task or a group, stands for; none if it is neither."""
        if name in self.groups:
            return tuple(task for part in self.groups[name] for task in self.find(part))
        return (self.tasks[name],) if name in self.tasks else ()


def own_folder() -> Path:
    """Return the folder of the tasks that come with quantforge."""
    return resources.data_dir("eval") / "tasks"


def read_folder(folder: Path) -> Folder:
    """Read every .yaml file of `folder`; DataError for one that is no task, or that would run code."""
    if not folder.is_dir():
        raise DataError(450, f"there is no folder of tasks {str(folder)!r}.")
    tasks: dict[str, TaskFile] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.glob("*.yaml")):
        raw = resources.read_mapping(path)
        name = raw.get("group", raw.get("task"))
        if not isinstance(name, str):
            raise DataError(451, f"{path.name} names no task and no group; it needs `task:` and a name.")
        if name in tasks or name in groups:
            raise DataError(451, f"{path.name} is a second file for {name!r}.")
        if "group" in raw:
            groups[name] = _members(path, raw)
        else:
            tasks[name] = _task(path, name, raw)
    if not tasks:
        raise DataError(450, f"the folder {str(folder)!r} holds no task files (*.yaml).")
    for name, parts in groups.items():
        for part in parts:
            if part not in tasks:
                raise DataError(
                    452, f"group {name!r} names {part!r}: {nearest(part, tasks)}there are: {', '.join(tasks)}."
                )
    return Folder(tasks, groups)


def _members(path: Path, raw: Mapping[str, Any]) -> tuple[str, ...]:
    members = raw.get("task")
    if not isinstance(members, list) or not all(isinstance(part, str) for part in members):
        raise DataError(452, f"{path.name}: `task` of a group must be a list of names, not {members!r}.")
    return tuple(members)


def _task(path: Path, name: str, raw: dict[str, Any]) -> TaskFile:
    for key in _RUNS_CODE:
        if key in raw:
            raise DataError(453, f"{path.name} asks for code by {key!r}, and task files are read as data only.")
    kind = raw.get("output_type")
    if kind not in _KINDS:
        raise DataError(454, f"{path.name}: output_type {kind!r} is not measured here; {' and '.join(_KINDS)} are.")
    split = raw.get("test_split")
    files = (raw.get("dataset_kwargs") or {}).get("data_files")
    file = files.get(split) if isinstance(files, dict) else files
    if raw.get("dataset_path") != "json" or not isinstance(file, str):
        raise DataError(455, f"{path.name} must have dataset_path json, and data_files with a file for its test_split.")
    items = tuple(_items(path, file))
    rest = {k: v for k, v in raw.items() if k not in ("dataset_path", "dataset_kwargs", "dataset_name")}
    return TaskFile(name, path, rest, items)


def _items(path: Path, name: str) -> Iterable[dict[str, Any]]:
    file = (path.parent / name).resolve()
    if file.parent != path.parent.resolve():
        raise DataError(456, f"{path.name} names {name!r}, which lies outside of its folder.")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(456, f"{path.name} names {name!r}, which cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
        except ValueError as error:
            raise DataError(457, f"{name}, line {number}, is no JSON: {error}.") from error
        if not isinstance(item, dict):
            raise DataError(457, f"{name}, line {number}, must be an object, not {type(item).__name__}.")
        yield item
    if not lines:
        raise DataError(457, f"{name} holds no items.")
