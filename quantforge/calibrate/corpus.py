"""The text that quantforge calibrates on and evaluates with, and its token windows.

A set's name or a file becomes a `Text`; a `Text` and a tokenizer become `Windows`, with their provenance.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quantforge.calibrate import hub, python_docs, text_files
from quantforge.calibrate.hub import HubText
from quantforge.calibrate.python_docs import PythonDocs
from quantforge.calibrate.text_files import STRICT, Reading
from quantforge.errors import DataError, nearest
from quantforge.resources import build, definitions, read_mapping

Part = Literal["calibration", "evaluation"]
SOURCES: dict[str, type[PythonDocs] | type[HubText]] = {"python": PythonDocs, "hub": HubText}
SELF = "self"  # in place of a calibration text: what the model itself writes
_FOLDERS = {"calibration": "calib", "evaluation": "eval"}
_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Text:
    """One text and where it comes from.

    name         the set's name, or the path as it was given
    part         "calibration" or "evaluation"; "file" for a file, which has no parts
    source       one line for people
    max_windows  how many windows the set's protocol scores at most; None is all
    """

    name: str
    part: str
    text: str
    source: str
    max_windows: int | None = None

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the text in UTF-8, in hexadecimal."""
        return sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Token windows of one text.

    ids         [count, seq_len] int64
    provenance  what they are and how to get them again; goes into reports as JSON
    """

    ids: Tensor
    provenance: dict[str, Any]


def set_names() -> list[str]:
    """Return the names of all sets, sorted."""
    return sorted({name for folder in _FOLDERS.values() for name in definitions(folder)})


def check_name(name: str, part: Part) -> None:
    """Raise DataError unless `name` is a set that has `part`, or a file that can be text; nothing is read.

    For calibration it may be `SELF` too.
    """
    if name == SELF and part == "calibration":
        return
    if name in set_names():
        _definition(name, part)
    else:
        _check_path(name, Path(name))


def load_text(name: str, part: Part, reading: Reading = STRICT) -> Text:
    """Return the `part` of the set `name`, or the text of the file `name` (.txt or .jsonl), the same for either part.

    A .txt file is one text as it stands; of a .jsonl file the field "text" of all lines, joined by an empty line; both
    as `reading` says. Only sets on the hub use the network. Raises DataError for what is missing, unreadable, empty or
    no text.
    """
    if part not in _FOLDERS:
        raise ValueError(f"part must be one of {', '.join(_FOLDERS)}, not {part!r}")
    if name not in set_names():
        _check_path(name, Path(name))
        return Text(name, "file", *text_files.read(name, reading))
    spec = _definition(name, part)
    limit = None
    if isinstance(spec, HubText):
        text, source = hub.load(name, spec, _offline_names(part))
        limit = spec.windows
    else:
        text, source = python_docs.load(part)
    if not text.strip():
        raise DataError(403, f"the {part} part of {name!r} is empty.")
    return Text(name, part, text, source, limit)


def load_documents(name: str, part: Part, reading: Reading = STRICT) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the documents of `name`, and where they come from, for reports.

    Of a .jsonl file the field "text" of each line that has any; every other text is one document. Errors are those of
    `load_text`.
    """
    if name not in set_names() and text_files.is_json(name):
        _check_path(name, Path(name))
        documents, source = text_files.read_documents(name, reading)
        digest = sha256(json.dumps(documents).encode()).hexdigest()
        return documents, {"name": name, "part": "file", "source": source, "text_sha256": digest}
    text = load_text(name, part, reading)
    return (text.text,), {"name": name, "part": text.part, "source": text.source, "text_sha256": text.sha256}


def memory(text: Text) -> int:
    """Return the bytes that it takes, about, to tokenize a text: as a whole, for what a token is depends on its place.

    Some 160 a character of English were seen for a byte-level BPE of 49,152 tokens, 210 where each is a token.
    """
    return 200 * len(text.text)


def windows(
    text: Text, tokenizer: Any, seq_len: int, count: int | None = None, *, shuffle: bool = False, seed: int = 0
) -> Windows:
    """Tokenize `text` once, whole, and cut it into windows of `seq_len` tokens that do not overlap → [count, seq_len].

    The tokenizer adds whatever special tokens it adds by default to one text. Window k is tokens [k·seq_len,
    (k+1)·seq_len); the tail is dropped. Without `count` all windows, or as many as the set's protocol scores.
    `shuffle` draws the windows at random without repetition, by a generator of its own seeded with `seed`, and keeps
    the order drawn. Raises DataError if the text is shorter than one window or has fewer windows than asked.
    """
    for what, value in (("seq_len", seq_len), ("the number of windows", count)):
        if value is not None and value < 1:
            raise DataError(432, f"{what} must be at least 1, not {value}.")
    tokens = torch.tensor(tokenizer(text.text, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(tokens) // seq_len
    if available == 0:
        raise DataError(430, f"{text.name!r} has {len(tokens)} tokens, one window needs {seq_len}: use a longer text.")
    if count is None:
        count = min(available, text.max_windows or available)
    if count > available:
        raise DataError(
            431, f"{text.name!r} has {available} windows of {seq_len} tokens, {count} were asked for: ask for fewer."
        )
    order = torch.arange(available)
    if shuffle:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    ids = tokens[: available * seq_len].view(available, seq_len)[order[:count]]
    provenance = {
        "name": text.name,
        "part": text.part,
        "source": text.source,
        "text_sha256": text.sha256,
        "ids_sha256": sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        "tokens": len(tokens),
        "seq_len": seq_len,
        "count": count,
        "shuffle": shuffle,
        "seed": seed,
    }
    return Windows(ids, provenance)


def _definition(name: str, part: Part) -> PythonDocs | HubText:
    """Read the definition of one part of a set; DataError if the set lacks that part or the file is wrong."""
    files = definitions(_FOLDERS[part])
    if name not in files:
        raise DataError(402, f"the set {name!r} has no {part} part; these have one: {', '.join(files)}.")
    values = read_mapping(files[name])
    where = f"{_FOLDERS[part]}/{name}.yaml"
    source = values.pop("source", None)
    if not isinstance(source, str) or source not in SOURCES:
        raise DataError(425, f"{where}: source must be one of {', '.join(SOURCES)}, not {source!r}.")
    return build(SOURCES[source], values, where)


def _offline_names(part: Part) -> list[str]:
    return [name for name in definitions(_FOLDERS[part]) if isinstance(_definition(name, part), PythonDocs)]


def _check_path(name: str, path: Path) -> None:
    """Raise DataError unless `path` is an ordinary file whose name ends as it should."""
    known = set_names()
    accepted = f"sets ({', '.join(known)}) and files that end in {' or '.join(_SUFFIXES)}"
    try:
        if path.is_dir():
            raise DataError(404, f"{name!r} is a folder; accepted are {accepted}.")
        if path.suffix.lower() not in _SUFFIXES:
            if path.exists():
                raise DataError(404, f"{name!r} ends in {path.suffix!r}; accepted are {accepted}.")
            near = nearest(name, known)
            raise DataError(401, f"no text set or file is called {name!r}: {near}accepted are {accepted}.")
        if not path.exists():
            near = nearest(path.stem, known)
            raise DataError(401, f"the file {name!r} does not exist: {near}accepted are {accepted}.")
        if not path.is_file():
            raise DataError(404, f"{name!r} is no ordinary file; accepted are {accepted}.")
    except OSError as error:
        raise DataError(405, f"{name!r} cannot be read: {error.strerror}.") from error
