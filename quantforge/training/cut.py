"""A smaller student cut out of a model: some of its blocks, and all else as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantforge.errors import PlanError
from quantforge.models import arch, moe


def blocks_to_keep(count: int, of: int) -> list[int]:
    """Return `count` of `of` blocks, evenly spread, the first and the last among them; of one, the first.

    Raises PlanError unless 0 < count <= of.
    """
    if not 0 < count <= of:
        raise PlanError(297, f"a student of {count} blocks cannot be cut out of {of}; from 1 to {of} can.")
    return [round(i * (of - 1) / max(count - 1, 1)) for i in range(count)]


def config_of(config: Any, count: int) -> Any:
    """Return the config of a student with `count` of the blocks that a model of `config` has."""
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    kept = blocks_to_keep(count, text.num_hidden_layers)
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in kept]
    return smaller


@torch.no_grad()
def cut(model: PreTrainedModel, count: int) -> nn.Module:
    """Return a copy of `model` with `count` of its blocks, evenly spread over its depth.

    Raises PlanError if it has fewer, or its config does not say how many it has.
    """
    kept = blocks_to_keep(count, model.config.get_text_config().num_hidden_layers)
    config = config_of(model.config, count)
    own = next(model.parameters())
    student: nn.Module = AutoModelForCausalLM.from_config(config, dtype=own.dtype).to(own.device)
    if any(isinstance(module, moe.Experts) for module in model.modules()):
        moe.unfuse(student)
    theirs = model.state_dict()
    for name, tensor in student.state_dict().items():
        tensor.copy_(theirs[_source(name, kept)])
    return student.eval()


def _source(name: str, kept: list[int]) -> str:
    """Return the name that a tensor of the student has in the model it was cut from."""
    index, path = arch.block_index(name), arch.block_path(name)
    if index is None or path is None:
        return name
    return f"{path.rpartition('.')[0]}.{kept[index]}{name.removeprefix(path)}"
