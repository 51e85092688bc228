"""The record of a run survives JSON, and its pages say what happened and escape what they print."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantforge.errors import DataError
from quantforge.training import pages, results
from quantforge.training.curves import running_mean
from quantforge.training.results import Scored, Step, Texts, Training

HOSTILE = "<script>alert(1)</script> | `x` ]]>"


def made(**changes) -> Training:
    facts = {
        "schema": results.SCHEMA,
        "kind": "distill",
        "student": HOSTILE,
        "method": "rtn-int3-g64",
        "teacher": "teacher",
        "aim": {"loss": "fkl"},
        "settings": {"steps": 40},
        "trained": {"scales": 120, "norms": 8},
        "data": {"name": "text"},
        "evaluation": {"name": HOSTILE, "windows": 8},
        "notes": (HOSTILE,),
        "machine": {"processor": "x"},
        "versions": {"torch": "2"},
        "command": f"quantforge distill '{HOSTILE}'",
        "created": "2026-01-01",
        "steps": tuple(Step(3 - 0.02 * i, 1e-3, 1.0, 512, 0.5) for i in range(40)),
        "before": Scored(tuple(4 + 0.1 * i for i in range(8)), (1.0,) * 8),
        "after": Scored(tuple(3.5 + 0.1 * i for i in range(8)), (0.5,) * 8),
        "level": Scored(tuple(3 + 0.1 * i for i in range(8)), (0.0,) * 8),
        "texts": Texts(4, 16, 3.2, 2.5, 0.8, 0.9, 0.25),
        "seconds": 20.0,
    }
    return Training(**facts | changes)


def test_a_record_survives_json():
    run = made(peak_memory=5)
    again = results.from_json(results.to_json(run))
    assert math.isnan(again.bits_per_weight)
    assert results.to_json(again) == results.to_json(run)
    assert again.steps == run.steps


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": "quantforge-training-0"}', '{"schema": "quantforge-training-1"}']
)
def test_what_is_no_record_is_refused(text):
    with pytest.raises(DataError, match="training"):
        results.from_json(text)


def test_recovered_is_the_share_of_lost_log_perplexity():
    assert made().recovered == pytest.approx(0.5)
    assert made(after=made().level).recovered == pytest.approx(1.0)
    assert math.isnan(made(level=None).recovered)
    assert math.isnan(made(before=made().level).recovered)


def test_the_lead_gives_both_perplexities_and_the_share():
    said = pages.lead(made())
    assert "50% of what was lost is back" in said
    assert "20,480 tokens" in said
    assert pages.lead(made(steps=())) == "The run is not finished."


def test_pages_escape_names():
    page, text = pages.to_html(made()), pages.to_markdown(made())
    assert "<script>" not in page
    assert "<script>" not in text
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "ExAccErr" in page
    assert "ExAccErr" not in pages.to_html(made(texts=None))


def test_pages_are_written_for_runs_that_have_not_begun(tmp_path):
    pages.write(made(steps=(), before=None, after=None, level=None, texts=None), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"training.json", "training.md", "training.html"}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_the_running_mean_looks_back_over_a_tenth(values):
    lag = max(round(0.1 * len(values)), 1)
    expected = [sum(values[max(i + 1 - lag, 0) : i + 1]) / min(i + 1, lag) for i in range(len(values))]
    assert running_mean(values) == pytest.approx(expected, abs=1e-6)
