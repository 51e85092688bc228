"""The record of a comparison: what the report's files are made from, and its JSON with a versioned schema.

Every name in it is untrusted text: whatever prints it must escape it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from reprlib import repr as short
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from quantforge.errors import DataError, nearest

SCHEMA = 2
READABLE = (1, 2)
PACKAGES = (
    *("quantforge", "torch", "transformers", "compressed-tensors", "safetensors", "gguf", "numpy"),
    *("lm_eval", "datasets"),
)
UNIONS = (UnionType, Union)

Note = bool | int | float | str | None


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer.

    kind           the last part of the name that repeats over depth: "q_proj", "down_proj"
    block          how deep it lies, from 0; None outside the repeated blocks
    loss           tr(ΔW H ΔWᵀ), the squared error of the layer's outputs over the calibration tokens
    relative_loss  loss / tr(W H Wᵀ), the share of the layer's output energy
    notes          facts about the solve, such as {"damp": 0.01, "dead_columns": 0}
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, int]
    format: str
    bits_per_weight: float
    loss: float
    relative_loss: float
    notes: dict[str, Note]


@dataclass(frozen=True)
class TaskRow:
    """What a run scored on one task.

    shots    examples before each item
    answers  "1" for each item answered right and "0" for each other one, in the order of the task's items
    chance   the share of right answers that guessing gives; NaN where there is none, as for open completions
    items    digest of the items and their order: only equal ones can be paired
    metrics  the harness's other figures by name
    """

    task: str
    shots: int
    answers: str
    chance: float
    items: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class DivergenceRow:
    """How the predictions over the evaluation text differ from the float model's.

    median, p99   of the KL of each token, nats: lower bounds from the most probable tokens that the reference keeps
    agreement     share of the predictions whose most probable token is the same
    lost, gained  next tokens that only the float model, or only this one, finds most probable
    dense, bound  mean KL over the first few windows, from whole distributions and as its lower bound
    """

    tokens: int
    median: float
    p99: float
    agreement: float
    lost: int
    gained: int
    dense: float
    bound: float


@dataclass(frozen=True)
class Histogram:
    """How the values of a layer's weights or inputs are spread, before and after.

    what    "weights" or "inputs"
    edge    bins of equal width from −edge to edge; values beyond lie in the outermost
    before  share of the values in each bin, in the float model
    after   the same as the quantized layer computes with
    """

    layer: str
    what: str
    edge: float
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class Origin:
    """One comparison that a report's runs are of, and what somebody needs to repeat it; dictionaries hold JSON values.

    model_notes  what there is to say about the model's files
    fingerprint  digest of the model's files
    """

    model: str
    model_notes: tuple[str, ...]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    created: str
    fingerprint: str = ""


@dataclass(frozen=True)
class Run:
    """One method at one width. NaN stands for what was not measured, and is all that is kept of an infinity.

    bits              of a code; None for the float model
    bits_per_weight   over the quantized layers, all that is stored counted
    kl                mean KL divergence from the float model, nats per token; a lower bound, see `divergence`
    seconds           of quantizing
    peak_memory_bytes above the loaded model
    disk_note         what there is to say about the size, such as why the model was not saved
    notes             warnings worth reading
    origin            place of its comparison in the report's origins
    losses, kls       of each window: mean cross-entropy and mean KL, nats per token
    tokens_per_second of the evaluation: whole windows at once, by the arithmetic that the figures are measured with
    """

    label: str
    method: str
    bits: int | None
    bits_per_weight: float
    perplexity: float
    kl: float
    seconds: float
    peak_memory_bytes: int | None
    bytes_on_disk: int | None
    disk_note: str
    options: dict[str, Any]
    layers: tuple[LayerRow, ...]
    notes: tuple[str, ...]
    origin: int = 0
    losses: tuple[float, ...] = ()
    kls: tuple[float, ...] = ()
    divergence: DivergenceRow | None = None
    tasks: tuple[TaskRow, ...] = ()
    tokens_per_second: float = math.nan
    histograms: tuple[Histogram, ...] = ()


@dataclass(frozen=True)
class Report:
    """The runs of one comparison or of several, which may be on several models and machines.

    protocol  how perplexity and KL were measured, the same for all
    """

    schema: int
    protocol: str
    origins: tuple[Origin, ...]
    runs: tuple[Run, ...]


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, threads, memory, platform, accelerator; no names of host or user."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"processor": _processor(), "cores": usable, "threads": torch.get_num_threads()}
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def to_json(report: Report) -> str:
    """Return the record as JSON in ASCII, floats in full; what is not finite becomes null."""
    return json.dumps(finite(asdict(report)), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return plain values with None for every float that is not finite, as JSON has it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(text: str) -> Report:
    """Read what `to_json` wrote; null becomes NaN where a number is due. DataError 450 says which field is wrong."""
    try:
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(450, f"the report is not JSON: {error}.") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise DataError(450, "the file is not a report: it has no field 'schema'; give a report.json.")
    if type(data["schema"]) is not int or data["schema"] not in READABLE:
        found, known = short(data["schema"]), " and ".join(map(str, READABLE))
        raise DataError(450, f"the report has schema {found}, this version reads {known}; run the comparison again.")
    report: Report = read_value("report", _upgraded(data) if data["schema"] == 1 else data, Report)
    for i, run in enumerate(report.runs):
        if not 0 <= run.origin < len(report.origins):
            raise DataError(450, f"report.runs[{i}].origin is {run.origin}, and there are {len(report.origins)}.")
        for task in run.tasks:
            if set(task.answers) - {"0", "1"}:
                raise DataError(450, f"report.runs[{i}] has answers to {task.task!r} that are neither 0 nor 1.")
    return report


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Turn a record of schema 1, which knew one comparison only and less of each run, into one of schema 2."""
    names = [field.name for field in fields(Origin)]
    rest = {key: value for key, value in data.items() if key not in names}
    return rest | {"schema": SCHEMA, "origins": [{key: data[key] for key in names if key in data}]}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def read_value(where: str, value: Any, hint: Any) -> Any:
    """Check `value`, as parsed from JSON, against the annotation `hint`, and return it as that type."""
    arguments, origin = get_args(hint), get_origin(hint)
    if hint is Any or (origin in UNIONS and type(value) in arguments):
        return value
    if origin in UNIONS and isinstance(value, dict):
        hint = next((kind for kind in arguments if is_dataclass(kind)), hint)
    if is_dataclass(hint):
        return _record(where, _expect(where, value, dict), hint)
    if hint is float:
        try:
            return math.nan if value is None else float(_expect(where, value, float, int))
        except OverflowError as error:
            raise DataError(450, f"{where} is too large a number.") from error
    if origin is dict:
        return {k: read_value(f"{where}[{short(k)}]", v, arguments[1]) for k, v in _expect(where, value, dict).items()}
    if origin is tuple:
        items = _expect(where, value, list)
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise DataError(450, f"{where} must have {len(arguments)} items, not {len(items)}.")
        return tuple(read_value(f"{where}[{i}]", item, arguments[0]) for i, item in enumerate(items))
    return _expect(where, value, *(arguments if origin in UNIONS else (hint,)))


def _expect(where: str, value: Any, *types: type) -> Any:
    if type(value) in types:
        return value
    names = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number", type(None): "null"}
    wanted = " or ".join(names.get(t, t.__name__) for t in types if t is not int or float not in types)
    raise DataError(450, f"{where} must be {wanted}, not {short(value)}.")


def _record(where: str, data: dict[str, Any], cls: Any) -> Any:
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for key in data:
        if key not in known:
            raise DataError(
                450, f"{where} has a field {short(key)}: {nearest(key, known)}It may have: {', '.join(known)}."
            )
    for field in fields(cls):
        if field.name not in data and field.default is MISSING:
            raise DataError(450, f"{where} lacks the field {field.name!r}.")
    return cls(**{key: read_value(f"{where}.{key}", value, hints[key]) for key, value in data.items()})
