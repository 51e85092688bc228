"""Bugs that other implementations have had, which ours must not have: zero points, few tokens, wrong norms, damping."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from quantforge import pipeline, recipe
from quantforge import plan as planning
from quantforge.corrections.lorc import LoRC
from quantforge.models import tiny
from quantforge.solvers.gptq import GPTQ
from quantforge.solvers.rtn import RTN

INPUTS = ("white", "correlated", "ar", "heavy", "deficient")
GEMMAS = ("gemma2", "gemma3_text", "gemma3")
SCALED_BY_A_NORM = ("q_proj", "k_proj", "gate_proj")  # and by nothing else, when AWQ has rescaled a llama


def tokens(windows: int, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 120, (windows, length), generator=torch.Generator().manual_seed(seed))


def make(kind: str, seed: int = 0) -> nn.Module:
    """Return a tiny random model; gemma3 is the one that also sees pictures."""
    if kind != "gemma3":
        return tiny.make(kind, seed)
    text = tiny.make("gemma3_text", seed)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    special = {"image_token_index": 127, "boi_token_index": 126, "eoi_token_index": 125}
    config = Gemma3Config(text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    return model.eval()


def quantized(model: nn.Module, method: str, ids: Tensor, **settings: object) -> list[pipeline.Layer]:
    plan = planning.make(model, recipe.load(method, bits=3, group_size=32, settings=settings), torch.float32)
    return pipeline.quantize(model, plan, ids)


def uneven(model: nn.Module) -> nn.Module:
    """Let the norms before each part of a block of Gemma differ between channels, so that there is much to rescale."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("input_layernorm.weight", "pre_feedforward_layernorm.weight")):
                p.copy_(torch.randn(p.shape, generator=rng).exp() - 1)
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.double()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", ["g16", "channel"])
def test_gptq_with_zero_points_is_not_worse_than_without_on_the_average(problem, bits, block):
    """The first file format of GPTQ kept zero points less one, which wrapped around at zero."""
    ratios = []
    for seed in range(50):
        found = []
        for kind in ("asym", "sym"):
            p = problem(f"int{bits}-{block}-{kind}", 8, 48, seed, INPUTS[seed % len(INPUTS)])
            found.append(p.loss(GPTQ().solve(p).dequantize()))
        ratios.append(found[0] / found[1])
    assert fmean(ratios) < 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_where_all_weights_of_a_row_have_one_sign_zero_points_gain_more(problem, bits):
    ratios = []
    for seed in range(50):
        found = []
        for kind in ("asym", "sym"):
            p = problem(f"int{bits}-g16-{kind}", 8, 48, seed, INPUTS[seed % len(INPUTS)], "one-sign")
            found.append(p.loss(GPTQ().solve(p).dequantize()))
        ratios.append(found[0] / found[1])
    assert fmean(ratios) < 0.6


def weight_error(model: nn.Module, layers: list[str]) -> float:
    """Return Σ (W − Ŵ)² over `layers`, without the scales that the norm before them took; in float it is 1."""
    original, total = make("llama"), 0.0
    for name in layers:
        block, _, part = name.rpartition(".")
        norm = "input_layernorm" if part in ("q_proj", "k_proj") else "post_attention_layernorm"
        found = model.get_submodule(name).weight.double()
        if part in SCALED_BY_A_NORM:
            found = found * model.get_submodule(f"{block.rpartition('.')[0]}.{norm}").weight
        error = original.get_submodule(name).weight.double() - found
        total += float(error.detach().square().sum())
    return total


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq", "gptaq", "spqr", "gptq+lorc"])
def test_a_calibration_of_eight_tokens_loses_no_more_than_twice_what_rounding_does(method):
    """AutoAWQ's grid had steps of zero below 512 tokens; GPTQ's Hessian has rank 8 here, of 64 and 96 columns."""
    plain, model, few, unseen = make("llama"), make("llama"), tokens(1, 8), tokens(8, seed=1)
    quantized(plain, "rtn", few)
    names = [row.name for row in quantized(model, method, few)]
    assert all(p.isfinite().all() for p in model.parameters())
    if "awq" in method:  # of the others, scales are in rows that are rounded
        names = [name for name in names if name.rpartition(".")[2] in SCALED_BY_A_NORM]
    assert 0 < weight_error(model, names) <= 2 * weight_error(plain, names)
    expected = logits(make("llama"), unseen)
    far, near = (float((logits(m, unseen) - expected).square().mean()) for m in (model, plain))
    assert 0 < far <= 2 * near


@pytest.mark.parametrize("kind", GEMMAS)
def test_awq_is_not_worse_than_rounding_with_the_same_range_rule_on_gemma(kind):
    """Its norms come before and after each part of a block, and the scales must go to the one before."""
    error = {"awq": [], "rtn": []}
    for seed in range(3):
        ids = tokens(16, seed=seed)
        expected = logits(uneven(make(kind, seed)), ids)
        for method, settings in (("awq", {}), ("rtn", {"solver.range": "hessian"})):
            model = uneven(make(kind, seed))
            assert len(quantized(model, method, ids, **settings)) == 14
            error[method].append(float((logits(model, ids) - expected).square().mean()))
    assert all(a != b for a, b in zip(*error.values(), strict=True))
    assert fmean(error["awq"]) <= fmean(error["rtn"])


def test_gemma_that_sees_pictures_is_quantized_as_the_one_that_does_not():
    ids = tokens(8)
    (text, by_text), (both, by_both) = ((m, quantized(m, "awq", ids)) for m in (make("gemma3_text"), make("gemma3")))
    assert torch.equal(logits(both, ids), logits(text, ids))
    for a, b in zip(by_text, by_both, strict=True):
        assert b.name == a.name.replace("model.", "model.language_model.", 1)
        assert torch.equal(a.weight.base.codes, b.weight.base.codes), a.name


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_whitened_correction_never_loses_to_a_plain_one_at_the_usual_damping(problem, bits, rank):
    for seed in range(60):
        p = problem("int3-g16-asym", 16, 48, seed, INPUTS[seed % len(INPUTS)])
        solved = RTN().solve(p)
        white, plain = (p.loss(LoRC(rank, whiten, bits).correct(p, solved).dequantize()) for whiten in (True, False))
        assert white <= plain * (1 + 1e-6), (seed, white / plain)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_nor_does_it_by_the_damped_loss_that_it_lowers(problem, rank):
    for seed in range(60):
        p = problem("int3-g16-asym", 16, 48, seed, INPUTS[seed % len(INPUTS)])
        damp = LoRC().damp * p.hessian.diagonal().mean() * torch.eye(48)
        damped, solved = replace(p, hessian=p.hessian + damp), RTN().solve(p)
        white, plain = (damped.loss(LoRC(rank, whiten, 16).correct(p, solved).dequantize()) for whiten in (True, False))
        assert white <= plain * (1 + 1e-6), (seed, white / plain)
