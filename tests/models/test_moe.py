"""Mixtures of experts: taken apart without a change, quantized by each expert's own tokens, read by stock loaders."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import quantforge
from quantforge import api, pipeline, recipe
from quantforge import plan as planning
from quantforge.calibrate.stats import Hessian
from quantforge.errors import PlanError
from quantforge.models import arch, load, moe, tiny
from quantforge.numerics.problem import Problem

KINDS = tiny.mixtures()
WIDTH, INNER = 64, 96


def tokens(windows: int = 16, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens(3) if ids is None else ids).logits


def unfused(kind: str, **changes) -> nn.Module:
    model = tiny.make(kind, **changes)
    moe.unfuse(model)
    return model


def stock(folder: Path, **options) -> nn.Module:
    """Load as anyone would, and add up experts in the order of the plain loop: other orders round differently."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    model.set_experts_implementation("eager")
    return model.eval()


def leaves(kind: str) -> tuple[str, str, str]:
    (gate, up), (down,) = moe.NAMES[kind]
    return gate, up, down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_taken_apart_a_model_computes_the_same_bits(kind, dtype):
    model, twin = tiny.make(kind, dtype=dtype), unfused(kind, dtype=dtype)
    usual = logits(model)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(twin), logits(model))
    close = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert float((logits(twin) - usual).abs().max()) <= close * float(usual.abs().max())
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())
    assert {p.dtype for p in twin.parameters()} == {dtype}
    assert not any(hasattr(layer.mlp.experts, "gate_up_proj") for layer in twin.model.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_the_slice_of_its_own(kind):
    model, twin = tiny.make(kind), unfused(kind)
    fused = model.model.layers[1].mlp.experts
    for e in range(4):
        gate, up, down = (twin.get_submodule(f"model.layers.1.mlp.experts.{e}.{name}").weight for name in leaves(kind))
        assert torch.equal(gate, fused.gate_up_proj[e, :INNER])
        assert torch.equal(up, fused.gate_up_proj[e, INNER:])
        assert torch.equal(down, fused.down_proj[e])
        down.data.zero_()
    assert bool(fused.down_proj.any())  # copies: one model does not write into the other


@pytest.mark.parametrize("kind", KINDS)
def test_taking_apart_twice_or_without_data_or_a_dense_model_changes_nothing(kind):
    state = torch.get_rng_state()
    model = unfused(kind)
    before = [(name, id(p)) for name, p in model.named_parameters()]
    moe.unfuse(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    moe.unfuse(empty)
    shapes = [(name, p.shape, p.is_meta) for name, p in empty.named_parameters()]
    assert shapes == [(name, p.shape, True) for name, p in model.named_parameters()]
    dense = tiny.make("llama")
    names = [name for name, _ in dense.named_modules()]
    moe.unfuse(dense)
    assert [name for name, _ in dense.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_float_checkpoints_have_the_names_and_tensors_of_stock_ones_there_and_back(kind, tmp_path):
    model = tiny.make(kind)
    model.save_pretrained(tmp_path / "stock")
    source = load.find(str(tmp_path / "stock"))
    skeleton, loaded = source.skeleton(), load.model(source)
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in loaded.named_parameters()]
    assert all(p.is_meta for p in skeleton.parameters())
    wanted = load_file(tmp_path / "stock" / "model.safetensors")
    for i, one in enumerate((loaded, unfused(kind))):  # one knows how it was loaded, the other was made
        one.save_pretrained(tmp_path / f"{i}")
        found = load_file(tmp_path / f"{i}" / "model.safetensors")
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    block = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}[kind]
    assert {f"model.layers.0.{block}.experts.3.{name}.weight" for name in leaves(kind)} < set(wanted)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(stock(tmp_path / "0")), logits(model))


