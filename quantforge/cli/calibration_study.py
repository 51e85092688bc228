"""`quantforge calibration-study`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from quantforge.calibrate.text_files import Reading
from quantforge.cli.options import (
    machine,
    parse_list,
    parse_overrides,
    parse_settings,
    print_result,
    print_warning,
    text_files,
    weight_format,
    windows_option,
)
from quantforge.errors import RecipeError


@click.command("calibration-study")
@click.argument("model", required=False)
@click.option("--method", "-m", default="gptq", show_default=True, metavar="NAME", help="See `quantforge methods`.")
@click.option("--bits", type=int, metavar="2..8", help="Bits of a code; default: the method's.")
@weight_format
@click.option(
    "--calib",
    default="python-docs",
    show_default=True,
    metavar="SET|FILE|self,…",
    help="Calibration texts to compare; self: what the float model itself writes.",
)
@click.option("--samples", default="16,64", show_default=True, metavar="N,…", help="Numbers of windows to compare.")
@click.option("--seq-lens", default="256,512", show_default=True, metavar="N,…", help="Tokens of a window to compare.")
@click.option("--seeds", default="0,1,2", show_default=True, metavar="N,…", help="Each draws its windows in each cell.")
@click.option("--data", default="python-docs", show_default=True, metavar="SET|FILE", help="Evaluation text.")
@click.option(
    "--eval-seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens of an evaluation window."
)
@windows_option
@click.option(
    "--out", "-o", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the report."
)
@click.option("--resume", is_flag=True, help="Take over the runs that an interrupted or smaller study left in --out.")
@text_files
@machine
def calibration_study(
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
    samples: str,
    seq_lens: str,
    seeds: str,
    data: str,
    eval_seq_len: int,
    windows: int,
    out: Path,
    resume: bool,
    encoding: str,
    errors: str,
    bad_lines: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL on every choice of calibration text, samples and length, and tell what is more than chance."""
    numbers = [_numbers(*pair) for pair in (("--samples", samples), ("--seq-lens", seq_lens), ("--seeds", seeds))]
    from quantforge.calibration_study import pages, results, run

    found = run.calibration_study(
        model,
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        weights=weights,
        inputs=inputs,
        settings=parse_settings(settings),
        overrides=parse_overrides(overrides),
        calibrations=parse_list(calib),
        samples=numbers[0],
        seq_lens=numbers[1],
        seeds=numbers[2],
        data=data,
        eval_seq_len=eval_seq_len,
        windows=windows or None,
        device=device,
        out=out,
        resume=resume,
        reading=Reading(encoding, errors, bad_lines),
        trust_remote_code=trust_remote_code,
        command=shlex.join(["quantforge", *sys.argv[1:]]),
        warn=print_warning,
    )
    print_result(results.to_json(found) if as_json else f"{pages.to_text(found)}\n{out / 'calibration-study.html'}")


def _numbers(option: str, text: str) -> list[int]:
    """Read a comma-separated list of whole numbers; RecipeError for anything else."""
    parts = parse_list(text)
    if not all(part.isascii() and part.isdecimal() and len(part) < 20 for part in parts):
        raise RecipeError(233, f"{option} {text!r} is not a list of whole numbers, such as 16,64.")
    return [int(part) for part in parts]
