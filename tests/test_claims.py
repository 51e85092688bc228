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

LABELS = {"fp", *(w.label for name in recipe.suites() for w in recipe.suite(name))}


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
    found, missing = claims.rows(report)
    assert not missing
    assert len(found) == len(claims.claims(3)) + len(claims.claims(4)) + len(claims.ONCE) + len(claims.ACTIVATIONS)


def test_a_claim_is_named_as_missing_only_if_the_report_speaks_of_its_method(report):
    run = next(r for r in report.runs if r.label == "gptq-int3-g64-asym")
    _, missing = claims.rows(replace(report, runs=(replace(run, method="awq+gptq"),)))
    assert {m.partition(",")[0] for m in missing} == {"awq", "gptq"}


def test_a_claim_passes_by_its_numbers_only(report):
    label = "hqq-int3-g64-asym-zero"
    for perplexity, verdict in ((1.0, "| pass |"), (1000.0, "**not met**")):
        runs = tuple(replace(r, perplexity=perplexity) if r.label == label else r for r in report.runs)
        (row,) = [
            x for x in claims.rows(replace(report, runs=runs))[0] if x.startswith("| hqq | 3 bits: better than RTN |")
        ]
        assert verdict in row
        assert f"{perplexity:.3f}" in row


def test_a_claim_on_one_layer_reads_the_losses_of_that_layer(report):
    runs = {r.label: r for r in report.runs}
    better, worse = runs["gptq-int3-g64-asym"], runs["rtn-int3-g64-asym"]
    layers = [replace(r, relative_loss=0.5 if r.name == claims.SMALL_LAYER else 9.0) for r in better.layers]
    better = replace(better, layers=tuple(layers))
    worse = replace(worse, layers=tuple(replace(r, relative_loss=0.6) for r in worse.layers))
    check = claims.loses_less("a", "b", claims.SMALL_LAYER)
    assert check({"a": better, "b": worse})[0]
    assert not check({"a": worse, "b": better})[0]


@pytest.mark.parametrize(("ratio", "verdict"), [(1.9, "| pass |"), (2.1, "**not met**")])
def test_what_lorc_adds_is_counted_without_gptq_itself(report, ratio, verdict):
    report = replace(report, runs=(replace(report.runs[0], method="gptq+lorc"),))
    info = {"ratio": ratio, "seconds": 10 * ratio, "gptq_seconds": 10.0}
    timed = [{"params": {"method": "gptq+lorc"}, "extra_info": info}, {"params": {}, "extra_info": {}}]
    (row,) = claims.speed_rows(report, timed)
    assert verdict in row
    assert f"{ratio - 1:.2f} x" in row
    others = replace(report, runs=(replace(report.runs[0], method="rtn"),))
    assert not claims.speed_rows(others, timed)


def test_the_committed_pages_are_what_the_reports_say():
    for file, text in claims.pages().items():
        assert file.read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_test_that_a_claim_names_is_there():
    for _, _, file, test in claims.TESTED:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


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
    runs = (*runs, replace(runs[0], label="spqr-int3-g64-asym-dq", method="spqr"))
    text = claims.page(replace(report, runs=runs), [])
    assert "\n- spqr, 3-bit base" in text.partition("Not in this report")[2]
    assert "(no run 'spqr-int3-g16-asym-dq')" in text
