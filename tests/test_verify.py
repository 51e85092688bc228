"""`verify` names what is wrong with a checkpoint, whatever is wrong with it, and who can load a sound one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantforge
from quantforge import digests, result
from quantforge.cli.verify import verify as command
from quantforge.models.headers import read_header
from quantforge.numerics.formats import NAMED, parse
from quantforge.numerics.inputs import parse_inputs
from quantforge.store import MARK
from quantforge.verification import Loader, Report, loaders, require, verify

TINY = Path(__file__).parent / "data" / "tiny-llama"
BLOCK = "model.layers.1"
UP, GATE = f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.gate_proj"
WEIGHTS = "model.safetensors"
IDS = torch.arange(3, 99).view(4, 24)
BASES: dict[str, dict[str, Any]] = {
    "ct": {"method": "rtn", "weights": "int4-g32-asym"},
    "static": {"method": "rtn", "weights": "int8-channel-sym", "inputs": "int8-tensor-static", "calibration": IDS},
    "lorc": {"method": "rtn+lorc", "weights": "int4-g32-sym", "calibration": IDS},
    "gptq": {"method": "rtn", "format": "gptq", "bits": 4, "group_size": 32, "symmetric": True},
    "awq": {"method": "rtn", "format": "awq", "bits": 4, "group_size": 32},
    "nf4": {"method": "nf4"},
    "int8": {"method": "llm-int8", "settings": {"inputs.dynamic": True}},
    "native": {"method": "rtn", "weights": "e2m1-g32"},
    "gguf": {"method": "rtn", "format": "gguf", "bits": 4, "symmetric": True},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str], Path]:
    """Return what makes a good checkpoint of each kind, once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("bases") / name
            kind = "ct" if name == "shards" else name
            before, result.MAX_SHARD_SIZE = result.MAX_SHARD_SIZE, 50_000 if name == "shards" else 10**9
            try:
                quantforge.quantize(TINY, **BASES[kind], out=out)
            finally:
                result.MAX_SHARD_SIZE = before
            made[name] = out
        return made[name]

    return make


