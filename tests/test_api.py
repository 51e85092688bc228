"""Perplexity on a trained model means something: what methods promise shows in it, in memory and on disk alike."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import quantforge
from quantforge import api, checkpoint, pipeline
from quantforge.calibrate import corpus
from quantforge.errors import DataError, ModelError, PlanError, QuantForgeError, ResourceError
from quantforge.models import load as loading
from quantforge.models import tiny
from quantforge.result import Result

TINY = Path(__file__).parent / "data" / "tiny-llama"
LENGTH = 128


@pytest.fixture(scope="module")
def ids() -> tuple[torch.Tensor, torch.Tensor]:
    """Return calibration and evaluation tokens [windows, LENGTH]."""
    tokenizer = loading.read_tokenizer(TINY)
    parts = [
        corpus.windows(corpus.load_text("python-docs", part), tokenizer, LENGTH, n).ids
        for part, n in (("calibration", 48), ("evaluation", 24))
    ]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def score(ids):
    """Return perplexity(model) on the evaluation tokens."""
    return lambda model: api.evaluate(model, data=ids[1], seq_len=LENGTH).perplexity


@pytest.fixture(scope="module")
def made(ids) -> dict[tuple[str, int], Result]:
    """Return what each method makes of the trained model at each width."""
    return {
        (method, bits): api.quantize(TINY, method, bits=bits, calibration=ids[0], seq_len=LENGTH)
        for method, bits in (("rtn", 3), ("gptq", 3), ("rtn", 4), ("gptq", 4), ("rtn", 8), ("gptq", 8))
    }


@pytest.fixture(scope="module")
def perplexity(made, score) -> dict[tuple[str, int], float]:
    return {key: score(result.model) for key, result in made.items()} | {("fp", 16): score(TINY)}


def test_the_model_has_learnt_something(perplexity):
    """A model that guesses bytes evenly has 256; what it has learnt is what quantization can lose."""
    assert 1 < perplexity["fp", 16] < 6


def test_second_order_rounding_loses_less_than_plain_rounding(perplexity):
    """At 3 bits less than half of what RTN loses; at 4 bits, where little is left to lose, simply less."""
    for bits, share in ((3, 0.5), (4, 1.0)):
        lost = {m: perplexity[m, bits] / perplexity["fp", 16] - 1 for m in ("rtn", "gptq")}
        assert lost["rtn"] > 0, bits
        assert lost["gptq"] < lost["rtn"] * share, bits


def test_more_bits_lose_less(perplexity):
    assert perplexity["rtn", 8] < perplexity["rtn", 4] < perplexity["rtn", 3]
    assert perplexity["gptq", 4] < perplexity["gptq", 3]


def test_eight_bits_are_within_half_a_percent_of_float(perplexity):
    for method in ("rtn", "gptq"):
        assert perplexity[method, 8] == pytest.approx(perplexity["fp", 16], rel=0.005)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 3), ("rtn", 4), ("gptq", 8)])
def test_a_checkpoint_scores_exactly_what_the_model_in_memory_scores(method, bits, made, perplexity, score, tmp_path):
    saved = made[method, bits].save(tmp_path / "checkpoint")
    assert score(saved) == perplexity[method, bits]
    assert score(api.load(saved, torch.float32, packed=False)) == perplexity[method, bits]


def test_stock_transformers_scores_the_same_checkpoint_the_same(made, perplexity, score, tmp_path):
    saved = made["gptq", 4].save(tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, local_files_only=True)
    assert score(model) == pytest.approx(perplexity["gptq", 4], rel=1e-5)


def test_the_losses_of_layers_say_which_method_is_better(made):
    """The share of each layer's output that is lost: GPTQ's at 4 bits is below its own at 3 bits in every layer."""
    three, four = (made["gptq", bits].layers for bits in (3, 4))
    assert len(three) == len(four) == 28
    for a, b in zip(three, four, strict=True):
        assert a.name == b.name
        assert 0 < b.relative_loss < a.relative_loss < 1


def test_the_same_run_twice_gives_the_same_codes(ids, made):
    again = api.quantize(TINY, "gptq", bits=4, calibration=ids[0], seq_len=LENGTH)
    for a, b in zip(again.layers, made["gptq", 4].layers, strict=True):
        assert torch.equal(a.weight.base.codes, b.weight.base.codes), a.name
        assert torch.equal(a.weight.base.scale, b.weight.base.scale), a.name


def test_the_record_is_json_and_agrees_with_the_plan(made):
    result = made["gptq", 4]
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["method"] == "gptq"
    assert record["format"] == "int4-g64-asym-bf16"
    # 4 bits of code, and a scale of 16 bits with a zero point of 4 for every 64 weights
    assert record["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 64)
    assert record["bytes_after"] < record["bytes_before"] / 2
    assert [row["name"] for row in record["layers"]] == list(result.plan.layers)
    assert {row["tokens"] for row in record["layers"]} == {48 * LENGTH}


def test_a_model_in_memory_is_changed_in_place_and_keeps_scales_in_its_own_dtype(ids, made):
    model = loading.model(loading.find(str(TINY)))
    result = api.quantize(model, "gptq", bits=4, calibration=ids[0], seq_len=LENGTH)
    assert result.model is model
    for a, b in zip(result.layers, made["gptq", 4].layers, strict=True):
        assert (a.weight.base.scale.dtype, b.weight.base.scale.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(model.get_submodule(a.name).weight, a.weight.dequantize())
        assert a.relative_loss == pytest.approx(b.relative_loss, rel=0.2)


def test_a_model_in_memory_needs_a_tokenizer_for_text_only():
    model = tiny.make("llama")
    with pytest.raises(DataError, match="tokenizer"):
        api.quantize(model, "gptq", calibration="python-docs", group_size=32)
    assert api.quantize(model, "rtn", group_size=32).calibration == {}


def test_a_dead_input_channel_is_counted_and_does_no_harm(ids):
    """Row 22: a column whose input is always zero keeps its rounded value, and the record says how many there were."""
    model = loading.model(loading.find(str(TINY)))
    norm = model.get_submodule("model.layers.1.input_layernorm")
    with torch.no_grad():
        norm.weight[5] = 0.0
    before = model.get_submodule("model.layers.1.self_attn.q_proj").weight[:, 5].detach().clone()
    result = api.quantize(model, "gptq", bits=4, calibration=ids[0], seq_len=LENGTH)
    dead = {layer.name: layer.weight.notes["dead_columns"] for layer in result.layers}
    assert {name for name, n in dead.items() if n} == {f"model.layers.1.self_attn.{p}_proj" for p in "qkv"}
    assert dead["model.layers.1.self_attn.q_proj"] == 1
    after = model.get_submodule("model.layers.1.self_attn.q_proj").weight[:, 5]
    codes = next(x for x in result.layers if x.name.endswith("layers.1.self_attn.q_proj")).weight.base
    assert torch.all((after - before).abs() <= codes.scale[:, 0].float() * 0.51 + 1e-6)
    assert before.abs().max() > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_one_token_repeated_is_solved_and_the_fallback_recorded(ids, score):
    """Row 40: Hessians of rank one are no reason to stop; how each was solved is in the record."""
    same = torch.full((2, LENGTH), 50)
    result = api.quantize(TINY, "gptq", bits=4, calibration=same, seq_len=LENGTH)
    for row in result.record()["layers"]:
        assert row["rung"] in ("float32", "float64", "diagonal")
        assert row["damp"] >= 0.01
    assert score(result.model) < 256
    rows = api.quantize(TINY, "gptq", bits=4, calibration=same, seq_len=LENGTH, settings={"solver.damp_percent": 0.0})
    notes = [layer.weight.notes for layer in rows.layers]
    raised = [n for n in notes if n["damp"] > 0 or n["rung"] == "diagonal"]
    assert raised
    assert len(rows.fallbacks()) == len(raised)
    assert all(line in rows.summary() for line in rows.fallbacks())


def test_evaluate_takes_a_model_in_memory_and_leaves_it_as_it_was(ids):
    model = tiny.make("llama", vocab_size=300)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = api.evaluate(model, data=ids[1][:2], seq_len=LENGTH)
    assert found.model == "LlamaForCausalLM"
    assert found.data == {"name": "token ids", "seq_len": LENGTH, "count": 2}
    assert json.loads(json.dumps(found.record()))["perplexity"] == found.perplexity
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ({"device": "cuda"}, ResourceError, "--device cpu works"),
        ({"device": "tpu"}, ResourceError, "cpu and cuda"),
        ({"seq_len": 4096}, PlanError, "at most 512"),
        ({"model": "no/such/folder"}, ModelError, "local folder"),
        ({"calibration": torch.zeros(4)}, DataError, "int64"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(what, error, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    monkeypatch.setattr(loading, "reachable", lambda: False)
    monkeypatch.setattr(loading, "snapshot_download", _offline)
    with pytest.raises(error, match=says):
        api.quantize(**{"model": TINY, "method": "gptq"} | what)


def _offline(*args: object, **kwargs: object) -> str:
    raise ConnectionError("no network")


def test_every_refusal_is_a_quantforge_error():
    with pytest.raises(QuantForgeError):
        quantforge.quantize(TINY, "gtpq")


@pytest.mark.parametrize("name", ["quantize", "evaluate", "compare", "load"])
def test_the_public_functions_stay_functions_whatever_has_been_imported(name):
    """A module of the package with the name of a function would take its place as soon as it is imported."""
    for _ in range(2):
        function = getattr(quantforge, name)
        assert inspect.isfunction(function)
    assert importlib.util.find_spec(f"quantforge.{name}") is None
    assert name in quantforge.__all__


def test_what_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="quantise"):
        _ = quantforge.quantise


def test_a_model_in_memory_that_is_not_finite_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(pipeline, "quantize", lambda *a: pytest.fail("work was begun"))
    model = tiny.make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight' has 1 NaN"):
        api.quantize(model, "rtn", group_size=32)


def test_a_text_may_be_given_as_a_path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("A simple statement is comprised within a single logical line. " * 20)
    result = api.quantize(TINY, "gptq", calibration=file, samples=2, seq_len=64)
    assert result.calibration["name"] == str(file)
    json.dumps(result.record())
    assert api.evaluate(TINY, data=file, seq_len=64, windows=2).data["name"] == str(file)


def test_a_model_in_float64_in_memory_is_stored_in_float32(tmp_path):
    """The same codes as of the same numbers in float32."""
    made = [
        api.quantize(tiny.make("llama").to(dtype), "rtn", group_size=32, out=tmp_path / str(dtype))
        for dtype in (torch.float64, torch.float32)
    ]
    for a, b in zip(made[0].layers, made[1].layers, strict=True):
        assert torch.equal(a.weight.base.codes, b.weight.base.codes)
        assert a.weight.base.scale.dtype == torch.float32
    assert {p.dtype for p in api.load(tmp_path / "torch.float64").parameters()} == {torch.float32}


def test_a_module_that_is_no_transformers_model_cannot_be_saved_and_says_so_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(api.planning, "make", lambda *a: pytest.fail("work was begun"))
    with pytest.raises(PlanError, match=r"QF-270.*Sequential.*without out="):
        api.quantize(nn.Sequential(nn.Linear(4, 4)), "rtn", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ({"data": "typo.txt"}, DataError, "does not exist"),
        ({"data": Path("typo.txt")}, DataError, "does not exist"),
        ({"seq_len": 4096}, PlanError, "at most 512"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_checkpoint_is_read(
    made, tmp_path, monkeypatch, what, error, says
):
    saved = made["rtn", 4].save(tmp_path / "checkpoint")
    monkeypatch.setattr(checkpoint, "read", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(error, match=says):
        api.evaluate(saved, **what)


@pytest.mark.parametrize("trusted", [True, False])
def test_trust_is_passed_on_to_all_that_reads_a_checkpoint(made, tmp_path, monkeypatch, trusted):
    saved = made["rtn", 4].save(tmp_path / "checkpoint")
    seen = []
    for module, name in ((checkpoint, "read_config"), (checkpoint, "read"), (loading, "read_tokenizer")):
        real = getattr(module, name)

        def spy(*args, real=real, name=name, **more):
            seen.append((name, more["trust_remote_code"]))
            return real(*args, **more)

        monkeypatch.setattr(module, name, spy)
    api.evaluate(saved, seq_len=64, windows=1, trust_remote_code=trusted)
    assert sorted(seen) == [("read", trusted), ("read_config", trusted), ("read_tokenizer", trusted)]
