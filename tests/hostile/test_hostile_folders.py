"""Model folders made to do harm: what they carry is never run, followed or fetched, whether they are refused or not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from quantforge import cli
from quantforge.models import load

TINY = Path(__file__).parents[1] / "data" / "tiny-llama"
INDEX = "model.safetensors.index.json"
_SEEN: list[tuple[str, str]] = []  # what an audit hook was told while a test watches
_WATCHING = [False]
_FOREIGN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class")


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _WATCHING[0]:
        return
    if event == "open" and isinstance(args[0], str | bytes):
        _SEEN.append((event, os.fsdecode(args[0])))
    elif event in _FOREIGN:
        _SEEN.append((event, repr(args)[:200]))


sys.addaudithook(_hook)  # it can not be taken away again, so it looks whether it is wanted


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a model, a text, and something outside that must stay as it is and unopened."""
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "outside").mkdir()
    shutil.copy(TINY / "model.safetensors", tmp_path / "outside" / "model.safetensors")
    shutil.copy(TINY / "tokenizer.json", tmp_path / "outside" / "tokenizer.json")
    (tmp_path / "outside" / "generation_config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "text.txt").write_text("Simple statements are comprised within a single logical line. " * 8)
    (tmp_path / "results").mkdir()
    yield tmp_path
    assert not (tmp_path / "ran").exists(), "code of the model was run"


def quantize(place: Path, *more: object) -> Result:
    """Quantize the model, having checked that nothing outside was opened, nothing run and nobody called."""
    args = ["quantize", place / "model", "--method", "rtn", "--group-size", 32, "--calib", place / "text.txt"]
    args += ["--samples", 2, "--seq-len", 64, "--out", place / "results" / "out", *more]
    _SEEN.clear()
    _WATCHING[0] = True
    try:
        result = CliRunner().invoke(cli.main, [str(a) for a in args])
    finally:
        _WATCHING[0] = False
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    for event, what in _SEEN:
        assert event == "open", (event, what)
        assert str(place / "outside") not in os.path.realpath(what), what
        assert not what.endswith((".py", ".bin", ".pkl", ".pt")) or str(place) not in what, what
    return result


def refused(place: Path, *says: str, code: int = 3) -> None:
    before = sorted(str(p) for p in place.rglob("*"))
    result = quantize(place)
    assert result.stdout == ""
    assert result.exit_code == code, result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error[QF-")
    assert line.isprintable()
    for part in says:
        assert part in line, part
    assert sorted(str(p) for p in place.rglob("*")) == before


def change(file: Path, **keys: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **keys}))


def code(place: Path, name: str) -> None:
    """Put a module into the model's folder that leaves a mark when it is run."""
    (place / "model" / name).write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Model: pass\n")


