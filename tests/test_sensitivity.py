"""Sensitivity analysis: cells that equal plain runs, few block calls, nothing measured twice, safe pages."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from quantforge import cli, pipeline, plan, recipe
from quantforge.calibrate import corpus
from quantforge.errors import DataError, PlanError, QuantForgeError, RecipeError
from quantforge.evaluation import perplexity
from quantforge.evaluation import reference as references
from quantforge.models import activations, arch, tiny
from quantforge.models import load as loading
from quantforge.sensitivity import Analysis, Cell, Section, analyze, from_json, measure, show, to_html, to_json
from quantforge.sensitivity import to_markdown as markdown
from quantforge.sensitivity.ranking import NOT_SHOWN, ranked, total
from quantforge.sensitivity.results import WHOLE, PartRow

TINY = Path(__file__).parent / "data" / "tiny-llama"
WINDOWS, LENGTH = 5, 24


def tokens(seed: int = 0, windows: int = WINDOWS) -> torch.Tensor:
    return torch.randint(3, 128, (windows, LENGTH), generator=torch.Generator().manual_seed(seed))


def plain(model, names, ids, **formats):
    """Return losses and KL of a copy of `model` with the named layers quantized, run whole."""
    reference, _ = perplexity.make_reference(model, ids)
    quantized = copy.deepcopy(model)
    whole = plan.make(quantized, recipe.load("rtn", **formats), torch.float32)
    pipeline.quantize(quantized, replace(whole, layers={name: whole.layers[name] for name in names}))
    return perplexity.evaluate(quantized, ids, reference)


@pytest.fixture
def measured(monkeypatch):
    """Return the list of cells (part's layers, format) that have been measured since."""
    found, own = [], measure._cell

    def counting(model, whole, names, prefix):
        found.append((tuple(names), whole.recipe.weights.grid.bits))
        return own(model, whole, names, prefix)

    monkeypatch.setattr(measure, "_cell", counting)
    return found


@pytest.mark.parametrize(
    ("kind", "by"),
    [
        ("llama", "block"), ("llama", "kind"), ("llama", "layer"), ("gemma2", "layer"), ("opt", "kind"),
        ("gpt2", "layer"), ("mixtral", "kind"), ("qwen3_moe", "block"),
    ],
)  # fmt: skip
def test_a_cell_is_what_plainly_quantizing_the_part_gives(kind, by):
    model, ids = tiny.make(kind, num_hidden_layers=3) if kind != "gpt2" else tiny.make(kind, n_layer=3), tokens()
    section = analyze(model, by=[by], bits=[3], data=ids).section(by)
    names = {part.name: part for part in section.parts}
    layers = [name for stage in arch.find_stages(model)[0] for name in stage.names]
    picked = [section.parts[0].name, section.parts[len(section.parts) // 2].name, section.parts[-1].name]
    for part in (WHOLE, *dict.fromkeys(picked)):
        own = [n for n in layers if part in (WHOLE, n, arch.block_path(n), n.rpartition(".")[2])]
        wanted, cell = plain(model, own, ids, bits=3), section.cell(part, "int3-g64-asym")
        assert cell.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert cell.kls == pytest.approx(wanted.kls, rel=1e-3, abs=1e-7)
        assert min(cell.kls) > 0
        assert part == WHOLE or names[part].layers == len(own)
    assert section.losses == pytest.approx(perplexity.evaluate(model, ids).losses, rel=1e-6)


def test_a_change_in_a_block_runs_only_the_blocks_from_there_on(monkeypatch):
    model, calls = tiny.make("llama", num_hidden_layers=4), Counter()
    blocks = list(model.model.layers)
    own = type(blocks[0]).forward

    def counting(self, *args, **kwargs):
        calls[blocks.index(self)] += 1
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(blocks[0]), "forward", counting)
    analyze(model, bits=[4], data=tokens())
    for block in range(4):
        cells = block + 1  # its own, and those of the blocks before
        moving = block < 3  # the states move on through it once
        looks = block  # one window shows, at every block up to here, that states can be kept
        assert calls[block] == WINDOWS * (1 + 1 + cells + moving) + looks  # the first two: the float model, the whole


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("inputs", [None, "int8-token"])
def test_the_model_is_given_back_bit_for_bit(kind, inputs):
    model = tiny.make(kind)
    arch.find_stages(model)  # takes experts apart
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = analyze(model, by=["kind", "layer"], bits=[2], inputs=inputs, data=tokens())
    moved = [sum(cell.kls) > 0 for section in found.sections for cell in section.cells]
    assert all(moved) if kind != "mixtral" else sum(moved) > 10  # an expert may see no token
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(activations.find(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_model_is_given_back_when_a_cell_fails(monkeypatch):
    model = tiny.make("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = measure.Prefix.score
    monkeypatch.setattr(
        measure.Prefix, "score", lambda self, windows=None: own(self, 1) if windows else (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):  # noqa: PT011
        analyze(model, bits=[2], data=tokens())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_hands_on_more_than_its_blocks_return_is_run_whole():
    model, seen = tiny.make("llama", num_hidden_layers=3), {}
    norms = [block.input_layernorm for block in model.model.layers]
    norms[0].register_forward_hook(lambda module, args, out: seen.update(first=args[0]))
    norms[2].register_forward_hook(lambda module, args, out: out + seen.pop("first"))
    ids = tokens()
    section = analyze(model, bits=[3], data=ids).sections[0]
    last = [name for stage in arch.find_stages(model)[0] for name in stage.names if ".2." in name]
    reference, _ = perplexity.make_reference(model, ids)
    whole = plan.make(model, recipe.load("rtn", bits=3), torch.float32)
    pipeline.quantize(model, replace(whole, layers={name: whole.layers[name] for name in last}))
    wanted = perplexity.evaluate(model, ids, reference)
    assert section.cell("model.layers.2", "int3-g64-asym").losses == pytest.approx(wanted.losses, rel=1e-5)


def test_all_ways_measure_everything_at_once_only_once(measured):
    found = analyze(tiny.make("llama"), by=["block", "kind"], bits=[4], data=tokens())
    assert [len(section.cells) for section in found.sections] == [1 + 2, 1 + 7]
    assert len(measured) == len(set(measured)) == 1 + 2 + 7
    assert len({section.cell(WHOLE, "int4-g64-asym") for section in found.sections}) == 1


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(measured, tmp_path, monkeypatch):
    model, counting = tiny.make("llama"), measure._cell

    def interrupted(*args):
        if len(measured) == 4:
            raise KeyboardInterrupt
        return counting(*args)

    monkeypatch.setattr(measure, "_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze(model, by=["kind"], bits=[2, 4], data=tokens(), out=tmp_path)
    kept = from_json((tmp_path / "sensitivity.json").read_text())
    assert len(kept.sections[0].cells) == 4
    monkeypatch.setattr(measure, "_cell", counting)
    found = analyze(model, by=["kind"], bits=[2, 4], data=tokens(), out=tmp_path, resume=True)
    assert len(measured) == len(set(measured)) == 2 * (1 + 7)
    assert found.sections[0].cells[:4] == kept.sections[0].cells
    straight = analyze(model, by=["kind"], bits=[2, 4], data=tokens())
    assert [(c.part, c.format, c.losses, c.kls) for c in found.sections[0].cells] == [
        (c.part, c.format, c.losses, c.kls) for c in straight.sections[0].cells
    ]
    measured.clear()
    analyze(model, by=["kind"], bits=[2, 3], data=tokens(), out=tmp_path, resume=True)
    assert {bits for _, bits in measured} == {3}
    analyze(model, by=["block"], bits=[2], data=tokens(), out=tmp_path)
    both = from_json((tmp_path / "sensitivity.json").read_text())
    assert [section.by for section in both.sections] == ["kind", "block"]
    assert len(both.section("kind").cells) == 3 * (1 + 7)


def test_results_of_another_model_method_or_text_are_refused(tmp_path):
    model, ids = tiny.make("llama"), tokens()
    common = {"by": ["block"], "bits": [4], "out": tmp_path, "data": ids, "resume": True}
    analyze(model, **{**common, "resume": False})
    with pytest.raises(PlanError, match="--resume goes on"):
        analyze(model, **{**common, "resume": False})
    for said, change in {
        "another model": {"model": tiny.make("mistral")},
        "another method": {"method": "hqq"},
        r"another options": {"overrides": {"*.down_proj": {"bits": 8}}},
        r"another text \(ids_sha256\) by block": {"data": tokens(1)},
        r"another text \(count\) by block, 5, not 3": {"windows": 3},
        r"another text \(seq_len\) by block": {"data": ids[:, :20]},
    }.items():
        with pytest.raises(PlanError, match=said) as error:
            analyze(**{"model": model, **common, **change})
        assert "\n" not in str(error.value)
    monkey = json.loads((tmp_path / "sensitivity.json").read_text())
    monkey["sections"][0]["versions"]["torch"] = "1.0"
    (tmp_path / "sensitivity.json").write_text(json.dumps(monkey))
    with pytest.raises(PlanError, match=r"version of torch by block, '1.0', not"):
        analyze(model, **common)


def copied(tmp_path: Path) -> Path:
    """Return a copy of the small model's folder, of the same name."""
    return Path(shutil.copytree(TINY, tmp_path / "copy" / TINY.name))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"overrides": {"*.down_proj": {"bits": 8}}}, {"overrides": {"*.down_proj": {"bits": 6}}}, "options"),
        ({"overrides": {"*.down_proj": {"bits": 8}}}, {"overrides": {"*.down_proj": {"group_size": 32}}}, "options"),
        ({"overrides": {"*.down_proj": {"bits": 8}}}, {"overrides": {"*.up_proj": {"bits": 8}}}, "options"),
        (
            {"overrides": {"*.q_proj": {"bits": 8}, "*.0.*": {"bits": 2}}},
            {"overrides": {"*.0.*": {"bits": 2}, "*.q_proj": {"bits": 8}}},  # the last one that matches wins
            "options",
        ),
        (
            {"weights": ["int4-g64-asym"], "overrides": {"*.up_proj": {"weights": "int8-g32-asym"}}},
            {"weights": ["int4-g32-asym"], "group_size": 64, "overrides": {"*.up_proj": {"weights": "int8-g32-asym"}}},
            "options of int4-g64-asym",
        ),
        (
            {"inputs": "int8-token", "settings": {"inputs.threshold": 6.0, "inputs.dynamic": True}},
            {"inputs": "int8-token", "settings": {"inputs.threshold": 3.0, "inputs.dynamic": True}},
            "options",
        ),
        (
            {"inputs": "int8-token"},
            {"inputs": "int8-token", "settings": {"inputs.threshold": 6.0, "inputs.dynamic": True}},
            "options",
        ),
        ({"method": "hqq"}, {"method": "hqq", "settings": {"solver.norm": 0.5}}, "options"),
    ],
)
def test_cells_of_other_options_are_not_taken_over(before, after, said, tmp_path):
    common = {"model": tiny.make("llama"), "by": ["kind"], "data": tokens(windows=1), "out": tmp_path}
    common |= {} if "weights" in before else {"bits": [4]}
    first = analyze(**common, **before)
    with pytest.raises(PlanError, match=f"QF-291.*another {said}"):
        analyze(**common, **after, resume=True)
    if "weights" not in before:
        with pytest.raises(
            PlanError, match=r"QF-291.*another options;"
        ):  # nor do columns of other options stand beside
            analyze(**{**common, "bits": [3]}, **after, resume=True)
    again = analyze(**common, **before, resume=True)
    assert again == from_json(to_json(first))


def test_an_override_that_takes_its_width_from_the_column_goes_on_in_another(tmp_path):
    common = {"by": ["kind"], "data": tokens(windows=1), "out": tmp_path}
    common["overrides"] = {"*.down_proj": {"group_size": 32}}
    analyze(tiny.make("llama"), bits=[2, 4], **common)
    found = analyze(tiny.make("llama"), bits=[4, 3], resume=True, **common)
    assert len(found.sections[0].cells) == 3 * (1 + 7)
    assert list(found.columns) == list(found.sections[0].formats) == [f"int{bits}-g64-asym" for bits in (2, 4, 3)]
    inner = [column["overrides"]["*.down_proj"]["format"][:8] for column in found.columns.values()]
    assert inner == ["int2-g32", "int4-g32", "int3-g32"]


@pytest.mark.parametrize("by", ["block", "kind"])
def test_other_model_files_of_the_same_name_are_refused(by, tmp_path, change_tensors):
    folder, out = copied(tmp_path), tmp_path / "out"
    common = {"bits": [4], "data": tokens(windows=2), "out": out}
    first = analyze(folder, by=["block"], **common)
    assert first.sections[0].fingerprint == loading.find(str(folder)).fingerprint("cpu")
    assert analyze(TINY, by=["block"], resume=True, **common).sections == from_json(to_json(first)).sections
    change_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1.01))
    with pytest.raises(PlanError, match=r"QF-291.*by block of other model files") as error:
        analyze(folder, by=[by], resume=True, **common)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [[4], [3]])
