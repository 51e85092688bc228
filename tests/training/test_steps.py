"""Losses of a step: those of plain loss functions on the models' logits; micro-batches add up; who writes, and when."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from quantforge.distill import gkd as on_policy
from quantforge.distill.generate import writing
from quantforge.distill.gkd import gkd_objective, positions_of
from quantforge.distill.layers import layerwise_loss
from quantforge.distill.losses import Objective, cross_entropy, distillation_loss, next_tokens
from quantforge.distill.minillm import Sampled, mixed_log_probs, policy_loss, token_log_probs
from quantforge.distill.targets import keep, top_k_loss
from quantforge.errors import DataError, PlanError, RecipeError
from quantforge.models import tiny
from quantforge.training import steps, teachers
from quantforge.training.batches import Batch, batch_of_step, split
from quantforge.training.teachers import Kept, Live

OBJECTIVES = [
    Objective("fkl"),
    Objective("rkl", temperature=2.0),
    Objective("jsd", beta=0.3, hard=0.25),
    Objective("skew-kl", hard=1.0),
]


@pytest.fixture
def student() -> nn.Module:
    return tiny.make("llama", seed=0)


@pytest.fixture(scope="module")
def teacher() -> Live:
    return Live(tiny.make("llama", seed=1))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def batch(ids) -> Batch:
    return batch_of_step(ids, 4, 0, 0)


def gradient(student: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def direct(student: nn.Module, teacher: Live, batch: Batch, objective: Objective, count: int) -> Tensor:
    labels, mask = next_tokens(batch.ids, batch.counted)
    with torch.no_grad():
        goal = teacher.model(batch.ids).logits
    return distillation_loss(student(batch.ids).logits, goal, objective, mask, labels=labels, count=count)


# --- supervised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_supervised_is_the_plain_loss_of_both_logits(student, teacher, batch, objective):
    count = batch.predictions
    found = steps.supervised(teacher, objective)(student, batch, 0, count)
    expected = direct(student, teacher, batch, objective, count)
    torch.testing.assert_close(found, expected)
    assert count == 4 * 11
    mine, theirs = gradient(student, found), gradient(student, expected)
    assert mine.keys() == dict(student.named_parameters()).keys()
    torch.testing.assert_close(mine, theirs)
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_few_logits_at_a_time_give_the_same_loss_and_gradient(student, teacher, batch, objective):
    whole, chunked = (
        steps.supervised(teacher, objective, chunk=chunk)(student, batch, 0, batch.predictions) for chunk in (None, 7)
    )
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(gradient(student, chunked), gradient(student, whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_of_all_tokens_never_exist_with_a_chunk(student, teacher, batch, adapted):
    seen = []
    if adapted:
        student = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj"]))
    for model in (student, teacher.model):
        model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: seen.append(output[..., 0].numel())
        )
    steps.supervised(teacher, Objective(), chunk=5)(student, batch, 0, batch.predictions).backward()
    teacher.model.lm_head._forward_hooks.clear()
    assert max(seen) == 5


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("kind", ["live", "kept", "text"])
def test_micro_batches_add_up_to_the_step(student, teacher, ids, batch, kind, chunk):
    kept = Kept(teachers.predictions(teacher.model, ids), ids)
    loss = {
        "live": steps.supervised(teacher, Objective("jsd", hard=0.5), chunk=chunk),
        "kept": steps.supervised(kept, Objective(hard=0.5), chunk=chunk),
        "text": steps.language_model(chunk=chunk),
    }[kind]
    counted = batch.counted.clone()
    counted[0] = False  # a micro-batch of which nothing counts
    counted[1, 5:] = False
    batch = Batch(batch.ids, batch.attention, counted, batch.windows)
    count = batch.predictions
    whole = loss(student, batch, 0, count)
    parts = sum(loss(student, part, 0, count) for part in split(batch, 4))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(student, parts), gradient(student, whole), rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_with_hidden_states_too(student, teacher, batch):
    count = batch.predictions
    for loss in (steps.supervised(teacher, Objective(), hidden=1.0), steps.layerwise(teacher)):
        whole, parts = loss(student, batch, 0, count), sum(loss(student, part, 0, count) for part in split(batch, 4))
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(gradient(student, parts), gradient(student, whole), rtol=1e-4, atol=1e-6)


def test_without_a_teacher_the_loss_is_that_of_the_next_tokens(student, batch):
    found = steps.language_model()(student, batch, 0, batch.predictions)
    logits = student(batch.ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(end_dim=1), batch.ids[:, 1:].flatten())
    torch.testing.assert_close(found, expected)


def test_with_labels_alone_the_teacher_is_not_asked(student, batch):
    class Silent:
        def targets(self, batch):
            raise AssertionError("the teacher was asked")

        rows = targets

    found = steps.supervised(Silent(), Objective(hard=1))(student, batch, 0, batch.predictions)
    torch.testing.assert_close(found, steps.language_model()(student, batch, 0, batch.predictions))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_on_which_side_padding_is_changes_neither_loss_nor_gradient(ids, side, arch):
    student, teacher = tiny.make(arch, seed=0), Live(tiny.make(arch, seed=1))
    loss = steps.supervised(teacher, Objective(hard=0.3))
    rows = [ids[0], ids[1, :7]]
    alone = [Batch(r[None], torch.ones(1, len(r)).bool(), torch.ones(1, len(r)).bool(), (0,)) for r in rows]
    expected = sum(loss(student, one, 0, 17) for one in alone)
    padded, attention = torch.full((2, 12), 99), torch.zeros(2, 12, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(12 - len(row), 12)
        padded[i, at], attention[i, at] = row, True
    counted = attention & (positions_of(attention) > 0)
    found = loss(student, Batch(padded, attention, counted, (0, 1)), 0, 17)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(student, found), gradient(student, expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_kept_teacher_gives_the_loss_of_what_was_kept(student, ids, chunk):
    wide = tiny.make("llama", seed=1)
    kept = Kept(teachers.predictions(wide, ids, k=8), ids)
    objective = Objective(hard=0.3)
    batch = batch_of_step(ids, 3, 1, 1)
    labels, mask = next_tokens(batch.ids, batch.counted)
    found = steps.supervised(kept, objective, chunk=chunk)(student, batch, 0, batch.predictions)
    with torch.no_grad():
        goal = keep(wide(batch.ids).logits, 8)
    expected = top_k_loss(student(batch.ids).logits, goal, objective, mask, labels=labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(student, found), gradient(student, expected), rtol=1e-4, atol=1e-6)


def test_each_model_goes_through_a_micro_batch_once(student, teacher, batch):
    calls = []
    handles = [m.register_forward_hook(lambda module, *_: calls.append(module)) for m in (student, teacher.model)]
    for chunk in (None, 6):
        steps.supervised(teacher, Objective(), chunk=chunk)(student, batch, 0, batch.predictions).backward()
    for handle in handles:
        handle.remove()
    assert calls.count(student) == calls.count(teacher.model) == 2


def test_a_step_without_a_counted_prediction_is_refused(student, teacher, batch):
    empty = Batch(batch.ids, batch.attention, batch.counted & False, batch.windows)
    for loss in (steps.supervised(teacher, Objective()), steps.language_model(), steps.layerwise(teacher)):
        with pytest.raises(DataError, match=r"no prediction counts in step 7: the mask .* is empty") as caught:
            loss(student, empty, 7, empty.predictions)
        assert caught.value.number == 471


@pytest.mark.parametrize("objective", [Objective("rkl"), Objective(temperature=2.0)], ids=str)
def test_what_a_kept_teacher_cannot_give_is_refused_before_any_step(teacher, ids, objective):
    kept = Kept(teachers.predictions(teacher.model, ids, k=8), ids)
    with pytest.raises(RecipeError, match="a live teacher"):
        steps.supervised(kept, objective)
    with pytest.raises(RecipeError, match="hidden states needs a live teacher"):
        steps.supervised(kept, Objective(), hidden=1.0)


def test_a_student_with_adapters_is_a_student(teacher, batch):
    """As for QLoRA: gradients reach the adapters alone, and a chunk gives the same ones."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    student = get_peft_model(tiny.make("llama", seed=0), config)
    whole, chunked = (steps.language_model(chunk=chunk)(student, batch, 0, 44) for chunk in (None, 6))
    torch.testing.assert_close(chunked, whole)
    mine, theirs = (gradient(student, found) for found in (chunked, whole))
    assert mine
    assert all("lora_" in name for name in mine)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert gradient(student, steps.layerwise(teacher)(student, batch, 0, 44)).keys() == mine.keys()
    written = steps.gkd(teacher, share=1, prompt=4)[1](student, batch, 0)
    assert written.counted[:, 4:].all()


