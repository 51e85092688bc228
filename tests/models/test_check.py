"""A model folder that is not what it says is refused in one line, before anything expensive; a sound one is not."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from quantforge.errors import ModelError
from quantforge.models import check, tiny
from quantforge.models.check import check_finite, check_ids, check_names_and_shapes, check_tokenizer, read_folder

CONFIG = {"model_type": "llama", "hidden_size": 4}
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def refused(act: Callable[[], object], *expected: str) -> str:
    """Return the message of the ModelError that `act` raises, having checked that it is one line with `expected`."""
    with pytest.raises(ModelError) as caught:
        act()
    message = str(caught.value)
    assert re.match(r"error\[QF-3\d\d\]: ", message)
    assert len(message.splitlines()) == 1
    assert set(re.findall(r"\s(--[a-z-]+)", message)) <= {"--trust-remote-code"}
    for text in expected:
        assert text in message
    return message


def write_config(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a sound folder with one weight file."""
    path = tmp_path / "the model"
    path.mkdir()
    write_config(path)
    save_file({"a": torch.zeros(4, 2, dtype=torch.bfloat16), "b": torch.zeros(3)}, path / WHOLE)
    return path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """Return a sound folder with two shards."""
    (folder / WHOLE).unlink()
    save_file({"a": torch.zeros(4, 2)}, folder / "1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "2.safetensors")
    write_index(folder, {"a": "1.safetensors", "b": "2.safetensors"})
    return folder


def test_a_sound_folder_is_read(folder: Path) -> None:
    read = read_folder(folder)
    assert read.path == folder
    assert read.config == CONFIG
    assert read.stripped == ()
    assert read.nbytes == 16 + 12
    assert read.dtype == "BF16"
    assert read.tensors["a"].shape == (4, 2)


def test_a_sound_sharded_folder_is_read(sharded: Path) -> None:
    read = read_folder(sharded)
    assert {name: t.file.name for name, t in read.tensors.items()} == {"a": "1.safetensors", "b": "2.safetensors"}
    assert read.dtype == "F32"


def test_an_index_of_the_single_file_is_no_contradiction(folder: Path) -> None:
    write_index(folder, {"a": WHOLE, "b": WHOLE})
    assert read_folder(folder).tensors.keys() == {"a", "b"}


def test_a_folder_that_is_not_there_is_refused(folder: Path) -> None:
    refused(lambda: read_folder(folder / "elsewhere"), "no folder", "elsewhere", "download")
    refused(lambda: read_folder(folder / WHOLE), "no folder", WHOLE)
    refused(lambda: read_folder(Path("\0")), "no folder")


CONFIGS = {
    "17 empty": ("", ["config.json", "JSON"]),
    "17 not JSON": ("{model_type: llama}", ["config.json", "JSON"]),
    "17 not UTF-8": (b"\xff\xfe{}", ["config.json", "UTF-8"]),
    "17 not an object": ("[]", ["config.json", "not an object"]),
    "17 over 1 MB": (json.dumps({**CONFIG, "x": "y" * 1_000_000}), ["config.json", "1,000,000"]),
    "17 nested 100,000 deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, ["config.json", "nested"]),
    "17 nested 40 deep": ('{"a":' * 40 + "1" + "}" * 40, ["config.json", "nested more than 32"]),
    "17 lists nested 40 deep": ('{"a":' + "[" * 40 + "]" * 40 + "}", ["config.json", "nested more than 32"]),
    "17 duplicate model_type": ('{"model_type": "llama", "model_type": "gpt2"}', ["'model_type' twice"]),
    "17 no model_type": ("{}", ["config.json", "no model_type", "add it"]),
    "17 model_type is a list": ('{"model_type": ["llama"]}', ["no model_type (['llama'])"]),
    "17 model_type unknown": ('{"model_type": "lama"}', ["unknown model_type 'lama'", "did you mean 'llama'?"]),
    "17 model_type far off": ('{"model_type": "zzzzzzzzzz"}', ["'zzzzzzzzzz'", "upgrading transformers"]),
    "8 git-LFS pointer": ("version https://git-lfs.github.com/spec/v1\n", ["config.json", "git lfs pull"]),
    "18 auto_map": (
        json.dumps({**CONFIG, "auto_map": {"AutoModel": "x.Y"}}),
        ["config.json", "auto_map", "--trust-remote-code", "delete auto_map"],
    ),
    "18 auto_map inside": (
        json.dumps({**CONFIG, "text_config": {"auto_map": {"AutoModel": "x.Y"}}}),
        ["text_config.auto_map", "--trust-remote-code"],
    ),
    "18 consent in the config": (
        json.dumps({**CONFIG, "trust_remote_code": True, "auto_map": {"AutoModel": "x.Y"}}),
        ["auto_map", "--trust-remote-code"],
    ),
    "19 quantized": (
        json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}),
        ["already quantized with 'gptq'", "config.json", "use the original"],
    ),
    "19 quantized by an unnamed method": (
        json.dumps({**CONFIG, "text_config": {"compression_config": {}}}),
        ["already quantized with an unnamed method", "text_config.compression_config"],
    ),
    "58 escapes": ('{"model_type": "\\u001b[31m\\nlama"}', ["'\\x1b[31m\\nlama'"]),
}


