"""The report: the record survives JSON, nothing in it acts in HTML or Markdown, the same record gives equal bytes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from quantforge import plots, record, report
from quantforge.errors import DataError
from quantforge.record import (
    DivergenceRow,
    Histogram,
    LayerRow,
    Origin,
    Report,
    Run,
    TaskRow,
    from_json,
    to_json,
)
from quantforge.report import content, layers, table, tables, to_html, to_markdown

_SPEC = importlib.util.spec_from_file_location("made_reports", Path(__file__).with_name("made_reports.py"))
made_reports = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made_reports)
a_report, a_run, hostile, layer = made_reports.a_report, made_reports.a_run, made_reports.hostile, made_reports.layer
many, Page = made_reports.many, made_reports.Page

HOSTILE = [
    "<script>alert(1)</script>",
    "x]]><img src=http://evil.example/p onerror=alert(1)>",
    "</script><script>alert(2)</script><!--",
    "esc\x1b[31mred\x07\x00\x9b1m",
    "rtl\u202egnp.exe\u2066\u200f",
    "a|b\n| c | d |\r\n# heading",
    "[link](javascript:alert(1)) ![i](http://evil.example/p) `code` **b** $x$ <!-- c",
    "$\\frac{1}{$ ${{7*7}} {{7*7}} {% raw %}",
    "_nolegend_",
    "\ud800\ufffe\u2028\u2029",
    "url(http://evil.example/x)\" onload=\"alert(1)' x='",
    "ヘブライ עברית 模型",
]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@cache
def hostile_page(text: str) -> str:
    return to_html(hostile(text))


@cache
def plain_page() -> str:
    return to_html(a_report())


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1


# --- the record -------------------------------------------------------------------------------------------------------

words = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(min_value=-(10**20), max_value=10**20)
scalars = st.none() | st.booleans() | counts | numbers | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2), max_leaves=4
)
objects = st.dictionaries(words, values, max_size=2)
layer_rows = st.builds(
    LayerRow, name=words, kind=words, block=st.none() | counts, shape=st.tuples(counts, counts), format=words,
    bits_per_weight=numbers, loss=numbers, relative_loss=numbers, notes=st.dictionaries(words, scalars, max_size=2),
)  # fmt: skip
shares = st.lists(st.floats(0, 1), max_size=3).map(tuple)
windows = st.lists(numbers, max_size=3).map(tuple)
task_rows = st.builds(
    TaskRow, task=words, shots=counts, answers=st.text("01", max_size=4), chance=numbers, items=words,
    metrics=st.dictionaries(words, numbers, max_size=1),
)  # fmt: skip
divergences = st.builds(
    DivergenceRow, tokens=counts, median=numbers, p99=numbers, agreement=numbers, lost=counts, gained=counts,
    dense=numbers, bound=numbers,
)  # fmt: skip
shapes = st.builds(Histogram, layer=words, what=words, edge=numbers, before=shares, after=shares)
some_runs = st.builds(
    Run, label=words, method=words, bits=st.none() | st.integers(1, 3), bits_per_weight=numbers, perplexity=numbers,
    kl=numbers, seconds=numbers, peak_memory_bytes=st.none() | counts, bytes_on_disk=st.none() | counts,
    disk_note=words, options=objects, layers=st.lists(layer_rows, max_size=2).map(tuple),
    notes=st.lists(words, max_size=2).map(tuple), origin=st.integers(0, 1), losses=windows, kls=windows,
    divergence=st.none() | divergences, tasks=st.lists(task_rows, max_size=2).map(tuple), tokens_per_second=numbers,
    histograms=st.lists(shapes, max_size=1).map(tuple),
)  # fmt: skip
provenance = objects | st.fixed_dictionaries({"text_bytes": counts, "seq_len": counts, "overlap": numbers})
origins = st.builds(
    Origin, model=words, model_notes=st.lists(words, max_size=2).map(tuple), calibration=objects,
    evaluation=provenance, machine=objects, versions=st.dictionaries(words, words, max_size=2), command=words,
    created=words, fingerprint=words,
)  # fmt: skip
reports = st.builds(
    Report, schema=st.just(record.SCHEMA), protocol=words, origins=st.tuples(origins, origins),
    runs=st.lists(some_runs, max_size=3).map(tuple),
)  # fmt: skip
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(made=reports)
def test_a_record_survives_json_exactly(made: Report) -> None:
    assert from_json(to_json(made)) == made


@settings(quick, max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink takes minutes
@given(made=reports)
def test_every_record_makes_a_page_and_a_table(made: Report) -> None:
    Page(to_html(made))
    assert len({cells(line) for line in table(made).splitlines()}) == 1
    assert not CONTROL.search(to_markdown(made))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_json_and_not_available_in_the_table(value: float) -> None:
    run = a_run(perplexity=value, kl=value, seconds=value, options={"deep": [{"x": value}]})
    text = to_json(a_report(run))
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["runs"][0]["perplexity"] is None
    assert data["runs"][0]["options"] == {"deep": [{"x": None}]}
    assert math.isnan(from_json(text).runs[0].perplexity)
    assert to_json(from_json(text)) == text
    assert table(a_report(run, a_run())).count("n/a") == 3
    assert "nan" not in re.sub(r"<script.*?</script>", "", to_html(a_report(run)), flags=re.S).lower().split()


def broken(**changes: object) -> str:
    return json.dumps({**json.loads(to_json(a_report())), **changes})


def broken_run(**changes: object) -> str:
    data = json.loads(to_json(a_report()))
    data["runs"][1].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a report"),
        ("{}", "no field 'schema'"),
        (broken(schema=3), "schema 3"),
        (broken(schema=True), "schema True"),
        (broken(schema=1.0), "schema 1.0"),
        (broken(schema="1"), "schema '1'"),
        (broken(protcol="x"), "did you mean 'protocol'?"),
        (broken(protocol=3), "report.protocol must be text, not 3"),
        (broken(runs={}), "report.runs must be a list"),
        (broken(runs=[1]), "report.runs[0] must be an object"),
        (broken(origins=[]), "report.runs[0].origin is 0, and there are 0"),
        (broken_run(perplexity="low"), "report.runs[1].perplexity must be a number, not 'low'"),
        (broken_run(perplexity=True), "not True"),
        (broken_run(perplexity=10**400), "too large"),
        (broken_run(bits=4.0), "report.runs[1].bits must be an integer or null, not 4.0"),
        (broken_run(layers=[{}]), "report.runs[1].layers[0] lacks the field 'name'"),
        (broken_run(notes=["fine", None]), "report.runs[1].notes[1] must be text, not None"),
        (broken_run(label="\x1b[31m", bits="\x1b[31m"), "'\\x1b[31m'"),
        (to_json(a_report()).replace("10.0", "NaN"), "NaN is no JSON number"),
    ],
    ids=lambda value: value[:30],
)
def test_malformed_records_are_refused_in_one_line_that_says_where(text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        from_json(text)
    assert caught.value.number == 450
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_a_shape_has_two_sides() -> None:
    data = json.loads(to_json(a_report()))
    data["runs"][1]["layers"][0]["shape"] = [1, 2, 3]
    with pytest.raises(DataError, match="shape must have 2 items, not 3"):
        from_json(json.dumps(data))


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.34567, "12.346"), (9999.9, "9999.900"), (48123.4, "4.812e+04"), (math.nan, "n/a"), (math.inf, "n/a")],
)
def test_perplexity_has_three_decimals_and_is_scientific_when_large(value: float, text: str) -> None:
    assert report.perplexity(value) == text


def test_the_table_shows_each_number_in_its_unit() -> None:
    row = table(a_report(a_run(kl=-1e-9))).splitlines()[2]
    shown = [cell.strip() for cell in row.strip("|").split("|")]
    assert shown == ["gptq-int4-g64", "4", "4.312", "12.346", "0.0000", "123.5", "1.3", "2.5"]


def test_what_is_unknown_is_not_available_and_the_float_model_has_no_bits() -> None:
    level = a_run("float", None, peak_memory_bytes=None, bytes_on_disk=None)
    row = table(a_report(level, a_run())).splitlines()[2]
    shown = [cell.strip() for cell in row.strip("|").split("|")]
    assert shown == ["float", "float", "16.000", "12.346", "0.0123", "n/a", "n/a", "n/a"]


# --- hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_to_the_page(text: str) -> None:
    page, harmless = Page(hostile_page(text)), Page(hostile_page("harmless"))
    for tag in ("script", "img", "style", "a", "iframe", "object", "meta", "link", "svg", "td", "li"):
        assert page.count(tag) == harmless.count(tag)
    names = {name for _, attributes in page.elements for name in attributes}
    assert names <= {name for _, attributes in harmless.elements for name in attributes} | {"clip-path", "transform"}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_never_appears_raw(text: str) -> None:
    made = hostile(text)
    for out in (hostile_page(text), to_markdown(made), table(made)):
        assert not CONTROL.search(out)
        assert "<script>alert" not in out
        assert "]]>" not in out
        assert "<img" not in out
        assert "<!--" not in out.replace("<!DOCTYPE", "")
    assert to_json(made).isascii()


@pytest.mark.parametrize("text", HOSTILE)
def test_the_record_inside_the_page_is_the_record_and_cannot_end_its_element(text: str) -> None:
    record = re.search(r'<script type="application/json" id="record">(.*?)</script>', hostile_page(text), re.S)[1]
    assert not set("<>&") & set(record)
    assert record.isascii()
    assert from_json(record) == hostile(text)


def test_a_script_in_a_name_is_shown_as_text_and_written_as_u003c_in_inline_json() -> None:
    page = to_html(a_report(model="<script>alert(1)</script>"))
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt;</h1>" in page
    assert '"model":"\\u003cscript\\u003ealert(1)\\u003c/script\\u003e"' in page


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_tables_keep_their_cells_and_lines(text: str) -> None:
    made, harmless = to_markdown(hostile(text)), to_markdown(hostile("harmless"))
    for block in (made, harmless):
        for rows in re.findall(r"(?:^\|.*\n)+", block, re.M):
            assert len({cells(line) for line in rows.splitlines()}) == 1
    assert len(made.splitlines()) == len(harmless.splitlines())
    headings = [line.split()[0] for line in made.splitlines() if line.startswith("#")]
    assert headings == ["#", *["##"] * 9]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("model.layers.0.down_proj", "model.layers.0.down_proj"),
        ("_x_ *y*", r"\_x\_ \*y\*"),
        ("# no heading", r"\# no heading"),
        ("- no item", r"\- no item"),
        ("1. no item", r"1\. no item"),
        ("1.5 bits", "1.5 bits"),
        ("[a](b)", r"\[a\](b)"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("`x` $y$ ~z~", r"\`x\` \$y\$ \~z\~"),
        ("\x1b[0m", r"\\x1b\[0m"),
        ("two\n\n lines", "two lines"),
    ],
)
def test_markdown_escapes_what_would_be_markup_and_nothing_else(text: str, escaped: str) -> None:
    assert report.escape_markdown(text) == escaped


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing() -> None:
    text = plain_page()
    page = Page(text)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"):
                assert name == "href"
                assert value.startswith("#")
            assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)\)", value or ""))
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"@import|@font-face", text)
    assert page.count("link") == page.count("iframe") == page.count("img") == 0


def test_ids_are_unique_and_what_refers_to_an_id_finds_it() -> None:
    page = Page(plain_page())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    wanted = {a["href"][1:] for _, a in page.elements if "href" in a}
    wanted |= {a["clip-path"][5:-1] for _, a in page.elements if "clip-path" in a}
    assert len(ids) == len(set(ids))
    assert wanted
    assert wanted <= set(ids)


def test_the_policy_allows_the_sorting_script_and_no_other() -> None:
    page = Page(plain_page())
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    scripts = [data for tag, data in page.texts if tag == "script" and "aria-sort" in data]
    assert len(scripts) == 1
    assert page.count("script") == 2
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_cells_sort_by_full_precision_and_what_is_missing_has_no_key() -> None:
    text = to_html(a_report(a_run(perplexity=12.3456789), a_run(perplexity=math.nan)))
    assert 'data-value="12.3456789">12.346</td>' in text
    assert 'data-value="">n/a</td>' in text


def test_the_best_perplexity_of_a_width_is_marked_when_there_is_a_choice() -> None:
    marked = to_html(a_report(a_run("rtn-int4", 4, 13.0), a_run("gptq-int4", 4, 12.0), a_run("rtn-int3", 3, 20.0)))
    assert re.findall(r'class="number best" data-value="([^"]*)"', marked) == ["12.0"]


def test_notes_and_the_reason_for_no_size_are_told_in_both_documents() -> None:
    made = a_report(a_run(notes=("heed this",), bytes_on_disk=None, disk_note="no packed form"))
    for text in (to_html(made), to_markdown(made)):
        assert "heed this" in text
        assert "no packed form" in text


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of the results table of a page, without the marks of footnotes."""
    body = re.search(r"<tbody>(.*?)</tbody>", text, re.S)[1]
    bare = re.sub(r"<sup>.*?</sup>", "", body)
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr.*?</tr>", bare, re.S)]


