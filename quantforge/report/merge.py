"""Several reports as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantforge.errors import DataError, clean
from quantforge.record import SCHEMA, Origin, Report, Run
from quantforge.report.groups import failed


def merge(reports: Sequence[Report], files: Sequence[str] = ()) -> Report:
    """Return one report with the comparisons and runs of all of them, in their order.

    Equal comparisons, of models with the same fingerprint, become one, in which of several runs of one label the first
    counts that did not fail. Raises DataError 478 for no report, or if the numbers were not measured in the same way.

    files  what the reports are called in an error
    """
    if not reports:
        raise DataError(478, "there is no report to merge; give at least one report.json.")
    for i, report in enumerate(reports[1:], 2):
        if report.protocol != reports[0].protocol:
            called = repr(files[i - 1]) if files else f"report {i}"
            raise DataError(
                478, f"{called} was measured by another protocol than the first report: {_apart(report, reports)}"
            )
    origins: list[Origin] = []
    runs: list[Run] = []
    for report in reports:
        before = {(run.origin, run.label): i for i, run in reversed(list(enumerate(runs)))}
        places = []
        for origin in report.origins:
            if origin not in origins:
                origins.append(origin)
            places.append(origins.index(origin))
        for run in (replace(run, origin=places[run.origin]) for run in report.runs):
            place = before.get((run.origin, run.label))
            if place is None:
                runs.append(run)
            elif failed(runs[place]) and not failed(run):
                runs[place] = run
    return Report(SCHEMA, reports[0].protocol, tuple(origins), tuple(runs))


def _apart(report: Report, reports: Sequence[Report]) -> str:
    """Quote the two protocols from where they part."""
    first, second = clean(reports[0].protocol), clean(report.protocol)
    same = next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    start = max(0, same - 20)
    return f"{second[start : same + 40]!r} in place of {first[start : same + 40]!r}; merge those measured alike."
