"""`quantforge qlora`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantforge.cli.options import machine
from quantforge.cli.training import begin, calibration_of, job_of, on_the_fly, run_options

if TYPE_CHECKING:
    from quantforge.training.cost import Cost
    from quantforge.training.students import Student


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
@run_options(lr=2e-4)
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

    Saves adapters that peft loads. The base stays as it is, byte for byte.
    """
    from quantforge import plan as planning
    from quantforge import recipe
    from quantforge.checkpoint import is_quantized
    from quantforge.errors import RecipeError
    from quantforge.models import load
    from quantforge.training import cost, run
    from quantforge.training.qlora import Adapters
    from quantforge.training.run import Aim

    adapters = Adapters(rank, alpha, dropout, start, checkpointing, options["seed"])
    calibration = calibration_of(options)
    taught = None if teacher is None else load.find(teacher, trust_remote_code=trust_remote_code)
    job = job_of("qlora", taught, Aim("ce" if taught is None else "fkl"), options, chunk=chunk)
    kept = model is not None and os.path.isdir(model) and is_quantized(Path(model))
    if kept and method is not None:
        raise RecipeError(249, "the base is quantized already: leave out --method, or name its float model.")
    chosen = None if kept else recipe.load(method or "nf4", bits=bits)
    source = None if kept else load.find(model, trust_remote_code=trust_remote_code)

    def build() -> Student:
        from quantforge.training import students

        if source is None or chosen is None:
            result, facts = students.opened(str(model), job.device)
            return students.adapted(result, adapters, facts)
        result = students.quantize(source, chosen, job.device, calibration)
        floats = load.model(source, job.device) if start == "lorc" else None
        return students.adapted(result, adapters, students.recipe_facts(source, chosen, calibration), floats)

    def costs() -> Cost:
        if source is None or chosen is None:
            raise RecipeError(249, "--dry-run of qlora needs a float model, from whose shapes it counts.")
        plan = planning.make(source.skeleton(), chosen, source.dtype)
        trained = cost.adapters(plan, rank)
        weights = plan.bytes_after + 4 * trained
        return run.cost(job, source.config, weights=weights, trained=trained, checkpointing=checkpointing)

    begin(job, build, costs, dry_run=dry_run, as_json=as_json)
