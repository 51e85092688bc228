"""A checkpoint in another container holds the same numbers, or is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

import quantforge
from quantforge import checkpoint
from quantforge.cli.convert import convert as command
from quantforge.conversion import convert, prepare, recast
from quantforge.errors import ModelError, PlanError, QuantForgeError, RecipeError
from quantforge.models import tiny
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.grids import int_grid
from quantforge.numerics.qtensor import QTensor, fit, quantize
from quantforge.stored import open_folder, read_layers

TINY = Path(__file__).parent / "data" / "tiny-llama"
IDS = torch.arange(3, 99).view(4, 24)
SOURCES: dict[str, dict[str, Any]] = {
    "sym": {"method": "gptq", "weights": "int4-g64-sym", "calibration": IDS},
    "asym": {"method": "rtn", "weights": "int4-g64-asym"},
    "int8": {"method": "rtn", "weights": "int8-g32-sym"},
    "row": {"method": "rtn", "weights": "int4-channel-sym"},
    "nf4": {"method": "nf4"},
    "flat": {"method": "rtn", "weights": "nf4"},
    "w8a8": {"method": "rtn", "weights": "int8-channel-sym", "inputs": "int8-token"},
    "lorc": {"method": "rtn+lorc", "weights": "int4-g32-sym", "calibration": IDS},
    "spqr": {"method": "spqr", "calibration": IDS},
    "gptq": {"method": "rtn", "format": "gptq", "bits": 4, "group_size": 64},
    "awq": {"method": "rtn", "format": "awq", "bits": 4, "group_size": 64},
    "q4_0": {"method": "rtn", "format": "gguf", "bits": 4, "symmetric": True},
    "q4_1": {"method": "rtn", "format": "gguf", "bits": 4},
    "q8_0": {"method": "rtn", "format": "gguf", "bits": 8},
}
HELD = [
    *(("sym", name) for name in ("gptq", "awq", "gguf", "native", "compressed-tensors")),
    *(("asym", name) for name in ("awq", "native")),
    *(("int8", name) for name in ("gptq", "gguf", "native")),
    *(("row", name) for name in ("gptq", "awq", "gguf")),
    *(("nf4", name) for name in ("native", "bitsandbytes")),
    *(("flat", name) for name in ("native", "bitsandbytes")),
    *(("w8a8", "native"), ("lorc", "native"), ("lorc", "gptq")),
    *((name, to) for name in ("gptq", "q4_0") for to in ("compressed-tensors", "awq", "native")),
    *(("awq", "compressed-tensors"), ("q8_0", "gptq"), ("q8_0", "compressed-tensors"), ("q4_1", "native")),
]
REFUSED = {
    ("asym", "gptq"): "zero points",
    ("asym", "bitsandbytes"): "nf4",
    ("nf4", "compressed-tensors"): "compressed-tensors cannot hold",
    ("nf4", "gptq"): "gptq cannot hold",
    ("nf4", "gguf"): "GGUF",
    ("w8a8", "gptq"): "rounded inputs",
    ("w8a8", "gguf"): "rounded inputs",
    ("spqr", "compressed-tensors"): "compressed-tensors cannot hold",
    ("q4_1", "compressed-tensors"): "compressed-tensors cannot hold",
    ("q4_0", "bitsandbytes"): "bitsandbytes cannot hold",
    ("lorc", "gguf"): "beside the codes",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Callable[[str], Path]:
    """Return what makes a checkpoint of each kind, once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("sources") / name
            quantforge.quantize(TINY, **SOURCES[name], out=made[name])
        return made[name]

    return make


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """Return every weight of the model in `folder` in float32, its layers dequantized."""
    layers, tensors = read_layers(open_folder(folder))
    return {n: w.dequantize() for n, w in layers.items()} | {n: t.float() for n, t in tensors.items()}


