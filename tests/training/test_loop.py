"""The training loop: what adds up, what stops it, what it leaves as it was, and the closed forms of its settings."""

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from quantforge.distill.losses import cross_entropy, next_tokens
from quantforge.errors import DataError, RecipeError
from quantforge.models import tiny
from quantforge.numerics import products
from quantforge.training import loop, processes
from quantforge.training.batches import Batch
from quantforge.training.layers import checkpoint_blocks
from quantforge.training.loop import Curve, Settings, train

IDS = torch.randint(0, 64, (10, 12), generator=torch.Generator().manual_seed(5))
FAST = Settings(steps=4, batch_size=4, lr=1e-2)


def student(dtype=torch.float32, **changes):
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
    return tiny.make("llama", dtype=dtype, **{**small, "num_key_value_heads": 1, **changes})


def supervised(model, batch, step, count):
    labels, mask = next_tokens(batch.ids, batch.counted)
    logits = model(batch.ids, attention_mask=batch.attention, use_cache=False).logits
    return cross_entropy(logits, labels, mask, count=count)


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_student_learns_its_text_and_the_curve_says_how():
    model = student()
    curve = train(model, IDS, supervised, replace(FAST, steps=20))
    assert curve.loss[-1] < 0.7 * curve.loss[0]
    assert curve.tokens == (4 * 12,) * 20
    assert len(curve.lr) == len(curve.grad_norm) == len(curve.seconds) == 20
    assert json.loads(json.dumps(asdict(curve)))["loss"] == list(curve.loss)
    assert all(p.grad is None for p in model.parameters())


def some_count(model, batch, step):
    """Leave out other tokens of each window, so that micro-batches differ in how many count."""
    counted = torch.stack([row & (torch.arange(12) > w) for row, w in zip(batch.counted, batch.windows, strict=True)])
    return Batch(batch.ids, batch.attention, counted, batch.windows)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(micro):
    def run(micro):
        model = student(torch.float64)
        return train(model, IDS, supervised, replace(FAST, micro_batch=micro), prepare=some_count), values(model)

    whole, parts = run(None), run(micro)
    assert parts[0].loss == pytest.approx(whole[0].loss, rel=1e-9)
    assert parts[0].grad_norm == pytest.approx(whole[0].grad_norm, rel=1e-9)
    torch.testing.assert_close(parts[1], whole[1], rtol=0, atol=1e-6)


def test_a_micro_batch_is_never_larger_than_asked():
    seen = []

    def loss(model, batch, step, count):
        seen.append((len(batch.ids), count))
        return supervised(model, batch, step, count)

    train(student(), IDS, loss, replace(FAST, steps=1, batch_size=5, micro_batch=2))
    assert seen == [(2, 5 * 11), (2, 5 * 11), (1, 5 * 11)]


def test_the_batch_is_prepared_once_a_step_without_gradient_in_evaluation_mode():
    seen, other = [], torch.full((4, 7), 3)

    def prepare(model, batch, step):
        seen.append((step, batch.windows, model.training, torch.is_grad_enabled()))
        ones = torch.ones(4, 7, dtype=torch.bool)
        return Batch(other, ones, ones, batch.windows)

    def loss(model, batch, step, count):
        assert torch.equal(batch.ids, other[:2])
        assert count == 4 * 6
        return supervised(model, batch, step, count)

    curve = train(student(), IDS, loss, replace(FAST, steps=3, micro_batch=2), prepare=prepare)
    assert [s[0] for s in seen] == [0, 1, 2]
    assert len({s[1] for s in seen}) == 3
    assert all(s[2:] == (False, False) for s in seen)
    assert curve.tokens == (28,) * 3


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run_before_it_does_harm(tmp_path, where, value):
    seen = {}

    def loss(model, batch, step, count):
        found = supervised(model, batch, step, count)
        seen[step] = [*seen.get(step, []), *batch.windows]
        if step == 2 and len(seen[step]) == 4:  # in the second of two micro-batches
            found = found * value if where == "loss" else Poisoned.apply(found, value)
        return found

    settings = replace(FAST, micro_batch=2, schedule="constant")
    model, good = student(), student()
    train(good, IDS, supervised, replace(settings, steps=2))
    with pytest.raises(DataError) as caught:
        train(model, IDS, loss, settings, out=tmp_path)
    bad = seen[2][2:] if where == "loss" else seen[2]
    what = f"the loss is {value}" if where == "loss" else "the gradient's norm is nan"
    assert str(caught.value) == (
        f"error[QF-475]: {what} in step 3, windows {', '.join(map(str, bad))}: "
        f"the parameters stay those after 2 steps, kept in {tmp_path / 'state'}; "
        "--resume --steps 2 keeps what came before."
    )
    assert torch.equal(values(model), values(good))
    assert all(p.grad is None for p in model.parameters())
    ended = student()
    assert len(train(ended, IDS, supervised, replace(settings, steps=2), out=tmp_path, resume=True).loss) == 2
    assert torch.equal(values(ended), values(good))
    again = student()
    curve = train(again, IDS, supervised, settings, out=tmp_path, resume=True)
    through = student()
    assert curve.loss == train(through, IDS, supervised, settings).loss
    assert torch.equal(values(again), values(through))


