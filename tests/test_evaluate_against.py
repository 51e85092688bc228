"""`evaluate --against`: how far a checkpoint's predictions lie from its float model's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import quantforge
from quantforge import cli
from quantforge.calibrate import corpus
from quantforge.errors import ModelError, PlanError, RecipeError
from quantforge.evaluation import perplexity
from quantforge.evaluation.reference import DENSE
from quantforge.models import tiny

TINY = Path(__file__).parent / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "evaluation.txt"
    file.write_text(corpus.load_text("python-docs", "evaluation").text[:8000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "rtn"
    quantforge.quantize(TINY, "rtn", bits=3, group_size=32, out=out)
    return out


def test_it_says_what_a_comparison_says(text, checkpoint):
    wish = {"data": str(text), "seq_len": 64, "windows": 6}
    found = quantforge.evaluate(checkpoint, against=TINY, **wish)
    row = quantforge.compare(TINY, methods=["rtn"], bits=[3], group_size=32, **wish).runs[1]
    assert found.perplexity == pytest.approx(row.perplexity, rel=1e-6)
    assert found.against.kl.value == pytest.approx(row.kl, rel=1e-4)
    assert found.against.divergence.agreement == pytest.approx(row.divergence.agreement, abs=0.01)
    assert found.against.ratio.value == pytest.approx(found.perplexity / found.against.perplexity)
    assert found.against.ratio.low > 1
    assert found.against.verdict == "worse"
    dense, bound = found.against.gap.dense, found.against.gap.bound
    assert (dense, bound) == pytest.approx((row.divergence.dense, row.divergence.bound), rel=1e-4)
    assert 0 < bound < dense


def test_a_model_is_no_different_from_itself(text):
    found = quantforge.evaluate(TINY, against=TINY, data=text, seq_len=64, windows=4)
    assert (found.against.ratio.value, found.against.p, found.against.kl.value) == (1, 1, 0)
    assert found.against.verdict == "no difference shown"


def test_the_float_model_runs_once_for_each_text_but_for_the_windows_of_the_gap(
    text, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    wish = {"against": TINY, "data": str(text), "seq_len": 64, "windows": 6}
    ran = []
    make = perplexity.make_reference
    monkeypatch.setattr(perplexity, "make_reference", lambda *a, **k: ran.append(len(a[1])) or make(*a, **k))
    first = quantforge.evaluate(checkpoint, **wish)
    assert quantforge.evaluate(checkpoint, **wish).against == first.against
    assert ran == [6, DENSE]


def test_the_command_prints_it(text, checkpoint):
    wish = ["evaluate", checkpoint, "--against", TINY, "--data", text, "--seq-len", 64, "--windows", 8]
    result = CliRunner().invoke(cli.main, [str(part) for part in wish])
    assert result.exit_code == 0, result.output
    assert "against tiny-llama" in result.stdout
    assert "worse (p = " in result.stdout
    assert " nats per token (it misses " in result.stdout
    assert " of the dense KL in the first 4 windows), median " in result.stdout
    told = json.loads(CliRunner().invoke(cli.main, [*map(str, wish), "--json"]).stdout)["against"]
    assert told["kl"]["low"] < told["kl"]["value"] < told["kl"]["high"]
    assert math.isfinite(told["p"])
    assert told["gap"]["bound"] < told["gap"]["dense"]


def test_what_cannot_be_compared_is_refused(text, checkpoint, tmp_path):
    tiny.make("llama", vocab_size=128).save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match="128 tokens and the model 259"):
        quantforge.evaluate(checkpoint, against=tmp_path / "other", data=text, seq_len=64, windows=2)
    damaged = tmp_path / "damaged"
    shutil.copytree(TINY, damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="down_proj"):
        quantforge.evaluate(checkpoint, against=damaged, data=text, seq_len=64, windows=2)
    with pytest.raises(RecipeError, match="leave out tasks, rolling and kv"):
        quantforge.evaluate(checkpoint, against=TINY, rolling=True, data=text)
