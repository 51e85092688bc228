"""Numerical failure is data: what is not finite is named, every fallback is told, and strict makes it an error."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import Tensor, nn

import quantforge
from quantforge import pipeline
from quantforge.calibrate.stats import Statistics
from quantforge.errors import ModelError, PlanError, QuantForgeError
from quantforge.models import arch, check, tiny
from quantforge.numerics.qtensor import QTensor
from quantforge.solving import Layer

LENGTH = 24
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"
SPOILT = 7  # the token whose embedding is made infinite
NEEDS = frozenset({"hessian", "magnitude", "extremes", "samples", "drift"})
METHODS = {
    "rtn": {"group_size": 32},
    "symmetric": {"group_size": 32, "symmetric": True},
    "gptq": {"group_size": 32},
    "gptaq": {"group_size": 32},
    "awq": {"group_size": 32},
    "hqq": {"group_size": 32},
    "spqr": {"group_size": 32},
    "lwc": {"group_size": 32},
    "nf4": {},
    "mxfp4": {"weights": "mxfp4"},
    "nvfp4": {"weights": "nvfp4"},
    "e4m3": {"weights": "e4m3-channel"},
    "gguf": {"format": "gguf"},
    "smoothquant": {},
    "llm-int8": {},
}
NAMED = dict.fromkeys(("symmetric", "mxfp4", "nvfp4", "e4m3", "gguf"), "rtn")


def tokens(windows: int = 8, seed: int = 0) -> Tensor:
    """Return windows of random tokens, among which the spoilt one is not."""
    return torch.randint(8, 128, (windows, LENGTH), generator=torch.Generator().manual_seed(seed))


def spoilt(ids: Tensor, value: float = torch.inf, kind: str = "llama") -> tuple[nn.Module, Tensor]:
    """Return a tiny model whose embedding of one token overflows, and `ids` with it at the end of window 5."""
    model = small(kind)

    def overflow(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out.masked_fill((args[0] == SPOILT)[..., None], value)

    model.get_input_embeddings().register_forward_hook(overflow)
    ids = ids.clone()
    ids[5, -1] = SPOILT
    return model, ids


def small(kind: str = "llama", **changes) -> nn.Module:
    """Return a tiny model of one block."""
    return tiny.make(kind, num_hidden_layers=1, **changes)


def weight_of(model: nn.Module, name: str = UP) -> Tensor:
    return arch.get_weight(model.get_submodule(name))


def floats_of(base: QTensor) -> list[Tensor]:
    """Return every float that is stored beside the codes."""
    found = []
    for part in (base.scale, base.zero, base.offset):
        found += floats_of(part) if isinstance(part, QTensor) else [] if part is None else [part.float()]
    return found


def run(method: str, model: nn.Module, **changes) -> quantforge.Result:
    """Quantize by one of METHODS."""
    options = {"calibration": tokens(4), **METHODS[method], **changes}
    return quantforge.quantize(model, NAMED.get(method, method), **options)


# Weights


@pytest.mark.parametrize(("value", "counts"), [(torch.nan, "3 NaN and 0 Inf"), (-torch.inf, "0 NaN and 3 Inf")])
def test_weights_that_are_not_finite_are_refused_with_the_tensor_and_how_many(value, counts, tmp_path):
    """Row 20."""
    model = small()
    model.get_submodule(DOWN).weight.data[1, :3] = value
    with pytest.raises(ModelError, match=f"QF-345.*1 tensor is .*{DOWN}.weight' has {counts} of 6,144") as caught:
        quantforge.quantize(model, group_size=32, calibration=tokens(), out=tmp_path / "out")
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path) == []


def test_a_sum_that_overflows_is_no_infinity_and_what_is_yet_to_be_read_is_left_alone():
    check.check_tensors([("large", torch.full((4, 4), 3e38)), ("ids", torch.ones(2, dtype=torch.int64))])
    with torch.device("meta"):
        check.check_finite(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"^error\[QF-345\]: 2 tensors are .*'a' has 1 NaN .* 'c' has 0 NaN and 2 Inf"):
        check.check_tensors(
            {
                "a": torch.tensor([1.0, torch.nan]),
                "b": torch.ones(3),
                "c": torch.tensor([torch.inf, -torch.inf, 0], dtype=torch.bfloat16),
            }.items()
        )


@pytest.fixture(scope="module", params=METHODS)
def odd(request) -> tuple[str, nn.Module, dict[str, Layer]]:
    """Return a method, a model of odd weights after it, and its rows by the last part of their names."""
    model = small()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.q_proj.weight.data.zero_()
    attention.k_proj.weight.data.fill_(0.37)
    attention.v_proj.weight.data[:, 1:] = 1e-42
    mlp.gate_proj.weight.data[:, :32] = 0
    result = run(request.param, model)
    return request.param, model, {row.name.rpartition(".")[2]: row for row in result.layers}


def test_every_float_that_is_stored_is_finite(odd):
    _, model, rows = odd
    assert all(part.isfinite().all() for row in rows.values() for part in floats_of(row.weight.base))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_layer_of_zeros_comes_back_as_zeros_and_has_lost_nothing(odd):
    """Row 21: nothing is divided by nothing."""
    method, model, rows = odd
    assert not weight_of(model, QUERY).any()
    assert method not in ("rtn", "symmetric", "gptq") or (rows["q_proj"].weight.base.scale == 1).all()
    assert (rows["q_proj"].loss, rows["q_proj"].relative_loss) == (0, 0)


def test_a_group_of_zeros_comes_back_as_zeros(odd):
    """Row 21; where errors are made up for by later columns, those may be among them."""
    method, model, _ = odd
    changed = weight_of(model, "model.layers.0.mlp.gate_proj")[:, :32].abs().max()
    assert changed < (0.2 if method in ("gptq", "gptaq", "spqr") else 1e-9)


def test_a_layer_of_one_value_errs_by_less_than_a_step(odd):
    """Row 21."""
    method, model, rows = odd
    if method != "smoothquant":  # which scales it by what its inputs are
        mean = float(weight_of(model, "model.layers.0.self_attn.k_proj").mean())
        assert mean == pytest.approx(0.37, rel=0.1)
    assert 0 <= rows["k_proj"].relative_loss < 0.02


def test_subnormal_weights_beside_others_become_nothing_and_spoil_none(odd):
    """Row 23."""
    _, _, rows = odd
    assert 0 <= rows["v_proj"].relative_loss < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_a_huge_weight_leaves_no_infinity_and_a_layer_that_it_spoils_is_told(method):
    """Row 23."""
    value = 1e30
    model = small()
    model.get_submodule(UP).weight.data[3, 5] = value
    result = run(method, model)
    row = next(row for row in result.layers if row.name == UP)
    assert all(part.isfinite().all() for part in floats_of(row.weight.base))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    told = [line for line in result.fallbacks() if line.startswith(UP)]
    kept = abs(float(weight_of(model)[3, 5]) / value - 1) < 0.5
    assert kept or told or method in ("awq", "smoothquant")  # which shrink the channel and widen the one before


def test_scales_beyond_float16_are_told_with_their_number():
    """Row 23."""
    model = small()
    model.get_submodule(UP).weight.data[3:5, 5] = 1e7
    result = quantforge.quantize(model, "rtn", format="gguf")
    line = f"{UP}: 2 of its scales were beyond the largest of their dtype, and were cut"
    assert result.fallbacks() == [line]
    assert next(row for row in result.record()["layers"] if row["name"] == UP)["clipped_scales"] == 2


@pytest.mark.parametrize("weights", ["mxfp4", "nvfp4"])
def test_weights_that_a_format_would_make_infinite_are_refused(weights, tmp_path):
    """Row 23: no infinite scale on disk."""
    model = small()
    model.get_submodule(UP).weight.data[3, 5] = 3e38
    with pytest.raises(ModelError, match=rf"QF-399.*{UP}.* up to 3e\+38.*leave the layer out"):
        quantforge.quantize(model, "rtn", weights=weights, out=tmp_path / "out")
    assert os.listdir(tmp_path) == []


# Activations


@pytest.mark.parametrize("size", [LENGTH, 3 * LENGTH, 2048])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_input_that_is_not_finite_is_named_by_layer_and_window_whatever_the_batches(size, value, monkeypatch):
    """Row 41."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", size)
    model, ids = spoilt(tokens(), value)
    result = quantforge.quantize(model, group_size=32, calibration=ids)
    first = result.fallbacks()[0]
    assert first == (
        f"{QUERY}: the input of 1 of 192 tokens was NaN or infinite, first in window 5: they were left out"
    )
    assert len(result.fallbacks()) == len(result.layers)
    assert all("first in window 5" in line and line in result.summary() for line in result.fallbacks())
    row = result.record()["layers"][0]
    assert (row["tokens"], row["skipped_tokens"], row["first_skipped"]) == (191, 1, "window 5")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_the_window_is_named_in_layers_that_see_no_windows_too(kind, monkeypatch):
    """OPT's MLP takes all tokens of a batch as one list."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 2 * LENGTH)
    model, ids = spoilt(tokens(), kind=kind)
    result = quantforge.quantize(model, group_size=32, calibration=ids)
    assert {row.weight.notes["first_skipped"] for row in result.layers} == {"window 5"}


def test_of_an_expert_the_windows_of_the_batch_are_named(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 2 * LENGTH)
    model, ids = spoilt(tokens(40), kind="mixtral")
    result = quantforge.quantize(model, group_size=32, calibration=ids)
    notes = [row.weight.notes for row in result.layers if ".experts." in row.name]
    places = {n["first_skipped"] for n in notes if "first_skipped" in n}
    assert places <= {"window 5", "windows 4 to 5"}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "smoothquant", "llm-int8", "lwc", "spqr"])
def test_tokens_that_are_left_out_leave_what_the_others_say(method):
    """A window whose inputs are nowhere finite changes nothing: what is found is found from the other windows."""
    ids = tokens(9)
    model, bad = small(), torch.cat([ids[:5], torch.full((1, LENGTH), SPOILT), ids[5:]])
    overflowing, _ = spoilt(bad)
    many = {"group_size": 32} if method not in ("smoothquant", "llm-int8") else {}
    clean = quantforge.quantize(model, method, calibration=ids, **many)
    found = quantforge.quantize(overflowing, method, calibration=bad, **many)
    assert all(parameter.isfinite().all() for parameter in overflowing.parameters())
    if method in ("gptq", "rtn", "spqr"):  # those that hold batches out, or train on them, take other ones
        for a, b in zip(clean.layers, found.layers, strict=True):
            assert torch.equal(a.weight.base.codes, b.weight.base.codes)


def test_every_statistic_is_that_of_the_finite_tokens_alone():
    generator = torch.Generator().manual_seed(0)
    x, float_x = (torch.randn(3, 5, 8, generator=generator) for _ in range(2))
    for window, token, value in ((0, 2, torch.nan), (2, 0, torch.inf), (2, 4, -torch.inf)):
        x[window, token, 3] = value
    usable = x.isfinite().all(-1)
    found, wanted = Statistics(NEEDS, 8, held=frozenset({0})), Statistics(NEEDS, 8, held=frozenset({0}))
    found.add(0, x, float_x, lambda token: f"window {token // 5}")
    wanted.add(0, x[usable], float_x[usable])
    assert (found.tokens, found.skipped, found.first) == (12, 3, "window 0")
    assert found.facts() == {"skipped_tokens": 3, "first_skipped": "window 0"}
    assert wanted.facts() == {}
    a, b = found.fields(), wanted.fields()
    assert a.keys() == b.keys() == {"hessian", "magnitude", "extremes", "samples", "drift"}
    for key in ("hessian", "magnitude", "samples"):
        assert torch.equal(a[key], b[key])
        assert a[key].isfinite().all()
    assert all(map(torch.equal, a["extremes"], b["extremes"]))
    assert torch.equal(a["drift"].cross, b["drift"].cross)
    assert torch.equal(a["drift"].held_hessian, b["drift"].held_hessian)


def test_a_batch_without_a_place_is_named_by_its_number():
    found = Statistics(frozenset({"extremes"}), 4)
    found.add(0, torch.ones(2, 3, 4))
    found.add(1, torch.full((2, 3, 4), torch.nan))
    found.add(2, torch.full((2, 3, 4), torch.nan))
    assert (found.tokens, found.skipped, found.first) == (6, 12, "batch 1")
    assert torch.equal(found.extremes.high, torch.ones(4))


def test_where_no_token_is_finite_the_layer_is_rounded_and_that_is_told():
    model = tiny.make("llama")
    model.model.layers[1].input_layernorm.weight.data.fill_(3e38)  # finite itself, its outputs are not
    result = quantforge.quantize(model, group_size=32, calibration=tokens(4))
    query = "model.layers.1.self_attn.q_proj"
    assert result.fallbacks()[0] == (
        f"{query} saw no calibration token with a finite input: all 96 were NaN or infinite, first in window 0, "
        "and was rounded"
    )


# Layers that get no inputs, or the same


@pytest.mark.parametrize("method", ["gptq", "gptaq", "spqr"])
def test_a_column_whose_input_is_always_zero_keeps_its_rounded_value_and_is_counted(method):
    """Row 22."""
    model, rounded = small(), small()
    model.model.layers[0].post_attention_layernorm.weight.data[7] = 0
    before = weight_of(model)[:, 7].clone()
    options = {"group_size": 32, "settings": {"solver.range": "minmax"}}
    result = quantforge.quantize(model, method, calibration=tokens(), **options)
    row = next(row for row in result.layers if row.name == UP)
    assert row.weight.notes["dead_columns"] == 1
    assert result.fallbacks() == []
    assert ((weight_of(model)[:, 7] - before).abs() < 0.2).all()
    if method == "gptq":
        quantforge.quantize(rounded, "rtn", group_size=32)
        assert torch.equal(weight_of(model)[:, 7], weight_of(rounded)[:, 7])


def test_a_layer_whose_inputs_are_all_zero_is_rounded_and_told():
    model = small()
    model.get_submodule(UP).weight.data.zero_()
    result = quantforge.quantize(model, group_size=32, calibration=tokens())
    assert result.fallbacks() == [f"{DOWN}: all its inputs were zero, so only rounding was left"]


def test_one_layer_in_two_places_is_refused_with_both_names():
    """Row 30."""
    model = tiny.make("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(PlanError, match=r"QF-252.*layers\.1\..* and .*layers\.0\..* share one weight"):
        quantforge.quantize(model, group_size=32, calibration=tokens())


def test_a_layer_that_a_forward_calls_twice_is_solved_once_and_used_twice():
    """Row 30: by the inputs of its first call, for those of the second come through what it was rounded to."""
    model = small()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(mlp.up_proj(x)[..., :64]))
    result = quantforge.quantize(model, group_size=32, calibration=tokens())
    assert [row.tokens for row in result.layers] == [192] * 7
    assert all(row.relative_loss < 0.1 for row in result.layers)


@pytest.mark.parametrize("how", ["skipped", "after the next"])
def test_batches_that_leave_a_layer_out_or_call_it_in_another_order(how, monkeypatch):
    """Row 31."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 2 * LENGTH)
    model = tiny.make("llama")
    mlp = model.model.layers[0].mlp
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) % 2:
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        if how == "skipped":
            return x
        first = mlp.down_proj(torch.cat([x, x[..., :32]], -1))
        return mlp.up_proj(first)[..., :64]

    mlp.forward = forward
    result = quantforge.quantize(model, group_size=32, calibration=tokens())
    seen = {row.name: row.tokens for row in result.layers}
    assert seen[UP] == 96
    assert seen[DOWN] == (96 if how == "skipped" else 192)
    assert seen["model.layers.1.mlp.up_proj"] == 192
    assert f"layers were not called for every calibration token, {UP.replace('up', 'gate')} for 96 of 192" in (
        result.summary()
    )


