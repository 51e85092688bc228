"""The lines of a journal, a commit each with number and checksum: what they name, and what the last still needs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any


def make(seq: int, facts: Mapping[str, Any]) -> bytes:
    """Return the line of commit number `seq`, counted from 0."""
    text = json.dumps({"seq": seq, "facts": facts}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read(data: bytes) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Return the lines and the facts of the commits in `data`, up to the first that is damaged."""
    lines: list[bytes] = []
    commits: list[dict[str, Any]] = []
    for line in data.splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        try:
            sound = line.endswith(b"\n") and int(checksum, 16) == zlib.crc32(text[:-1])
            read = json.loads(text) if sound else {}
        except (ValueError, RecursionError):
            break
        if not sound or read.get("seq") != len(lines):
            break
        lines.append(line)
        commits.append(read["facts"])
    return lines, commits


def state(commits: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Return the objects that the last of `commits` still needs, and those that it dropped."""
    needed: set[str] = set()
    dropped: set[str] = set()
    for facts in commits:
        dropped = set(facts.get("drop", ()))
        needed = (needed - dropped) | named(facts)
    return needed, dropped


def named(facts: Mapping[str, Any]) -> set[str]:
    """Return the names of objects in `facts`, at any depth, save those under "drop"."""
    found: set[str] = set()
    for key, value in facts.items():
        if key.endswith(("object", "objects")):
            found |= set(_texts(value))
        elif key != "drop":
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                found |= named(inner) if isinstance(inner, Mapping) else set()
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
