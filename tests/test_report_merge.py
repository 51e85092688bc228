"""`quantforge report`: reports of several machines and models become one, and nothing is counted twice."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from quantforge import report
from quantforge.cli import main
from quantforge.errors import DataError
from quantforge.record import Report, from_json, to_json
from quantforge.report import merge

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


parts = st.lists(
    st.builds(of, st.sampled_from(MODELS), st.sampled_from(LABELS)), min_size=1, max_size=5
)  # fmt: skip


@given(reports=parts)
def test_merging_loses_no_row_repeats_none_and_can_be_done_in_steps(reports: list[Report]) -> None:
    made = merge(reports)
    assert set(rows(made)) == {row for part in reports for row in rows(part)}
    assert len(rows(made)) == len(set(rows(made)))
    assert len(made.origins) == len({part.origins[0].model for part in reports})
    step = reports[0]
    for part in reports[1:]:
        step = merge([step, part])
    assert step == made
    assert from_json(to_json(made)) == made


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


def test_a_file_in_place_of_the_folder_is_refused(two, tmp_path):
    done = run(two[0], "--out", two[1])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
