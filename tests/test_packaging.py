"""The wheel: it holds what it should and nothing else, and works from where pip puts it."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import quantforge
from quantforge import api
from quantforge.evaluation.perplexity import evaluate
from quantforge.models import tiny
from quantforge.models.load import read_tokenizer

ROOT = Path(quantforge.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="the wheel is built from the source tree"
)


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("site")
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"),
        *("--target", str(place), str(wheel)),
        cwd=place,
    )
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.make("llama", dtype=torch.bfloat16).save_pretrained(folder)
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *string.printable])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    (folder.parent / "text.txt").write_text("It is a truth universally acknowledged. " * 40)
    return folder


def test_the_wheel_holds_the_package_and_its_metadata_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    version = f"quantforge-{quantforge.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"quantforge", version}
    assert any(name.endswith("LICENSE") for name in names)
    assert not any("__pycache__" in name or "tests/" in name for name in names)
    assert len(names) == len(set(names))


def test_the_wheel_holds_every_module_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {f"quantforge/{f.relative_to(ROOT / 'quantforge').as_posix()}" for f in (ROOT / "quantforge").rglob("*.py")}
    data = {
        *(f"quantforge/recipes/{f.name}" for f in (ROOT / "quantforge" / "recipes").glob("*.yaml")),
        *(f"quantforge/templates/{f.name}" for f in (ROOT / "quantforge" / "templates").glob("*.j2")),
        *(f"quantforge/data/{part}/{f.name}" for part in ("calib", "eval") for f in (ROOT / part).glob("*.yaml")),
    }
    assert {name.split("/")[1] for name in data} == {"recipes", "templates", "data"}
    assert any("/calib/" in name for name in data)
    assert any("/eval/" in name for name in data)
    assert ours | data <= names, sorted((ours | data) - names)


def test_the_installed_package_is_complete_by_itself(target, tmp_path):
    code = """
import json, pathlib, sys
import quantforge
from quantforge import recipe
from quantforge.calibrate import corpus
assert pathlib.Path(quantforge.__file__).is_relative_to(sys.argv[1]), quantforge.__file__
text = corpus.load_text("python-docs", "calibration").text
print(json.dumps([recipe.names(), corpus.set_names(), len(text)]))
"""
    found, sets, length = json.loads(run(sys.executable, "-c", code, str(target), cwd=tmp_path, PYTHONPATH=str(target)))
    assert found == sorted(f.stem for f in (ROOT / "quantforge" / "recipes").glob("*.yaml"))
    assert sets == sorted({f.stem for part in ("calib", "eval") for f in (ROOT / part).glob("*.yaml")})
    assert length > 10_000


def test_the_installed_command_quantizes_and_evaluates_a_folder(target, model, tmp_path):
    command = (sys.executable, "-m", "quantforge")
    text = str(model.parent / "text.txt")
    where = {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    options = ("--group-size", "32", "--calib", text, "--samples", "8", "--seq-len", "32", "--out", "out", "--json")
    record = json.loads(run(*command, "quantize", str(model), *options, cwd=tmp_path, **where))
    assert record["method"] == "gptq"
    assert record["format"] == "int4-g32-asym-bf16"
    assert record["calibration"]["count"] == 8
    assert {row["tokens"] for row in record["layers"]} == {256}
    scored = run(*command, "evaluate", "out", "--data", text, "--seq-len", "32", "--json", cwd=tmp_path, **where)
    ids, _ = api.token_ids(
        text,
        "evaluation",
        tokenizer=read_tokenizer(model),
        config=AutoConfig.from_pretrained(model),
        seq_len=32,
        count=None,
    )
    float_model = evaluate(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), ids).perplexity
    assert json.loads(scored)["perplexity"] == pytest.approx(float_model, rel=0.2)
    assert json.loads(scored)["perplexity"] != float_model
    loaded = quantforge.load(tmp_path / "out", packed=False)
    with torch.no_grad():
        assert loaded(torch.arange(3, 20)[None]).logits.isfinite().all()
