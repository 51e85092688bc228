"""Quantized checkpoints read back: the numbers that were saved, and how they were made."""

from __future__ import annotations

import ast
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantforge import exporters, registry
from quantforge import plan as planning
from quantforge.errors import ModelError, RecipeError, clean
from quantforge.exporters import native, peft
from quantforge.models import activations, arch, check, load, moe
from quantforge.models.folder import MAX_CONFIG, contained
from quantforge.models.headers import MAX_HEADER, read_json
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.problem import QWeight
from quantforge.numerics.residuals import LowRank
from quantforge.protocols import Exporter
from quantforge.recipe import Recipe
from quantforge.result import Result
from quantforge.solvers.rtn import RTN
from quantforge.solvers.spare import Spare
from quantforge.solving import Layer
from quantforge.store import MARK

# what a config that was changed by hand can make a reader raise
_DAMAGE = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, re.error)
_KINDS = ("transform", "tuner", "correction")
_KEEPS_FLOATS = Spare(pick="weight")
_FLOATS = (*load.DTYPES.values(), torch.float64)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in load.DTYPES.values()}


def is_quantized(folder: Path) -> bool:
    """Tell whether `folder` is a quantized checkpoint, by its config.json; what that is worth, `read` will tell."""
    if os.path.isfile(folder / MARK):
        return True
    try:
        config = read_json(contained(folder, "config.json", ".json"), MAX_CONFIG)
    except (ModelError, ValueError):  # ValueError: a name that no file could have
        return False
    return config.get("quantization_config") is not None


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `save` wrote about how the checkpoint was made; ModelError if there is nothing or it is damaged."""
    file = folder / MARK
    if not os.path.lexists(file):
        raise ModelError(350, f"{folder} has no {MARK}, so it was not written by quantforge.")
    try:
        record = read_json(contained(folder, MARK, ".json"), MAX_HEADER)
    except ModelError as error:
        raise ModelError(351, f"{file} cannot be read ({error.args[0].rstrip('.')}).") from error
    if record.get("schema") != 1:
        raise ModelError(352, f"{file} is not of schema 1, the one that this version reads.")
    return record


def table(record: dict[str, Any]) -> str:
    """Return what each layer of a checkpoint became, as lines of text with the totals; ModelError if it was changed."""
    try:
        return _table(record)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
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


def _stored(row: dict[str, Any]) -> str:
    return f"{row['format']} x {row['inputs']}" if row.get("inputs") else str(row["format"])


def _exporter(quantization: dict[str, Any]) -> Exporter:
    """Return the exporter that reads what a `quantization_config` describes."""
    method = quantization.get("quant_method")
    bits = "bitsandbytes8" if quantization.get("load_in_8bit") is True else "bitsandbytes"
    name = {native.METHOD: "native", "bitsandbytes": bits}.get(str(method), "compressed-tensors")
    found: Exporter = registry.create("exporter", name)
    return found


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a checkpoint whose files have been checked; no weight is read.

    It says nothing of the quantization. Raises ModelError for a damaged or foreign checkpoint.
    """
    return _settings(folder, trust_remote_code)[2]


def _settings(folder: Path, trusted: bool) -> tuple[check.Folder, dict[str, Any], Any]:
    """Return the checked folder, its `quantization_config` and the transformers config without it."""
    found = check.read_folder(folder, trust_remote_code=trusted, quantized=True)
    config = dict(found.config)
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict):
        raise ModelError(353, f"{folder} is not a quantized checkpoint: its config.json has no quantization_config.")
    settings = load.make_config(folder, config, trust_remote_code=trusted)
    if hasattr(settings, "quantization_config"):  # a config of the folder's own code read it again
        del settings.quantization_config
    return found, quantization, settings


def _layers(folder: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, QWeight]:
    """Return the quantized layers by name, taking their tensors out of `tensors`; weights that remain are floats."""
    try:
        layers = _exporter(quantization).read(quantization, tensors)
    except _DAMAGE as error:
        what = f"{type(error).__name__}: {error}"
        raise ModelError(357, f"{folder}: its layers cannot be read ({what}); the checkpoint is damaged.") from error
    for key, tensor in tensors.items():
        # transformers would cast codes to floats as if they were weights
        if key.endswith(".weight") and tensor.dtype not in _FLOATS:
            raise ModelError(
                358, f"{folder}: {key} is {tensor.dtype}, but nothing says what its codes mean; it is incomplete."
            )
    return layers


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