# --- hidden states ----------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Return what each block gives, by transformers itself; the last is before the norm."""
    caught = []
    handles = [b.register_forward_hook(lambda m, a, out: caught.append(out)) for b in model.model.layers]
    model(ids)
    for handle in handles:
        handle.remove()
    return caught


def test_hidden_states_are_added_from_the_same_forward(student, teacher, batch):
    _, mask = next_tokens(batch.ids, batch.counted)
    count = batch.predictions
    found = steps.supervised(teacher, Objective(), hidden=0.5)(student, batch, 0, count)
    with torch.no_grad():
        goals = blocks_of(teacher.model, batch.ids)
    between = layerwise_loss(blocks_of(student, batch.ids), goals, mask, relative=True)
    expected = direct(student, teacher, batch, Objective(), count) + 0.5 * between
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(student, found), gradient(student, expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("relative", [True, False])
def test_layers_of_the_students_own_stream_are_compared_as_they_are(student, teacher, batch, relative):
    _, mask = next_tokens(batch.ids, batch.counted)
    found = steps.layerwise(teacher, relative=relative, forced=False)(student, batch, 0, batch.predictions)
    with torch.no_grad():
        goals = blocks_of(teacher.model, batch.ids)
    expected = layerwise_loss(blocks_of(student, batch.ids), goals, mask, relative=relative)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(student, found), gradient(student, expected), rtol=1e-4, atol=1e-6)


