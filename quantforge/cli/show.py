"""Commands that only show what is there: `quantforge inspect`, `methods` and `formats`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantforge.cli.options import print_result


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Show what each layer of a quantized checkpoint in FOLDER became."""
    from quantforge import checkpoint

    record = checkpoint.read_record(folder)
    table = checkpoint.table(record)  # which also checks it
    print_result(json.dumps(record) if as_json else table)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods(as_json: bool) -> None:
    """List every method with its paper, its options and their defaults."""
    from quantforge import recipe

    found = recipe.catalogue()
    if as_json:
        print_result(json.dumps(found))
        return
    for entry in found:
        print_result(f"{entry['name']}: {entry['about']}\n  {entry['paper']}\n  stores {entry['weights']}")
        if entry["inputs"]:
            print_result(f"  rounds inputs to {entry['inputs']}")
        for key, (kind, default) in entry["options"].items():
            print_result(f"  --set {key}={default}  ({kind})")


@click.command(name="formats")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def formats_(names: tuple[str, ...], as_json: bool) -> None:
    """Show the values of formats, what a weight costs in them and what rounding loses; all of them without NAME.

    NAME is a grid (int4, nf4, e2m1), a float type (bf16), a notation (int4-g64-asym, nf4-dq) or numbers
    (table:-1,0,0.5,1).
    """
    from dataclasses import asdict

    from quantforge.numerics import catalogue

    wanted = [catalogue.find(name) for name in names or catalogue.names()]
    entries = [catalogue.measure(w) for w in wanted]
    print_result(json.dumps([asdict(e) for e in entries]) if as_json else catalogue.text(entries))
