"""The faults of tests/data/faults.yaml: each row names the tests that show it; those that stand nowhere else are here.

Each asserts the exit code, the line that is printed, and that nothing was lost: inputs, older outputs, committed work.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations

import quantforge
from quantforge import api, cli, recipe
from quantforge.errors import ModelError
from quantforge.models import check, tiny
from quantforge.models import load as loading
from quantforge.solving import solve as pipeline_solve

TESTS = Path(__file__).parent
TINY = TESTS / "data" / "tiny-llama"
ROWS: list[dict[str, Any]] = yaml.safe_load((TESTS / "data" / "faults.yaml").read_text(encoding="utf-8"))
LAYER = "model.layers.1.mlp.down_proj.weight"


def run(*args: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Simple statements are comprised within a single logical line. " * 10, encoding="utf-8")
    return file


def quantize(model: Path, text: Path, out: Path, *more: object) -> Result:
    given = ["--calib", text, "--samples", 2, "--seq-len", 64, "--group-size", 32, "--out", out]
    return run("quantize", model, *(() if "--method" in more or "-m" in more else ("-m", "rtn")), *given, *more)


def refused(result: Result, code: int, *says: str) -> None:
    """Check that a run printed no result and one line, with all of `says` in it, and ended with `code`."""
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "note: "))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error[QF-")
    assert lines[0].isprintable()
    assert result.exit_code == code, lines[0]
    for part in says:
        assert part in lines[0], part


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@functools.cache
def functions(file: Path) -> tuple[str, set[str]]:
    """Return the text of a file of tests, and the names of its functions."""
    source = file.read_text(encoding="utf-8")
    return source, {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_the_rows_are_numbered_and_each_says_what_happens() -> None:
    assert [row["n"] for row in ROWS] == list(range(1, 73))
    for row in ROWS:
        assert set(row) <= {"n", "fault", "exit", "does", "differs", "injected", "tests"}
        assert row["fault"]
        assert row["does"]
        assert row["exit"] in (0, 2, 3, 4, 5, 6, 7, 75)
        assert row["tests"]


@pytest.mark.parametrize("row", ROWS, ids=[f"row {row['n']}" for row in ROWS])
def test_each_row_names_tests_that_there_are(row: dict[str, Any]) -> None:
    for name in row["tests"]:
        file, _, rest = name.partition("::")
        function, _, case = rest.partition("[")
        assert (TESTS / file).is_file(), name
        source, known = functions(TESTS / file)
        assert not function or function in known, name
        assert not case or f'"{case.removesuffix("]")}' in source, name


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def test_9_a_name_of_a_tensor_is_only_a_name(model: Path, text: Path, tmp_path: Path) -> None:
    evil = "../../x\n\x1b[31m\0" + "y" * 65_536
    tensors(model, lambda found: found.update({evil: torch.zeros(1)}))
    before = sorted(tmp_path.rglob("*"))
    result = quantize(model, text, tmp_path / "out")
    refused(result, 3, "1 tensors do not belong", r"../../x\n\x1b[31m\x00")
    assert len(result.stderr) < 1000
    assert sorted(tmp_path.rglob("*")) == before


def test_12_a_wrong_total_size_changes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    assert quantize(model, text, tmp_path / "plain").exit_code == 0
    places = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    index = {"metadata": {"total_size": 10**15}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert quantize(model, text, tmp_path / "out").exit_code == 0
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "plain")["model.safetensors"]


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "an activation that there is not": {"hidden_act": "evil"},
    "no heads": {"num_key_value_heads": 0},
    "fewer than no heads": {"num_attention_heads": -1},
    "heads of no size": {"head_dim": 0},
    "a size beyond 64 bits": {"hidden_size": 2**70},
    "a vocabulary beyond memory": {"vocab_size": 2**62},
    "a vocabulary below nothing": {"vocab_size": -1},
    "an empty vocabulary": {"vocab_size": 0},
    "padding beyond the vocabulary": {"pad_token_id": 10**6},
    "rotary embeddings that there are not": {"rope_scaling": {"rope_type": "evil"}},
    "rotary embeddings of text": {"rope_scaling": {"rope_type": "yarn", "factor": "x"}},
    "a config in the config": {"text_config": {"model_type": "llama"}},
    "a model that writes no text": {"model_type": "clip"},
    "two models in one": {"model_type": "encoder-decoder"},
    "a model with parts of its own": {"model_type": "musicgen"},
    "more layers than tensors": {"num_hidden_layers": 10**6},
    "no number": {"rms_norm_eps": float("nan")},
    "a dtype that is none": {"dtype": "evil"},
    "a tokenizer that is none": {"tokenizer_class": "os.system"},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_17_a_config_of_impossible_values_is_refused_in_a_line(
    name: str, model: Path, text: Path, tmp_path: Path
) -> None:
    config(model, **IMPOSSIBLE[name])
    before = contents(tmp_path)
    refused(quantize(model, text, tmp_path / "out"), 3, "config.json")
    refused(run("evaluate", model, "--data", text, "--seq-len", 64), 3, "config.json")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "mxfp4", None])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_19_what_is_quantized_already_is_named(
    method: str | None, key: str, model: Path, text: Path, tmp_path: Path
) -> None:
    config(model, **{key: {"quant_method": method, "bits": 4}})
    refused(quantize(model, text, tmp_path / "out"), 3, "already quantized", method or "unnamed", "use the original")
    assert not (tmp_path / "out").exists()


def test_32_a_parametrized_layer_is_refused_and_a_bias_is_kept() -> None:
    model = tiny.make("qwen2")  # whose queries, keys and values have a bias
    bias = model.model.layers[0].self_attn.q_proj.bias
    with torch.no_grad():
        bias.fill_(0.3)
    api.quantize(model, "rtn", group_size=32)
    assert torch.equal(bias, torch.full_like(bias, 0.3))
    parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.down_proj.*parametriz"):
        check.check_plain(model)
    with pytest.raises(ModelError, match="parametriz"):  # else it would be computed anew from what was not quantized
        api.quantize(model, "rtn", group_size=32)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 1},
        {"hidden_size": 6, "intermediate_size": 5, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 2},
        {"hidden_size": 2, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2},
    ],
    ids=["one block", "odd", "nearly nothing"],
)
def test_34_a_model_of_one_block_or_odd_sizes_works(sizes: dict[str, int], tmp_path: Path) -> None:
    ids = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    model = tiny.make("llama", **sizes)
    result = api.quantize(
        model, "gptq", group_size=-1, calibration=ids, samples=2, seq_len=16, out=tmp_path / "out", format="native"
    )
    assert len(result.layers) == 7 * model.config.num_hidden_layers
    loaded = quantforge.load(tmp_path / "out", packed=False)
    for ours, theirs in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.isfinite(theirs).all()
        assert torch.allclose(ours, theirs.float(), atol=1e-2)


def test_34_a_model_without_blocks_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    config(model, num_hidden_layers=0)
    kept = {name: t for name, t in load_file(model / "model.safetensors").items() if ".layers." not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    refused(quantize(model, text, tmp_path / "out"), 3)
    assert not (tmp_path / "out").exists()


TOKENIZERS: dict[str, tuple[str, bytes]] = {
    "no tokenizer": ("tokenizer.json", b"{}"),
    "no text": ("tokenizer.json", b"\xff" * 100),
    "nested deeply": ("tokenizer.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a list": ("tokenizer_config.json", b"[]"),
    "a config nested deeply": ("tokenizer_config.json", b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "tokens in a list": ("added_tokens.json", b'["a"]'),
    "a generation config that is a list": ("generation_config.json", b"[]"),
    "a generation config nested deeply": ("generation_config.json", b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "a class that needs a package": ("tokenizer_config.json", b'{"tokenizer_class": "BertJapaneseTokenizer"}'),
    "a class that is no tokenizer": ("tokenizer_config.json", b'{"tokenizer_class": "Trainer"}'),
    "a file of another kind": ("tokenizer_config.json", b'{"gguf_file": "/etc/passwd"}'),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_50_a_tokenizer_that_cannot_be_used_is_refused(name: str, model: Path, text: Path, tmp_path: Path) -> None:
    file, content = TOKENIZERS[name]
    (model / file).write_bytes(content)
    before = contents(tmp_path)
    refused(quantize(model, text, tmp_path / "out"), 3, "model" if "class that needs" in name else "")
    assert contents(tmp_path) == before


def task(folder: Path, **changes: Any) -> None:
    raw = {
        "task": "mine",
        "output_type": "multiple_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": "items.jsonl"},
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_choice": "answers",
        "doc_to_target": "label",
        **changes,
    }
    folder.mkdir()
    (folder / "mine.yaml").write_text(yaml.safe_dump(raw))
    (folder / "items.jsonl").write_text('{"question": "What?", "answers": ["a", "b"], "label": 1}\n')


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in [[[]]] recursive %}{{ loop(i) }}{% endfor %}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% include '/etc/passwd' %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
)
def test_51_templates_of_tasks_end(template: str, tmp_path: Path) -> None:
    task(tmp_path / "tasks", doc_to_text=template)
    refused(run("evaluate", TINY, "--task-dir", tmp_path / "tasks"), 4, "mine.yaml")


def test_55_a_task_file_that_makes_objects_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task(tmp_path / "tasks")
    (tmp_path / "tasks" / "evil.yaml").write_text("task: evil\nx: !!python/object/apply:os.system ['touch ran']\n")
    refused(run("evaluate", TINY, "--task-dir", tmp_path / "tasks"), 4, "evil.yaml", "tag")
    assert not (tmp_path / "ran").exists()


def test_57_a_pattern_of_many_stars_ends(text: Path, tmp_path: Path) -> None:
    stars = "*a" * 40 + "*b:bits=8"
    refused(quantize(TINY, text, tmp_path / "out", "--override", stars), 2, "*a*a")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["with a space", "語 ütf", "-o", "--json", "n" * 255, "a/", "../up", "x\ny", "$(id)"])
def test_59_odd_paths_work_on_the_command_line(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    shutil.copytree(TINY, place / name)
    monkeypatch.chdir(place)
    given = ["--method", "rtn", "--group-size", 32, "--calib", text, f"--out={name.rstrip('/')[:240]}.out"]
    result = run("quantize", *given, "--", name)
    assert result.exit_code == 0, result.stderr
    assert (place / f"{name.rstrip('/')[:240]}.out" / "model.safetensors").is_file()
    assert result.stdout.replace("\n", "").isprintable()


def test_60_and_72_a_bare_environment_is_enough(text: Path, tmp_path: Path) -> None:
    """A process with few open files, no HOME, no place for temporary files, and an output that lacks letters."""
    shutil.copytree(TINY, tmp_path / "→ model")
    bare = {
        "PATH": "/usr/bin:/bin",
        "PYTHONIOENCODING": "cp1252",
        "TMPDIR": str(tmp_path / "none"),
        "OMP_NUM_THREADS": "1",
    }
    bare |= {"QUANTFORGE_CACHE": "", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = f"ulimit -n 64; exec {sys.executable} -m quantforge quantize '{tmp_path}/→ model' -m rtn --group-size 32 "
    command += f"--calib {text} --samples 2 --seq-len 64 --out {tmp_path}/out <&-"
    ended = subprocess.run(["/bin/sh", "-c", command], env=bare, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode("cp1252")
    assert b"\\u2192 model: rtn" in ended.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process of another user")
def test_62_a_place_that_cannot_be_written_is_refused_before_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "model", lambda *a, **k: pytest.fail("weights were read"))
    file = tmp_path / "file"
    file.write_text("precious")
    for out in (file / "out", Path("/proc/out"), Path("/dev/null/out")):
        refused(quantize(TINY, text, out), 5)
    assert file.read_text() == "precious"


def test_61_a_damaged_output_is_replaced_though_its_record_is_that_of_the_new_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power loss between the last commit and the new output's name."""
    out = tmp_path / "out"
    assert quantize(TINY, text, out).exit_code == 0
    whole = contents(out)
    (out / "model.safetensors").write_bytes(whole["model.safetensors"][:-1])
    monkeypatch.setattr("quantforge.journal.finished", lambda out: True)
    assert quantize(TINY, text, out, "--overwrite").exit_code == 0
    assert contents(out)["model.safetensors"] == whole["model.safetensors"]


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_63_and_64_a_disk_that_fails_costs_no_finished_work(
    fault: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    monkeypatch.setenv("QUANTFORGE_COMMIT_SECONDS", "0")
    assert quantize(TINY, text, out).exit_code == 0
    whole = contents(out)
    # in the middle of the work, then with all work done and the output to be named
    for point in ("object.write:3+", "staging.sync:1+"):
        monkeypatch.setenv("QUANTFORGE_FAILPOINT", f"{point}:{fault}")
        refused(quantize(TINY, text, out, "--overwrite"), 5)
        assert contents(out) == whole
        assert sorted(p.name for p in out.parent.iterdir()) == ["out", "out.qf"]
    monkeypatch.delenv("QUANTFORGE_FAILPOINT")
    assert quantize(TINY, text, out, "--overwrite").exit_code == 0
    assert contents(out) == whole
    assert [p.name for p in out.parent.iterdir()] == ["out"]


LACKS: dict[str, tuple[BaseException, str]] = {
    "memory of the processor": (MemoryError(), "memory"),
    "memory that torch asks for": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        "memory",
    ),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
    "a GPU that is gone": (
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        "CUDA error",
    ),
}