@pytest.mark.parametrize("row", CONFIGS)
def test_a_bad_config_is_refused(folder: Path, row: str) -> None:
    content, expected = CONFIGS[row]
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: read_folder(folder), *expected)


def test_a_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(lambda: read_folder(folder), "config.json is missing", "the model")


def test_trust_lets_custom_code_through_but_not_the_hostile_keys(folder: Path) -> None:
    write_config(folder, model_type="brand_new", auto_map={"AutoModel": "x.Y"}, trust_remote_code=True)
    read = read_folder(folder, trust_remote_code=True)
    assert read.config["auto_map"] == {"AutoModel": "x.Y"}
    assert read.stripped == ("trust_remote_code",)


def test_keys_that_choose_code_are_stripped_at_any_depth_and_reported(folder: Path) -> None:
    hostile = {
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "_experts_implementation": "evil/kernel",
        "experts_implementation": "evil/kernel",
        "trust_remote_code": True,
    }
    write_config(folder, **hostile, text_config={"hidden_size": 8, **hostile}, parts=[{"x": 1, **hostile}])
    read = read_folder(folder)
    assert read.config == {**CONFIG, "text_config": {"hidden_size": 8}, "parts": [{"x": 1}]}
    assert sorted(read.stripped) == sorted(where + key for where in ("", "text_config.", "parts.") for key in hostile)


OUTSIDE = {
    "parent": "../1.safetensors",
    "parent inside": "a/../../1.safetensors",
    "absolute": "/etc/1.safetensors",
    "drive": "C:\\1.safetensors",
    "drive with slash": "C:/1.safetensors",
    "drive relative": "C:1.safetensors",
    "UNC": "\\\\server\\share\\1.safetensors",
    "UNC with slashes": "//server/share/1.safetensors",
    "backslash": "a\\1.safetensors",
    "parent with backslash": "..\\1.safetensors",
    "NUL": "1\0.safetensors",
    "newline": "1\n.safetensors",
    "empty": "",
    "dot": ".",
}
WRONG_KIND = {
    "pickle": "pytorch_model.bin",
    "hidden pickle": "1.safetensors.bin",
    "no extension": "safetensors",
}