@pytest.mark.parametrize(("source", "container"), HELD)
def test_the_numbers_are_the_same_bit_for_bit(sources, tmp_path, source, container):
    made = convert(sources(source), container, tmp_path / "out")
    old, new = numbers(sources(source)), numbers(tmp_path / "out")
    assert sorted(old) == sorted(new)
    for name in old:
        assert torch.equal(old[name], new[name]), name
    found = open_folder(tmp_path / "out").container
    assert found.removesuffix("8") == container == made.after
    before, after = (checkpoint.read_record(f) for f in (sources(source), tmp_path / "out"))
    assert [r["loss"] for r in before["layers"]] == [r["loss"] for r in after["layers"]]
    assert before["method"] == after["method"]


@pytest.mark.parametrize(("source", "container"), [("sym", "gptq"), ("sym", "gguf"), ("nf4", "native")])
def test_there_and_back_is_the_same_model(sources, tmp_path, source, container):
    home = open_folder(sources(source)).container
    convert(sources(source), container, tmp_path / "there")
    convert(tmp_path / "there", home, tmp_path / "back")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        old, new = (checkpoint.read(f, torch.float32)(ids).logits for f in (sources(source), tmp_path / "back"))
    assert torch.equal(old, new)


def test_how_a_model_generates_goes_with_it(tmp_path):
    model = tiny.make("llama", dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[2, 107], repetition_penalty=1.3, do_sample=False)
    quantforge.quantize(model, "rtn", weights="int4-g32-sym", out=tmp_path / "in")
    for container in ("native", "gguf"):
        convert(tmp_path / "in", container, tmp_path / container)
        found = GenerationConfig.from_pretrained(tmp_path / container)
        assert (found.eos_token_id, found.repetition_penalty) == ([2, 107], 1.3)


