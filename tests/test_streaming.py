"""A model whose blocks are read one by one comes to the same files as a loaded one; memory does not grow with it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoeConfig

import quantforge
from quantforge import api, pipeline
from quantforge.errors import ModelError, PlanError, QuantForgeError, ResourceError
from quantforge.models import blocks, load, tiny
from quantforge.preflight.strategies import Strategy

TINY = Path(__file__).parent / "data" / "tiny-llama"
IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
KINDS = [kind for kind in (*tiny.names(), *tiny.mixtures()) if kind != "gpt2"]  # whose layers no checkpoint holds


class BrokenOff(Exception):  # noqa: N818
    """What ends a run in these tests."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 72)
    monkeypatch.setenv("QUANTFORGE_COMMIT_SECONDS", "0")


def folder(at: Path, kind: str, **changes) -> Path:
    """Write a tiny model in bfloat16, with a tokenizer."""
    place = at / kind
    if not place.exists():
        model = tiny.make(kind, dtype=torch.bfloat16, vocab_size=260, **changes)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # they begin as zeros, of which any scale is the same
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(place)
        load.read_tokenizer(TINY).save_pretrained(place)
    return place


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir()) if p.is_file()}


def quantize(model: Path, method: str, out: Path, strategy: Strategy, monkeypatch, **options) -> dict[str, str]:
    """Quantize a folder by a strategy, and return the digests of the files."""
    monkeypatch.setattr(api, "_strategy", lambda *args: strategy)
    quantforge.quantize(model, method, calibration=IDS, out=out, **options)
    assert not out.with_name(f"{out.name}.qf").exists()
    return digests(out)


