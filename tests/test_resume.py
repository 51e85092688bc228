"""A run that is broken off anywhere and gone on with comes to what an uninterrupted one comes to, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantforge import pipeline, recipe, rescaling, stopping
from quantforge import plan as planning
from quantforge.course import Run
from quantforge.errors import Stopped
from quantforge.exporters.native import Native
from quantforge.journal import Journal
from quantforge.models import tiny
from quantforge.models.blocks import Blocks
from quantforge.resume import Record
from quantforge.tuners.lkd import LKD

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {},
    "awq": {},
    "smoothquant": {},
    "smoothquant+gptq": {},
    "gptaq": {},
    "zeroquant": {"settings": {"tuner.steps": 2}},
    "spqr": {},
}
IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))


class BrokenOff(Exception):  # noqa: N818
    """What ends a run in these tests."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 72)
    monkeypatch.setenv("QUANTFORGE_COMMIT_SECONDS", "0")


def state(model: nn.Module, rows: list[pipeline.Layer]) -> dict[str, Any]:
    """Return all that a run comes to, as text and tensors."""
    found: dict[str, Any] = {f"model.{k}": v for k, v in model.state_dict().items()}
    for row in rows:
        found |= Native().tensors(row.name, row.weight)
        found[f"{row.name}: about"] = Native().describe(row.weight)
        found[f"{row.name}: facts"] = (row.weight.notes, row.loss, row.relative_loss, row.tokens, row.weight.nbits)
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""
    assert list(a) == list(b)
    return [k for k, v in a.items() if not (torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k])]


def quantized(
    kind: str, method: str, out: Path, progress: Callable[[Any], None] = lambda layer: None, *, again: bool = False
) -> dict[str, Any]:
    """Run a method on a tiny model with a journal beside `out`, which stays there."""
    model = tiny.make(kind)
    plan = planning.make(model, recipe.load(method, **METHODS[method]), torch.float32)
    with Journal.open(out, {"kind": kind}) as journal:
        run = Run(Blocks(model), Record(journal, torch.device("cpu")), again)
        rows = pipeline.quantize(model, plan, IDS if plan.needs else None, progress, run=run)
        found = state(model, rows)
        journal.finish()
    return found


def plain(kind: str, method: str) -> dict[str, Any]:
    """Run it without a journal."""
    model = tiny.make(kind)
    plan = planning.make(model, recipe.load(method, **METHODS[method]), torch.float32)
    return state(model, pipeline.quantize(model, plan, IDS if plan.needs else None))


