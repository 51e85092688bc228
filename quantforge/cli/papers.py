"""`quantforge papers`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantforge.cli.options import machine, print_result
from quantforge.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    from quantforge.evaluation.papers import Row


@click.command()
@click.argument("row", required=False)
@click.option("--run", "run_it", is_flag=True, help="Measure ROW again: the model and the text come from the hub.")
@click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder of the report of --run.")
@click.option("--resume", is_flag=True, help="With --run: take over what an interrupted one left in --out.")
@machine
def papers(
    row: str | None, run_it: bool, out: Path | None, resume: bool, device: str, trust_remote_code: bool, as_json: bool
) -> None:
    """Print published perplexities and their protocols; of one ROW, the commands that measure it again."""
    from quantforge.evaluation import papers as published

    if row is None:
        if run_it:
            raise RecipeError(240, "--run needs a row; `quantforge papers` lists them.")
        found = published.rows()
        print_result(json.dumps([_record(each) for each in found.values()]) if as_json else _table(found))
        return
    chosen = published.find(row)
    if not run_it:
        print_result(json.dumps(_record(chosen)) if as_json else _described(chosen))
        return
    if out is None:
        raise RecipeError(241, "--out DIR is missing: where should the report go?")
    _check_network(chosen.model)
    import quantforge

    command = published.line([*published.commands(chosen)["all of it"][:-1], str(out)])
    report = quantforge.compare(
        chosen.model,
        **published.arguments(chosen),
        device=device,
        out=out,
        resume=resume,
        trust_remote_code=trust_remote_code,
        command=command,
    )
    measured = {(run.method, run.bits): run.perplexity for run in report.runs}
    print_result(_beside(chosen, measured, as_json) if as_json else f"{_beside(chosen, measured)}\n{out}")


def _check_network(model: str) -> None:
    """Raise ResourceError, within seconds, where the hub cannot be reached and is not said to be left alone."""
    from huggingface_hub import constants

    from quantforge import network

    if not constants.HF_HUB_OFFLINE and not network.reachable():
        raise ResourceError(
            530,
            f"{model} is on the Hugging Face hub, and {constants.ENDPOINT} cannot be reached; HF_HUB_OFFLINE=1 uses "
            "what was loaded before.",
        )


def _record(row: Row) -> dict[str, Any]:
    from quantforge.evaluation import papers as published

    commands = {name: published.line(command) for name, command in published.commands(row).items()}
    return {**asdict(row), "protocol": published.protocol(row), "commands": commands}


def _table(found: dict[str, Row]) -> str:
    """Return one line for each row: its name, its model, set and length, and the perplexities."""
    lines = []
    width, model = (max(map(len, names)) for names in (found, [row.model for row in found.values()]))
    source = ""
    for row in found.values():
        if row.table != source:
            source = row.table
            lines += ["", f"{row.paper}: {source}"]
        text = f"{row.data} x {row.seq_len}"
        lines.append(f"  {row.name:{width}}  {row.model:{model}}  {text:16}  {', '.join(_figures(row))}")
    return "\n".join([*lines[1:], "", "`quantforge papers ROW` prints the commands that measure a row again."])


def _figures(row: Row) -> list[str]:
    """Return the published perplexities in words, the float model's first."""
    quantized = [f"{figure.method} {figure.bits} bits {_digits(figure.perplexity)}" for figure in row.figures]
    return [f"fp {_digits(row.float_perplexity)}", *quantized]


def _digits(value: float) -> str:
    """Return a perplexity with as many digits as tables give."""
    if value >= 1000:
        return f"{value:.1e}"
    return f"{value:g}" if value >= 100 else f"{value:.3f}".removesuffix("0")


def _described(row: Row) -> str:
    """Return the row's source, protocol, figures and commands."""
    from quantforge.evaluation import papers as published

    facts = [f"{row.name}: {row.model}", f"source: {row.paper}", f"table: {row.table}"]
    facts += [f"protocol: {published.protocol(row)}", f"note: {row.note}"]
    commands = []
    for name, command in published.commands(row).items():
        commands += [f"# {name}", published.line(command)]
    return "\n".join([*facts, f"perplexity: {', '.join(_figures(row))}", "", *commands])


def _beside(row: Row, measured: dict[tuple[str, int | None], float], as_json: bool = False) -> str:
    """Return the published figures beside the measured ones."""
    pairs: list[tuple[str, int | None, float]] = [("fp", None, row.float_perplexity)]
    pairs += [(figure.method, figure.bits, figure.perplexity) for figure in row.figures]
    if as_json:
        return json.dumps(
            [
                {"method": method, "bits": bits, "published": value, "measured": measured.get((method, bits))}
                for method, bits, value in pairs
            ]
        )
    lines = [f"{'method':<16} {'published':>9} {'measured':>9}"]
    for method, bits, value in pairs:
        found = measured.get((method, bits))
        name = method if bits is None else f"{method} {bits} bits"
        lines.append(f"{name:<16} {_digits(value):>9} {'n/a' if found is None else format(found, '.3f'):>9}")
    return "\n".join(lines)
