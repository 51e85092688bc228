"""`quantforge report`: reports of several machines and models become one, and nothing is counted twice."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from quantforge import report
from quantforge.cli import main
from quantforge.errors import DataError
from quantforge.record import Report, Run, from_json, to_json
from quantforge.report import content, drawings, groups, merge, noise

_SPEC = importlib.util.spec_from_file_location("made_reports", Path(__file__).with_name("made_reports.py"))
made_reports = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made_reports)
a_report, a_run = made_reports.a_report, made_reports.a_run
MODELS, LABELS = ("a", "b", "c"), ("fp", "rtn-int4", "gptq-int4")


def of(model: str, *labels: str) -> Report:
    return a_report(*(a_run(label) for label in labels), model=model)


def rows(made: Report) -> list[tuple[str, str]]:
    return [(made.origins[run.origin].model, run.label) for run in made.runs]


def test_a_report_alone_is_itself():
    assert merge([a_report()]) == a_report()
    assert merge([a_report(), a_report()]) == a_report()


def test_runs_keep_their_origin_and_those_of_one_comparison_come_once():
    made = merge([of("a", "fp", "rtn-int4"), of("b", "fp"), of("a", "fp", "gptq-int4")])
    assert [origin.model for origin in made.origins] == ["a", "b"]
    assert rows(made) == [("a", "fp"), ("a", "rtn-int4"), ("b", "fp"), ("a", "gptq-int4")]


def test_of_a_run_that_comes_twice_the_first_counts():
    first, second = a_report(a_run("fp", perplexity=1.0)), a_report(a_run("fp", perplexity=2.0))
    assert [run.perplexity for run in merge([first, second]).runs] == [1.0]


def fell(label: str) -> Run:
    return a_run(label, perplexity=math.nan, options={"failed": "out of memory"})


def test_a_run_that_failed_gives_way_to_one_that_was_measured():
    before, after = a_report(a_run("fp"), fell("q4"), a_run("q3")), a_report(a_run("q4", perplexity=2.0))
    for reports in ([before, after], [before, a_report(fell("q4")), after, before]):
        made = merge(reports)
        assert [run.label for run in made.runs] == ["fp", "q4", "q3"]
        assert made.runs[1] == after.runs[0]
    assert merge([after, before]).runs[0] == after.runs[0]
    assert groups.failed(merge([before, before]).runs[1])


def twins(*fingerprints: str) -> Report:
    """Return one comparison for each fingerprint, all else being equal, as one report."""
    made = made_reports.rich()
    runs = (made.runs[0], made.runs[3])
    return merge([
        dataclasses.replace(made, origins=(dataclasses.replace(made.origins[0], fingerprint=each),), runs=runs)
        for each in fingerprints
    ])  # fmt: skip


def test_models_of_one_name_and_other_fingerprints_stay_two():
    made = twins("3fa9c1d2", "77aa00bb")
    assert groups.models(made) == ["tiny-135m (3fa9c1)", "tiny-135m (77aa00)"]
    assert [name.where for name in groups.names(made)][1:3] == groups.models(made)
    assert len(made.runs) == 2 * len(groups.settings(made)) == 4
    assert all(made.runs[d.run].origin == made.runs[d.against].origin for d in noise.differences(made))
    assert "no test is made between them" in noise.unpaired(made)
    for document in (report.to_html(made), report.to_markdown(made)):
        assert "Of tiny-135m (77aa00)" in document or "2. tiny-135m (77aa00), 2026" in document
        assert "4.2 % of the evaluation text for tiny-135m (3fa9c1) is" in document
    assert content.title(made) == "tiny-135m (3fa9c1) and tiny-135m (77aa00)"


def test_fingerprints_are_shown_only_where_they_tell_apart_and_as_long_as_it_takes():
    assert groups.models(twins("3fa9c1d2")) == groups.models(twins("3fa9c1d2", "")) == ["tiny-135m"]
    assert len(twins("3fa9c1d2", "3fa9c1d2").origins) == 1
    assert groups.models(twins("3fa9c1d2", "3fa9c1e2", "")) == [
        "tiny-135m (3fa9c1d)",
        "tiny-135m (3fa9c1e)",
        "tiny-135m",
    ]
    made = twins("<b>|x", "</b>\x1b|y")
    assert "<b>|x" not in report.to_html(made) + report.to_markdown(made)


parts = st.lists(st.builds(of, st.sampled_from(MODELS), st.sampled_from(LABELS)), min_size=1, max_size=5) | st.lists(
    st.sampled_from([a_report(fell("q4")), a_report(a_run("q4")), of("a", "q4")]), min_size=1, max_size=5
)


@given(reports=parts)
def test_merging_loses_no_row_repeats_none_and_can_be_done_in_steps(reports: list[Report]) -> None:
    made = merge(reports)
    assert set(rows(made)) == {row for part in reports for row in rows(part)}
    assert len(rows(made)) == len(set(rows(made)))
    assert len(made.origins) == len({part.origins[0].model for part in reports})
    whole = {(part.origins[0].model, run.label) for part in reports for run in part.runs if not groups.failed(run)}
    assert {(made.origins[run.origin].model, run.label) for run in made.runs if not groups.failed(run)} == whole
    step = reports[0]
    for part in reports[1:]:
        step = merge([step, part])
    assert step == made
    assert from_json(to_json(made)) == from_json(to_json(step))


def test_other_protocols_are_refused_in_one_line_that_quotes_where_they_part():
    other = dataclasses.replace(a_report(), protocol="One protocol for some.")
    with pytest.raises(DataError, match=r"report 2 was measured by another protocol") as caught:
        merge([a_report(), other])
    assert "'One protocol for some.'" in str(caught.value)
    assert "'One protocol for all.'" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match="no report to merge"):
        merge([])


def test_two_models_are_one_plot_and_both_commands_are_told():
    made = made_reports.two_models()
    page = report.to_html(made)
    for text in (page, report.to_markdown(made)):
        for name in ("tiny-135m", "other-360m"):
            assert f"quantforge compare {name}" in text
    assert "Colour says the model, shape the method." in page
    assert "bits per byte of text" in page
    assert "Perplexity against bits per weight" not in page


def test_a_run_without_losses_does_not_take_their_axis_from_several_models():
    made = made_reports.two_models()
    diverged = dataclasses.replace(a_run("sq-int4"), losses=(math.nan, 3.0), kl=math.nan, perplexity=math.nan, origin=1)
    bare = a_run("old-int4")
    more = dataclasses.replace(made, runs=(*made.runs, fell("q-int4"), diverged, bare))
    what, values = drawings.quality(more)
    assert (what, values[: len(made.runs)]) == drawings.quality(made)
    assert what == "bits per byte of text"
    assert all(map(math.isnan, values[len(made.runs) :]))
    caption = drawings.pareto(more, groups.names(more)).caption
    assert caption.endswith("Not drawn, for want of bits per byte of text: old-int4 · tiny-135m.")
    assert "Not drawn" not in drawings.pareto(made, groups.names(made)).caption


def test_several_models_are_never_ranked_by_the_divergence_each_has_from_itself():
    made = made_reports.two_models()
    first, second = made.origins
    made = dataclasses.replace(made, origins=(first, dataclasses.replace(second, evaluation={"ids_sha256": "c"})))
    assert drawings.pareto(made, groups.names(made)) is None
    page = report.to_html(made)
    assert drawings.NO_PARETO in page
    assert "pareto-wide" not in page
    assert "KL divergence from the own float model" not in page
    assert drawings.NO_PARETO in report.picture(made)
    one = dataclasses.replace(made, origins=(first, dataclasses.replace(made.origins[1], model=first.model)))
    assert drawings.quality(one)[0].startswith("KL divergence"), "one model's is the same float model"


# --- the command --------------------------------------------------------------------------------------------------


def run(*arguments: object) -> object:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(to_json(of(name, "fp", "rtn-int4")), encoding="utf-8")
    return files


def test_the_command_merges_files_and_folders(two, tmp_path):
    (tmp_path / "folder").mkdir()
    two[1].rename(tmp_path / "folder" / "report.json")
    done = run(two[0], tmp_path / "folder", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    made = from_json((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert rows(made) == [("a", "fp"), ("a", "rtn-int4"), ("b", "fp"), ("b", "rtn-int4")]
    assert report.table(made) in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html")


def test_a_report_alone_is_laid_out_anew_with_the_same_bytes(two, tmp_path):
    for folder, file in (("first", two[0]), ("again", tmp_path / "first" / "report.json")):
        assert run(file, "--out", tmp_path / folder).exit_code == 0
    for name in ("html", "json", "md"):
        first, again = ((tmp_path / folder / f"report.{name}").read_bytes() for folder in ("first", "again"))
        assert first == again


def test_as_json_it_prints_the_record_alone(two, tmp_path):
    done = run(*two, "--out", tmp_path / "out", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (None, 4, "cannot be read: No such file"),
        (b"\xff\xfe", 4, "is not UTF-8: bad byte at position 0"),
        (b"{}", 4, "no field 'schema'"),
        (b'{"schema": 99}', 4, "schema 99"),
        (to_json(dataclasses.replace(a_report(), protocol="x")).encode(), 4, "another protocol"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_them_and_nothing_is_written(two, tmp_path, text, code, said):
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_bytes(text)
    done = run(two[0], bad, "--out", tmp_path / "out")
    assert done.exit_code == code
    assert said in done.stderr
    assert "bad.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_link_to_nothing_in_place_of_the_folder_is_refused_before_a_file_is_read(two, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    done = run(tmp_path / "no such file", "--out", tmp_path / "link")
    assert done.exit_code == 2
    assert "QF-267" in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_a_file_in_place_of_the_folder_is_refused(two, tmp_path):
    done = run(two[0], "--out", two[1])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