# Hessians


def test_fewer_tokens_than_inputs_are_told_with_their_ratio():
    """Row 39: the damping that makes up for them is in the record."""
    result = quantforge.quantize(small(), group_size=32, calibration=tokens(2))
    line = (
        "7 of 7 layers saw fewer calibration tokens than they have inputs, model.layers.0.mlp.down_proj 0.5 an "
        "input: more samples would tell more of them"
    )
    assert f"note: {line}" in result.summary()
    assert line in result.record()["notes"]
    assert all(row["damp"] == 0.15 for row in result.record()["layers"])
    assert result.fallbacks() == []
    assert "calibration tokens than" not in quantforge.quantize(small(), group_size=32, calibration=tokens(4)).summary()


@pytest.fixture
def failing(monkeypatch):
    """Let the first `count` factorizations fail."""

    def fail(count: int) -> None:
        real, calls = torch.linalg.cholesky_ex, []

        def factored(h: Tensor, out: tuple[Tensor, Tensor]):
            calls.append(1)
            real(h, out=out)
            if len(calls) <= count:
                out[1].fill_(1)
            return out

        monkeypatch.setattr(torch.linalg, "cholesky_ex", factored)

    return fail


@pytest.mark.parametrize(
    ("count", "rung", "told"),
    [
        (1, "float64", None),
        (3, "float64", "damping was raised to 0.44999999999999996"),
        (2, "float32", "damping was raised to 0.44999999999999996"),
        (4, "diagonal", "its Hessian could not be factored, and only its diagonal was used"),
    ],
)
def test_each_rung_of_the_ladder_is_in_the_record_and_what_differs_from_what_was_asked_is_told(
    count, rung, told, failing
):
    """Row 40."""
    failing(count)
    result = quantforge.quantize(small(), group_size=32, calibration=tokens())
    names = [row.name for row in result.layers[:3]]  # solved as one
    assert [row["rung"] for row in result.record()["layers"]] == [rung] * 3 + ["float32"] * 4
    assert result.fallbacks() == ([f"{name}: {told}" for name in names] if told else [])
    assert result.record()["fallbacks"] == result.fallbacks()
    assert all(f"note: {line}" in result.summary() for line in result.fallbacks())