def test_notes_on_size_are_footnotes_that_runs_with_the_same_note_share() -> None:
    notes = ("3-bit codes are padded", "", "3-bit codes are padded", "other")
    made = a_report(*(a_run(f"m{i}-int3", 3, disk_note=note) for i, note in enumerate(notes)))
    page = to_html(made)
    assert re.findall(r'<sup><a href="#size-(\w+)">', page) == ["a", "a", "b"]
    assert re.findall(r'<li id="size-(\w+)"><sup>\w+</sup> Size: (.*?)</li>', page) == [
        ("a", "3-bit codes are padded"), ("b", "other"),
    ]  # fmt: skip
    assert not any("padded" in cell for row in rows_of(page) for cell in row)
    text = to_markdown(made)
    assert re.findall(r"123\.5(?: \((\w)\))? \|", text) == ["a", "", "a", "b"]
    assert [line for line in text.splitlines() if "Size:" in line] == [
        "- (a) Size: 3-bit codes are padded", "- (b) Size: other",
    ]  # fmt: skip


def test_more_than_26_footnotes_have_marks_of_their_own() -> None:
    marks, notes = tables.footnotes(a_report(*(a_run(disk_note=f"note {i}") for i in range(60))))
    assert len({mark for mark, _ in notes}) == len(set(marks.values())) == 60