def _correct(folder: Path, layers: dict[str, QWeight]) -> None:
    """Put the factors of the checkpoint's adapter, if it has one, on the layers they belong to."""
    if not (folder / peft.FOLDER).is_dir():
        return
    for name, factors in peft.read(folder / peft.FOLDER).items():
        a, b = factors.factors()
        if name not in layers or (a.shape[0], b.shape[1]) != tuple(layers[name].base.shape):
            raise ModelError(356, f"{folder / peft.FOLDER} corrects {name}, which is no such layer of the model.")
        layers[name] = replace(layers[name], residuals=(*layers[name].residuals, factors))


def read(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the model of a quantized checkpoint, its weights dequantized in `dtype` (default: the checkpoint's).

    The same numbers as stock transformers computes from the folder, in the same dtype. Raises ModelError for a damaged
    or foreign checkpoint, and for one whose numbers `dtype` cannot hold.
    """
    return _read(folder, dtype, trust_remote_code)[0]


def _read(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[nn.Module, dict[str, QWeight], torch.dtype, Exporter]:
    """Return a checkpoint's model in `dtype`, its quantized layers by name, its own dtype and what wrote it."""
    found, quantization, settings = _settings(folder, trust_remote_code)
    config = found.config
    tensors = moe.as_in_model(config.get("model_type"), load.read_tensors(found))
    layers = _layers(folder, quantization, tensors)
    _correct(folder, layers)
    # scales in float32 may outweigh the floats of the model, so the config knows better than the tensors
    own = _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), load.DTYPES[found.dtype])
    dtype = dtype or own
    for name, weight in layers.items():
        tensors[f"{name}.weight"] = weight.dequantize(dtype)
    with load.quiet():
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code))
        model, info = kind.from_pretrained(
            None,
            config=settings,
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
    _check_finite(model, folder, own)
    moe.unfuse(model)
    _gate(folder, model, layers)
    result: nn.Module = model.eval()
    return result, layers, own, _exporter(quantization)


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
    model, weights, own, exporter = _read(folder, dtype, trust_remote_code)
    tokenizer = load.read_tokenizer(folder, trust_remote_code=trust_remote_code) if _has_tokenizer(folder) else None
    if getattr(model.config, "model_type", "") in moe.NAMES and hasattr(model, "_weight_conversions"):
        del model._weight_conversions  # its tensors were read under other names than the files', which saving restores
    try:
        rows = {row["name"]: row for row in record["layers"]}
        plan = _written_by(exporter, _plan(model, record, weights, own))
        if set(rows) != set(weights) or set(plan.layers) != set(weights):
            raise ValueError("they are not those of the checkpoint")
        each = record["seconds"] / max(len(rows), 1)
        layers = tuple(_layer(rows[name], weights[name], each) for name in plan.layers)
        return Result(
            model,
            plan,
            layers,
            tokenizer,
            str(record["source"]),
            dict(record["calibration"]),
            float(record["seconds"]),
            record["peak_memory"],
        )
    except (*_DAMAGE, SyntaxError, RecipeError) as error:
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


def _written_by(exporter: Exporter, plan: planning.Plan) -> planning.Plan:
    """Return `plan` such that it is written again in quantforge's own container if `exporter` is that.

    The solver of an override may keep floats beside the codes, which no other container holds; records do not name it.
    """
    if not isinstance(exporter, native.Native) or isinstance(exporters.choose(plan), native.Native):
        return plan
    first = next(iter(plan.layers.values()))
    return replace(plan, layers={**plan.layers, first.name: replace(first, solver=_KEEPS_FLOATS)})


def _format(text: str, found: list[Format]) -> Format:
    """Return the format of a recipe: that of a layer, or, where solvers extend it, what its notation says."""
    return next((f for f in found if str(f) == text), None) or parse(text)


def _part(kind: str, text: str) -> Any:
    """Return the plug-in whose `repr` the record holds; ValueError if it is none that is known here."""
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
