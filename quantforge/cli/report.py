"""`quantforge report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantforge.cli.options import print_result
from quantforge.errors import DataError, PlanError

if TYPE_CHECKING:
    from quantforge.record import Report


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="REPORT.json...", type=click.Path(path_type=Path))
@click.option(
    "--out", "-o", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the report."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Merge the reports of several comparisons, models or machines into one; a single one is laid out anew.

    A folder stands for the report.json in it. Runs of one comparison that occur twice are kept once.
    """
    from quantforge import record
    from quantforge import report as reports
    from quantforge.store import check_report_folder

    check_report_folder(out)
    for file in files:
        if (file / "report.json" if file.is_dir() else file).resolve().parent == out.resolve():
            raise PlanError(283, f"--out {out} holds {file}, which would be lost; name another folder.")
    merged = reports.merge([_read(file) for file in files], [str(file) for file in files])
    reports.write(merged, out)
    print_result(record.to_json(merged) if as_json else f"{reports.table(merged)}\n{out / 'report.html'}")


def _read(file: Path) -> Report:
    """Read one record; DataError 479 names the file that cannot be read, 450 what is wrong inside it."""
    from quantforge import record

    if file.is_dir():
        file = file / "report.json"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(479, f"{str(file)!r} cannot be read: {error.strerror}; give a report.json.") from error
    except UnicodeDecodeError as error:
        raise DataError(479, f"{str(file)!r} is not UTF-8: bad byte at position {error.start}.") from error
    try:
        return record.from_json(text)
    except DataError as error:
        raise DataError(450, f"{str(file)!r}: {error.args[0]}") from error
