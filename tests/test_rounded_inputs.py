"""Layers that round their inputs, end to end: what they compute, what calibration sees, what is saved and undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import quantforge
from quantforge import pipeline, recipe, report, solving
from quantforge import plan as planning
from quantforge.calibrate import corpus
from quantforge.cli import main
from quantforge.errors import DataError, PlanError, RecipeError
from quantforge.models import activations, arch, moe, tiny
from quantforge.numerics.formats import parse
from quantforge.numerics.inputs import QInput, integer_product, parse_inputs
from quantforge.report import layers

TINY = Path(__file__).parent / "data" / "tiny-llama"
IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.1.mlp.down_proj"


def rounded(inputs: str, method: str = "rtn", kind: str = "llama", **settings):
    model = tiny.make(kind)
    options = {key.replace("__", "."): value for key, value in settings.items()}
    own = {} if method != "rtn" else {"bits": 8, "group_size": -1, "symmetric": True}
    chosen = recipe.load(method, inputs=inputs, settings=options, **own)
    return model, pipeline.quantize(model, planning.make(model, chosen, torch.float32), IDS)


def inputs_of(model, name, ids=IDS):
    """Return what arrives at a layer before its gate, and what the layer then computes with."""
    seen = []
    module = model.get_submodule(name)
    handles = [
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()), prepend=True),
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())),
    ]
    with torch.no_grad():
        out = model(ids).logits
    for handle in handles:
        handle.remove()
    return seen[0], seen[1], out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("inputs", ["int8-token", "int8-tensor-static"])
def test_every_layer_of_the_plan_rounds_its_input_and_no_other_does(kind, inputs):
    model, rows = rounded(inputs, kind=kind)
    gated = {name for name, module in model.named_modules() if activations.find(module) is not None}
    assert gated == {row.name for row in rows}
    assert all(activations.find(model.get_submodule(row.name)).rounds is row.weight.inputs for row in rows)
    for row in (row for row in rows if ".experts." not in row.name):
        assert (row.weight.inputs.range is not None) == inputs.endswith("static")


def test_a_layer_computes_with_its_rounded_input():
    model, _ = rounded("int4-token")
    before, after, _ = inputs_of(model, LAYER)
    assert torch.equal(after, QInput(parse_inputs("int4-token")).round(before))
    assert not torch.equal(after, before)


def test_calibration_sees_inputs_that_come_through_rounded_layers_and_are_not_yet_rounded(monkeypatch):
    """The static range of a late layer spans what arrives there in the finished model, and of no float model."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 48)  # the extremes of four batches
    model, rows = rounded("int8-tensor-static")
    row = next(row for row in rows if row.name == LAYER)
    before, _, _ = inputs_of(model, LAYER)
    spans = float(before.abs().max()) * 2 / 255
    torch.testing.assert_close(float(row.weight.inputs.range.scale), spans, rtol=1e-6, atol=0)
    float_before, _, _ = inputs_of(tiny.make("llama"), LAYER)
    assert float(float_before.abs().max()) != float(before.abs().max())


def test_nothing_is_left_of_the_gates_when_a_model_is_quantized_anew_without_them():
    model, _ = rounded("int8-token")
    plan = planning.make(model, recipe.load("rtn", bits=8, group_size=-1, symmetric=True), torch.float32)
    pipeline.quantize(model, plan)
    assert not any(activations.find(module) for module in model.modules())


def test_features_above_the_threshold_keep_their_float_weights_and_inputs():
    model, rows = rounded("narrow8-token", "llm-int8", inputs__threshold=1.5)
    row = next(row for row in rows if 0 < len(row.weight.inputs.spared) < row.weight.base.shape[1])
    index = row.weight.inputs.spared.long()
    exact = arch.get_weight(tiny.make("llama").get_submodule(row.name))
    assert torch.equal(row.weight.dequantize()[:, index], exact[:, index])
    assert row.weight.notes["float_columns"] == len(index)
    assert row.weight.nbits > row.weight.base.nbits
    before, after, _ = inputs_of(model, row.name)
    assert torch.equal(after[..., index], before[..., index])
    others = torch.ones(before.shape[-1], dtype=torch.bool).index_fill(0, index, False)
    assert not torch.equal(after[..., others], before[..., others])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_computes_what_integers_summed_in_32_bits_and_float_features_give(dynamic):
    model, rows = rounded("narrow8-token", "llm-int8", inputs__threshold=1.5, inputs__dynamic=dynamic)
    spared = 0
    for row in rows[:7]:
        before, _, _ = inputs_of(model, row.name)
        x, weight = before.flatten(0, 1), arch.get_weight(model.get_submodule(row.name))
        codes, kept = row.weight.inputs.quantize(x)
        wanted = integer_product(codes, row.weight.base) + x[:, kept] @ weight[:, kept].T
        torch.testing.assert_close(row.weight.inputs.round(x) @ weight.T, wanted, rtol=1e-5, atol=1e-5)
        spared += len(kept)
    assert spared


