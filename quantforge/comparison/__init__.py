"""Several methods on one model or several, the same text and the same evaluator, in one report."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import api, exporters, pipeline, record, report
from quantforge.calibrate import overlap
from quantforge.calibrate.overlap import Overlap
from quantforge.calibrate.text_files import STRICT, Reading
from quantforge.comparison import cells, isolated, wishes
from quantforge.comparison.cells import Ground, Tasks
from quantforge.comparison.wishes import DTYPES, FLOAT, Request
from quantforge.errors import PlanError, RecipeError
from quantforge.evaluation import histograms, zeroshot
from quantforge.memory import in_use
from quantforge.models import activations
from quantforge.models import load as loading
from quantforge.models.kvcache import KVFormat
from quantforge.plan import Plan, make
from quantforge.record import Origin, Report, Run
from quantforge.store import check_report_folder, check_target, write_text

__all__ = ["FLOAT", "PROTOCOL", "Request", "compare", "keep_weights", "restore_weights"]

PROTOCOL = (
    "perplexity = exp of the mean over non-overlapping windows, from the start of the text, of the mean cross-entropy "
    "of their seq_len − 1 predictions; KL = mean over the same predictions of KL(float ‖ quantized), of the 128 most "
    "probable tokens and the rest as one: a lower bound; float32 throughout"
)


def compare(
    model: str | Path | Sequence[str | Path] | None = None,
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
    tasks: Sequence[str] = (),
    suite: str | None = None,
    task_dirs: Sequence[str | Path] = (),
    shots: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
    settings: dict[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    keep: str | Path | None = None,
    resume: bool = False,
    isolate: bool = False,
    reading: Reading = STRICT,
    trust_remote_code: bool = False,
    command: str = "",
    warn: Callable[[str], None] = lambda line: None,
) -> Report:
    """Quantize a model by each of `methods` at each of `bits`, score every result, and report.

    model    a folder, a hub id, None for the demo model, or several: each gets all rows
    methods  names from `quantforge methods`, two joined by "+", a suite such as "all-weights" (which brings its own
             widths), "kv:int8-token" for the float model decoded through a cache that is stored so, "fp-bfloat16" for
             the float model computed in another dtype, and "fp" for the float model, which always runs
    weights  one format for all methods, in place of `bits`
    tasks    zero-shot tasks that every row is scored on too; suite, task_dirs, shots and limit as for `evaluate`
    keep     a folder that receives the checkpoint of every run, named by its label
    out      a folder for report.json, report.md and report.html
    resume   take over the runs of a report.json in `out` that was made on the same tokens, versions and machine, as a
             comparison leaves it that was interrupted
    isolate  measure each row in a process of its own: one that dies costs its row only
    reading  how text files are read
    command  the command line, for the report
    warn     called with what the user should know before the work begins, such as common text

    The other arguments are those of `quantforge.quantize` and `quantforge.evaluate`. All recipes are planned before any
    weight is read. Raises the subclasses of QuantForgeError.
    """
    models = [model] if model is None or isinstance(model, str | Path) else list(model)
    if not models or len(set(map(_folder, models))) < len(models):
        raise RecipeError(226, "there is nothing to compare: name at least one model, and each by a name of its own.")
    wanted = api.wished_tasks(tasks, suite, tuple(map(Path, task_dirs)))
    api.check_together(bool(wanted), rolling=False, kv=None, counts=(shots, limit))
    requests = [
        Request(
            model=None if one is None else str(one),
            methods=tuple(methods),
            bits=tuple(bits),
            group_size=group_size,
            symmetric=symmetric,
            weights=weights,
            inputs=inputs,
            calibration=str(calibration),
            samples=samples,
            seq_len=seq_len,
            shuffle=shuffle,
            seed=seed,
            data=str(data),
            windows=windows,
            tasks=wanted,
            shots=shots,
            limit=limit,
            task_dirs=tuple(map(str, task_dirs)),
            device=device,
            settings=dict(settings or {}),
            overrides={pattern: dict(wish) for pattern, wish in (overrides or {}).items()},
            keep=None if keep is None else str(keep if len(models) == 1 else Path(keep) / _folder(one)),
            reading=reading,
            trust_remote_code=trust_remote_code,
            command=command,
        )
        for one in models
    ]
    place = None if out is None else Path(out)
    if place is not None and not resume and (place / "report.json").exists():
        raise PlanError(279, f"{place} has a report already; --resume goes on with it, or name another folder.")
    own = [place if place is None or len(models) == 1 else place / _folder(one) for one in models]
    ready = [prepare(request, folder, resume=resume) for request, folder in zip(requests, own, strict=True)]
    for job in ready:
        said = job.common.warning(job.calib_from["name"], job.data_from["name"])
        if said and any(plan.needs for plan in job.plans.values()):
            warn(said)
    found = [_measure(job, folder, resume=resume, isolate=isolate) for job, folder in zip(ready, own, strict=True)]
    whole = found[0] if len(found) == 1 else report.merge(found)
    if place is not None:
        report.write(whole, place)
    return whole


def _folder(model: str | Path | None) -> str:
    """Return the folder of one model's part of a comparison of several."""
    return "demo" if model is None else Path(model).name


