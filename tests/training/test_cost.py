"""The estimate of a run agrees with what a run on real tensors keeps."""

import pytest
import torch

from quantforge.models import tiny
from quantforge.training import cost


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_activations_are_bounded_by_those_of_a_real_forward(kind):
    model = tiny.make(kind).train()
    found = {}

    def note(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.zeros(2, 24, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = model(input_ids=ids, use_cache=False)  # alive, so that no memory is used twice
    real = sum(size for place, size in found.items() if place not in own)
    assert real <= cost.rehearse(model.config, 2, 24) <= 1.1 * real
    assert output.logits.requires_grad


def test_a_model_that_cannot_be_rehearsed_has_unknown_activations():
    assert cost.rehearse(object(), 1, 8) is None


def estimate(**changes):
    config = tiny.make("llama").config
    wishes = {"weights": 4000, "trained": 1000, "optimizer": "adamw", "micro_batch": 2, "seq_len": 16, "tokens": 320}
    return cost.estimate(config, **wishes | changes)


def test_each_part_is_counted():
    plain, eight = estimate(), estimate(optimizer="adamw8bit")
    assert (plain.gradients, plain.optimizer, eight.optimizer) == (4000, 8000, 2000)
    assert plain.total == 4000 + 4000 + 8000 + plain.activations + plain.logits
    assert estimate(checkpointing=True).activations < plain.activations


def test_operations_are_six_times_parameters_times_tokens():
    model = tiny.make("llama")
    count = sum(p.numel() for p in model.parameters())
    assert estimate().operations == 6.0 * count * 320
    taught = estimate(teacher=model.config)
    assert taught.operations == 8.0 * count * 320
    assert taught.teacher == 4 * count


def test_the_table_names_every_part():
    said = estimate().table()
    for part in ("student's weights", "gradients", "optimizer states", "activations", "together", "6 x parameters"):
        assert part in said
