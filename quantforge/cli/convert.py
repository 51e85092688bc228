"""`quantforge convert`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantforge.cli.options import print_result
from quantforge.errors import RecipeError


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--format",
    "container",
    required=True,
    metavar="FORMAT",
    help="compressed-tensors, gptq, awq, bitsandbytes, gguf or native.",
)
@click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint in --out, once the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Check it and show what each layer would become, then stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def convert(folder: Path, container: str, out: Path | None, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    """Write the quantized checkpoint in FOLDER in another format, if that holds exactly the same numbers.

    It opens checkpoints that quantforge wrote; those of other software do not say how they were made.
    """
    if out is None and not dry_run:
        raise RecipeError(213, "--out DIR is missing: where should the checkpoint go? (--dry-run needs none)")
    from quantforge import conversion

    if dry_run or out is None:
        made = conversion.prepare(folder, container)
    else:
        made = conversion.convert(folder, container, out, overwrite=overwrite)
    print_result(json.dumps(made.record()) if as_json else made.text())
