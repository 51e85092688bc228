"""Measure what keeping work costs: the same runs with and without a journal, in turns: `make overhead`.

    python tools/overhead.py [--rounds 5] [--methods rtn,gptq]

Both read the demo model, quantize and save it; without a journal nothing is committed and no input is digested. Wants a
quiet machine. Written into reports/raw/overhead.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import quantforge
from quantforge import store
from quantforge.journal import Journal

COMMIT = Journal.commit
OUT = Path(__file__).parents[1] / "reports" / "raw" / "overhead.json"


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Let runs have no journal meanwhile, and not ask what they are made from."""

    @contextlib.contextmanager
    def opened(*args: Any, **more: Any) -> Iterator[None]:
        yield None

    with patch("quantforge.runs.opened", opened), patch("quantforge.runs.made_of", lambda *args: {}):
        yield


def once(method: str, *, kept: bool) -> tuple[float, int]:
    """Return the seconds of one run, to the checkpoint's folder being there, and how often it committed."""
    with tempfile.TemporaryDirectory() as place, patch("quantforge.journal.Journal.commit", autospec=True) as commit:
        commit.side_effect = COMMIT
        out = Path(place, "out")
        start = time.perf_counter()
        with contextlib.nullcontext() if kept else nothing_kept():
            result = quantforge.quantize(None, method, bits=4, group_size=64, out=out)
            if not kept:
                result.save(out)
        return time.perf_counter() - start, commit.call_count


def main() -> None:
    """Run each method with and without, in turns, and write down the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["rtn", "gptq"])
    asked = parser.parse_args()
    found = []
    for method in asked.methods:
        once(method, kept=False)  # which reads and imports what later runs have
        pairs, commits = [], 0
        for i in range(asked.rounds):
            order = (True, False) if i % 2 else (False, True)
            seconds = {}
            for kept in order:
                seconds[kept], count = once(method, kept=kept)
                commits = max(commits, count)
            pairs.append((seconds[True], seconds[False]))
        ratio = statistics.median(a / b for a, b in pairs)
        found.append(
            {"method": method, "kept": [a for a, _ in pairs], "plain": [b for _, b in pairs], "commits": commits}
            | {"ratio": ratio}
        )
        print(json.dumps(found[-1]), flush=True)
        about = {"quantforge": quantforge.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        store.write_text(OUT, json.dumps({**about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
