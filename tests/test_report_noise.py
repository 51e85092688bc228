"""What the report says of noise: tests where runs can be paired, the reason where they cannot, the same everywhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from functools import cache
from pathlib import Path

import pytest

from quantforge import report
from quantforge.evaluation import significance
from quantforge.record import Report, Run
from quantforge.report import content, groups, layers, noise, tables, to_html, to_markdown, verdicts

_SPEC = importlib.util.spec_from_file_location("made_reports", Path(__file__).with_name("made_reports.py"))
made_reports = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made_reports)
a_report, a_run = made_reports.a_report, made_reports.a_run


@cache
def rich() -> Report:
    return made_reports.rich()


@cache
def found() -> tuple[noise.Difference, ...]:
    return tuple(noise.differences(rich()))


@cache
def page() -> str:
    return to_html(rich())


@cache
def text() -> str:
    return to_markdown(rich())


def place(label: str) -> int:
    return next(i for i, run in enumerate(rich().runs) if run.label == label)


def one(label: str, role: str, what: str, task: str | None = None) -> noise.Difference:
    (only,) = (d for d in found() if (d.run, d.role, d.what, d.task) == (place(label), role, what, task))
    return only


def test_every_run_but_the_float_model_is_compared_with_it_and_with_the_best_of_its_width():
    made = rich()
    pairs = set(noise.pairs(made))
    assert {i for i, other, role in pairs if role == "float"} == set(range(1, len(made.runs)))
    assert {other for _, other, role in pairs if role == "float"} == {0}
    against = {made.runs[i].label: made.runs[other].label for i, other, role in pairs if role == "best"}
    assert against == {
        "rtn-int4-g64-asym": "gptq-int4-g64-asym", "awq-int4-g64-asym": "gptq-int4-g64-asym",
        "rtn-int3-g64-asym": "gptq-int3-g64-asym",
    }  # fmt: skip


def test_perplexity_is_compared_by_the_paired_bootstrap_and_shown_as_a_share():
    runs, shown = rich().runs, one("gptq-int4-g64-asym", "float", "perplexity")
    expected = significance.paired_change(runs[0].losses, runs[place("gptq-int4-g64-asym")].losses)
    assert (shown.change, shown.low, shown.high) == tuple(
        end - 1 for end in dataclasses.astuple(expected.ratio)
    )  # fmt: skip
    assert shown.p == expected.p
    assert shown.change == pytest.approx(
        runs[place("gptq-int4-g64-asym")].perplexity / runs[0].perplexity - 1, rel=1e-9
    )
    assert (shown.verdict, shown.size) == ("worse", made_reports.WINDOWS)


def test_answers_are_compared_by_mcnemar_over_all_items_and_by_task():
    runs = rich().runs
    run = runs[place("rtn-int3-g64-asym")]
    whole = one(run.label, "float", "answers")
    by_task = [one(run.label, "float", "answers", task.task) for task in run.tasks]
    assert whole.size == sum(d.size for d in by_task) == 1000
    assert whole.lost == sum(d.lost for d in by_task) > sum(d.gained for d in by_task) == whole.gained
    flips = significance.mcnemar(*([c == "1" for t in r.tasks for c in t.answers] for r in (runs[0], run)))
    assert (whole.p, whole.lost, whole.gained) == (flips.p, flips.lost, flips.gained)
    assert whole.verdict == "worse"


def test_kl_is_compared_with_the_best_run_only():
    assert {d.role for d in found() if d.what == "KL"} == {"best"}


def test_a_run_that_is_the_same_shows_no_difference():
    level = rich().runs[0]
    twin = dataclasses.replace(level, label="rtn-int8", method="rtn", bits=8)
    for each in noise.differences(dataclasses.replace(rich(), runs=(level, twin))):
        assert each.verdict == "no difference shown"
        assert each.p == 1


@pytest.mark.parametrize(
    ("changes", "what", "reason"),
    [
        ({"losses": ()}, "perplexity", "rtn-int8-g64-asym has no perplexity of each window"),
        ({"losses": (3.0, math.nan) * 24}, "perplexity", "rtn-int8-g64-asym has no perplexity of each window"),
        ({"losses": (3.0,) * 47}, "perplexity", "47 windows against 48"),
        ({"tasks": ()}, "answers", "rtn-int8-g64-asym has no answers"),
    ],
)
def test_what_cannot_be_paired_has_a_reason_and_no_verdict(changes, what, reason):
    level, run = rich().runs[0], dataclasses.replace(rich().runs[2], **changes)
    made = dataclasses.replace(rich(), runs=(level, run, rich().runs[3]))
    (each,) = (d for d in noise.differences(made) if (d.run, d.what, d.task) == (1, what, None))
    assert (each.verdict, each.reason) == ("", reason)
    assert math.isnan(each.p)
    cells = [cell for row in verdicts.against_float(made, noise.differences(made)).rows for cell in row]
    assert [cell.detail for cell in cells if cell.text == "not compared"] == [reason]


@pytest.mark.parametrize("changes", [{"items": "other"}, {"shots": 5}, {"answers": "1"}])
def test_answers_to_other_items_are_not_compared(changes):
    level, run = rich().runs[0], rich().runs[2]
    first, *rest = run.tasks
    made = dataclasses.replace(
        rich(), runs=(level, dataclasses.replace(run, tasks=(dataclasses.replace(first, **changes), *rest)))
    )
    own = {d.task: d for d in noise.differences(made) if d.what == "answers"}
    assert own[first.task].reason == "they answered other items"
    assert not own[first.task].verdict
    assert own[None].size == sum(len(task.answers) for task in rest)


def test_the_float_model_in_another_dtype_is_the_noise_floor():
    floors = noise.floors(rich(), found())
    assert list(floors) == [place("fp-bfloat16")]
    assert noise.below_floor(rich(), found(), one("rtn-int8-g64-asym", "float", "perplexity"))
    assert not noise.below_floor(rich(), found(), one("gptq-int4-g64-asym", "float", "perplexity"))
    said = content.make(rich()).noise
    assert any("a difference below this is no larger than what another dtype changes" in each for each in said)
    assert any("rtn-int8-g64-asym is no larger than what another dtype changes" in sentence for sentence in said)
    for document in (page(), text()):
        assert "rounding" not in document.partition("more than noise?")[2].partition("Loss by")[0]
    first = verdicts.against_float(rich(), found()).rows[0]
    assert (first[0].text, first[0].detail) == ("fp-bfloat16", "noise floor")


def test_runs_of_different_models_or_tokens_are_never_paired():
    made = made_reports.two_models()
    for each in noise.differences(made):
        assert made.runs[each.run].origin == made.runs[each.against].origin
    assert "no test is made between them" in noise.unpaired(made)
    same = dataclasses.replace(made, origins=(made.origins[0], made.origins[0]))
    own = {d.against for d in noise.differences(same) if d.role == "float" and same.runs[d.run].origin}
    assert own == {8}, "the float model of the same comparison comes first"
    assert any(same.runs[d.run].origin != same.runs[d.against].origin for d in noise.differences(same))
    unknown = dataclasses.replace(made.origins[0], evaluation={})
    made = dataclasses.replace(made, origins=(unknown, unknown))
    assert all(made.runs[d.run].origin == made.runs[d.against].origin for d in noise.differences(made))


def test_a_run_on_the_same_tokens_but_another_machine_is_paired():
    made = rich()
    other = dataclasses.replace(made.origins[0], machine={"processor": "another"}, created="later")
    moved = dataclasses.replace(made.runs[4], origin=1)
    made = dataclasses.replace(made, origins=(*made.origins, other), runs=(made.runs[0], moved))
    assert [(d.run, d.against) for d in noise.differences(made) if d.what == "perplexity"] == [(1, 0)]


def test_what_failed_is_nobodys_float_model_and_is_not_called_float():
    broken = a_run("gptq-int4", None, math.nan, method="gptq-int4", bits_per_weight=math.nan, kl=math.nan,
                   options={"failed": "out of memory"}, notes=("out of memory",))  # fmt: skip
    made = a_report(broken, a_run("fp", None, 10.0), a_run())
    assert groups.reference(made, made.runs[2]) == 1
    assert [row[1].text for row in tables.results(made).rows] == ["n/a", "float", "4"]


# --- in words -----------------------------------------------------------------------------------------------------


def test_the_lead_names_rivals_from_which_no_difference_is_shown():
    said = content.make(rich()).lead
    assert "gptq-int4-g64-asym (31.354, no difference shown from awq-int4-g64-asym)" in said
    assert "gptq-int3-g64-asym (38.875)" in said


def test_a_report_without_windows_or_answers_says_nothing_of_noise():
    made = a_report()
    assert not content.make(made).noise
    for text in (to_html(made), to_markdown(made)):
        assert "more than noise" not in text
    assert "Is it more than noise?" in page()


def test_all_documents_say_the_same_verdicts_and_numbers():
    made = content.make(rich())
    in_page, in_text = re.sub(r"<[^>]+>", " ", page()), text().replace("\\", "")
    tables_ = (made.results, made.against_float, *made.against_best, made.tasks, made.divergence)
    for cell in {(c.text, c.detail) for table in tables_ for row in table.rows for c in row}:
        for part in cell:
            assert part in in_page
            assert part in in_text


def test_the_number_of_tests_is_said():
    count = sum(bool(each.verdict) for each in found())
    assert f"These are {count} tests" in text()
    assert f"These are {count} tests" in page()


def test_that_the_best_row_is_chosen_on_the_same_windows_is_said_where_it_is_compared_with():
    said = "so that comparisons with it lean towards “worse”: more than one in 20 of them where nothing differs."
    assert said in text()
    assert said in page()
    alone = content.make(dataclasses.replace(rich(), runs=(rich().runs[0], rich().runs[3])))
    assert "These are 7 tests" in alone.caution
    assert "“worse”" not in alone.caution


def test_on_which_inputs_losses_are_judged_is_said_at_their_table():
    for document, head in ((page(), "<h2>Loss by layer</h2>"), (text(), "## Loss by kind of layer")):
        own = re.split(r"<h2>|## ", document.partition(head)[2])[0].replace("&#39;", "'")
        assert own.count(layers.INPUTS) == 1
    bare = dataclasses.replace(rich(), runs=rich().runs[:2])
    assert layers.INPUTS not in to_html(bare).replace("&#39;", "'")


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.042, "4.2 % of"), (0.5, "50 % of"), (1, "100 % of"), (0.0, ""), (None, ""), (True, ""), ("0.5", ""), (-1, "")],
)
def test_text_that_was_calibrated_on_is_said_in_red(share, said):
    made = a_report(evaluation={"overlap": share})
    in_page, in_text = to_html(made), to_markdown(made)
    assert ('<p class="alert">' in in_page) == bool(said)
    assert said in in_page
    assert bool(re.search(r"\*\*[\d.]+ % of the evaluation text", in_text)) == bool(said)


def test_intervals_hold_the_number_they_are_of():
    for row in tables.results(rich()).rows:
        for cell in row[1:]:
            if cell.detail:
                low, high = map(float, cell.detail.split("–"))
                assert low <= float(cell.text) <= high


def test_bits_per_byte_is_the_loss_in_bits_over_the_bytes_of_the_text():
    made = rich()
    expected = sum(made.runs[0].losses) * 511 / math.log(2) / 70_000
    assert tables.bits_per_byte(made, made.runs[0]) == pytest.approx(expected, rel=1e-12)
    for evaluation in ({}, {"seq_len": 512, "text_bytes": "70000"}, {"seq_len": 512, "text_bytes": 0}):
        without = dataclasses.replace(made, origins=(dataclasses.replace(made.origins[0], evaluation=evaluation),))
        assert math.isnan(tables.bits_per_byte(without, made.runs[0]))
        assert "bits/byte" not in [column.heading for column in tables.results(without).columns]


def test_columns_that_nobody_measured_are_left_out():
    headings = [column.heading for column in tables.results(a_report()).columns]
    assert headings == [
        "method", "bits", "bits/weight", "perplexity", "KL", "size (MB)", "seconds", "peak memory (MB)",
    ]  # fmt: skip
    everything = [column.heading for column in tables.results(rich()).columns]
    assert everything[5:8] == ["same top-1 (%)", "bits/byte", "right (%)"]
    assert everything[-1] == "evaluated (tokens/s)"


def test_answers_to_different_tasks_are_not_thrown_together():
    made = rich()
    fewer = dataclasses.replace(made.runs[3], tasks=made.runs[3].tasks[1:])
    made = dataclasses.replace(made, runs=(*made.runs[:3], fewer))
    assert not tables.all_answers(made)
    assert "right (%)" not in [column.heading for column in tables.results(made).columns]
    rows = verdicts.tasks(made, noise.differences(made)).rows
    assert [row[0].text for row in rows] == list(made_reports.SOME)
    assert rows[0][-1].text == "n/a"


SMOKE = ("quantforge_pairs", "quantforge_completions", "quantforge_choices")
BLIMP = tuple(f"blimp_paradigm_{i}" for i in range(34))


def asked(*names: str) -> Report:
    """Return two runs that answered tasks of these names."""
    return a_report(*(
        made_reports.enriched(a_run(label, bits), 0.2 * (bits is not None), tasks=names, items=20 + len(label))
        for label, bits in (("fp", None), ("q4", 4))
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (SMOKE, {name: (name,) for name in SMOKE}),
        ((*SMOKE, *BLIMP), {**{name: (name,) for name in SMOKE}, "blimp (34)": BLIMP}),
        (BLIMP, {"blimp (34)": BLIMP}),
        (BLIMP[:5], {"blimp (5)": BLIMP[:5]}),
        (BLIMP[:4], {name: (name,) for name in BLIMP[:4]}),
        (made_reports.SOME, {"right (%)": made_reports.SOME}),
        ((*BLIMP, "piqa", *SMOKE), {"others (4)": ("piqa", *SMOKE), "blimp (34)": BLIMP}),
        ((), {}),
    ],
    ids=len,
)
def test_tasks_with_one_beginning_are_one_column_of_the_results_if_they_are_many(names, columns):
    made = asked(*names)
    table = tables.results(made)
    assert {k: tuple(sorted(v)) for k, v in tables.task_columns(made).items()} == {
        k: tuple(sorted(v)) for k, v in columns.items()
    }
    headings = [column.heading for column in table.columns]
    assert [heading for heading in headings if heading in columns] == list(columns)
    for heading, own in columns.items():
        for run, row in zip(made.runs, table.rows, strict=True):
            pooled = "".join(task.answers for task in run.tasks if task.task in own)
            assert row[headings.index(heading)].value == pytest.approx(100 * pooled.count("1") / len(pooled))


def test_a_report_on_37_tasks_can_be_read_and_loses_no_column():
    made = asked(*SMOKE, *BLIMP)
    lines = report.table(made).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) == 3 * 4 + 2
    shown = {cell.strip() for line in lines for cell in line.split("|")}
    assert {column.heading for column in tables.results(made).columns} <= shown
    document, whole = to_markdown(made), to_html(made)
    assert "\n".join(lines[5:9]) in document
    assert [part.name for part in tables.parted(tables.results(made))] == ["Results", "Right answers, percent", "Cost"]
    assert "<h3>Right answers, percent</h3>" in whole
    for each in (document, whole):
        assert "Columns of tasks are right answers in percent" in each
        assert all(task in each for task in BLIMP), "the table of tasks has them all"
    assert "Columns of tasks" not in text()


def test_a_task_with_the_name_of_another_column_is_not_taken_for_it():
    made = asked("seconds", "perplexity", *BLIMP)
    parts = {part.name: [column.heading for column in part.columns] for part in tables.parted(tables.results(made))}
    assert parts["Right answers, percent"] == ["method", "bits", "seconds", "perplexity", "blimp (34)"]
    assert parts["Results"].count("perplexity") == parts["Cost"].count("seconds") == 1


def test_a_task_is_marked_where_it_is_worse_by_more_than_noise():
    table = verdicts.tasks(rich(), found())
    for row, task in zip(table.rows, (None, *made_reports.SOME), strict=True):
        for cell, run in zip(row[4:], rich().runs, strict=True):
            worse = run.label != "fp" and one(run.label, "float", "answers", task).verdict == "worse"
            assert cell.text.startswith("▼ ") == worse == (cell.tone == "worse")


def test_divergence_says_what_the_lower_bound_misses():
    row = tables.divergence(rich()).rows[4]
    assert float(row[-1].text) == pytest.approx(1.5)
    assert "lower bounds" in text()
    assert "lower bounds" in page()


def test_a_long_report_stays_below_3_mb_and_says_what_is_left_out():
    names = tuple(f"blimp_paradigm_number_{i}" for i in range(37))
    made = to_html(made_reports.rich(30, tasks=names, items=1000, histograms=4))
    assert len(made.encode()) < 3_000_000
    assert made.count("blimp_paradigm_number_36") > 8
    assert made.count("model.layers.29.mlp.down_proj") >= 6


def test_a_page_that_would_be_too_long_loses_its_parts_in_turn(monkeypatch):
    whole = page()
    monkeypatch.setattr(report.page, "MOST_BYTES", 0)
    least = to_html(rich())
    assert "<summary>Every test, task by task" in whole
    assert "Every test, task by task" not in least
    assert "The tests task by task are too many for this page." in least
    assert re.search(r"\d+ histograms are left out here; report.json has them", least)
    assert "the 20 that lose most" in least
    assert len(least) < len(whole) / 2


# --- several comparisons ------------------------------------------------------------------------------------------


def test_names_are_labels_alone_where_these_differ():
    assert [name.text for name in groups.names(rich())] == [run.label for run in rich().runs]


def labelled(*origins: dict[str, object]) -> list[str]:
    """Return the names of one run of each of several comparisons with these differences."""
    first = rich().origins[0]
    run: Run = rich().runs[0]
    made = dataclasses.replace(
        rich(), origins=tuple(dataclasses.replace(first, **changes) for changes in origins),
        runs=tuple(dataclasses.replace(run, origin=i) for i in range(len(origins))),
    )  # fmt: skip
    return [name.text for name in groups.names(made)]


def test_one_label_in_two_comparisons_is_told_apart_by_what_differs():
    assert labelled({}, {"model": "b"}) == ["fp · tiny-135m", "fp · b"]
    assert labelled({}, {"machine": {"accelerator": "H200"}}) == ["fp · cpu", "fp · H200"]
    assert labelled({}, {"created": "2027-01-01"}) == ["fp · 2026-01-01", "fp · 2027-01-01"]
    assert labelled({}, {"command": "another"}) == ["fp · comparison 1", "fp · comparison 2"]
    assert labelled({}, {"model": "b"}, {"model": "b", "created": "2027-01-01"}) == [
        "fp · tiny-135m", "fp · b, 2026-01-01", "fp · b, 2027-01-01",
    ]  # fmt: skip


def test_of_two_models_the_lead_speaks_of_each():
    said = content.lead(made_reports.two_models())
    assert said.count("Lowest perplexity of the quantized rows of") == 2
    assert "The float model has 28.800." in said
    assert "The float model has 21.336." in said


def test_a_run_without_a_float_model_on_its_tokens_is_not_compared_and_that_is_said():
    made = made_reports.two_models()
    made = dataclasses.replace(
        made, runs=tuple(run for run in made.runs if not (run.origin == 1 and run.label == "fp"))
    )
    assert not [d for d in noise.differences(made) if d.role == "float" and made.runs[d.run].origin == 1]
    said = noise.unpaired(made)
    assert "No float model was measured on the same tokens for gptq-int4-g64-asym, rtn-int4-g64-asym." in said


def test_a_width_whose_runs_cannot_be_paired_has_no_table():
    bare = tuple(dataclasses.replace(run, losses=(), kls=(), tasks=()) if run.bits == 3 else run for run in rich().runs)
    made = content.make(dataclasses.replace(rich(), runs=bare))
    assert [table.name for table in made.against_best] == ["At 4 bits, against gptq-int4-g64-asym"]
