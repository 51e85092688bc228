"""Measure what keeping work costs: the share of a run's time that goes into its journal: `make overhead`.

    python tools/overhead.py [--rounds 3] [--methods rtn,gptq]

The demo model is read, quantized and saved; what digests its inputs, and what writes, syncs and removes the journal, is
timed in the run itself, so that the share does not depend on what else the machine does. Written into
reports/raw/overhead.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import quantforge
from quantforge import journal, runs, store
from quantforge.journal import Journal

OUT = Path(__file__).parents[1] / "reports" / "raw" / "overhead.json"
TIMED = ("runs.made_of", "journal.Journal._recover", "journal.Journal.put", "journal.Journal.get",
         "journal.Journal.commit", "journal.Journal.published", "journal.Journal.finish", "journal._take",
         "journal._check_identity")  # fmt: skip


@contextlib.contextmanager
def timed() -> Iterator[Counter[str]]:
    """Yield the seconds, and the calls, of what is timed; what one of these calls of the others counts once."""
    found: Counter[str] = Counter()
    inside = [0]

    def wrapped(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def run(*args: Any, **more: Any) -> Any:
            found[name] += 1
            inside[0] += 1
            start = time.perf_counter()
            try:
                return work(*args, **more)
            finally:
                inside[0] -= 1
                if not inside[0]:
                    found["seconds"] += time.perf_counter() - start  # type: ignore[assignment]

        return run

    with contextlib.ExitStack() as stack:
        for name in TIMED:
            modules = {"runs": runs, "journal": journal}
            holder: Any = Journal if ".Journal." in name else modules[name.partition(".")[0]]
            leaf = name.rpartition(".")[2]
            stack.enter_context(patch.object(holder, leaf, wrapped(name, getattr(holder, leaf))))
        yield found


def once(method: str) -> tuple[float, float, int]:
    """Return the seconds of a run to its checkpoint being there, those of its journal, and how often it committed."""
    with tempfile.TemporaryDirectory() as place, timed() as found:
        start = time.perf_counter()
        quantforge.quantize(None, method, bits=4, group_size=64, out=Path(place, "out"))
        return time.perf_counter() - start, float(found["seconds"]), found["journal.Journal.commit"]


def main() -> None:
    """Run each method several times, and write down the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["rtn", "gptq"])
    asked = parser.parse_args()
    found = []
    for method in asked.methods:
        took = [once(method) for _ in range(asked.rounds)]
        share = statistics.median(kept / (whole - kept) for whole, kept, _ in took)
        whole, kept = ([round(run[i], 2) for run in took] for i in (0, 1))
        found.append({"method": method, "seconds": whole, "journal": kept, "commits": took[-1][2], "share": share})
        print(json.dumps(found[-1]), flush=True)
    about = {"quantforge": quantforge.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    store.write_text(OUT, json.dumps({**about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
