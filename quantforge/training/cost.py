"""What a run takes before it is begun: memory by part, and operations; from the shapes of the model alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from quantforge.numerics import blocks
from quantforge.plan import Plan
from quantforge.training.layers import norms

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0, "paged-adamw": 8.0, "paged-adamw8bit": 2.0}  # of a trained number


@dataclass(frozen=True)
class Cost:
    """Bytes of each part, and how much is to be computed.

    weights      of the student as it is trained, and of a live teacher
    gradients    of what is trained, float32
    optimizer    its states; those of a paged one lie in files
    activations  kept for the backward pass of one micro-batch; None where the model cannot be rehearsed
    logits       of one micro-batch, with their gradient and a live teacher's
    operations   6 · parameters · tokens for the student, 2 · parameters · tokens for a live teacher
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    activations: int | None
    logits: int
    operations: float
    trained: int
    tokens: int

    @property
    def total(self) -> int:
        """Return the sum of all bytes that are known."""
        parts = (self.weights, self.teacher, self.gradients, self.optimizer, self.activations or 0, self.logits)
        return sum(parts)

    def table(self) -> str:
        """Return it as lines of text."""
        rows = [
            ("student's weights", self.weights),
            ("teacher's weights", self.teacher),
            ("gradients", self.gradients),
            ("optimizer states", self.optimizer),
            ("activations", self.activations),
            ("logits", self.logits),
            ("together", self.total),
        ]
        lines = [f"{name:18} {_megabytes(size)}" for name, size in rows]
        lines.append(f"{'trained':18} {self.trained:>13,} numbers")
        lines.append(f"{'tokens':18} {self.tokens:>13,}")
        lines.append(f"{'operations':18} {self.operations:>13.3g}  6 x parameters x tokens, 2 x for a live teacher")
        return "\n".join(lines)


def _megabytes(size: int | None) -> str:
    return "      unknown" if size is None else f"{size / 1e6:>10,.1f} MB"


def estimate(
    config: Any,
    *,
    weights: int,
    trained: int,
    optimizer: str,
    micro_batch: int,
    seq_len: int,
    tokens: int,
    teacher: Any = None,
    checkpointing: bool = False,
) -> Cost:
    """Return what a run takes.

    config         of the student
    weights        bytes of the student as it is trained
    trained        how many numbers are
    micro_batch    windows of seq_len tokens that go through the model at once
    tokens         of the whole run
    teacher        config of a live teacher; None for none, or for kept predictions
    checkpointing  activations within blocks are computed again in the backward pass
    """
    vocab = config.get_text_config().vocab_size
    kept = rehearse(config, micro_batch, seq_len)
    own, theirs = (0 if c is None else parameters(c) for c in (config, teacher))
    return Cost(
        weights=weights,
        teacher=4 * theirs,
        gradients=4 * trained,
        optimizer=round(STATE_BYTES[optimizer] * trained),
        activations=_checkpointed(kept, config, micro_batch * seq_len) if checkpointing and kept else kept,
        logits=4 * micro_batch * seq_len * vocab * (3 if teacher is not None else 2),
        operations=(6.0 * own + 2.0 * theirs) * tokens,
        trained=trained,
        tokens=tokens,
    )


def planned(plan: Plan, skeleton: nn.Module, parts: Iterable[str]) -> int:
    """Return how many numbers are trained of a model that is yet to be quantized by `plan`, for `parts` of it."""
    found = 0
    for part in parts:
        if part == "norms":
            found += sum(getattr(module, name).numel() for module, name in norms(skeleton))
            continue
        for p in plan.layers.values():
            found += {
                "scales": math.prod(blocks.counts(p.shape, p.format.block)),
                "zero-points": 0 if p.format.symmetric else math.prod(blocks.counts(p.shape, p.format.block)),
                "weights": p.shape[0] * p.shape[1],
                "biases": p.shape[0] if getattr(skeleton.get_submodule(p.name), "bias", None) is not None else 0,
                "factors": sum(getattr(c, "rank", 0) * sum(p.shape) for c in p.corrections),
            }[part]
    return found


def held(plan: Plan, *, unpacked: bool) -> int:
    """Return the bytes of a quantized student in training: codes, two a byte where they fit, and floats in float32.

    unpacked  whether the codes are kept in a byte each besides, to be saved again
    """
    found = 4 * plan.kept[0]
    for p in plan.layers.values():
        weights = p.shape[0] * p.shape[1]
        found += weights // 2 if p.format.grid.bits <= 4 else weights
        found += weights if unpacked else 0
        found += max(p.nbits - weights * p.format.grid.bits, 0) // 8
    return found


def adapters(plan: Plan, rank: int) -> int:
    """Return how many numbers adapters of this rank have on every layer of `plan`: rank · (in + out) each."""
    return sum(rank * sum(p.shape) for p in plan.layers.values())


def parameters(config: Any) -> int:
    """Return how many numbers a model of this config has, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def rehearse(config: Any, batch: int, seq_len: int) -> int | None:
    """Return the bytes that a float32 model's forward keeps for its backward pass, from a rehearsal without memory.

    Logits are not among them. Attention is rehearsed with a mask and with keys and values repeated for grouped heads,
    which a real forward may spare: it is an upper bound. None for a model whose forward looks at values.
    """
    found: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with suppress(Exception), FakeTensorMode():  # whatever a model does that only values can tell
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        ids = torch.zeros(batch, seq_len, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(input_ids=ids, use_cache=False)
        return sum(size for place, size in found.items() if place not in own)
    return None


def _checkpointed(kept: int, config: Any, tokens: int) -> int:
    """Return what is kept if each block keeps only its input, and one block at a time all of its own."""
    text = config.get_text_config()
    depth, width = int(text.num_hidden_layers), int(text.hidden_size)
    return kept // depth + 4 * tokens * width * depth