def change_json(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return act


def config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the quantization_config."""
    return change_json("config.json", lambda c: change(c["quantization_config"]))


def group(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the first group of compressed-tensors."""
    return config(lambda q: change(q["config_groups"]["group_0"]))


def weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the arguments of the weights in compressed-tensors' first group."""
    return group(lambda g: change(g["weights"]))


def tensors(change: Callable[[dict[str, Tensor]], object], file: str = WEIGHTS) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        found = load_file(folder / file)
        change(found)
        save_file({k: v.contiguous() for k, v in found.items()}, folder / file, {"format": "pt"})

    return act


def put(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({key: change(t[key])}))


def first(value: float) -> Callable[[Tensor], Tensor]:
    """Put a number in the place of the first one."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[0] = value
        return x

    return change


def flip(key: str) -> Callable[[Path], None]:
    """Flip the lowest bit of a tensor in its file, of which nothing else changes."""

    def act(folder: Path) -> None:
        info = read_header(folder / WEIGHTS)[key]
        raw = bytearray((folder / WEIGHTS).read_bytes())
        raw[info.start] ^= 1
        (folder / WEIGHTS).write_bytes(raw)

    return act


def swap(a: str, b: str) -> Callable[[Path], None]:
    def change(t: dict[str, Tensor]) -> None:
        for key in [k for k in t if k.startswith(f"{a}.")]:
            other = key.replace(a, b)
            t[key], t[other] = t[other], t[key]

    return tensors(change)


def cut(file: str, count: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-count]) and None


def replace_bytes(old: bytes, new: bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        assert old in raw
        (folder / WEIGHTS).write_bytes(raw.replace(old, new, 1))

    return act


def remove(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for file in folder.glob(name):
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    return act


def outside(folder: Path) -> None:
    """Let the index name a shard that lies beside the folder."""
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    shutil.move(folder / shard, folder.parent / "outside.safetensors")
    index["weight_map"] = {k: "../outside.safetensors" if v == shard else v for k, v in index["weight_map"].items()}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def float_weight(t: dict[str, Tensor]) -> None:
    """Put a float weight in the place of a quantized one."""
    for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
        t.pop(f"{UP}.{part}")
    t[f"{UP}.weight"] = torch.zeros(SHAPE, dtype=torch.bfloat16)


def swap_nibbles(x: Tensor) -> Tensor:
    return (x >> 4) | (x << 4)


SHAPE = tuple(json.loads((TINY / "config.json").read_text())[k] for k in ("intermediate_size", "hidden_size"))
A = f"base_model.model.{UP}.lora_A.weight"
# what is checked without digests too comes with True
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str, bool]] = {
    "a bit of the codes": ("ct", flip(f"{UP}.weight_packed"), f"{UP} has other numbers", False),
    "a bit of the scales": ("ct", flip(f"{UP}.weight_scale"), f"{UP} has other numbers", False),
    "a bit of the zero points": ("ct", flip(f"{UP}.weight_zero_point"), f"{UP} has other numbers", False),
    "a bit of a float tensor": ("ct", flip("model.norm.weight"), "model.norm.weight' has other", False),
    "a scale gone": ("ct", tensors(lambda t: t.pop(f"{UP}.weight_scale")), f"{UP} lacks weight_scale", True),
    "zero points gone": ("ct", tensors(lambda t: t.pop(f"{UP}.weight_zero_point")), "lacks weight_zero_point", True),
    "codes gone": ("ct", tensors(lambda t: t.pop(f"{UP}.weight_packed")), f"{UP} lacks its codes", True),
    "a norm gone": ("ct", tensors(lambda t: t.pop("model.norm.weight")), "missing: 'model.norm.weight'", True),
    "a tensor more": ("ct", tensors(lambda t: t.update(more=torch.ones(2))), "do not belong to it: 'more'", True),
    "a part more": ("ct", tensors(lambda t: t.update({f"{UP}.weight_g_idx": torch.ones(2)})), "weight_g_idx", True),
    "a part of nothing": ("ct", tensors(lambda t: t.update({"model.layers.9.up_proj.weight_scale": torch.ones(2)})),
                          "model.layers.9.up_proj.weight_scale", True),
    "a float in place of codes": ("ct", tensors(float_weight), f"says that {UP} is quantized", True),
    "two layers swapped": ("ct", swap(UP, GATE), f"{UP} holds the numbers of '{GATE}'", False),
    "the file cut off": ("ct", cut(WEIGHTS, 3), f"'{WEIGHTS}' is truncated", True),
    "a name in the header": ("ct", replace_bytes(b"model.norm.", b"model.morm."), "model.norm.weight", True),
    "an offset in the header": ("ct", replace_bytes(b'"data_offsets":[0,', b'"data_offsets":[1,'), WEIGHTS, True),
    "scales of another shape": ("ct", put(f"{UP}.weight_scale", lambda x: x[:, :-1]), f"{UP}: ", True),
    "a layer of another shape": ("ct", swap(UP, f"{BLOCK}.mlp.down_proj"), f"{UP} is ", True),
    "codes of another dtype": ("ct", put(f"{UP}.weight_packed", Tensor.long), f"{UP}: ", True),
    "a norm of another dtype": ("ct", put("model.norm.weight", Tensor.int), "model.norm.weight' is I32", True),
    "a negative scale": ("ct", put(f"{UP}.weight_scale", first(-1)), f"{UP}.weight_scale holds", True),
    "a scale that is NaN": ("ct", put(f"{UP}.weight_scale", first(float("nan"))), f"{UP}.weight_scale holds", True),
    "a scale of zero": ("ct", put(f"{UP}.weight_scale", first(0)), f"{UP}.weight_scale holds", True),
    "a norm that is NaN": ("ct", put("model.norm.weight", first(float("nan"))), "model.norm.weight' holds NaN", True),
    "a key of the arguments": ("ct", weights(lambda w: w.update(bitts=4)), "weights.bitts is no key", True),
    "a key of the group": ("ct", group(lambda g: g.update(scale=1)), "group_0.scale is no key", True),
    "a key of the config": ("ct", config(lambda q: q.update(moe_config={})), "config.moe_config is no key", True),
    "other bits": ("ct", weights(lambda w: w.update(num_bits=8)), f"{UP}: ", True),
    "bits that are a text": ("ct", weights(lambda w: w.update(num_bits="4")), "num_bits", True),
    "another group size": ("ct", weights(lambda w: w.update(group_size=64)), f"{UP}: ", True),
    "no symmetry": ("ct", weights(lambda w: w.update(symmetric=True)), f"{UP}.weight_zero_point' does not", True),
    "a strategy that is none": ("ct", weights(lambda w: w.update(strategy="rows")), "weights.strategy", True),
    "order by group": ("ct", weights(lambda w: w.update(actorder="group")), "'actorder': 'group'", True),
    "an unknown format": ("ct", config(lambda q: q.update(format="packed")), "compressed-tensors / packed", True),
    "an unknown method": ("ct", config(lambda q: q.update(quant_method="hqq")), "hqq", True),
    "a status": ("ct", config(lambda q: q.update(quantization_status="frozen")), "quantization_status is", True),
    "a target of nothing": ("ct", group(lambda g: g["targets"].append("up")), "targets: 'up' names no", True),
    "no target": ("ct", group(lambda g: g.update(targets=["lm_head"])), f"leaves {UP} in float", True),
    "a layer ignored": ("ct", config(lambda q: q["ignore"].append(UP)), f"leaves {UP} in float", True),
    "another config": ("ct", change_json("config.json", lambda c: c.update(rms_norm_eps=1)), "config.json' was", False),
    "another model": ("ct", change_json("config.json", lambda c: c.update(num_hidden_layers=1)), BLOCK, True),
    "no config": ("ct", remove("config.json"), "config.json", True),
    "no tokenizer": ("ct", remove("tokenizer*"), "'tokenizer.json' is missing", False),
    "another tokenizer": ("ct", lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json' was", False),
    "another record": ("ct", change_json(MARK, lambda r: r.update(bits_per_weight=1.0)), f"{MARK} was changed", False),
    "another digest": ("ct", change_json(MARK, lambda r: r["digests"]["layers"].update({UP: "0"})), f"{UP} has", False),
    "digests of no texts": ("ct", change_json(MARK, lambda r: r["digests"].update(layers=[])), "digests are no", False),
    "a newer record": ("ct", change_json(MARK, lambda r: r.update(schema=2)), "schema 1", False),
    "a shard gone": ("shards", remove("model-00002*"), "model-00002", True),
    "a shard outside": ("shards", outside, "../outside.safetensors", True),
    "an index that lacks a tensor": ("shards", change_json(f"{WEIGHTS}.index.json", lambda i: i["weight_map"].pop(
        "model.norm.weight")), "model.norm.weight", True),
    "an input scale": ("static", put(f"{UP}.input_scale", lambda x: x * 2), f"{UP} has other numbers", False),
    "an input scale gone": ("static", tensors(lambda t: t.pop(f"{UP}.input_scale")), f"{UP}.input_scale", True),
    "an E4M3 in place of int8": ("static", put(f"{UP}.weight", lambda x: x.to(torch.float8_e4m3fn)), f"{UP}.", True),
    "factors scaled": ("lorc", tensors(lambda t: t.update({A: t[A] * 2}), "adapter/adapter_model.safetensors"),
                       f"{UP} has other numbers", False),
    "another alpha": ("lorc", change_json("adapter/adapter_config.json", lambda c: c.update(lora_alpha=1)),
                      "adapter_config.json scales", True),
    "no adapter": ("lorc", remove("adapter"), "adapter/adapter_model.safetensors' is missing", False),
    "another order of inputs": ("gptq", put(f"{UP}.g_idx", lambda x: x.flip(0)), f"{UP}.g_idx", True),
    "zero points of version 2": ("gptq", put(f"{UP}.qzeros", lambda x: x + 0x11111111), f"{UP} has zero points", True),
    "bits of gptq": ("gptq", config(lambda q: q.update(bits=8)), f"{UP}", True),
    "a sym of gptq": ("gptq", config(lambda q: q.update(sym=False)), "sym is False", True),
    "a version of gptq": ("gptq", config(lambda q: q.update(checkpoint_format="gptq_v2")), "gptq_v2", True),
    "a layer left out": ("gptq", config(lambda q: q.update(dynamic={f"-:^{re.escape(UP)}$": {}})),
                         f"leaves {UP} in float", True),
    "a layer with other bits": ("gptq", config(lambda q: q.update(dynamic={"+:.*up_proj": {"bits": 8}})),
                                "dynamic.+:.*up_proj gives layers", True),
    "a pattern that is none": ("gptq", config(lambda q: q.update(dynamic={"-:(": {}})), "-:( is no pattern", True),
    "no patterns": ("gptq", config(lambda q: q.update(dynamic=["-:x"])), "dynamic is ['-:x']", True),
    "a desc_act": ("gptq", config(lambda q: q.update(desc_act=True)), "desc_act True", True),
    "a bit of AWQ's codes": ("awq", flip(f"{UP}.qweight"), f"{UP} has other numbers", False),
    "a version of AWQ": ("awq", config(lambda q: q.update(version="gemv")), "version gemv", True),
    "a layer not converted": ("awq", config(lambda q: q["modules_to_not_convert"].append(UP)), f"leaves {UP}", True),
    "the order of nibbles": ("nf4", put(f"{UP}.weight", swap_nibbles), f"{UP} has other numbers", False),
    "another table": ("nf4", put(f"{UP}.weight.quant_map", lambda x: x * 2), f"{UP}: quant_map", True),
    "an absmax gone": ("nf4", tensors(lambda t: t.pop(f"{UP}.weight.absmax")), f"{UP} lacks absmax", True),
    "another 4-bit type": ("nf4", config(lambda q: q.update(bnb_4bit_quant_type="fp4")), "bnb_4bit_quant_type", True),
    "a row's maximum": ("int8", put(f"{UP}.SCB", first(-1)), f"{UP}: SCB", True),
    "a threshold": ("int8", config(lambda q: q.update(llm_int8_threshold=3.0)), f"{UP} has other numbers", False),
    "codes that the grid lacks": ("native", put(f"{UP}.codes", lambda x: x | 255), f"{UP} cannot be read", True),
    "a container of version 2": ("native", config(lambda q: q.update(version=2)), "version 1", True),
    "a layer dropped": ("native", config(lambda q: q["layers"].pop(UP)), f"leaves {UP} in float", True),
    "a layer of another size": ("native", config(lambda q: q["layers"][UP].update(shape=[1, 1])), UP, True),
    "a layer that is none": ("native", config(lambda q: q["layers"].update(lm=q["layers"][UP])), "names 'lm'", True),
    "a GGUF cut off": ("gguf", cut("model.gguf", 100), "model.gguf", True),
    "a GGUF changed": ("gguf", lambda f: last_byte(f / "model.gguf"), "has other numbers", False),
    "a norm of a GGUF": ("gguf", lambda f: norm_of(f / "model.gguf"), "1.input_layernorm.weight' has other", False),
}  # fmt: skip


def last_byte(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def norm_of(file: Path) -> None:
    """Change the lowest bit of a norm in a GGUF file."""
    place = next(t.data_offset for t in GGUFReader(file).tensors if t.name == "blk.1.attn_norm.weight")
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


def faults(report: Report) -> list[str]:
    assert all("\n" not in str(f) for f in report.findings)
    return [f.message for f in report.faults]


@pytest.mark.parametrize("name", [*BASES, "shards"])
def test_what_was_saved_is_sound(bases, name):
    report = verify(bases(name))
    assert faults(report) == []
    assert report.sound
    assert report.digests
    assert report.layers == 28
    assert {"transformers", "vLLM", "llama.cpp"} <= {loader.name for loader in report.loaders}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_planted_corruption_is_found_and_named(bases, tmp_path, name):
    base, damage, says, _ = DAMAGE[name]
    folder = Path(shutil.copytree(bases(base), tmp_path / "copy"))
    damage(folder)
    report = verify(folder)
    assert not report.sound
    assert any(says in message for message in faults(report)), faults(report)
    assert report.loaders == ()
    with pytest.raises(quantforge.errors.ModelError):
        require(folder)


@pytest.mark.parametrize("name", [name for name, (*_, without) in DAMAGE.items() if without])
def test_what_needs_no_digests_is_found_in_the_checkpoints_of_others_too(bases, tmp_path, name):
    base, damage, says, _ = DAMAGE[name]
    folder = Path(shutil.copytree(bases(base), tmp_path / "copy"))
    (folder / MARK).unlink()
    damage(folder)
    assert any(says in message for message in faults(verify(folder)))


def test_there_are_thirty_of_them_and_more():
    assert len(DAMAGE) >= 30


@pytest.mark.parametrize("name", BASES)
def test_the_checkpoint_of_others_is_sound_and_said_to_have_no_digests(bases, tmp_path, name):
    folder = Path(shutil.copytree(bases(name), tmp_path / "copy"))
    (folder / MARK).unlink()
    report = verify(folder)
    assert faults(report) == []
    assert not report.digests
    assert any("no digests" in f.message for f in report.findings)


def test_what_was_saved_before_there_were_digests_is_sound(bases, tmp_path):
    folder = Path(shutil.copytree(bases("ct"), tmp_path / "copy"))
    change_json(MARK, lambda r: r.pop("digests"))(folder)
    report = verify(folder)
    assert report.sound
    assert not report.digests


def test_a_file_that_was_added_is_only_noted(bases, tmp_path):
    folder = Path(shutil.copytree(bases("ct"), tmp_path / "copy"))
    (folder / "README.md").write_text("mine")
    report = verify(folder)
    assert report.sound
    assert any("README.md" in f.message for f in report.findings)


def test_a_folder_that_is_absent_or_a_float_model_is_a_fault(tmp_path):
    assert "no folder" in faults(verify(tmp_path / "absent"))[0]
    assert "no quantization_config" in faults(verify(TINY))[0]


TAKES = {
    "ct": {"transformers": True, "vLLM": True, "llama.cpp": False},
    "static": {"transformers": True, "vLLM": True, "llama.cpp": False},
    "lorc": {"transformers": True, "vLLM": True, "llama.cpp": False, "peft": True},
    "gptq": {"transformers": True, "vLLM": True, "llama.cpp": False},
    "awq": {"transformers": True, "vLLM": True, "llama.cpp": False},
    "nf4": {"transformers": True, "vLLM": True, "llama.cpp": False},
    "native": {"transformers": False, "vLLM": False, "llama.cpp": False},
    "gguf": {"transformers": True, "vLLM": True, "llama.cpp": True},
}


@pytest.mark.parametrize("name", TAKES)
def test_who_takes_it_is_told_with_the_reason(bases, name):
    loaders = verify(bases(name)).loaders
    assert {loader.name: loader.takes for loader in loaders} == TAKES[name]
    assert all(bool(loader.reason) != loader.takes for loader in loaders)


def test_vllm_refuses_layers_that_it_reads_as_one_and_that_are_stored_differently(tmp_path):
    overrides = {"*.k_proj": {"bits": 8}}
    quantforge.quantize(TINY, "rtn", weights="int4-g32-sym", overrides=overrides, out=tmp_path / "out")
    found = {loader.name: loader for loader in verify(tmp_path / "out").loaders}
    assert found["transformers"].takes
    assert "q_proj and k_proj as one layer" in found["vLLM"].reason


NEEDS = {
    "int4-g32-sym": "",
    "int4-channel-asym": "",
    "int4-g16-sym": "a CPU, or Humming's kernels on a GPU",
    "int8-g32-sym": "a GPU",
    "int8-channel-asym": "a GPU",
    "int8-g16-sym": "a GPU, and Humming's kernels",
    "int3-g32-sym": "a GPU, and Humming's kernels",
    "e4m3-channel": "a GPU",
    "mxfp4": "a GPU",
    "int8-channel-sym x int8-token": "",
    "e4m3-channel x e4m3-token": "",
    "int4-g32-sym x int8-token": "a GPU, and Humming's kernels",
}


def judged(container: str, layer: loaders.Layer, *, adapter: bool = False, **told: Any) -> Loader:
    """Return what is said of vLLM for a checkpoint of one layer."""
    config = {"config_groups": {}, **told}
    found = loaders.judge(container, config, {"model.layers.0.a": layer}, adapter=adapter)
    return next(loader for loader in found if loader.name == "vLLM")


@pytest.mark.parametrize("stored", NEEDS)
def test_what_vllm_needs_for_a_layer_is_told(stored):
    weights, _, inputs = stored.partition(" x ")
    layer = loaders.Layer(NAMED.get(weights) or parse(weights), parse_inputs(inputs) if inputs else None)
    vllm = judged("compressed-tensors", layer)
    assert (vllm.reason, vllm.needs) == ("", NEEDS[stored])


@pytest.mark.parametrize("inputs", ["int8-token-asym", "e4m3-token", "int8-tensor-static"])
def test_inputs_that_vllm_has_no_scheme_for_beside_4_bits_are_told(inputs):
    layer = loaders.Layer(parse("int4-g32-sym"), parse_inputs(inputs))
    assert "int8-token inputs work" in judged("compressed-tensors", layer).reason


def test_gptq_of_8_bits_needs_a_gpu_in_vllm():
    layer = loaders.Layer(parse("int8-g32-sym-fp16"))
    assert judged("gptq", layer, bits=8, sym=True, group_size=32).needs == "a GPU"
    layer = loaders.Layer(parse("int4-g32-sym-fp16"))
    assert judged("gptq", layer, bits=4, sym=True, group_size=32).needs == ""


def test_the_adapter_and_the_kernels_are_both_told():
    layer = loaders.Layer(parse("int8-g32-sym"))
    assert judged("compressed-tensors", layer, adapter=True).needs == "its --enable-lora for the adapter, and a GPU"


def test_what_is_wrong_with_a_save_names_the_folder_that_was_asked_for(tmp_path, monkeypatch):
    """The model is written elsewhere first, and that place is gone when the error is read."""
    made = quantforge.quantize(TINY, "rtn", weights="int4-g32-sym")
    monkeypatch.setattr(digests, "make", lambda *a, **k: {key: {} for key in digests.KEYS})
    with pytest.raises(quantforge.errors.ModelError, match="QF-348") as caught:
        made.save(tmp_path / "out")
    assert f"{tmp_path / 'out'} is not what" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def run(*arguments: object) -> Any:
    outcome = CliRunner().invoke(command, [str(a) for a in arguments])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    return outcome


def test_the_command_prints_a_line_a_finding_and_exits_by_its_class(bases, tmp_path):
    good = run(bases("ct"))
    assert good.exit_code == 0
    assert "is sound: compressed-tensors, 28 quantized layers" in good.stdout
    assert "vLLM 0.32: yes" in good.stdout
    folder = Path(shutil.copytree(bases("ct"), tmp_path / "copy"))
    flip(f"{UP}.weight_packed")(folder)
    bad = run(folder)
    assert bad.exit_code == 3
    assert bad.stdout.count("error[QF-348]") == 2  # the file and the layer
    told = json.loads(run(folder, "--json").stdout)
    assert not told["sound"]
    assert {f["code"] for f in told["findings"]} == {"QF-348"}
    assert json.loads(run(bases("ct"), "--json").stdout)["loaders"][0]["takes"]


def test_digests_of_tensors_are_those_of_the_file(bases):
    for file in (bases("ct"), bases("nf4")):
        loaded = load_file(file / WEIGHTS)
        for name, info in read_header(file / WEIGHTS).items():
            assert digests.tensor_digest(loaded[name]) == digests.stored_digest(info)


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.ones(3, 2), torch.zeros(2, 3).half(), torch.zeros(6)])
def test_digests_tell_shape_dtype_and_content(other):
    assert digests.tensor_digest(other) != digests.tensor_digest(torch.zeros(3, 2))
    assert digests.tensor_digest(torch.zeros(3, 2)) == digests.tensor_digest(torch.zeros(2, 3).T.clone())