@pytest.mark.parametrize("name", LACKS)
def test_69_and_71_what_a_device_lacks_is_a_line_and_nothing_is_lost(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in the middle of the layers, with those before it committed."""
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    monkeypatch.setenv("QUANTFORGE_COMMIT_SECONDS", "0")
    solver = type(recipe.load("rtn").solver)
    plain, calls = solver.solve, [0]

    def failing(self: Any, problem: Any) -> Any:
        calls[0] += 1
        if calls[0] == 12:
            raise LACKS[name][0]
        return plain(self, problem)

    monkeypatch.setattr(solver, "solve", failing)
    refused(quantize(TINY, text, out), 5, LACKS[name][1])
    assert [p.name for p in out.parent.iterdir()] == ["out.qf"]
    started = calls[0]
    assert quantize(TINY, text, out).exit_code == 0
    assert calls[0] - started < 28  # layers, some of which were done
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert quantize(TINY, text, tmp_path / "whole").exit_code == 0
    assert contents(out)["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]


def _weights(model: Path, dtype: torch.dtype | None = None) -> None:
    """Change one weight of a model, or round all of them."""
    file = model / "model.safetensors"
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in load_file(file).items()}
    tensors[LAYER][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    if dtype is not None:
        _in_json(model / "config.json", dtype=str(dtype).removeprefix("torch."))


def _in_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


CHANGED: dict[str, tuple[str, Callable[[Path, Path], object], tuple[object, ...]]] = {
    "weights": ("model was", lambda model, text: _weights(model), ()),
    "config": ("config was", lambda model, text: _in_json(model / "config.json", rms_norm_eps=1e-4), ()),
    "dtype": ("dtype was 'bfloat16', is 'float16'", lambda model, text: _weights(model, torch.float16), ()),
    "tokenizer": (
        "tokenizer was",
        lambda model, text: _in_json(model / "tokenizer_config.json", model_max_length=99),
        (),
    ),
    "text": ("token ids was", lambda model, text: text.write_text("Other words. " * 80, encoding="utf-8"), ()),
    "seed": ("calibration seed was '0', is '1'", lambda model, text: None, ("--seed", 1)),
    "shuffle": ("calibration shuffle was 'False', is 'True'", lambda model, text: None, ("--shuffle",)),
    "samples": ("calibration count was '2', is '1'", lambda model, text: None, ("--samples", 1)),
    "bits": ("recipe was", lambda model, text: None, ("--bits", 3)),
    "damping": ("recipe was", lambda model, text: None, ("--set", "solver.damp_percent=0.05")),
    "format": ("format was '', is 'gptq'", lambda model, text: None, ("--format", "gptq")),
    "method": ("method was 'gptq', is 'gptaq'", lambda model, text: None, ("-m", "gptaq")),
    "quantforge": ("quantforge was", lambda model, text: None, ()),
    "torch": ("torch was", lambda model, text: None, ()),
    "transformers": ("transformers was", lambda model, text: None, ()),
}


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory) -> Path:
    """Return a folder with a model, a text, what a run makes of them (whole), and a run that broke off (out.qf)."""
    place = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(TINY, place / "model")
    (place / "text.txt").write_text("Statements are comprised within a single line. " * 10, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTFORGE_COMMIT_SECONDS", "0")
        assert _begin(place, "whole").exit_code == 0
        patch.setattr("quantforge.pipeline.solve", functools.partial(_broken, [6]))
        assert _begin(place, "out").exit_code == 70
    return place


def _begin(place: Path, out: str, *more: object) -> Result:
    return quantize(place / "model", place / "text.txt", place / out, *(more or ("-m", "gptq")), "--symmetric")


def _contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "LOCK")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("changed", CHANGED)
def test_67_each_input_that_changed_is_named_and_nothing_is_done(unfinished, monkeypatch, changed):
    named, change, more = CHANGED[changed]
    before = _contents(unfinished)
    change(unfinished / "model", unfinished / "text.txt")
    if changed == "quantforge":
        monkeypatch.setattr("quantforge.runs.__version__", "9")
    elif changed in ("torch", "transformers"):
        monkeypatch.setattr(f"quantforge.runs.{changed}.__version__", "9")
    refused = _begin(unfinished, "out", *(("-m", "gptq", *more) if "-m" not in more else more))
    for name in ("text.txt", *(name for name in before if name.startswith("model/"))):
        (unfinished / name).write_bytes(before[name])
    assert refused.exit_code == 6, refused.stderr
    assert f"QF-600]: the unfinished run of {unfinished / 'out'} had other inputs: " in refused.stderr
    assert named in refused.stderr
    assert refused.stderr.rstrip().endswith("give --restart to throw it away, or what it began with to go on.")
    assert _contents(unfinished) == before


def test_67_with_its_own_inputs_the_run_goes_on_to_the_same_files(unfinished, tmp_path):
    kept = shutil.copytree(unfinished / "out.qf", tmp_path / "kept")
    assert _begin(unfinished, "out").exit_code == 0
    assert _contents(unfinished / "out") == _contents(unfinished / "whole")
    shutil.rmtree(unfinished / "out")
    shutil.copytree(kept, unfinished / "out.qf")


def _broken(left: list[int], *args: Any, **more: Any) -> Any:
    """Solve stages until so many are done, and then fail."""
    left[0] -= 1
    if left[0] < 0:
        raise KeyError("broken off")
    return pipeline_solve(*args, **more)