def test_blocks_without_experts_keep_their_mlp():
    model = unfused("qwen3_moe", mlp_only_layers=[0])
    stages = [stage.names for stage in arch.find_stages(model)[0]]
    assert stages[2:4] == [
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.down_proj",),
    ]
    assert len(stages) == 4 + 2 + 2 * 4
    result = quantforge.quantize(model, group_size=32, calibration=tokens())
    assert len(result.layers) == 7 + 4 + 3 * 4
    assert moe.routers(model) == ["model.layers.1.mlp.gate"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_router_stays_in_float_and_every_expert_is_quantized(kind):
    model, before = tiny.make(kind), unfused(kind)
    result = quantforge.quantize(model, "rtn", group_size=32)
    assert [row.name for row in result.layers] == list(result.plan.layers)
    assert len(result.layers) == 2 * (4 + 3 * 4)
    done = {row.name for row in result.layers}
    for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(a, b) == (name.removesuffix(".weight") not in done), name
    assert not any(name.endswith("mlp.gate") for name in done)


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_is_solved_by_the_tokens_that_the_router_sends_to_it(kind):
    """With attention in float, the experts of the first block get what those of the float model get."""
    chosen = recipe.load("gptq", bits=3, group_size=32)
    chosen = recipe.replace(chosen, skip=("lm_head", "*.self_attn.*"))
    model, float_model = unfused(kind), unfused(kind)
    plan = planning.make(model, chosen, torch.float32)
    rows = {row.name: row for row in pipeline.quantize(model, plan, tokens())}
    gate = leaves(kind)[0]
    seen: dict[int, Tensor] = {}
    for e in range(4):
        layer = float_model.get_submodule(f"model.layers.0.mlp.experts.{e}.{gate}")
        layer.register_forward_pre_hook(lambda m, args, e=e: seen.__setitem__(e, args[0]))
    logits(float_model, tokens())
    solved = []
    for e in range(4):
        name = f"model.layers.0.mlp.experts.{e}.{gate}"
        hessian = Hessian(WIDTH)
        hessian.add(seen[e])
        weight = arch.get_weight(float_model.get_submodule(name))
        problem = Problem(name, weight, plan.layers[name].format, hessian=hessian.value())
        solved.append(plan.layers[name].solver.solve(problem).base.codes)
        assert (rows[name].weight.base.codes == solved[e]).double().mean() > 0.999
        assert rows[name].tokens == len(seen[e])
    assert sum(len(x) for x in seen.values()) == 16 * 24 * 2
    hessian = Hessian(WIDTH)
    hessian.add(seen[1])
    problem = Problem(
        "", arch.get_weight(float_model.get_submodule(f"model.layers.0.mlp.experts.0.{gate}")), problem.format
    )
    other = plan.layers[name].solver.solve(Problem("", problem.weight, problem.format, hessian=hessian.value()))
    assert (other.base.codes != solved[0]).double().mean() > 0.01  # another expert's tokens would give other codes


def routed_by_token(kind: str) -> nn.Module:
    """Return a model of one block that sends ids below 64 to expert 0, others to expert 1, and none elsewhere."""
    model = unfused(kind, num_hidden_layers=1, num_experts_per_tok=1)
    model.model.embed_tokens.weight.data[:64, 0] = -40
    model.model.embed_tokens.weight.data[64:, 0] = 40
    router = model.model.layers[0].mlp.gate
    router.weight.data.zero_()
    router.weight.data[0, 0], router.weight.data[1, 0] = -10, 10
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_batches_that_skip_an_expert_and_experts_that_no_token_reaches(kind, method, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 24)  # a window a batch
    low, high = tokens(5) % 61 + 3, tokens(4, seed=1) % 64 + 64
    ids = torch.stack([high[0], low[0], high[1], high[2], *low[1:], high[3]])
    model = routed_by_token(kind)
    plan = planning.make(model, recipe.load(method, group_size=32, settings={"solver.range": "minmax"}), torch.float32)
    result = quantforge.quantize(
        model, method, group_size=32, calibration=ids, settings={"solver.range": "minmax"}, symmetric=None
    )
    assert list(plan.layers) == [row.name for row in result.layers]
    tokens_of = {row.name.removeprefix("model.layers.0."): row.tokens for row in result.layers}
    gate, up, down = leaves(kind)
    for e, count in enumerate((5 * 24, 4 * 24, 0, 0)):
        assert [tokens_of[f"mlp.experts.{e}.{name}"] for name in (gate, up, down)] == [count] * 3
    assert tokens_of["self_attn.q_proj"] == 9 * 24
    assert result.fallbacks() == [
        f"model.layers.0.mlp.experts.{e}.{name} saw no calibration token and was rounded"
        for e in (2, 3)
        for name in (gate, up, down)
    ]
    rounded = quantforge.quantize(routed_by_token(kind), "rtn", group_size=32)
    for row, plain in zip(result.layers, rounded.layers, strict=True):
        if row.tokens == 0:
            assert torch.equal(row.weight.base.codes, plain.weight.base.codes)
            assert torch.equal(row.weight.base.scale, plain.weight.base.scale)
        elif method == "gptaq" and ".experts." in row.name:
            assert row.weight.notes["strength"] == 0  # the float model may send an expert other tokens


@pytest.mark.parametrize(("windows", "few"), [((5, 2), True), ((5, 4), False), ((300, 4), False), ((450, 4), True)])
def test_an_expert_that_saw_few_tokens_is_named_with_their_number_and_rounded(windows, few):
    """Expert 1 gets 48 or 96 tokens: fewer than its 64 and 96 inputs, or under 1 % of all, or enough."""
    low, high = tokens(windows[0]) % 61 + 3, tokens(windows[1], seed=1) % 64 + 64
    model = routed_by_token("mixtral")
    skip = {"*.experts.2.*": {"skip": True}, "*.experts.3.*": {"skip": True}, "*.self_attn.[kvo]*": {"skip": True}}
    plain = {"solver.range": "minmax"}
    result = quantforge.quantize(
        model, group_size=32, calibration=torch.cat([low, high]), overrides=skip, settings=plain
    )
    named = [
        f"model.layers.0.mlp.experts.1.{name} saw only {windows[1] * 24} of {sum(windows) * 24:,} calibration tokens "
        "and was rounded"
        for name in ("w1", "w3", "w2")
    ]
    assert result.fallbacks() == (named if few else [])
    assert not few or named[0] in result.summary()
    row = next(row for row in result.layers if row.name == "model.layers.0.mlp.experts.1.w1")
    plain = quantforge.quantize(routed_by_token("mixtral"), "rtn", group_size=32)
    same = next(r for r in plain.layers if r.name == row.name)
    assert torch.equal(row.weight.base.codes, same.weight.base.codes) == few


@pytest.mark.parametrize(("method", "bits"), [("rtn", 3), ("rtn", 4), ("rtn", 8), ("gptq", 4), ("gptq", 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_mixture_is_the_same_bits_in_stock_transformers_and_here(kind, method, bits, tmp_path):
    folder = tmp_path / "q"
    model = tiny.make(kind, dtype=torch.bfloat16)
    result = quantforge.quantize(
        model, method, bits=bits, group_size=32, symmetric=True, calibration=tokens(), out=folder
    )
    ours = logits(result.model)
    assert not torch.equal(ours, logits(unfused(kind, dtype=torch.bfloat16)))
    assert torch.equal(logits(quantforge.load(folder, packed=False)), ours)
    assert torch.equal(logits(stock(folder)), ours)
    assert torch.equal(logits(stock(folder, quantization_config=CompressedTensorsConfig(dequantize=True))), ours)


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_a_set_of_tensors_per_expert_under_the_architectures_own_names(kind, tmp_path):
    quantforge.quantize(tiny.make(kind), "rtn", group_size=32, symmetric=True, out=tmp_path / "q")
    block = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}[kind]
    names = set(load_file(tmp_path / "q" / "model.safetensors"))
    for e in range(4):
        for name in leaves(kind):
            parts = {n.rpartition(".")[2] for n in names if n.startswith(f"model.layers.1.{block}.experts.{e}.{name}.")}
            assert parts == {"weight_packed", "weight_scale", "weight_shape"}
    assert f"model.layers.1.{block}.gate.weight" in names
    ignored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"model.layers.{i}.{block}.gate" for i in (0, 1)} < set(ignored)  # other loaders hold it in an nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_experts_may_have_formats_of_their_own(kind, tmp_path):
    folder = tmp_path / "q"
    model = tiny.make(kind, dtype=torch.bfloat16)
    overrides = {"*.self_attn.*": {"bits": 8, "symmetric": True}}
    options = {"bits": 4, "group_size": 32, "symmetric": True, "overrides": overrides}
    result = quantforge.quantize(model, "rtn", **options, out=folder)
    assert {p.format.grid.bits for p in result.plan.layers.values()} == {4, 8}
    ours = logits(result.model)
    assert torch.equal(logits(quantforge.load(folder, packed=False)), ours)
    assert torch.equal(logits(stock(folder)), ours)
    assert torch.equal(logits(stock(folder, quantization_config=CompressedTensorsConfig(dequantize=True))), ours)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stock_loaders_would_misread_is_refused_before_work(kind, tmp_path):
    def refused(*words: str, **options) -> None:
        model = unfused(kind)
        before = copy.deepcopy(model.state_dict())
        settings = {"method": "rtn", "group_size": 32, "symmetric": True, **options}
        with pytest.raises(PlanError) as caught:
            quantforge.quantize(model, **settings, out=tmp_path / "q")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
        assert list(tmp_path.iterdir()) == []

    first = f"model.layers.0.mlp.experts.0.{leaves(kind)[0]}"
    refused("zero points", first, "--symmetric", symmetric=False)
    refused("one format", first, "experts.2", overrides={"*.experts.2.*": {"bits": 8}})


@pytest.mark.parametrize("kind", KINDS)
def test_experts_left_in_float_which_stock_loaders_lose_are_not_saved(kind, tmp_path):
    down = leaves(kind)[2]
    result = quantforge.quantize(
        tiny.make(kind), "rtn", group_size=32, symmetric=True, overrides={f"*.experts.*.{down}": {"skip": True}}
    )
    with pytest.raises(PlanError, match=rf"experts\.0\.{down} \(with 7 more\)"):
        result.save(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_activation_aware_scales_go_through_experts_and_what_is_saved_is_what_was_computed(kind, tmp_path):
    made = tiny.make(kind, dtype=torch.bfloat16)
    for layer in made.model.layers:
        layer.post_attention_layernorm.weight.data[::8] = 12  # a few channels carry much
    made.save_pretrained(tmp_path / "float")
    source = load.find(str(tmp_path / "float"))
    plain = {"transform.range": "minmax", "solver.range": "minmax"}  # which leaves more to gain
    chosen = recipe.load("awq", bits=4, group_size=32, symmetric=True, settings=plain)
    plan = planning.make(source.skeleton(), chosen, source.dtype)
    model = load.model(source)  # bfloat16 numbers, computed with in float32
    result = api.run(model, plan, tokens(), tokenizer=None, source="tiny", calibration={})
    for layer, old in zip(model.model.layers, made.model.layers, strict=True):
        assert not torch.equal(layer.mlp.gate.weight, old.mlp.gate.weight.float())
    result.save(tmp_path / "q")
    assert torch.equal(logits(quantforge.load(tmp_path / "q", torch.float32, packed=False)), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_beats_rounding_on_what_the_model_computes(kind):
    wanted = logits(unfused(kind), tokens(16, seed=1)).log_softmax(-1)
    loss = {}
    for method in ("rtn", "gptq"):
        model = tiny.make(kind)
        quantforge.quantize(model, method, bits=3, group_size=32, calibration=tokens(96))
        found = logits(model, tokens(16, seed=1)).log_softmax(-1)
        loss[method] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert 0 < loss["gptq"] < loss["rtn"]


def test_layers_of_experts_are_known_by_name():
    assert moe.expert_of("model.layers.3.mlp.experts.12.w1") == "model.layers.3.mlp.experts.12"
    for name in ("model.layers.3.mlp.gate", "model.layers.3.mlp.up_proj", "model.layers.3.mlp.experts"):
        assert moe.expert_of(name) is None
    assert moe.as_in_model("mixtral", {"a.block_sparse_moe.gate.weight": 1, "b.self_attn": 2}) == {
        "a.mlp.gate.weight": 1,
        "b.self_attn": 2,
    }
    assert moe.as_in_model("qwen3_moe", {"a.block_sparse_moe.gate": 1}) == {"a.block_sparse_moe.gate": 1}
    assert moe.as_in_model(None, {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(("method", "dtype"), [("hqq", torch.float32), ("nf4", torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_containers_give_back_what_was_computed_in_the_dtype_of_the_model(kind, method, dtype, tmp_path):
    """Of NF4, float32 scales hold more bytes than all floats of the model, which stays in bfloat16 nonetheless."""
    result = quantforge.quantize(tiny.make(kind, dtype=dtype), method, out=tmp_path / "q")
    loaded = quantforge.load(tmp_path / "q", packed=False)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(logits(loaded), logits(result.model))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_fit_no_expert_are_refused(kind, tmp_path):
    with pytest.raises(PlanError, match=r"no adapter fits experts .* without low-rank factors works"):
        quantforge.quantize(
            tiny.make(kind), "lorc", group_size=32, symmetric=True, calibration=tokens(), out=tmp_path / "q"
        )
    assert list(tmp_path.iterdir()) == []
