"""Text files of users: read piece by piece, strictly unless asked otherwise, refused with the place of the fault."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from encodings.aliases import aliases
from pathlib import Path

from quantforge.errors import DataError, RecipeError, nearest

MAX_BYTES = 2**30  # of a file: its text and its tokens are held in memory as a whole
MAX_LINE = 2**26  # characters of a line of JSON
ERRORS = ("strict", "replace")
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
class Reading:
    """How text files are read; it does not concern sets by name.

    encoding   as Python calls it
    errors     "strict": bytes that the encoding does not have are refused; "replace": they become U+FFFD
    bad_lines  how many lines of a .jsonl file may be left out since they hold no text

    Raises RecipeError for an encoding that does not exist, with the nearest one, and for other impossible values.
    """

    encoding: str = "utf-8"
    errors: str = "strict"
    bad_lines: int = 0

    def __post_init__(self) -> None:
        try:
            known = codecs.lookup(self.encoding).incrementaldecoder is not None
            b"a".decode(self.encoding, "replace")  # which refuses what decodes to no text, such as base64
        except UnicodeError:
            known = True
        except (LookupError, ValueError):
            known = False
        if not known:
            near = nearest(self.encoding, [name.replace("_", "-") for name in (*aliases, *aliases.values())])
            raise RecipeError(227, f"no encoding is called {self.encoding!r}: {near}utf-8 and cp1252 are two of them.")
        if self.errors not in ERRORS:
            raise RecipeError(227, f"errors in text are one of {', '.join(ERRORS)}, not {self.errors!r}.")
        if self.bad_lines < 0:
            raise RecipeError(227, f"bad lines must be at least 0, not {self.bad_lines}.")


STRICT = Reading()


def read(name: str, how: Reading = STRICT) -> tuple[str, str]:
    """Return the text of a .txt or .jsonl file, and one line on its source.

    Of a .txt file it is all there is, without a byte order mark and with line ends as newlines; of a .jsonl file the
    field "text" of all lines, joined by an empty line. Raises DataError for what is unreadable, empty or no text.
    """
    whole = io.StringIO()
    bad: list[int] = []
    if is_json(name):
        for i, text in enumerate(_json_texts(name, how, bad)):
            whole.write("\n\n" * (i > 0) + text)
    else:
        for piece in _pieces(name, how):
            whole.write(piece)
    text = whole.getvalue()
    _check_text(name, text)
    return text, _source(name, how, bad)


def read_documents(name: str, how: Reading = STRICT) -> tuple[tuple[str, ...], str]:
    """Return the field "text" of each line of a .jsonl file that has any, and one line on its source."""
    bad: list[int] = []
    documents = tuple(text for text in _json_texts(name, how, bad) if text.strip())
    _check_text(name, "".join(documents))
    return documents, _source(name, how, bad)


def is_json(name: str) -> bool:
    """Tell whether each line of the file is to be a JSON object."""
    return Path(name).suffix.lower() == ".jsonl"


def _source(name: str, how: Reading, bad: list[int]) -> str:
    said = [f"the file {Path(name).name}"]
    said += [f"in {how.encoding}"] if how.encoding != STRICT.encoding else []
    said += ["with bad bytes replaced"] if how.errors != STRICT.errors else []
    said += [f"but for {len(bad)} lines without text, the first of them line {bad[0]}"] if bad else []
    return ", ".join(said)


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise DataError(407, f"{name!r} is no text: it has NUL characters, the first at {text.index(chr(0))}.")
    if not text.strip():
        raise DataError(403, f"{name!r} is empty.")


def _json_texts(name: str, how: Reading, bad: list[int]) -> Iterator[str]:
    """Yield the field "text" of each line that is not blank, one line at a time; `bad` gets the lines left out."""
    for number, line in enumerate(_lines(name, how), 1):
        if not line.strip():
            continue
        try:
            text = _json_text(name, number, line)
        except DataError as error:
            bad.append(number)
            if len(bad) > how.bad_lines:
                hint = f"--bad-lines N leaves out N such lines; this is number {len(bad)}."
                raise DataError(409, f"{error.args[0]} {hint}") from error
            continue
        yield text


def _lines(name: str, how: Reading = STRICT) -> Iterator[str]:
    rest: list[str] = []
    count = held = 0
    for piece in _pieces(name, how):
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


def _pieces(name: str, how: Reading = STRICT) -> Iterator[str]:
    """Yield a file as text piece by piece, without a byte order mark, its line ends as newlines."""
    path = Path(name)
    decode = codecs.getincrementaldecoder(how.encoding)(how.errors)
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    done, begun = 0, False
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(416, f"{name!r} has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read: cut it.")
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                if done == 0:
                    _check_start(name, data)
                waiting = len(decode.getstate()[0])
                piece = _decoded(name, how, decode, data, done - waiting)
                yield ends.decode(piece if begun else piece.removeprefix("\ufeff"))
                begun = begun or bool(piece)
                done += len(data)
        piece = _decoded(name, how, decode, b"", done - len(decode.getstate()[0]), final=True)
        yield ends.decode(piece, final=True)
    except OSError as error:
        raise DataError(405, f"{name!r} cannot be read: {error.strerror}.") from error


def _decoded(
    name: str, how: Reading, decode: codecs.IncrementalDecoder, data: bytes, start: int, *, final: bool = False
) -> str:
    """Decode the next bytes; `start` is where in the file those begin that are not decoded yet."""
    try:
        text = decode.decode(data, final)
        text.encode()  # some encodings can say half a surrogate pair
    except UnicodeError as error:
        position = start + getattr(error, "start", 0)
        raise DataError(
            406,
            f"{name!r} is not {how.encoding.upper()}: bad byte at position {position}; --encoding says what it is, and "
            "--errors replace passes over bad bytes.",
        ) from error
    return text


def _check_start(name: str, data: bytes) -> None:
    """Refuse what is compressed or a table whatever it is called, since it would only be found to be no text."""
    for start, what in _BINARY.items():
        if data.startswith(start):
            raise DataError(404, f"{name!r} is {what}, not text: unpack or export it as .txt or .jsonl.")


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
