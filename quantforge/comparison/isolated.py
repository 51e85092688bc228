"""A row of a comparison measured in a process of its own, so that one that dies takes nothing along."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantforge import record
from quantforge.calibrate.text_files import Reading
from quantforge.comparison import cells
from quantforge.comparison.wishes import Request
from quantforge.errors import QuantForgeError
from quantforge.record import Report, Run
from quantforge.store import write_text


def measure(request: Request, label: str) -> Run:
    """Return the row called `label` of a request, measured by a new process; one that failed says so in its notes."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "run.json"
        question = json.dumps({"request": asdict(request), "label": label, "answer": str(answer)})
        done = subprocess.run(
            # -P: no code of the current folder
            [sys.executable, "-P", "-c", "from quantforge.comparison.isolated import main; main()"],
            input=question,
            stdout=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        if done.returncode == 0 and answer.exists():
            (run,) = record.from_json(answer.read_text(encoding="utf-8")).runs
            return run
        reason = answer.read_text(encoding="utf-8") if answer.exists() else _end(done.returncode)
    return cells.failed(label, f"not measured: {reason}; --resume tries again")


def _end(status: int) -> str:
    return f"its process was ended by signal {-status}" if status < 0 else f"its process ended with status {status}"


def main() -> None:
    """Measure the row that the JSON on stdin asks for, and write it, or the error, where that says."""
    from quantforge.comparison import PROTOCOL, measure_one

    asked = json.load(sys.stdin)
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in asked["request"].items()
    }
    fields["reading"] = Reading(**fields["reading"])
    answer = Path(asked["answer"])
    try:
        run = measure_one(Request(**fields), asked["label"])
    except QuantForgeError as error:
        write_text(answer, str(error).rstrip("."))
        sys.exit(error.exit_code)
    origin = record.Origin("", (), {}, {}, {}, {}, "", "")
    write_text(answer, record.to_json(Report(record.SCHEMA, PROTOCOL, (origin,), (run,))))


if __name__ == "__main__":
    main()
