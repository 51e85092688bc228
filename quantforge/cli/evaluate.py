"""`quantforge evaluate`."""

from __future__ import annotations

import json

import click

from quantforge.cli.options import machine, print_result, windows_option


@click.command()
@click.argument("model", required=False)
@click.option("--data", default="python-docs", show_default=True, metavar="SET|FILE", help="Evaluation text.")
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a window.")
@windows_option
@click.option("--kv", metavar="FORMAT", help="Decode through a cache stored so, e.g. int8-token, int4-kivi-g32-w32.")
@machine
def evaluate(
    model: str | None,
    data: str,
    seq_len: int,
    windows: int,
    kv: str | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Print the perplexity of MODEL: a float model, or a quantized checkpoint."""
    import quantforge

    found = quantforge.evaluate(
        model,
        data=data,
        seq_len=seq_len,
        windows=windows or None,
        kv=kv,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_result(json.dumps(found.record()))
    else:
        count = found.data.get("count")
        through = "" if kv is None else f", decoded through a cache of {found.bytes_per_token:,.0f} bytes a token"
        print_result(
            f"{found.model}: perplexity {found.perplexity:.3f} on {count} x {seq_len} tokens of {found.data['name']}"
            f"{through}"
        )
