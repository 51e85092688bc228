"""Run the tests that the rows of tests/data/faults.yaml name, and count what came of each row.

    python tools/faults.py [--out reports/raw/faults.json] [--rows 1,2,61]

A row counts as shown where every test that it names ran and passed; what was skipped or does not exist is told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantforge import store

ROOT = Path(__file__).parents[1]
OUT = ROOT / "reports" / "raw" / "faults.json"


def rows() -> list[dict[str, Any]]:
    """Return the rows of the table."""
    found: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests" / "data" / "faults.yaml").read_text(encoding="utf-8"))
    return found


class Outcomes:
    """Collects the outcome of each test that runs, by its id."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of the call, or of the setup where that failed or skipped it."""
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid] = report.outcome


def belongs(test: str, nodeid: str) -> bool:
    """Tell whether a test that ran is one of those that a row names by file, function and the beginning of a case."""
    file, _, rest = test.partition("::")
    function, _, case = rest.partition("[")
    where, _, ran = nodeid.removeprefix("tests/").partition("::")
    name, _, ids = ran.partition("[")
    case = case.removesuffix("]")
    return where == file and function in ("", name) and (ids.startswith(case) or f"-{case}" in ids)


def count(table: list[dict[str, Any]], outcomes: dict[str, str]) -> list[dict[str, Any]]:
    """Return for each row how many of its tests passed, failed or were skipped, and the names that nothing ran for."""
    counted = []
    for row in table:
        ran = {name: [i for i in outcomes if belongs(name, i)] for name in row["tests"]}
        came = Counter(outcomes[i] for ids in ran.values() for i in ids)
        absent = [name for name, ids in ran.items() if not ids]
        counted.append({"n": row["n"], **{key: came[key] for key in ("passed", "failed", "skipped")}, "absent": absent})
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rows", type=lambda text: {int(n) for n in text.split(",")}, default=None)
    args = parser.parse_args()
    os.chdir(ROOT)
    table = [row for row in rows() if args.rows is None or row["n"] in args.rows]
    named = {name.partition("[")[0] for row in table for name in row["tests"]}
    there = sorted(f"tests/{name}" for name in named if (ROOT / "tests" / name.partition("::")[0]).is_file())
    outcomes = Outcomes()
    ended = pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", *there], plugins=[outcomes])
    counted = count(table, outcomes.found)
    record = {"command": "make faults", "python": platform.python_version(), "rows": counted}
    store.write_text(args.out, json.dumps(record, indent=1) + "\n")
    short = [row["n"] for row in counted if row["failed"] or row["absent"] or not row["passed"]]
    print(f"{len(counted) - len(short)} of {len(counted)} rows are shown; not: {short or 'none'}")
    sys.exit(int(ended) or bool(short))


if __name__ == "__main__":
    main()
