"""Several processes: the same curve as one, by DDP and by FSDP, launched once by accelerate with gloo on the CPU."""

import json
import os
import runpy
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from quantforge.errors import RecipeError
from quantforge.training import processes

WORKER = '''
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from quantforge.distill.losses import cross_entropy, next_tokens
from quantforge.errors import QuantForgeError
from quantforge.models import tiny
from quantforge.training import processes, state
from quantforge.training.batches import Batch
from quantforge.training.loop import Settings, train

IDS = torch.randint(0, 64, (10, 12), generator=torch.Generator().manual_seed(5))
BASE = Settings(steps=4, batch_size=4, micro_batch=1, lr=1e-2, schedule="constant", weight_decay=0.1, save_every=2)
OUT, RANK = Path(sys.argv[1]), int(os.environ.get("RANK", 0))


def student():
    return tiny.make("llama", vocab_size=64, tie_word_embeddings=False)


def supervised(model, batch, step, count):
    labels, mask = next_tokens(batch.ids, batch.counted)
    logits = model(batch.ids, attention_mask=batch.attention, use_cache=False).logits
    return cross_entropy(logits, labels, mask, count=count)


def by_parts(model, batch, step, count):
    """The same by the parts of the model, so that its own forward is never called."""
    labels, mask = next_tokens(batch.ids, batch.counted)
    hidden = model.model(batch.ids, attention_mask=batch.attention, use_cache=False).last_hidden_state
    return cross_entropy(model.lm_head(hidden), labels, mask, count=count)


def one_layer(model, batch, step, count):
    """A loss that the second layer and the head have no part in."""
    hidden = model.model(batch.ids, use_cache=False, output_hidden_states=True).hidden_states[1]
    return hidden.square().mean(-1).sum() / count


def poisoned(model, batch, step, count):
    """Not finite in one process alone: that which has the step's last window."""
    found = supervised(model, batch, step, count)
    return found * float("nan") if step == 1 and batch.windows[0] == LAST[0] else found


def some_count(model, batch, step):
    model(batch.ids, use_cache=False)  # as a student that writes would
    LAST[:] = batch.windows[-1:]
    counted = torch.stack([row & (torch.arange(12) > w) for row, w in zip(batch.counted, batch.windows, strict=True)])
    return Batch(batch.ids, batch.attention, counted, batch.windows)


LAST = [None]


def run(loss=supervised, settings=BASE, **more):
    model = student()
    try:
        curve = train(model, IDS, loss, settings, prepare=some_count, **more)
    except QuantForgeError as error:
        return {"error": str(error), "weights": weights(model)}
    measured = {"loss": curve.loss, "norm": curve.grad_norm, "tokens": curve.tokens}
    return measured | {"weights": weights(model), "held": held(model)}


def weights(model):
    """Return two numbers that tell all weights apart."""
    found = torch.cat([processes.whole(p.detach()).flatten() for p in model.parameters()]).double()
    return [float(found.sum()), float(found.square().sum())]


def held(model):
    """Return which part of the parameters this process holds."""
    every = list(model.parameters())
    return sum(getattr(p, "_local_tensor", p).numel() for p in every) / sum(p.numel() for p in every)


def stopping(model, batch, step, count):
    if step == 3:
        raise SystemError
    return supervised(model, batch, step, count)


def resumed(out):
    try:
        run(stopping, out=out)
    except SystemError:
        return run(out=out, resume=True)


if RANK:
    def refuse(*_):
        raise AssertionError("only process 0 writes")

    state.save = refuse

found = {}
if os.environ.get("ACCELERATE_USE_FSDP") != "true":
    found = {
        "ddp": run(),
        "parts": run(by_parts),
        "one layer": run(one_layer),
        "resumed": resumed(OUT / "ddp"),
        "poisoned": run(poisoned, out=OUT / "poisoned"),
        "uneven": run(settings=replace(BASE, batch_size=3)),
        "eight": run(settings=replace(BASE, optimizer="adamw8bit")),
    }
if os.environ.get("WORLD_SIZE", "1") != "1":
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    found |= {
        "fsdp": run(),
        "fsdp parts": run(by_parts),
        "fsdp resumed": resumed(OUT / "fsdp"),
        "fsdp eight": run(settings=replace(BASE, optimizer="adamw8bit")),
    }
(OUT / f"{RANK}.json").write_text(json.dumps(found))
'''


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds: this one."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "worker.py").write_text(WORKER)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["worker.py", str(folder)])
        runpy.run_path(str(folder / "worker.py"))
    return json.loads((folder / "0.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes finds, and their folder."""
    return launch(tmp_path_factory.mktemp("two"), "--multi_gpu", ACCELERATE_USE_CPU="true")


def launch(folder, *options, **variables):
    """Have accelerate run the worker in two processes; return what each found, and the folder."""
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    usual = {
        "num_processes": "2",
        "num_machines": "1",
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": port,
    }
    settings = [x for name, value in usual.items() for x in (f"--{name}", value)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *settings]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        [*command, str(folder / "worker.py"), str(folder)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder


def close(found, alone, precision=1e-5):
    assert found["loss"] == pytest.approx(alone["loss"], rel=precision)
    assert found["norm"] == pytest.approx(alone["norm"], rel=10 * precision)
    assert found["tokens"] == alone["tokens"]
    assert found["weights"] == pytest.approx(alone["weights"], rel=precision)


@pytest.mark.parametrize("how", ["ddp", "parts", "one layer", "eight", "fsdp", "fsdp parts"])
def test_two_processes_give_the_curve_and_the_weights_of_one(one, two, how):
    for found in two[0]:
        close(found[how], one[{"one layer": how, "eight": how}.get(how, "ddp")], 1e-4 if how == "eight" else 1e-5)
    assert two[0][0][how]["loss"] == two[0][1][how]["loss"]
    assert two[0][0][how]["weights"] == two[0][1][how]["weights"]


def test_each_process_holds_half_of_what_is_sharded(two):
    assert [found["ddp"]["held"] for found in two[0]] == [1, 1]
    assert [found["fsdp"]["held"] for found in two[0]] == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("how", ["", "fsdp "])
def test_a_run_of_two_processes_is_resumed_bit_for_bit(two, how):
    for found in two[0]:
        assert found[how + "resumed"] == found[how.strip() or "ddp"]


def test_process_0_alone_writes_and_what_it_writes_is_whole(two):
    folders = [two[1] / name / "state" for name in ("ddp", "fsdp")]
    shapes = [{name: x.shape for name, x in load_file(folder / "tensors.safetensors").items()} for folder in folders]
    assert shapes[0] == shapes[1]
    assert shapes[0]["parameter lm_head.weight"] == (64, 64)


def test_what_is_not_finite_in_one_process_stops_all_and_keeps_the_state(one, two):
    for found in two[0]:
        assert "the loss is nan in step 2, window " in found["poisoned"]["error"]
        assert found["poisoned"]["weights"] == pytest.approx(one["poisoned"]["weights"], rel=1e-5)
    errors = [two[0][0]["poisoned"]["error"], two[0][1]["poisoned"]["error"], one["poisoned"]["error"]]
    assert len({error.partition(": the parameters")[0] for error in errors}) == 1
    assert json.loads((two[1] / "poisoned" / "state" / "state.json").read_text())["step"] == 1


def test_what_does_not_go_with_several_processes_is_one_line(two):
    for found in two[0]:
        uneven = "error[QF-246]: batch_size 3 cannot be shared evenly by 2 processes; 2 and 4 do."
        assert found["uneven"]["error"] == uneven
        assert found["fsdp eight"]["error"].startswith("error[QF-246]: optimizer adamw8bit does not go with parameters")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_fsdp_of_accelerate_gives_the_same_on_cuda(one, tmp_path):
    fsdp = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    for found in launch(tmp_path, *fsdp)[0]:
        close(found["fsdp"], one["ddp"], 1e-3)
        close(found["fsdp parts"], one["ddp"], 1e-3)
        assert found["fsdp resumed"]["loss"] == pytest.approx(found["fsdp"]["loss"])
        assert found["fsdp"]["held"] == pytest.approx(0.5, abs=0.01)


def test_alone_the_student_stays_where_it_is_and_is_not_wrapped():
    layer = nn.Linear(2, 2).to("meta")
    engine = processes.start(layer, "adamw", {"betas": (0.9, 0.9), "weight_decay": 0.0})
    assert layer.weight.device.type == "meta"
    assert (engine.count, engine.index) == (1, 0)
    assert engine.module.student is layer


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("distributed_type", "DEEPSPEED", "training does not run on DEEPSPEED of accelerate; DDP works, and FSDP with"),
        ("mixed_precision", "fp16", "training does not run in fp16; --mixed_precision no or bf16 does."),
    ],
)
def test_what_accelerate_offers_beyond_is_refused(monkeypatch, field, value, line):
    kind = DistributedType(value) if field == "distributed_type" else value
    monkeypatch.setattr(Accelerator, field, property(lambda _: kind))
    with pytest.raises(RecipeError, match=line):
        processes.start(nn.Linear(2, 2), "adamw", {"betas": (0.9, 0.9), "weight_decay": 0.0})