def test_nothing_is_added_to_features_that_stay_in_float():
    model, before = tiny.make("llama"), tiny.make("llama")
    settings = {"inputs.threshold": 1.0}
    chosen = recipe.load("llm-int8+lorc", settings=settings)
    rows = {row.name: row for row in pipeline.quantize(model, planning.make(model, chosen, torch.float32), IDS)}
    spared = rows[LAYER].weight.inputs.spared.long()
    assert len(spared)
    ours, own = (arch.get_weight(m.get_submodule(LAYER)) for m in (model, before))
    assert torch.equal(ours[:, spared], own[:, spared])
    assert len(rows[LAYER].weight.residuals) == 2


def test_a_layer_that_no_token_reaches_finds_its_range_in_every_input():
    model = tiny.make("llama")
    chosen = recipe.load("rtn", bits=8, group_size=-1, symmetric=True, inputs="int8-tensor-static")
    plan = planning.make(model, chosen, torch.float32)
    stage = next(s for s in arch.find_stages(model)[0] if LAYER in s.names)
    (layer,) = solving.solve(stage, plan, None, lambda layer: None, total=100)
    assert layer.weight.inputs.range is None
    x = torch.full((1, 96), 0.01)
    assert float(layer.weight.inputs.round(x).abs().max()) == pytest.approx(0.01, rel=0.01)


def test_a_tiny_threshold_keeps_everything_in_float():
    model, _ = rounded("narrow8-token", "llm-int8", inputs__threshold=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny.make("llama")(IDS).logits, rtol=1e-5, atol=1e-6)


def test_a_layer_without_tokens_is_not_saved_as_if_its_range_were_fixed(tmp_path):
    result = quantforge.quantize(
        tiny.make("llama"), "rtn", bits=8, group_size=-1, symmetric=True, inputs="int8-tensor-static", calibration=IDS
    )
    late = next(row for row in result.layers if row.name == LAYER)
    anew = replace(late.weight.inputs.inputs, static=False, dynamic=True)
    weight = replace(late.weight, inputs=QInput(anew))
    rows = tuple(replace(row, weight=weight) if row is late else row for row in result.layers)
    activations.gate(result.model.get_submodule(LAYER), weight.inputs)
    replace(result, layers=rows).save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(quantforge.load(tmp_path / "out", packed=False)(IDS).logits, result.model(IDS).logits)


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "gptq"])
def test_what_needs_data_says_so_before_any_work(method):
    chosen = recipe.load(method, inputs="int8-tensor-static")
    model = tiny.make("llama")
    with pytest.raises(PlanError, match=r"QF-275.*needs calibration tokens"):
        pipeline.quantize(model, planning.make(model, chosen, torch.float32))


def test_padded_windows_are_refused():
    ids = IDS.clone()
    ids[3, -2:] = 0
    with pytest.raises(DataError, match=r"window 3 of the token ids is padded with 0"):
        quantforge.quantize(tiny.make("llama", pad_token_id=0), "smoothquant", calibration=ids)


@pytest.mark.parametrize("ends", [{"pad_token_id": None}, {"eos_token_id": 0}, {"eos_token_id": [2, 0]}])
def test_what_may_be_the_end_of_a_text_is_no_padding(ends):
    ids = IDS.clone()
    ids[3, -2:] = 0
    model = tiny.make("llama", **{"pad_token_id": 0, **ends})
    assert quantforge.quantize(model, "smoothquant", calibration=ids).layers


def test_a_float_that_torch_lacks_is_refused_by_the_plan(monkeypatch):
    real = torch.Tensor.to

    def lacking(self, *args, **kwargs):
        if torch.float8_e4m3fn in args:
            raise NotImplementedError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", lacking)
    with pytest.raises(PlanError, match=r"QF-259.*e4m3-channel-sym.* needs float8_e4m3fn, which this torch lacks"):
        planning.make(tiny.make("llama"), recipe.load("rtn", weights="e4m3-channel"), torch.float32)


