"""`quantforge bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from quantforge.cli.generate import float_dtype
from quantforge.cli.options import machine, parse_list, print_result, print_warning
from quantforge.errors import RecipeError


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--against", metavar="MODEL", help="A float model, or demo; default: the checkpoint, dequantized.")
@click.option("--batch-sizes", default="1,4,16", show_default=True, metavar="N,…", help="Texts side by side.")
@click.option("--prompt-tokens", default=512, show_default=True, type=click.IntRange(1), help="Tokens of a prompt.")
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens after the first.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Good samples of each.")
@click.option("--dtype", default="float32", show_default=True, metavar="NAME", help="Of what is not quantized.")
@click.option("--strict", is_flag=True, help="Refuse layers that no operator here computes.")
@click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder of figures and drawing.")
@machine
def bench(
    folder: Path,
    against: str | None,
    batch_sizes: str,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    dtype: str,
    strict: bool,
    out: Path | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure how fast the quantized checkpoint in FOLDER reads prompts and writes, beside a float model."""
    sizes = _sizes(batch_sizes)
    from quantforge.benchmark import report, speed
    from quantforge.store import check_report_folder

    if out is not None:
        check_report_folder(out, folder)
    found = speed.bench(
        folder,
        against=against,
        batch_sizes=sizes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        dtype=float_dtype(dtype),
        device=device,
        strict=strict,
        trust_remote_code=trust_remote_code,
        command=shlex.join(["quantforge", *sys.argv[1:]]),
    )
    for note in found.notes:
        print_warning(note)
    if out is not None:
        report.write(found, out)
    print_result(report.to_json(found) if as_json else report.text(found))


def _sizes(text: str) -> list[int]:
    """Read the batch sizes; RecipeError for what are no numbers from 1 on."""
    parts = parse_list(text)
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= 4096 for part in parts):
        raise RecipeError(228, f"--batch-sizes {text!r} is not of the form 1,4,16, with numbers from 1 to 4096.")
    return sorted({int(part) for part in parts})