@pytest.mark.parametrize("kept", [True, False])
def test_where_no_step_can_be_kept_the_error_says_what_else_to_try(tmp_path, kept):
    def loss(model, batch, step, count):
        return supervised(model, batch, step, count) * (math.nan if step == 1 else 1)

    settings = replace(FAST, warmup=1 if kept else 0)
    with pytest.raises(DataError, match=r"after 1 steps.*; look at these, or try a smaller lr\.$"):
        train(student(), IDS, loss, settings, out=tmp_path if kept else None)


class Poisoned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.value, None


def test_a_step_where_nothing_counts_is_named():
    def prepare(model, batch, step):
        return Batch(batch.ids, batch.attention, torch.zeros_like(batch.counted), batch.windows)

    with pytest.raises(DataError, match=r"QF-475\]: no token counts in step 1, windows \d, \d, \d, \d\."):
        train(student(), IDS, supervised, FAST, prepare=prepare)


@pytest.mark.parametrize("limit", [0.01, 1e6, None])
def test_gradients_are_scaled_down_to_the_largest_norm(monkeypatch, limit):
    norms, update = [], processes.Engine.update

    def spied(engine, rate, shrink):
        update(engine, rate, shrink)
        norms.append(engine.gradient_norm())

    monkeypatch.setattr(processes.Engine, "update", spied)
    curve = train(student(), IDS, supervised, replace(FAST, max_grad_norm=limit))
    assert min(curve.grad_norm) > 0.02
    wanted = curve.grad_norm if limit != 0.01 else [0.01] * 4
    assert norms == pytest.approx(list(wanted), rel=1e-3)


def closed(schedule, step):
    """Of 10 steps, 4 of them warm-up, at a rate of 0.6."""
    share = (step - 4) / 6
    falling = {"constant": 1, "linear": 1 - share, "cosine": math.cos(math.pi * share / 2) ** 2}
    return 0.15 * (step + 1) if step < 4 else 0.6 * falling[schedule]


@pytest.mark.parametrize("schedule", loop.SCHEDULES)
def test_learning_rates_are_those_of_the_closed_forms(schedule):
    settings = Settings(steps=10, warmup=4, lr=0.6, schedule=schedule)
    rates = [settings.rate(step) for step in range(10)]
    assert rates == pytest.approx([closed(schedule, step) for step in range(10)])
    assert rates[4] == 0.6
    assert min(rates) > 0
    plain = Settings(steps=5, schedule=schedule, lr=0.6)
    assert plain.rate(0) == 0.6


def test_the_rate_of_each_step_reaches_the_optimizer_and_the_curve():
    def nothing(model, batch, step, count):
        return sum(p.sum() for p in model.parameters()) * 0.0

    layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.ones_(layer[0].weight)
    settings = Settings(steps=3, batch_size=2, lr=0.5, warmup=2, schedule="linear", weight_decay=0.1)
    curve = train(layer, IDS, nothing, settings, lr_of=lambda name: 0.5 if name.startswith("0.") else 1.0)
    assert curve.lr == (0.25, 0.5, 0.5)
    kept = math.prod(1 - 0.5 * rate * 0.1 for rate in curve.lr)
    assert layer[0].weight.detach().unique().tolist() == pytest.approx([kept])
    assert layer[1].weight.detach().unique().tolist() == [1]


def test_only_parameters_that_want_gradients_are_trained():
    model = student()
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, IDS, supervised, FAST)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "norm" in name}


