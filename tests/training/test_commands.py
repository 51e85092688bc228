"""`quantforge distill`, `qat` and `qlora`, end to end on a trained tiny model: what comes out is better, and loads."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import quantforge
from quantforge import checkpoint, cli
from quantforge.models import load, tiny
from quantforge.training import results

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
FEW = ("--samples", 32, "--seq-len", 48, "--windows", 4, "--steps", 12, "--batch-size", 4)


def run(*args: object) -> Result:
    """Run the command line in this process; an exception that is no clean exit is raised."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def record(out: Path) -> results.Training:
    return results.from_json((out / "training.json").read_text(encoding="utf-8"))


def perplexity(model: object) -> float:
    return quantforge.evaluate(model, data="python-docs", windows=4).perplexity


@pytest.fixture(scope="module")
def rounded(tmp_path_factory) -> Path:
    """Return a checkpoint at 2 bits, which has forgotten much."""
    out = tmp_path_factory.mktemp("quantized") / "two"
    quantforge.quantize(TINY, "rtn", bits=2, group_size=32, out=out)
    return out


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, rounded) -> Path:
    """Return the folder of a run that trains it."""
    out = tmp_path_factory.mktemp("runs") / "distilled"
    done = run("distill", rounded, "--teacher", TINY, *FEW, "--lr", 0.01, "--texts", 2, "--out", out)
    assert done.exit_code == 0, done.output
    assert "of what was lost is back" in done.stdout
    return out


def test_a_checkpoint_is_trained_to_a_better_one_of_its_format(rounded, distilled):
    made = record(distilled)
    assert made.recovered > 0.1
    assert set(made.trained) == {"scales", "norms"}
    before, after = (perplexity(str(folder)) for folder in (rounded, distilled / "checkpoint"))
    assert after == pytest.approx(made.after.perplexity, rel=1e-5)
    assert before == pytest.approx(made.before.perplexity, rel=1e-5)
    assert perplexity(str(TINY)) == pytest.approx(made.level.perplexity, rel=1e-5)
    old, new = (checkpoint.open_result(folder) for folder in (rounded, distilled / "checkpoint"))
    for one, other in zip(old.layers, new.layers, strict=True):
        assert torch.equal(one.weight.base.codes, other.weight.base.codes)
        assert str(one.weight.base.format) == str(other.weight.base.format)
    assert {p.name for p in (rounded).iterdir()} == {p.name for p in (distilled / "checkpoint").iterdir()}


def test_a_run_is_reported(distilled):
    made = record(distilled)
    assert len(made.steps) == 12
    assert made.tokens == 12 * 4 * 48
    assert made.texts.prompts == 2
    assert made.texts.excess > -1
    assert "Loss by tokens" in (distilled / "training.html").read_text(encoding="utf-8")


def test_stopping_and_resuming_gives_the_same_run(rounded, distilled, tmp_path):
    args = ["distill", rounded, "--teacher", TINY, *FEW, "--lr", 0.01, "--schedule", "constant", "--texts", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*args, "--out", whole)
    run(*args, "--steps", 5, "--out", parts)
    assert record(parts).tokens == 5 * 4 * 48
    assert "--resume" not in record(whole).command
    run(*args, "--out", parts, "--resume")
    assert [s.loss for s in record(parts).steps] == [s.loss for s in record(whole).steps]
    assert record(parts).after == record(whole).after
    files = {p: p.read_bytes() for p in parts.rglob("*") if p.is_file()}
    refused = run(*args, "--out", parts, "--resume", "--lr", 0.02)
    assert refused.exit_code == 2
    assert "lr" in refused.stderr
    assert "0.02" in refused.stderr
    (tmp_path / "other.txt").write_text("Other text than before. " * 400)
    refused = run(*args, "--out", parts, "--resume", "--eval", tmp_path / "other.txt")
    assert refused.exit_code == 2
    assert "evaluation" in refused.stderr
    assert {p: p.read_bytes() for p in parts.rglob("*") if p.is_file()} == files
    assert run(*args, "--out", tmp_path / "nothing", "--resume").exit_code == 2
    assert not (tmp_path / "nothing").exists()
    again = run(*args, "--out", parts)
    assert again.exit_code == 2
    assert len(again.stderr.strip().splitlines()) == 1


def test_a_student_is_quantized_on_the_fly(tmp_path):
    out = tmp_path / "run"
    done = run("distill", TINY, "--teacher", TINY, "--method", "gptq", "--bits", 2, "--group-size", 32,
               "--calib-samples", 4, "--train", "scales,zero-points,norms", *FEW, "--lr", 0.01, "--targets", "kept",
               "--out", out, "--json")  # fmt: skip
    made = results.from_json(done.stdout)
    assert made.method.startswith("gptq-int2-g32")
    assert made.after.loss < made.before.loss
    assert (out / "teacher.safetensors").stat().st_size < 300 * 32 * 48 + 4096


