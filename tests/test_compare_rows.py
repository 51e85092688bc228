"""What a comparison's rows hold beside perplexity: windows, divergence, tasks, histograms; models and processes."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quantforge
from quantforge import record
from quantforge.calibrate import corpus
from quantforge.comparison import cells, isolated
from quantforge.errors import DataError, PlanError, RecipeError
from quantforge.evaluation import histograms, perplexity
from quantforge.evaluation import reference as references
from quantforge.evaluation.significance import paired_change
from quantforge.models import load as loading
from quantforge.models import tiny
from quantforge.record import Report, Run

TINY = Path(__file__).parent / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, object]:
    """Return the arguments that all comparisons here have in common."""
    folder = tmp_path_factory.mktemp("text")
    for part in ("calibration", "evaluation"):
        (folder / f"{part}.txt").write_text(corpus.load_text("python-docs", part).text[:8000], encoding="utf-8")
    return {
        "calibration": str(folder / "calibration.txt"),
        "data": str(folder / "evaluation.txt"),
        "samples": 8,
        "seq_len": 64,
        "windows": 6,
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Return a folder with a task of our own: which of two endings follows."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [f'{{"start": "the value of {w} is", "right": " the", "wrong": " zzq"}}' for w in ("x", "y", "it", "self")]
    (folder / "endings.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "endings.yaml").write_text(
        "task: endings\ndataset_path: json\ndataset_kwargs: {data_files: {test: endings.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{start}}"\ndoc_to_choice: "{{[right, wrong]}}"\n'
        "doc_to_target: 0\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def made(shared, tasks, tmp_path_factory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("made")
    methods = ["fp-bfloat16", "rtn", "gptq"]
    return quantforge.compare(TINY, methods=methods, bits=[3], task_dirs=[tasks], limit=3, out=out, **shared), out


def runs(found: Report) -> dict[str, Run]:
    return {run.label: run for run in found.runs}


def test_every_row_has_its_windows_and_their_mean_is_the_perplexity(made):
    for run in made[0].runs:
        assert len(run.losses) == 6
        assert run.perplexity == pytest.approx(math.exp(math.fsum(run.losses) / 6), rel=1e-12)
        assert run.tokens_per_second > 0
        if run.label != "fp":
            assert run.kl == pytest.approx(math.fsum(run.kls) / 6, rel=1e-12)
            assert run.divergence.tokens == 6 * 63
            assert run.divergence.bound <= run.divergence.dense + 1e-6
            assert 0 < run.divergence.agreement <= 1
            assert run.divergence.median <= run.divergence.p99


def test_the_float_model_in_another_dtype_differs_by_rounding_only(made):
    found = runs(made[0])
    floor = found["fp-bfloat16"]
    assert (floor.method, floor.bits, floor.bytes_on_disk) == ("fp", None, None)
    assert 0 < floor.kl < found["gptq-int3-g64-asym"].kl / 20
    assert floor.divergence.agreement > found["rtn-int3-g64-asym"].divergence.agreement
    assert paired_change(found["fp"].losses, found["rtn-int3-g64-asym"].losses).p < 0.05


def test_tasks_are_scored_in_every_row_on_the_same_items(made):
    rows = [run.tasks for run in made[0].runs]
    assert all(len(row) == 1 and row[0].task == "endings" for row in rows)
    assert {len(row[0].answers) for row in rows} == {3}
    assert len({row[0].items for row in rows}) == 1
    assert rows[0][0].chance == 0.5
    told = made[0].origins[0].evaluation["tasks"]
    assert {key: told[key] for key in ("names", "shots", "limit", "seed")} == {
        "names": ["endings"], "shots": None, "limit": 3, "seed": 0,
    }  # fmt: skip


def test_the_layers_that_lose_most_are_drawn_before_and_after(made):
    for run in made[0].runs[2:]:
        worst = sorted(run.layers, key=lambda layer: -layer.relative_loss)[: cells.WORST]
        assert {h.layer for h in run.histograms} == {layer.name for layer in worst}
        for drawn in run.histograms:
            assert len(drawn.before) == len(drawn.after) == histograms.BINS
            assert sum(drawn.before) == pytest.approx(1)
            assert sum(drawn.after) == pytest.approx(1)
            if drawn.what == "weights":  # three bits have eight values a group
                assert drawn.before != drawn.after


def test_the_bytes_of_the_text_are_those_of_what_is_predicted(made, shared):
    tokenizer = loading.read_tokenizer(TINY)
    text = Path(shared["data"]).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 6 * 64].view(6, 64)
    expected = sum(len(tokenizer.decode(window[1:]).encode()) for window in ids)
    assert made[0].origins[0].evaluation["text_bytes"] == pytest.approx(expected, abs=12)


def test_text_that_was_calibrated_on_is_told(made, shared):
    assert "overlap" not in made[0].origins[0].evaluation
    wish = {**shared, "data": shared["calibration"], "windows": 2}
    assert quantforge.compare(TINY, methods=["gptq"], **wish).origins[0].evaluation["overlap"] == 1


def test_the_record_is_read_as_it_was_written(made):
    again = record.from_json((made[1] / "report.json").read_text(encoding="utf-8"))
    assert record.to_json(again) == record.to_json(made[0])
    assert again.runs[2] == made[0].runs[2]


def test_the_float_model_runs_once_per_model_and_text(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    first = quantforge.compare(TINY, methods=["rtn"], bits=[3], **shared)
    sizes = []
    make = perplexity.make_reference
    monkeypatch.setattr(
        perplexity, "make_reference", lambda model, ids, *a, **k: sizes.append(len(ids)) or make(model, ids, *a, **k)
    )
    second = quantforge.compare(TINY, methods=["rtn"], bits=[3], **shared)
    assert sizes == [4]  # the windows whose whole distributions are compared
    for field in ("perplexity", "kl", "losses", "kls", "divergence"):
        assert getattr(first.runs[1], field) == getattr(second.runs[1], field)
    quantforge.compare(TINY, methods=["rtn"], bits=[3], **{**shared, "windows": 5})
    assert sizes == [4, 5]


def test_several_models_come_into_one_report(shared, tmp_path):
    other = tmp_path / "other"
    tiny.make("llama", seed=3, dtype=torch.bfloat16, vocab_size=259).save_pretrained(other)
    loading.read_tokenizer(TINY).save_pretrained(other)
    out = tmp_path / "report"
    found = quantforge.compare([TINY, other], methods=["rtn"], bits=[4], group_size=32, out=out, **shared)
    assert [origin.model for origin in found.origins] == ["tiny-llama", "other"]
    assert [(run.origin, run.label) for run in found.runs] == [
        (0, "fp"), (0, "rtn-int4-g32-asym"), (1, "fp"), (1, "rtn-int4-g32-asym"),
    ]  # fmt: skip
    assert found.runs[3].perplexity > found.runs[1].perplexity  # one is trained
    assert (out / "report.html").exists()
    assert (out / "other" / "report.json").exists()
    with pytest.raises(RecipeError, match="each by a name of its own"):
        quantforge.compare([TINY, TINY], methods=["rtn"], **shared)


def test_rows_in_processes_of_their_own_are_the_same_rows(made, shared, tasks, tmp_path):
    found = quantforge.compare(
        TINY, methods=["rtn"], bits=[3], task_dirs=[tasks], limit=3, isolate=True, out=tmp_path, **shared
    )
    for other in found.runs:
        one = runs(made[0])[other.label]
        for field in (
            "label",
            "method",
            "perplexity",
            "kl",
            "losses",
            "tasks",
            "layers",
            "histograms",
            "bytes_on_disk",
        ):
            assert getattr(one, field) == getattr(other, field), (one.label, field)


def test_a_process_that_dies_costs_its_row_and_a_rerun_tries_again(shared, tmp_path, monkeypatch):
    measure = isolated.measure
    asked = []

    def dies(request, label):
        asked.append(label)
        if label.startswith("rtn") and asked.count(label) == 1:
            monkeypatch.setattr(isolated.sys, "executable", str(killed))
        else:
            monkeypatch.undo()
            monkeypatch.setattr(isolated, "measure", dies)
        return measure(request, label)

    killed = tmp_path / "killed"
    killed.write_text(f"#!/bin/sh\nkill -{signal.SIGKILL.value} $$\n", encoding="utf-8")
    os.chmod(killed, 0o755)
    monkeypatch.setattr(isolated, "measure", dies)
    wish = {"methods": ["rtn", "gptq"], "bits": [3], "isolate": True, "out": tmp_path / "report", **shared}
    first = runs(quantforge.compare(TINY, **wish))
    lost = first["rtn-int3-g64-asym"]
    assert math.isnan(lost.perplexity)
    assert "ended by signal 9" in lost.notes[0]
    assert first["gptq-int3-g64-asym"].perplexity > 0
    second = runs(quantforge.compare(TINY, resume=True, **wish))
    assert second["rtn-int3-g64-asym"].perplexity > 0
    assert asked == ["fp", "rtn-int3-g64-asym", "gptq-int3-g64-asym", "rtn-int3-g64-asym"]


def test_models_in_folders_of_one_name_are_refused(shared, tmp_path):
    with pytest.raises(RecipeError, match="each by a name of its own"):
        quantforge.compare([tmp_path / "a" / "m", tmp_path / "b" / "m"], methods=["rtn"], **shared)


def test_another_model_of_the_same_name_is_not_taken_for_the_first(shared, tmp_path):
    for seed, folder in enumerate((tmp_path / "a" / "m", tmp_path / "b" / "m")):
        tiny.make("llama", seed=seed, dtype=torch.bfloat16, vocab_size=259).save_pretrained(folder)
        loading.read_tokenizer(TINY).save_pretrained(folder)
    wish = {"methods": ["rtn"], "bits": [4], "group_size": 32, "out": tmp_path / "report", **shared}
    quantforge.compare(tmp_path / "a" / "m", **wish)
    with pytest.raises(PlanError, match="other files of the model"):
        quantforge.compare(tmp_path / "b" / "m", resume=True, **wish)


def test_rows_that_are_done_stay_on_disk_while_others_are_measured(shared, tmp_path, monkeypatch):
    wish = {"bits": [4], "out": tmp_path, **shared}
    quantforge.compare(TINY, methods=["rtn", "nf4"], **wish)
    monkeypatch.setattr(cells, "in_dtype", lambda *a: (_ for _ in ()).throw(KeyError("a bug in the middle row")))
    with pytest.raises(KeyError):
        quantforge.compare(TINY, methods=["fp-bfloat16", "rtn"], resume=True, **wish)
    monkeypatch.undo()
    kept = [run.label for run in record.from_json((tmp_path / "report.json").read_text(encoding="utf-8")).runs]
    assert kept == ["fp", "rtn-int4-g64-asym", "nf4-nf4-f64-dq"]
    found = quantforge.compare(TINY, methods=["fp-bfloat16", "rtn"], resume=True, **wish)
    assert [run.label for run in found.runs] == ["fp", "fp-bfloat16", "rtn-int4-g64-asym", "nf4-nf4-f64-dq"]


def test_a_kept_reference_of_something_that_computed_otherwise_is_made_anew(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    first = quantforge.compare(TINY, methods=["rtn"], bits=[3], **shared)
    (file,) = tmp_path.iterdir()
    load = references.load

    def moved(path, made):
        found = load(path, made)
        return replace(found, losses=tuple(loss + 0.1 for loss in found.losses))

    monkeypatch.setattr(references, "load", moved)
    again = quantforge.compare(TINY, methods=["rtn"], bits=[3], **shared)
    assert file.exists()
    assert again.runs[0].perplexity == first.runs[0].perplexity
    assert again.runs[1].kl == first.runs[1].kl


def test_rows_of_their_own_run_no_code_of_the_current_folder(shared, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('code of the current folder')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(quantforge.__file__).parent.parent))
    found = quantforge.compare(TINY, methods=["fp"], isolate=True, **shared)
    assert found.runs[0].perplexity > 1


def test_an_unknown_task_is_refused_before_weights_are_read(shared, monkeypatch):
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(DataError, match="quantforge_pairs"):
        quantforge.compare(TINY, methods=["rtn"], tasks=["quantforge_pair"], **shared)


def test_a_spread_counts_every_finite_value_once():
    found = histograms.spread(torch.tensor([-1.0, 0.0, 0.0, 1.0, math.nan, math.inf]))
    assert found.edge == 1
    assert (found.shares[0], found.shares[30], found.shares[60]) == (0.25, 0.5, 0.25)
    beyond = histograms.spread(torch.tensor([-5.0, 5.0, 0.0, 0.0]), 1.0)
    assert (beyond.shares[0], beyond.shares[30], beyond.shares[60]) == (0.25, 0.5, 0.25)
    assert histograms.spread(torch.zeros(3)).shares[30] == 1
    assert sum(histograms.spread(torch.tensor([math.nan])).shares) == 0
