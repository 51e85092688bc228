"""`quantforge qat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from quantforge.cli.options import machine
from quantforge.cli.training import begin, folders, job_of, run_options

if TYPE_CHECKING:
    from quantforge.training.cost import Cost
    from quantforge.training.students import Student


@click.command()
@click.argument("model", required=False)
@click.option("--weights", default="int4-channel-sym", show_default=True, metavar="FORMAT", help="How weights are "
              "stored and trained.")  # fmt: skip
@click.option("--inputs", default="int8-token", show_default=True, metavar="FORMAT|none",
              help="How layers round their inputs.")  # fmt: skip
@click.option("--kv", default="int8-token", show_default=True, metavar="FORMAT|none",
              help="How keys and values are rounded before they are cached.")  # fmt: skip
@click.option("--grad-clip-value", "limit", type=float, metavar="X",
              help="No gradient reaches larger weights (2.0 in the authors' code); default: all get it.")  # fmt: skip
@run_options(lr=2e-5)
@machine
def qat(
    model: str | None,
    weights: str,
    inputs: str,
    kv: str,
    limit: float | None,
    dry_run: bool,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train MODEL with weights, inputs and cache rounded in its forward, by its own float predictions (LLM-QAT).

    With --data self it needs no data: the float model writes its training text.
    """
    from quantforge import api, recipe
    from quantforge.models import load
    from quantforge.training import cost, run
    from quantforge.training.run import Aim

    source = load.find(model, trust_remote_code=trust_remote_code)
    job = job_of("qat", source, Aim("fkl"), options, inputs=folders(model))
    chosen = recipe.load("rtn", weights=weights, inputs=None if inputs == "none" else inputs)
    cache = None if kv == "none" else api.cache_format(kv)

    def build() -> Student:
        from quantforge.training import students

        return students.rounded(source, chosen, job.device, kv=cache, limit=limit)

    def costs() -> Cost:
        skeleton = source.skeleton()
        plan = api.prepare(source, chosen, None)
        trained = cost.planned(plan, skeleton, ("weights", "norms", "biases"))
        return run.cost(job, source.config, weights=4 * cost.parameters(source.config), trained=trained)

    begin(job, build, costs, dry_run=dry_run, as_json=as_json)