def test_a_student_is_cut_from_its_teacher_and_saved_as_an_ordinary_model(tmp_path):
    out = tmp_path / "run"
    done = run("distill", TINY, "--teacher", TINY, "--blocks", 1, "--loss", "jsd", *FEW, "--lr", 0.003, "--out", out)
    assert done.exit_code == 0, done.output
    made = record(out)
    assert made.after.loss < made.before.loss
    assert load.find(str(out / "checkpoint")).config.num_hidden_layers == 1
    assert perplexity(str(out / "checkpoint")) == pytest.approx(made.after.perplexity, rel=1e-4)


@pytest.mark.parametrize("loss", ["rkl", "skew-kl", "gkd", "minillm", "ce"])
def test_every_loss_makes_the_student_better(loss, rounded, tmp_path):
    prompt = ("--prompt", 24) if loss in ("gkd", "minillm") else ()
    done = run("distill", rounded, "--teacher", TINY, "--loss", loss, *FEW, "--steps", 4, *prompt, "--lr", 0.005,
               "--out", tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0, done.output
    made = record(tmp_path / "run")
    assert made.aim["loss"] == loss
    assert made.after.loss < made.before.loss


def test_the_demo_model_can_be_named_as_the_teacher(rounded, tmp_path, monkeypatch):
    found = load.find(str(TINY))
    monkeypatch.setattr(load, "find", lambda name, **_: found if name is None else pytest.fail(f"looked for {name}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # as `make demo` leaves one: no model, so that results may lie in it
    done = run("distill", rounded, "--teacher", "demo", *FEW, "--steps", 1, "--out", "demo/out")
    assert done.exit_code == 0, done.output


def test_a_student_learns_what_the_teacher_writes_and_how_its_blocks_see_it(rounded, tmp_path):
    args = ["distill", rounded, "--teacher", TINY, *FEW, "--steps", 2, "--lr", 0.002]
    done = run(*args, "--rewritten", "--prompt", 16, "--hidden", 0.5, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    made = record(tmp_path / "run")
    assert "rewritten" in made.data
    assert made.aim["hidden"] == 0.5
    texts = load_file(tmp_path / "run" / "texts.safetensors")["ids"]
    assert texts.shape == (32, 48)
    plain = tmp_path / "plain"
    run(*args, "--out", plain)
    assert record(plain).steps[0].loss != made.steps[0].loss


def test_qat_on_text_of_its_own_saves_a_checkpoint_that_rounds_inputs(tmp_path):
    out = tmp_path / "run"
    done = run("qat", TINY, "--weights", "int3-channel-sym", "--data", "self", *FEW, "--lr", 0.001, "--out", out)
    assert done.exit_code == 0, done.output
    made = record(out)
    assert made.data["name"] == "self"
    assert made.after.loss < made.before.loss
    assert all("int8" in str(layer.weight.inputs.inputs) for layer in checkpoint.open_result(out / "checkpoint").layers)


def test_qlora_saves_adapters_that_peft_loads(tmp_path):
    peft = pytest.importorskip("peft")
    base, out = tmp_path / "base", tmp_path / "run"
    quantforge.quantize(TINY, "nf4", out=base)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    done = run("qlora", base, "--rank", 4, "--teacher", TINY, *FEW, "--lr", 0.002, "--out", out)
    assert done.exit_code == 0, done.output
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    made = record(out)
    assert made.after.loss < made.before.loss
    model = peft.PeftModel.from_pretrained(checkpoint.read(base, torch.float32), out / "checkpoint")
    tokenizer = load.read_tokenizer(TINY)
    found = quantforge.evaluate(model, data="python-docs", windows=4, tokenizer=tokenizer).perplexity
    assert found == pytest.approx(made.after.perplexity, rel=1e-4)


def test_qat_scores_before_and_after_with_the_same_rounding(tmp_path):
    out = tmp_path / "run"
    few = [*FEW, "--steps", 1, "--lr", 1e-12]
    run("qat", TINY, "--weights", "int8-channel-sym", "--inputs", "none", "--kv", "int2-token", *few, "--out", out)
    made = record(out)
    assert made.after.loss == pytest.approx(made.before.loss, abs=1e-5)
    found = quantforge.evaluate(str(out / "checkpoint"), data="python-docs", windows=4, kv="int2-token").perplexity
    assert found == pytest.approx(made.after.perplexity, rel=0.02)


def test_adapters_that_begin_at_low_rank_factors_bring_the_base_they_are_for(tmp_path):
    peft = pytest.importorskip("peft")
    base, out = tmp_path / "base", tmp_path / "run"
    quantforge.quantize(TINY, "rtn+lorc", bits=3, group_size=32, out=base, samples=4)
    done = run("qlora", base, "--start", "lorc", "--rank", 8, "--teacher", TINY, *FEW, "--steps", 2, "--out", out)
    assert done.exit_code == 0, done.output
    model = peft.PeftModel.from_pretrained(checkpoint.read(out / "base", torch.float32), out / "checkpoint")
    tokenizer = load.read_tokenizer(TINY)
    found = quantforge.evaluate(model, data="python-docs", windows=4, tokenizer=tokenizer).perplexity
    assert found == pytest.approx(record(out).after.perplexity, rel=1e-4)
    told = json.loads((out / "checkpoint" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(out / "base")


def test_nothing_is_written_into_the_students_folder(rounded):
    files = sorted(p.name for p in rounded.iterdir())
    for out in (rounded, rounded / "run"):
        done = run("distill", rounded, "--teacher", TINY, *FEW, "--out", out)
        assert done.exit_code == 2
        assert "own folder" in done.stderr
    assert sorted(p.name for p in rounded.iterdir()) == files


def test_a_model_of_few_positions_is_scored_on_as_many(tmp_path):
    small = tmp_path / "small"
    shutil.copytree(TINY, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    done = run("distill", small, "--teacher", small, "--method", "rtn", "--bits", 2, *FEW, "--steps", 1, "--out",
               tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert record(tmp_path / "run").evaluation["seq_len"] == 64


@pytest.mark.parametrize("command", ["distill", "qat", "qlora"])
def test_a_dry_run_counts_and_leaves_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = ["--teacher", TINY, "--method", "rtn"] if command == "distill" else []
    done = run(command, TINY, *extra, *FEW, "--dry-run", "--json", *(["--rank", 4] if command == "qlora" else []))
    found = json.loads(done.stdout)
    assert found["tokens"] == 12 * 4 * 48
    assert found["gradients"] == 4 * found["trained"] > 0
    assert found["activations"] > 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_what_is_trained(rounded, distilled):
    counted = json.loads(run("distill", TINY, "--teacher", TINY, "--method", "rtn", "--bits", 2, "--group-size", 32,
                             *FEW, "--dry-run", "--json").stdout)  # fmt: skip
    assert counted["trained"] == sum(record(distilled).trained.values())
    opened = json.loads(run("distill", rounded, "--teacher", TINY, *FEW, "--dry-run", "--json").stdout)
    assert opened["trained"] == counted["trained"]


@pytest.fixture
def other(tmp_path) -> Path:
    """Return a model whose tokenizer has a token more."""
    folder = tmp_path / "other"
    shutil.copytree(TINY, folder)
    tokenizer = load.read_tokenizer(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    vocab = len(tokenizer.get_vocab())
    model = tiny.make("llama", vocab_size=vocab)
    model.save_pretrained(folder)
    return folder


def test_a_teacher_with_another_tokenizer_is_refused(other, tmp_path):
    done = run("distill", TINY, "--teacher", other, *FEW, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "another tokenizer" in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--loss", "klx"), "fkl"),
        (("--loss", "gkd", "--lambda", 1.5), "lambda"),
        (("--loss", "jsd", "--beta", 2), "beta"),
        (("--loss", "gkd", "--prompt", 48), "prompt"),
        (("--train", "scale"), "quantized student"),
        (("--bits", 3), "--method"),
        (("--blocks", 99), "99"),
        (("--optimizer", "adam"), "adamw"),
        (("--data", "self", "--loss", "ce"), "--samples"),
        (("--warmup", 99), "warmup"),
        (("--targets", "kept", "--loss", "gkd"), "live"),
        (("--hidden", 0.1, "--loss", "minillm"), "hidden"),
        (("--hidden", "nan"), "hidden"),
        (("--hidden", 1, "--chunk", 8), "chunk"),
        (("--beta", 0.3), "--beta"),
        (("--temperature", 2, "--loss", "gkd"), "--temperature"),
        (("--weights", "int4-g32"), "--weights"),
        (("--targets", "kept", "--loss", "rkl"), "live"),
        (("--batch-size", 99), "99"),
    ],
)
def test_bad_input_is_one_line_before_any_work(args, says, tmp_path):
    few = [a for a in FEW if a not in ("--samples", 32)] if "self" in args else FEW
    done = run("distill", TINY, "--teacher", TINY, *few, *args, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr
    assert not (tmp_path / "run").exists()


def test_more_rank_than_width_is_refused(tmp_path):
    done = run("qlora", TINY, "--rank", 4096, *FEW, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "rank 4096" in done.stderr


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes_give_the_run_of_one(sharded, rounded, tmp_path):
    args = ["distill", rounded, "--teacher", TINY, *FEW, "--steps", 3, "--lr", 0.01, "--out"]
    run(*args, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", str(port), "-m", "quantforge"]  # fmt: skip
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": sharded, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *map(str, args), str(tmp_path / "two")], env=env, check=True, capture_output=True)
    one, two = (record(tmp_path / name) for name in ("one", "two"))
    assert [s.loss for s in two.steps] == pytest.approx([s.loss for s in one.steps], abs=1e-5)
    assert two.after.losses == pytest.approx(one.after.losses, abs=1e-5)
    assert perplexity(str(tmp_path / "two" / "checkpoint")) == pytest.approx(one.after.perplexity, rel=1e-4)