@pytest.mark.parametrize("row", [*OUTSIDE, *WRONG_KIND])
def test_11_an_index_cannot_lead_out_of_the_folder(sharded: Path, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(sharded, {"a": {**OUTSIDE, **WRONG_KIND}[row], "b": "2.safetensors"})
    save_file({"a": torch.zeros(4, 2)}, sharded.parent / "1.safetensors")
    monkeypatch.setattr("quantforge.models.folder.read_header", lambda _: pytest.fail("a weight file was opened"))
    reason = "does not end in .safetensors" if row in WRONG_KIND else "not a plain name inside"
    refused(lambda: read_folder(sharded), "the file '", reason)


def link_out(file: Path) -> None:
    outside = file.parent.parent / "outside.safetensors"
    os.rename(file, outside)
    os.symlink(outside, file)


IRREGULAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "link out": (link_out, "leads out"),
    "link to a device": (lambda f: (f.unlink(), os.symlink("/dev/zero", f)), "leads out"),
    "link to nothing inside": (lambda f: (f.unlink(), os.symlink("gone.safetensors", f)), ""),
    "link to itself": (lambda f: (f.unlink(), os.symlink(f.name, f)), ""),
    "folder": (lambda f: (f.unlink(), f.mkdir()), "not a regular file"),
    "FIFO": (lambda f: (f.unlink(), os.mkfifo(f)), "not a regular file"),
}


@pytest.mark.parametrize("row", IRREGULAR)
@pytest.mark.parametrize("name", ["1.safetensors", WHOLE, "config.json", INDEX])
def test_11_irregular_files_are_refused(folder: Path, sharded: Path, name: str, row: str) -> None:
    if name == WHOLE:
        os.rename(sharded / "1.safetensors", sharded / WHOLE)
        (sharded / INDEX).unlink()
    damage, expected = IRREGULAR[row]
    damage(sharded / name)
    refused(lambda: read_folder(sharded), name, expected)


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    (folder / "sub").mkdir()
    os.rename(folder / WHOLE, folder / "sub" / "x")
    os.symlink("sub/x", folder / WHOLE)
    assert read_folder(folder).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_in_the_hub_cache_is_read(sharded: Path, tmp_path: Path, shared: bool) -> None:
    repo = tmp_path / "cache" / "models--org--name"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        blob = blobs / f"{i:064x}"
        if shared:
            store = tmp_path / "cache" / "blobs" / blob.name[:2] / blob.name
            store.parent.mkdir(parents=True, exist_ok=True)
            os.rename(file, store)
            os.symlink(os.path.relpath(store, blobs), blob)
        else:
            os.rename(file, blob)
        os.symlink(f"../../blobs/{blob.name}", snapshot / file.name)
    assert read_folder(snapshot).tensors.keys() == {"a", "b"}
    elsewhere = tmp_path / "x" / "blobs"
    elsewhere.mkdir(parents=True)
    os.rename(snapshot / "1.safetensors", tmp_path / "link")
    save_file({"a": torch.zeros(4, 2)}, elsewhere / "1")
    os.symlink(elsewhere / "1", snapshot / "1.safetensors")
    refused(lambda: read_folder(snapshot), "leads out", "1.safetensors")


INDEXES = {
    "10 all missing shards at once": ({"a": "3.safetensors", "b": "2.safetensors", "c": "4.safetensors"},
        ["2 of 3 shards are missing", "'3.safetensors', '4.safetensors'", "download"]),
    "10 a name of 64 KB": ({"a": "x" * 65536 + ".safetensors"}, ["1 of 1 shards are missing"]),
    "12 weight_map is a list": ([], [INDEX, "weight_map"]),
    "12 weight_map is empty": ({}, [INDEX, "weight_map"]),
    "12 weight_map to numbers": ({"a": 1}, [INDEX, "weight_map"]),
    "12 tensor that its shard lacks": ({"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"},
        [INDEX, "1 tensors", "'c' in '2.safetensors'"]),
    "12 tensors exchanged": ({"a": "2.safetensors", "b": "1.safetensors"}, [INDEX, "'a' in '2.safetensors'"]),
}  # fmt: skip