@pytest.mark.parametrize("method", [n for n in recipe.names() if not recipe.load(n).inputs])
def test_inputs_are_rounded_over_any_weight_solver(method):
    model = tiny.make("llama")
    settings = {"lwc": {"tuner.epochs": 1}}.get(method, {})
    chosen = recipe.load(method, inputs="int8-token", settings=settings)
    rows = pipeline.quantize(model, planning.make(model, chosen, torch.float32), IDS)
    assert all(activations.find(model.get_submodule(row.name)).rounds is row.weight.inputs for row in rows)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_a_huge_threshold_is_plain_vector_wise_rounding():
    plain, _ = rounded("narrow8-token", "rtn")
    spared, _ = rounded("narrow8-token", "llm-int8", inputs__threshold=1e9)
    made = replace(recipe.load("rtn", inputs="narrow8-token"), weights=parse("llm-int8"))
    model = tiny.make("llama")
    pipeline.quantize(model, planning.make(model, made, torch.float32))
    with torch.no_grad():
        assert torch.equal(spared(IDS).logits, model(IDS).logits)
        assert not torch.equal(plain(IDS).logits, spared(IDS).logits)  # int8 and narrow8 weights differ


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["llm-int8", "smoothquant", "zeroquant"])
def test_what_is_saved_computes_the_same(method, kind, tmp_path):
    settings = {"inputs.threshold": 2.0} if method == "llm-int8" else {}
    settings |= {"tuner.steps": 2} if method == "zeroquant" else {}
    size = 32 if method == "zeroquant" else None
    result = quantforge.quantize(
        tiny.make(kind), method, group_size=size, calibration=IDS, out=tmp_path / "q", settings=settings
    )
    loaded = quantforge.load(tmp_path / "q", packed=False)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, result.model(IDS).logits)
    original, kept = tiny.make(kind), 0
    moe.unfuse(original)
    for row in result.layers:
        if row.weight.inputs.spared is None:  # of experts that saw few tokens, found anew; of the other methods, none
            continue
        spared = row.weight.inputs.spared.long()
        own, again = (arch.get_weight(m.get_submodule(row.name))[:, spared] for m in (original, loaded))
        assert torch.equal(again, own)
        kept += len(spared)
    assert bool(kept) == (method == "llm-int8")
    with torch.no_grad():
        activations.remove(loaded.modules())
        assert not torch.equal(loaded(IDS).logits, result.model(IDS).logits)


def test_a_model_whose_norms_come_after_the_residual_is_refused():
    model = tiny.make("opt", do_layer_norm_before=False, word_embed_proj_dim=32)
    with pytest.raises(PlanError, match=r"QF-258.*smoothquant rescales layers, and nothing in this opt"):
        planning.make(model, recipe.load("smoothquant"), torch.float32)