@pytest.mark.parametrize("kind", KINDS)
def test_the_skeleton_has_the_numbers_of_the_loaded_model(tmp_path, kind):
    source = load.find(str(folder(tmp_path, kind)))
    assert blocks.can_stream(source)
    loaded, streamed = load.model(source), blocks.stream(source, torch.device("cpu"))
    for (name, a), (other, b) in zip(loaded.named_buffers(), streamed.model.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    seen = set()
    for index in range(len(streamed)):
        streamed.enter(index)
        for name, parameter in streamed.model.named_parameters():
            if not parameter.is_meta:
                seen.add(name)
                assert parameter.dtype == torch.float32
                assert torch.equal(parameter, loaded.get_parameter(name)), name
    lost = {name for name, _ in loaded.named_parameters()} - seen
    assert lost <= {"lm_head.weight"}
    streamed.leave()
    assert all(p.is_meta for p in streamed.modules.parameters())


G32 = {"group_size": 32}
CASES = [
    *(("llama", method, G32) for method in ("rtn", "awq", "gptaq", "lorc")),
    *(("llama", method, {}) for method in ("smoothquant+gptq", "spqr")),
    ("llama", "zeroquant", {**G32, "settings": {"tuner.steps": 2}}),
    *((kind, "gptq", G32) for kind in tiny.names() if kind != "gpt2"),
    *((kind, "gptq", {**G32, "symmetric": True}) for kind in tiny.mixtures()),
    *((kind, "awq", G32) for kind in ("qwen2", "opt")),  # which have biases
    ("llama", "nf4", {}),
    ("llama", "gptq", {**G32, "format": "awq"}),
]


@pytest.mark.parametrize(("kind", "method", "options"), CASES)
def test_files_are_the_same_bytes(tmp_path, kind, method, options, monkeypatch):
    model = folder(tmp_path, kind)
    found = [
        quantize(model, method, tmp_path / "out" / str(i), strategy, monkeypatch, **options)
        for i, strategy in enumerate((Strategy(), Strategy(stream=True), Strategy(stream=True, replay=True)))
    ]
    assert found[0] == found[1] == found[2]
    assert "model.safetensors" in found[0]


def test_several_files_are_the_same_bytes_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr("quantforge.result.MAX_SHARD_SIZE", 30_000)
    model = folder(tmp_path, "llama")
    found = [
        quantize(model, "rtn", tmp_path / str(i) / "out", strategy, monkeypatch, group_size=32)
        for i, strategy in enumerate((Strategy(), Strategy(stream=True)))
    ]
    assert found[0] == found[1]
    names = [name for name in found[0] if name.endswith(".safetensors")]
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) > 2
    assert quantforge.verify(tmp_path / "0" / "out").sound
    index = json.loads((tmp_path / "0" / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert (
        sum(t.numel() * t.element_size() for n in names for t in load_file(tmp_path / "0" / "out" / n).values())
        == (index["metadata"]["total_size"])
    )


def test_no_more_than_one_block_is_in_memory(tmp_path, monkeypatch):
    model = folder(tmp_path, "llama", num_hidden_layers=6)
    most = []
    real = blocks.Streamed.enter

    def enter(self, index, without=()):
        real(self, index, without)
        most.append(sum(any(not p.is_meta for p in block.parameters()) for block in self.modules))

    monkeypatch.setattr(blocks.Streamed, "enter", enter)
    quantize(model, "awq", tmp_path / "out", Strategy(stream=True), monkeypatch, group_size=32)
    assert set(most) == {1}
    assert len(most) == 18  # to choose scales, to solve, to write


@pytest.mark.parametrize("replay", [False, True])
def test_broken_off_and_gone_on_with(tmp_path, monkeypatch, replay):
    model = folder(tmp_path, "llama")
    whole = quantize(model, "awq", tmp_path / "whole" / "out", Strategy(), monkeypatch, group_size=32)
    real = pipeline.solve
    for count in (0, 3, 5):
        calls = []

        def broken(stage, *rest, calls=calls, count=count):
            calls.append(stage)
            if len(calls) > count:
                raise BrokenOff
            return real(stage, *rest)

        monkeypatch.setattr(pipeline, "solve", broken)
        with pytest.raises(BrokenOff):
            quantize(model, "awq", tmp_path / "out", Strategy(stream=True, replay=replay), monkeypatch, group_size=32)
    monkeypatch.setattr(pipeline, "solve", real)
    assert whole == quantize(model, "awq", tmp_path / "out", Strategy(stream=not replay), monkeypatch, group_size=32)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_broken_off_while_it_is_saved(tmp_path, monkeypatch, method):
    model = folder(tmp_path, "llama")
    whole = quantize(model, method, tmp_path / "whole" / "out", Strategy(), monkeypatch, group_size=32)

    def broken(*args, **kwargs):
        raise BrokenOff

    with monkeypatch.context() as patch:
        patch.setattr("quantforge.result.shards.write", broken)
        with pytest.raises(BrokenOff):
            quantize(model, method, tmp_path / "out", Strategy(stream=True), patch, group_size=32)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "solve", broken)  # nothing is left to solve
        assert whole == quantize(model, method, tmp_path / "out", Strategy(stream=True), patch, group_size=32)


def test_experts_that_stay_in_float_are_saved_as_their_files_have_them(tmp_path):
    """No row of the table: its fused experts are no layers, and its files hold each by itself."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "float")
    before = load_file(tmp_path / "float" / "model.safetensors")
    quantforge.quantize(model, "rtn", group_size=16, out=tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 12
    assert all(torch.equal(before[name], after[name]) for name in experts)


def test_a_result_that_was_never_whole_says_what_it_is_but_has_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "_strategy", lambda *args: Strategy(stream=True))
    model = folder(tmp_path, "llama")
    result = quantforge.quantize(model, "rtn", group_size=32, out=tmp_path / "out")
    assert "14 layers" in result.summary()
    assert len(result.record()["layers"]) == 14
    assert result.bits_per_weight > 4
    with pytest.raises(QuantForgeError, match=r"quantforge\.load"):
        result.layers[0].weight.dequantize()


def test_a_model_under_other_names_is_not_streamed(tmp_path):
    source = load.find(str(folder(tmp_path, "mixtral")))
    assert source.folder is not None
    left = {k: v for k, v in source.folder.tensors.items() if "experts.0.w1" not in k}
    with pytest.raises(ResourceError, match="another name"):
        blocks.stream(replace(source, folder=replace(source.folder, tensors=left)), torch.device("cpu"))


WAYS = {"whole": Strategy(), "streamed": Strategy(stream=True), "replayed": Strategy(stream=True, replay=True)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_what_the_checkpoint_cannot_hold_is_refused_before_any_work(tmp_path, name, way, monkeypatch):
    model = changed(folder(tmp_path, "llama", tie_word_embeddings=False), name, 2.0**20)
    monkeypatch.setattr(api, "run", lambda *args, **more: pytest.fail("work was begun"))
    with pytest.raises(PlanError, match=rf"{name} holds 1.05e\+06, beyond the 65504 of float16"):
        quantize(model, "gptq", tmp_path / "out", WAYS[way], monkeypatch, format="gptq", group_size=32, symmetric=True)


@pytest.mark.parametrize("way", WAYS)
def test_what_the_models_dtype_cannot_hold_is_named_as_that(tmp_path, way, monkeypatch):
    model = changed(folder(tmp_path, "llama"), "model.norm.weight", 1e6, torch.float16)
    with pytest.raises(ModelError, match=r"'model.norm.weight' holds 1e\+06, which float16, the model's dtype, cannot"):
        quantize(model, "rtn", tmp_path / "out", WAYS[way], monkeypatch, group_size=32)


def changed(model: Path, name: str, value: float, others: torch.dtype = torch.bfloat16) -> Path:
    """Give one element of a tensor a value, in float32, in a folder whose other tensors have a dtype."""
    tensors = {key: tensor.to(others) for key, tensor in load_file(model / "model.safetensors").items()}
    tensors[name] = tensors[name].float()
    tensors[name].view(-1)[1] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": str(others)[6:]}))
    return model
