"""`quantforge sensitivity`."""

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
    text_files,
    weight_format,
)
from quantforge.errors import RecipeError


@click.command()
@click.argument("model", required=False)
@click.option("--method", default="rtn", show_default=True, help="A method that needs no calibration.")
@click.option("--bits", help="Comma-separated; default: 2,3,4,8 where the method's format has these widths.")
@weight_format
@click.option(
    "--by", default="block", show_default=True, help="What a part is: block, kind, layer, or several of them."
)
@click.option("--data", default="python-docs", show_default=True, metavar="SET|FILE", help="Evaluation text.")
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a window.")
@click.option(
    "--windows",
    type=click.IntRange(0),
    metavar="N",
    help="Evaluation windows from the start of the text; 0 is all of them.  [default: 48, by layer 8]",
)
@click.option(
    "--out", "-o", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the results."
)
@click.option("--resume", is_flag=True, help="Go on with the results that --out has by the same parts.")
@text_files
@machine
def sensitivity(
    model: str | None,
    method: str,
    bits: str | None,
    group_size: int | None,
    symmetric: bool | None,
    weights: str | None,
    inputs: str | None,
    settings: tuple[str, ...],
    overrides: tuple[str, ...],
    by: str,
    data: str,
    seq_len: int,
    windows: int | None,
    out: Path,
    resume: bool,
    encoding: str,
    errors: str,
    bad_lines: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Quantize one part of MODEL at a time, the rest in float, and report what each part costs."""
    widths = None if bits is None else parse_list(bits)
    if widths is not None and not (widths and all(w.isdecimal() for w in widths)):
        raise RecipeError(211, f"--bits {bits!r} is not a list of whole numbers, such as 2,3,4,8.")
    ways = tuple(parse_list(by))
    from quantforge.sensitivity import analyze, show, to_json

    found = analyze(
        model,
        method,
        by=ways,
        bits=None if widths is None else [int(w) for w in widths],
        group_size=group_size,
        symmetric=symmetric,
        weights=None if weights is None else parse_list(weights),
        inputs=inputs,
        data=data,
        seq_len=seq_len,
        windows=windows,
        device=device,
        settings=parse_settings(settings),
        overrides=parse_overrides(overrides),
        out=out,
        resume=resume,
        reading=Reading(encoding, errors, bad_lines),
        trust_remote_code=trust_remote_code,
        command=shlex.join(["quantforge", *sys.argv[1:]]),
    )
    print_result(to_json(found).rstrip() if as_json else f"{show.summary(found, ways)}\n{out / 'sensitivity.html'}")
