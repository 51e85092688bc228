"""The comparison on the trained tiny model: rows that agree with single runs, files that agree with the rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quantforge
from quantforge import api, checkpoint, record, report
from quantforge.calibrate import corpus
from quantforge.errors import PlanError, RecipeError
from quantforge.memory import PeakMemory
from quantforge.models import load as loading
from quantforge.models import tiny
from quantforge.record import Report, Run
from quantforge.report import layers

TINY = Path(__file__).parent / "data" / "tiny-llama"
COMMAND = "quantforge compare 'a model' --methods fp,rtn,gptq"
LENGTH = 64


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, object]:
    """Return the arguments that all comparisons here have in common."""
    folder = tmp_path_factory.mktemp("text")
    for part in ("calibration", "evaluation"):
        (folder / f"{part}.txt").write_text(corpus.load_text("python-docs", part).text[:8000], encoding="utf-8")
    return {
        "calibration": str(folder / "calibration.txt"),
        "data": str(folder / "evaluation.txt"),
        "samples": 48,
        "seq_len": LENGTH,
        "windows": 32,
    }


@pytest.fixture(scope="module")
def made(shared, tmp_path_factory) -> tuple[Path, Report]:
    """Return the folder of a comparison at 3 and 8 bits, with its checkpoints kept in it, and its report."""
    folder = tmp_path_factory.mktemp("compare")
    found = quantforge.compare(
        TINY, bits=(3, 8), out=folder / "report", keep=folder / "kept", command=COMMAND, **shared
    )
    return folder, found


def runs(found: Report) -> dict[str, Run]:
    return {run.label: run for run in found.runs}


def test_the_float_model_comes_first_then_every_method_at_every_width(made):
    labels = [run.label for run in made[1].runs]
    assert labels == ["fp", *(f"{m}-int{b}-g64-asym" for b in (3, 8) for m in ("rtn", "gptq"))]


def test_the_float_row_is_the_reference(made, shared):
    first = made[1].runs[0]
    alone = api.evaluate(TINY, data=shared["data"], seq_len=LENGTH, windows=32)
    assert first.perplexity == alone.perplexity
    assert first.kl == 0
    assert (first.bits, first.bits_per_weight, first.layers) == (None, 16, ())


def test_kl_orders_the_runs_as_it_must(made):
    """Something is lost in every run; less with eight bits than with three, and less by GPTQ than by rounding."""
    kl = {label.removesuffix("-g64-asym"): run.kl for label, run in runs(made[1]).items()}
    assert 0 < kl["gptq-int3"] < kl["rtn-int3"]
    for method in ("rtn", "gptq"):
        assert 0 < kl[f"{method}-int8"] < kl[f"{method}-int3"] / 10


def test_perplexity_orders_the_three_bit_runs_as_it_must(made):
    found = {label.removesuffix("-g64-asym"): run.perplexity for label, run in runs(made[1]).items()}
    assert found["gptq-int3"] < found["rtn-int3"]
    assert found["fp"] < found["rtn-int3"]
    assert found["rtn-int8"] == pytest.approx(found["fp"], rel=0.005)
    assert found["gptq-int8"] == pytest.approx(found["fp"], rel=0.005)


def test_a_run_in_a_comparison_is_the_run_alone(made, shared):
    """Every run begins with the float weights: what ran before it leaves no trace."""
    together = runs(made[1])
    for method in ("gptq", "rtn"):
        alone = runs(quantforge.compare(TINY, methods=[method], bits=(3,), **shared))
        label = f"{method}-int3-g64-asym"
        assert list(alone) == ["fp", label]
        for field in ("perplexity", "kl", "layers", "bits_per_weight", "bytes_on_disk", "options", "notes"):
            assert getattr(alone[label], field) == getattr(together[label], field), field


def test_a_run_in_a_comparison_is_what_quantize_gives(made, shared):
    result = api.quantize(
        TINY, "gptq", bits=3, calibration=shared["calibration"], samples=shared["samples"], seq_len=LENGTH
    )
    row = runs(made[1])["gptq-int3-g64-asym"]
    assert [layer.relative_loss for layer in row.layers] == [layer.relative_loss for layer in result.layers]
    found = api.evaluate(
        result.model, data=shared["data"], seq_len=LENGTH, windows=32, tokenizer=loading.read_tokenizer(TINY)
    )
    assert found.perplexity == row.perplexity


def test_kept_checkpoints_load_score_and_weigh_what_the_report_says(made, shared):
    folder, found = made
    assert sorted(p.name for p in (folder / "kept").iterdir()) == sorted(run.label for run in found.runs[1:])
    for run in found.runs[1:]:
        kept = folder / "kept" / run.label
        assert run.bytes_on_disk == sum(f.stat().st_size for f in kept.glob("*.safetensors"))
        score = api.evaluate(kept, data=shared["data"], seq_len=LENGTH, windows=32)
        assert score.perplexity == run.perplexity
        assert checkpoint.read_record(kept)["bits_per_weight"] == run.bits_per_weight


def test_sizes_are_the_same_when_nothing_is_kept(made, shared):
    found = quantforge.compare(TINY, methods=["rtn"], bits=(8,), **shared)
    assert found.runs[1].bytes_on_disk == runs(made[1])["rtn-int8-g64-asym"].bytes_on_disk


def test_the_float_size_is_that_of_its_weights(made):
    file = TINY / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert made[1].runs[0].bytes_on_disk == file.stat().st_size - header


def test_the_three_files_hold_the_report(made):
    folder, found = made[0] / "report", made[1]
    assert sorted(f.name for f in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    read = record.from_json((folder / "report.json").read_text(encoding="utf-8"))
    assert record.to_json(read) == record.to_json(found)
    assert read.origins[0].command == COMMAND
    assert read.origins[0].model == "tiny-llama"
    assert "seq_len" in read.protocol
    markdown, page = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    assert COMMAND in markdown
    assert "methods fp,rtn,gptq" in page
    for run in found.runs:
        assert run.label in markdown
        assert run.label in page
        assert report.perplexity(run.perplexity) in markdown
        assert report.perplexity(run.perplexity) in page


def test_the_report_says_where_its_tokens_came_from(made):
    found = made[1].origins[0]
    assert (found.calibration["count"], found.evaluation["count"]) == (48, 32)
    assert found.calibration["text_sha256"] != found.evaluation["text_sha256"]
    assert found.versions.keys() >= {"python", "torch", "transformers"}
    assert not any(math.isnan(run.perplexity) for run in made[1].runs)
    json.loads(record.to_json(made[1]), parse_constant=lambda c: pytest.fail(c))


def test_every_layer_has_a_row_and_gptq_loses_less_in_each_kind(made):
    three = {m: runs(made[1])[f"{m}-int3-g64-asym"].layers for m in ("rtn", "gptq")}
    assert [row.name for row in three["rtn"]] == [row.name for row in three["gptq"]]
    assert len(three["gptq"]) == 28
    assert {row.kind for row in three["gptq"]} >= {"q_proj", "o_proj", "down_proj"}
    assert [row.block for row in three["gptq"]] == sorted(row.block for row in three["gptq"])


def test_a_report_that_is_there_is_not_written_over(made, shared):
    folder = made[0] / "report"
    before = (folder / "report.json").read_bytes()
    with pytest.raises(PlanError, match=r"QF-279.*--resume goes on with it"):
        quantforge.compare(TINY, methods=["rtn"], out=folder, **shared)
    assert (folder / "report.json").read_bytes() == before


def test_settings_go_to_the_methods_that_have_them(shared):
    settings = {"solver.damp_percent": 0.05}
    found = runs(quantforge.compare(TINY, methods=["rtn", "gptq"], bits=(8,), settings=settings, **shared))
    assert found["gptq-int8-g64-asym"].options["damp_percent"] == 0.05
    assert "damp_percent" not in found["rtn-int8-g64-asym"].options


def test_a_row_whose_layers_differ_says_so_in_its_label(shared):
    few = {**shared, "samples": 2, "windows": 2, "methods": ["rtn"], "bits": (4,)}
    overrides = {"*.down_proj": {"bits": 8, "symmetric": True}, "*.layers.0.*": {"skip": True}}
    label = "rtn-int4-g64-asym *.down_proj:bits=8,symmetric *.layers.0.*:skip"
    assert list(runs(quantforge.compare(TINY, overrides=overrides, **few))) == ["fp", label]
    many = {**overrides, "*.q_proj": {"method": "hqq"}}
    assert list(runs(quantforge.compare(TINY, overrides=many, **few))) == [
        "fp", "rtn-int4-g64-asym *.down_proj:bits=8,symmetric and 2 more",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ({"methods": []}, RecipeError, "at least one method"),
        ({"bits": []}, RecipeError, "number of bits"),
        ({"methods": ["fp", "gtpq"]}, RecipeError, "did you mean 'gptq'"),
        ({"methods": ["rtn"], "settings": {"solver.damp_percent": 0.1}}, RecipeError, "solver.damp_percent"),
        ({"settings": {"solver.damp_percent": "abc"}}, RecipeError, "'abc'"),
        ({"settings": {"solvr.damp_percent": 1}}, RecipeError, "the setting 'solvr.damp_percent'"),
        ({"bits": [4, 9]}, RecipeError, "2 to 8"),
        ({"seq_len": 513}, PlanError, "at most 512"),
        ({"keep": TINY}, PlanError, "tiny-llama"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_work_is_refused_before_weights_are_read(what, error, says, shared, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(error) as caught:
        quantforge.compare(TINY, **{**shared, "out": tmp_path / "report", **what})
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_does_not_depend_on_the_order_of_the_runs(shared, monkeypatch):
    counted = []

    class Told(PeakMemory):
        def __init__(self, device, above):
            super().__init__(device, above)
            counted.append(above)

    monkeypatch.setattr("quantforge.api.PeakMemory", Told)
    quantforge.compare(TINY, methods=["gptq", "rtn"], bits=[4, 3], **shared)
    assert len(counted) == 4
    assert len(set(counted)) == 1


def test_a_method_that_rescales_the_model_leaves_no_trace_for_the_next(shared):
    alone = quantforge.compare(TINY, methods=["gptq"], bits=[3], **shared)
    after = quantforge.compare(TINY, methods=["awq", "gptq"], bits=[3], **shared)
    (expected,) = (r for r in alone.runs if r.method == "gptq")
    (found,) = (r for r in after.runs if r.method == "gptq")
    assert (found.perplexity, found.kl) == (expected.perplexity, expected.kl)
    assert [row.loss for row in found.layers] == [row.loss for row in expected.layers]


def test_what_is_done_is_not_lost_when_a_later_run_fails(shared, tmp_path, monkeypatch):
    run = api.run

    def fail(model, plan, *args, **kwargs):
        if plan.recipe.name == "gptq":
            raise KeyError("a bug in the second run")
        return run(model, plan, *args, **kwargs)

    monkeypatch.setattr(api, "run", fail)
    with pytest.raises(KeyError):
        quantforge.compare(TINY, methods=["rtn", "gptq"], bits=[3], out=tmp_path / "report", **shared)
    saved = record.from_json((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert [r.method for r in saved.runs] == ["fp", "rtn"]


def test_a_suite_with_options_of_its_own_formats_is_refused():
    with pytest.raises(RecipeError, match=r"QF-221.*'weights-3bit'"):
        quantforge.compare(TINY, methods=["weights-3bit"], group_size=32)


def test_a_checkpoint_that_is_kept_already_is_refused_by_the_option_that_named_it(tmp_path):
    (tmp_path / "rtn-int4-g64-asym").mkdir()
    with pytest.raises(PlanError, match=r"QF-271.*--keep .*rtn-int4-g64-asym exists"):
        quantforge.compare(TINY, methods=["rtn"], seq_len=64, keep=tmp_path)


def test_tokens_of_experts_are_in_the_report(shared, tmp_path):
    model = tiny.make("mixtral", dtype=torch.bfloat16, vocab_size=259)
    model.save_pretrained(tmp_path / "model")
    loading.tokenizer(loading.find(str(TINY))).save_pretrained(tmp_path / "model")
    few = {**shared, "samples": 4, "windows": 2, "data": shared["calibration"]}
    found = quantforge.compare(tmp_path / "model", methods=["gptq"], group_size=32, symmetric=True, **few)
    counts = [row.notes["tokens"] for row in found.runs[1].layers if ".experts." in row.name]
    assert len(counts) == 2 * 4 * 3
    assert sum(counts) == 3 * 2 * 2 * 4 * LENGTH  # three layers an expert, two experts a token, two blocks
    rows = layers.experts(found).rows
    assert [[cell.text for cell in row[:2]] for row in rows] == [["0", "4"], ["1", "4"]]
    assert not any("tokens" in row.notes for row in found.runs[1].layers if ".experts." not in row.name)


@pytest.mark.parametrize(
    ("group_size", "lattice", "marked"),
    [(32, (4, 32), True), (16, (4, 32), True), (64, (4, 32), False), (32, (3, 32), False), (32, None, False)],
)
def test_rows_that_can_hit_the_values_of_the_models_own_file_are_marked(
    group_size, lattice, marked, shared, monkeypatch
):
    find = loading.find
    monkeypatch.setattr(loading, "find", lambda *a, **k: replace(find(*a, **k), lattice=lattice))
    few = {**shared, "samples": 2, "windows": 2}
    run = quantforge.compare(TINY, methods=["rtn"], group_size=group_size, **few).runs[1]
    assert any(note.startswith("base-biased: ") for note in run.notes) == marked


def test_an_interrupted_comparison_goes_on_where_it_stopped(shared, tmp_path, monkeypatch):
    few = {**shared, "samples": 2, "windows": 2, "out": tmp_path / "report"}
    first = quantforge.compare(TINY, methods=["rtn"], bits=(4, 3), **few)
    quantized = []
    run = api.run
    monkeypatch.setattr(api, "run", lambda *a, **k: quantized.append(a[1].recipe.label) or run(*a, **k))
    settings = {"solver.range": "mse"}
    second = quantforge.compare(TINY, methods=["rtn", "gptq"], bits=(4, 3), resume=True, **few)
    assert quantized == ["gptq-int4-g64-asym", "gptq-int3-g64-asym"]
    assert {r.label: r for r in first.runs}.items() <= {r.label: r for r in second.runs}.items()
    quantforge.compare(TINY, methods=["rtn"], bits=(4,), settings=settings, resume=True, **few)
    assert quantized[2:] == ["rtn-int4-g64-asym"]  # its options are others
    overrides = {"*.down_proj": {"bits": 8}}
    quantforge.compare(TINY, methods=["rtn"], bits=(4,), settings=settings, overrides=overrides, resume=True, **few)
    assert quantized[3:] == ["rtn-int4-g64-asym"]  # and so are those of some of its layers
    with pytest.raises(PlanError, match="other evaluation tokens"):
        quantforge.compare(TINY, methods=["rtn"], resume=True, **{**few, "windows": 3})


def test_runs_that_are_taken_over_have_no_checkpoints_to_keep(tmp_path):
    with pytest.raises(PlanError, match="leave --keep out"):
        quantforge.compare(TINY, methods=["rtn"], keep=tmp_path / "kept", out=tmp_path / "report", resume=True)
