"""The parsers that tools/fuzz.py feeds: each takes bytes, and may refuse them by a QuantForgeError only."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_inputs import frame

Check = Callable[[bytes], object]


def header_target(folder: Path) -> Check:
    """Return what reads bytes as a safetensors file; what is accepted must tile the file to its end."""
    from quantforge.models.headers import read_header

    file = folder / "model.safetensors"
    handle = os.open(file, os.O_RDWR | os.O_CREAT)

    def check(raw: bytes) -> object:
        # most inputs are only a header: a wrong length would hide the rest of it from the parser
        content = raw[1:] if raw[:1] == b"\0" else frame(raw[1:], raw[0] if raw else 0)
        os.pwrite(handle, content, 0)
        os.ftruncate(handle, len(content))
        found = read_header(file)
        assert sum(info.stop - info.start for info in found.values()) == len(content) - min(
            (info.start for info in found.values()), default=len(content)
        )
        return found

    return check


def index_target(folder: Path) -> Check:
    """Return what reads bytes as the index of two shards; no file but these may be opened."""
    from quantforge.models import folder as reading

    for name, tensor in (("1", b"a"), ("2", b"b")):
        entry = b'{"%s": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}' % tensor
        (folder / f"{name}.safetensors").write_bytes(frame(entry, 1))
    (folder.parent / "3.safetensors").write_bytes(frame(b"{}"))
    handle = os.open(folder / reading.INDEX, os.O_RDWR | os.O_CREAT)
    own = {folder / "1.safetensors", folder / "2.safetensors"}

    def check(raw: bytes) -> object:
        os.pwrite(handle, raw, 0)
        os.ftruncate(handle, len(raw))
        found = reading._tensors(folder)
        assert {info.file for info in found.values()} <= own
        return found

    return check


def recipe_target(folder: Path) -> Check:
    """Return what reads each line as one of the texts in which a method and its changes are given."""
    from quantforge import recipe
    from quantforge.cli.options import parse_overrides, parse_settings

    def check(raw: bytes) -> object:
        method, *lines = raw.decode("utf-8", "surrogateescape").split("\n")
        said: dict[str, Any] = {"settings": [], "overrides": []}
        for line in lines:
            key, _, value = line.partition(" ")
            if key in ("settings", "overrides"):
                said[key].append(value)
            elif key in ("bits", "group_size"):
                said[key] = int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else value
            elif key == "symmetric":
                said[key] = value == "yes"
            elif key in ("weights", "inputs"):
                said[key] = value
        said["settings"] = parse_settings(tuple(said["settings"]))
        said["overrides"] = parse_overrides(tuple(said["overrides"]))
        return recipe.load(method, **said)

    return check


def tasks_target(folder: Path) -> Check:
    """Return what reads bytes as a task file, with one item beside it."""
    from quantforge.evaluation import tasks

    (folder / "items.jsonl").write_text('{"question": "What?", "answers": ["a", "b"], "label": 1}\n')
    file = folder / "mine.yaml"

    def check(raw: bytes) -> object:
        file.write_bytes(raw)
        found = tasks.read_folder(folder)
        return [tasks.config(task) for task in found.tasks.values()]

    return check


TARGETS: dict[str, Callable[[Path], Check]] = {
    "header": header_target,
    "index": index_target,
    "recipe": recipe_target,
    "tasks": tasks_target,
}
