"""`quantforge qlora`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantforge.cli.options import machine
from quantforge.cli.training import begin, calibration_of, folders, job_of, on_the_fly, refuse_unused, run_options

if TYPE_CHECKING:
    from quantforge.training.cost import Cost
    from quantforge.training.students import Student

_OF_METHOD = frozenset({"method", "bits", "calib", "calib_samples"})


@click.command()
@click.argument("model", required=False)
@on_the_fly
@click.option("--rank", default=64, show_default=True, type=int, metavar="R", help="Of the adapters.")
@click.option("--alpha", default=16.0, show_default=True, type=float, help="Their weight is alpha / rank.")
@click.option("--dropout", default=0.0, show_default=True, type=float, help="Of the adapters' inputs.")
@click.option("--start", default="zero", show_default=True, metavar="zero|lorc",
              help="Where adapters begin: at nothing, or at the low-rank part of the base's error.")  # fmt: skip
@click.option("--checkpointing", is_flag=True, help="Run blocks again in the backward pass, to save memory.")
@click.option("--teacher", metavar="MODEL", help="Learn its predictions by forward KL; default: learn the text.")
@click.option("--chunk", type=click.IntRange(1), metavar="N", help="Tokens whose logits exist at once, to save memory.")
@run_options(lr=2e-4, schedule="constant", max_grad_norm=0.3)
@machine
def qlora(
    model: str | None,
    method: str | None,
    bits: int | None,
    rank: int,
    alpha: float,
    dropout: float,
    start: str,
    checkpointing: bool,
    teacher: str | None,
    chunk: int | None,
    dry_run: bool,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train LoRA adapters on MODEL, frozen in 4 bits: a quantized checkpoint, or a float model, by nf4 unless --method.

    Saves adapters that peft loads. The base stays as it is, byte for byte; one made here is saved beside them.
    """
    from quantforge import api, recipe
    from quantforge.checkpoint import is_quantized
    from quantforge.models import load
    from quantforge.training import cost, run, students
    from quantforge.training.qlora import Adapters
    from quantforge.training.run import Aim

    adapters = Adapters(rank, alpha, dropout, start, checkpointing, options["seed"])
    calibration = calibration_of(options)
    taught = None if teacher is None else load.find(teacher, trust_remote_code=trust_remote_code)
    aim = Aim("ce" if taught is None else "fkl")
    job = job_of("qlora", taught, aim, options, chunk=chunk, inputs=folders(model, teacher))
    kept = model is not None and os.path.isdir(model) and is_quantized(Path(model))
    if kept:
        refuse_unused(_OF_METHOD, "is of a base that is quantized here, and this one is; name its float model.")
    chosen = None if kept else recipe.load(method or "nf4", bits=bits)
    source = None if kept else load.find(model, trust_remote_code=trust_remote_code)
    own = Path() if job.out is None else (job.out / "base").resolve()

    def build() -> Student:
        if source is None or chosen is None:
            result, facts = students.opened(str(model), job.device)
            whole = Path(str(model)).resolve() if start == "zero" else own
            return students.adapted(result, adapters, facts, whole)
        result = students.quantize(source, chosen, job.device, calibration)
        floats = load.model(source, job.device) if start == "lorc" else None
        return students.adapted(result, adapters, students.recipe_facts(source, chosen, result), own, floats)

    def costs() -> Cost:
        if source is None or chosen is None:
            result, _ = students.opened(str(model), "cpu")
            plan, config = result.plan, result.model.config
        else:
            plan, config = api.prepare(source, chosen, None), source.config
        trained = cost.adapters(plan, rank)
        weights = cost.held(plan, unpacked=False) + 4 * trained
        return run.cost(job, config, weights=weights, trained=trained, checkpointing=checkpointing)

    begin(job, build, costs, dry_run=dry_run, as_json=as_json)
