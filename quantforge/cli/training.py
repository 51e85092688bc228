"""What `distill`, `qat` and `qlora` share: the options of a run, and how it is begun."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from quantforge.cli.options import print_result, text_files, windows_option
from quantforge.errors import RecipeError

if TYPE_CHECKING:
    from quantforge.models.load import Source
    from quantforge.training.cost import Cost
    from quantforge.training.loop import Settings
    from quantforge.training.run import Aim, Job
    from quantforge.training.students import Student

Command = TypeVar("Command", bound=Callable[..., Any])
_SETTINGS = ("steps", "batch_size", "micro_batch", "lr", "schedule", "warmup", "weight_decay", "optimizer", "seed")
_OURS = ("max_grad_norm", "save_every")


def run_options(
    lr: float | None, schedule: str = "cosine", max_grad_norm: float = 1.0, lr_help: str = "Learning rate."
) -> Callable[[Command], Command]:
    """Add the options of text, steps, optimizer, evaluation and output; the arguments are defaults."""

    def add(command: Command) -> Command:
        for option in (
            click.option("--dry-run", is_flag=True, help="Show memory by part and operations, then stop."),
            click.option("--resume", is_flag=True, help="Go on with the run that --out holds."),
            click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path),
                         help="Folder of the checkpoint, the report and the state to resume from."),
            click.option("--texts", default=0, show_default=True, type=click.IntRange(0), metavar="N",
                         help="Texts that both models write at the end, to be compared in the report."),
            windows_option,
            click.option("--eval-seq-len", type=click.IntRange(2), metavar="N",
                         help="Tokens of an evaluation window; default: 512, or the model's positions."),
            click.option("--eval", "evaluation", default="python-docs", show_default=True, metavar="SET|FILE",
                         help="Evaluation text, scored before and after."),
            click.option("--save-every", default=100, show_default=True, type=int, metavar="N",
                         help="Steps after which the state is kept."),
            click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1),
                         help="Of the order of windows and of all that is drawn."),
            click.option("--max-grad-norm", default=max_grad_norm, show_default=True, type=float, metavar="X",
                         help="Larger gradients are scaled down to this norm; 0: never."),
            click.option("--optimizer", default="adamw", show_default=True,
                         metavar="adamw|adamw8bit|paged-adamw|paged-adamw8bit", help="States in 32 or 8 bits."),
            click.option("--weight-decay", default=0.0, show_default=True, type=float, help="Of matrices."),
            click.option("--warmup", default=0, show_default=True, type=int, metavar="N", help="Steps."),
            click.option("--schedule", default=schedule, show_default=True, metavar="constant|cosine|linear",
                         help="Of the learning rate."),
            click.option("--lr", default=lr, show_default=lr is not None, type=float, metavar="X", help=lr_help),
            click.option("--micro-batch", type=int, metavar="N", help="Windows at once; default: all of a step."),
            click.option("--batch-size", default=4, show_default=True, type=int, metavar="N",
                         help="Windows of a step."),
            click.option("--steps", default=100, show_default=True, type=int, metavar="N", help="Optimizer steps."),
            click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2),
                         help="Tokens of a training window."),
            click.option("--samples", type=click.IntRange(1), metavar="N",
                         help="Training windows; default: all of the text."),
            click.option("--data", default="python-docs", show_default=True, metavar="SET|FILE|self",
                         help="Training text; self: what the teacher writes by itself."),
        ):  # fmt: skip
            command = option(command)
        return text_files(command)

    return add


def on_the_fly(command: Command) -> Command:
    """Add the options that quantize a float student first."""
    for option in (
        click.option("--calib-samples", default=64, show_default=True, type=click.IntRange(1),
                     help="Windows that --method calibrates on."),
        click.option("--calib", default="python-docs", show_default=True, metavar="SET|FILE|self",
                     help="Text that --method calibrates on."),
        click.option("--bits", type=int, metavar="2..8", help="Bits of a code; default: the method's."),
        click.option("--method", "-m", metavar="NAME", help="Quantize the student first; see `quantforge methods`."),
    ):  # fmt: skip
        command = option(command)
    return command


def settings_of(options: dict[str, Any]) -> Settings:
    """Return the settings of the loop, taken out of the options; RecipeError for impossible ones."""
    from quantforge.training.loop import Settings

    found = {name: options.pop(name) for name in (*_SETTINGS, *_OURS)}
    found["max_grad_norm"] = found["max_grad_norm"] or None
    return Settings(**found)


def calibration_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `api.token_ids` for a method's calibration, taken out of the options."""
    return {"text": options.pop("calib"), "count": options.pop("calib_samples")}


def refuse_unused(names: Collection[str], why: str) -> None:
    """Raise RecipeError if one of these parameters was given on the command line, where nothing looks at it."""
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise RecipeError(249, f"{option.opts[0]} {why}")


def folders(*models: str | None) -> tuple[Path, ...]:
    """Return the models that are folders, into which nothing may be written."""
    return tuple(Path(model) for model in models if model is not None and Path(model).is_dir())


def job_of(kind: str, teacher: Source | None, aim: Aim, options: dict[str, Any], **more: Any) -> Job:
    """Return what is to be done, from what is left of the options."""
    from quantforge.calibrate.text_files import Reading
    from quantforge.training.run import Job

    settings = settings_of(options)
    reading = Reading(*(options.pop(name) for name in ("encoding", "errors", "bad_lines")))
    more |= {"windows": options.pop("windows") or None, "prompts": options.pop("texts"), "reading": reading}
    command = shlex.join(["quantforge", *sys.argv[1:]])
    names = ("data", "samples", "seq_len", "evaluation", "eval_seq_len", "out", "resume", "device")
    wishes = {name: options.pop(name) for name in names}
    return Job(kind, teacher, aim, settings, command=command, **wishes, **more)


def begin(job: Job, build: Callable[[], Student], cost: Callable[[], Cost], *, dry_run: bool, as_json: bool) -> None:
    """Check the job, then show what it takes, or build the student, train it, and print what came of it."""
    from dataclasses import asdict

    from quantforge.training import pages, results, run

    run.check(job)
    if dry_run:
        found = cost()
        print_result(json.dumps(asdict(found)) if as_json else found.table())
        return
    if job.out is None:
        raise RecipeError(213, "--out DIR is missing: where should the run be kept? (--dry-run needs none)")
    made = run.run(build, job)
    if made.after is None:
        return  # another process has it
    print_result(results.to_json(made) if as_json else f"{pages.to_text(made)}\n{job.out / 'training.html'}")
