"""`--format`: the container that the user names is demanded of the method's format before anything is solved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor, nn

import quantforge
from quantforge import cli, exporters, pipeline, recipe, registry
from quantforge.errors import PlanError, RecipeError
from quantforge.exporters.awq import Awq
from quantforge.exporters.bitsandbytes import Bitsandbytes
from quantforge.exporters.bitsandbytes8 import Bitsandbytes8
from quantforge.exporters.gptq import Gptq
from quantforge.exporters.native import Native
from quantforge.models import tiny
from quantforge.numerics.formats import Format
from quantforge.plan import Plan

TINY = Path(__file__).parent / "data" / "tiny-llama"
IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
RTN = ("quantize", TINY, "--method", "rtn", "--group-size", 32)


def run(*args: object) -> Result:
    """Run the command line in this process; an exception that is no clean exit is raised."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def method_of(folder: Path) -> str:
    found: str = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    return found


@pytest.mark.parametrize(
    ("more", "stored"),
    [
        (("--format", "gptq"), "int4-g32-sym-fp16"),
        (("--format", "gptq", "--bits", 8), "int8-g32-sym-fp16"),
        (("--format", "gptq", "--group-size", -1), "int4-channel-sym-fp16"),
        (("--format", "gptq", "--method", "gptq", "--calib", "self"), "int4-g32-sym-fp16"),
        (("--format", "gptq", "--weights", "int4-g64-sym", "--group-size", 64), "int4-g64-sym-fp16"),
        (("--format", "awq"), "int4-g32-asym-fp16"),
        (("--format", "awq", "--weights", "int4-g64-asym", "--group-size", 128), "int4-g128-asym-fp16"),
        (("--format", "gguf"), "int4-g32-asym-fp16-min-fp16"),
        (("--format", "gguf", "--symmetric"), "int4-g32-sym-fp16"),
        (("--format", "gguf", "--bits", 8), "int8-g32-sym-fp16"),
        (("--format", "compressed-tensors", "--bits", 3), "int3-g32-asym-bf16"),
        (("--format", "native", "--symmetric"), "int4-g32-sym-bf16"),
    ],
)
def test_a_dry_run_shows_what_the_container_makes_of_the_methods_format(more, stored):
    record = json.loads(run(*RTN, "--dry-run", "--json", *more).stdout)
    assert record["container"] == more[1]
    assert {row["format"] for row in record["layers"]} == {stored}
    assert f"MB in {more[1]}" in run(*RTN, "--dry-run", *more).stdout


def test_without_it_nothing_is_said_of_a_container():
    record = json.loads(run(*RTN, "--dry-run", "--json").stdout)
    assert "container" not in record
    assert {row["format"] for row in record["layers"]} == {"int4-g32-asym-bf16"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--format", "gptqq"), r"QF-201.*'gptq'\?"),
        (("--format", "bitsandbytes8"), r"QF-201.*'bitsandbytes'\?"),
        (("--format", "gptq", "--asymmetric"), "QF-253.*int4-g32-asym-fp16 .*awq holds 4 bits with them"),
        (("--format", "gptq", "--weights", "int4-g32-asym"), "QF-253.*int4-g32-asym-fp16"),
        (("--format", "awq", "--symmetric"), "QF-253.*int4-g32-sym-fp16 .*gptq holds 4 and 8 bits without them"),
        (("--format", "awq", "--override", "down_proj:symmetric=yes"), "QF-253.*int4-g32-sym-fp16 of .*down_proj"),
        (("--format", "gguf", "--group-size", 64), "QF-253.*blocks of 32, not .* leave --group-size out"),
        (("--format", "gguf", "--bits", 8, "--asymmetric"), "QF-253.*leave --asymmetric out"),
        (("--format", "bitsandbytes"), "QF-253.*nf4, nf4-dq, fp4, fp4-dq"),
        (
            ("--format", "compressed-tensors", "--method", "nf4", "--group-size", 64),
            "QF-253.*compressed-tensors cannot",
        ),
    ],
)
def test_what_contradicts_the_container_is_refused_before_the_work(more, said, tmp_path):
    for last in (("--dry-run",), ("--out", tmp_path / "out")):
        result = run(*RTN, *more, *last)
        assert result.exit_code == 2
        assert re.search(said, result.stderr)
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_refusal_comes_without_a_folder_to_write_to_as_well():
    with pytest.raises(PlanError, match="cannot hold"):
        quantforge.quantize(tiny.make("llama"), "rtn", group_size=32, symmetric=False, format="gptq")


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_the_command_writes_what_it_is_asked_for(name, tmp_path):
    assert run(*RTN, "--format", name, "--out", tmp_path / "out").exit_code == 0
    assert method_of(tmp_path / "out") == name
    record = json.loads((tmp_path / "out" / "quantforge.json").read_text())
    assert record["format"] == {"gptq": "int4-g32-sym-fp16", "awq": "int4-g32-asym-fp16"}[name]
    assert ("quantize_config.json" in record["files"]) == (name == "gptq")
    assert any("holds floats in float16, and those of the model are in bfloat16" in note for note in record["notes"])


