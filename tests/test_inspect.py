"""`inspect` shows what stands in the files, how it was made where that is recorded, and what computes with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import quantforge
from quantforge.cli.show import inspect
from quantforge.errors import ModelError, ResourceError
from quantforge.exporters.compressed_tensors import CompressedTensors
from quantforge.models import load as load_model
from quantforge.models import tiny
from quantforge.numerics.formats import parse
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import encode
from quantforge.runtime import load, table
from quantforge.store import MARK


def save(kind: str, out: Path) -> Path:
    quantforge.quantize(tiny.make(kind, dtype=torch.bfloat16), "rtn", weights="int4-g32-sym", out=out)
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save("llama", tmp_path_factory.mktemp("inspect") / "good")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def run(*arguments: object) -> str:
    return CliRunner().invoke(inspect, [str(a) for a in arguments], catch_exceptions=False).stdout


def check_told(folder: Path) -> dict[str, tuple[str, str]]:
    """Compare what `inspect` says with what `load` took, and return that."""
    wanted = load.read(folder).operators
    told = json.loads(run(folder, "--json"))
    assert {n: (o["operator"], o["reason"]) for n, o in told["operators"].items()} == wanted
    text = run(folder)
    assert all(f"computed by {name}: " in text for name, _ in wanted.values())
    assert all(row["name"] in text for row in told["layers"])
    return wanted


def test_each_layer_has_the_operator_that_loading_chooses(saved):
    operators = {name for name, _ in check_told(saved).values()}
    assert operators == ({"int4"} if table.has_int4("cpu") else {table.REFERENCE})


def test_layers_that_are_no_linear_ones_are_told_as_loading_has_them(saved, tmp_path):
    """A GPT-2 of somebody else's, as quantforge writes none: its layers are Conv1D, which hold [in, out]."""
    with load_model.quiet():
        tiny.make("gpt2", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = json.loads((saved / "config.json").read_text())["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.attn.c_attn"
    weight = QWeight(encode(tensors.pop(f"{name}.weight").float(), parse("int4-g32-sym-bf16")), {})
    save_file(tensors | CompressedTensors().tensors(name, weight), tmp_path / "model.safetensors", {"format": "pt"})
    assert check_told(tmp_path) == {name: (table.REFERENCE, "it is a Conv1D, no nn.Linear")}
    assert table.operator_of(weight)[0] != table.REFERENCE or not table.has_int4("cpu")
    assert "computed by reference: 1 layers (it is a Conv1D, no nn.Linear)" in run(tmp_path)


def test_experts_are_layers_of_their_own(tmp_path):
    wanted = check_told(save("mixtral", tmp_path / "mixtral"))
    assert not any("no nn.Linear" in reason for _, reason in wanted.values())
    assert any(".experts.3." in name for name in wanted)


def test_the_device_is_the_one_that_is_asked_for(saved, monkeypatch):
    asked = []

    def operator_of(weight, device, dtype):
        asked.append((device, dtype))
        return "int4", "as asked"

    monkeypatch.setattr(table, "operator_of", operator_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run(saved)
    assert set(asked) == {("cpu", torch.bfloat16)}
    run(saved, "--device", "cuda")
    assert set(asked[14:]) == {("cuda", torch.bfloat16)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="QF-502"):
        run(saved, "--device", "cuda")


def test_without_a_record_the_files_are_shown(folder):
    (folder / MARK).unlink()
    told = json.loads(run(folder, "--json"))
    assert {row["format"] for row in told["layers"]} == {"int4-g32-sym-bf16"}
    assert len(told["operators"]) == 14
    text = run(folder)
    assert "how they were made is not recorded" in text
    assert "int4-g32-sym-bf16" in text


def test_damaged_files_are_noted_beside_the_record_and_refused_without_one(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "note: its files were not read: " in run(folder)
    (folder / MARK).unlink()
    with pytest.raises(ModelError, match="up_proj lacks weight_scale"):
        run(folder)


@pytest.mark.parametrize("key", ["bytes_before", "bits_per_weight", "loss"])
def test_numbers_of_a_record_that_no_machine_holds_are_refused(folder, key):
    record = json.loads((folder / MARK).read_text())
    (record["layers"][0] if key == "loss" else record)[key] = 10**400
    (folder / MARK).write_text(json.dumps(record))
    with pytest.raises(ModelError, match="QF-355"):
        run(folder)