@pytest.mark.parametrize("row", INDEXES)
def test_a_bad_index_is_refused(sharded: Path, row: str) -> None:
    weight_map, expected = INDEXES[row]
    write_index(sharded, weight_map)
    refused(lambda: read_folder(sharded), *expected)


def test_12_a_shard_with_tensors_that_the_index_lacks_is_refused(sharded: Path) -> None:
    save_file({"b": torch.zeros(3), "extra\n": torch.zeros(1)}, sharded / "2.safetensors")
    refused(lambda: read_folder(sharded), INDEX, "'extra\\n' in '2.safetensors'")


def test_12_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": torch.zeros(4, 2), "b": torch.zeros(3)}, sharded / "2.safetensors")
    refused(lambda: read_folder(sharded), INDEX, "'a' in '2.safetensors'")


def test_12_a_tensor_indexed_twice_is_refused(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}')
    refused(lambda: read_folder(sharded), INDEX, "'a' twice")


def test_13_both_forms_are_refused_with_the_choice(sharded: Path) -> None:
    save_file({"a": torch.zeros(4, 2)}, sharded / WHOLE)
    refused(lambda: read_folder(sharded), f"delete {WHOLE} if the 2 shards are the model, or {INDEX} if")


def test_1_a_truncated_shard_is_found_among_all(sharded: Path) -> None:
    os.truncate(sharded / "2.safetensors", (sharded / "2.safetensors").stat().st_size - 1)
    refused(lambda: read_folder(sharded), "'2.safetensors' is truncated", "download")


ABSENT = {
    "nothing": ([], ["no weights", WHOLE, INDEX]),
    "adapter": (["adapter_model.safetensors"], ["adapter", "merge it"]),
    "shards without index": (["model-00001-of-00002.safetensors"], [f"but no {INDEX}", "model-00001-of-00002"]),
    "16 bin": (["pytorch_model.bin"], ["pickled", "'pytorch_model.bin'", "python -c", "glob('pytorch_model*.bin')"]),
    "16 pth": (["consolidated.00.pth"], ["pickled", "glob('*.pth')"]),
    "16 name that would inject code": (["x');evil('.bin"], ["pickled", "glob('*.bin')"]),
}


@pytest.mark.parametrize("row", ABSENT)
def test_a_folder_without_weights_is_refused(folder: Path, row: str) -> None:
    names, expected = ABSENT[row]
    (folder / WHOLE).unlink()
    for name in names:
        (folder / name).write_bytes(b"never read")
    refused(lambda: read_folder(folder), *expected)


def test_16_the_conversion_command_works(folder: Path) -> None:
    (folder / WHOLE).unlink()
    torch.save({"a": torch.arange(8.0).view(2, 4).T}, folder / "pytorch_model-00001-of-00002.bin")
    shared = torch.ones(3)
    torch.save({"b": shared, "c": shared}, folder / "pytorch_model-00002-of-00002.bin")
    message = refused(lambda: read_folder(folder), "python -c")
    command = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], cwd=folder, check=True, capture_output=True)
    assert read_folder(folder).tensors["a"].shape == (4, 2)
    assert torch.equal(load_file(folder / WHOLE)["a"], torch.arange(8.0).view(2, 4).T)


def test_6_weights_without_floats_are_refused(folder: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, folder / WHOLE)
    refused(lambda: read_folder(folder), "no tensor of BF16", "unquantized")