def test_random_state_and_modes_are_left_as_they_were_and_dropout_of_adapters_repeats():
    def adapted(dropout):
        config = LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj"], init_lora_weights="gaussian")
        torch.manual_seed(11)
        return get_peft_model(student(), config)

    def run(dropout=0.5):
        model = adapted(dropout)
        torch.rand(7)  # whatever the state was
        return train(model, IDS, supervised, FAST).loss

    model = adapted(0.5).eval()
    wanted = torch.rand(3)
    adapted(0.5)
    model.base_model.model.model.norm.train()
    first = train(model, IDS, supervised, FAST).loss
    assert torch.equal(torch.rand(3), wanted)
    assert [m for m in model.modules() if m.training] == [model.base_model.model.model.norm]
    assert run() == first == run()
    assert first != run(0.0)


DROPPED = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5},
    "llama": {"attention_dropout": 0.1},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", DROPPED)
def test_a_student_that_equals_its_teacher_starts_without_a_loss(kind, checkpointing):
    teacher, model = tiny.make(kind), tiny.make(kind, **DROPPED[kind])
    ran = []
    if checkpointing:
        checkpoint_blocks(model, on=True)
        block = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
        next(block.children()).register_forward_hook(lambda *_: ran.append(1))
    kept = {name: dict(vars(m)) for name, m in model.named_modules()}

    def loss(model, batch, step, count):
        with torch.no_grad():
            goal = teacher(batch.ids, use_cache=False).logits
        return (model(batch.ids, use_cache=False).logits - goal).square().sum() / count

    def prepare(model, batch, step):
        assert not any(m.training for m in model.modules())
        return batch

    assert train(model, IDS, loss, FAST, prepare=prepare).loss[0] == 0
    assert len(ran) == 2 * FAST.steps * checkpointing  # blocks run again in the backward pass
    for name, module in model.named_modules():
        assert {k: v for k, v in vars(module).items() if "drop" in k} == {
            k: v for k, v in kept[name].items() if "drop" in k
        }


def test_products_are_fast_forwards_and_backwards(monkeypatch):
    if not products._AVAILABLE:
        pytest.skip("no oneDNN here")
    made, before_backward, product = [], [], products._product

    def counted(*args):
        made.append(1)
        return product(*args)

    def loss(model, batch, step, count):
        found = supervised(model, batch, step, count)
        before_backward.append(len(made))
        return found

    monkeypatch.setattr(products, "_product", counted)
    train(student(), IDS, loss, replace(FAST, steps=1))
    assert before_backward == [2 * 7 + 1]
    assert len(made) == 3 * (2 * 7 + 1)


def test_progress_shows_the_loss_and_tokens_per_second(monkeypatch):
    shown = []

    @contextmanager
    def bar(what, total):
        shown.append((what, total))
        yield shown.append

    monkeypatch.setattr(loop, "bar", bar)
    curve = train(student(), IDS, supervised, FAST)
    assert shown[0] == ("training", 4)
    assert shown[1] == f"loss {curve.loss[0]:.4g}, {48 / curve.seconds[0]:,.0f} tokens/s"
    assert len(shown) == 5


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0."),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0."),
        ({"micro_batch": -1}, "micro_batch must be at least 1, not -1."),
        ({"save_every": 0}, "save_every must be at least 1, not 0."),
        ({"lr": 0.0}, "lr must be above 0 and at most 1, not 0.0."),
        ({"lr": math.nan}, "lr must be above 0 and at most 1, not nan."),
        ({"warmup": 4}, "warmup must be from 0 to 3, below steps, not 4."),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, not -0.1."),
        ({"betas": (0.9, 1.0)}, "betas must be two from 0 to below 1, not (0.9, 1.0)."),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or none, not 0.0."),
    ],
)
def test_settings_out_of_range_are_one_line(settings, line):
    with pytest.raises(RecipeError) as caught:
        replace(FAST, **settings)
    assert str(caught.value) == f"error[QF-246]: {line}"


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="no schedule is called 'cosin': did you mean 'cosine'"):
        replace(FAST, schedule="cosin")
    with pytest.raises(RecipeError, match="did you mean 'paged-adamw'"):
        replace(FAST, optimizer="paged-adam")


def test_nothing_to_train_is_one_line():
    with pytest.raises(RecipeError, match="there is nothing to train"):
        train(student().requires_grad_(False), IDS, supervised, FAST)


def test_resuming_needs_a_folder():
    with pytest.raises(RecipeError, match="only from the folder"):
        train(student(), IDS, supervised, FAST, resume=True)


def test_the_curve_of_no_step_is_empty():
    assert asdict(Curve()) == dict.fromkeys(("loss", "lr", "grad_norm", "tokens", "seconds"), ())
