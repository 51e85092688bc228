"""The sensitivity analysis from its arguments to its files: everything that needs no weights is checked first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import api, plan, recipe
from quantforge.calibrate import corpus
from quantforge.calibrate.text_files import STRICT, Reading
from quantforge.comparison.wishes import told
from quantforge.errors import RecipeError, pick
from quantforge.evaluation.reference import digest
from quantforge.models import check
from quantforge.models import load as loading
from quantforge.recipe import Recipe
from quantforge.sensitivity import show
from quantforge.sensitivity.measure import Job, joined, measure, missing, new_section, parts_of
from quantforge.sensitivity.results import FILE, SCHEMA, Analysis, to_json
from quantforge.store import check_report_folder, write_text

WINDOWS = {"block": 48, "kind": 48, "layer": 8}
BITS = (2, 3, 4, 8)


def analyze(
    model: str | Path | nn.Module | None = None,
    method: str = "rtn",
    *,
    by: Sequence[str] = ("block",),
    bits: Sequence[int] | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    weights: Sequence[str] | None = None,
    inputs: str | None = None,
    data: str | Path | Tensor = "python-docs",
    seq_len: int = 512,
    windows: int | None = None,
    device: str = "cpu",
    settings: dict[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    reading: Reading = STRICT,
    out: str | Path | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
) -> Analysis:
    """Quantize one part of a model at a time, the rest in float, and measure what each costs.

    model    a folder, a hub id, None for the demo model, or a model in memory, which is given back as it was (its fused
             experts as layers)
    method   one that needs no calibration, such as "rtn", "hqq" or "nf4"
    by       what a part is, one or several of: "block"; "kind", such as all q_proj; "layer"
    bits     None: 2, 3, 4 and 8 where the method's format comes in these widths and `weights` is None
    weights  notations of formats, in place of the method's own
    windows  of `seq_len` tokens from the start of the text, 0 for all; None: 48, and 8 by layer
    reading  how text files are read
    out      a folder for sensitivity.json, which has every cell as soon as it is measured, .md and .html
    resume   go on with what is in `out`, which must be of the same model files, options, text and versions; a model in
             memory must lose on every window what it lost then

    Sections that `out` has by other parts stay. Everything that needs no weights is checked before they are read.
    Raises the subclasses of QuantForgeError.
    """
    recipes = _recipes(method, bits, weights, (group_size, symmetric, inputs), settings, overrides)
    if not by:
        raise RecipeError(243, f"there is nothing to cut the model by: name one of {', '.join(WINDOWS)}.")
    for way in by:
        pick("way to cut the model", way, WINDOWS)
    loading.check_device(device)
    if not isinstance(data, Tensor):
        corpus.check_name(str(data), "evaluation")
    folder = None if out is None else Path(out)
    opened = _open(model, device, folder, trust_remote_code=trust_remote_code)
    plans = {_format(chosen): plan.make(opened.skeleton, chosen, opened.dtype) for chosen in recipes}
    tokenizer = tokenizer or opened.tokenizer
    cut = functools.partial(api.token_ids, tokenizer=tokenizer, config=opened.config, seq_len=seq_len, reading=reading)
    jobs, evaluations = [], []
    for way in dict.fromkeys(by):
        job, evaluation = _tokens(data, way, WINDOWS[way] if windows is None else windows or None, cut)
        job = replace(job, parts=parts_of(next(iter(plans.values())), way))
        jobs.append(job)
        evaluations.append(evaluation)
    fingerprint = opened.fingerprint()
    sections = [
        new_section(job, evaluation, plans, fingerprint, command)
        for job, evaluation in zip(jobs, evaluations, strict=True)
    ]
    columns = {fmt: told(one) for fmt, one in plans.items()}
    options = _options(next(iter(columns.values())), overrides)
    found = Analysis(SCHEMA, opened.name, opened.notes, method, options, columns, tuple(sections))
    found = joined(folder, found, resume=resume)
    if not fingerprint or any(missing(found, job, plans) for job in jobs):
        built = opened.build()
        for job in jobs:
            for section in measure(built, plans, job, found):
                found = found.having(section)
                if folder is not None:  # what is done is not lost, whatever becomes of the cells to come
                    write_text(folder / FILE, to_json(found))
    if folder is not None:
        show.write(found, folder)
    return found


@dataclass(frozen=True)
class _Opened:
    """A model that is checked but not read: its name, notes, config and layers, and what reads it.

    fingerprint  returns that of its files, which takes reading them once; "" for a model in memory
    """

    name: str
    notes: tuple[str, ...]
    config: Any
    dtype: torch.dtype
    skeleton: nn.Module
    tokenizer: Any
    build: Callable[[], nn.Module]
    fingerprint: Callable[[], str]


def _open(model: str | Path | nn.Module | None, device: str, out: Path | None, *, trust_remote_code: bool) -> _Opened:
    """Find and check a model, and that results can be written to `out`."""
    if isinstance(model, nn.Module):
        if out is not None:
            check_report_folder(out)
        check.check_finite(model)
        own = next(model.parameters()).dtype
        dtype = torch.float32 if own == torch.float64 else own
        return _Opened(type(model).__name__, (), model.config, dtype, model, None, lambda: model, str)
    source = loading.find(None if model is None else str(model), trust_remote_code=trust_remote_code)
    if out is not None:
        check_report_folder(out, source.path)
    build = functools.partial(loading.model, source, device)
    skeleton, tokenizer = source.skeleton(), loading.tokenizer(source)
    notes, digested = tuple(source.notes), functools.partial(source.fingerprint, device)
    return _Opened(source.name, notes, source.config, source.dtype, skeleton, tokenizer, build, digested)


def _tokens(
    data: str | Path | Tensor, by: str, count: int | None, cut: Callable[..., tuple[Tensor, dict[str, Any]]]
) -> tuple[Job, dict[str, Any]]:
    """Return a job over `count` windows, no parts in it yet, and where its tokens came from."""
    text = data if isinstance(data, Tensor) else str(data)
    ids, provenance = cut(text, "evaluation", count=count)
    if isinstance(data, Tensor):
        ids = ids[:count]
        provenance = {**provenance, "count": len(ids), "ids_sha256": digest(ids)}
    return Job(by, ids), provenance


def _recipes(
    method: str,
    bits: Sequence[int] | None,
    weights: Sequence[str] | None,
    more: tuple[int | None, bool | None, str | None],
    settings: dict[str, Any] | None,
    overrides: Mapping[str, Mapping[str, Any]] | None,
) -> list[Recipe]:
    """Return the recipe of each column; RecipeError for none, two that are alike, or a method that needs data."""
    group_size, symmetric, inputs = more
    for what, given in (("bits", bits), ("weights", weights)):
        if given is not None and not given:
            raise RecipeError(243, f"there is nothing to measure: {what} is empty; give a list such as 2,3,4,8.")

    def load(notation: str | None, width: int | None) -> Recipe:
        return recipe.load(
            method, bits=width, group_size=group_size, symmetric=symmetric, weights=notation, inputs=inputs,
            settings=settings, overrides=overrides,
        )  # fmt: skip

    if bits is None and weights is None:
        load(None, None)  # what is wrong with any width is said first
        try:
            found = [load(None, width) for width in BITS]
        except RecipeError:  # a format of one width
            found = [load(None, None)]
    else:
        found = [load(notation, width) for notation in weights or (None,) for width in bits or (None,)]
    for chosen in found:
        if chosen.needs:
            able = [name for name in recipe.names() if not recipe.load(name).needs]
            raise RecipeError(
                244, f"{method} needs calibration, and sensitivity takes methods without: {', '.join(able)}."
            )
    labels = [_format(chosen) for chosen in found]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise RecipeError(245, f"the format {twice} is asked for twice.")
    return found


def _format(chosen: Recipe) -> str:
    return chosen.label.removeprefix(f"{chosen.name}-")


def _options(column: dict[str, Any], overrides: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """Return what all columns have in common: what one is made with less its format; overrides in their order.

    What an override does not say it takes from the column, so that it stands as it was asked for.
    """
    common = {key: value for key, value in column.items() if key not in ("format", "overrides")}
    if overrides:
        wishes = (",".join(f"{key}={value}" for key, value in wish.items()) for wish in overrides.values())
        common["overrides"] = "; ".join(map(":".join, zip(overrides, wishes, strict=True)))
    return common