class Trap:
    """What, unpickled, leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def trap(place: Path, name: str) -> None:
    (place / "model" / name).write_bytes(pickle.dumps({"weight": Trap(place / "ran")}))


def own_code(place: Path) -> None:
    code(place, "modeling_evil.py")
    change(place / "model" / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})


def code_of_the_hub(place: Path) -> None:
    auto = {"AutoConfig": "someone/repo--modeling_evil.Config", "AutoModelForCausalLM": "someone/repo--evil.Model"}
    change(place / "model" / "config.json", model_type="evil", auto_map=auto, trust_remote_code=True)


def pickles_only(place: Path) -> None:
    (place / "model" / "model.safetensors").unlink()
    trap(place, "pytorch_model.bin")


def pickle_in_the_index(place: Path) -> None:
    names = load_file(place / "model" / "model.safetensors")
    (place / "model" / "model.safetensors").unlink()
    trap(place, "pytorch_model.bin")
    (place / "model" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model.bin")}))


def model_as_tokenizer(place: Path) -> None:
    """transformers makes whatever class of its own the tokenizer's config names, a model's for instance."""
    trap(place, "pytorch_model.bin")
    change(place / "model" / "tokenizer_config.json", tokenizer_class="AutoModel")


def adapter(place: Path) -> None:
    trap(place, "adapter_model.bin")
    adapts = {"peft_type": "LORA", "base_model_name_or_path": str(place / "outside"), "auto_mapping": None}
    (place / "model" / "adapter_config.json").write_text(json.dumps(adapts))


def endless_config(place: Path) -> None:
    change(place / "model" / "config.json", num_hidden_layers=10**9)


def endless_labels(place: Path) -> None:
    change(place / "model" / "config.json", num_labels=10**12)


def links(place: Path) -> None:
    file = place / "model" / "generation_config.json"
    file.unlink(missing_ok=True)
    file.symlink_to(place / "outside" / "generation_config.json")


def linked_tokenizer(place: Path) -> None:
    (place / "model" / "tokenizer.json").unlink()
    (place / "model" / "tokenizer.json").symlink_to(place / "outside" / "tokenizer.json")


def named_tokenizer(place: Path) -> None:
    """transformers reads the file that this list names, wherever it lies."""
    shutil.copy(place / "outside" / "tokenizer.json", place / "outside" / "tokenizer.1.0.0.json")
    (place / "model" / "tokenizer.json").unlink()
    change(place / "model" / "tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.1.0.0.json"])


def huge_generation_config(place: Path) -> None:
    change(place / "model" / "generation_config.json", max_length="x" * 40_000_000)


FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "code of its own": (own_code, ["auto_map", "--trust-remote-code"]),
    "code on the hub, with its own consent": (code_of_the_hub, ["auto_map", "--trust-remote-code"]),
    "pickles only": (pickles_only, ["'pytorch_model.bin'", "can run code"]),
    "a pickle in the index": (pickle_in_the_index, ["'pytorch_model.bin'", ".safetensors"]),
    "a model as tokenizer": (model_as_tokenizer, ["'AutoModel'", "no tokenizer"]),
    "an adapter": (adapter, ["adapter_config.json", "merge"]),
    "a billion layers": (endless_config, ["num_hidden_layers", "1,000,000,000"]),
    "labels without end": (endless_labels, ["num_labels"]),
    "a generation config elsewhere": (links, ["'generation_config.json'", "leads out"]),
    "a tokenizer elsewhere, by a link": (linked_tokenizer, ["'tokenizer.json'", "leads out"]),
    "a tokenizer elsewhere, by name": (named_tokenizer, ["fast_tokenizer_files", "'../outside/tokenizer.1.0.0.json'"]),
    "a generation config of 40 MB": (huge_generation_config, ["'generation_config.json'", "33,554,432"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_refused_and_does_nothing(name: str, place: Path) -> None:
    make, says = FOLDERS[name]
    make(place)
    refused(place, *says)
    assert list((place / "results").iterdir()) == []


def hub_kernels(place: Path) -> None:
    keys = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation", "_experts_implementation")
    change(place / "model" / "config.json", **dict.fromkeys(keys, "someone/kernels"), kernel_config={"a": "b"})


def shadows(place: Path) -> None:
    """Keys that would take the place of the config's own methods, and of what it says of its attributes."""
    change(place / "model" / "config.json", save_pretrained=1, attribute_map={"vocab_size": "secret"})


