"""The calibration study: what is measured, what is taken over, what it says of chance, and what its pages show."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from quantforge import api, cli
from quantforge.calibrate import corpus
from quantforge.calibrate.overlap import Overlap
from quantforge.calibration_study import pages, plot, results, spread
from quantforge.calibration_study.design import Cell, Design, Pool
from quantforge.calibration_study.results import Study, StudyRun, from_json, to_json
from quantforge.calibration_study.run import JSON, calibration_study
from quantforge.errors import DataError, PlanError, QuantForgeError, RecipeError
from quantforge.evaluation import perplexity
from quantforge.evaluation import reference as references
from quantforge.models import load as loading

TINY = Path(__file__).parent / "data" / "tiny-llama"
HOSTILE = '<script>alert(1)</script>|a" onload="x\x1b[31m\u202e'


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    """Return the paths of two calibration texts and an evaluation text."""
    folder = tmp_path_factory.mktemp("text")
    calibration = corpus.load_text("python-docs", "calibration").text
    parts = {"a": calibration[:3000], "b": calibration[9000:12000]}
    parts["e"] = corpus.load_text("python-docs", "evaluation").text[:3000]
    for name, text in parts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: str(folder / f"{name}.txt") for name in parts}


def small(texts: dict[str, str], **changes: object) -> dict[str, object]:
    """Return the arguments of a study of two texts, two seeds, two samples of 32 tokens and four windows."""
    shared = {
        "method": "gptq", "bits": 3, "calibrations": [texts["a"], texts["b"]], "samples": [2], "seq_lens": [32],
        "seeds": [0, 1], "data": texts["e"], "eval_seq_len": 32, "windows": 4,
    }  # fmt: skip
    return shared | changes


@pytest.fixture(scope="module")
def made(texts, tmp_path_factory) -> tuple[Path, Study]:
    """Return the folder of a small study, and its record."""
    out = tmp_path_factory.mktemp("study")
    return out, calibration_study(TINY, out=out, command="quantforge calibration-study tiny", **small(texts))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_each_run_is_what_quantizing_on_its_windows_alone_gives(made, texts):
    """So no run sees what an earlier one left in the model, and each seed draws its own windows."""
    run = made[1].runs[-1]
    assert (run.cell, run.seed) == (Cell(texts["b"], 2, 32), 1)
    alone = api.quantize(TINY, "gptq", bits=3, calibration=texts["b"], samples=2, seq_len=32, shuffle=True, seed=1)
    assert alone.calibration["ids_sha256"] == run.ids_sha256
    tokenizer = loading.tokenizer(loading.find(str(TINY)))
    score = api.evaluate(alone.model, data=texts["e"], seq_len=32, windows=4, tokenizer=tokenizer)
    assert run.perplexity == score.perplexity
    assert len({run.ids_sha256 for run in made[1].runs}) == len(made[1].runs) == 4


def test_the_float_model_is_what_it_is_compared_with(made, texts):
    alone = api.evaluate(TINY, data=texts["e"], seq_len=32, windows=4)
    assert math.exp(math.fsum(made[1].float_losses) / 4) == pytest.approx(alone.perplexity, rel=1e-12)
    assert all(run.kl > 0 for run in made[1].runs)


def test_a_method_without_data_gives_the_same_whatever_is_drawn(texts):
    found = calibration_study(TINY, **small(texts, method="rtn"))
    assert len({run.losses for run in found.runs}) == 1
    assert any("looks at no calibration data" in note for note in spread.notes(found))
    (effect,) = spread.effects(found)
    assert effect.loss.change is not None
    assert (effect.loss.change.p, effect.loss.verdict, effect.kl.verdict) == (1.0, spread.ALIKE, spread.ALIKE)


def test_with_one_seed_few_windows_are_the_first_of_many(texts):
    """So that the number of samples is compared on draws that differ in nothing else."""
    from quantforge.calibration_study.design import draw

    source = loading.find(str(TINY))
    tokenizer = loading.tokenizer(source)
    ids, told = api.token_ids(texts["e"], "evaluation", tokenizer=tokenizer, config=source.config, seq_len=32, count=4)
    design = Design((texts["a"],), (2, 5), (32,), (7,))
    ((pool, (few, many)),) = draw(design, ids, told, tokenizer, source.config)
    assert few.ids.equal(many.ids[:2])
    assert pool.tokens == len(tokenizer(Path(texts["a"]).read_text(encoding="utf-8"))["input_ids"])


def test_overlap_is_told_before_anything_is_measured(texts, monkeypatch):
    def stop(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(loading, "model", stop)
    said: list[str] = []
    with pytest.raises(InterruptedError):
        calibration_study(TINY, warn=said.append, **small(texts, calibrations=[texts["a"], texts["e"]]))
    assert len(said) == 1
    assert f"{texts['e']} is the text that was calibrated on" in said[0]


# --- what is taken over -----------------------------------------------------------------------------------------------


def test_a_finished_cell_is_never_measured_twice(texts, tmp_path, monkeypatch):
    calls = []
    run = api.run
    monkeypatch.setattr(api, "run", lambda *a, **k: calls.append(1) or run(*a, **k))
    first = calibration_study(TINY, out=tmp_path, **small(texts, calibrations=[texts["a"]]))
    assert len(calls) == 2
    grown = calibration_study(TINY, out=tmp_path, resume=True, **small(texts, calibrations=[texts["a"]], seeds=[1, 2]))
    assert len(calls) == 3
    assert grown.runs[0] == first.runs[1]
    monkeypatch.setattr(loading, "model", None)  # when all is done no weight is read
    again = calibration_study(TINY, out=tmp_path, resume=True, **small(texts, calibrations=[texts["a"]], seeds=[1, 2]))
    assert again.runs == grown.runs
    assert [result.runs for result in spread.cells(again)] == [grown.runs[:2]]
    back = calibration_study(TINY, out=tmp_path, resume=True, **small(texts, calibrations=[texts["a"]]))
    assert back.runs[:2] == first.runs  # a smaller design forgets nothing
    assert len(calls) == 3


def test_what_is_done_is_not_lost_when_a_later_run_fails(texts, tmp_path, monkeypatch):
    run, calls = api.run, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("a bug in the second run")
        return run(*args, **kwargs)

    monkeypatch.setattr(api, "run", fail)
    with pytest.raises(KeyError):
        calibration_study(TINY, out=tmp_path, **small(texts))
    saved = from_json((tmp_path / JSON).read_text(encoding="utf-8"))
    assert [(r.cell.data, r.seed) for r in saved.runs] == [(texts["a"], 0)]
    assert spread.effects(saved) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"method": "rtn"}, "another method"),
        ({"settings": {"solver.damp_percent": 0.3}}, "another options of the method"),
        ({"windows": 3}, "another evaluation tokens"),
    ],
)
def test_what_was_made_otherwise_is_not_taken_over(made, texts, changes, what):
    with pytest.raises(PlanError, match=f"QF-280.*{what}"):
        calibration_study(TINY, out=made[0], resume=True, **small(texts, **changes))


def test_a_study_that_is_there_is_not_written_over(made, texts):
    before = (made[0] / JSON).read_bytes()
    with pytest.raises(PlanError, match=r"QF-282.*--resume goes on with it"):
        calibration_study(TINY, out=made[0], **small(texts))
    assert (made[0] / JSON).read_bytes() == before


@pytest.mark.parametrize("field", ["model", "versions", "machine", "pools", "fingerprint"])
def test_another_model_text_version_or_machine_is_named(made, texts, tmp_path, field):
    study = made[1]
    other = {
        "model": "another", "versions": {"torch": "1"}, "machine": {"processor": "other"},
        "pools": (replace(study.pools[0], text_sha256="0"), *study.pools[1:]), "fingerprint": "other",
    }  # fmt: skip
    said = {"pools": "text in", "fingerprint": "version of the model files"}.get(field, field)
    (tmp_path / JSON).write_text(to_json(replace(study, **{field: other[field]})), encoding="utf-8")
    with pytest.raises(PlanError, match=f"QF-280.*another {said}"):
        calibration_study(TINY, out=tmp_path, resume=True, **small(texts))


def test_a_model_of_the_same_name_that_scores_otherwise_is_refused(made, texts, tmp_path):
    changed = replace(made[1], float_losses=tuple(loss + 0.1 for loss in made[1].float_losses), runs=())
    (tmp_path / JSON).write_text(to_json(changed), encoding="utf-8")
    with pytest.raises(PlanError, match="QF-281"):
        calibration_study(TINY, out=tmp_path, resume=True, **small(texts))


def test_the_float_model_is_run_once_for_a_model_and_text(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    calls, own = [], perplexity.make_reference

    def counted(model, ids, progress=None, **checks):  # a kept reference is checked with one token a position
        if not checks:
            calls.append(1)
        return own(model, ids, *([progress] if progress else []), **checks)

    monkeypatch.setattr(perplexity, "make_reference", counted)
    common = {"out": tmp_path / "out", **small(texts, calibrations=[texts["a"]])}
    first = calibration_study(TINY, **common)
    grown = calibration_study(TINY, resume=True, **{**common, "seeds": [0, 1, 2]})
    assert (len(calls), grown.float_losses) == (1, first.float_losses)
    monkeypatch.setenv("QUANTFORGE_CACHE", "")
    straight = calibration_study(TINY, **small(texts, calibrations=[texts["a"]], seeds=[0]))
    assert straight.runs[0].kls == first.runs[0].kls
    assert len(calls) == 2


def test_a_kept_reference_that_something_else_computed_is_not_used(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    own = references.save
    monkeypatch.setattr(
        references, "save", lambda path, found, made: own(path, replace(found, losses=(9.0,) * len(found.losses)), made)
    )
    losses = [calibration_study(TINY, **small(texts, method="rtn", seeds=[0])).float_losses for _ in range(2)]
    assert list((tmp_path / "cache").iterdir())
    assert losses[0] == losses[1]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "QF-230.*--seeds names nothing"),
        ({"calibrations": []}, "QF-230.*--calib names nothing"),
        ({"seeds": [0, 1, 0]}, "QF-231.*--seeds has 0 twice"),
        ({"samples": [0]}, "QF-232.*--samples has 0"),
        ({"seq_lens": [1]}, "QF-232.*--seq-lens has 1"),
        ({"seeds": [2**63]}, "QF-232.*--seeds"),
        ({"calibrations": ["python-dogs"]}, "QF-401.*did you mean 'python-docs'"),
        ({"method": "gptw"}, "QF-201.*did you mean 'gptq'"),
        ({"samples": [10_000]}, "QF-431.*10000 were asked for"),
        ({"seq_lens": [100_000]}, "QF-254"),
        ({"windows": 10_000}, "QF-431"),
    ],
)
def test_bad_input_is_one_line_before_any_weight_is_read(texts, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(loading, "model", None)
    with pytest.raises(QuantForgeError, match=message) as error:
        calibration_study(TINY, out=tmp_path / "out", **small(texts, **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_one_text_under_two_names_is_refused(texts, tmp_path):
    (tmp_path / "copy.txt").write_bytes(Path(texts["a"]).read_bytes())
    with pytest.raises(DataError, match=r"QF-492.*copy\.txt' are the same text"):
        calibration_study(TINY, **small(texts, calibrations=[texts["a"], str(tmp_path / "copy.txt")]))


@pytest.mark.parametrize("seeds", ["0,x", "-1", "1.5", "9" * 30])
def test_a_list_that_is_no_list_of_numbers_is_refused(seeds, tmp_path):
    result = CliRunner().invoke(cli.main, ["calibration-study", str(TINY), "--seeds", seeds, "--out", str(tmp_path)])
    assert result.exit_code == RecipeError.exit_code
    assert "error[QF-233]: --seeds" in result.stderr


def test_the_command_prints_tables_and_warns_of_overlap(texts, tmp_path):
    arguments = [
        "calibration-study", str(TINY), "--method", "rtn", "--bits", "3", "--calib", texts["e"], "--samples", "2,4",
        "--seq-lens", "32", "--seeds", "0,1", "--data", texts["e"], "--eval-seq-len", "32", "--windows", "2",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("warning: overlap: ")
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out" / "calibration-study.html")
    assert "same text" in result.stdout
    assert sorted(f.suffix for f in (tmp_path / "out").iterdir()) == [".html", ".json", ".md"]
    printed = CliRunner().invoke(cli.main, [*arguments, "--resume", "--json"])
    assert json.loads(printed.stdout)["schema"] == results.SCHEMA


# --- what it says of chance -------------------------------------------------------------------------------------------


def a_study(loss, cells=(("a", 2), ("a", 4), ("b", 2), ("b", 4)), seeds=(0, 1, 2), windows=12, **changes) -> Study:
    """Return a made-up study; `loss(cell, seed)` is added to what every window loses in the float model."""
    data, samples = (tuple(dict.fromkeys(each)) for each in zip(*cells, strict=True))
    level = tuple(3 + 0.1 * (i % 5) for i in range(windows))
    runs = []
    for cell in (Cell(name, count, 8) for name in data for count in samples):
        for seed in seeds:
            extra = loss(cell, seed)
            losses = tuple(x + extra * (1 + 0.1 * (i % 3)) for i, x in enumerate(level))
            runs.append(StudyRun(cell, seed, f"{cell}{seed}", Overlap(0.0, False), losses, losses, 1.0))
    return replace(
        Study(
            results.SCHEMA, "tiny", (), "digest", "gptq-int4", {"format": "int4"}, True, "A protocol.",
            Design(data, samples, (8,), seeds), tuple(Pool(name, "a file", name, 10**6) for name in data),
            {"name": "e"}, level, {"processor": "cpu"}, {"torch": "2"}, "quantforge calibration-study", "2026-01-01",
            tuple(runs),
        ),
        **changes,
    )  # fmt: skip


def wobble(cell: Cell, seed: int) -> float:
    """Return what chance does: two thousandths either way, by seed and by number of windows."""
    return 0.004 * ((cell.samples // 2 + seed) % 2 - 0.5)


def test_an_effect_far_above_the_seeds_is_shown_and_one_below_is_not():
    study = a_study(lambda cell, seed: 0.3 + wobble(cell, seed) - (0.1 if cell.data == "b" else 0))
    data, samples = spread.effects(study)
    assert (data.factor, data.before, data.after, data.loss.verdict) == ("data", "a", "b", "better")
    assert data.loss.change is not None
    assert spread.percent(data.loss.change.mean.value) == pytest.approx(-10.4, abs=1)
    assert (samples.factor, samples.loss.verdict) == ("samples", spread.ALIKE)
    assert "data set moves perplexity by up to" in spread.lead(study)
    assert "samples by up to" in spread.lead(study)
    assert "(no difference shown)" in spread.lead(study)


def test_one_seed_never_shows_a_difference():
    study = a_study(lambda cell, seed: 0.3 if cell.data == "a" else 0.1, seeds=(5,))
    assert {effect.loss.verdict for effect in spread.effects(study)} == {spread.ALIKE}
    assert math.isnan(spread.cells(study)[0].perplexity.deviation)
    assert math.isnan(spread.noise(study))
    assert any("One seed" in note for note in spread.notes(study))


def test_seeds_that_contradict_each_other_show_nothing_however_sure_the_windows_are():
    study = a_study(lambda cell, seed: 0.3 + (0.1 * (seed - 0.8) if cell.data == "b" else 0))
    data = spread.effects(study)[0]
    assert data.loss.change is not None
    assert data.loss.change.mean.low > 0
    assert data.loss.verdict == spread.ALIKE


@given(st.lists(st.floats(1, 50), min_size=2, max_size=6))
def test_the_spread_is_mean_deviation_and_range(values):
    found = spread.spread(values)
    mean = math.fsum(values) / len(values)
    assert found.mean == pytest.approx(mean)
    variance = math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)
    assert found.deviation == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-9)
    assert (found.low, found.high) == (min(values), max(values))


def test_a_cell_that_lost_everything_is_not_measured_and_the_others_are():
    study = a_study(lambda cell, seed: math.nan if cell == Cell("b", 4, 8) and seed == 1 else 0.3 + wobble(cell, seed))
    found = spread.cells(study)
    assert [result.verdict for result in found] == ["worse", "worse", "worse", spread.UNMEASURED]
    assert {effect.loss.verdict for effect in spread.effects(study)} == {spread.UNMEASURED}
    assert "n/a" in pages.to_markdown(study)
    pages.to_html(study)
    assert len(plot.drawn(study)) == 3


def with_tokens(study: Study, tokens: int, *names: str) -> Study:
    """Return a study whose texts of those names have so many tokens."""
    return replace(study, pools=tuple(replace(p, tokens=tokens) if p.name in names else p for p in study.pools))


def test_seeds_that_share_their_windows_are_said_to():
    study = a_study(wobble)
    assert sum("the seeds share" in note for note in spread.notes(with_tokens(study, 60, "a"))) == 1
    assert not any("the seeds share" in note for note in spread.notes(study))


def test_what_limits_a_study_is_printed_with_its_result():
    study = with_tokens(a_study(wobble), 60, "a")
    (note,) = (note for note in spread.notes(study) if "the seeds share" in note)
    assert note in pages.to_text(study).splitlines()


def test_seeds_that_share_most_of_their_windows_show_nothing():
    """They agree on whatever the text does, so that by a t-test any difference would be more than chance."""
    study = a_study(lambda cell, seed: 0.3 - (0.1 + 1e-5 * seed if cell.data == "b" else 0) + 1e-3 * cell.samples)
    half = with_tokens(study, 8 * 8, "a", "b")  # 4 of 8 windows: just half of them are shared
    assert [effect.loss.verdict for effect in spread.effects(half)] == ["better", "worse"]
    assert not any("the seeds share" in note for note in spread.notes(half))
    for names in (("a",), ("b",), ("a", "b")):
        few = with_tokens(study, 7 * 8, *names)  # 4 of 7
        said = [note for note in spread.notes(few) if "the seeds share" in note]
        assert [note.partition(" are drawn")[0] for note in said] == [
            f"4 of the 7 windows of 8 tokens in {n}" for n in names
        ]
    none = with_tokens(study, 3 * 8, "a", "b")  # 2 of 3, and 4 of 3
    for effect in spread.effects(none):
        for shift in (effect.loss, effect.kl):
            assert shift.change is not None
            assert (shift.change.p, shift.verdict) == (1.0, spread.ALIKE)
    assert spread.effects(none)[0].loss.change.mean == spread.effects(half)[0].loss.change.mean
    assert all("(p = 1)" in note for note in spread.notes(none) if "the seeds share" in note)
    assert "(no difference shown)" in spread.lead(none)
    one = a_study(lambda cell, seed: 0.3 - 0.1 * (cell.data == "c"), cells=(("a", 4), ("b", 4), ("c", 4)))
    assert [e.loss.verdict for e in spread.effects(with_tokens(one, 56, "b"))] == [spread.ALIKE, "better"]


def test_choices_are_compared_by_the_cells_whose_seeds_draw_windows_of_their_own():
    """4 windows are too many for a text of 7: what they would say of the texts and of their number is left out."""
    study = a_study(lambda cell, seed: 0.3 + wobble(cell, seed) - 0.1 * (cell.data == "b") + 5.0 * (cell.samples == 4))
    by_text, by_number = spread.effects(with_tokens(study, 7 * 8, "a"))
    assert by_text.loss.verdict == "better"
    only_two = a_study(lambda cell, seed: 0.3 + wobble(cell, seed) - 0.1 * (cell.data == "b"), (("a", 2), ("b", 2)))
    assert by_text.loss == spread.effects(only_two)[0].loss
    only_b = a_study(lambda cell, seed: 0.2 + wobble(cell, seed) + 5.0 * (cell.samples == 4), (("b", 2), ("b", 4)))
    assert by_number.loss == spread.effects(only_b)[0].loss
    both = spread.effects(with_tokens(study, 7 * 8, "a", "b"))
    assert [effect.loss.verdict for effect in both] == ["better", spread.ALIKE]


# --- the record and its pages -----------------------------------------------------------------------------------------


def test_the_record_survives_json(made):
    assert from_json(to_json(made[1])) == made[1]
    assert from_json((made[0] / JSON).read_text(encoding="utf-8")) == made[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="quantforge-calibration-study-9"), "study-9"),
        (lambda d: d.pop("model"), "lacks the field 'model'"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["runs"][0].update(losses=[1.0]), "run 0 has not one loss"),
        (lambda d: d["runs"][0].update(seed="x"), "seed"),
    ],
)
def test_a_damaged_record_is_refused(made, change, message):
    data = json.loads(to_json(made[1]))
    change(data)
    with pytest.raises(DataError, match=message) as error:
        from_json(json.dumps(data))
    assert "\n" not in str(error.value)


class Page(HTMLParser):
    """Collects the elements of a page, and checks that they are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def hostile_study() -> Study:
    study = a_study(lambda cell, seed: 0.3, cells=((HOSTILE, 2), ("b", 2)))
    runs = tuple(replace(run, overlap=Overlap(0.5, False)) for run in study.runs)
    return replace(
        study, model=HOSTILE, method=HOSTILE, protocol=HOSTILE, command=HOSTILE, model_notes=(HOSTILE,), runs=runs,
        evaluation={"name": HOSTILE, HOSTILE: HOSTILE}, options={HOSTILE: HOSTILE}, machine={HOSTILE: HOSTILE},
        pools=(replace(study.pools[0], source=HOSTILE), study.pools[1]),
    )  # fmt: skip


