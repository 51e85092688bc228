"""Checkpoint and resume: the same curve and weights bit for bit, other runs refused, and nothing lost on the way."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantforge.distill.losses import cross_entropy, next_tokens
from quantforge.errors import PlanError
from quantforge.models import tiny
from quantforge.store import write_tensors
from quantforge.training import state
from quantforge.training.loop import Settings, train
from quantforge.training.optimizers import OPTIMIZERS

IDS = torch.randint(0, 64, (9, 12), generator=torch.Generator().manual_seed(5))
BASE = Settings(steps=6, batch_size=4, micro_batch=2, lr=1e-2, warmup=2, weight_decay=0.1, save_every=2)
FACTS = {"student": {"files": "abc", "parts": ["scales", "norms"]}, "loss": "fkl"}


class StoppedError(Exception):
    """What ends a run in the middle."""


def student():
    return tiny.make("llama", vocab_size=64)


def loss_until(last):
    def loss(model, batch, step, count):
        if step == last:
            raise StoppedError
        labels, mask = next_tokens(batch.ids, batch.counted)
        logits = model(batch.ids, attention_mask=batch.attention, use_cache=False).logits
        logits = logits + 0.1 * torch.randn_like(logits)  # random numbers go on as they would have, too
        return cross_entropy(logits, labels, mask, count=count)

    return loss


def run(out=None, settings=BASE, last=None, **more):
    """Train until step `last`; return the losses, or None if that came, and the weights."""
    model = student()
    try:
        curve = train(model, IDS, loss_until(last), settings, out=out, facts=FACTS, **more)
    except StoppedError:
        curve = None
    return curve and (curve.loss, curve.grad_norm, curve.lr, curve.tokens), torch.cat(
        [p.detach().flatten() for p in model.parameters()]
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a run that stopped after 5 steps, of which 4 were kept."""
    out = tmp_path_factory.mktemp("run")
    assert run(out, last=5)[0] is None
    return out


@pytest.fixture
def copy(kept, tmp_path):
    """The same, to be damaged."""
    (tmp_path / "state").mkdir()
    for file in (kept / "state").iterdir():
        (tmp_path / "state" / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_bit_for_bit_the_one_that_went_through(tmp_path, optimizer):
    settings = replace(BASE, optimizer=optimizer)
    through = run(settings=settings)
    stopped, weights = run(tmp_path, settings, last=5)
    assert stopped is None
    assert not torch.equal(weights, through[1])
    resumed = run(tmp_path, settings, resume=True)
    assert resumed[0] == through[0]
    assert torch.equal(resumed[1], through[1])


def test_what_is_kept_is_tensors_and_text(kept):
    assert sorted(file.name for file in (kept / "state").iterdir()) == ["state.json", "tensors.safetensors"]
    about = json.loads((kept / "state" / "state.json").read_text())
    assert about["step"] == 4
    assert about["facts"]["settings"]["lr"] == 0.01
    assert about["facts"]["student"] == FACTS["student"]
    assert len(about["curve"]["loss"]) == 4
    names = load_file(kept / "state" / "tensors.safetensors").keys()
    assert {name.partition(" ")[0] for name in names} == {"parameter", "exp_avg", "exp_avg_sq", "step"}
    assert len(names) == 4 * len(dict(student().named_parameters()))


def test_a_stopped_run_can_be_ended_with_the_steps_that_are_done(kept, copy):
    ended = run(copy, replace(BASE, steps=4), resume=True)
    assert ended[0][0] == run()[0][0][:4]
    with pytest.raises(PlanError, match=r"QF-293\]: .*state holds 4 steps, more than 3; ask for as many, or more\."):
        run(copy, replace(BASE, steps=3), resume=True)


def test_a_finished_run_is_kept_and_can_be_made_longer(tmp_path):
    settings = replace(BASE, schedule="constant")
    through = run(settings=replace(settings, steps=8))
    run(tmp_path, replace(settings, steps=5, save_every=100))
    again = run(tmp_path, replace(settings, steps=5, save_every=100), resume=True)
    assert again[0][0] == through[0][0][:5]
    longer = run(tmp_path, replace(settings, steps=8, save_every=3), resume=True)
    assert longer[0] == through[0]
    assert torch.equal(longer[1], through[1])


@pytest.mark.parametrize(
    ("settings", "facts", "line"),
    [
        ({"lr": 0.02}, {}, "lr '0.01', not '0.02'"),
        ({"optimizer": "adamw8bit"}, {}, "optimizer 'adamw', not 'adamw8bit'"),
        ({"micro_batch": None}, {}, "micro_batch '2', not 'None'"),
        ({"betas": (0.9, 0.95)}, {}, "betas '[0.9, 0.999]', not '[0.9, 0.95]'"),
        ({}, {"loss": "rkl"}, "loss 'fkl', not 'rkl'"),
        ({}, {"student": {"files": "xyz", "parts": ["scales", "norms"]}}, "student.files 'abc', not 'xyz'"),
        ({}, {"teacher": "t"}, "teacher 'None', not 't'"),
    ],
)
def test_other_settings_and_facts_are_refused_with_both_values(kept, settings, facts, line):
    before = (kept / "state" / "state.json").read_bytes()
    with pytest.raises(PlanError) as caught:
        train(student(), IDS, loss_until(None), replace(BASE, **settings), out=kept, resume=True, facts=FACTS | facts)
    assert str(caught.value).startswith(f"error[QF-293]: {kept / 'state'} was made with {line}; resume with the same")
    assert (kept / "state" / "state.json").read_bytes() == before


def test_another_text_or_student_is_refused(kept):
    with pytest.raises(PlanError, match=r"was made with text '[0-9a-f]{64}', not '[0-9a-f]{64}'"):
        train(student(), IDS + 1, loss_until(None), BASE, out=kept, resume=True, facts=FACTS)
    other = tiny.make("llama", vocab_size=64, hidden_size=32)
    with pytest.raises(PlanError, match=r"embed_tokens.weight 'float32 \[64, 64\]', not 'float32 \[64, 32\]'"):
        train(other, IDS, loss_until(None), BASE, out=kept, resume=True, facts=FACTS)


def test_a_student_of_which_less_is_trained_is_refused(kept):
    model = student()
    model.model.norm.requires_grad_(False)
    with pytest.raises(PlanError, match=r"model\.norm\.weight 'float32 \[64\]', not 'missing'"):
        train(model, IDS, loss_until(None), BASE, out=kept, resume=True, facts=FACTS)


def test_the_number_of_steps_between_states_may_change(kept, copy):
    assert run(copy, replace(BASE, save_every=1), resume=True)[0] == run()[0]


def test_a_run_never_replaces_another(kept):
    with pytest.raises(
        PlanError, match=r"state holds an earlier run: resume it, remove it, or choose another folder\."
    ):
        run(kept)


def cut(folder):
    file = folder / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder):
    file = folder / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)