def other_weights(place: Path) -> None:
    """A key by which transformers would load another file, through an index that leads out of the folder."""
    names = load_file(place / "model" / "model.safetensors")
    (place / "outside").mkdir(exist_ok=True)
    shutil.copy(place / "model" / "model.safetensors", place / "outside" / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../outside/shard.safetensors")}
    (place / "model" / "other.safetensors.index.json").write_text(json.dumps(index))
    change(
        place / "model" / "config.json", transformers_weights="other.safetensors.index.json", _auto_class="AutoConfig"
    )


def loud_forward(place: Path) -> None:
    change(place / "model" / "config.json", output_attentions=True, output_hidden_states=True, return_dict=False)


def template(place: Path) -> None:
    evil = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % (place / "ran")
    (place / "model" / "chat_template.jinja").write_text(evil)
    (place / "model" / "additional_chat_templates").mkdir()
    (place / "model" / "additional_chat_templates" / "tool_use.jinja").write_text(evil)
    change(place / "model" / "tokenizer_config.json", chat_template=evil)


def modules(place: Path) -> None:
    for name in ("torch.py", "json.py", "tokenization_llama.py", "modeling_llama.py", "__init__.py", "conftest.py"):
        code(place, name)
    (place / "model" / "custom_generate").mkdir()
    code(place, "custom_generate/generate.py")
    change(place / "model" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_llama.Model", None]})


def pickles_beside(place: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "vocab.pkl", "rng_state.pth"):
        trap(place, name)


HARMLESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "kernels of the hub": (hub_kernels, "keys of config.json were ignored"),
    "methods in the config": (shadows, "attribute_map"),
    "weights by another name": (other_weights, "transformers_weights"),
    "a forward that returns more": (loud_forward, "output_attentions"),
    "a template": (template, ""),
    "modules": (modules, ""),
    "pickles beside the weights": (pickles_beside, ""),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_cannot_be_used_for_harm_changes_nothing(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = quantize(place)
    assert plain.exit_code == 0, plain.stderr
    file = place / "results" / "out" / "model.safetensors"
    expected = file.read_bytes()
    shutil.rmtree(place / "results" / "out")
    make, note = HARMLESS[name]
    make(place)
    monkeypatch.chdir(place / "model")
    result = quantize(place)
    assert result.exit_code == 0, result.stderr
    assert note in result.stdout
    assert file.read_bytes() == expected
    written = (place / "results" / "out" / "config.json").read_text()
    assert "someone" not in written
    assert "secret" not in written


def sharded(place: Path) -> None:
    """Cut the model into shards with an index, and put a sound shard outside too."""
    folder = place / "model"
    built = load.model(load.find(str(folder))).bfloat16()
    (folder / "model.safetensors").unlink()
    built.save_pretrained(folder, max_shard_size="400KB")
    first = min(folder.glob("model-*.safetensors"))
    shutil.copy(first, place / "outside" / "shard.safetensors")
    shutil.copy(first, place / "outside" / "..\\outside\\shard.safetensors")


def by_name(name: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        file = place / "model" / INDEX
        found = json.loads(file.read_text())
        first = min(found["weight_map"].values())
        value = name.replace("OUTSIDE", str(place / "outside"))
        found["weight_map"] = {k: value if v == first else v for k, v in found["weight_map"].items()}
        file.write_text(json.dumps(found))

    return make


def linked_shard(place: Path) -> None:
    first = min((place / "model").glob("model-*.safetensors"))
    first.unlink()
    first.symlink_to("../outside/shard.safetensors")


def linked_folder(place: Path) -> None:
    (place / "model" / "sub").symlink_to(place / "outside")
    by_name("sub/shard.safetensors")(place)


def like_a_cache(place: Path) -> None:
    """A link as the hub's cache has them, in a folder that is no such cache."""
    (place / "blobs").mkdir()
    first = min((place / "model").glob("model-*.safetensors"))
    shutil.move(first, place / "blobs" / "abc")
    first.symlink_to("../blobs/abc")


TRAVERSALS: dict[str, Callable[[Path], object]] = {
    "parent": by_name("../outside/shard.safetensors"),
    "parent from within": by_name("sub/../../outside/shard.safetensors"),
    "absolute": by_name("OUTSIDE/shard.safetensors"),
    "backslashes": by_name("..\\outside\\shard.safetensors"),
    "drive": by_name("C:\\outside\\shard.safetensors"),
    "share": by_name("\\\\server\\outside\\shard.safetensors"),
    "share with slashes": by_name("//server/outside/shard.safetensors"),
    "device": by_name("/dev/zero.safetensors"),
    "link": linked_shard,
    "link to a folder": linked_folder,
    "link as in the hub's cache": like_a_cache,
}


@pytest.mark.parametrize("form", TRAVERSALS)
def test_no_shard_outside_of_the_folder_is_read(form: str, place: Path) -> None:
    sharded(place)
    TRAVERSALS[form](place)
    refused(place, "QF-316")


CANARY = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU"
ARGUMENTS = [
    *((kind, "vocab") for kind in ("Bert", "Llama", "GPT2", "Qwen2", "Gemma", "Nllb")),
    *((kind, "merges") for kind in ("GPT2", "Qwen2", "CLIP")),
    *(("PreTrained", f"{key}_file") for key in ("tokenizer", "vocab", "merges", "spm", "emoji", "normalizer", "gguf")),
    ("PreTrained", "init_inputs"),
    ("PreTrained", "tokenizer_object"),
    *(("Marian", key) for key in ("source_spm", "target_spm", "target_vocab_file")),
    *(("BertJapanese", key) for key in ("sudachi_config_path", "sudachi_resource_dir")),
    ("Mistral", "tokenizer_path"),
    ("T5", "sp_model_kwargs.model_file"),
    ("BertJapanese", "mecab_kwargs.mecab_option"),
]


@pytest.mark.parametrize(("kind", "argument"), ARGUMENTS)
def test_no_argument_of_a_tokenizer_names_a_file_outside(kind: str, argument: str, place: Path) -> None:
    """Rust opens some of them, which no hook sees: what they hold must not be in what is written."""
    secret = place / "outside" / "secret"
    secret.write_text(f"{CANARY}\n[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\n")
    (place / "text.txt").write_text(f"{CANARY} and more of it. " * 100)
    key, _, inner = argument.partition(".")
    value: Any = [str(secret)] if key == "init_inputs" else {inner: str(secret)} if inner else str(secret)
    content = {"tokenizer_class": f"{kind}Tokenizer", key: value}
    (place / "model" / "tokenizer_config.json").write_text(json.dumps(content))
    if kind != "PreTrained":
        (place / "model" / "tokenizer.json").unlink()
        (place / "model" / "vocab.txt").write_text("x\n")
    refused(place, f"tokenizer_config.json has {inner or key} ", "remove it")
    written = [file for file in (place / "results").rglob("*") if file.is_file()]
    assert not any(CANARY.encode() in file.read_bytes() for file in written)


def test_what_old_tokenizers_say_of_where_they_were_made_is_no_harm(place: Path) -> None:
    file = place / "model" / "tokenizer_config.json"
    told = {
        "name_or_path": "/root/model",
        "special_tokens_map_file": "/root/special_tokens_map.json",
        "vocab_file": None,
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **told, "sp_model_kwargs": {}, "init_inputs": []}))
    assert quantize(place).exit_code == 0
