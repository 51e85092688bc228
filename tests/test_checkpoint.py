"""Checkpoints read back: the damaged and the foreign ones give one line, not a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantforge
from quantforge import checkpoint
from quantforge.errors import ModelError
from quantforge.models import tiny
from quantforge.runtime.generate import ends_of
from quantforge.store import MARK

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "good"
    quantforge.quantize(tiny.make("llama", dtype=torch.bfloat16), "rtn", group_size=32, out=folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_config(folder: Path, change: Callable[[dict], object], file: str = "config.json") -> None:
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        checkpoint.read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_is_read_in_any_dtype_and_ready_to_evaluate(saved):
    assert checkpoint.is_quantized(saved)
    model = checkpoint.read(saved)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert {p.dtype for p in checkpoint.read(saved, torch.float32).parameters()} == {torch.float32}
    with torch.no_grad():
        assert model(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_what_ends_a_text_and_how_tokens_are_drawn_is_read(folder):
    change_config(folder, lambda c: c.update(eos_token_id=[2, 107], top_p=0.9), "generation_config.json")
    for packed in (True, False):
        model = quantforge.load(folder, packed=packed)
        assert (model.generation_config.eos_token_id, model.generation_config.top_p) == ([2, 107], 0.9)
        assert ends_of(model) >= {2, 107}
    (folder / "generation_config.json").unlink()
    assert checkpoint.read(folder).generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    "text",
    ['{"eos_token_id": 1.5}', '{"eos_token_id": ["a"]}', "[]", "{", '{"compile_config": 7}'],
)
def test_a_damaged_generation_config_is_one_line(folder, text):
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json" in refused(folder)


def test_a_generation_config_outside_the_folder_is_not_opened(folder, tmp_path):
    (tmp_path / "mine.json").write_text('{"eos_token_id": 5}')
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(tmp_path / "mine.json")
    assert "generation_config.json" in refused(folder)


def test_a_hollow_checkpoint_has_all_but_the_weights_of_its_layers(saved):
    whole = checkpoint.read(saved)
    model, layers = checkpoint.read_hollow(saved)
    assert len(layers) == 14
    for name, parameter in whole.named_parameters():
        found = model.get_parameter(name)
        layer = name.removesuffix(".weight")
        assert (found.shape, found.dtype) == (parameter.shape, parameter.dtype)
        if layer in layers:
            assert found.untyped_storage().nbytes() <= 8, "a weight that was made for nothing"
            assert torch.equal(layers[layer].dequantize(parameter.dtype), parameter)
        else:
            assert torch.equal(found, parameter)


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_a_layer_that_lacks_a_part_is_named(folder, part, change_tensors):
    change_tensors(folder, lambda t: t.pop(f"{LAYER}.{part}"))
    assert f"{LAYER} lacks {part}" in refused(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{LAYER}.weight_packed", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_refused(folder, name, change_tensors):
    change_tensors(folder, lambda t: t.pop(name))
    message = refused(folder)
    assert name.removesuffix("_packed") in message or (
        name == "model.embed_tokens.weight" and "lm_head.weight" in message
    )


def test_a_tensor_that_does_not_belong_is_named(folder, change_tensors):
    change_tensors(folder, lambda t: t.update({"model.layers.7.extra": torch.zeros(2)}))
    assert "model.layers.7.extra" in refused(folder)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_part_of_another_shape_is_named(folder, part, change_tensors):
    key = f"{LAYER}.{part}"
    change_tensors(folder, lambda t: t.update({key: t[key][:-1].clone()}))
    assert LAYER in refused(folder)


def test_a_layer_that_is_whole_but_of_another_size_than_the_config_says_is_refused(folder, change_tensors):
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors |= {
            k.replace("up_proj", "down_proj"): v.clone() for k, v in tensors.items() if k.startswith(f"{LAYER}.")
        }

    change_tensors(folder, shrink)
    assert "down_proj" in refused(folder)


def test_another_format_is_refused_by_name(folder):
    change_config(folder, lambda c: c["quantization_config"].update(quant_method="gptq"))
    assert "gptq" in refused(folder)


@pytest.mark.parametrize("value", [None, "int4", [1]])
def test_a_folder_without_a_quantization_config_is_no_quantized_checkpoint(folder, value):
    change_config(folder, lambda c: c.update(quantization_config=value))
    assert "quantization_config" in refused(folder) or "quantized" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(config_groups=[]),
        lambda q: q.update(config_groups={"group_0": None}),
        lambda q: q.update(config_groups={"group_0": {"targets": ["Linear"]}}),
        lambda q: q["config_groups"]["group_0"].update(weights=None),
        lambda q: q["config_groups"]["group_0"]["weights"].pop("symmetric"),
        lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=3),
        lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=64),
    ],
)
def test_a_damaged_quantization_config_is_refused(folder, change):
    change_config(folder, lambda c: change(c["quantization_config"]))
    refused(folder)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_file_that_is_cut_off_is_refused(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    assert "model.safetensors" in refused(folder)


def test_the_record_is_what_was_saved(saved):
    record = checkpoint.read_record(saved)
    assert record["method"] == "rtn"
    assert len(record["layers"]) == 14
    text = checkpoint.table(record)
    assert all(row["name"] in text for row in record["layers"])
    assert "14 layers at 4.625 bits" in text.splitlines()[-1]


def test_a_folder_without_a_record_says_that_quantforge_did_not_write_it_and_loads_all_the_same(folder):
    expected = {name: p.clone() for name, p in checkpoint.read(folder).named_parameters()}
    (folder / MARK).unlink()
    assert checkpoint.is_quantized(folder)
    assert all(torch.equal(p, expected[name]) for name, p in checkpoint.read(folder).named_parameters())
    with pytest.raises(ModelError, match=r"was not written by quantforge"):
        checkpoint.read_record(folder)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 351),
        ("{", 351),
        ("[" * 100_000, 351),
        (b"\xff\xfe", 351),
        ("[]", 351),
        ("{}", 352),
        ('{"schema": 2}', 352),
        ('{"schema": "1"}', 352),
        ("null", 351),
    ],
)
def test_an_edited_record_is_refused(folder, text, number):
    (folder / MARK).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError) as caught:
        checkpoint.read_record(folder)
    assert caught.value.number == number
    assert MARK in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("layers"),
        lambda r: r.update(layers=None),
        lambda r: r["layers"].append({}),
        lambda r: r["layers"][0].update(loss="much"),
        lambda r: r["layers"][0].update(shape=[]),
        lambda r: r.pop("notes"),
        lambda r: r.update(bits_per_weight=None),
    ],
)
def test_a_record_that_lacks_what_the_table_shows_is_refused(folder, change):
    change_config(folder, change, MARK)
    with pytest.raises(ModelError):
        checkpoint.table(checkpoint.read_record(folder))


def test_a_record_that_is_a_folder_is_refused(folder):
    (folder / MARK).unlink()
    (folder / MARK).mkdir()
    with pytest.raises(ModelError):
        checkpoint.read_record(folder)


@pytest.mark.parametrize("name", ["config.json", MARK])
def test_a_pipe_or_a_huge_file_is_never_read(folder, name):
    """Opening a pipe that nobody writes to would never return."""
    if name == "config.json":
        (folder / MARK).unlink()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for _ in ("pipe", "huge"):
        if name == MARK:
            with pytest.raises(ModelError, match=r"QF-351.*(not a regular file|more than)"):
                checkpoint.read_record(folder)
        else:
            assert not checkpoint.is_quantized(folder)
        (folder / name).unlink()
        with (folder / name).open("wb") as file:
            file.write(b'{"quantization_config": {}, "schema": 1}')
            file.truncate(1 << 40)  # a hole, which takes no room


def test_a_record_that_is_a_link_out_of_the_folder_is_not_read(folder, tmp_path):
    shutil.move(folder / MARK, tmp_path / "elsewhere.json")
    (folder / MARK).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ModelError, match=r"QF-351.*leads out"):
        checkpoint.read_record(folder)


def test_null_as_a_quantization_config_is_a_float_model(folder):
    (folder / MARK).unlink()
    change_config(folder, lambda c: c.update(quantization_config=None))
    assert not checkpoint.is_quantized(folder)


def test_a_loss_that_was_not_finite_is_shown_as_such(folder):
    change_config(folder, lambda r: r["layers"][0].update(loss=None, relative_loss=None), MARK)
    assert "nan (nan%)" in checkpoint.table(checkpoint.read_record(folder))


@pytest.fixture(scope="module")
def corrected(tmp_path_factory) -> Path:
    """Return a checkpoint with an adapter beside it."""
    out = tmp_path_factory.mktemp("corrected") / "good"
    model, ids = tiny.make("llama", dtype=torch.bfloat16), torch.arange(3, 99).view(4, 24)
    quantforge.quantize(model, "rtn+lorc", calibration=ids, group_size=32, out=out)
    assert (out / "adapter").is_dir()
    return out


A, B = (f"base_model.model.{LAYER}.lora_{x}.weight" for x in "AB")


def change_factors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})


def rename(tensors: dict[str, Tensor]) -> None:
    for key in (A, B):
        tensors[key.replace("layers.1", "layers.9")] = tensors.pop(key)


def link_out(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    shutil.move(file, folder.parent / "outside.safetensors")
    file.symlink_to(folder.parent / "outside.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: change_factors(f, lambda t: t.update({B: t[B][:-1]})), "356"),
        (lambda f: change_factors(f, lambda t: t.update({B: t[B][:1]})), "356"),
        (lambda f: change_factors(f, lambda t: t.update({A: t[A][:, :1]})), "356"),
        (lambda f: change_factors(f, rename), "356"),
        (lambda f: change_factors(f, lambda t: t.pop(A)), "377"),
        (lambda f: change_factors(f, lambda t: t.pop(B)), "377"),
        (lambda f: change_factors(f, lambda t: t.update({A: t[A][:-1]})), "377"),
        (lambda f: change_factors(f, lambda t: t.update(more=torch.zeros(2))), "377"),
        (lambda f: change_factors(f, lambda t: t.update({A: t[A] * float("nan")})), "377"),
        (lambda f: change_factors(f, lambda t: t.update({A: t[A].int()})), "377"),
        (lambda f: change_factors(f, lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)})), "377"),
        (lambda f: change_config(f, lambda c: c.update(lora_alpha=2 * c["r"]), "adapter/adapter_config.json"), "378"),
        (lambda f: change_config(f, lambda c: c.pop("lora_alpha"), "adapter/adapter_config.json"), "378"),
        (
            lambda f: change_config(f, lambda c: c.update(alpha_pattern={LAYER: 1}), "adapter/adapter_config.json"),
            "378",
        ),
        (lambda f: (f / "adapter" / "adapter_config.json").unlink(), "301"),
        (lambda f: (f / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 50), "307"),
        (link_out, "316"),
    ],
)
def test_a_damaged_adapter_is_refused(corrected, tmp_path, damage, says):
    folder = Path(shutil.copytree(corrected, tmp_path / "copy"))
    checkpoint.read(folder)
    damage(folder)
    assert f"QF-{says}]" in refused(folder)


def test_code_of_the_checkpoints_own_needs_trust(folder, monkeypatch):
    change_config(folder, lambda c: c.update(auto_map={"AutoConfig": "own.Config"}))
    with pytest.raises(ModelError, match=r"--trust-remote-code"):
        checkpoint.read_config(folder)
    seen = []
    monkeypatch.setattr(checkpoint.load, "make_config", lambda *args, **more: seen.append(more) or object())
    checkpoint.read_config(folder, trust_remote_code=True)
    assert seen == [{"trust_remote_code": True}]
