"""The command line: a module for each command parses its options, calls one function and prints.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from typing import Any

import click

from quantforge import __version__
from quantforge.cli import (
    bench,
    calibration_study,
    compare,
    convert,
    distill,
    evaluate,
    generate,
    papers,
    qat,
    qlora,
    quantize,
    report,
    sensitivity,
    show,
    verify,
)
from quantforge.cli.options import print_result
from quantforge.errors import QuantForgeError, RecipeError, ResourceError

INTERNAL = 70  # the exit code of our own faults
_SMALLER = "fewer --samples, a shorter --seq-len, or `quantize --max-memory` need less"


class Group(click.Group):
    """Turns a QuantForgeError into one line (or one JSON object) and its exit code; other exceptions are bugs: 70."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether errors are wanted as JSON, which only the command's own options say."""
        ctx.obj = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ended by a signal, it still removes what it had only half written."""
        _end_on_signals()
        try:
            return super().invoke(ctx)
        except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own ways out
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "quantforge"
            message = error.format_message().rstrip(".")
            _fail(ctx, RecipeError(212, f"{message}; `{command} --help` lists what there is."))
        except QuantForgeError as error:
            _fail(ctx, error)
        except click.ClickException:
            raise
        except KeyboardInterrupt:
            ctx.exit(128 + signal.SIGINT)
        except Exception as error:
            _own_fault(ctx, error)


def _end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the process by way of its clean-up, unless they are ignored (nohup)."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda got, frame: sys.exit(128 + got))


def _own_fault(ctx: click.Context, error: Exception) -> None:
    """End with 5 if the machine ran out of memory, else with the traceback and 70."""
    if _lacks_memory(error):
        said = str(error).rpartition("Allocator: ")[2].rstrip(".") or "no more is given"
        _fail(ctx, ResourceError(533, f"memory ran out: {said}; {_SMALLER}."))
    if type(error).__name__ == "AcceleratorError" or str(error).startswith("CUDA error"):
        said = str(error).partition("\n")[0].rstrip(".")
        _fail(ctx, ResourceError(534, f"the GPU does not answer any more: {said}; what was committed is kept."))
    click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    click.echo("this is a fault of quantforge, not of what it was given; please report it.", err=True)
    ctx.exit(INTERNAL)


def _lacks_memory(error: Exception) -> bool:
    """Tell whether an exception, of Python or of torch on the CPU or a GPU, says that there is no more memory."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _fail(ctx: click.Context, error: QuantForgeError) -> None:
    if ctx.obj:
        code, _, message = str(error).partition(": ")
        print_result(json.dumps({"error": {"code": code[6:-1], "message": message}}))
    click.echo(str(error), err=True)
    ctx.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantforge")
def main() -> None:
    """Quantize language models, and see what it cost."""


for command in (
    *(quantize.quantize, evaluate.evaluate, compare.compare, show.inspect, show.methods, show.formats_, report.report),
    *(sensitivity.sensitivity, calibration_study.calibration_study, papers.papers, convert.convert, verify.verify),
    *(generate.generate, bench.bench, distill.distill, qat.qat, qlora.qlora),
):
    # not left to the group: a command that is first called without it would keep the help option of that call
    command.context_settings = main.context_settings
    main.add_command(command)