def test_the_float_row_has_no_seconds_and_no_memory_and_its_size_is_said_to_be_no_file() -> None:
    made = a_report(a_run("fp", None, disk_note="weights in bfloat16", seconds=0.0, peak_memory_bytes=0), a_run())
    page = to_html(made)
    assert rows_of(page)[0][-2:] == ["n/a", "n/a"]
    assert rows_of(page)[1][-2:] == ["1.3", "2.5"]
    said = "Size: computed from the parameter counts, not the size of a file; weights in bfloat16"
    assert f'<li id="size-a"><sup>a</sup> {said}</li>' in page
    assert f"- (a) {said}" in to_markdown(made)


@pytest.mark.parametrize(
    ("peak", "text"), [(None, "n/a"), (0, "n/a"), (-1, "n/a"), (1, "< 0.1"), (49_999, "< 0.1"), (50_000, "0.1")]
)
def test_peak_memory_is_never_zero(peak: int | None, text: str) -> None:
    assert report.words.memory(a_run(peak_memory_bytes=peak)) == text
    line = table(a_report(a_run(peak_memory_bytes=peak), a_run())).splitlines()[2]
    assert line.rpartition("| ")[2].strip(" |") == text.replace("<", "&lt;")


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (
            (a_run("fp", None, 10.0), a_run("rtn-4", 4, 13.0), a_run("gptq-4", 4, 12.0), a_run("rtn-1", 1, 99.0)),
            "Lowest perplexity of the quantized rows: at 4 bits gptq-4 (12.000), at 1 bit rtn-1 (99.000, the only row)."
            " The float model has 10.000.",
        ),
        (
            (a_run("a", 4, 12.0), a_run("b", 4, 12.0), a_run("c", 4, 12.5)),
            "Lowest perplexity of the quantized rows: at 4 bits a and b (12.000).",
        ),
        (
            (a_run("a", 3, math.nan), a_run("fp", None, math.nan)),
            "Lowest perplexity of the quantized rows: at 3 bits none was measured.",
        ),
        ((a_run("fp", None, 10.0),), "Nothing was quantized. The float model has 10.000."),
    ],
)  # fmt: skip
def test_the_result_is_said_in_words(runs: tuple[Run, ...], said: str) -> None:
    assert content.lead(a_report(*runs)) == said