def meta(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


def saved(
    model: PreTrainedModel, path: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda t: None
) -> check.Folder:
    """Save `model`, change its tensors, and read the folder."""
    model.save_pretrained(path)
    if (path / WHOLE).exists():
        tensors = load_file(path / WHOLE)
        change(tensors)
        save_file(tensors, path / WHOLE, {"format": "pt"})
    return read_folder(path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", tiny.names())
def test_what_transformers_saves_fits(tmp_path: Path, kind: str, tied: bool, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny.make(kind, tie_word_embeddings=tied)
    folder = saved(model, tmp_path)
    twin = meta(model)
    before = {name: id(p) for name, p in twin.named_parameters()}
    capfd.readouterr()
    check_names_and_shapes(folder, twin)
    assert capfd.readouterr() == ("", "")
    assert before == {name: id(p) for name, p in twin.named_parameters()}
    assert folder.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("kind", tiny.names())
def test_shards_and_the_base_model_alone_fit(tmp_path: Path, kind: str) -> None:
    model = tiny.make(kind)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / INDEX).exists()
    check_names_and_shapes(read_folder(tmp_path / "shards"), meta(model))
    model.base_model.save_pretrained(tmp_path / "base")
    check_names_and_shapes(read_folder(tmp_path / "base"), meta(model))


@pytest.mark.parametrize("kind", tiny.names())
def test_every_missing_tensor_is_found(tmp_path: Path, kind: str) -> None:
    model = tiny.make(kind)
    whole = saved(model, tmp_path)
    twin = meta(model)
    for name in list(whole.tensors)[:: max(1, len(whole.tensors) // 8)]:
        tensors = {n: t for n, t in whole.tensors.items() if n != name}
        holed = check.Folder(whole.path, whole.config, tensors, ())
        refused(lambda holed=holed: check_names_and_shapes(holed, twin), "1 tensors are missing", name, "download")


def test_14_a_missing_embedding_of_a_tied_pair_is_found(tmp_path: Path) -> None:
    model = tiny.make("llama")
    folder = saved(model, tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    refused(lambda: check_names_and_shapes(folder, meta(model)), "model.embed_tokens.weight")


def test_14_a_missing_head_of_an_untied_model_is_found(tmp_path: Path) -> None:
    model = tiny.make("llama", tie_word_embeddings=False)
    folder = saved(model, tmp_path, lambda t: t.pop("lm_head.weight"))
    refused(lambda: check_names_and_shapes(folder, meta(model)), "'lm_head.weight'", "missing")


def test_14_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    model = tiny.make("llama", num_hidden_layers=3)
    folder = saved(tiny.make("llama"), tmp_path)
    refused(lambda: check_names_and_shapes(folder, meta(model)), "9 tensors are missing", "and 4 more")


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 96}, {"intermediate_size": 80}, {"num_key_value_heads": 4}], ids=str
)
def test_15_another_shape_is_refused_with_both(tmp_path: Path, changes: dict[str, int]) -> None:
    folder = saved(tiny.make("llama"), tmp_path)
    twin = meta(tiny.make("llama", **changes))
    message = refused(lambda: check_names_and_shapes(folder, twin), "another shape", "LlamaForCausalLM")
    name, got, want = re.search(r"'([\w.]+)' is \[([\d, ]+)\], not \[([\d, ]+)\]", message).groups()  # type: ignore[union-attr]
    assert list(folder.tensors[name].shape) == [int(n) for n in got.split(",")]
    assert list(twin.get_parameter(name).shape) == [int(n) for n in want.split(",")]


def test_9_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    model = tiny.make("llama")
    names = ["../../etc/x", "a\nb\x1b[31m", "x" * 65536, "", "model", "model.layers.0.self_attn.q_proj.bias"]
    folder = saved(model, tmp_path, lambda t: t.update({name: torch.zeros(2) for name in names}))
    message = refused(
        lambda: check_names_and_shapes(folder, meta(model)), "6 tensors do not belong", "'a\\nb\\x1b[31m'"
    )
    assert len(message) < 800


def test_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    llama, gpt2 = tiny.make("llama"), tiny.make("gpt2")
    inv_freq = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(2)}
    check_names_and_shapes(saved(llama, tmp_path / "llama", lambda t: t.update(inv_freq)), meta(llama))
    mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for i in range(2)}
    check_names_and_shapes(saved(gpt2, tmp_path / "gpt2", lambda t: t.update(mask)), meta(gpt2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_6_weights_that_are_no_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = tiny.make("llama")
    folder = saved(model, tmp_path, lambda t: t.update({name: t[name].to(dtype)}))
    expected = {torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.complex64: "C64"}[dtype]
    refused(lambda: check_names_and_shapes(folder, meta(model)), f"'{name}' is {expected}", "unquantized")


def mixtral() -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads))


