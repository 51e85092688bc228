"""`quantforge verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantforge.cli.options import print_result
from quantforge.errors import ModelError


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--trust-remote-code", is_flag=True, help="Run code that the folder brings.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def verify(ctx: click.Context, folder: Path, trust_remote_code: bool, as_json: bool) -> None:
    """Check every tensor and every key of the checkpoint in FOLDER, and say who can load it."""
    from quantforge.verification import verify as check

    report = check(folder, trust_remote_code=trust_remote_code)
    print_result(json.dumps(report.record()) if as_json else report.text())
    if not report.sound:
        ctx.exit(ModelError.exit_code)