def test_both_documents_lead_with_the_result_and_end_with_how_it_was_made() -> None:
    made = a_report()
    for text in (to_html(made), to_markdown(made)):
        places = [text.index(part) for part in (content.lead(made), "rtn-int2", "One protocol for all.", "torch")]
        assert places == sorted(places)
        assert text.index("a note") > text.index("rtn-int2")


def test_drawings_scale_with_the_page_and_only_tables_scroll() -> None:
    page = plain_page()
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    rule = re.search(r"^svg \{(.*?)\}", style, re.M)[1]
    assert "width: 100%" in rule
    assert "height: auto" in rule
    assert "min-width" not in rule
    assert not re.search(r"<svg[^>]* (width|height)=", page)
    assert "overflow-x: auto" in re.search(r"^\.scroll \{(.*?)\}", style, re.M)[1]
    assert page.count("<table") == len(re.findall(r'<div class="scroll"[^>]*>\s*<table', page)) == 7


def test_the_caption_speaks_of_lines_only_where_lines_are_drawn() -> None:
    one_width = to_html(a_report(a_run("rtn-int4"), a_run("gptq-int4")))
    assert "A line joins the widths of one method" in plain_page()
    assert "A line joins" not in one_width
    figure = plots.perplexity_figure([a_run("rtn-int4"), a_run("gptq-int4")])
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [1, 1]


