"""The command line: a module for each command parses its options, calls one function and prints.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any

import click

from quantforge import __version__
from quantforge.cli import (
    calibration_study,
    compare,
    distill,
    evaluate,
    papers,
    qat,
    qlora,
    quantize,
    report,
    sensitivity,
    show,
)
from quantforge.cli.options import print_result
from quantforge.errors import QuantForgeError, RecipeError


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
        print_result(json.dumps({"error": {"code": code[6:-1], "message": message}}))
    click.echo(str(error), err=True)
    ctx.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantforge")
def main() -> None:
    """Quantize language models, and see what it cost."""


for command in (quantize.quantize, evaluate.evaluate, compare.compare, show.inspect, show.methods, show.formats_):
    command.context_settings = main.context_settings  # also where a command is called without the group
    main.add_command(command)
main.add_command(sensitivity.sensitivity)
main.add_command(calibration_study.calibration_study)
main.add_command(papers.papers)
main.add_command(report.report)
for training in (distill.distill, qat.qat, qlora.qlora):
    main.add_command(training)
