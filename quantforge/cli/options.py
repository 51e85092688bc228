"""What commands share: their common options, how texts of options are read, and how a result is printed."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from quantforge.errors import RecipeError, ResourceError, clean

Command = TypeVar("Command", bound=Callable[..., Any])


def print_result(text: str) -> None:
    """Print a result; ResourceError if there is no room for it."""
    try:
        try:
            click.echo(text)
        except UnicodeEncodeError:  # the output's encoding lacks a letter of a name
            encoding = sys.stdout.encoding or "ascii"
            click.echo(text.encode(encoding, "backslashreplace").decode(encoding))
    except BrokenPipeError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stdout.close()  # or Python tries once more at its end
        raise ResourceError(513, f"the result could not be printed: {error.strerror}.") from error


def print_warning(line: str) -> None:
    """Print what the user should know, apart from the results."""
    click.echo(clean(f"warning: {line}"), err=True)


def calibration(command: Command) -> Command:
    """Add the options of calibration text."""
    for option in (
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=click.IntRange(0, 2**63 - 1),
            help="Seed of --shuffle, --shots and --calib self.",
        ),
        click.option("--shuffle", is_flag=True, help="Draw the windows instead of taking the first ones."),
        click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a window."),
        click.option("--samples", default=64, show_default=True, type=click.IntRange(1), help="Calibration windows."),
        click.option(
            "--calib",
            default="python-docs",
            show_default=True,
            metavar="SET|FILE|self",
            help="Calibration text; self: what the float model itself writes.",
        ),
    ):
        command = option(command)
    return command


def weight_format(command: Command) -> Command:
    """Add the options of how weights and inputs are stored."""
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


def machine(command: Command) -> Command:
    """Add the device, trust in code, and JSON as output."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--trust-remote-code", is_flag=True, help="Run code that the model folder brings."),
        click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to compute."),
    ):
        command = option(command)
    return command


def tasks_options(command: Command) -> Command:
    """Add what is said of zero-shot tasks."""
    for option in (
        click.option(
            "--limit", type=click.IntRange(1), metavar="N", help="Items of each task from its start; default: all."
        ),
        click.option(
            "--shots", type=click.IntRange(0), metavar="K", help="Examples before each item; default: the task's."
        ),
        click.option(
            "--task-dir",
            "task_dirs",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Folder of lm-eval task files; without --tasks all of its tasks are scored.",
        ),
        click.option("--suite", metavar="smoke|standard", help="Score ours, which need no network, or the papers'."),
        click.option("--tasks", default="", metavar="TASK,…", help="Score these tasks: lm-eval's, or of --task-dir."),
    ):
        command = option(command)
    return command


def text_files(command: Command) -> Command:
    """Add how text files are read."""
    for option in (
        click.option(
            "--bad-lines",
            default=0,
            show_default=True,
            type=click.IntRange(0),
            metavar="N",
            help="Leave out up to N lines of a .jsonl file that hold no text.",
        ),
        click.option(
            "--errors",
            default="strict",
            show_default=True,
            metavar="strict|replace",
            help="Refuse bytes that are not of the --encoding, or put U+FFFD in their place.",
        ),
        click.option("--encoding", default="utf-8", show_default=True, metavar="NAME", help="Of text files."),
    ):
        command = option(command)
    return command


windows_option = click.option(
    "--windows",
    default=48,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="Evaluation windows from the start of the text; 0 is all of them.",
)


_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)


def parse_size(option: str, text: str) -> int:
    """Return the bytes that a text such as `8GB`, `500MiB` or `1e9`'s 1000000000 says; RecipeError naming `option`.

    kB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB of 1024; the B may be left out.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or (found[3] and not found[2]):
        raise RecipeError(234, f"{option} {text!r} is no size; write for example 8GB, 500MiB or 2.5G.")
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].lower()])
    if size < 1:
        raise RecipeError(234, f"{option} {text!r} is no memory at all; write for example 8GB.")
    return size


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read the texts of --set; RecipeError for one that is no KEY=VALUE."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RecipeError(210, f"--set {pair!r} is not of the form KEY=VALUE, such as solver.damp_percent=0.05.")
        found[key] = value
    return found


def parse_overrides(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Read the texts of --override; RecipeError for one that is no PATTERN:KEY=VALUE."""
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


def parse_list(text: str) -> list[str]:
    """Split a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]