def swap(folder):
    tensors = load_file(folder / "tensors.safetensors")
    save_file({name: x * 2 for name, x in tensors.items()}, folder / "tensors.safetensors")


def edit(folder):
    file = folder / "state.json"
    file.write_text(file.read_text().replace('"step": 4', '"step": 3'))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "tensors.safetensors is not what was written"),
        (flip, "tensors.safetensors is not what was written"),
        (swap, "tensors.safetensors is not what was written"),
        (edit, "state.json is not what was written"),
        (lambda folder: (folder / "tensors.safetensors").unlink(), "No such file or directory"),
        (lambda folder: (folder / "state.json").unlink(), "No such file or directory"),
        (lambda folder: (folder / "state.json").write_text("[1]"), "not an object"),
        (lambda folder: (folder / "state.json").write_text('{"schema":'), "not valid JSON"),
    ],
)
def test_a_damaged_state_is_one_line(copy, damage, why):
    damage(copy / "state")
    with pytest.raises(PlanError) as caught:
        run(copy, resume=True)
    assert str(caught.value).startswith(f"error[QF-293]: {copy / 'state'} cannot be resumed from: ")
    assert why in str(caught.value)
    assert str(caught.value).endswith("; remove it and start anew.")


def test_a_state_of_a_later_layout_is_refused(copy):
    file = copy / "state" / "state.json"
    file.write_text(file.read_text().replace(state.SCHEMA, "quantforge-state-9"))
    with pytest.raises(PlanError, match="made with schema 'quantforge-state-9', not 'quantforge-state-1'"):
        run(copy, resume=True)


def test_no_state_to_resume_from_is_one_line(tmp_path):
    with pytest.raises(PlanError, match=r"QF-293\]: there is no .*state to resume from; start without resuming"):
        run(tmp_path, resume=True)


def test_an_interrupted_write_leaves_the_former_state(tmp_path, monkeypatch):
    def broken(path, tensors):
        if len(written) == 2:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path)
        write_tensors(path, tensors)

    written = []
    monkeypatch.setattr(state.store, "write_tensors", broken)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    monkeypatch.setattr(state.store, "write_tensors", write_tensors)
    resumed, through = run(tmp_path, resume=True), run()
    assert resumed[0] == through[0]
    assert torch.equal(resumed[1], through[1])
