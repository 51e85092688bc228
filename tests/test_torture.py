"""A few random kills of a real run; `make torture` does hundreds. What the tool counts, it would notice."""

from __future__ import annotations

import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from quantforge.journal import Journal
from quantforge.store import publish, write_text

_SPEC = spec_from_file_location("torture", Path(__file__).parent.parent / "tools" / "torture.py")
torture = module_from_spec(_SPEC)
sys.modules["torture"] = torture  # dataclasses look there
_SPEC.loader.exec_module(torture)


def test_a_run_that_is_killed_at_random_times_ends_with_the_same_files():
    counts = torture.torture(6, ["gptq"], seed=1)
    assert counts.kills >= 6
    assert (counts.lost, counts.failed) == (0, 0)
    assert counts.committed > 0


def forgetful(out: Path, method: str) -> None:
    """Write another output if it goes on with work than if it does it all."""
    with Journal.open(out, {}) as journal:
        text = "resumed" if journal.commits else "whole"
        for _ in range(3):
            time.sleep(0.02)
            journal.commit({"step": 1})
        if not out.exists():
            with publish(out) as staging:
                write_text(staging / "text", text)
        journal.finish()


def half_written(out: Path, method: str) -> None:
    """Write the output in place."""
    out.mkdir(exist_ok=True)
    for part in range(10):
        (out / f"{part}").write_text("part")
        time.sleep(0.01)


@pytest.mark.parametrize("run", [forgetful, half_written])
def test_a_run_that_ends_otherwise_or_writes_in_place_is_noticed(run):
    assert torture.torture(200, ["none"], seed=0, run=run).lost