def test_nothing_in_a_record_acts_in_the_page_which_loads_nothing():
    text = pages.to_html(hostile_study())
    page = Page(text)
    tags = [tag for tag, _ in page.found]
    assert "script" not in tags
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    for _, attributes in page.found:
        assert not attributes.get("src")
        assert re.match(r"#|$", attributes.get("href") or "")
    (policy,) = (a["content"] for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
    assert tags.count("svg") == 2


def test_nothing_in_a_record_acts_in_markdown():
    text = pages.to_markdown(hostile_study())
    assert "<script" not in text
    assert "\x1b" not in text
    header = next(line for line in text.splitlines() if line.startswith("| calibration"))
    count = len(re.findall(r"(?<!\\)\|", header))
    rows = [line for line in text.splitlines() if line.startswith("| 2 x 8 of")]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)\|", row)) == count for row in rows)


def test_overlap_is_red_on_the_page_and_bold_in_markdown():
    clean = a_study(wobble)
    assert 'class="alert"' not in pages.to_html(clean)
    assert "number bad" not in pages.to_html(clean)
    runs = tuple(replace(r, overlap=Overlap(0.25, False)) if r.cell.data == "b" else r for r in clean.runs)
    shared = replace(clean, runs=runs)
    page = pages.to_html(shared)
    assert page.count('class="alert"') == 1
    assert page.count("number bad") == 2
    assert "25.0% of the evaluation text" in page
    assert "**overlap: 25.0%" in pages.to_markdown(shared)


def test_every_seed_is_a_dot_of_its_cells_row():
    study = a_study(lambda cell, seed: 0.3 + 0.01 * seed)
    axes = plot.figure(study).axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [3] * 4
    assert list(dots[0].get_xdata()) == [run.perplexity for run in study.runs[:3]]
    assert plot.level(study) is None  # it lies too far off
    assert plot.level(a_study(lambda cell, seed: 0.01 * seed)) == pytest.approx(math.exp(3.18), rel=0.05)


def test_the_same_record_gives_the_same_pages(made):
    for write, suffix in ((pages.to_html, "html"), (pages.to_markdown, "md")):
        assert write(made[1]) == (made[0] / f"calibration-study.{suffix}").read_text(encoding="utf-8")
