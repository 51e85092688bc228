"""Several methods on one model, the same tokens and the same evaluator, in one report."""

from __future__ import annotations

import datetime
import functools
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import api, exporters, pipeline, recipe, record, report
from quantforge.errors import PlanError, RecipeError, ResourceError, pick
from quantforge.evaluation import perplexity
from quantforge.evaluation.perplexity import Reference, Score
from quantforge.exporters.compressed_tensors import CompressedTensors
from quantforge.exporters.native import Native
from quantforge.memory import in_use
from quantforge.models import activations, arch, moe
from quantforge.models import load as loading
from quantforge.models.kvcache import KVCache, KVFormat
from quantforge.numerics.blocks import Flat
from quantforge.numerics.formats import Format
from quantforge.plan import Plan, check_export, make
from quantforge.progress import bar
from quantforge.recipe import Recipe
from quantforge.record import LayerRow, Report, Run
from quantforge.result import Result
from quantforge.solving import Layer
from quantforge.store import check_target, check_writable, write_text

PROTOCOL = (
    "perplexity = exp of the mean over non-overlapping windows, from the start of the text, of the mean cross-entropy "
    "of their seq_len − 1 predictions; KL = mean over the same predictions of KL(float ‖ quantized); float32 throughout"
)
FLOAT = "fp"