def test_how_a_model_generates_may_be_what_transformers_warns_of(sources, tmp_path):
    shutil.copytree(sources("sym"), tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    convert(tmp_path / "in", "native", tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.5


@pytest.mark.parametrize(("source", "container"), REFUSED)
def test_what_a_container_cannot_hold_is_refused_with_the_reason(sources, tmp_path, source, container):
    with pytest.raises(PlanError) as caught:
        convert(sources(source), container, tmp_path / "out")
    assert REFUSED[source, container] in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("container", ["gptq", "awq", "gguf"])
def test_a_scale_that_float16_lacks_is_refused_and_its_layer_named(tmp_path, container):
    model = tiny.make("llama", dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e-7)
    quantforge.quantize(model, "rtn", weights="int4-g32-sym", out=tmp_path / "in")
    with pytest.raises(PlanError, match=r"QF-290.*layers\.1\.mlp\.up_proj.*is no number of float16"):
        prepare(tmp_path / "in", container)


def test_minima_that_float16_lacks_are_refused(tmp_path):
    model = tiny.make("llama", dtype=torch.float32)
    quantforge.quantize(model, "rtn", weights="int4-g32-asym-fp16", out=tmp_path / "in")
    with pytest.raises(PlanError, match=r"QF-290.*(minimum|scale) .* is no number of float16"):
        prepare(tmp_path / "in", "gguf")


def test_floats_that_float16_lacks_stay_as_they_are(tmp_path):
    model = tiny.make("llama", dtype=torch.bfloat16)
    model.model.embed_tokens.weight.data[5, 5] = 1e-30
    quantforge.quantize(model, "rtn", weights="int4-g32-sym", out=tmp_path / "in")
    made = convert(tmp_path / "in", "gptq", tmp_path / "out")
    assert "embed_tokens" in made.notes[0]
    assert float(numbers(tmp_path / "out")["model.embed_tokens.weight"][5, 5]) == float(torch.tensor(1e-30).bfloat16())


def test_a_dry_run_writes_nothing_and_refuses_the_same(sources, tmp_path):
    made = prepare(sources("sym"), "gptq")
    assert {str(b) for _, b in made.formats.values()} == {"int4-g64-sym-fp16"}
    assert "compressed-tensors -> gptq" in made.text()
    with pytest.raises(PlanError):
        prepare(sources("asym"), "gptq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "container", "out", "error"),
    [
        ("sym", "gtpq", "out", RecipeError),
        ("sym", "gptq", "there", PlanError),
        ("absent", "gptq", "out", QuantForgeError),
        ("float", "gptq", "out", ModelError),
        ("sym", "gptq", "inside", PlanError),
    ],
)
def test_what_is_asked_wrongly_is_one_line(sources, tmp_path, folder, container, out, error):
    (tmp_path / "there").mkdir()
    place = {"absent": tmp_path / "absent", "float": TINY}.get(folder) or sources(folder)
    with pytest.raises(error) as caught:
        convert(place, container, place / "x" if out == "inside" else tmp_path / out)
    assert "\n" not in str(caught.value)
    assert "gptq" in str(caught.value) or container == "gptq"


def test_a_damaged_checkpoint_is_not_converted(sources, tmp_path, change_tensors):
    out = tmp_path / "in"
    quantforge.quantize(TINY, **SOURCES["sym"], out=out)
    change_tensors(out, lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale"))
    with pytest.raises(ModelError, match="up_proj lacks weight_scale"):
        convert(out, "gptq", tmp_path / "out")


def test_the_command_converts_shows_and_overwrites(sources, tmp_path):
    arguments = [str(sources("sym")), "--format", "gptq", "--out", str(tmp_path / "out")]
    dry = CliRunner().invoke(command, [*arguments, "--dry-run"])
    assert dry.exit_code == 0
    assert "that quantforge wrote" in " ".join(CliRunner().invoke(command, ["--help"]).stdout.split())
    assert "int4-g64-sym-bf16 -> int4-g64-sym-fp16" in dry.stdout
    assert not (tmp_path / "out").exists()
    told = CliRunner().invoke(command, [*arguments, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["to"] == "gptq"
    assert (tmp_path / "out" / "quantize_config.json").is_file()
    again = CliRunner().invoke(command, arguments)
    assert isinstance(again.exception, PlanError)
    assert CliRunner().invoke(command, [*arguments, "--overwrite"]).exit_code == 0


def matrix(fmt: Format, rows: int, cols: int, seed: int) -> QTensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).mul(0.1)
    return quantize(x, fit(x, fmt), fmt)


@given(
    st.integers(2, 8),
    st.sampled_from([None, 8, 16, 32]),
    st.sampled_from([None, 8, 16, 32]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 9),
)
def test_recast_keeps_every_number_or_refuses(bits, old, new, symmetric, wanted, rows, seed):
    grid = int_grid(bits)
    q = matrix(Format(grid, (1, old), symmetric, torch.bfloat16), rows, 64, seed)
    fmt = Format(grid, (1, new), wanted, torch.float32)
    fits = (old or 64) % (new or 64) == 0 and (symmetric or not wanted)
    try:
        made = recast(q, fmt)
    except ValueError:
        assert not fits
        return
    assert made.format == fmt
    assert torch.equal(made.dequantize(torch.float32), q.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("int4-g32-sym", "int3-g32-sym", "not all values of int3"),
        ("int4-g32-sym", "nf4-g32", "not all values of nf4"),
        ("int4-g32-asym", "int4-g32-sym", "zero points"),
        ("int4-g32-sym", "int4-g64-sym", "do not make up"),
        ("nf4", "nf4-dq", "are no codes"),
        ("int4-g32-sym-fp32", "int4-g32-sym-bf16", "is no number of bfloat16"),
    ],
)
def test_recast_says_why_it_refuses(old, new, why):
    with pytest.raises(ValueError, match=why):
        recast(matrix(parse(old), 4, 64, 0), parse(new))


def test_a_narrow_format_becomes_a_wider_one():
    q = matrix(parse("int3-g32-sym"), 4, 64, 0)
    made = recast(q, parse("int8-g32-sym"))
    assert torch.equal(made.dequantize(torch.float32), q.dequantize(torch.float32))