# --- many runs --------------------------------------------------------------------------------------------------------


def test_a_page_of_25_runs_on_210_layers_is_smaller_than_3_mb_and_says_where_its_record_is() -> None:
    page = to_html(many())
    assert len(page.encode()) < 3_000_000
    assert page.count("model.layers.29.mlp.down_proj") == 24
    assert 'id="record"' not in page
    assert "it is report.json, in the same folder" in page
    assert "Of 24 runs, the 8 at 2 bits are drawn" in page
    Page(page)


def test_of_very_many_layers_the_page_shows_those_that_lose_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.page, "MOST_ROWS", 5)
    monkeypatch.setattr(report.layers, "FEW_ROWS", 2)
    losses = (0.1, math.nan, 0.4, 0.2, 0.3, 0.05)
    page = to_html(a_report(a_run(layers=tuple(layer("q", i, loss) for i, loss in enumerate(losses)))))
    assert re.findall(r"<tr><td>(.*?)</td>", page) == ["model.layers.2.q", "model.layers.4.q"]
    assert "6 layers, the 2 that lose most" in page


def test_a_page_of_20_methods_at_one_width_says_whose_losses_are_drawn() -> None:
    page = to_html(a_report(*(a_run(f"m{i}-int4", 4, 30.0 - i, method=f"m{i}") for i in range(20))))
    assert "Of 20 runs, the 8 at 4 bits with the lowest perplexity are drawn" in page


def test_the_same_record_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    made = a_report()
    (tmp_path / "record.json").write_text(to_json(made), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from quantforge.record import from_json;"
        "from quantforge.report import to_html;"
        "sys.stdout.buffer.write(to_html(from_json(Path(sys.argv[1]).read_text(encoding='utf-8'))).encode())"
    )
    (tmp_path / "matplotlibrc").write_text("axes.labelsize: 40\nxtick.direction: in\n")  # a user's taste plays no part
    run = subprocess.run([sys.executable, "-c", code, "record.json"], cwd=tmp_path, capture_output=True, check=True)
    assert run.stdout.decode() == to_html(made) == plain_page()


def test_reading_a_report_needs_no_matplotlib() -> None:
    code = "import sys, quantforge.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the machine and the files ----------------------------------------------------------------------------------------


def test_the_machine_is_described_without_names_or_paths() -> None:
    import getpass
    import platform

    found = record.machine()
    assert found["cores"] >= 1
    assert found["threads"] >= 1
    assert found["processor"]
    said = json.dumps(found)
    assert str(Path.home()) not in said
    assert platform.node() not in said.split('"')
    assert getpass.getuser() not in said.split('"')


def test_versions_name_what_is_installed_and_leave_out_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PACKAGES", ("torch", "no-such-package-at-all"))
    assert list(record.versions()) == ["python", "torch"]


def test_three_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    made = a_report()
    report.write(made, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert from_json((tmp_path / "report.json").read_text(encoding="utf-8")) == made
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == to_html(made)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == to_markdown(made)


def test_tokens_of_experts_are_told_by_block_in_both_documents() -> None:
    def expert(block: int, index: int, kind: str, tokens: int) -> LayerRow:
        name = f"model.layers.{block}.mlp.experts.{index}.{kind}"
        return dataclasses.replace(layer(kind, block), name=name, notes={"tokens": tokens})

    counts = {0: (0, 12_345, 7, 900), 3: (5, 0, 0, 1)}
    rows = tuple(expert(b, i, k, n) for b, seen in counts.items() for i, n in enumerate(seen) for k in ("w1", "w2"))
    made = a_report(a_run("fp", None, 10.0), a_run(layers=(layer(), *rows)))
    assert [[cell.text for cell in row] for row in layers.experts(made).rows] == [
        ["0", "4", "0", "900", "12,345", "1"], ["3", "4", "0", "1", "5", "2"],
    ]  # fmt: skip
    table = report.to_markdown(made).partition("## Calibration tokens of each expert")[2]
    assert re.sub(" +", " ", table).count("| 0 | 4 | 0 | 900 | 12,345 | 1 |") == 1
    assert ">12,345<" in report.to_html(made)
    for document in (report.to_markdown(a_report()), report.to_html(a_report())):
        assert "each expert" not in document
