"""A student that is cut out of a model has its blocks, and computes as they do in a row."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.errors import PlanError
from quantforge.models import moe, tiny
from quantforge.training.cut import blocks_to_keep, cut


@given(st.integers(1, 80), st.integers(1, 80))
def test_kept_blocks_are_spread_from_the_first_to_the_last(a, b):
    count, of = min(a, b), max(a, b)
    kept = blocks_to_keep(count, of)
    assert len(set(kept)) == count
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert count == 1 or kept[-1] == of - 1
    gaps = {y - x for x, y in pairwise(kept)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize("kind", [*tiny.names(), *tiny.mixtures()])
def test_all_blocks_make_the_model_again(kind):
    model = tiny.make(kind)
    moe.unfuse(model)  # as models are loaded
    ids = torch.arange(12)[None] % model.config.get_text_config().vocab_size
    whole = cut(model, model.config.get_text_config().num_hidden_layers)
    assert torch.equal(whole(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_student_of_one_block_is_the_first():
    model = tiny.make("llama")
    student = cut(model, 1)
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert len(student.model.layers) == student.config.num_hidden_layers == 1
    assert len(model.model.layers) == model.config.num_hidden_layers > 1
    student.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert model.model.layers[0].mlp.up_proj.weight.any()


@pytest.mark.parametrize("count", [0, -1, 99])
def test_more_blocks_than_there_are_is_refused(count):
    with pytest.raises(PlanError, match=f"of {count} blocks"):
        cut(tiny.make("llama"), count)
