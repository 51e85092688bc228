"""`quantforge compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from quantforge.cli.options import (
    calibration,
    machine,
    parse_list,
    parse_overrides,
    parse_settings,
    print_result,
    weight_format,
    windows_option,
)
from quantforge.errors import RecipeError


@click.command()
@click.argument("model", required=False)
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
@click.option(
    "--out", "-o", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the report."
)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Folder to keep every checkpoint in.")
@click.option("--resume", is_flag=True, help="Take over the runs that an interrupted comparison left in --out.")
@machine
def compare(
    model: str | None,
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
    out: Path,
    keep: Path | None,
    resume: bool,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL by several methods and widths, and report perplexity, KL, bits, bytes and time side by side."""
    widths = parse_list(bits)
    if not all(w.isdecimal() for w in widths):
        raise RecipeError(211, f"--bits {bits!r} is not a list of whole numbers, such as 4,3.")
    import quantforge
    from quantforge import record, report

    found = quantforge.compare(
        model,
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
        device=device,
        settings=parse_settings(settings),
        overrides=parse_overrides(overrides),
        out=out,
        keep=keep,
        resume=resume,
        trust_remote_code=trust_remote_code,
        command=shlex.join(["quantforge", *sys.argv[1:]]),
    )
    print_result(record.to_json(found) if as_json else f"{report.table(found)}\n{out / 'report.html'}")