def after(count: int) -> Callable[[Any], None]:
    """Return a progress that breaks a run off at the layer number `count` of this process."""
    left = [count]

    def step(layer: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise BrokenOff

    return step


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("llama", method) for method in METHODS),
        ("gpt2", "smoothquant+gptq"),
        ("gemma2", "gptq"),
        ("qwen3_moe", "gptq"),
    ],
)
def test_broken_off_at_several_layers_one_after_the_other(tmp_path, kind, method):
    whole = plain(kind, method)
    count = sum(name.endswith(": facts") for name in whole)
    told: list[str] = []
    for at in (1, count // 2 + 1, count - 2):
        with pytest.raises(BrokenOff):
            quantized(kind, method, tmp_path / "out", after(at))
    assert same(whole, quantized(kind, method, tmp_path / "out", lambda layer: told.append(layer.name))) == []
    assert told == list(dict.fromkeys(told))
    assert len(told) == count
    assert not (tmp_path / "out.qf").exists()


def test_what_was_committed_is_not_solved_again(tmp_path, monkeypatch):
    with pytest.raises(BrokenOff):
        quantized("llama", "gptq", tmp_path / "out", after(9))  # in the second of two blocks of seven layers
    solved = []
    real = pipeline.solve
    monkeypatch.setattr(pipeline, "solve", lambda stage, *rest: solved.extend(stage.names) or real(stage, *rest))
    quantized("llama", "gptq", tmp_path / "out")
    assert all(name.startswith("model.layers.1.") for name in solved)
    assert len(solved) == 7


def test_scales_that_were_committed_are_not_searched_again(tmp_path, monkeypatch):
    searched = []
    real = rescaling._scales
    monkeypatch.setattr(rescaling, "_scales", lambda *args: searched.append(args[3].observed) or real(*args))
    monkeypatch.setattr(pipeline, "solve", lambda *args: (_ for _ in ()).throw(BrokenOff))
    with pytest.raises(BrokenOff):
        quantized("llama", "awq", tmp_path / "out")
    assert searched
    searched.clear()
    with pytest.raises(BrokenOff):
        quantized("llama", "awq", tmp_path / "out")
    assert not searched


def test_broken_off_while_scales_are_searched(tmp_path, monkeypatch):
    whole = plain("llama", "awq")
    real = rescaling._scales
    searched = []

    def broken(*args: Any) -> Any:
        if len(searched) == 5:
            raise BrokenOff
        searched.append(args[3].observed)
        return real(*args)

    monkeypatch.setattr(rescaling, "_scales", broken)
    with pytest.raises(BrokenOff):
        quantized("llama", "awq", tmp_path / "out")
    first = searched[:4]  # of the first block, which is committed at the entry of the second
    searched.clear()
    monkeypatch.setattr(rescaling, "_scales", lambda *args: searched.append(args[3].observed) or real(*args))
    assert same(whole, quantized("llama", "awq", tmp_path / "out")) == []
    assert not set(first) & set(searched)


@pytest.mark.parametrize(("method", "kept"), [("gptq", 9), ("rtn", 9), ("zeroquant", 7)])
def test_asked_to_stop_it_keeps_the_layers_that_are_done(tmp_path, monkeypatch, method, kept):
    whole = plain("llama", method)
    done: list[str] = []
    monkeypatch.setattr(stopping, "asked", lambda: len(done) > 7)
    monkeypatch.setenv("QUANTFORGE_COMMIT_SECONDS", "1000")
    with pytest.raises(Stopped, match="the same call"):
        quantized("llama", method, tmp_path / "out", lambda layer: done.append(layer.name))
    monkeypatch.setattr(stopping, "asked", lambda: False)
    with Journal.open(tmp_path / "out", {"kind": "llama"}) as journal:
        record = Record(journal, torch.device("cpu"))
        assert len(record.layers) in (kept, kept + 1)
        assert record.place.at == 1
    assert same(whole, quantized("llama", method, tmp_path / "out")) == []


def test_asked_to_stop_without_a_journal_it_goes_on(monkeypatch):
    monkeypatch.setattr(stopping, "asked", lambda: True)
    plain("llama", "rtn")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("method", ["gptq", "smoothquant+gptq", "gptaq", "zeroquant"])
def test_computing_again_what_is_not_kept_gives_the_same_numbers(tmp_path, kind, method):
    assert same(plain(kind, method), quantized(kind, method, tmp_path / "out", again=True)) == []


def test_computing_again_can_be_broken_off(tmp_path):
    with pytest.raises(BrokenOff):
        quantized("llama", "gptq", tmp_path / "out", after(10), again=True)
    assert same(plain("llama", "gptq"), quantized("llama", "gptq", tmp_path / "out", again=True)) == []


def test_a_parameter_that_a_tuner_changes_beside_its_layers_is_kept(tmp_path, monkeypatch):
    real = LKD.tune

    def tune(self, block, schemes, calls, float_calls):
        found = real(self, block, schemes, calls, float_calls)
        block.input_layernorm.weight.data.mul_(1.25)
        return found

    monkeypatch.setattr(LKD, "tune", tune)
    whole = plain("llama", "zeroquant")
    with pytest.raises(BrokenOff):
        quantized("llama", "zeroquant", tmp_path / "out", after(9))
    assert same(whole, quantized("llama", "zeroquant", tmp_path / "out")) == []
