"""Teachers: kept predictions are the live ones, within their bytes, and refused for anything else; pairs that fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantforge.distill.losses import Objective
from quantforge.distill.targets import MOST_BYTES, keep, top_k_loss
from quantforge.errors import DataError, PlanError
from quantforge.models import load as loading
from quantforge.models import tiny
from quantforge.training import teachers
from quantforge.training.batches import Batch, batch_of_step, split
from quantforge.training.teachers import Kept, Live, Made

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"


class Words:
    """A tokenizer whose tokens are characters, numbered by `order`."""

    def __init__(self, order: str, longest: int = 1) -> None:
        self.order, self.longest = order, longest

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self.order)}

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.get_vocab().get(letter, 0) for letter in text[:: self.longest]]}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.make("llama", seed=1)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def facts(ids) -> Made:
    return teachers.made(Words("abc"), "f" * 64, ids, 128)


def never() -> nn.Module:
    raise AssertionError("the teacher was loaded")


# --- kept predictions -------------------------------------------------------------------------------------------------


def test_a_kept_teacher_has_what_the_live_one_predicts(model, ids, facts, tmp_path):
    found = teachers.kept_teacher(tmp_path / "t.safetensors", facts, ids, lambda: model)
    again = teachers.kept_teacher(tmp_path / "t.safetensors", facts, ids, never)
    batch = batch_of_step(ids, 3, 0, 1)
    direct = keep(Live(model).targets(batch))
    for one in (found.targets(batch), again.targets(batch)):
        assert torch.equal(one.ids, direct.ids)
        torch.testing.assert_close(one.log_probs, direct.log_probs)
        assert one.vocab == 128
    places = torch.tensor([0, 17, 40])
    assert torch.equal(again.rows(batch)(places).ids, direct.ids[places])


def test_how_many_windows_go_through_the_teacher_at_once_changes_nothing(model, ids):
    one, three = (teachers.predictions(model, ids, batch=n) for n in (1, 4))
    assert torch.equal(one.ids, three.ids)
    torch.testing.assert_close(one.log_probs, three.log_probs)


def test_the_loss_of_a_kept_teacher_is_that_of_the_most_probable_tokens(model, ids, facts, tmp_path):
    kept = teachers.kept_teacher(tmp_path / "t.safetensors", facts, ids, lambda: model)
    student = torch.randn(6, 16, 128)
    batch = batch_of_step(ids, 6, 0, 0)
    whole = Live(model).targets(batch)
    expected = top_k_loss(student, keep(whole), Objective("fkl"), count=90)
    torch.testing.assert_close(top_k_loss(student, kept.targets(batch), Objective("fkl"), count=90), expected)


def test_a_file_takes_at_most_300_bytes_a_token(tmp_path):
    """Measured on a file of a vocabulary too large for two bytes an id."""
    wide = tiny.make("llama", vocab_size=70_000)
    ids = torch.randint(3, 70_000, (8, 64))
    facts = teachers.made(Words("abc"), "f" * 64, ids, 70_000)
    teachers.kept_teacher(tmp_path / "t.safetensors", facts, ids, lambda: wide, batch=4)
    per_token = (tmp_path / "t.safetensors").stat().st_size / ids.numel()
    assert 264 < per_token < MOST_BYTES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer": "0" * 64}, "tokenizer"),
        ({"model": "0" * 64}, "model"),
        ({"text": "0" * 64}, "text"),
        ({"vocab": 127}, "vocabulary"),
        ({"seq_len": 8}, "length of windows"),
        ({"k": 16}, "k"),
    ],
)
def test_what_was_kept_of_anything_else_is_refused_in_a_line(model, ids, facts, tmp_path, change, named):
    file = tmp_path / "t.safetensors"
    teachers.kept_teacher(file, facts, ids, lambda: model)
    with pytest.raises(DataError) as caught:
        teachers.kept_teacher(file, replace(facts, **change), ids, never)
    assert caught.value.number == 445
    assert f"'t.safetensors' was made with another {named}:" in str(caught.value)


def test_another_tokenizer_and_other_text_have_other_fingerprints(ids, facts):
    assert teachers.made(Words("acb"), "f" * 64, ids, 128).tokenizer != facts.tokenizer
    assert teachers.made(Words("abc", 2), "f" * 64, ids, 128).tokenizer != facts.tokenizer
    assert teachers.made(Words("abc"), "f" * 64, ids + 1, 128).text != facts.text
    assert teachers.made(Words("abc"), "f" * 64, ids, 128) == facts


def test_kept_predictions_are_refused_for_text_that_is_not_theirs(model, ids):
    kept = Kept(teachers.predictions(model, ids), ids)
    batch = batch_of_step(ids, 3, 0, 0)
    for part in split(batch, 2):
        assert len(kept.targets(part).ids) == part.ids.numel()
    for other in (replace(batch, ids=batch.ids + 1), replace(batch, ids=batch.ids[:, :8])):
        with pytest.raises(DataError, match="the batch holds other text"):
            kept.targets(other)


# --- live -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*tiny.names(), *tiny.mixtures()])
def test_rows_are_the_logits_of_places_and_no_gradient_reaches_a_live_teacher(arch, ids):
    model = tiny.make(arch).train()
    teacher = Live(model)
    assert not model.training
    batch = batch_of_step(ids, 3, 0, 0)
    whole = teacher.targets(batch)
    assert not whole.requires_grad
    places = torch.tensor([3, 20, 47])
    rows = teacher.rows(batch)(places)
    assert not rows.requires_grad
    torch.testing.assert_close(rows, whole.flatten(end_dim=1)[places], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma3_text"])
def test_padding_on_either_side_changes_no_prediction(arch, ids):
    teacher = Live(tiny.make(arch))
    row = ids[0]
    alone = teacher.targets(Batch(row[None], torch.ones(1, 16).bool(), torch.ones(1, 16).bool(), (0,)))[0]
    for left in (0, 3):
        width = 20
        at = slice(left, left + 16) if left else slice(0, 16)
        padded, attention = torch.full((1, width), 77), torch.zeros(1, width, dtype=torch.bool)
        padded[0, at], attention[0, at] = row, True
        found = teacher.targets(Batch(padded, attention, attention, (0,)))[0, at]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


# --- text that the teacher writes -------------------------------------------------------------------------------------


def test_the_teachers_text_is_written_once_and_read_again(model, ids, tmp_path):
    file, facts = tmp_path / "texts.safetensors", {"model": "a" * 64, "tokenizer": "b" * 64}
    prompts = ids[:, :5]
    found = teachers.write_texts(file, prompts, 7, facts, lambda: model, seed=2)
    assert found.shape == (6, 12)
    assert torch.equal(found[:, :5], prompts)
    assert torch.equal(found, teachers.write_texts(file, prompts, 7, facts, never, seed=2))
    other = tmp_path / "other.safetensors"
    assert torch.equal(found, teachers.write_texts(other, prompts, 7, facts, lambda: model, seed=2))
    for name, changed in (("model", facts | {"model": "0" * 64}), ("tokenizer", facts | {"tokenizer": "0" * 64})):
        with pytest.raises(DataError, match=f"another {name}:"):
            teachers.write_texts(file, prompts, 7, changed, never, seed=2)
    with pytest.raises(DataError, match="another seed: '2', not '3'"):
        teachers.write_texts(file, prompts, 7, facts, never, seed=3)
    with pytest.raises(DataError, match="another text:"):
        teachers.write_texts(file, prompts + 1, 7, facts, never, seed=2)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_a_teacher_with_the_students_tokenizer_is_taken():
    source = loading.find(str(TINY))
    tokenizers = loading.tokenizer(source), loading.tokenizer(source)
    teachers.check_pair(*tokenizers, source.config, source.config)
    assert teachers.tokenizer_digest(tokenizers[0]) == teachers.tokenizer_digest(tokenizers[1])


@pytest.mark.parametrize(
    ("theirs", "size", "message"),
    [
        (Words("acb"), 128, "another tokenizer than the student: 'b' has the id 2 there and 1 here"),
        (Words("ab"), 128, "'c' has the id none there and 2 here"),
        (Words("abc", 2), 128, "of the same tokens, it cuts text into others"),
        (Words("abc"), 160, "the teacher predicts 160 tokens and the student 128"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused_in_a_line(theirs, size, message):
    configs = tiny.make("llama").config, tiny.make("llama", vocab_size=size).config
    with pytest.raises(PlanError, match=message) as caught:
        teachers.check_pair(Words("abc"), theirs, *configs)
    assert caught.value.number == 296