@pytest.mark.parametrize("by", ["block", "kind"])
def test_another_model_in_memory_is_told_by_its_losses(bits, by, tmp_path):
    model, common = tiny.make("llama"), {"data": tokens(windows=2), "out": tmp_path}
    first = analyze(model, by=["block"], bits=[4], **common)
    assert first.sections[0].fingerprint == ""
    written = (tmp_path / "sensitivity.json").read_bytes()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(3)
    with pytest.raises(PlanError, match=r"QF-291.*on window 0.* it has changed") as error:
        analyze(other, by=[by], bits=bits, resume=True, **common)
    assert "\n" not in str(error.value)
    assert (tmp_path / "sensitivity.json").read_bytes() == written
    assert len(analyze(model, by=[by], bits=bits, resume=True, **common).sections[-1].cells) >= len(bits)


def test_the_float_model_is_run_once_for_a_model_and_text(tmp_path, monkeypatch):
    calls, own = [], perplexity.make_reference

    def counted(model, ids, progress=None, **checks):  # a kept reference is checked with one token a position
        if not checks:
            calls.append(1)
        return own(model, ids, *([progress] if progress else []), **checks)

    monkeypatch.setattr(perplexity, "make_reference", counted)
    common = {"data": tokens(windows=2), "out": tmp_path / "out"}
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    analyze(TINY, by=["block", "kind"], bits=[4], **common)
    cached = analyze(TINY, by=["block"], bits=[4, 3], resume=True, **common).section("block")
    assert len(calls) == 1
    monkeypatch.setenv("QUANTFORGE_CACHE", "")
    straight = analyze(TINY, bits=[3], data=common["data"]).section("block")
    assert len(calls) == 2
    assert straight.losses == cached.losses
    for cell in straight.cells:
        assert cached.cell(cell.part, cell.format).kls == cell.kls
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "memory"))
    analyze(tiny.make("llama"), bits=[4], data=common["data"])
    assert not (tmp_path / "memory").exists()  # nothing tells a model in memory from another


