"""The result: what `save` leaves on disk, and what the record and the summary say."""

from __future__ import annotations

import json
import os
import string
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import quantforge
from quantforge import result as results
from quantforge.errors import PlanError, ResourceError
from quantforge.models import tiny
from quantforge.result import Result
from quantforge.store import MARK


def tokens(windows: int = 2) -> Tensor:
    return torch.randint(3, 128, (windows, 24), generator=torch.Generator().manual_seed(0))


def letters() -> PreTrainedTokenizerFast:
    """Return a tokenizer of printable characters."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *string.printable])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def quantized(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, tokenizer: object = None, **changes) -> Result:
    """Return a tiny model of architecture `kind`, rounded to 4 bits in memory."""
    model = tiny.make(kind, dtype=dtype, **changes)
    return quantforge.quantize(model, "rtn", group_size=32, tokenizer=tokenizer)


def keys(folder) -> list[str]:
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found += opened.keys()
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def test_shards_and_their_index_load_as_one_file_does(tmp_path, monkeypatch):
    result = quantized()
    result.save(tmp_path / "one")
    monkeypatch.setattr(results, "MAX_SHARD_SIZE", 20_000)
    result.save(tmp_path / "many")
    shards = sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) >= 3
    assert not (tmp_path / "many" / "model.safetensors").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert sorted(index["weight_map"]) == sorted(keys(tmp_path / "many")) == sorted(keys(tmp_path / "one"))
    assert torch.equal(
        logits(quantforge.load(tmp_path / "many", packed=False)),
        logits(quantforge.load(tmp_path / "one", packed=False)),
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.bfloat16)
    assert torch.equal(logits(stock), logits(quantforge.load(tmp_path / "one", packed=False)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once_and_tied_again(tmp_path, tied):
    result = quantized(tie_word_embeddings=tied)
    result.save(tmp_path / "out")
    assert ("lm_head.weight" in keys(tmp_path / "out")) == (not tied)
    assert "model.embed_tokens.weight" in keys(tmp_path / "out")
    loaded = quantforge.load(tmp_path / "out", packed=False)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(
        loaded.lm_head.weight, tiny.make("llama", dtype=torch.bfloat16, tie_word_embeddings=tied).lm_head.weight
    )


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        quantized(tokenizer=letters()).save(tmp_path / "out")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()}
    assert len(modes) >= 5
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_the_config_names_the_models_class_which_some_readers_need(tmp_path):
    quantized("qwen2").save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


def test_generation_config_and_tokenizer_are_saved(tmp_path):
    model = tiny.make("llama")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[2, 7])
    quantforge.quantize(model, "rtn", group_size=32, tokenizer=letters(), out=tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.temperature, saved.eos_token_id) == (0.6, [2, 7])
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("Hello, you")["input_ids"]
        == letters()("Hello, you")["input_ids"]
    )


def test_a_generation_config_that_transformers_warns_of_does_not_stop_the_save(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "generation_config.json"
    # without do_sample, as several published models have it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.5, "do_sample": False}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    quantforge.quantize(model, "rtn", group_size=32, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5
    assert torch.equal(logits(quantforge.load(tmp_path / "out", packed=False)), logits(model))


def test_saving_leaves_the_model_and_its_config_as_they_were(tmp_path):
    result = quantized()
    result.model.config.architectures = ["LlamaForCausalLM"]  # as in a model that was loaded
    before, computed = result.model.config.to_dict(), logits(result.model)
    state = {k: v.clone() for k, v in result.model.state_dict().items()}
    result.save(tmp_path / "out")
    result.save(tmp_path / "again")
    assert result.model.config.to_dict() == before
    assert all(torch.equal(v, state[k]) for k, v in result.model.state_dict().items())
    assert torch.equal(logits(result.model), computed)
    for name in ("model.safetensors", "config.json", MARK):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_is_not_quantized_is_stored_in_the_checkpoints_dtype(tmp_path):
    quantized(dtype=torch.float16).save(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - no mapping
    integers = {"weight_packed": torch.int32, "weight_zero_point": torch.int32, "weight_shape": torch.int64}
    assert all(kind == integers.get(name.rpartition(".")[2], torch.float16) for name, kind in kinds.items()), kinds
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_nothing_in_the_folder_is_a_pickle_or_names_a_place_on_this_machine(tmp_path):
    quantized(tokenizer=letters()).save(tmp_path / "out")
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", MARK} <= names
    assert not any(n.endswith((".bin", ".pt", ".pth", ".pkl", ".py")) for n in names)
    texts = [f.read_text() for f in (tmp_path / "out").iterdir() if f.suffix == ".json"]
    assert not any(str(tmp_path) in text for text in texts)


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    first, second = quantized(), quantized("qwen3")
    first.save(tmp_path / "out")
    with pytest.raises(PlanError, match=r"--overwrite"):
        second.save(tmp_path / "out")
    assert torch.equal(logits(quantforge.load(tmp_path / "out", packed=False)), logits(first.model))
    assert quantforge.load(tmp_path / "out", packed=False).config.model_type == "llama"
    assert second.save(tmp_path / "out", overwrite=True) == tmp_path / "out"
    assert quantforge.load(tmp_path / "out", packed=False).config.model_type == "qwen3"
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    result = quantized()

    def full(*args, **kwargs):
        (args[0] / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.shards, "write", full)
    with pytest.raises(ResourceError, match=r"No space left on device"):
        result.save(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_the_record_is_json_with_a_row_a_layer():
    result = quantforge.quantize(tiny.make("llama"), group_size=32, calibration=tokens())
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert (record["schema"], record["method"], record["source"]) == (1, "gptq", "LlamaForCausalLM")
    assert record["calibration"] == {"name": "token ids", "seq_len": 24, "count": 2}
    assert [row["name"] for row in record["layers"]] == list(result.plan.layers)
    assert all(
        {"damp", "rung", "loss", "relative_loss", "tokens", "format", "shape"} <= set(r) for r in record["layers"]
    )
    assert record["layers"][0]["format"] == record["format"] == "int4-g32-asym-fp32"
    assert record["bytes_after"] == result.plan.bytes_after
    assert "arXiv:2210.17323" in record["paper"]


def test_the_summary_names_the_layers_that_lost_most():
    result = quantforge.quantize(tiny.make("llama"), group_size=32, calibration=tokens())
    worst = sorted(result.layers, key=lambda row: row.relative_loss)[-3:]
    line = next(line for line in result.summary().splitlines() if line.startswith("most lost"))
    assert [line.index(row.name) for row in worst] == sorted((line.index(row.name) for row in worst), reverse=True)
    assert f"{worst[-1].name} {100 * worst[-1].relative_loss:.3g}%" in line
    assert "14 layers at 5.125 bits" in result.summary()


def test_fallbacks_are_none_when_all_went_well_and_named_when_not():
    assert quantforge.quantize(tiny.make("llama"), group_size=32, calibration=tokens(8)).fallbacks() == []
    assert quantized().fallbacks() == []
    starved = quantforge.quantize(
        tiny.make("llama"), group_size=32, calibration=tokens(1), settings={"solver.damp_percent": 0.0}
    )
    assert starved.fallbacks()
    assert all("damping was raised to" in line or "only its diagonal" in line for line in starved.fallbacks())
    assert f"note: {starved.fallbacks()[0]}" in starved.summary()


def test_a_disk_that_fills_up_under_safetensors_is_told_in_a_line(tmp_path, monkeypatch):
    """Their writer reports a full disk by an exception of its own, which is no OSError."""

    def full(result, exporter, staging):
        (staging / "half").write_text("x")
        raise SafetensorError('I/O error: Os { code: 28, message: "No space left on device" }')

    monkeypatch.setattr(results, "_write", full)
    with pytest.raises(ResourceError, match=r"QF-511.*No space left on device"):
        quantized().save(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_loss_that_is_not_finite_is_null_in_the_record_and_does_not_stop_the_save(tmp_path):
    result = quantized()
    first, *rest = result.layers
    bad = replace(first, loss=float("inf"), relative_loss=float("nan"))
    saved = replace(result, layers=(bad, *rest)).save(tmp_path / "out")
    rows = json.loads((saved / MARK).read_text())["layers"]
    assert (rows[0]["loss"], rows[0]["relative_loss"]) == (None, None)
    assert rows[1]["loss"] == rest[0].loss


def test_tensors_that_begin_at_the_same_place_are_one_only_if_they_are_alike():
    whole = torch.arange(6.0).view(2, 3)
    names = {"whole": whole, "tied": whole, "turned": whole.T, "row": whole[0]}
    empty = {"none": torch.empty(0), "wide": torch.empty(0, 5)}
    copies = results._in_dtype(names | empty, torch.bfloat16)
    assert copies["whole"] is copies["tied"]
    for name, tensor in (names | empty).items():
        assert torch.equal(copies[name], tensor.bfloat16()), name
