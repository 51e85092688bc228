"""The table of claims says what the runs say, and leaves nothing out in silence."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from quantforge import recipe, record

ROOT = Path(__file__).parent.parent
_SPEC = spec_from_file_location("claims", ROOT / "tools" / "claims.py")
claims = module_from_spec(_SPEC)
_SPEC.loader.exec_module(claims)

LABELS = {w.label for name in recipe.suites() for w in recipe.suite(name)}


@pytest.fixture
def report() -> record.Report:
    """Return the committed comparison, with a run for every row of every suite."""
    found = record.from_json((ROOT / "reports" / "smollm2-135m" / "report.json").read_text(encoding="utf-8"))
    one = found.runs[-1]
    runs = (
        replace(one, label=label, perplexity=30.0 + i, seconds=10.0, bits_per_weight=3 + i / 64)
        for i, label in enumerate(sorted(LABELS))
    )
    return replace(found, runs=tuple(runs))


def test_every_claim_is_about_runs_of_the_suites(report):
    text = claims.table(report)
    assert "Not in this report" not in text
    assert text.count("\n") == len(claims.CLAIMS) + 1


def test_a_claim_passes_by_its_numbers_only(report):
    label = "hqq-int3-g64-asym"
    for perplexity, verdict in ((1.0, "| pass |"), (1000.0, "**not met**")):
        runs = tuple(replace(r, perplexity=perplexity) if r.label == label else r for r in report.runs)
        (row,) = [
            x
            for x in claims.table(replace(report, runs=runs)).splitlines()
            if "better than RTN at 3" in x and "hqq" in x
        ]
        assert verdict in row
        assert f"{perplexity:.3f}" in row


def test_a_line_between_two_runs_is_read_at_the_bits_of_the_third(report):
    bits = {"spqr-int3-g16-asym-dq": (3.9, 33.0), "gptq-int3-g32-asym": (3.6, 36.0), "gptq-int3-g16-asym": (4.2, 34.0)}
    runs = {k: replace(report.runs[0], label=k, bits_per_weight=b, perplexity=p) for k, (b, p) in bits.items()}
    check = claims.interpolated(*bits)
    assert check(runs)[0]
    assert "33.000 at 3.900 bits against 35.000" in check(runs)[1]
    worse = runs | {"spqr-int3-g16-asym-dq": replace(runs["spqr-int3-g16-asym-dq"], perplexity=35.1)}
    assert not check(worse)[0]


def test_a_claim_without_its_run_is_named(report):
    runs = tuple(r for r in report.runs if not r.label.startswith("spqr"))
    text = claims.table(replace(report, runs=runs))
    assert "Not in this report: spqr: 3-bit base" in text
    assert "(no run 'spqr-int3-g16-asym-dq')" in text
