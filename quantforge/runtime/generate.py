"""Text from a model, a token at a time: transformers' forward, a cache without copies, and nothing else around it.

Greedy generation gives the tokens that transformers' own `generate` gives without its penalties.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from quantforge.distill.generate import last_logits, tokens_of
from quantforge.errors import DataError, PlanError

_ROOM = 256  # tokens that a cache has room for beyond what it is first given


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not type checked
    """Keys and values of one layer in memory with room to grow: a new token is written behind the others.

    Attention sees views. Transformers' own layer copies all of the past for every token.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values [batch, heads, tokens, channels] behind what is held; return all of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [key_states[:, :, :0], value_states[:, :, :0]]
        before, states = self.get_seq_length(), (key_states, value_states)
        after = before + key_states.shape[-2]
        if after > self._room[0].shape[-2]:
            self._room = [_larger(*both, before, 2 * before + _ROOM) for both in zip(self._room, states, strict=True)]
        for part, new in zip(self._room, states, strict=True):
            part[:, :, before:after] = new
        self.keys, self.values = (part[:, :, :after] for part in self._room)
        return self.keys, self.values


def _larger(part: Tensor, new: Tensor, held: int, room: int) -> Tensor:
    """Return memory for `room` tokens more than those of `new` that begins with the first `held` of `part`."""
    batch, heads, count, channels = new.shape
    found = new.new_empty(batch, heads, room + count, channels)
    found[:, :, :held] = part[:, :, :held]
    return found


def new_cache(model: Any) -> DynamicCache:
    """Return an empty cache for `model`; its layers that attend to all of the past grow without copying it."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    text       the new text alone, without special tokens
    tokens     its ids, with the one that ended it
    seconds    of all of them; first_token_seconds: to the first one
    operators  how many layers each operator computed; none where all were dequantized
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    seconds: float
    first_token_seconds: float
    operators: dict[str, int]
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature  that logits are divided by
    top_p        only the most probable tokens that together have at least this probability are drawn; 1: all
    seed         of the draws
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def steps(model: nn.Module, ids: Tensor, *, sampling: Sampling | None = None) -> Iterator[Tensor]:
    """Yield the next tokens [batch] of texts that begin with `ids` [batch, tokens], one after the other, without end.

    sampling  None: the most probable token
    """
    last, cache = last_logits(model), new_cache(model)
    rng = None if sampling is None else torch.Generator(ids.device).manual_seed(sampling.seed)
    while True:
        output: Any = model(input_ids=ids, past_key_values=cache, use_cache=True, **last)
        logits = output.logits[:, -1]
        tokens = logits.argmax(-1) if sampling is None else _draw(logits.float(), sampling, rng)
        yield tokens
        ids = tokens[:, None]


def _draw(logits: Tensor, sampling: Sampling, rng: torch.Generator | None) -> Tensor:
    """Draw a token [batch] from each row of logits [batch, vocab]."""
    shares = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, order = shares.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # of what is before each token
        shares = shares.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
    return torch.multinomial(shares, 1, generator=rng)[:, 0]


def ends_of(model: nn.Module, tokenizer: Any = None) -> frozenset[int]:
    """Return the ids that end a text of `model`."""
    config: Any = model.config
    found = set(tokens_of(tokenizer, config).ends)
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset(found | set([own] if isinstance(own, int) else own or ()))


def write(
    model: nn.Module,
    ids: Tensor,
    new_tokens: int,
    *,
    sampling: Sampling | None = None,
    ends: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield up to `new_tokens` ids that a model writes after one text, `ids` [1, tokens]; the last may be of `ends`.

    Raises DataError for an empty prompt, PlanError for more tokens than the model has positions.
    """
    if not ids.numel():
        raise DataError(480, "the prompt has no tokens; give at least one.")
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + new_tokens > limit:
        raise PlanError(
            299,
            f"{ids.shape[1]} tokens of prompt and {new_tokens} new ones are more than the {limit} positions of this "
            f"model; at most {max(limit - ids.shape[1], 0)} new ones fit.",
        )
    for found in islice(steps(model, ids, sampling=sampling), new_tokens):
        token = int(found)
        yield token
        if token in ends:
            break