@dataclass(frozen=True)
class Job:
    """A request whose rows are planned and whose tokens are read, before any weight is.

    plans, caches, dtypes  the rows by label, apart from the float model
    calib, ids             token ids to calibrate and to evaluate on; calib_from, data_from: where they came from
    """

    request: Request
    source: loading.Source
    skeleton: nn.Module
    tokenizer: Any
    plans: dict[str, Plan]
    caches: dict[str, KVFormat]
    dtypes: dict[str, torch.dtype]
    calib: Tensor
    calib_from: dict[str, Any]
    ids: Tensor
    data_from: dict[str, Any]
    tasks: Tasks | None
    fingerprint: str
    common: Overlap

    def options(self) -> dict[str, dict[str, Any]]:
        """Return what the row of each label is made with, in order: only a row made so can be taken over."""
        return {
            FLOAT: {},
            **{label: {"dtype": str(dtype).removeprefix("torch.")} for label, dtype in self.dtypes.items()},
            **{label: wishes.told(plan) for label, plan in self.plans.items()},
            **{label: {"cache": str(fmt)} for label, fmt in self.caches.items()},
        }


def prepare(request: Request, out: Path | None = None, *, resume: bool = False) -> Job:
    """Plan every row, check the tasks and the folders, and read the texts; all of it before any weight is read."""
    recipes = wishes.recipes(request)
    loading.check_device(request.device)
    source = loading.find(request.model, trust_remote_code=request.trust_remote_code)
    caches = wishes.caches(request.methods, source.config)
    skeleton = source.skeleton()
    plans = {label: make(skeleton, chosen, source.dtype) for label, chosen in recipes.items()}
    if out is not None:
        check_report_folder(out, source.path)
    if request.keep is not None:
        _check_kept(Path(request.keep), plans, source, resume=resume)
    tasks = None
    if request.tasks:
        folders = tuple(map(Path, request.task_dirs))
        zeroshot.check(request.tasks, folders, shots=request.shots, limit=request.limit)
        tasks = Tasks(request.tasks, request.shots, request.limit, request.seed, folders)
    tokenizer = loading.tokenizer(source)
    tokens = functools.partial(
        api.token_ids, tokenizer=tokenizer, config=source.config, seq_len=request.seq_len, reading=request.reading
    )
    calib, calib_from = tokens(
        request.calibration, "calibration", count=request.samples, shuffle=request.shuffle, seed=request.seed,
        writer=api.writer_of(source, request.device),
    )  # fmt: skip
    ids, data_from = tokens(request.data, "evaluation", count=request.windows)
    size = _text_bytes(ids, tokenizer)
    data_from = data_from | {"text_bytes": size}
    run = overlap.run_length(size / ids[:, 1:].numel())
    common = overlap.measure(calib, ids, same=overlap.same_text(calib_from, data_from), n=run)
    if common.found:
        data_from["overlap"] = common.share
    if tasks is not None:
        data_from["tasks"] = {
            "names": list(tasks.names), "shots": tasks.shots, "limit": tasks.limit, "seed": tasks.seed,
            "items": zeroshot.digest(tasks.names, tasks.folders),
        }  # fmt: skip
    dtypes = {name: DTYPES[name] for name in request.methods if name in DTYPES}
    return Job(
        request, source, skeleton, tokenizer, plans, caches, dtypes, calib, calib_from, ids, data_from, tasks,
        source.digest(), common,
    )  # fmt: skip


def _text_bytes(ids: Tensor, tokenizer: Any) -> int:
    """Return the UTF-8 bytes of the text that is predicted: all of each window but its first token."""
    texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    firsts = tokenizer.batch_decode(ids[:, :1], clean_up_tokenization_spaces=False)
    whole, skipped = (sum(len(text.encode("utf-8", "replace")) for text in part) for part in (texts, firsts))
    return whole - skipped


def _measure(job: Job, out: Path | None, *, resume: bool, isolate: bool) -> Report:
    """Measure every row of a job that is not done already; each is written as it comes, beside all that are done."""
    earlier = _earlier(out, job) if resume and out is not None else ()
    wished = job.options()
    done = {run.label: run for run in earlier if run.options == wished.get(run.label)}
    others = [run for run in earlier if run.label not in wished]
    together = functools.cache(lambda: _together(job, done))
    runs = dict(done)
    for label in wished:
        if label not in done:
            runs[label] = isolated.measure(job.request, label) if isolate else together()(label)
            if out is not None:
                write_text(out / "report.json", record.to_json(_report(job, [*_ordered(runs, wished), *others])))
    return _report(job, [*_ordered(runs, wished), *others])


