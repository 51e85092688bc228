"""The text that quantforge calibrates on and evaluates with, and its token windows.

A set's name or a file becomes a `Text`; a `Text` and a tokenizer become `Windows`, with their provenance.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quantforge.calibrate import hub, python_docs
from quantforge.calibrate.hub import HubText
from quantforge.calibrate.python_docs import PythonDocs
from quantforge.errors import DataError, nearest
from quantforge.resources import build, definitions, read_mapping

Part = Literal["calibration", "evaluation"]
SOURCES: dict[str, type[PythonDocs] | type[HubText]] = {"python": PythonDocs, "hub": HubText}
SELF = "self"  # in place of a calibration text: what the model itself writes
_FOLDERS = {"calibration": "calib", "evaluation": "eval"}
_SUFFIXES = (".txt", ".jsonl")
MAX_BYTES = 2**30  # of a file: its text and its tokens are held in memory as a whole
MAX_LINE = 2**26  # characters of a line of JSON
_CHUNK = 2**20
_BINARY = {
    b"\x1f\x8b": "gzip data",
    b"PK\x03\x04": "a zip archive",
    b"(\xb5/\xfd": "zstandard data",
    b"\xfd7zXZ": "xz data",
    b"PAR1": "a parquet table",
    b"ARROW1": "an arrow table",
}


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


def load_text(name: str, part: Part) -> Text:
    """Return the `part` of the set `name`, or the text of the file `name` (.txt or .jsonl), the same for either part.

    A .txt file is one text as it stands; of a .jsonl file the field "text" of all lines, joined by an empty line.
    Only sets on the hub use the network. Raises DataError for what is missing, unreadable, empty or no text.
    """
    if part not in _FOLDERS:
        raise ValueError(f"part must be one of {', '.join(_FOLDERS)}, not {part!r}")
    if name not in set_names():
        return Text(name, "file", _read(name), f"the file {Path(name).name}")
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


def load_documents(name: str, part: Part) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the documents of `name`, and where they come from, for reports.

    Of a .jsonl file the field "text" of each line that has any; every other text is one document. Errors are those of
    `load_text`.
    """
    if name not in set_names() and Path(name).suffix.lower() == ".jsonl":
        documents = tuple(text for text in _json_texts(name) if text.strip())
        _check_text(name, "".join(documents))
        digest = sha256(json.dumps(documents).encode()).hexdigest()
        return documents, {"name": name, "part": "file", "source": f"the file {Path(name).name}", "text_sha256": digest}
    text = load_text(name, part)
    return (text.text,), {"name": name, "part": text.part, "source": text.source, "text_sha256": text.sha256}


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


def _read(name: str) -> str:
    """Read a .txt or .jsonl file as text: without a byte order mark, its line ends as newlines."""
    whole = io.StringIO()
    if Path(name).suffix.lower() == ".jsonl":
        for i, text in enumerate(_json_texts(name)):
            whole.write("\n\n" * (i > 0) + text)
    else:
        for piece in _pieces(name):
            whole.write(piece)
    text = whole.getvalue()
    _check_text(name, text)
    return text


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise DataError(407, f"{name!r} is no text: it has NUL characters, the first at {text.index(chr(0))}.")
    if not text.strip():
        raise DataError(403, f"{name!r} is empty.")


def _json_texts(name: str) -> Iterator[str]:
    """Yield the field "text" of each line of a .jsonl file that is not blank, one line at a time."""
    for number, line in enumerate(_lines(name), 1):
        if line.strip():
            yield _json_text(name, number, line)


def _lines(name: str) -> Iterator[str]:
    rest: list[str] = []
    count = held = 0
    for piece in _pieces(name):
        first, *others = piece.split("\n")
        for line in others:
            yield "".join((*rest, first))
            rest, held, first = [], 0, line
            count += 1
        rest.append(first)
        held += len(first)
        if held > MAX_LINE:
            raise DataError(409, f"{name!r}, line {count + 1}, has more than {MAX_LINE:,} characters; split it.")
    yield "".join(rest)


def _pieces(name: str) -> Iterator[str]:
    """Yield a file as text piece by piece: strictly UTF-8, without a byte order mark, its line ends as newlines."""
    path = Path(name)
    decode = codecs.getincrementaldecoder("utf-8")()
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    done, begun = 0, False
    try:
        _check_path(name, path)
        if path.stat().st_size > MAX_BYTES:
            raise DataError(416, f"{name!r} has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read: cut it.")
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                if done == 0:
                    _check_start(name, data)
                waiting = len(decode.getstate()[0])
                piece = _decoded(name, decode, data, done - waiting)
                yield ends.decode(piece if begun else piece.removeprefix("\ufeff"))
                begun = begun or bool(piece)
                done += len(data)
        _decoded(name, decode, b"", done - len(decode.getstate()[0]), final=True)
        yield ends.decode("", final=True)
    except OSError as error:
        raise DataError(405, f"{name!r} cannot be read: {error.strerror}.") from error


def _decoded(name: str, decode: codecs.IncrementalDecoder, data: bytes, start: int, *, final: bool = False) -> str:
    """Decode the next bytes; `start` is where in the file those begin that are not decoded yet."""
    try:
        return decode.decode(data, final)
    except UnicodeDecodeError as error:
        position = start + error.start
        raise DataError(406, f"{name!r} is not UTF-8: bad byte at position {position}; save it as UTF-8.") from error


def _check_start(name: str, data: bytes) -> None:
    """Refuse what is compressed or a table whatever it is called, since it would only be found to be no text."""
    for start, what in _BINARY.items():
        if data.startswith(start):
            raise DataError(404, f"{name!r} is {what}, not text: unpack or export it as .txt or .jsonl.")


def _check_path(name: str, path: Path) -> None:
    """Raise DataError unless `path` is an ordinary file whose name ends as it should."""
    known = set_names()
    accepted = f"sets ({', '.join(known)}) and files that end in {' or '.join(_SUFFIXES)}"
    if path.is_dir():
        raise DataError(404, f"{name!r} is a folder; accepted are {accepted}.")
    if path.suffix.lower() not in _SUFFIXES:
        if path.exists():
            raise DataError(404, f"{name!r} ends in {path.suffix!r}; accepted are {accepted}.")
        raise DataError(401, f"no text set or file is called {name!r}: {nearest(name, known)}accepted are {accepted}.")
    if not path.exists():
        raise DataError(401, f"the file {name!r} does not exist: {nearest(path.stem, known)}accepted are {accepted}.")
    if not path.is_file():
        raise DataError(404, f"{name!r} is no ordinary file; accepted are {accepted}.")


def _json_text(name: str, number: int, line: str) -> str:
    """Return the field "text" of one line of a .jsonl file; `number` counts lines from 1."""
    where = f"{name!r}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(409, f"{where}, is not JSON: {error}.") from error
    if not isinstance(row, dict) or "text" not in row:
        has = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(409, f"{where}, has no field 'text'; it has: {has or 'nothing'}.")
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(409, f"{where}: the field 'text' must be a string, not {text!r:.80}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(409, f"{where}: character {error.start} of 'text' is half a surrogate pair.") from error
    return text
