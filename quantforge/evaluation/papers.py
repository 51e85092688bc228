"""The perplexities that papers publish, by which protocol, and the commands that measure them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantforge.errors import DataError, pick
from quantforge.resources import data_dir, read_mapping

SAMPLES, CALIBRATION = 128, "c4"  # what nearly all of the papers calibrate on
FLOAT = "fp"
_FILE = "papers/perplexity.yaml"
_TABLE = ("paper", "table", "data", "seq_len", "group_size", "symmetric", "settings", "note", "models")


@dataclass(frozen=True)
class Figure:
    """The published perplexity of one method at one width."""

    method: str
    bits: int
    perplexity: float


@dataclass(frozen=True)
class Row:
    """One model of one table.

    table             the table by its subject, and where it stands if not in the paper
    model             id on the hub
    data              the set of evaluation text; how its text is joined stands in eval/
    seq_len           tokens of a window, of which none overlap: the stride is as long
    float_perplexity  of the float model
    group_size,
    symmetric,
    settings          how the quantized models were made, as options of `quantforge compare`
    note              what differs from the paper
    """

    name: str
    paper: str
    table: str
    model: str
    data: str
    seq_len: int
    float_perplexity: float
    figures: tuple[Figure, ...]
    group_size: int | None = None
    symmetric: bool | None = None
    settings: tuple[tuple[str, str], ...] = ()
    note: str = ""

    @property
    def methods(self) -> list[str]:
        """Return the methods, the float model first."""
        return [FLOAT, *dict.fromkeys(figure.method for figure in self.figures)]

    @property
    def widths(self) -> list[int]:
        """Return the widths in bits, as the table has them."""
        return list(dict.fromkeys(figure.bits for figure in self.figures))


def rows() -> dict[str, Row]:
    """Return every row by its name, in the order of the file; DataError if the file is not what it should be."""
    found: dict[str, Row] = {}
    for name, table in read_mapping(data_dir("eval") / _FILE).items():
        for key in table:
            if key not in _TABLE:
                raise DataError(470, f"{_FILE}: {name} has an unknown key {key!r}; known: {', '.join(_TABLE)}.")
        for short, values in table["models"].items():
            row = _row(f"{name}-{short}", table, values)
            found[row.name] = row
    return found


def find(name: str) -> Row:
    """Return the row of that name; RecipeError with the nearest one if there is none."""
    found = rows()
    return found[pick("row", name, found)]


def protocol(row: Row) -> str:
    """Say in words what its figures are measured on, by the definition of the set."""
    spec = read_mapping(data_dir("eval") / f"{row.data}.yaml")
    files = f" ({spec['file']})" if "file" in spec else ""
    taken = f"the first {spec['documents']} documents" if "documents" in spec else "all documents"
    most = f", the first {spec['windows']}" if "windows" in spec else ", all of them"
    return (
        f"{spec['repository']}{files}, split {spec['split']}, {taken} joined by {spec['join']!r}; windows of "
        f"{row.seq_len} tokens, {row.seq_len} apart{most}"
    )


def arguments(row: Row) -> dict[str, Any]:
    """Return what `quantforge.compare` takes to measure the row again, by name, the model apart."""
    return {
        "methods": row.methods,
        "bits": row.widths,
        "group_size": row.group_size,
        "symmetric": row.symmetric,
        "calibration": CALIBRATION,
        "samples": SAMPLES,
        "seq_len": row.seq_len,
        "shuffle": True,
        "data": row.data,
        "windows": None,
        "settings": dict(row.settings),
    }


def commands(row: Row) -> dict[str, list[str]]:
    """Return the command lines that measure the row again: all of it, the float model, and each quantized model."""
    shared = _options(row)
    calibrated = ["--calib", CALIBRATION, "--samples", str(SAMPLES), "--seq-len", str(row.seq_len), "--shuffle"]
    scored = ["--data", row.data, "--windows", "0"]
    widths = ",".join(map(str, row.widths))
    every = ["compare", row.model, "--methods", ",".join(row.methods), "--bits", widths]
    found = {
        "all of it": [*every, *shared, *calibrated, *scored, "--out", f"report-{row.name}"],
        FLOAT: ["evaluate", row.model, *scored, "--seq-len", str(row.seq_len)],
    }
    for figure in row.figures:
        own = [setting for setting in row.settings if figure.method != "rtn"]
        made = ["quantize", row.model, "--method", figure.method, "--bits", str(figure.bits)]
        out = f"{row.name}-{figure.method}-{figure.bits}"
        chain = [*made, *_options(row, own), *calibrated, "--out", out]
        found[f"{figure.method} {figure.bits}"] = chain
    return {name: ["quantforge", *words] for name, words in found.items()}


def line(command: list[str]) -> str:
    """Return a command as it is typed."""
    return shlex.join(command)


def _options(row: Row, settings: Any = None) -> list[str]:
    found = [] if row.group_size is None else ["--group-size", str(row.group_size)]
    if row.symmetric is not None:
        found.append("--symmetric" if row.symmetric else "--asymmetric")
    for key, value in row.settings if settings is None else settings:
        found += ["--set", f"{key}={value}"]
    return found


def _row(name: str, table: Mapping[str, Any], values: Mapping[str, Any]) -> Row:
    figures = []
    for key, value in values.items():
        method, _, bits = key.partition(" ")
        if key not in ("model", FLOAT):
            if not bits.isdecimal() or type(value) not in (int, float):
                raise DataError(470, f"{_FILE}: {name} has {key!r}: {value!r}; a figure is 'method bits': number.")
            figures.append(Figure(method, int(bits), float(value)))
    settings = tuple((key, str(value).lower()) for key, value in table.get("settings", {}).items())
    return Row(
        name,
        table["paper"],
        table["table"],
        values["model"],
        table["data"],
        table["seq_len"],
        float(values[FLOAT]),
        tuple(figures),
        table.get("group_size"),
        table.get("symmetric"),
        settings,
        table.get("note", ""),
    )
