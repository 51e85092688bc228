"""What there is to do: the weights in and outside the decoder blocks, the stages of a block, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from quantforge.models import arch, moe
from quantforge.plan import LayerPlan, Plan
from quantforge.preflight import rehearsal
from quantforge.preflight.rehearsal import Forward, Machine, Solving
from quantforge.preflight.strategies import BATCH_TOKENS

_BACKWARD = 3  # forward passes that a step of training costs


@dataclass(frozen=True)
class StageWork:
    """A stage of layers that are solved together: rows R of all of them, columns D, and how their solver behaves.

    share  of all tokens that reach it, as an expert's router sends them
    """

    rows: int
    columns: int
    plan: LayerPlan
    solving: Solving
    share: float = 1.0


@dataclass(frozen=True)
class Work:
    """A plan laid over a model, in numbers.

    outside         parameters that are in no decoder block
    head            of these, those of an output head that is not tied, which a streamed run does not hold
    outside_widest  of the largest tensor there
    blocks          parameters of each decoder block
    widest          of the largest layer that is quantized
    stages          of all blocks, in order
    forward         what the forward of a batch holds
    operations      of the forward of one token through all blocks
    entry           bytes a token that enter a block
    batch_tokens    tokens that go through the model at once
    machine         what it computes with
    resident        bytes of the process before any work
    """

    outside: int
    head: int
    outside_widest: int
    blocks: tuple[int, ...]
    widest: int
    stages: tuple[StageWork, ...]
    forward: Forward
    operations: float
    entry: int
    batch_tokens: int
    machine: Machine
    resident: int

    @property
    def parameters(self) -> int:
        """Return how many parameters the model has, tied ones once."""
        return self.outside + sum(self.blocks)


def lay_out(plan: Plan, skeleton: nn.Module, *, seq_len: int, resident: int, quick: bool = False) -> Work:
    """Return the work of `plan` on a skeleton without weights, in windows of `seq_len` tokens.

    resident  bytes of the process before any work
    quick     measure nothing: solvers hold as much as any does, and times mean nothing
    """
    machine = Machine(1e11, 1e10) if quick else rehearsal.machine()
    blocks: dict[str, int] = {}
    outside, outside_widest, seen = 0, 0, set[int]()
    for name, parameter in skeleton.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        path = arch.block_path(name)
        if path is None:
            outside += parameter.numel()
            outside_widest = max(outside_widest, parameter.numel())
        else:
            blocks[path] = blocks.get(path, 0) + parameter.numel()
    output, inputs = (get() for get in (skeleton.get_output_embeddings, skeleton.get_input_embeddings))  # type: ignore[operator]
    head = 0 if output is None or output.weight is inputs.weight else output.weight.numel()
    text: Any = plan.config.get_text_config()
    of = rehearsal.solving(plan, None if quick else machine.speed)
    stages = []
    for names in plan.stages:
        layers = [plan.layers[name] for name in names]
        rows, columns = sum(p.shape[0] for p in layers), layers[0].shape[1]
        stages.append(StageWork(rows, columns, layers[0], of(layers[0]), _share(names[0], text)))
    windows = max(BATCH_TOKENS // seq_len, 1)
    forward = rehearsal.forward(plan.config, windows, seq_len)
    width = int(text.hidden_size)
    attention = 2 * seq_len * width * len(blocks)  # scores and values of the causal half
    dense = sum(m.weight.numel() * _share(n, text) for n, m in _linears(skeleton) if arch.block_path(n))
    return Work(
        outside,
        head,
        outside_widest,
        tuple(blocks.values()),
        max((p.shape[0] * p.shape[1] for p in plan.layers.values()), default=0),
        tuple(stages),
        forward,
        2.0 * dense + attention,
        4 * width,
        windows * seq_len,
        machine,
        resident,
    )


def _linears(skeleton: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in skeleton.named_modules() if arch.is_linear(module)]


def _share(name: str, text: Any) -> float:
    """Return the share of all tokens that reach the layer `name`."""
    if moe.expert_of(name) is None:
        return 1.0
    experts = next((int(n) for key in ("num_local_experts", "num_experts") if (n := getattr(text, key, 0))), 1)
    return min(int(getattr(text, "num_experts_per_tok", 1)) / experts, 1.0)


def passes(plan: Plan, windows: int) -> float:
    """Return how many forward passes over all tokens the plan takes, training counted as three."""
    if not plan.needs:
        return 0.0
    count = 1.0 if plan.walk_needs else 0.0
    count += len(plan.recipe.transforms) + bool(plan.needs & {"drift", "float_blocks"})
    for tuner in plan.recipe.tuners:
        epochs, steps = getattr(tuner, "epochs", None), getattr(tuner, "steps", None)
        if epochs is not None:
            count += getattr(tuner, "share", 1.0) * (epochs * _BACKWARD + 3)
        elif steps is not None:
            used = steps * getattr(tuner, "windows", 1) / max(windows, 1)
            count += used * _BACKWARD + 1 + 5 * min(16 / max(windows, 1), 1.0)
        else:
            count += 10
    return count