def test_naming_the_container_that_is_chosen_anyway_changes_no_byte(tmp_path):
    for name, more in (("plain", {}), ("named", {"format": "compressed-tensors"})):
        quantforge.quantize(tiny.make("llama", dtype=torch.bfloat16), "rtn", out=tmp_path / name, group_size=32, **more)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "named" / file).read_bytes()


def test_overrides_become_what_the_container_holds_too():
    chosen = recipe.load(
        "rtn", overrides={"down_proj": {"group_size": 32}, "o_proj": {"symmetric": False}}, fix=Gptq().fix
    )
    assert [str(other.weights.with_scale(torch.float16)) for _, other in chosen.overrides] == [
        "int4-g32-sym-fp16",
        "int4-g64-asym-fp16",
    ]


def test_a_fix_is_the_same_twice_and_leaves_alone_what_it_does_not_know():
    for exporter in (Gptq(), Awq(), Bitsandbytes(), Native()):
        for text in ("int4-g64-asym", "int8-channel-sym", "nf4", "e4m3-channel", "int3-g32-asym", "hqq3-g64"):
            fmt = recipe.load("rtn", weights=text).weights
            fixed = exporter.fix(fmt)
            assert exporter.fix(fixed) == fixed
            assert fixed.grid == fmt.grid
    assert Gptq().fix(recipe.load("rtn", weights="hqq3-g64").weights).zero == torch.float32


def quantized(**more: Any) -> quantforge.result.Result:
    return quantforge.quantize(tiny.make("llama", dtype=torch.float16), "rtn", group_size=32, **more)


def test_a_result_is_saved_in_the_format_it_was_made_for_or_in_another_that_holds_it(tmp_path):
    result = quantized(format="gptq")
    assert method_of(result.save(tmp_path / "made for")) == "gptq"
    assert method_of(result.save(tmp_path / "other", "compressed-tensors")) == "compressed-tensors"
    assert method_of(result.save(tmp_path / "own", format="native")) == "quantforge"
    with pytest.raises(PlanError, match="gptq holds 4 and 8 bits"):
        result.save(tmp_path / "no", format="awq")
    with pytest.raises(RecipeError, match="did you mean 'native'"):
        result.save(tmp_path / "no", format="nativ")
    plain = quantized(symmetric=True)
    assert method_of(plain.save(tmp_path / "plain")) == "compressed-tensors"
    assert method_of(plain.save(tmp_path / "later", format="gptq")) == "gptq"
    assert not (tmp_path / "no").exists()


