"""`quantforge bench`: what it measures, what it rejects, and what it writes."""

import json
import math
import shutil
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

import quantforge
from quantforge.benchmark import measure, report, speed
from quantforge.benchmark.measure import Sample
from quantforge.cli.bench import bench as command
from quantforge.errors import PlanError, RecipeError, ResourceError
from quantforge.models import load, tiny
from quantforge.plots.drawing import svg
from quantforge.plots.speed import speed_figure

LLAMA = "tests/data/tiny-llama"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "model"
    quantforge.quantize(LLAMA, "rtn", bits=4, group_size=32, out=out)
    return out


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False)


def test_samples_of_a_busy_machine_are_rejected():
    good = [Sample(seconds, 0.95) for seconds in (1.0, 3.0, 2.0)]
    found = measure.judge([*good, Sample(9.0, 0.5), Sample(0.1, 0.85)])
    assert (found.seconds, found.kept, found.rejected, found.share, found.best) == (2.0, 3, 2, 0.95, 0.95)
    # a kind of work that leaves threads idle is judged by its own best sample
    assert measure.judge([Sample(1.0, 0.5), Sample(2.0, 0.48)]).rejected == 0


def test_models_take_turns_until_each_has_enough_good_samples():
    order, shares = [], iter([0.9] * 2 + [0.9, 0.2] + [0.9] * 20)

    def call(name):
        def sample():
            order.append(name)
            return (Sample(1.0, next(shares)),)

        return sample

    found = measure.in_turn({"a": call("a"), "b": call("b")}, 3, warm_up=1)
    assert order == ["a", "b"] * 5  # one to warm up, and one more than three for the sample that b lost
    assert [(part.kept, part.rejected) for (part,) in found.values()] == [(4, 0), (3, 1)]


def test_a_machine_that_stays_busy_ends_the_measurement():
    shares = iter([1.0, *[0.1] * 100])
    found = measure.in_turn({"a": lambda: (Sample(1.0, next(shares)),)}, 2, warm_up=0)
    assert (found["a"][0].kept, found["a"][0].rejected) == (1, 5)


def measured(kept, best):
    return measure.Measured(1.0, kept, 15 - kept, 0.9 * best, best)


def test_a_note_says_which_medians_are_over_few_samples():
    assert measure.few({"a": measured(5, 0.9), "b": measured(7, 0.9)}, 5) == ()
    (note,) = measure.few({"a": measured(4, 0.9), "b": measured(2, 0.9), "c": measured(5, 0.9)}, 5)
    assert note.startswith("2 of 3 medians are over fewer than 5 good samples (b: 2); ")


def test_a_note_says_which_medians_no_quiet_machine_vouches_for():
    assert measure.idle({"a": measured(5, 0.7), "b": measured(1, 0.99)}) == ()
    (note,) = measure.idle({"a": measured(5, 0.69), "b": measured(5, 0.52), "c": measured(5, 0.9)})
    assert note.startswith("in 2 of 3 medians even the best sample had its threads at work for less than 70% of the ")
    assert "(b: 52%)" in note
    # what is not known is not said: work of one thread leaves the others idle on a quiet machine, too
    assert "either this work leaves threads waiting, or the machine was busy" in note


def test_time_on_the_processor_is_told_from_time_that_passes(monkeypatch):
    wall, cpu = iter([0.0, 2.0]), iter([0.0, 1.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(cpu))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert measure.Watch().split() == Sample(2.0, 0.125)


def test_on_a_gpu_the_share_is_of_the_thread_that_feeds_it(monkeypatch):
    wall, cpu, waits = iter([0.0, 2.0]), iter([0.0, 1.0]), []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(cpu))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    assert measure.Watch("cuda").split() == Sample(2.0, 0.5)
    assert waits


def test_generation_is_timed_apart_from_the_prompt():
    model = tiny.make("llama")
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    first, rest = measure.generation(model, torch.randint(3, 128, (2, 10)), 4)
    assert calls == [(2, 10), *[(2, 1)] * 4]
    assert first.seconds > 0 < rest.seconds