def compare(
    model: str | Path | None = None,
    *,
    methods: Sequence[str] = (FLOAT, "rtn", "gptq"),
    bits: Sequence[int] = (4,),
    group_size: int | None = None,
    symmetric: bool | None = None,
    weights: str | None = None,
    inputs: str | None = None,
    calibration: str = "python-docs",
    samples: int = 64,
    seq_len: int = 512,
    shuffle: bool = False,
    seed: int = 0,
    data: str = "python-docs",
    windows: int | None = 48,
    device: str = "cpu",
    settings: dict[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    keep: str | Path | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
) -> Report:
    """Quantize one model by each of `methods` at each of `bits`, score every result, and report.

    methods  names from `quantforge methods`, two joined by "+", a suite such as "all-weights" (which brings its own
             widths), "kv:int8-token" for the float model decoded through a cache that is stored so, and "fp" for the
             float model, which always runs as the reference
    keep     a folder that receives the checkpoint of every run, named by its label
    out      a folder for report.json, report.md and report.html
    resume   take over the runs of a report.json in `out` that was made on the same tokens, versions and machine, as a
             comparison leaves it that was interrupted
    command  the command line, for the report

    weights  one format for all methods, in place of `bits`

    The other arguments are those of `quantforge.quantize` and `quantforge.evaluate`. All recipes are planned before any
    weight is read. Raises the subclasses of QuantForgeError.
    """
    recipes = _recipes(methods, bits, (group_size, symmetric, weights, inputs), settings or {}, overrides)
    loading.check_device(device)
    source = loading.find(None if model is None else str(model), trust_remote_code=trust_remote_code)
    caches = _caches(methods, source.config)
    skeleton = source.skeleton()
    plans = {label: make(skeleton, chosen, source.dtype) for label, chosen in recipes.items()}
    _check_folders(out, keep, plans, source, resume=resume)
    tokenizer = loading.tokenizer(source)
    tokens = functools.partial(api.token_ids, tokenizer=tokenizer, config=source.config, seq_len=seq_len)
    calib, calib_from = tokens(calibration, "calibration", count=samples, shuffle=shuffle, seed=seed)
    ids, data_from = tokens(data, "evaluation", count=windows)
    done = _done(out, source.name, calib_from, data_from) if resume else {}
    wished = {k: _told(plan) for k, plan in plans.items()} | {k: {"cache": str(fmt)} for k, fmt in caches.items()}
    done = {k: run for k, run in done.items() if run.options == wished.get(k)}
    built = loading.model(source, device)
    with bar(FLOAT, len(ids)) as step:
        reference, score = perplexity.make_reference(built, ids, progress=lambda loss: step(f"loss {loss:.3f}"))
    runs = [_float_run(score, skeleton, source)]
    originals = _originals(built, plans.values())
    losses = _float_losses(built, {k: p for k, p in plans.items() if _unseen(p) and k not in done}, calib)
    before = in_use(device)

    def so_far() -> Report:
        return Report(
            schema=record.SCHEMA,
            model=source.name,
            model_notes=source.notes,
            calibration=calib_from,
            evaluation=data_from,
            protocol=PROTOCOL,
            machine=record.machine(),
            versions=record.versions(),
            command=command,
            created=datetime.date.today().isoformat(),
            runs=tuple(runs),
        )

    def add(run: Run) -> None:
        runs.append(run)
        if out is not None:  # what is done is not lost, whatever becomes of the runs to come
            write_text(Path(out) / "report.json", record.to_json(so_far()))

    for label, plan in plans.items():
        if label in done:
            runs.append(done[label])
            continue
        _restore(built, originals)
        needed = calib if plan.needs else None
        result = api.run(
            built,
            plan,
            needed,
            tokenizer=tokenizer,
            source=source.name,
            calibration=calib_from,
            memory_before=before,
            collect=frozenset() if _unseen(plan) else frozenset({"hessian"}),
        )
        if label in losses:
            result = replace(result, layers=tuple(_judged(layer, losses[label]) for layer in result.layers))
        add(_score(label, result, source, ids, reference, None if keep is None else Path(keep)))
        del result  # its codes would count as the next run's memory
    _restore(built, originals)
    for label, fmt in caches.items():
        add(done.get(label) or _cache_run(label, fmt, built, ids, runs[0]))
    found = so_far()
    if out is not None:
        report.write(found, Path(out))
    return found


def _recipes(
    methods: Sequence[str],
    bits: Sequence[int],
    format_options: tuple[int | None, bool | None, str | None, str | None],
    settings: dict[str, Any],
    overrides: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Recipe]:
    """Return the recipe of every run but the float one, by label; settings apply to the methods that have them."""
    if not methods or not bits:
        raise RecipeError(208, "there is nothing to compare: name at least one method and one number of bits.")
    recipes: dict[str, Recipe] = {}
    group_size, symmetric, weights, inputs = format_options
    unused = set(settings)
    for name in (m for m in methods if m in recipe.suites()):
        if any(option is not None for option in format_options) or overrides:
            raise RecipeError(221, f"the suite {name!r} brings its own formats; leave --group-size and the like out.")
        recipes |= {
            wish.label: wish.recipe() for wish in recipe.suite(name) if not wish.method.startswith(recipe.CACHE)
        }
    suited = set(recipes)
    for width in bits if weights is None else (None,):  # a notation has its own
        for method in methods:
            if method == FLOAT or method in recipe.suites() or method.startswith(recipe.CACHE):
                continue
            for part in method.split("+"):
                pick("method", part, [FLOAT, *recipe.names(), *recipe.suites()])
            plain = recipe.load(method, inputs=inputs)
            has = {f"{part}.{key}" for part, values in plain.options().items() for key in values}
            has |= {f"inputs.{key}" for key in recipe.INPUT_OPTIONS} if plain.inputs else set()
            usable = {key: value for key, value in settings.items() if key in has}
            unused -= usable.keys()
            chosen = recipe.load(
                method,
                bits=width,
                group_size=group_size,
                symmetric=symmetric,
                weights=weights,
                inputs=inputs,
                settings=usable,
                overrides=overrides,
            )
            if chosen.label in suited:
                raise RecipeError(223, f"a suite has a row {chosen.label!r} already; leave {method!r} out.")
            recipes[chosen.label] = chosen
    if unused:
        raise RecipeError(209, f"none of the methods {', '.join(methods)} has the setting {min(unused)!r}.")
    return recipes


def _caches(methods: Sequence[str], config: Any) -> dict[str, KVFormat]:
    """Return the caches that `methods`, or the suites among them, ask for, by label; they must suit the model."""
    rows = [wish.method for name in methods if name in recipe.suites() for wish in recipe.suite(name)]
    asked = [name for name in (*methods, *rows) if name.startswith(recipe.CACHE)]
    found = {name: api.cache_format(name.removeprefix(recipe.CACHE)) for name in asked}
    for fmt in found.values():
        KVCache(fmt, config)
    return found


def _cache_run(label: str, fmt: KVFormat, model: nn.Module, ids: Tensor, level: Run) -> Run:
    """Return the row of the float model decoded token by token through a cache stored in `fmt`."""
    score, size = api.decode(model, ids, fmt)
    note = f"decoded token by token through a cache of {size:,.0f} bytes a token; weights and inputs stay in float"
    return replace(
        level, label=label, method=label, perplexity=score.perplexity, kl=math.nan, options={"cache": str(fmt)},
        notes=(note,),
    )  # fmt: skip


def _float_losses(
    model: nn.Module, plans: Mapping[str, Plan], ids: Tensor
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return what methods that need no Hessian do to the layers' outputs: (loss, relative loss) by name."""
    return pipeline.float_losses(model, plans, ids) if plans else {}


def _unseen(plan: Plan) -> bool:
    """Tell whether a run tells no output losses of its own: it only rounds, and collects no Hessian."""
    return plan.needs <= {"extremes"} and not plan.recipe.transforms and not plan.recipe.tuners


def _judged(layer: Layer, losses: Mapping[str, tuple[float, float]]) -> Layer:
    loss, relative = losses[layer.name]
    return replace(layer, loss=loss, relative_loss=relative)


def _done(
    out: str | Path | None, model: str, calibration: dict[str, Any], evaluation: dict[str, Any]
) -> dict[str, Run]:
    """Return the runs of the report in `out` by label; PlanError if it is another model's, or made on other tokens,
    versions or machines."""
    if out is None or not (Path(out) / "report.json").exists():
        return {}
    found = record.from_json((Path(out) / "report.json").read_text(encoding="utf-8"))
    ours = (model, calibration, evaluation, record.versions(), record.machine())
    theirs = (found.model, found.calibration, found.evaluation, found.versions, found.machine)
    names = ("model", "calibration tokens", "evaluation tokens", "versions", "machine")
    for name, mine, other in zip(names, ours, theirs, strict=True):
        if mine != other:
            raise PlanError(272, f"--resume: the report in {out} was made with other {name}; leave --resume out.")
    return {run.label: run for run in found.runs}


def _told(plan: Plan) -> dict[str, Any]:
    """Return what a report says of a plan: the format and every option of its parts."""
    chosen = plan.recipe
    told: dict[str, Any] = {"format": str(chosen.weights.with_scale(plan.dtype))}
    if chosen.inputs:
        told["inputs"] = str(chosen.inputs)
    if chosen.overrides:
        told["overrides"] = {
            pattern: "float" if other is None else {"method": other.name, **_told(replace(plan, recipe=other))}
            for pattern, other in chosen.overrides
        }
    return told | _options(chosen)


def _originals(model: nn.Module, plans: Iterable[Plan]) -> dict[str, Tensor]:
    """Keep copies of the parameters that any plan will overwrite, by name.

    Quantized layers are kept in the checkpoint's dtype, which holds them exactly. Where a plan rescales the model
    first, so is all else that scales can reach: norms, biases, routers; embeddings they cannot.
    """
    plans = list(plans)
    layers = {f"{name}.weight": plan.dtype for plan in plans for name in plan.layers}
    fixed = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}  # type: ignore[operator]
    rescaled = any(plan.recipe.transforms for plan in plans)
    return {
        name: p.detach().to(layers.get(name, p.dtype), copy=True)
        for name, p in model.named_parameters()
        if name in layers or (rescaled and id(p) not in fixed)
    }


def _check_folders(
    out: str | Path | None, keep: str | Path | None, plans: Mapping[str, Plan], source: loading.Source, *, resume: bool
) -> None:
    if out is not None:
        _check_report_folder(Path(out), source.path)
    if keep is not None:
        _check_kept(Path(keep), plans, source, resume=resume)


def _check_report_folder(out: Path, model: Path) -> None:
    """Refuse, before any work, a report folder that lies in the model's, is a file, or cannot be written."""
    if out.resolve() == model.resolve() or model.resolve() in out.resolve().parents:
        raise PlanError(266, f"--out {out} is the model's own folder or lies in it; choose another folder.")
    if os.path.lexists(out) and not out.is_dir():
        raise PlanError(267, f"--out {out} is a file; a report needs a folder.")
    check_writable(out)


def _check_kept(keep: Path, plans: Mapping[str, Plan], source: loading.Source, *, resume: bool) -> None:
    """Refuse, before any work, what no format holds, checkpoints that are there already, and runs taken over."""
    if resume:
        raise PlanError(273, "--resume takes over runs without their checkpoints; leave --keep out.")
    for label, plan in plans.items():
        check_export(plan, exporters.choose(plan))
        target = keep / label
        if os.path.lexists(target):
            raise PlanError(271, f"--keep {target} exists; choose another folder, or remove it first.")
        check_target(target, overwrite=False, inputs=(source.path,))


def _restore(model: nn.Module, originals: dict[str, Tensor]) -> None:
    activations.remove(model.modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in originals:
                parameter.copy_(originals[name])


def _float_run(score: Score, skeleton: nn.Module, source: loading.Source) -> Run:
    size = sum(p.numel() for p in skeleton.parameters()) * source.dtype.itemsize
    dtype = str(source.dtype).removeprefix("torch.")
    return Run(
        label=FLOAT,
        method=FLOAT,
        bits=None,
        bits_per_weight=8.0 * source.dtype.itemsize,
        perplexity=score.perplexity,
        kl=0.0,
        seconds=0.0,
        peak_memory_bytes=None,
        bytes_on_disk=size,
        disk_note=f"weights in {dtype}",
        options={},
        layers=(),
        notes=(),
    )


def _score(
    label: str, result: Result, source: loading.Source, ids: Tensor, reference: Reference, keep: Path | None
) -> Run:
    with bar(f"{label}: perplexity", len(ids)) as step:
        score = perplexity.evaluate(result.model, ids, reference, progress=lambda loss: step(f"loss {loss:.3f}"))
    size, note = _save(label, result, keep)
    plan = result.plan
    return Run(
        label=label,
        method=plan.recipe.name,
        bits=plan.recipe.weights.grid.bits,
        bits_per_weight=result.bits_per_weight,
        perplexity=score.perplexity,
        kl=score.kl,
        seconds=result.seconds,
        peak_memory_bytes=result.peak_memory,
        bytes_on_disk=size,
        disk_note=note,
        options=_told(plan),
        layers=tuple(_row(layer) for layer in result.layers),
        notes=(*result.fallbacks(), *filter(None, [reference.missing, _bias(plan, source)])),
    )


def _bias(plan: Plan, source: loading.Source) -> str | None:
    """Say so if a layer's format can hit the very values that the float model was dequantized from."""
    if source.lattice is None or not any(_hits(p.format, *source.lattice) for p in plan.layers.values()):
        return None
    bits, size = source.lattice
    return f"base-biased: the float model itself was stored in {bits} bits in blocks of {size}"


def _hits(fmt: Format, bits: int, most: int) -> bool:
    """Tell whether codes of `fmt` have `bits`, and its blocks at most `most` weights of one row."""
    rows, columns = (1, fmt.block.size) if isinstance(fmt.block, Flat) else fmt.block
    return fmt.grid.bits == bits and rows == 1 and columns is not None and columns <= most


def _options(chosen: Recipe) -> dict[str, Any]:
    """Return the options of a recipe's parts; those of the solver by their bare names."""
    found = chosen.options()
    rest = {
        f"{part}.{key}": value for part, values in found.items() if part != "solver" for key, value in values.items()
    }
    return {**found["solver"], **rest}


def _save(label: str, result: Result, keep: Path | None) -> tuple[int | None, str]:
    """Save the checkpoint to learn its size (and keep it if asked); return the bytes of its weight files and a note."""
    exporter = exporters.choose(result.plan)
    reason = exporter.refuses(result.plan)
    if reason:
        return None, f"not saved: {reason}"
    bits = result.plan.recipe.weights.grid.bits
    notes = []
    if isinstance(exporter, CompressedTensors) and 32 % bits:
        notes.append(f"{bits}-bit codes take {32 / (32 // bits):.2f} bits each in the file")
    if isinstance(exporter, CompressedTensors) and result.plan.recipe.corrections:
        notes.append("factors take 16 bits a number in the adapter, and are counted with 8")
    if isinstance(exporter, Native):
        notes.append("quantforge's own container, which quantforge.load reads")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = result.save((keep or Path(scratch)) / label)
        except ResourceError as error:
            if keep is not None:
                raise
            return None, f"not saved: {error}"
        return sum(f.stat().st_size for f in folder.rglob("*.safetensors")), "; ".join(notes)


def _row(layer: Layer) -> LayerRow:
    base = layer.weight.base
    return LayerRow(
        name=layer.name,
        kind=layer.name.rsplit(".", 1)[-1],
        block=arch.block_index(layer.name),
        shape=base.shape,
        format=" x ".join(map(str, filter(None, [base.format, layer.weight.inputs and layer.weight.inputs.inputs]))),
        bits_per_weight=layer.weight.nbits / base.codes.numel(),
        loss=layer.loss,
        relative_loss=layer.relative_loss,
        notes={**layer.weight.notes, **({"tokens": layer.tokens} if moe.expert_of(layer.name) else {})},
    )
