"""Quantized checkpoints read back: the numbers that were saved, and how they were made."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn
from transformers import GenerationConfig

from quantforge import exporters, registry, stored
from quantforge import plan as planning
from quantforge.errors import ModelError, RecipeError, clean
from quantforge.models import activations, arch, check, load, moe
from quantforge.models.folder import MAX_CONFIG, contained
from quantforge.models.headers import read_json
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.problem import QWeight
from quantforge.numerics.residuals import LowRank
from quantforge.recipe import Recipe
from quantforge.result import Result
from quantforge.solvers.rtn import RTN
from quantforge.solving import Layer
from quantforge.store import MARK
from quantforge.stored import read_record

__all__ = [
    "is_quantized",
    "open_result",
    "read",
    "read_config",
    "read_hollow",
    "read_record",
    "rows_of",
    "table",
    "table_of",
]
_GENERATION = "generation_config.json"
_LONGEST = 2000  # characters of a plug-in with its options, as records have it
_KINDS = ("transform", "tuner", "correction")


def is_quantized(folder: Path) -> bool:
    """Tell whether `folder` is a quantized checkpoint, by its config.json; what that is worth, `read` will tell."""
    if os.path.isfile(folder / MARK):
        return True
    try:
        config = read_json(contained(folder, "config.json", ".json"), MAX_CONFIG)
    except (ModelError, ValueError):  # ValueError: a name that no file could have
        return False
    return config.get("quantization_config") is not None


def table(record: dict[str, Any]) -> str:
    """Return what each layer of a checkpoint became, as lines of text with the totals; ModelError if it was changed."""
    try:
        return _table(record)
    except stored.DAMAGE as error:
        raise ModelError(355, f"{MARK} lacks what it should say of the layers ({error!r}); it was changed.") from error


def _table(record: dict[str, Any]) -> str:
    rows = record["layers"]
    names = [clean(row["name"]) for row in rows]
    width = max(map(len, names), default=5)
    lines = [f"{'layer':{width}}  {'out x in':>13}  {'format':22}  bits/weight  loss (share of output)"]
    for name, row in zip(names, rows, strict=True):
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        loss, share = (math.nan if row[key] is None else row[key] for key in ("loss", "relative_loss"))
        bits = f"{row['bits_per_weight']:11.3f}"
        lines.append(f"{name:{width}}  {shape:>13}  {clean(_stored(row)):22}  {bits}  {loss:.4g} ({share:.3%})")
    lines.append(
        f"{clean(record['source'])} by {clean(record['method'])}: {len(rows)} layers at "
        f"{record['bits_per_weight']:.3f} bits per weight, "
        f"{record['bytes_before'] / 1e6:.1f} MB -> {record['bytes_after'] / 1e6:.1f} MB"
    )
    return "\n".join([*lines, *(f"note: {clean(note)}" for note in record["notes"])])


def rows_of(layers: Mapping[str, QWeight]) -> list[dict[str, Any]]:
    """Return what stands in the files of a checkpoint for each layer, as a record would say it."""
    return [
        {
            "name": name,
            "shape": list(weight.base.shape),
            "format": str(weight.base.format),
            **({"inputs": str(weight.inputs.inputs)} if weight.inputs else {}),
            "bits_per_weight": weight.nbits / weight.base.codes.numel(),
        }
        for name, weight in layers.items()
    ]


def table_of(layers: Mapping[str, QWeight]) -> str:
    """Return what stands in the files of a checkpoint for each layer, as lines of text."""
    width = max(map(len, layers), default=5)
    lines = [f"{'layer':{width}}  {'out x in':>13}  {'format':22}  bits/weight"]
    for row in rows_of(layers):
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        lines.append(f"{row['name']:{width}}  {shape:>13}  {_stored(row):22}  {row['bits_per_weight']:11.3f}")
    return "\n".join([*lines, f"{len(layers)} layers; how they were made is not recorded"])


def _stored(row: dict[str, Any]) -> str:
    return f"{row['format']} x {row['inputs']}" if row.get("inputs") else str(row["format"])


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a checkpoint whose files have been checked; no weight is read.

    It says nothing of the quantization. Raises ModelError for a damaged or foreign checkpoint.
    """
    return stored.open_folder(folder, trust_remote_code=trust_remote_code).settings


def _gate(folder: Path, model: nn.Module, layers: dict[str, QWeight]) -> None:
    """Let the layers that round their inputs do so."""
    modules = dict(model.named_modules())
    for name, weight in layers.items():
        if weight.inputs is None:
            continue
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ModelError(
                359, f"{folder}: {name} is no linear layer of {type(model).__name__}, so its inputs cannot be rounded."
            )
        activations.gate(module, weight.inputs)


