"""`quantforge quantize`."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantforge import stopping
from quantforge.calibrate.text_files import Reading
from quantforge.cli.options import (
    calibration,
    machine,
    parse_overrides,
    parse_settings,
    parse_size,
    print_result,
    text_files,
    weight_format,
)
from quantforge.errors import RecipeError

if TYPE_CHECKING:
    from quantforge.models.load import Source
    from quantforge.plan import Plan


@click.command()
@click.argument("model", required=False)
@click.option("--method", "-m", default="gptq", show_default=True, metavar="NAME", help="See `quantforge methods`.")
@click.option("--bits", type=int, metavar="2..8", help="Bits of a code; default: the method's.")
@weight_format
@calibration
@click.option("--dynamic", is_flag=True, help="Find the inputs that stay in float anew in every call (llm-int8).")
@click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option(
    "--format",
    metavar="NAME",
    help="Checkpoint to write: compressed-tensors, gptq, awq, bitsandbytes, gguf or native; default: by the method.",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint in --out, once the new one is whole.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier, unfinished run to --out has done.")
@click.option("--strict", is_flag=True, help="Make any fallback, such as more damping, an error.")
@click.option("--max-memory", metavar="SIZE", help="Memory of the whole process, e.g. 8GB; default: what is free.")
@click.option("--dry-run", is_flag=True, help="Show what each layer would become, and what the run takes; then stop.")
@click.option("--probe", is_flag=True, help="With --dry-run: quantize one block for real, to tell the time by it.")
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="With --dry-run: show what serving takes with N tokens of context.",
)
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
    format: str | None,
    overwrite: bool,
    restart: bool,
    strict: bool,
    max_memory: str | None,
    dry_run: bool,
    probe: bool,
    context: int | None,
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
    budget = None if max_memory is None else parse_size("--max-memory", max_memory)
    if (probe or context is not None) and not dry_run:
        raise RecipeError(
            235, f"{'--probe' if probe else '--context'} goes with --dry-run, which stops before the run."
        )
    if dry_run:
        from quantforge import api, exporters, recipe
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
            fix=None if format is None else exporters.named(format).fix,
        )
        load.check_device(device)
        corpus.check_name(calib, "calibration")
        source = load.find(model, trust_remote_code=trust_remote_code)
        plan = api.prepare(source, chosen, out, overwrite=overwrite, format=format)
        if plan.needs:
            api.check_length(source.config, seq_len)
        print_result(
            _foretold(plan, source, out, samples, seq_len, budget, context, device if probe else None, as_json=as_json)
        )
        return
    if out is None:
        raise RecipeError(213, "--out DIR is missing: where should the checkpoint go? (--dry-run needs none)")
    import quantforge

    command = shlex.join(["quantforge", *(part for part in sys.argv[1:] if part != "--restart")])
    with stopping.watching(command):  # what can be gone on with comes to a good end first
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
            format=format,
            reading=reading,
            strict=strict,
            trust_remote_code=trust_remote_code,
            max_memory=budget,
            restart=restart,
            command=command,
        )
    where = shlex.quote(str(out))
    if as_json:
        print_result(json.dumps({**result.record(), "loaders": [asdict(loader) for loader in result.loaders]}))
        return
    print_result("\n".join([result.summary(), *map(str, result.loaders), f"next: quantforge evaluate {where}"]))


def _foretold(
    plan: Plan,
    source: Source,
    out: Path | None,
    samples: int,
    seq_len: int,
    budget: int | None,
    context: int | None,
    probed: str | None,
    *,
    as_json: bool,
) -> str:
    """Return what a run will take, as text or JSON; ResourceError where it would not fit.

    context  tokens that serving is to hold; None: serving is not asked about
    probed   the device on which one block is quantized for real; None: none is
    """
    from quantforge import journal, preflight
    from quantforge.models import load
    from quantforge.preflight import probe, serving

    found = preflight.estimate(
        plan, source, samples=samples, seq_len=seq_len, max_memory=budget, tokenizer=load.tokenizer(source)
    )
    if probed is not None:
        found = probe.measured(found, plan, source, samples=samples, seq_len=seq_len, device=probed)
    preflight.check_memory(found, plan)
    if out is not None:
        preflight.check_disk(found, out, journal.size(out))
    record, lines = {**plan.record(), "estimate": found.record()}, found.table().splitlines()
    if context is not None:
        served = serving.caches(source.config, context, plan.dtype)
        record["serving"] = {"context": context, "weights": found.output.weights, "caches": served}
        lines += serving.table(found.output.weights, context, served)
    return json.dumps(record) if as_json else plan.table(lines)