# Strict


def test_strict_names_the_first_fallback_and_their_number_and_saves_nothing(tmp_path, failing):
    failing(4)
    with pytest.raises(QuantForgeError) as caught:
        quantforge.quantize(
            small(dtype=torch.bfloat16),
            group_size=32,
            calibration=tokens(),
            out=tmp_path / "out",
            strict=True,
        )
    assert str(caught.value) == (
        f"error[QF-570]: strict: 3 fallbacks, the first: {QUERY}: its Hessian could not be factored, and only its "
        "diagonal was used; nothing was saved, without strict they are notes."
    )
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_strict_leaves_an_older_checkpoint_as_it_is(tmp_path, failing):
    model = small(dtype=torch.bfloat16)
    quantforge.quantize(model, "rtn", group_size=32, out=tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    failing(1000)
    with pytest.raises(QuantForgeError, match="QF-570"):
        quantforge.quantize(
            small(dtype=torch.bfloat16),
            group_size=32,
            calibration=tokens(),
            out=tmp_path / "out",
            overwrite=True,
            strict=True,
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_run_without_fallbacks_is_saved_under_strict_and_its_record_has_none(tmp_path):
    model = small(dtype=torch.bfloat16)
    quantforge.quantize(model, group_size=32, calibration=tokens(), out=tmp_path / "out", strict=True)
    assert json.loads((tmp_path / "out" / "quantforge.json").read_text())["fallbacks"] == []


@pytest.mark.parametrize("method", ["llm-int8", "spare"])
def test_what_a_method_keeps_in_float_by_design_is_no_fallback(method):
    options = {"settings": {"inputs.threshold": 0.5}} if method == "llm-int8" else {}
    result = quantforge.quantize(small(), method, calibration=tokens(), strict=True, **options)
    assert ("stay in float, as the method has it" in result.summary()) == (method == "llm-int8")


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_tokens_that_the_search_for_scales_left_out_are_named_where_no_layer_is_solved_by_them(method):
    """AWQ and SmoothQuant over plain rounding look at tokens only while scales are searched."""
    model, ids = spoilt(tokens())
    result = quantforge.quantize(model, method, calibration=ids)
    told = [line for line in result.fallbacks() if "NaN or infinite, first in window 5" in line]
    assert {line.partition(":")[0] for line in told} >= {QUERY, UP}


@pytest.mark.parametrize(("method", "settings"), [("lwc", {}), ("zeroquant", {"tuner.steps": 8, "tuner.windows": 1})])
def test_a_window_that_is_not_finite_does_not_switch_training_off(method, settings, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH)
    many = {"bits": 2, "group_size": 32} if method == "lwc" else {}
    found = {}
    for on in (True, False):
        model, ids = spoilt(tokens(16))
        options = {**settings, **({} if on else {"tuner.rate": 1e-12})}
        found[on] = quantforge.quantize(model, method, calibration=ids, settings=options, **many)
    changed = [
        not torch.equal(a.weight.base.dequantize(), b.weight.base.dequantize())
        for a, b in zip(found[True].layers, found[False].layers, strict=True)
    ]
    assert sum(changed) > len(changed) / 2