def _ordered(runs: Mapping[str, Run], labels: Iterable[str]) -> list[Run]:
    return [runs[label] for label in labels if label in runs]


def measure_one(request: Request, label: str) -> Run:
    """Measure one row of a request alone, as a process of its own does."""
    job = replace(prepare(replace(request, keep=None)), request=request)  # the folders were checked for all rows
    done = {other: cells.failed(other, "") for other in job.options() if other != label}
    return _together(job, done)(label)


def _together(job: Job, done: Mapping[str, Run]) -> Callable[[str], Run]:
    """Load the model, and return what measures a row on it: weights are put back before each."""
    if job.tasks is not None:
        import lm_eval.evaluator  # noqa: F401, so that its memory is not counted with that of the rows
    built = loading.model(job.source, job.request.device)
    reference, score = api.kept_reference(built, job.ids, job.source.fingerprint(job.request.device))
    plans = {label: plan for label, plan in job.plans.items() if label not in done}
    kept = keep_weights(built, plans.values())
    rounded = {label: plan for label, plan in plans.items() if _only_rounds(plan)}
    losses = pipeline.float_losses(built, rounded, job.calib) if rounded else {}
    layers = list(dict.fromkeys(name for plan in plans.values() for name in plan.layers))
    spreads = histograms.layers(built, layers, job.ids[:1])
    ground = Ground(
        job.source, job.tokenizer, job.calib, job.calib_from, job.ids, reference, spreads, job.tasks,
        in_use(torch.device(job.request.device)), None if job.request.keep is None else Path(job.request.keep),
    )  # fmt: skip
    level = cells.float_model(score, job.skeleton, job.source)

    def measure(label: str) -> Run:
        restore_weights(built, kept)
        if label in job.plans:
            return cells.quantized(label, job.plans[label], built, ground, losses.get(label))
        if label in job.caches:
            return cells.cached(label, job.caches[label], built, ground, level)
        if label in job.dtypes:
            return cells.in_dtype(label, job.dtypes[label], built, ground, level)
        return cells.measured(level, score, built, ground)

    return measure


def _only_rounds(plan: Plan) -> bool:
    """Tell whether a method tells no output losses of its own: it only rounds, and collects no Hessian."""
    return plan.needs <= {"extremes"} and not plan.recipe.transforms and not plan.recipe.tuners


def _report(job: Job, runs: Sequence[Run]) -> Report:
    origin = Origin(
        model=job.source.name,
        model_notes=job.source.notes,
        calibration=job.calib_from,
        evaluation=job.data_from,
        machine=record.machine() | {"device": job.request.device},
        versions=record.versions(),
        command=job.request.command,
        created=datetime.date.today().isoformat(),
        fingerprint=job.fingerprint,
    )
    return Report(record.SCHEMA, PROTOCOL, (origin,), tuple(runs))


def _earlier(out: Path, job: Job) -> tuple[Run, ...]:
    """Return the runs of the report in `out`, but for those that failed; PlanError if it is another model's, or made on
    other tokens, versions or machines."""
    if not (out / "report.json").exists():
        return ()
    found = record.from_json((out / "report.json").read_text(encoding="utf-8"))
    ours, theirs = _report(job, ()).origins[0], found.origins[0]
    names = {
        "model": "model",
        "fingerprint": "files of the model",
        "calibration": "calibration tokens",
        "evaluation": "evaluation tokens or tasks",
        "versions": "versions",
        "machine": "machine",
    }
    for name, words in names.items():
        if len(found.origins) > 1 or getattr(ours, name) != getattr(theirs, name):
            raise PlanError(272, f"--resume: the report in {out} was made with other {words}; name another folder.")
    if found.protocol != PROTOCOL:
        raise PlanError(272, f"--resume: the report in {out} was made by another protocol; name another folder.")
    return tuple(run for run in found.runs if "failed" not in run.options)


def keep_weights(model: nn.Module, plans: Iterable[Plan]) -> dict[str, Tensor]:
    """Return copies of the parameters that any plan will overwrite, by name.

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


def restore_weights(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Put the parameters back that `keep_weights` kept, and let no layer round its inputs."""
    activations.remove(model.modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in originals:
                parameter.copy_(originals[name])


def _check_kept(keep: Path, plans: Mapping[str, Plan], source: loading.Source, *, resume: bool) -> None:
    """Refuse, before any work, what no format holds, checkpoints that are there already, and runs taken over."""
    if resume:
        raise PlanError(273, "--resume takes over runs without their checkpoints; leave --keep out.")
    for label, plan in plans.items():
        exporters.check(plan, exporters.choose(plan))
        target = keep / label
        if os.path.lexists(target):
            raise PlanError(271, f"--keep {target} exists; choose another folder, or remove it first.")
        check_target(target, overwrite=False, inputs=(source.path,))