def test_a_kept_reference_that_something_else_computed_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    own = references.save
    monkeypatch.setattr(
        references, "save", lambda path, found, made: own(path, replace(found, losses=(9.0,) * len(found.losses)), made)
    )
    losses = [analyze(TINY, bits=[4], data=tokens(windows=2)).sections[0].losses for _ in range(2)]
    assert list(tmp_path.iterdir())
    assert losses[0] == losses[1]


def run(*args: object):
    result = CliRunner().invoke(cli.main, ["sensitivity", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--bits", "5,x"), "'5,x' is not a list of whole numbers"),
        (("--bits", ","), "',' is not a list"),
        (("--bits", "9"), "from 2 to 8, not 9"),
        (("--bits", "4,4"), "asked for twice"),
        (("--weights", ","), "weights is empty"),
        (("--by", "blok"), "did you mean 'block'?"),
        (("--by", ","), "name one of block, kind, layer"),
        (("--method", "gptq"), "gptq needs calibration, and sensitivity takes methods without: "),
        (("--method", "nf5"), "no method is called 'nf5'"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
        (("--windows", "1000000"), "1000000 were asked for"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_any_weight_is_read(args, said, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "model", lambda *_: pytest.fail("weights were read"))
    result = run(TINY, *args, "--seq-len", 32, "--out", tmp_path / "out")
    assert result.exit_code in (2, 4)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_methods_that_work_are_named_and_work():
    with pytest.raises(RecipeError) as error:
        analyze(tiny.make("llama"), "awq", data=tokens())
    able = str(error.value).partition("without: ")[2].rstrip(".").split(", ")
    assert {"rtn", "nf4", "hqq", "quantile"} <= set(able)
    for method in ("nf4", "fp4", "hqq"):
        formats = analyze(tiny.make("llama"), method, data=tokens(windows=1)).sections[0].formats
        assert len(formats) in (1, 4), method
    found = analyze(tiny.make("llama"), weights=["mxfp4", "e4m3-channel"], data=tokens(windows=1)).sections[0]
    assert found.formats == ("e2m1-g32-e8m0", "e4m3-channel")


def test_the_command_writes_three_files_and_goes_on(tmp_path):
    text = tmp_path / "some.txt"
    text.write_text(corpus.load_text("python-docs", "evaluation").text[:3000], encoding="utf-8")
    out = tmp_path / "out"
    args = (TINY, "--bits", "2,4", "--by", "kind,block", "--data", text, "--seq-len", 32, "--windows", 6, "--out", out)
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert sorted(f.name for f in out.iterdir()) == ["sensitivity.html", "sensitivity.json", "sensitivity.md"]
    assert result.stdout.splitlines()[-1] == str(out / "sensitivity.html")
    assert "by block, int2-g64-asym: KL model.layers." in result.stdout
    before = (out / "sensitivity.json").read_bytes()
    again = run(*args, "--resume", "--json")
    assert (out / "sensitivity.json").read_bytes() == before
    assert json.loads(again.stdout)["model"] == "tiny-llama"
    assert run(*args).exit_code == 2
    assert run(TINY, "--out", TINY / "here").exit_code == 2


# what the results say


def section(cells: dict[str, tuple[float, ...]], whole: tuple[float, ...], level: float = 2.0) -> Section:
    """Return a section of blocks in one format with these KL; losses rise by as much."""
    found = [
        Cell(part, "int4", tuple(level + kl for kl in kls), kls, 1.0) for part, kls in {WHOLE: whole, **cells}.items()
    ]
    parts = tuple(PartRow(name, i, 1, 10) for i, name in enumerate(cells))
    losses = (level,) * len(whole)
    return Section("block", {"name": "x"}, {}, "", {}, "", "2026-01-01", losses, ("int4",), parts, tuple(found))


def analysis(*sections: Section, **more) -> Analysis:
    return replace(Analysis(2, "m", (), "rtn", {}, {}, sections), **more)


NOISE = (0.2, -0.1, 0.15, -0.25, 0.1, -0.05, 0.2, -0.2)


def noisy(mean: float, turn: int = 0) -> tuple[float, ...]:
    return tuple(mean * (1 + NOISE[(i + turn) % 8]) for i in range(8))


def test_the_list_is_ranked_and_says_what_differs_from_the_next():
    found = ranked(section({"low": noisy(0.1), "high": noisy(0.5), "near": noisy(0.49, 3)}, noisy(1)), "int4")
    assert [row.part for row in found] == ["high", "near", "low"]
    assert [row.apart for row in found] == [False, True, None]
    mean = sum(noisy(0.5)) / 8
    error = math.sqrt(sum((x - mean) ** 2 for x in noisy(0.5)) / 7 / 8)
    assert (found[0].kl, found[0].kl_error) == pytest.approx((mean, error))
    assert found[0].change == pytest.approx(math.exp(2 + mean) - math.exp(2))
    assert found[0].change_error == pytest.approx(math.exp(2 + mean) * error)
    assert all(row.moved for row in found)
    wavering = replace(section({"a": noisy(0.1)}, noisy(1)), losses=tuple(2.1 + 0.1 * x for x in NOISE))
    assert not ranked(wavering, "int4")[0].moved


def test_the_sum_is_compared_with_the_whole():
    parts = {"a": noisy(0.2), "b": noisy(0.3, 1)}
    added = tuple(x + y for x, y in zip(*parts.values(), strict=True))
    same = total(section(parts, tuple(v * (1 + 0.1 * NOISE[i]) for i, v in enumerate(added))), "int4")
    assert same.verdict == NOT_SHOWN
    assert same.kl == pytest.approx(sum(added) / 8)
    assert same.loss == pytest.approx(same.kl)
    more = total(section(parts, noisy(0.1)), "int4")
    assert (more.verdict, total(section(parts, noisy(5)), "int4").verdict) == ("the sum is higher", "the sum is lower")
    assert more.share == pytest.approx(more.kl / more.whole_kl)
    unfinished = section(parts, noisy(1))
    assert total(replace(unfinished, cells=unfinished.cells[:-1]), "int4") is None


def test_what_is_not_finite_leads_the_list_and_breaks_no_page():
    odd = section({"fine": noisy(0.1), "broken": (math.nan,) * 8}, noisy(1))
    assert [row.part for row in ranked(odd, "int4")] == ["broken", "fine"]
    assert total(odd, "int4") is None
    one = analysis(odd, replace(section({"only": (0.1,)}, (0.2,)), by="kind"))
    again = from_json(to_json(one))
    assert to_json(again) == to_json(one)
    for found in (one, again):
        assert to_html(found).count("So few windows") == markdown(found).count("So few windows") == 1
        assert "n/a" in to_html(found)
        assert "n/a" in markdown(found)
    assert "n/a" in show.summary(one, ("block",))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.34567, "12.346"),
        (0.01, "0.010"),
        (0.00834, "0.0083"),
        (0.00012, "0.00012"),
        (1.234e-5, "0.000012"),
        (1e-6, "0.0000010"),
        (9e-7, "< 0.000001"),
        (0.0, "0.000"),
        (math.nan, "n/a"),
    ],
)
def test_a_small_kl_is_written_out(value, text):
    assert show.nats(value) == text


def test_no_number_of_the_lists_has_an_exponent():
    parts = {"small": noisy(1.2e-5), "large": noisy(0.03)}
    found = analysis(section(parts, noisy(0.03)))
    for said in (show.summary(found, ("block",)), markdown(found), to_html(found).partition("<svg")[0]):
        assert "0.000012" in said
        assert not re.search(r">[^<]*\de-\d\d|\| \S*\de-\d\d", said)
        assert not re.search(r"\de-\d\d", show.summary(found, ("block",)))


def test_layers_are_mapped_by_block_and_place_within_it():
    names = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("a.q", "b.v")]
    base = section({name: noisy(0.1 * (i + 1)) for i, name in enumerate(names)}, noisy(1))
    rows = tuple(replace(part, block=i // 2) for i, part in enumerate(base.parts))
    (found,) = show.heat_maps(replace(base, by="layer", parts=rows))
    assert found.columns == ("a.q", "b.v")
    assert [name for name, _ in found.rows] == ["0", "1"]
    heats = [field.heat for _, fields in found.rows for field in fields]
    assert heats == sorted(heats)
    assert (heats[0], heats[-1]) == (0, 100)


HOSTILE = '</script><img src="https://evil.example/x" onerror=alert(1)>|`_*\x1b[31m\u202e'


class Tags(HTMLParser):
    """The names of a page's elements and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_pages_reach_for_nothing_and_escape_every_name():
    bad = replace(
        section({HOSTILE: noisy(0.1), "b": noisy(0.2)}, noisy(1)),
        evaluation={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}, machine={HOSTILE: HOSTILE}, command=HOSTILE,
        created=HOSTILE,
    )  # fmt: skip
    bad = replace(bad, formats=(HOSTILE,), cells=tuple(replace(cell, format=HOSTILE) for cell in bad.cells))
    layers = replace(bad, by="layer")
    found = analysis(bad, layers, model=HOSTILE, method=HOSTILE, model_notes=(HOSTILE,), options={HOSTILE: HOSTILE})
    page = to_html(found)
    assert page.count("<script>") == page.count("</script>") == 1
    tags = Tags()
    tags.feed(page)
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & tags.names
    assert not {name for name in tags.attributes if name in ("src", "href", "action") or name.startswith("on")}
    assert not re.search(r"@import|url\(", page)
    assert "default-src 'none'" in page
    assert "\x1b" not in page + markdown(found)
    assert "\u202e" not in page + markdown(found)
    assert "<img" not in markdown(found).replace("&lt;img", "")
    assert page.count(HOSTILE[:9].replace("<", "&lt;").replace(">", "&gt;")) >= 10


def test_damaged_results_are_one_line(tmp_path):
    good = json.loads(to_json(analysis(section({"a": noisy(0.1)}, noisy(1)))))
    short = copy.deepcopy(good)
    short["sections"][0]["cells"][0]["kls"].pop()
    for bad in ("{", "[]", "3", json.dumps({**good, "schema": 9}), json.dumps({**good, "model": 3}), json.dumps(short)):
        (tmp_path / "sensitivity.json").write_text(bad)
        with pytest.raises(DataError) as error:
            analyze(tiny.make("llama"), data=tokens(), out=tmp_path, resume=True)
        assert isinstance(error.value, QuantForgeError)
        assert "\n" not in str(error.value)
