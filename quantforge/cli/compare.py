"""`quantforge compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from quantforge.calibrate.text_files import Reading
from quantforge.cli.options import (
    calibration,
    machine,
    parse_list,
    parse_overrides,
    parse_settings,
    print_result,
    print_warning,
    tasks_options,
    text_files,
    weight_format,
    windows_option,
)
from quantforge.errors import RecipeError


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option(
    "--methods",
    default="fp,rtn,gptq",
    show_default=True,
    help="Methods or suites (all-weights, all-activations, …), comma-separated; fp is the float model.",
)
@click.option("--bits", default="4", show_default=True, help="Comma-separated; --weights takes their place.")
@weight_format
@calibration
@click.option("--data", default="python-docs", show_default=True, metavar="SET|FILE", help="Evaluation text.")
@windows_option
@tasks_options
@click.option(
    "--out", "-o", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the report."
)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Folder to keep every checkpoint in.")
@click.option("--resume", is_flag=True, help="Take over the runs that an interrupted comparison left in --out.")
@click.option("--isolate", is_flag=True, help="Measure each row in a process of its own; one that dies costs its row.")
@text_files
@machine
def compare(
    models: tuple[str, ...],
    methods: str,
    bits: str,
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
    data: str,
    windows: int,
    tasks: str,
    suite: str | None,
    task_dirs: tuple[Path, ...],
    shots: int | None,
    limit: int | None,
    out: Path,
    keep: Path | None,
    resume: bool,
    isolate: bool,
    encoding: str,
    errors: str,
    bad_lines: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL by several methods and widths, and report perplexity, KL, bits, bytes and time side by side.

    Several MODELs, such as a small float model and a larger one to quantize, come into one report.
    """
    widths = parse_list(bits)
    if not all(w.isdecimal() for w in widths):
        raise RecipeError(211, f"--bits {bits!r} is not a list of whole numbers, such as 4,3.")
    import quantforge
    from quantforge import record, report

    found = quantforge.compare(
        models or None,
        methods=parse_list(methods),
        bits=[int(w) for w in widths],
        group_size=group_size,
        symmetric=symmetric,
        weights=weights,
        inputs=inputs,
        calibration=calib,
        samples=samples,
        seq_len=seq_len,
        shuffle=shuffle,
        seed=seed,
        data=data,
        windows=windows or None,
        tasks=parse_list(tasks),
        suite=suite,
        task_dirs=task_dirs,
        shots=shots,
        limit=limit,
        device=device,
        settings=parse_settings(settings),
        overrides=parse_overrides(overrides),
        out=out,
        keep=keep,
        resume=resume,
        isolate=isolate,
        reading=Reading(encoding, errors, bad_lines),
        trust_remote_code=trust_remote_code,
        command=shlex.join(["quantforge", *sys.argv[1:]]),
        warn=print_warning,
    )
    print_result(record.to_json(found) if as_json else f"{report.table(found)}\n{out / 'report.html'}")