def test_the_command_measures_prints_and_writes(folder, tmp_path):
    out = tmp_path / "report"
    how = ("--batch-sizes", "2,1", "--prompt-tokens", 12, "--new-tokens", 3, "--rounds", 1, "--out", out)
    found = run(folder, *how, "--json")
    assert found.exception is None
    told = json.loads(found.stdout)
    assert json.loads((out / "bench.json").read_text()) == told
    assert sorted(p.name for p in out.iterdir()) == sorted(report.FILES)
    packed, level = told["models"]
    assert packed["linear_bytes"] <= 0.2 * level["linear_bytes"]
    assert packed["operators"] == {"int4": level["operators"]["float"]}
    assert [(s["batch_size"], s["model"]) for s in told["speeds"]] == [
        (size, model["name"]) for size in (1, 2) for model in (packed, level)
    ]
    for ours, theirs in zip(told["speeds"][::2], told["speeds"][1::2], strict=True):
        assert ours["prompt_ratio"] == pytest.approx(ours["prompt_per_second"] / theirs["prompt_per_second"])
        assert ours["generated_ratio"] == pytest.approx(ours["generated_per_second"] / theirs["generated_per_second"])
        assert theirs["prompt_ratio"] == theirs["generated_ratio"] == 1
        size = ours["batch_size"]
        assert ours["prompt_per_second"] == pytest.approx(size * 12 / ours["first_token_seconds"])
    page = (out / "bench.md").read_text()
    assert page.count("\n| 1 |") == page.count("\n| 2 |") == 2
    drawing = ElementTree.parse(out / "bench.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in (out / "bench.svg").read_text()


SMALL = ("--batch-sizes", "1", "--prompt-tokens", 4, "--new-tokens", 1, "--rounds", 2)


def shares(monkeypatch, values):
    """Let every sample have the next of `values` as its share of the processors."""
    split = measure.Watch.split
    monkeypatch.setattr(measure.Watch, "split", lambda watch: replace(split(watch), share=next(values)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (cycle([0.9]), []),
        # the first sample of each thing is to warm up; then one is good and the others are not
        (chain([0.9] * 10, [0.9] * 4, cycle([0.1])), ["4 of 4 medians are over fewer than 2 good samples ("]),
        (chain([0.9], cycle([0.1])), ["1 of 2 medians are over fewer than 3 ", "in 4 of 4 medians even the best "]),
        (chain([0.9] * 6, cycle([0.5])), ["in 4 of 4 medians even the best sample "]),
    ],
)
def test_the_report_says_how_far_its_figures_can_be_trusted(folder, tmp_path, monkeypatch, values, said):
    shares(monkeypatch, values)
    found = run(folder, *SMALL, "--out", tmp_path, "--json")
    assert found.exception is None
    notes = json.loads(found.stdout)["notes"]
    assert [note.startswith(start) for note, start in zip(notes, said, strict=True)] == [True] * len(said)
    page = (tmp_path / "bench.md").read_text()
    assert all(f"\nNote: {note}.\n" in page and f"warning: {note}\n" in found.stderr for note in notes)


def test_both_models_are_timed_from_their_files_to_a_token(folder, monkeypatch):
    opened, written, files = [], [], []
    read, steps, save = speed.runtime.read, speed.steps, PreTrainedModel.save_pretrained

    def seen_save(model, place, **how):
        save(model, place, **how)
        files.extend(Path(place).glob("*.safetensors"))
        assert {t.dtype for t in load_file(files[0]).values()} == {torch.bfloat16}  # as tiny-llama's own

    def seen_read(*arguments, **how):
        opened.append(len(written))
        return read(*arguments, **how)

    def seen_steps(model, ids):
        written.append(ids.shape)
        return steps(model, ids)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", seen_save)
    monkeypatch.setattr(speed.runtime, "read", seen_read)
    monkeypatch.setattr(speed, "steps", seen_steps)
    found = speed.bench(folder, batch_sizes=[1], prompt_tokens=12, new_tokens=1, rounds=1)
    # three of each in turn or more, and the model that is measured is opened before
    assert opened[:4] == [0, 0, 2, 4]
    assert len(files) == 1
    assert set(written) == {(1, 8)}
    assert all(model.load_seconds > 0 for model in found.models)
    assert "a first token " in report.text(found)


@pytest.mark.parametrize("kind", tiny.mixtures())
def test_models_of_experts_without_tokenizers_are_measured_too(tmp_path, kind):
    model = tiny.make(kind, dtype=torch.bfloat16)
    with load.quiet():
        model.save_pretrained(tmp_path / "float")
    quantforge.quantize(model, "rtn", weights="int4-g32-sym", out=tmp_path / "packed")
    for against in (None, str(tmp_path / "float")):
        found = speed.bench(
            tmp_path / "packed", against=against, batch_sizes=[1], prompt_tokens=4, new_tokens=1, rounds=1
        )
        assert all(model.load_seconds > 0 for model in found.models)
        assert found.text == "random tokens"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_without_room_for_the_float_model_the_rest_is_measured(folder, monkeypatch, error):
    def full(*arguments, **how):
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    found = speed.bench(folder, batch_sizes=[1], prompt_tokens=4, new_tokens=1, rounds=1)
    packed, baseline = found.models
    assert packed.load_seconds > 0
    assert math.isnan(baseline.load_seconds)
    assert any("could not be saved" in note and str(error) in note for note in found.notes)
    assert " | - | float (" in report.markdown(found)


def test_models_of_the_same_name_are_told_apart(folder, tmp_path):
    twin = tmp_path / folder.name
    shutil.copytree(LLAMA, twin)
    found = speed.bench(folder, against=str(twin), batch_sizes=[1], prompt_tokens=4, new_tokens=1, rounds=1)
    assert [model.name for model in found.models] == ["model", "model, float"]
    assert [line.model for line in found.speeds] == ["model", "model, float"]


def test_the_text_has_a_line_a_model_and_one_a_batch_size(folder):
    found = run(
        folder, "--batch-sizes", "1", "--prompt-tokens", 4, "--new-tokens", 1, "--rounds", 1, "--against", LLAMA
    )
    assert found.exception is None
    lines = found.stdout.splitlines()
    assert len(lines) == 4
    assert "int4" in lines[0]
    assert lines[1].startswith("tiny-llama: ")
    assert " (x " in lines[2]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--batch-sizes", "1,x"], RecipeError, "QF-228"),
        (["--batch-sizes", "0"], RecipeError, "QF-228"),
        (["--dtype", "int4"], RecipeError, "dtype"),
        (["--device", "tpu"], ResourceError, "QF-501"),
        (["--prompt-tokens", 10**6], PlanError, "QF-254"),
    ],
)
def test_the_command_refuses_in_a_line(folder, arguments, error, said):
    found = run(folder, *arguments)
    assert isinstance(found.exception, error)
    assert said in str(found.exception)
    assert "\n" not in str(found.exception)


def test_its_report_must_not_lie_in_the_checkpoint(folder):
    assert isinstance(run(folder, "--out", folder / "speed").exception, PlanError)


def test_what_cannot_be_drawn_is_left_out():
    figure = speed_figure({"prompt": {"a": [(1.0, 10.0), (4.0, math.nan)], "b": [(1.0, 0.0)]}})
    assert "texts side by side" in svg(figure, "speed")
    assert "No speed was measured" in svg(speed_figure({"prompt": {"a": [(1.0, math.nan)]}}), "speed")
