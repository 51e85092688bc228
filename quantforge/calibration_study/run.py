"""Running a study: one loaded model, quantized and scored on every draw of the design, each run kept when done."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantforge import api, recipe, record
from quantforge.calibrate import corpus, overlap
from quantforge.calibrate.text_files import STRICT, Reading
from quantforge.calibration_study import pages, results
from quantforge.calibration_study.design import Design, Draw, draw
from quantforge.calibration_study.results import Study, StudyRun
from quantforge.comparison import keep_weights, restore_weights
from quantforge.comparison.wishes import told
from quantforge.errors import PlanError
from quantforge.evaluation import perplexity
from quantforge.evaluation.reference import CLOSE, Reference
from quantforge.models import load as loading
from quantforge.plan import Plan, make
from quantforge.progress import bar
from quantforge.store import check_report_folder, write_text

PROTOCOL = (
    "perplexity = exp of the mean over non-overlapping windows, from the start of the text, of the mean cross-entropy "
    "of their seq_len − 1 predictions; KL = mean over the same predictions of KL(float ‖ quantized), a lower bound "
    "from the float model's most probable tokens; float32 throughout"
)
JSON = "calibration-study.json"


def calibration_study(
    model: str | Path | None = None,
    *,
    method: str = "gptq",
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    weights: str | None = None,
    inputs: str | None = None,
    settings: dict[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    calibrations: Sequence[str] = ("python-docs",),
    samples: Sequence[int] = (16, 64),
    seq_lens: Sequence[int] = (512,),
    seeds: Sequence[int] = (0, 1, 2),
    data: str = "python-docs",
    eval_seq_len: int = 512,
    windows: int | None = 48,
    device: str = "cpu",
    reading: Reading = STRICT,
    out: str | Path | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
    warn: Callable[[str], None] = lambda line: None,
) -> Study:
    """Quantize one model by one method on every set × samples × length, drawn with every seed, and score each result.

    calibrations  sets or files; each run draws its windows at random, by its seed. "self" is written by the float model
    samples       windows of a run; seq_lens: their length in tokens
    data          evaluation text, of which the first `windows` (None: all) of `eval_seq_len` tokens are scored
    reading       how text files are read
    out           a folder for calibration-study.json, .md and .html; the first is written after every run
    resume        take over the runs of the calibration-study.json in `out`, which must be of the same model files,
                  method, texts, versions and machine; the design may be another
    warn          is told of overlap between calibration and evaluation text, before anything is measured

    The other arguments are those of `quantforge.quantize`. Everything that needs no weights is checked before they are
    read. Raises the subclasses of QuantForgeError.
    """
    design = Design(tuple(calibrations), tuple(samples), tuple(seq_lens), tuple(seeds))
    chosen = recipe.load(
        method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        weights=weights,
        inputs=inputs,
        settings=settings,
        overrides=overrides,
    )
    loading.check_device(device)
    for name in design.data:
        corpus.check_name(name, "calibration")
    source = loading.find(None if model is None else str(model), trust_remote_code=trust_remote_code)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_report_folder(folder, source.path)
    plan = make(source.skeleton(), chosen, source.dtype)
    tokenizer = loading.tokenizer(source)
    ids, evaluation = api.token_ids(
        data, "evaluation", tokenizer=tokenizer, config=source.config, seq_len=eval_seq_len, count=windows,
        reading=reading,
    )  # fmt: skip
    writer = api.writer_of(source, device)
    pools = draw(design, ids, evaluation, tokenizer, source.config, writer, reading)
    draws = [each for _, own in pools for each in own]
    for line in overlap.warnings(((each.cell.data, each.overlap) for each in draws), evaluation["name"]):
        warn(line)
    study = Study(
        schema=results.SCHEMA,
        model=source.name,
        model_notes=source.notes,
        fingerprint=source.fingerprint(device),
        method=chosen.label,
        options=told(plan),
        needs=bool(plan.needs),
        protocol=PROTOCOL,
        design=design,
        pools=tuple(pool for pool, _ in pools),
        evaluation=evaluation,
        float_losses=(),
        machine=record.machine(),
        versions=record.versions(),
        command=command,
        created=datetime.date.today().isoformat(),
        runs=(),
    )
    if folder is not None and not resume and (folder / JSON).exists():
        raise PlanError(282, f"{folder} has a study already; --resume goes on with it, or name another folder.")
    if resume and folder is not None:
        study = _taken_over(study, folder, draws)
    done = {(run.cell, run.seed) for run in study.runs}
    if any((each.cell, each.seed) not in done for each in draws):
        study = _measured(study, draws, writer.build(), plan, ids, tokenizer, folder)
    if folder is not None:
        pages.write(study, folder)
    return study


def _taken_over(study: Study, folder: Path, draws: Sequence[Draw]) -> Study:
    """Return `study` with those of its runs that the record in `folder` has; PlanError if that is of something else."""
    path = folder / JSON
    if not path.exists():
        return study
    found = results.from_json(path.read_text(encoding="utf-8"), str(path))
    study = results.from_json(results.to_json(study))  # as the other one was: JSON has no infinities
    texts = {pool.name: pool for pool in found.pools}
    pairs: list[tuple[str, Any, Any]] = [
        ("model", study.model, found.model),
        ("method", study.method, found.method),
        ("options of the method", study.options, found.options),
        ("evaluation tokens", study.evaluation, found.evaluation),
        *((f"text in {pool.name}", pool, texts.get(pool.name, pool)) for pool in study.pools),
        ("versions", study.versions, found.versions),
        ("machine", study.machine, found.machine),
        ("version of the model files, or on another device", study.fingerprint, found.fingerprint),
    ]
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise PlanError(280, f"--resume: {path} was made with another {what}; name another folder.")
    names = {pool.name for pool in study.pools}
    pools = (*study.pools, *(pool for pool in found.pools if pool.name not in names))
    return _with_runs(replace(study, pools=pools, float_losses=found.float_losses), found.runs, draws)


def _with_runs(study: Study, runs: Sequence[StudyRun], draws: Sequence[Draw]) -> Study:
    """Return `study` with `runs`: those of the design in its order, then those that only earlier designs asked for."""
    done = {(run.cell, run.seed): run for run in runs}
    found = [done.pop((each.cell, each.seed)) for each in draws if (each.cell, each.seed) in done]
    return replace(study, runs=(*found, *done.values()))


def _measured(
    study: Study,
    draws: Sequence[Draw],
    model: nn.Module,
    plan: Plan,
    ids: Tensor,
    tokenizer: Any,
    folder: Path | None,
) -> Study:
    """Return `study` with a run for every draw; each is written to `folder` as it is done."""
    reference, _ = api.kept_reference(model, ids, study.fingerprint)
    if study.float_losses and not _same_model(reference.losses, study.float_losses):
        raise PlanError(281, f"--resume: {study.model} scores otherwise than when {folder} was made: it has changed.")
    study = replace(study, float_losses=reference.losses)
    originals = keep_weights(model, [plan])
    done = {(run.cell, run.seed) for run in study.runs}
    for each in draws:
        if (each.cell, each.seed) in done:
            continue
        run = _run(each, model, plan, ids, reference, tokenizer)
        restore_weights(model, originals)
        study = _with_runs(study, (*study.runs, run), draws)
        if folder is not None:
            write_text(folder / JSON, results.to_json(study))
    return study


def _run(each: Draw, model: nn.Module, plan: Plan, ids: Tensor, reference: Reference, tokenizer: Any) -> StudyRun:
    """Quantize the model on one draw, and score it; it is left quantized."""
    label = f"{each.cell}, seed {each.seed}"
    result = api.run(
        model,
        plan,
        each.ids if plan.needs else None,
        tokenizer=tokenizer,
        source="",
        calibration={},
    )
    with bar(f"{label}: perplexity", len(ids)) as step:
        score = perplexity.evaluate(model, ids, reference, progress=lambda loss: step(f"loss {loss:.3f}"))
    return StudyRun(each.cell, each.seed, each.ids_sha256, each.overlap, score.losses, score.kls, result.seconds)


def _same_model(losses: Sequence[float], recorded: Sequence[float]) -> bool:
    return len(losses) == len(recorded) and all(abs(a - b) < CLOSE for a, b in zip(losses, recorded, strict=True))
