"""`quantforge quantize`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from quantforge.calibrate.text_files import Reading
from quantforge.cli.options import (
    calibration,
    machine,
    parse_overrides,
    parse_settings,
    print_result,
    text_files,
    weight_format,
)
from quantforge.errors import RecipeError


@click.command()
@click.argument("model", required=False)
@click.option("--method", "-m", default="gptq", show_default=True, metavar="NAME", help="See `quantforge methods`.")
@click.option("--bits", type=int, metavar="2..8", help="Bits of a code; default: the method's.")
@weight_format
@calibration
@click.option("--dynamic", is_flag=True, help="Find the inputs that stay in float anew in every call (llm-int8).")
@click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint in --out, once the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Show what each layer would become, then stop.")
@text_files
@machine
def quantize(
    model: str | None,
    method: str,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    weights: str | None,
    inputs: str | None,
    settings: tuple[str, ...],
    overrides: tuple[str, ...],
    calib: str,
    samples: int,
    seq_len: int,
    shuffle: bool,
    seed: int,
    dynamic: bool,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    encoding: str,
    errors: str,
    bad_lines: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL (a folder or a hub id; the demo model if left out) into a checkpoint that loads by itself."""
    reading = Reading(encoding, errors, bad_lines)
    changed = parse_settings(settings) | ({"inputs.dynamic": True} if dynamic else {})
    if dry_run:
        from quantforge import api, recipe
        from quantforge.calibrate import corpus
        from quantforge.models import load

        chosen = recipe.load(
            method,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            weights=weights,
            inputs=inputs,
            settings=changed,
            overrides=parse_overrides(overrides),
        )
        load.check_device(device)
        corpus.check_name(calib, "calibration")
        source = load.find(model, trust_remote_code=trust_remote_code)
        plan = api.prepare(source, chosen, out, overwrite=overwrite)
        if plan.needs:
            api.check_length(source.config, seq_len)
        print_result(json.dumps(plan.record()) if as_json else plan.table())
        return
    if out is None:
        raise RecipeError(213, "--out DIR is missing: where should the checkpoint go? (--dry-run needs none)")
    import quantforge

    result = quantforge.quantize(
        model,
        method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        weights=weights,
        inputs=inputs,
        calibration=calib,
        samples=samples,
        seq_len=seq_len,
        shuffle=shuffle,
        seed=seed,
        device=device,
        settings=changed,
        overrides=parse_overrides(overrides),
        out=out,
        overwrite=overwrite,
        reading=reading,
        trust_remote_code=trust_remote_code,
    )
    where = shlex.quote(str(out))
    print_result(json.dumps(result.record()) if as_json else f"{result.summary()}\nnext: quantforge evaluate {where}")