def test_bitsandbytes_stands_for_both_of_its_widths(tmp_path):
    nf4 = quantforge.quantize(
        tiny.make("llama", intermediate_size=128), "nf4", format="bitsandbytes", out=tmp_path / "four"
    )
    settings = {"inputs.dynamic": True}
    eight = quantforge.quantize(
        tiny.make("llama"),
        "llm-int8",
        calibration=IDS,
        settings=settings,
        format="bitsandbytes",
        out=tmp_path / "eight",
    )
    assert isinstance(exporters.choose(nf4.plan), Bitsandbytes)
    assert isinstance(exporters.choose(eight.plan), Bitsandbytes8)
    told = [json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("four", "eight")]
    assert [config["load_in_8bit"] for config in told] == [False, True]
    with pytest.raises(PlanError, match=r"not experts such as .*native can"):
        quantforge.quantize(tiny.make("mixtral"), "nf4", format="bitsandbytes")


def test_floats_beyond_float16_are_found_out_before_anything_is_solved(monkeypatch):
    model = tiny.make("llama")
    model.model.norm.weight.data[3] = 1e5
    monkeypatch.setattr(pipeline, "quantize", None)
    with pytest.raises(
        PlanError, match=r"model\.norm\.weight holds 1e\+05, beyond the 65504 of float16.*compressed"
    ) as e:
        quantforge.quantize(model, "rtn", group_size=32, format="gptq")
    assert e.value.number == 286


def test_a_result_that_does_not_fit_into_float16_is_not_saved_so(tmp_path):
    result = quantized(symmetric=True)
    result.model.float().model.norm.weight.data[3] = -1e5
    with pytest.raises(PlanError, match=r"model\.norm\.weight holds 1e\+05"):
        result.save(tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_quantized_may_be_of_any_size(tmp_path):
    model = tiny.make("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 7e4
    result = quantforge.quantize(model, "rtn", group_size=32, format="gptq", out=tmp_path / "out")
    stored = Gptq().read(
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"],
        load_file(tmp_path / "out" / "model.safetensors"),
    )["model.layers.0.mlp.up_proj"]
    assert torch.equal(stored.dequantize(), result.model.model.layers[0].mlp.up_proj.weight)


@dataclass(frozen=True)
class OneFile:
    """An exporter that writes its own file."""

    def takes(self, plan: Plan) -> bool:
        return True

    def refuses(self, plan: Plan) -> str | None:
        return None

    def fix(self, fmt: Format) -> Format:
        return replace(fmt, symmetric=True)

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        return own, torch.float16

    def refuses_tokenizer(self, tokenizer: Any) -> str | None:
        return None

    def notes(self, config: Any, tokenizer: Any) -> list[str]:
        return ["one file"]

    def tensors(self, name: str, weight: Any) -> dict[str, Tensor]:
        raise AssertionError("its tensors are not asked for")

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        return {}

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {}

    def write(
        self,
        folder: Path,
        model: nn.Module,
        plan: Plan,
        layers: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        tokenizer: Any,
        source: str,
    ) -> None:
        assert not list(folder.iterdir())
        assert list(layers) == list(plan.layers)
        assert tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]
        assert not any(f"{name}.weight" in tensors for name in layers)
        assert {x.dtype for x in tensors.values()} == {plan.dtype} == {torch.bfloat16}
        assert {weight.base.scale.dtype for weight in layers.values()} == {torch.float16}
        (folder / "model.one").write_text(f"{source}: {model.config.model_type}", encoding="utf-8")


def test_an_exporter_may_write_its_weights_itself(tmp_path, monkeypatch):
    registry.names("exporter")  # what is built in has to be there first
    monkeypatch.setattr(registry, "_TABLE", {**registry._TABLE, ("exporter", "one-file"): OneFile})
    model = tiny.make("llama", dtype=torch.bfloat16)
    folder = tmp_path / "out"
    quantforge.quantize(model, "rtn", group_size=32, format="one-file", out=folder)
    assert (folder / "model.one").read_text() == "LlamaForCausalLM: llama"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    record = json.loads((folder / "quantforge.json").read_text())
    assert record["files"] == ["config.json", "generation_config.json", "model.one"]
    assert record["format"] == record["layers"][0]["format"] == "int4-g32-sym-fp16"
