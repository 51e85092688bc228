"""`quantforge distill`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantforge.cli.options import machine, parse_list, parse_overrides, parse_settings, weight_format
from quantforge.cli.training import begin, calibration_of, folders, job_of, on_the_fly, refuse_unused, run_options
from quantforge.errors import RecipeError

if TYPE_CHECKING:
    from quantforge.models.load import Source
    from quantforge.recipe import Recipe
    from quantforge.training.cost import Cost
    from quantforge.training.run import Job
    from quantforge.training.students import Student

_OF_METHOD = frozenset(
    {"bits", "group_size", "symmetric", "weights", "inputs", "settings", "overrides", "calib", "calib_samples"}
)


@click.command()
@click.argument("student", required=False)
@click.option("--teacher", metavar="MODEL|demo", help="The float model to learn from; default: the demo model, if that "
              "is the student too.")  # fmt: skip
@click.option("--loss", default="fkl", show_default=True, metavar="fkl|rkl|jsd|skew-kl|gkd|minillm|ce",
              help="What is made small.")  # fmt: skip
@click.option("--train", "parts", default="", metavar="PART,…",
              help="Of a quantized student: scales, zero-points, norms, factors, biases, weights. "
              "[default: scales,norms]")  # fmt: skip
@click.option("--blocks", type=int, metavar="N", help="Cut the student out of a float model: so many of its blocks.")
@on_the_fly
@weight_format
@click.option("--temperature", default=1.0, show_default=True, type=float, help="Of both models' predictions.")
@click.option("--hard", default=0.0, show_default=True, type=float, help="Share of cross-entropy with the text.")
@click.option("--beta", default=0.5, show_default=True, type=float, help="Of jsd and gkd: JSD(beta).")
@click.option("--normalized", is_flag=True, help="JSD / (beta (1 - beta)), continuous at both ends.")
@click.option("--skew", default=0.1, show_default=True, type=float, help="Of skew-kl: the teacher's share.")
@click.option("--lambda", "share", default=0.5, show_default=True, type=float,
              help="Of gkd: share of steps on text that the student writes.")  # fmt: skip
@click.option("--alpha", default=0.2, show_default=True, type=float,
              help="Of minillm: the teacher's share in what texts are drawn from.")  # fmt: skip
@click.option("--prompt", default=64, show_default=True, type=int,
              help="Tokens of a window that gkd, minillm and --rewritten write on from.")  # fmt: skip
@click.option("--hidden", default=0.0, show_default=True, type=float,
              help="Weight of the squared error between what both models' blocks give, added.")  # fmt: skip
@click.option("--rewritten", is_flag=True,
              help="Train on what the teacher writes after the prompt of each window.")  # fmt: skip
@click.option("--targets", default="live", show_default=True, metavar="live|kept",
              help="Run the teacher beside the student, or keep its predictions in --out.")  # fmt: skip
@click.option("--chunk", type=click.IntRange(1), metavar="N", help="Tokens whose logits exist at once, to save memory.")
@run_options(lr=None, lr_help="Learning rate, of scales, norms and factors relative to their size; default: 2e-3 "
             "where only these are trained, else 1e-4.")  # fmt: skip
@machine
def distill(
    student: str | None,
    teacher: str | None,
    parts: str,
    blocks: int | None,
    method: str | None,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    weights: str | None,
    inputs: str | None,
    settings: tuple[str, ...],
    overrides: tuple[str, ...],
    dry_run: bool,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train STUDENT towards a teacher: a float model, a quantized checkpoint, or a model that --method quantizes."""
    from quantforge import recipe
    from quantforge.api import DEMO
    from quantforge.checkpoint import is_quantized
    from quantforge.models import load
    from quantforge.training.run import Aim

    names = ("loss", "temperature", "hard", "beta", "normalized", "skew", "share", "alpha", "prompt", "hidden")
    aim = Aim(**{name: options.pop(name) for name in names})
    others = set(names[1:]) - set(aim.looks_at) - ({"prompt"} if options["rewritten"] else set())
    refuse_unused(
        others, f"is nothing that loss {aim.loss} looks at; it looks at: {', '.join(aim.looks_at) or 'nothing'}."
    )
    calibration = calibration_of(options)
    more = {name: options.pop(name) for name in ("targets", "chunk", "rewritten")}
    kept = student is not None and os.path.isdir(student) and is_quantized(Path(student))
    if method is None:
        refuse_unused(_OF_METHOD, "is of a --method that quantizes the student; name one, such as gptq.")
    _check_together(kept=kept, method=method, parts=parts, blocks=blocks)
    if teacher is None and aim.loss != "ce" and student is not None:
        raise RecipeError(249, f"loss {aim.loss} needs a teacher; name one by --teacher, or take the loss ce.")
    taught = aim.loss != "ce" or teacher is not None
    named = None if teacher == DEMO else teacher  # the demo model, whatever else is called so
    found = load.find(named, trust_remote_code=trust_remote_code) if taught else None
    wanted = tuple(parse_list(parts)) or ("scales", "norms")
    if options["lr"] is None:
        options["lr"] = 2e-3 if (kept or method) and not {"weights", "biases"} & set(wanted) else 1e-4
    job = job_of("distill", found, aim, options, inputs=folders(student, named), **more)
    source = None if kept else load.find(student, trust_remote_code=trust_remote_code)
    chosen = None
    if method is not None:
        chosen = recipe.load(
            method,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            weights=weights,
            inputs=inputs,
            settings=parse_settings(settings),
            overrides=parse_overrides(overrides),
        )

    def build() -> Student:
        from quantforge.training import students

        if source is None:
            result, facts = students.opened(str(student), job.device)
            return students.quantized(result, facts, wanted)
        if chosen is None:
            return students.floats(source, job.device, blocks)
        result = students.quantize(source, chosen, job.device, calibration)
        return students.quantized(result, students.recipe_facts(source, chosen, result), wanted)

    def cost() -> Cost:
        return _cost(job, source, chosen, wanted, blocks, student)

    begin(job, build, cost, dry_run=dry_run, as_json=as_json)


def _check_together(*, kept: bool, method: str | None, parts: str, blocks: int | None) -> None:
    """Refuse options that say nothing of this student."""
    if method is not None and kept:
        raise RecipeError(249, "the student is quantized already: leave out --method, or name its float model.")
    if parts and method is None and not kept:
        raise RecipeError(249, f"--train {parts} is of a quantized student; all of a float one is trained.")
    if blocks is not None and (kept or method is not None):
        raise RecipeError(249, "--blocks cuts a float student; distill it first, and quantize what comes of it.")


def _cost(
    job: Job, source: Source | None, chosen: Recipe | None, parts: tuple[str, ...], blocks: int | None, name: str | None
) -> Cost:
    """Return what the run takes."""
    from quantforge import api
    from quantforge.training import cost, cut, recover, run, students

    if source is None:
        result, _ = students.opened(str(name), "cpu")
        trained = sum(students.trained(recover.open_student(result, parts)).values())
        config: Any = result.model.config
        held = cost.held(result.plan, unpacked=True)
        return run.cost(job, config, weights=held + 4 * trained, trained=trained)
    if chosen is None:
        config = source.config if blocks is None else cut.config_of(source.config, blocks)
        count = cost.parameters(config)
        return run.cost(job, config, weights=4 * count, trained=count)
    skeleton, plan = source.skeleton(), api.prepare(source, chosen, None)
    trained = cost.planned(plan, skeleton, parts)
    return run.cost(job, source.config, weights=cost.held(plan, unpacked=True) + 4 * trained, trained=trained)