def test_experts_that_transformers_fuses_fit(tmp_path: Path) -> None:
    model = mixtral()
    folder = saved(model, tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in folder.tensors
    check_names_and_shapes(folder, meta(model))


EXPERTS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "missing": lambda t: t.pop("model.layers.0.block_sparse_moe.experts.3.w2.weight"),
    "of another shape": lambda t: t.update({"model.layers.0.block_sparse_moe.experts.3.w1.weight": torch.zeros(3, 5)}),
    "no float": lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if "experts.3.w2" in k}),
}


@pytest.mark.parametrize("row", EXPERTS)
def test_a_damaged_expert_is_refused(tmp_path: Path, row: str) -> None:
    model = mixtral()
    folder = saved(model, tmp_path, EXPERTS[row])
    refused(lambda: check_names_and_shapes(folder, meta(model)))


def test_20_nan_and_inf_are_counted_by_tensor() -> None:
    model = tiny.make("llama")
    check_finite(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :3] = torch.nan
        model.model.layers[1].mlp.down_proj.weight[1, 1] = torch.inf
        model.model.layers[1].mlp.down_proj.weight[1, 2] = -torch.inf
    refused(
        lambda: check_finite(model),
        "2 tensors are not finite",
        "'model.layers.0.mlp.up_proj.weight' has 3 NaN and 0 Inf of 6,144",
        "'model.layers.1.mlp.down_proj.weight' has 0 NaN and 2 Inf of 6,144",
    )


def test_20_the_first_five_are_named_and_the_rest_counted() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    message = refused(lambda: check_finite(model), "8 tensors", "and 3 more")
    assert message.count(" has ") == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_20_a_sum_that_overflows_is_no_fault(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 64, dtype=dtype)
    nn.init.constant_(layer.weight, torch.finfo(dtype).max)
    check_finite(layer)
    with torch.no_grad():
        layer.weight[3, 3] = torch.nan
    refused(lambda: check_finite(layer), "'weight' has 1 NaN and 0 Inf of 4,096")


def tokenizer(size: int, **special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


LLAMA = LlamaConfig(vocab_size=10)


def test_49_a_tokenizer_within_the_rows_is_accepted() -> None:
    check_tokenizer(tokenizer(10), LLAMA, "m")
    check_tokenizer(tokenizer(7, pad_token="<pad>"), LLAMA, "m")


def test_49_a_vocabulary_beyond_the_rows_is_refused() -> None:
    refused(lambda: check_tokenizer(tokenizer(12), LLAMA, "m"), "'m'", "2 tokens", "10 rows", "'w10' with id 10")


def test_49_an_added_token_beyond_the_rows_is_refused() -> None:
    added = tokenizer(10)
    added.add_tokens(["<new>"])
    refused(lambda: check_tokenizer(added, LLAMA, "m"), "1 tokens", "'<new>' with id 10", "10 rows")
    padded = tokenizer(10, pad_token="<pad>")
    refused(lambda: check_tokenizer(padded, LLAMA, "m"), "1 tokens", "'<pad>' with id 10")


def test_49_a_marker_that_text_does_not_yield_is_found_only_in_ids() -> None:
    marked = tokenizer(10)
    marked.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    check_tokenizer(marked, LLAMA, "m")
    check_ids(torch.tensor([[0, 9]]), marked, LLAMA)
    refused(lambda: check_ids(torch.tensor([[0, 10, 9]]), marked, LLAMA), "'<image>', id 10", "10 rows")
