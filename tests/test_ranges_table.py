"""The table of granularities by range rules: what it says of its numbers, and how it gets them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from quantforge.calibrate import corpus
from quantforge.models import arch
from quantforge.models import load as loading
from quantforge.numerics.formats import parse
from quantforge.numerics.qtensor import fit, quantize

ROOT = Path(__file__).parent.parent
SOURCE = loading.find(str(ROOT / "tests" / "data" / "tiny-llama"))
_SPEC = importlib.util.spec_from_file_location("ranges_table", ROOT / "tools" / "ranges_table.py")
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)

TENSOR, CHANNEL, GROUP = tool.GRANULARITIES


def values(**changes):
    """Return a value for each place that falls with finer granularity, but for `changes` by rule of the group's."""
    found = {(g, r): 3.0 - i for i, g in enumerate(tool.GRANULARITIES) for r in tool.RULES}
    return found | {(GROUP, rule): value for rule, value in changes.items()}


@pytest.fixture(scope="module")
def ids():
    tokenizer = loading.read_tokenizer(SOURCE.path)
    return corpus.windows(corpus.load_text("python-docs", "calibration"), tokenizer, 64, 8).ids


def test_the_verdict_is_pass_where_every_finer_granularity_is_lower():
    assert tool.verdict(values()) == "pass in all 10 steps"


def test_the_verdict_names_every_place_where_it_is_not():
    said = tool.verdict(values(mse=2.5, learned=2.0))
    assert (
        said == f"**not met** in 2 of 10 steps: {GROUP} than {CHANNEL} under mse, {GROUP} than {CHANNEL} under learned"
    )
    coarse = values() | {(TENSOR, "minmax"): 1.5}
    assert tool.verdict(coarse) == f"**not met** in 1 of 10 steps: {CHANNEL} than {TENSOR} under minmax"


def test_a_value_that_is_no_number_does_not_pass():
    assert "not met" in tool.verdict(values(hessian=float("nan")))


def test_the_table_has_a_row_a_granularity_and_a_column_a_rule():
    found = {(g, r): 10.0 * i + j for i, g in enumerate(tool.GRANULARITIES) for j, r in enumerate(tool.RULES)}
    head, rule, *rows = tool.table(found, ".1f").splitlines()
    assert head == "| granularity | minmax | percentile | mse | hessian | learned |"
    assert rule == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert rows == [
        "| tensor | 0.0 | 1.0 | 2.0 | 3.0 | 4.0 |",
        "| channel | 10.0 | 11.0 | 12.0 | 13.0 | 14.0 |",
        "| group of 64 | 20.0 | 21.0 | 22.0 | 23.0 | 24.0 |",
    ]


def test_the_error_is_that_of_the_rounded_weights(ids):
    model, fmt, errors, sizes = loading.model(SOURCE), parse("int8-g64-asym-bf16"), 0.0, 0.0
    for name in (name for stage in arch.find_stages(model)[0] for name in stage.names):
        w = arch.get_weight(model.get_submodule(name)).detach()
        errors += float((quantize(w, fit(w, fmt), fmt).dequantize(torch.float32) - w).double().square().sum())
        sizes += float(w.double().square().sum())
    assert tool.weight_error(SOURCE, ids, "minmax", "int8-g64-asym") == pytest.approx(errors / sizes, rel=1e-6)


def test_the_error_falls_with_finer_granularity_and_with_more_bits(ids):
    eight, four = (
        [tool.weight_error(SOURCE, ids, "minmax", text.format(bits)) for text in tool.GRANULARITIES.values()]
        for bits in (8, 4)
    )
    assert eight[0] > eight[1] > eight[2] > 0
    assert four[0] > four[1] > four[2]
    # a step of 4 bits is 17 times one of 8
    assert all(100 * a < b for a, b in zip(eight, four, strict=True))


@pytest.mark.parametrize("rule", tool.RULES)
def test_every_rule_of_the_table_is_measured(ids, rule):
    assert 0 < tool.weight_error(SOURCE, ids, rule, "int8-g64-asym") < 1e-3


def test_rounding_to_the_range_of_least_squares_errs_less_than_to_min_max(ids):
    least, plain = (tool.weight_error(SOURCE, ids, rule, "int4-channel-asym") for rule in ("mse", "minmax"))
    assert least < plain
