"""`--calib self`: calibration on what the float model itself writes, wherever calibration text is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import quantforge
from quantforge import api, cli
from quantforge.calibration_study.design import Cell
from quantforge.calibration_study.run import calibration_study
from quantforge.distill import generate
from quantforge.errors import DataError, ModelError, PlanError
from quantforge.models import load as loading
from quantforge.models import tiny

TINY = Path(__file__).parent / "data" / "tiny-llama"
SMALL = {"samples": 6, "seq_len": 24}


@pytest.fixture(scope="module")
def written() -> torch.Tensor:
    """Return what the tiny model writes by seed 3, without quantforge.quantize."""
    source = loading.find(str(TINY))
    tokens = generate.tokens_of(loading.tokenizer(source), source.config)
    return generate.self_text(loading.model(source), tokens, 6, 24, seed=3)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Return a folder that what can be made anew is kept in."""
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path) -> str:
    """Return the path of a short text."""
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 20, encoding="utf-8")
    return str(path)


def never(*args: object, **kwargs: object) -> torch.Tensor:
    raise AssertionError("the model was asked to write")


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def test_a_model_is_quantized_on_what_it_writes_itself(written):
    found = api.quantize(TINY, "gptq", bits=3, calibration="self", seed=3, **SMALL)
    expected = api.quantize(TINY, "gptq", bits=3, calibration=written)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(ours.weight.base.codes, theirs.weight.base.codes), ours.name
    other = api.quantize(TINY, "gptq", bits=3, calibration="self", seed=4, **SMALL)
    assert other.calibration["ids_sha256"] != found.calibration["ids_sha256"]


def test_the_record_says_where_the_tokens_came_from_and_the_seed():
    told = api.quantize(TINY, "gptq", calibration="self", seed=3, **SMALL).record()["calibration"]
    assert told["name"] == "self"
    assert "the float model itself wrote" in told["source"]
    assert (told["seed"], told["count"], told["seq_len"], told["tokens"]) == (3, 6, 24, 144)
    assert len(told["ids_sha256"]) == 64


def test_a_model_in_memory_writes_too_with_a_tokenizer_or_without():
    model = tiny.make("llama").train()
    result = api.quantize(model, "gptq", calibration="self", samples=2, seq_len=16)
    assert result.calibration["name"] == "self"
    assert model.training
    broken = tiny.make("llama")
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        api.quantize(broken, "gptq", calibration="self", samples=2, seq_len=16)


def test_what_was_written_is_kept_and_written_anew_only_for_something_else(cache, monkeypatch):
    first = api.quantize(TINY, "gptq", calibration="self", seed=3, **SMALL)
    (file,) = cache.iterdir()
    monkeypatch.setattr(generate, "self_text", never)
    again = api.quantize(TINY, "gptq", calibration="self", seed=3, **SMALL)
    assert again.calibration == first.calibration
    with pytest.raises(AssertionError, match="asked to write"):
        api.quantize(TINY, "gptq", calibration="self", seed=4, **SMALL)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AssertionError, match="asked to write"):
        api.quantize(TINY, "gptq", calibration="self", seed=3, **SMALL)


def test_the_commands_take_it(tmp_path, written):
    options = ["--calib", "self", "--seed", 3, "--samples", 6, "--seq-len", 24]
    done = run("quantize", TINY, *options, "--out", tmp_path / "q", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["calibration"]
    assert told["name"] == "self"
    assert told["ids_sha256"] == api.references.digest(written)
    assert json.loads((tmp_path / "q" / "quantforge.json").read_text(encoding="utf-8"))["calibration"] == told
    dry = run("quantize", TINY, "--calib", "self", "--dry-run")
    assert dry.exit_code == 0, dry.output


def test_all_rows_of_a_comparison_are_calibrated_on_it(tmp_path, cache, text):
    shared = {"samples": 4, "seq_len": 24, "windows": 2, "methods": ("fp", "rtn", "gptq"), "bits": (3,), "data": text}
    found = quantforge.compare(TINY, calibration="self", seed=3, out=tmp_path / "report", **shared)
    told = found.origins[0].calibration
    assert (told["name"], told["seed"]) == ("self", 3)
    assert [run.label.split("-")[0] for run in found.runs] == ["fp", "rtn", "gptq"]
    alone = api.quantize(TINY, "gptq", bits=3, calibration="self", samples=4, seq_len=24, seed=3)
    assert alone.calibration == told
    losses = {row.name: row.loss for row in found.runs[2].layers}
    assert losses == {layer.name: pytest.approx(layer.loss) for layer in alone.layers}
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "the float model itself wrote" in page
    resumed = quantforge.compare(TINY, calibration="self", seed=3, out=tmp_path / "report", resume=True, **shared)
    assert resumed.runs == found.runs


def test_a_study_has_the_model_write_a_text_for_each_seed(text):
    found = calibration_study(
        TINY, method="gptq", bits=3, calibrations=["self"], samples=[2, 4], seq_lens=[24], seeds=[0, 3], windows=2,
        eval_seq_len=24, data=text,
    )  # fmt: skip
    assert [run.cell for run in found.runs] == [Cell("self", n, 24) for n in (2, 2, 4, 4)]
    digests = {(run.cell.samples, run.seed): run.ids_sha256 for run in found.runs}
    assert len(set(digests.values())) == 4
    alone = api.quantize(TINY, "gptq", bits=3, calibration="self", samples=4, seq_len=24, seed=3)
    assert alone.calibration["ids_sha256"] == digests[4, 3]
    (pool,) = found.pools
    assert pool.name == "self"


def test_a_study_compares_it_with_a_text(tmp_path, text):
    options = ["--samples", 2, "--seq-lens", 24, "--seeds", "0,1", "--windows", 2, "--eval-seq-len", 24, "--data", text]
    done = run("calibration-study", TINY, "--calib", f"self,{text}", *options, "--out", tmp_path / "study")
    assert done.exit_code == 0, done.output
    assert "2 x 24 of self" in done.output
    assert f"2 x 24 of {text}" in done.output


def test_what_a_model_writes_is_no_evaluation_text():
    with pytest.raises(DataError, match="no text set or file is called 'self'"):
        api.evaluate(TINY, data="self")


def test_windows_longer_than_the_models_positions_are_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(loading, "model", never)
    with pytest.raises(PlanError, match="positions of this model"):
        api.quantize(TINY, "gptq", calibration="self", samples=2, seq_len=100_000)


def test_without_a_model_there_is_nothing_that_could_write():
    source = loading.find(str(TINY))
    with pytest.raises(DataError, match="needs the model") as caught:
        api.token_ids("self", "calibration", tokenizer=None, config=source.config, seq_len=8, count=2)
    assert caught.value.number == 477