def _check_finite(model: nn.Module, folder: Path, own: torch.dtype) -> None:
    """Raise ModelError for numbers that are not finite; in float16, those of wider dtypes may be too large."""
    try:
        check.check_finite(model)
    except ModelError as error:
        dtype = next(model.parameters()).dtype
        if dtype != torch.float16 or own == dtype:
            raise
        what = error.args[0].rpartition(";")[0]  # without the advice to repair it
        raise ModelError(345, f"{folder} does not fit into {dtype} ({what}); {own} may work.") from error


def read(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the model of a quantized checkpoint, its weights dequantized in `dtype` (default: the checkpoint's).

    The same numbers as stock transformers computes from the folder, in the same dtype. Raises ModelError for a damaged
    or foreign checkpoint, and for one whose numbers `dtype` cannot hold.
    """
    return _read(folder, dtype, trust_remote_code)[0]


def read_hollow(
    folder: str | Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, QWeight]]:
    """Return a checkpoint's model in `dtype` and its quantized layers by name, their weights in the model left empty.

    What stands in their place has the shape and no memory of its own (one element, expanded): whoever calls this puts
    something else there. Inputs are not rounded either. Raises ModelError for what `read` does.
    """
    opened = stored.open_folder(Path(folder), trust_remote_code=trust_remote_code)
    layers, tensors = stored.read_layers(opened)
    return _fill(opened, layers, tensors, dtype or opened.dtype, dense=False).eval(), layers


def _read(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[nn.Module, dict[str, QWeight], stored.Stored]:
    """Return a checkpoint's model in `dtype`, its quantized layers by name, and what its files say."""
    opened = stored.open_folder(folder, trust_remote_code=trust_remote_code)
    layers, tensors = stored.read_layers(opened)
    model = _fill(opened, layers, tensors, dtype or opened.dtype, dense=True)
    _gate(folder, model, layers)
    return model.eval(), layers, opened


def _fill(
    opened: stored.Stored,
    layers: dict[str, QWeight],
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    dense: bool,
) -> nn.Module:
    """Return the model in `dtype` with `tensors` and the layers' weights in it: dequantized, or if not `dense`, empty.

    What is empty is a single zero in memory, except where transformers puts experts together.
    """
    folder = opened.files.path
    for name, weight in layers.items():
        zero = torch.zeros((), dtype=dtype)
        tensors[f"{name}.weight"] = weight.dequantize(dtype) if dense else zero.expand(weight.base.shape)
    with load.quiet():
        kind: Any = type(stored.skeleton(opened))
        model, info = kind.from_pretrained(
            None,
            config=opened.settings,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
        )
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if wrong:
        raise ModelError(
            354, f"{folder} does not hold the model of its config.json: {len(wrong)} tensors do not fit ({wrong[0]})."
        )
    model.generation_config = _generation(folder) or model.generation_config
    _check_finite(model, folder, opened.dtype)
    moe.unfuse(model)
    result: nn.Module = model
    return result


def _generation(folder: Path) -> GenerationConfig | None:
    """Return how a checkpoint says that it generates, None if it does not; ModelError for what cannot be so."""
    if not os.path.lexists(folder / _GENERATION):
        return None
    read_json(contained(folder, _GENERATION, ".json"), MAX_CONFIG)  # else transformers would follow any link
    try:
        with load.quiet():
            found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        ends = found.eos_token_id
        if not all(isinstance(x, int) for x in (ends if isinstance(ends, list) else [ends or 0])):
            raise ValueError(f"eos_token_id is {ends!r}")
        return found
    except Exception as error:  # a hostile file can make transformers raise anything
        raise ModelError(364, f"{folder / _GENERATION}: transformers does not accept it ({error}).") from error


def open_result(folder: str | Path, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Result:
    """Return a checkpoint that quantforge wrote as the result that it was saved from, to be trained and saved again.

    dtype  in which its model computes

    Its record says again what the checkpoint's does: method, calibration, losses, seconds. Saved unchanged it gives the
    same tensors. What the record does not keep is left out: seconds of single layers, and of recipes with overrides
    the parts of these. Raises ModelError for what `read` does, for a checkpoint of others and for a record that does
    not fit its layers.
    """
    folder = Path(folder)
    record = read_record(folder)
    model, weights, opened = _read(folder, dtype, trust_remote_code)
    tokenizer = load.read_tokenizer(folder, trust_remote_code=trust_remote_code) if _has_tokenizer(folder) else None
    if getattr(model.config, "model_type", "") in moe.NAMES and hasattr(model, "_weight_conversions"):
        del model._weight_conversions  # its tensors were read under other names than the files', which saving restores
    try:
        rows = {row["name"]: row for row in record["layers"]}
        plan = _written_by(opened, _plan(model, record, weights, opened.dtype))
        if set(rows) != set(weights) or set(plan.layers) != set(weights):
            raise ValueError("they are not those of the checkpoint")
        each = record.get("seconds", 0.0) / max(len(rows), 1)
        layers = tuple(_layer(rows[name], weights[name], each) for name in plan.layers)
        return Result(
            model,
            plan,
            layers,
            tokenizer,
            str(record["source"]),
            dict(record["calibration"]),
            float(record.get("seconds", 0.0)),
            record.get("peak_memory"),
            made_of=dict(record.get("made_of", {})),
            command=str(record.get("command", "")),
        )
    except (*stored.DAMAGE, SyntaxError, RecipeError) as error:
        raise ModelError(355, f"{folder / MARK} lacks what it should say of the layers ({error}).") from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _layer(row: dict[str, Any], weight: QWeight, seconds: float) -> Layer:
    """Return what the record says of one layer."""
    own = ("name", "shape", "format", "inputs", "bits_per_weight", "loss", "relative_loss", "tokens")
    loss, relative = (math.nan if row[key] is None else float(row[key]) for key in ("loss", "relative_loss"))
    notes = {key: value for key, value in row.items() if key not in own}
    return Layer(row["name"], replace(weight, notes=notes), loss, relative, int(row["tokens"]), seconds)


def _plan(model: nn.Module, record: dict[str, Any], weights: dict[str, QWeight], dtype: torch.dtype) -> planning.Plan:
    """Return the plan of a checkpoint: the record's recipe, and of each layer what was read."""
    solver = _part("solver", record["solver"])
    parts = {f"{kind}s": tuple(_part(kind, text) for text in record[f"{kind}s"]) for kind in _KINDS}
    inputs = [w.inputs.inputs for w in weights.values() if w.inputs]
    formats = [w.base.format for w in weights.values()]
    chosen = Recipe(
        str(record["method"]),
        "",
        str(record["paper"]),
        _format(record["format"], formats),
        solver,
        inputs=next((i for i in inputs if str(i) == record["inputs"]), None),
        **parts,
    )
    names = {name for stage in arch.find_stages(model)[0] for name in stage.names}
    bare = Recipe("rtn", "", "", formats[0], RTN(), skip=tuple(sorted(names - set(weights))))
    laid = planning.make(model, bare, dtype)  # of which what it says of the model is kept
    layers = {}
    for name, p in laid.layers.items():
        w = weights[name]
        layers[name] = replace(
            p,
            format=w.base.format,
            solver=solver,
            corrections=chosen.corrections if any(isinstance(r, LowRank) for r in w.residuals) else (),
            inputs=w.inputs.inputs if w.inputs else None,
        )
    return replace(laid, recipe=chosen, layers=layers, notes=tuple(map(str, record["notes"])))


def _written_by(opened: stored.Stored, plan: planning.Plan) -> planning.Plan:
    """Return `plan` such that it is written again in the container that it was read from.

    That need not be the first that holds its formats: the user may have named it, or the solver of an override kept
    floats beside the codes, which records do not name.
    """
    exporter = opened.exporter
    if type(exporters.choose(plan)) is type(exporter):
        return plan
    return replace(plan, container=opened.container, scales=exporter.dtypes(opened.dtype)[1])


def _format(text: str, found: list[Format]) -> Format:
    """Return the format of a recipe: that of a layer, or, where solvers extend it, what its notation says."""
    return next((f for f in found if str(f) == text), None) or parse(text)


def _part(kind: str, text: str) -> Any:
    """Return the plug-in whose `repr` the record holds; ValueError if it is none that is known here."""
    if len(text) > _LONGEST:
        raise ValueError(f"{text[:40]!r}… is no {kind}")
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"{text!r} is no {kind}")
    cls = next((c for n in registry.names(kind) if (c := registry.find(kind, n)).__name__ == call.func.id), None)
    if cls is None:
        raise ValueError(f"{call.func.id} is no {kind} of this version")
    options = {str(k.arg): _literal(k.value) for k in call.keywords}
    hints = get_type_hints(cls)
    for key, value in options.items():
        registry.coerce(f"{kind}.{key}", value, hints[key])
    return cls(**options)


def _literal(node: ast.expr) -> Any:
    return float(node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)  # inf and nan are names
