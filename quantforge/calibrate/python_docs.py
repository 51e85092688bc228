"""The language reference that every CPython carries, as two texts that share no run of 50 characters.

It needs no network and no download. The text belongs to the Python that runs, so figures on it compare only within one
Python version.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from hashlib import sha256

from quantforge.errors import DataError

RUN = 50
CALIBRATION_SHARE = 0.6


@dataclass(frozen=True)
class PythonDocs:
    """A definition with `source: python`: one part of the language reference."""

    about: str
    licence: str


def load(part: str) -> tuple[str, str]:
    """Return (text of the part "calibration" or "evaluation", one line on its source); DataError if Python lacks it."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            408, "this Python comes without its language reference (pydoc_data): give a .txt or .jsonl file instead."
        ) from error
    calibration, evaluation = split(topics)
    source = f"language reference of {platform.python_implementation()} {platform.python_version()}"
    return (calibration if part == "calibration" else evaluation), source


def split(topics: dict[str, str]) -> tuple[str, str]:
    """Split {topic: text} into a calibration and an evaluation text that share no run of 50 characters.

    Whole topics go to one side or the other, in the order of a hash of their names, so that both sides see all kinds of
    text; 60 % of it goes to calibration. Depends on nothing but `topics`.
    """
    unique = _paragraphs(topics)
    calibration: list[str] = []
    evaluation: list[str] = []
    sizes = [0, 0]
    for name in sorted(unique, key=lambda name: sha256(name.encode()).digest()):
        side = int(sizes[0] * (1 - CALIBRATION_SHARE) > sizes[1] * CALIBRATION_SHARE)
        (calibration, evaluation)[side].extend(unique[name])
        sizes[side] += sum(map(len, unique[name]))
    text = "\n\n".join(calibration)
    return text, _without_runs_of(text, evaluation)


def _paragraphs(topics: dict[str, str]) -> dict[str, list[str]]:
    """Return {topic: its paragraphs}, each paragraph once; the shortest topic that has it keeps it.

    Long topics repeat short ones whole: this order breaks them up and leaves the short ones in one piece.
    """
    seen: set[str] = set()
    unique: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        unique[name] = []
        for block in topics[name].split("\n\n"):
            words = " ".join(block.split())
            if words and words not in seen:
                seen.add(words)
                unique[name].append(block.strip("\n").rstrip())
    return unique


def _without_runs_of(text: str, paragraphs: list[str]) -> str:
    """Join the `paragraphs` that, once joined, share no run of 50 characters with `text`."""
    runs = {text[i : i + RUN] for i in range(len(text) - RUN + 1)}
    joined = ""
    for paragraph in paragraphs:
        # runs may reach from one paragraph into the next, so that each is looked at together with the end of the last
        end = joined[1 - RUN :] + "\n\n" + paragraph if joined else paragraph
        if not any(end[i : i + RUN] in runs for i in range(len(end) - RUN + 1)):
            joined = joined + "\n\n" + paragraph if joined else paragraph
    return joined