def test_forced_blocks_are_given_what_the_teachers_give_and_do_not_reach_each_other(student, teacher, batch):
    loss = steps.layerwise(teacher)
    before = gradient(student, loss(student, batch, 0, batch.predictions))
    student.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    student.model.embed_tokens.weight.data.mul_(3)
    after = gradient(student, loss(student, batch, 0, batch.predictions))
    second = [name for name in before if name.startswith("model.layers.1")]
    assert second
    assert all(torch.equal(before[name], after[name]) for name in second)
    assert not torch.equal(before["model.layers.0.mlp.down_proj.weight"], after["model.layers.0.mlp.down_proj.weight"])
    assert not any("embed" in name or "lm_head" in name for name in before)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma3_text", "mixtral"])
def test_blocks_of_a_student_that_is_its_teacher_differ_in_nothing(batch, arch):
    for forced in (True, False):
        same = steps.layerwise(Live(tiny.make(arch)), forced=forced)(tiny.make(arch), batch, 0, batch.predictions)
        assert float(same.detach()) < 1e-10


def test_a_student_of_fewer_blocks_is_paired_by_depth(batch):
    teacher, student = Live(tiny.make("llama", num_hidden_layers=4)), tiny.make("llama", num_hidden_layers=2)
    student.model.layers[1].load_state_dict(teacher.model.model.layers[3].state_dict())
    alone = steps.layerwise(teacher, relative=False)
    before = alone(student, batch, 0, batch.predictions)
    with torch.no_grad():
        goals = blocks_of(teacher.model, batch.ids)
    cos_sin = teacher.model.model.rotary_emb(goals[1], torch.arange(12)[None])
    own = student.model.layers[1](goals[1], position_embeddings=cos_sin)
    first = student.model.layers[0](teacher.model.model.embed_tokens(batch.ids), position_embeddings=cos_sin)
    _, mask = next_tokens(batch.ids, batch.counted)
    torch.testing.assert_close(before, layerwise_loss([first, own], [goals[1], goals[3]], mask))


# --- on the student's own text ----------------------------------------------------------------------------------------


