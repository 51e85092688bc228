"""Generalized knowledge distillation: a share of the batches is text that the student itself has just written.

GKD, Agarwal et al., ICLR 2024, arXiv:2306.13649. Which batches these are is settled by the seed and the number of the
step alone, so that a resumed run goes on as it would have, and no other random numbers change. Sampling is without
gradient: what the student wrote is data. `sample` knows no model, only a function that gives the next logits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from quantforge.distill.losses import Objective
from quantforge.errors import DataError, RecipeError

Batch = TypeVar("Batch")
State = TypeVar("State")

NextLogits = Callable[[Tensor, Tensor, Tensor, State | None], tuple[Tensor, State]]
"""(ids [batch, new], attention [batch, all so far], positions [batch, new], state) → (logits [batch, vocab] of what
follows the last id, state). The first call has all of the prompts and state None; each later one a token a row."""


@dataclass(frozen=True)
class Written:
    """Prompts and what was written after them, in rows of one length.

    ids         [batch, prompt + new] int64, padded on the left before prompts, and on the right after the end
    attention   [batch, prompt + new] bool, False for what is padding
    completion  [batch, prompt + new] bool, True for what was written, the end-of-text token included
    """

    ids: Tensor
    attention: Tensor
    completion: Tensor


def gkd_objective(beta: float = 0.5, temperature: float = 1.0) -> Objective:
    """Return the paper's divergence: JSD(β), and at the ends, where JSD is 0, forward KL (β = 0) and reverse KL (1).

    So its scale jumps there; `Objective("jsd", beta=β, normalized=True)` has the same ends and does not jump.
    """
    if beta in (0, 1):
        return Objective("rkl" if beta else "fkl", temperature)
    return Objective("jsd", temperature, beta=beta)


def is_on_policy(share: float, seed: int, step: int) -> bool:
    """Tell whether a step's batch is the student's own text, which has the probability `share` (λ); 0 is never.

    Raises RecipeError for a share outside of 0 to 1.
    """
    if not 0 <= share <= 1:
        raise RecipeError(243, f"lambda, the share of on-policy batches, must lie from 0 to 1, not be {share}.")
    return random.Random(f"on-policy {seed} {step}").random() < share


def batch_of_step(share: float, seed: int, step: int, given: Batch, write: Callable[[Batch], Batch]) -> Batch:
    """Return `write(given)` in on-policy steps, else `given` as it is, without a call of `write`."""
    return write(given) if is_on_policy(share, seed, step) else given


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids [batch, longest] int64 and attention, prompts ending at the right; DataError if one is empty."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise DataError(473, "a prompt to write on from needs at least one token.")
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention = torch.tensor([[i >= width - len(prompt) for i in range(width)] for prompt in prompts])
    return ids, attention


def positions_of(attention: Tensor) -> Tensor:
    """Return the position of each token [batch, tokens] in its own text, from 0; 0 for padding."""
    return (attention.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def sample(
    next_logits: NextLogits[State],
    prompts: Sequence[Sequence[int]],
    new: int,
    *,
    stop: Sequence[int] = (),
    pad: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Written:
    """Write up to `new` tokens after each prompt, each drawn from all of the vocabulary; without gradient.

    stop         tokens that end a text; they belong to it, and only padding follows
    temperature  logits are divided by it; 0 takes the most probable token
    generator    on the CPU. A row of it is used up at once, so texts that end early do not change later ones
    Raises DataError if logits are NaN, and RecipeError for less than one token or a negative temperature.
    """
    if new < 1 or not temperature >= 0:
        raise RecipeError(243, f"write at least 1 token at a temperature of 0 or more, not {new} at {temperature}.")
    ids, attention = (x.to(device) for x in left_pad(prompts, pad))
    start = ids.shape[1]
    chances = torch.rand(len(ids), new, dtype=torch.float64, generator=generator).to(device)
    ends = torch.tensor(list(stop), dtype=torch.long, device=device)
    going = torch.ones(len(ids), dtype=torch.bool, device=device)
    fresh, state = ids, None
    for i in range(new):
        positions = positions_of(attention)[:, -fresh.shape[1] :]
        logits, state = next_logits(fresh, attention, positions, state)
        drawn = torch.where(going, draw(logits, chances[:, i], temperature), pad)
        ids = torch.cat([ids, drawn[:, None]], 1)
        attention = torch.cat([attention, going[:, None]], 1)
        going = going & ~torch.isin(drawn, ends)
        fresh = drawn[:, None]
        if not going.any():
            break
    completion = attention.clone()
    completion[:, :start] = False
    return Written(ids, attention, completion)


def draw(logits: Tensor, chances: Tensor, temperature: float = 1.0) -> Tensor:
    """Return a token [batch] of each row of logits [batch, vocab], for chances [batch] uniform in [0, 1).

    The first token whose cumulated probability exceeds the chance: one without probability is never drawn, and rows
    are independent of each other. Raises DataError if logits are NaN or all −inf.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits.double() / temperature).softmax(-1).cumsum(-1)
    if cumulated[:, -1].isnan().any():
        row = int(cumulated[:, -1].isnan().nonzero()[0])
        raise DataError(473, f"the logits to draw from are not finite in row {row}: the model has broken down.")
    target = (chances.double() * cumulated[:, -1])[:, None]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
