"""The command line: each command parses its options, calls one function and prints.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from quantforge import __version__
from quantforge.errors import QuantForgeError, RecipeError, ResourceError

Command = TypeVar("Command", bound=Callable[..., Any])


class Group(click.Group):
    """Turns a QuantForgeError into one line (or one JSON object) and its exit code; other exceptions are bugs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether errors are wanted as JSON, which only the command's own options say."""
        ctx.obj = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ended by a signal, it still removes what it had only half written."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                if signal.getsignal(number) is signal.SIG_IGN:  # nohup
                    continue
                signal.signal(number, lambda got, frame: sys.exit(128 + got))
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "quantforge"
            message = error.format_message().rstrip(".")
            _fail(ctx, RecipeError(212, f"{message}; `{command} --help` lists what there is."))
        except QuantForgeError as error:
            _fail(ctx, error)


def _fail(ctx: click.Context, error: QuantForgeError) -> None:
    if ctx.obj:
        code, _, message = str(error).partition(": ")
        _print(json.dumps({"error": {"code": code[6:-1], "message": message}}))
    click.echo(str(error), err=True)
    ctx.exit(error.exit_code)


def _print(text: str) -> None:
    """Print a result; ResourceError if there is no room for it."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stdout.close()  # or Python tries once more at its end
        raise ResourceError(513, f"the result could not be printed: {error.strerror}.") from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantforge")
def main() -> None:
    """Quantize language models, and see what it cost."""


def _calibration(command: Command) -> Command:
    for option in (
        click.option(
            "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of --shuffle."
        ),
        click.option("--shuffle", is_flag=True, help="Draw the windows instead of taking the first ones."),
        click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a window."),
        click.option("--samples", default=64, show_default=True, type=click.IntRange(1), help="Calibration windows."),
        click.option("--calib", default="python-docs", show_default=True, metavar="SET|FILE", help="Calibration text."),
    ):
        command = option(command)
    return command


def _format(command: Command) -> Command:
    for option in (
        click.option(
            "--override",
            "overrides",
            multiple=True,
            metavar="PATTERN:KEY=VALUE,…",
            help="Other settings for layers by name, e.g. '*.down_proj:bits=8' or '*.layers.0.*:skip'.",
        ),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="e.g. solver.damp_percent=0.05"),
        click.option(
            "--weights", metavar="FORMAT", help="How weights are stored, e.g. e4m3-channel, mxfp4; see `formats`."
        ),
        click.option(
            "--inputs", metavar="FORMAT", help="How layers round their inputs, e.g. int8-token; default: not."
        ),
        click.option("--symmetric/--asymmetric", default=None, help="Without or with zero points."),
        click.option("--group-size", type=int, metavar="N", help="Weights that share a scale; -1 is a whole row."),
    ):
        command = option(command)
    return command


def _machine(command: Command) -> Command:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--trust-remote-code", is_flag=True, help="Run code that the model folder brings."),
        click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to compute."),
    ):
        command = option(command)
    return command


_windows = click.option(
    "--windows",
    default=48,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="Evaluation windows from the start of the text; 0 is all of them.",
)


def _settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RecipeError(210, f"--set {pair!r} is not of the form KEY=VALUE, such as solver.damp_percent=0.05.")
        found[key] = value
    return found


def _overrides(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        pattern, colon, wishes = text.partition(":")
        if not colon or not pattern or not wishes:
            raise RecipeError(
                217, f"--override {text!r} is not of the form PATTERN:KEY=VALUE, such as *.down_proj:bits=8."
            )
        pairs = (wish.partition("=") for wish in wishes.split(","))
        # what is said of one pattern in two places counts together, and from the later place on
        found[pattern] = {**found.pop(pattern, {}), **{key: _value(text, key, value) for key, _, value in pairs}}
    return found


def _value(where: str, key: str, text: str) -> Any:
    """Turn the text of an override's value into what it says: digits are a number, and nothing after `skip` is yes."""
    words = {"": True, "true": True, "yes": True, "false": False, "no": False}
    if key in ("skip", "symmetric"):
        if text.lower() not in words:
            raise RecipeError(217, f"--override {where!r}: {key} is yes or no, not {text!r}.")
        return words[text.lower()]
    return int(text) if key != "method" and text.removeprefix("-").isdecimal() else text


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@main.command()
@click.argument("model", required=False)
@click.option("--method", "-m", default="gptq", show_default=True, metavar="NAME", help="See `quantforge methods`.")
@click.option("--bits", type=int, metavar="2..8", help="Bits of a code; default: the method's.")
@_format
@_calibration
@click.option("--dynamic", is_flag=True, help="Find the inputs that stay in float anew in every call (llm-int8).")
@click.option("--out", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint in --out, once the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Show what each layer would become, then stop.")
@_machine
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
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL (a folder or a hub id; the demo model if left out) into a checkpoint that loads by itself."""
    changed = _settings(settings) | ({"inputs.dynamic": True} if dynamic else {})
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
            overrides=_overrides(overrides),
        )
        load.check_device(device)
        corpus.check_name(calib, "calibration")
        source = load.find(model, trust_remote_code=trust_remote_code)
        plan = api.prepare(source, chosen, out, overwrite=overwrite)
        if plan.needs:
            api.check_length(source.config, seq_len)
        _print(json.dumps(plan.record()) if as_json else plan.table())
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
        overrides=_overrides(overrides),
        out=out,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    where = shlex.quote(str(out))
    _print(json.dumps(result.record()) if as_json else f"{result.summary()}\nnext: quantforge evaluate {where}")


@main.command()
@click.argument("model", required=False)
@click.option("--data", default="python-docs", show_default=True, metavar="SET|FILE", help="Evaluation text.")
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a window.")
@_windows
@click.option("--kv", metavar="FORMAT", help="Decode through a cache stored so, e.g. int8-token, int4-kivi-g32-w32.")
@_machine
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
        _print(json.dumps(found.record()))
    else:
        count = found.data.get("count")
        through = "" if kv is None else f", decoded through a cache of {found.bytes_per_token:,.0f} bytes a token"
        _print(
            f"{found.model}: perplexity {found.perplexity:.3f} on {count} x {seq_len} tokens of {found.data['name']}"
            f"{through}"
        )


@main.command()
@click.argument("model", required=False)
@click.option(
    "--methods",
    default="fp,rtn,gptq",
    show_default=True,
    help="Methods or suites (all-weights, all-activations, …), comma-separated; fp is the float model.",
)
@click.option("--bits", default="4", show_default=True, help="Comma-separated; --weights takes their place.")
@_format
@_calibration
@click.option("--data", default="python-docs", show_default=True, metavar="SET|FILE", help="Evaluation text.")
@_windows
@click.option(
    "--out", "-o", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the report."
)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Folder to keep every checkpoint in.")
@click.option("--resume", is_flag=True, help="Take over the runs that an interrupted comparison left in --out.")
@_machine
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
    widths = _list(bits)
    if not all(w.isdecimal() for w in widths):
        raise RecipeError(211, f"--bits {bits!r} is not a list of whole numbers, such as 4,3.")
    import quantforge
    from quantforge import record, report

    found = quantforge.compare(
        model,
        methods=_list(methods),
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
        settings=_settings(settings),
        overrides=_overrides(overrides),
        out=out,
        keep=keep,
        resume=resume,
        trust_remote_code=trust_remote_code,
        command=shlex.join(["quantforge", *sys.argv[1:]]),
    )
    _print(record.to_json(found) if as_json else f"{report.table(found)}\n{out / 'report.html'}")


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Show what each layer of a quantized checkpoint in FOLDER became."""
    from quantforge import checkpoint

    record = checkpoint.read_record(folder)
    table = checkpoint.table(record)  # which also checks it
    _print(json.dumps(record) if as_json else table)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods(as_json: bool) -> None:
    """List every method with its paper, its options and their defaults."""
    from quantforge import recipe

    found = recipe.catalogue()
    if as_json:
        _print(json.dumps(found))
        return
    for entry in found:
        _print(f"{entry['name']}: {entry['about']}\n  {entry['paper']}\n  stores {entry['weights']}")
        if entry["inputs"]:
            _print(f"  rounds inputs to {entry['inputs']}")
        for key, (kind, default) in entry["options"].items():
            _print(f"  --set {key}={default}  ({kind})")


@main.command(name="formats")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def formats_(names: tuple[str, ...], as_json: bool) -> None:
    """Show the values of formats, what a weight costs in them and what rounding loses; all of them without NAME.

    NAME is a grid (int4, nf4, e2m1), a float type (bf16), a notation (int4-g64-asym, nf4-dq) or numbers
    (table:-1,0,0.5,1).
    """
    from dataclasses import asdict

    from quantforge.numerics import catalogue

    wanted = [catalogue.find(name) for name in names or catalogue.names()]
    entries = [catalogue.measure(w) for w in wanted]
    _print(json.dumps([asdict(e) for e in entries]) if as_json else catalogue.text(entries))
