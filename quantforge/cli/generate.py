"""`quantforge generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantforge.cli.options import machine, print_result, print_warning
from quantforge.errors import RecipeError, pick

if TYPE_CHECKING:
    import torch


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--prompt", required=True, metavar="TEXT", help="What the text begins with.")
@click.option(
    "--max-new-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens to write at most."
)
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="Draw tokens; default: the likeliest.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="P",
    help="Draw of the likeliest tokens that together have this probability.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of the draws.")
@click.option(
    "--dtype", metavar="float32|bfloat16|float16", help="Of all that is not quantized; default: the folder's."
)
@click.option("--reference", is_flag=True, help="Compute with dequantized weights.")
@click.option("--strict", is_flag=True, help="Refuse layers that no operator here computes.")
@machine
def generate(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    dtype: str | None,
    reference: bool,
    strict: bool,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Let the quantized checkpoint in FOLDER go on with a text."""
    from quantforge import api
    from quantforge.runtime.generate import Sampling

    if reference and strict:
        raise RecipeError(229, "--reference uses no operators that --strict could ask for; leave out one of them.")
    drawn = temperature is not None or top_p is not None
    # what is not given leaves the model's own probabilities as they are
    sampling = Sampling(1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed)
    written = api.generate(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling if drawn else None,
        dtype=None if dtype is None else float_dtype(dtype),
        packed=not reference,
        strict=strict,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    for note in written.notes:
        print_warning(note)
    print_result(json.dumps(written.record()) if as_json else written.text)


def float_dtype(name: str) -> torch.dtype:
    """Return the dtype called float32, bfloat16 or float16; RecipeError for another name."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return known[pick("dtype", name, known)]
