"""Damaged checkpoints that could give a traceback, or wrong numbers without a word: one line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantforge
from quantforge.errors import ModelError
from quantforge.models import tiny

LAYER, NORM = "model.layers.1.mlp.gate_proj", "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Return an int-quantized checkpoint whose embedding has the shape of a layer."""
    folder = tmp_path_factory.mktemp("damaged") / "good"
    model = tiny.make("llama", dtype=torch.bfloat16, vocab_size=96)
    quantforge.quantize(model, "rtn", bits=8, group_size=-1, symmetric=True, inputs="int8-token", out=folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_group(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, number: int, dtype: torch.dtype | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        quantforge.load(folder, dtype, packed=False)
    assert caught.value.number == number
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("changes", [{"targets": ["re:("]}, {"format": ["int-quantized"]}])
def test_a_config_that_makes_a_reader_stumble_is_refused(folder, changes):
    change_group(folder, **changes)
    assert "its layers cannot be read" in refused(folder, 357)


def test_a_layer_in_two_layouts_is_refused(folder, change_tensors):
    # words come before bytes in the file, and are read first
    change_tensors(folder, lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(96, 16, dtype=torch.int32)}))
    assert LAYER in refused(folder, 357)


def test_a_layer_with_rounded_inputs_that_is_none_of_the_model_is_refused(folder, change_tensors):
    def swap(tensors: dict[str, Tensor]) -> None:
        floats = tensors.pop(f"{EMBEDDING}.weight")
        for part in ("weight", "weight_scale"):
            tensors[f"{EMBEDDING}.{part}"] = tensors.pop(f"{LAYER}.{part}")
        tensors[f"{LAYER}.weight"] = floats

    change_tensors(folder, swap)
    assert f"{EMBEDDING} is no linear layer" in refused(folder, 359)


def test_codes_without_their_scales_are_not_taken_for_weights(folder, change_tensors):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[NORM] = tensors[NORM].to(torch.uint8)

    change_tensors(folder, spoil)
    assert f"{NORM} is torch.uint8" in refused(folder, 358)


def test_parameters_that_are_no_numbers_are_named(folder, change_tensors):
    change_tensors(folder, lambda t: t[NORM].__setitem__(slice(2), torch.nan))
    assert f"'{NORM}' has 2 NaN" in refused(folder, 345)


def test_numbers_that_float16_cannot_hold_are_named_with_the_dtype_that_can(folder, change_tensors):
    change_tensors(folder, lambda t: t[NORM].__setitem__(slice(3), 1e6))
    quantforge.load(folder, packed=False)
    message = refused(folder, 345, torch.float16)
    assert f"'{NORM}' has 0 NaN and 3 Inf" in message
    assert message.endswith("torch.bfloat16 may work.")
