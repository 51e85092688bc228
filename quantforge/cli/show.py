"""Commands that only show what is there: `quantforge inspect`, `methods` and `formats`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantforge.cli.options import machine, print_result
from quantforge.errors import clean

if TYPE_CHECKING:
    from quantforge.numerics.problem import QWeight
    from quantforge.stored import Stored


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@machine
def inspect(folder: Path, device: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show what each layer of a quantized checkpoint in FOLDER became, and what computes with it on this machine."""
    from quantforge import checkpoint, stored
    from quantforge.errors import ModelError
    from quantforge.models.load import check_device
    from quantforge.store import MARK

    check_device(device)
    record, table, layers, notes = None, "", {}, []
    if (folder / MARK).exists() or not checkpoint.is_quantized(folder):
        record = checkpoint.read_record(folder)
        table = checkpoint.table(record)  # which also checks it
    try:
        opened = stored.open_folder(folder, trust_remote_code=trust_remote_code)
        layers = stored.read_layers(opened)[0]
        operators = _operators(opened, layers, device)
    except ModelError as error:
        if record is None:
            raise
        operators, notes = {}, [f"note: its files were not read: {error}"]
    found = {name: {"operator": operator, "reason": why} for name, (operator, why) in operators.items()}
    if as_json:
        print_result(json.dumps({**(record or {"layers": checkpoint.rows_of(layers)}), "operators": found}))
        return
    lines = [table or checkpoint.table_of(layers), *notes]
    for pair, count in Counter(operators.values()).items():
        lines.append(f"computed by {pair[0]}: {count} layers" + (f" ({clean(pair[1])})" if pair[1] else ""))
    print_result("\n".join(lines))


def _operators(opened: Stored, layers: dict[str, QWeight], device: str) -> dict[str, tuple[str, str]]:
    """Return what computes with each layer of a checkpoint on `device`, and why, as loading it would choose."""
    from torch import nn

    from quantforge import stored
    from quantforge.models import load, moe
    from quantforge.runtime import table

    with load.quiet():
        model = stored.skeleton(opened)
    moe.unfuse(model)
    modules, found = dict(model.named_modules()), {}
    for name, weight in layers.items():
        module = modules.get(name)
        if isinstance(module, nn.Linear):
            found[name] = table.operator_of(weight, device, opened.dtype)
        else:
            found[name] = table.REFERENCE, f"it is a {type(module).__name__}, no nn.Linear"
    return found


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
