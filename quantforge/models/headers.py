"""Safetensors headers and JSON files of strangers: read strictly, in bounded memory, every fault a ModelError.

A safetensors file is a length (8 bytes, little endian), a JSON header of that length, and the tensors' bytes, which
must be tiled without hole or overlap to the very end. This reader refuses all that breaks the format, and duplicate
keys as well, of which other readers silently take the last.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge.errors import ModelError

MAX_HEADER = 100_000_000
MAX_ITEMS = 2_000_000
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file.

    dtype        the name that safetensors gives it, such as "BF16"
    start, stop  where its bytes are, counted from the beginning of the file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def show(name: object) -> str:
    """Quote a name from a file that may be hostile: control characters escaped, at most 80 characters (a Path: 300)."""
    most = 300 if isinstance(name, Path) else 80
    name = str(name) if isinstance(name, Path) else name
    text = repr(name) if str(name).isprintable() else ascii(name)
    return text if len(text) <= most else f"{text[: most - 20]}…{text[-12:]}"


def some(items: Iterable[str], most: int = 5) -> str:
    """Join the first `most` of `items` by commas and count the rest."""
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def damaged(number: int, message: str) -> ModelError:
    """Return the error for a file whose content is wrong: nothing helps but another copy."""
    return ModelError(number, f"{message}; download the file again.")


def open_error(file: Path, error: OSError | ValueError) -> ModelError:
    """Return the error for a file that the system does not let us read."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ModelError(301, f"cannot read {show(file.name)} in {show(file.parent)}: {why}.")


def file_size(file: Path) -> int:
    """Return the size of a regular file in bytes; ModelError if it is a folder, pipe or device, or cannot be read."""
    try:
        info = os.stat(file)
    except (OSError, ValueError) as error:
        raise open_error(file, error) from error
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(
            302, f"{show(file.name)} is not a regular file (a folder, pipe or device?): put the real file there."
        )
    return info.st_size


def read_json(file: Path, limit: int) -> dict[str, Any]:
    """Read a JSON file of at most `limit` bytes that holds one object; ModelError otherwise."""
    size = file_size(file)
    if size > limit:
        raise damaged(303, f"{show(file.name)} has {size:,} bytes, more than the {limit:,} allowed")
    try:
        with file.open("rb") as stream:
            raw = stream.read(limit)
    except OSError as error:
        raise open_error(file, error) from error
    if raw.startswith(b"version https://git-lfs"):
        raise _pointer(file)
    return parse_object(raw, file)


def parse_object(raw: bytes, file: Path) -> dict[str, Any]:
    """Parse UTF-8 JSON that must be one object without duplicate keys; ModelError naming `file` otherwise."""
    if sum(raw.count(c) for c in (b",", b"[", b"{")) > MAX_ITEMS:
        raise ModelError(
            304, f"{show(file.name)} lists more than {MAX_ITEMS:,} values: split the model into more shards."
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise damaged(305, f"{show(file.name)} has the key {show(twice)} twice")
        return table

    def constant(name: str) -> float:
        if name == "NaN":  # infinity is in use: limits of a state-space model's time steps
            raise damaged(306, f"{show(file.name)} has the value NaN, which is no JSON")
        return float(name)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise damaged(306, f"{show(file.name)}: the JSON is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise damaged(306, f"{show(file.name)}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise damaged(306, f"{show(file.name)} is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(value, dict):
        raise damaged(306, f"{show(file.name)}: the JSON is not an object {{…}}")
    return value


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file → {name: TensorInfo} in the order of their bytes.

    Reads the header only, never more than 100 MB. Whatever is wrong is a ModelError that names file and tensor.
    """
    size = file_size(file)
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            rest = stream.read(120) if head == b"version " else b""
            if rest.startswith(b"https://git-lfs"):
                raise _pointer(file)
            length = _header_length(file, head, size)
            raw = stream.read(length)
    except OSError as error:
        raise open_error(file, error) from error
    if len(raw) < length:
        raise damaged(307, f"{show(file.name)} ended while its header was read")
    if not raw.startswith(b"{"):
        raise damaged(306, f"{show(file.name)}: the header does not begin with '{{', so it is no safetensors file")
    entries = parse_object(raw, file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(308, f"{show(file.name)}: __metadata__ must map text to text")
    infos = [_entry(file, name, entry, 8 + length, size) for name, entry in entries.items()]
    return _tiled(file, infos, 8 + length, size)


def _pointer(file: Path) -> ModelError:
    return ModelError(
        309, f"{show(file.name)} is a git-LFS pointer, not the file itself: run git lfs pull in the folder."
    )


def _header_length(file: Path, head: bytes, size: int) -> int:
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length == 0:
        raise damaged(307, f"{show(file.name)} ({size:,} bytes) has no header")
    if length > size - 8 or length > MAX_HEADER:
        bound = f"the format allows {MAX_HEADER:,}" if length > MAX_HEADER else f"the file has {size:,}"
        raise damaged(
            307, f"{show(file.name)} claims a header of {length:,} bytes but {bound}: truncated or no safetensors"
        )
    return length


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(file: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    def wrong(text: str) -> ModelError:
        return damaged(308, f"{show(file.name)}: tensor {show(name)} {text}")

    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        raise wrong("has a name that is not Unicode text")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise wrong(f"has the unknown dtype {show(dtype)} (known are {', '.join(BITS)})")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise wrong(f"has the shape {show(shape)}, which is not a list of whole numbers ≥ 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise wrong(f"has the data_offsets {show(offsets)}, which are not two whole numbers ≥ 0")
    start, stop = offsets
    count = _elements(shape)
    if count >= 2**63:
        raise wrong(f"has the shape {show(shape)}, of more than 2^63 elements")
    bits = BITS[dtype] * count
    if bits % 8 or stop - start != bits // 8:
        raise wrong(f"of {dtype} {show(shape)} needs {bits / 8:,g} bytes but holds {stop - start:,}")
    if base + stop > size:
        ends = f"{show(name)} ends at {base + stop:,}"
        raise damaged(307, f"{show(file.name)} is truncated: it has {size:,} bytes and {ends}")
    return TensorInfo(name, dtype, tuple(shape), file, base + start, base + stop)


def _elements(shape: list[int]) -> int:
    """Multiply the sizes, stopping at 2^63 though a 0 may follow, so that a list of a million sizes costs little."""
    count = 1
    for n in shape:
        count *= n or 1
        if count >= 2**63:
            return count
    return 0 if 0 in shape else count


def _tiled(file: Path, infos: list[TensorInfo], base: int, size: int) -> dict[str, TensorInfo]:
    infos.sort(key=lambda info: (info.start, info.stop))
    end = base
    for info in infos:
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise damaged(308, f"{show(file.name)}: tensor {show(info.name)} {what} (byte {info.start:,}, not {end:,})")
        end = info.stop
    if end != size:
        raise damaged(
            307,
            f"{show(file.name)} has {size:,} bytes but its tensors end at {end:,}; what follows is not part of a model",
        )
    return {info.name: info for info in infos}
