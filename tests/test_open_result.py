"""A checkpoint on disk is the result again that it was saved from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import quantforge
from quantforge import checkpoint
from quantforge.errors import ModelError
from quantforge.models import activations, tiny
from quantforge.store import MARK

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(3, 128, (12, 24), generator=torch.Generator().manual_seed(1))
METHODS = {
    "rtn": {"weights": "int4-g32-asym"},
    "gptq": {"weights": "int3-g32-sym"},
    "awq+gptq": {"weights": "int4-g32-asym"},
    "smoothquant": {},
    "llm-int8": {},
    "llm-int8 dynamic": {"method": "llm-int8", "settings": {"inputs.dynamic": True, "inputs.threshold": 2}},
    "nf4": {},
    "nf4+lorc": {},
    "lorc": {"weights": "int4-g32-asym"},
    "spqr": {},
    "spare": {},
    "quantile": {},
    "hqq": {},
    "lwc": {"weights": "int4-g32-asym", "settings": {"tuner.epochs": 1}},
    "static": {"method": "rtn", "weights": "int8-channel-sym", "inputs": "int8-tensor-static"},
    "mxfp4": {"method": "rtn", "weights": "mxfp4"},
    "mixed": {
        "method": "gptq",
        "weights": "int4-g32-asym",
        "overrides": {"*.down_proj": {"bits": 8}, "*.o_proj": {"skip": True}, "*.k_proj": {"method": "spqr"}},
    },
}


def quantized(folder: Path, name: str = "rtn", kind: str = "llama", **changes):
    asked = {"method": name, "calibration": CALIBRATION, **METHODS[name], **changes}
    method = asked.pop("method")
    one = {} if kind == "gemma2" else {"num_hidden_layers": 1}
    return quantforge.quantize(tiny.make(kind, dtype=torch.bfloat16, **one), method, out=folder, **asked)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def record(folder: Path) -> dict:
    return json.loads((folder / MARK).read_text())


def change_record(folder: Path, change: Callable[[dict], object]) -> None:
    kept = record(folder)
    change(kept)
    (folder / MARK).write_text(json.dumps(kept))


def check_the_same(first: Path, second: Path) -> None:
    for file in sorted(p.relative_to(first) for p in first.rglob("*.safetensors")):
        old, new = load_file(first / file), load_file(second / file)
        assert sorted(old) == sorted(new)
        assert all(old[k].dtype == new[k].dtype and torch.equal(old[k], new[k]) for k in old), file
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_opened_and_saved_is_the_same_checkpoint_with_the_same_record(name, tmp_path):
    quantized(tmp_path / "first", name)
    result = checkpoint.open_result(tmp_path / "first")
    assert torch.equal(logits(result.model), logits(checkpoint.read(tmp_path / "first", torch.float32)))
    result.save(tmp_path / "second")
    check_the_same(tmp_path / "first", tmp_path / "second")
    old, new = record(tmp_path / "first"), record(tmp_path / "second")
    if "lorc" in name:  # factors lie beside the checkpoint in its dtype, and are counted so
        assert new.pop("bits_per_weight") >= old.pop("bits_per_weight")
        assert new.pop("bytes_after") >= old.pop("bytes_after")
        for row in (*old["layers"], *new["layers"]):
            row.pop("bits_per_weight")
        for told in (old, new):
            told["digests"].pop("record")
    assert new == old


@pytest.mark.parametrize("kind", ["qwen2", "opt", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_every_architecture_comes_back(kind, tmp_path):
    quantized(tmp_path / "first", kind=kind, weights="int4-g32-sym")
    checkpoint.open_result(tmp_path / "first").save(tmp_path / "second")
    check_the_same(tmp_path / "first", tmp_path / "second")
    assert record(tmp_path / "first") == record(tmp_path / "second")


def test_the_facts_are_those_of_the_result_that_was_saved(tmp_path):
    saved = replace(quantized(tmp_path / "out", "gptq"), seconds=0.0, peak_memory=None)  # which no checkpoint keeps
    result = checkpoint.open_result(tmp_path / "out")
    assert result.plan.recipe.name == "gptq"
    assert result.plan.recipe.solver == saved.plan.recipe.solver
    assert (result.source, result.calibration, result.seconds) == (saved.source, saved.calibration, saved.seconds)
    assert result.plan.layers == saved.plan.layers
    assert (result.plan.kept, result.plan.stages, result.plan.dtype) == (
        saved.plan.kept,
        saved.plan.stages,
        torch.bfloat16,
    )
    assert [(x.name, x.loss, x.tokens) for x in result.layers] == [(x.name, x.loss, x.tokens) for x in saved.layers]
    assert result.summary() == saved.summary()
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    half = checkpoint.open_result(tmp_path / "out", torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_rounded_inputs_come_back(tmp_path):
    quantized(tmp_path / "out", "static")
    result = checkpoint.open_result(tmp_path / "out")
    for layer in result.layers:
        gate = activations.find(result.model.get_submodule(layer.name))
        assert gate is not None
        assert gate.rounds is layer.weight.inputs


def test_the_tokenizer_comes_back(tmp_path):
    vocab = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    vocab.pre_tokenizer = Whitespace()
    quantized(tmp_path / "out", tokenizer=PreTrainedTokenizerFast(tokenizer_object=vocab, unk_token="<unk>"))
    result = checkpoint.open_result(tmp_path / "out")
    assert result.tokenizer("b a")["input_ids"] == [2, 1]
    result.save(tmp_path / "again")
    assert checkpoint.open_result(tmp_path / "again").tokenizer("b a")["input_ids"] == [2, 1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("opened") / "good"
    quantized(folder, "gptq")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["layers"].pop(),
        lambda r: r["layers"][0].update(name="model.layers.9.self_attn.q_proj"),
        lambda r: r["layers"][0].pop("loss"),
        lambda r: r["layers"][0].update(tokens="many"),
        lambda r: r.update(layers=3),
        lambda r: r.update(solver="Unheard()"),
        lambda r: r.update(solver="GPTQ(unheard=1)"),
        lambda r: r.update(solver="GPTQ(damp_percent='much')"),
        lambda r: r.update(solver="GPTQ(__import__('os').getcwd())"),
        lambda r: r.update(solver="GPTQ(damp_percent=__import__('os').getcwd())"),
        lambda r: r.update(solver="("),
        lambda r: r.update(solver=f"GPTQ(damp_percent={'-' * 100_000}1)"),
        lambda r: r.update(seconds=10**400),
        lambda r: r.update(transforms=["AWQ"]),
        lambda r: r.update(seconds=None),
        lambda r: r.update(calibration=7),
        lambda r: r.pop("source"),
    ],
)
def test_a_record_that_was_changed_is_one_line(saved, tmp_path, change):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change_record(folder, change)
    with pytest.raises(ModelError, match="QF-355") as caught:
        checkpoint.open_result(folder)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_others_is_refused(saved, tmp_path):
    for file in saved.iterdir():
        if file.name != MARK:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="QF-350"):
        checkpoint.open_result(tmp_path)