def test_lambda_0_never_samples_and_is_supervised_to_the_bit(student, teacher, ids, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the student was asked to write")

    monkeypatch.setattr(steps, "sample", never)
    monkeypatch.setattr(on_policy, "sample", never)
    loss, prepare = steps.gkd(teacher, share=0, prompt=4)
    plain = steps.supervised(teacher, gkd_objective())
    for step in range(6):
        given = batch_of_step(ids, 4, 0, step)
        batch = prepare(student, given, step)
        assert batch is given
        found, expected = (each(student, batch, step, 44) for each in (loss, plain))
        assert torch.equal(found, expected)
        mine, theirs = (gradient(student, each) for each in (found, expected))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_lambda_1_always_trains_on_what_the_student_wrote(student, teacher, ids):
    loss, prepare = steps.gkd(teacher, share=1, prompt=4, temperature=0)
    for step in range(4):
        given = batch_of_step(ids, 4, 0, step)
        batch = prepare(student, given, step)
        assert batch.ids.shape == given.ids.shape
        assert torch.equal(batch.ids[:, :4], given.ids[:, :4])
        assert not batch.counted[:, :4].any()
        assert batch.counted[:, 4:].all()
        assert batch.windows == given.windows
        for row in batch.ids.tolist():
            assert row[6] == int(student(torch.tensor([row[:6]])).logits[0, -1].argmax())
        found = loss(student, batch, step, batch.predictions)
        expected = direct(student, teacher, batch, gkd_objective(), 4 * 8)
        torch.testing.assert_close(found, expected)


def test_what_is_written_is_settled_by_seed_and_step_and_carries_no_gradient(student, teacher, batch):
    _, prepare = steps.gkd(teacher, share=1, prompt=4, seed=5)
    student.train()
    before = torch.get_rng_state()
    first = prepare(student, batch, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    assert torch.equal(first.ids, prepare(student, batch, 3).ids)
    assert not torch.equal(first.ids, prepare(student, batch, 4).ids)
    assert not torch.equal(first.ids, steps.gkd(teacher, share=1, prompt=4, seed=6)[1](student, batch, 3).ids)
    assert all(p.grad is None for p in student.parameters())


def test_a_text_that_ends_early_is_padded_and_padding_does_not_count(student, teacher, batch):
    ends = tuple(range(3, 80))
    loss, prepare = steps.gkd(teacher, share=1, prompt=4, new=20, ends=ends, pad=0)
    written = prepare(student, batch, 0)
    lengths = written.counted.sum(1)
    assert lengths.min() < lengths.max() <= 20
    for row, counted in zip(written.ids, written.counted, strict=True):
        text = row[counted].tolist()
        assert text[-1] in ends or len(text) == written.ids.shape[1] - 4
        assert not set(text[:-1]) & set(ends)
    found = loss(student, written, 0, written.predictions)
    changed = written.ids.masked_fill(~written.attention, 55)
    other = loss(student, Batch(changed, written.attention, written.counted, written.windows), 0, written.predictions)
    torch.testing.assert_close(found, other, rtol=0, atol=1e-6)


def test_tokens_after_the_prompt_alone_count_where_so_asked(student, batch):
    counted = steps.after_prompt(5)(student, batch, 0).counted
    assert not counted[:, :5].any()
    assert counted[:, 5:].all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"share": 1.5}, RecipeError, "lambda, .*, must lie from 0 to 1, not be 1.5"),
        ({"share": 1, "prompt": 0}, RecipeError, "at least 1 token after at least 1, not None after 0"),
        ({"share": 1, "new": 0}, RecipeError, "not 0 after 4"),
        ({"share": 1, "prompt": 12}, DataError, "a prompt of 12 tokens leaves nothing of windows of 12"),
        ({"share": 1, "new": 500}, PlanError, "more than the 128 positions"),
    ],
)
def test_what_cannot_be_written_is_refused(student, teacher, batch, options, error, message):
    with pytest.raises(error, match=message):
        steps.gkd(teacher, **{"prompt": 4, **options})[1](student, batch, 0)


def test_a_kept_teacher_cannot_judge_what_the_student_writes(teacher, ids):
    kept = Kept(teachers.predictions(teacher.model, ids), ids)
    with pytest.raises(RecipeError, match=r"a share of 0.5 .* needs a live teacher"):
        steps.gkd(kept, prompt=4)


# --- MiniLLM ----------------------------------------------------------------------------------------------------------