@pytest.mark.parametrize(
    ("inputs", "settings", "said"),
    [
        ("int8-row", {}, "'int8-row' is no format"),
        ("int8-token-static", {}, "static ranges are for inputs by tensor"),
        ("int8-token", {"inputs.threshold": -1.0}, "threshold must be above 0"),
        ("int8-token", {"inputs.treshold": 1.0}, "inputs have no option 'treshold': did you mean 'threshold'"),
        ("int8-token", {"inputs.dynamic": True}, "set inputs.threshold=6"),
        (None, {"inputs.threshold": 1.0}, "there is no setting 'inputs.threshold'"),
    ],
)
def test_inputs_that_cannot_be_are_refused_in_one_line(inputs, settings, said):
    with pytest.raises(RecipeError) as caught:
        recipe.load("rtn", inputs=inputs, settings=settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for part in ("calibration", "evaluation"):
        (folder / f"{part}.txt").write_text(corpus.load_text("python-docs", part).text[:4000], encoding="utf-8")
    arguments = {"calibration": str(folder / "calibration.txt"), "data": str(folder / "evaluation.txt")}
    arguments |= {"samples": 8, "seq_len": 64, "windows": 8}
    methods = ["rtn", "smoothquant", "llm-int8", "gptq", "kv:int8-token", "kv:int2-token"]
    found = quantforge.compare(
        TINY, methods=methods, bits=[8], group_size=-1, symmetric=True, inputs="int8-tensor-static", **arguments
    )
    return found, arguments


def test_runs_of_a_comparison_do_not_see_each_others_inputs(compared):
    found, arguments = compared
    runs = {run.label: run for run in found.runs}
    alone = quantforge.compare(
        TINY, methods=["gptq"], bits=[8], group_size=-1, symmetric=True, inputs="int8-tensor-static", **arguments
    )
    label = "gptq-int8-channel-sym-x-int8-tensor-static"
    assert runs[label].perplexity == alone.runs[1].perplexity
    plain = quantforge.compare(TINY, methods=["gptq"], bits=[8], group_size=-1, symmetric=True, **arguments)
    assert plain.runs[1].perplexity != alone.runs[1].perplexity
    assert all(layer.format.endswith(" x int8-tensor-static") for layer in runs[label].layers)
    assert runs[label].options["inputs"] == "int8-tensor-static"


def test_caches_are_rows_of_their_own(compared):
    runs = {run.label: run for run in compared[0].runs}
    assert runs["kv:int8-token"].perplexity == pytest.approx(runs["fp"].perplexity, rel=0.01)
    assert runs["kv:int2-token"].perplexity > 1.05 * runs["kv:int8-token"].perplexity
    assert "bytes a token" in runs["kv:int8-token"].notes[0]


def test_the_widest_channels_are_told_before_and_after_smoothing(compared):
    rows = [[cell.text for cell in row] for row in layers.widest(compared[0]).rows]
    assert {row[1] for row in rows} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert all(row[0].startswith("smoothquant") for row in rows)
    assert "Widest input channels" in report.to_markdown(compared[0])
    assert "Widest input channels" in report.to_html(compared[0])


def test_the_commands_take_inputs_and_caches(tmp_path, compared):
    text = compared[1]["data"]
    out = tmp_path / "q"
    common = ["--samples", "2", "--seq-len", "32", "--calib", compared[1]["calibration"]]
    asked = ["quantize", str(TINY), "-m", "rtn", "--bits", "8", "--group-size", "-1", "--symmetric"]
    done = CliRunner().invoke(main, [*asked, "--inputs", "int8-token", "--out", str(out), *common])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(main, ["evaluate", str(out), "--data", text, "--windows", "2", "--seq-len", "32"])
    assert shown.exit_code == 0, shown.output
    kv = ["evaluate", str(out), "--data", text, "--windows", "2", "--seq-len", "32", "--kv"]
    assert "bytes a token" in CliRunner().invoke(main, [*kv, "int8-token"]).output
    wrong = CliRunner().invoke(main, [*kv, "int4-kivi-g32-w16"])
    assert wrong.exit_code != 0
    assert "window" in wrong.output


@pytest.mark.parametrize("name", ["smoothquant+gptq", "gptq+smoothquant", "rtn+llm-int8", "awq+smoothquant"])
def test_a_joined_method_rounds_the_inputs_that_either_part_rounds(name):
    assert recipe.load(name).inputs is not None
    assert "-x-" in recipe.load(name).label


def test_methods_that_round_inputs_differently_cannot_be_joined():
    with pytest.raises(RecipeError, match="each say how inputs are rounded"):
        recipe.load("smoothquant+llm-int8")


def test_an_expert_without_tokens_finds_its_range_in_every_input():
    model = tiny.make("mixtral")
    model.model.layers[0].mlp.gate.weight.data[3] = -100.0 * model.model.layers[0].mlp.gate.weight.data[:3].abs().sum(0)
    chosen = recipe.load("rtn", bits=8, group_size=-1, symmetric=True, inputs="int8-tensor-static")
    rows = pipeline.quantize(model, planning.make(model, chosen, torch.float32), IDS)
    for row in rows:
        starved = row.tokens < max(row.weight.base.shape[1], IDS.numel() / 100)
        if ".experts." in row.name:
            assert (row.weight.inputs.range is None) == starved
    assert any(row.weight.inputs.range is None for row in rows if ".experts." in row.name)


def test_a_run_that_fails_leaves_no_gates(monkeypatch):
    model = tiny.make("llama")
    plan = planning.make(model, recipe.load("rtn", inputs="int8-tensor-static", group_size=32), torch.float32)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, plan, IDS, progress=lambda layer: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not any(activations.find(module) for module in model.modules())


def test_losses_of_smoothed_layers_are_their_own(compared):
    """They are not those of plain rounding, which does not smooth."""
    runs = {run.label: run for run in compared[0].runs}
    smoothed, plain = (runs[f"{m}-int8-channel-sym-x-int8-tensor-static"].layers for m in ("smoothquant", "rtn"))
    assert all(a.loss != b.loss for a, b in zip(smoothed, plain, strict=True) if a.kind == "q_proj")