def as_sampled(student: nn.Module, teacher: Live, batch: Batch, alpha: float) -> Sampled:
    """Return what is known of the written texts, from whole distributions."""
    labels, mask = next_tokens(batch.ids, batch.counted)
    with torch.no_grad():
        ours, theirs = student(batch.ids).logits, teacher.model(batch.ids).logits
        mixture = mixed_log_probs(ours, theirs, alpha)
        drawn = mixture.gather(-1, labels[..., None])[..., 0].masked_fill(~mask, 0)
        return Sampled(labels, mask, token_log_probs(ours, labels, mask), drawn)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_the_gradient_is_that_of_the_policy_loss_on_the_same_texts(student, teacher, batch, alpha):
    loss, prepare = steps.minillm(teacher, prompt=4, alpha=alpha)
    written = prepare(student, batch, 0)
    count = written.predictions
    assert count == 4 * 8
    found = loss(student, written, 0, count)
    with torch.no_grad():
        goal = teacher.model(written.ids).logits
    expected = policy_loss(student(written.ids).logits, goal, as_sampled(student, teacher, written, alpha))
    torch.testing.assert_close(found, expected.total)
    torch.testing.assert_close(gradient(student, found), gradient(student, expected.total), rtol=1e-4, atol=1e-6)
    parts = sum(loss(student, part, 0, count) for part in split(written, 3))
    torch.testing.assert_close(parts, found)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_texts_are_drawn_from_the_mixture_of_both_models(student, teacher, alpha):
    """The same prompt many times: first tokens come as often as αp + (1 − α)q says."""
    count = 6000
    prompt = torch.tensor([[5, 9, 23, 40]]).expand(count, 4)
    given = Batch(prompt, prompt > 0, prompt > 0, tuple(range(count)))
    _, prepare = steps.minillm(teacher, prompt=4, new=1, alpha=alpha)
    found = prepare(student, given, 0).ids[:, 4].bincount(minlength=128) / count
    with torch.no_grad():
        q, p = (model(prompt[:1]).logits[0, -1].softmax(-1) for model in (student, teacher.model))
    expected = alpha * p + (1 - alpha) * q
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count) ** 0.5 + 1 / count).all()
    assert (p - q).abs().sum() > 0.5  # so that either alone would be noticed


def test_texts_are_used_for_several_steps_with_the_probabilities_they_were_drawn_with(teacher, ids):
    student = tiny.make("llama", seed=0)
    loss, prepare = steps.minillm(teacher, prompt=4, reuse=2)
    first = prepare(student, batch_of_step(ids, 4, 0, 0), 0)
    drawn = as_sampled(student, teacher, first, 0.2)
    loss(student, first, 0, first.predictions).backward()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    given = batch_of_step(ids, 4, 0, 1)
    second = prepare(student, given, 1)
    assert torch.equal(second.ids, first.ids)
    assert second.windows == given.windows
    found = loss(student, second, 1, second.predictions)
    with torch.no_grad():
        goal = teacher.model(second.ids).logits
    expected = policy_loss(student(second.ids).logits, goal, drawn).total
    torch.testing.assert_close(found, expected)
    unclipped = policy_loss(student(second.ids).logits, goal, drawn, clip=None).total
    assert not torch.allclose(expected, unclipped)  # the clip has something to do
    third = prepare(student, batch_of_step(ids, 4, 0, 2), 2)
    assert not torch.equal(third.ids, first.ids)


def test_the_pre_training_loss_is_added_over_the_windows_that_prompts_come_from(student, teacher, ids, batch):
    plain, prepare = steps.minillm(teacher, prompt=4)
    added, _ = steps.minillm(teacher, prompt=4, text=ids, text_weight=0.5, batch_size=4)
    written = prepare(student, batch, 0)
    count = written.predictions
    windows = ids[list(batch.windows)]
    labels, mask = next_tokens(windows)
    expected = plain(student, written, 0, count) + 0.5 * cross_entropy(student(windows).logits, labels, mask)
    whole = added(student, written, 0, count)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(sum(added(student, part, 0, count) for part in split(written, 4)), whole)
    torch.testing.assert_close(gradient(student, whole), gradient(student, expected), rtol=1e-4, atol=1e-6)


def test_a_student_that_is_its_teacher_has_only_the_gradient_of_chance(teacher, batch):
    twin = tiny.make("llama", seed=1)
    loss, prepare = steps.minillm(Live(tiny.make("llama", seed=1)), prompt=4)
    written = prepare(twin, batch, 0)
    found = loss(twin, written, 0, written.predictions)
    assert max(g.abs().max() for g in gradient(twin, found).values()) < 1e-5
    assert math.isclose(float(found.detach()), 0, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.0}, "alpha, .*, must be at least 0 and below 1, not 1"),
        ({"prompt": 0}, "not None after 0"),
        ({"reuse": 0}, "not 0 of 1"),
        ({"batch_size": 0}, "not 1 of 0"),
    ],
)
def test_what_minillm_cannot_do_is_refused(teacher, options, message):
    with pytest.raises(RecipeError, match=message):
        steps.minillm(teacher, **{"prompt": 4, **options})


def test_a_step_takes_no_gradient_from_writing(student, teacher, batch):
    with writing(student):
        assert not torch.is_grad_enabled()
    loss, prepare = steps.minillm(teacher, prompt=4)
    written = prepare(student, batch, 0)
    assert not written.ids.requires_grad
    loss(student, written, 0, written.predictions).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
