"""Text that a model writes itself, through its own cache: batches for training on it, and data where there is none.

Data-free text is that of LLM-QAT (Liu et al., arXiv:2305.17888, section 3.1): from one token, the next few are the most
probable ones, which keeps the beginning sensible, and all others are drawn, which keeps texts apart from each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from quantforge.distill.gkd import NextLogits, sample
from quantforge.errors import DataError, RecipeError
from quantforge.numerics.products import fast_linear
from quantforge.progress import bar

GREEDY = (3, 4, 5)  # tokens of a text that only its first one settles, one number after the other
BATCH = 32  # texts that are written side by side


@dataclass(frozen=True)
class Tokens:
    """Which tokens a text that is written without a prompt consists of.

    starts  ids that it may begin with, ordinary ones
    ends    ids of the end of a text, which are written too
    lead    ids that a tokenizer puts before a text; the model sees them, and they are no part of it
    vocab   logits of a prediction
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    lead: tuple[int, ...]
    vocab: int

    def banned(self, device: torch.device) -> Tensor:
        """Return which ids are never written [vocab]: special ones, and those that no token has."""
        found = torch.ones(self.vocab, dtype=torch.bool, device=device)
        found[list(self.starts + self.ends)] = False
        return found


def tokens_of(tokenizer: Any, config: Any) -> Tokens:
    """Return the tokens of a model's texts; without a tokenizer (None) all but those its config has roles for."""
    text = config.get_text_config()
    vocab = int(text.vocab_size)
    roles = {role: _ids(getattr(text, f"{role}_token_id", None)) for role in ("bos", "eos", "pad")}
    if tokenizer is None:
        special = {i for ids in roles.values() for i in ids}
        known, lead = set(range(vocab)), ()
    else:
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if getattr(token, "special", False)}
        known = set(tokenizer.get_vocab().values())
        lead = tuple(takewhile(special.__contains__, tokenizer("a", verbose=False)["input_ids"]))
        roles["eos"] = roles["eos"] or _ids(tokenizer.eos_token_id)
    starts = tuple(sorted(i for i in known - special if 0 <= i < vocab))
    if not starts:
        raise DataError(477, "the model has no ordinary token that a text of its own could begin with.")
    return Tokens(starts, tuple(i for i in roles["eos"] if 0 <= i < vocab), lead, vocab)


def next_logits(model: nn.Module, banned: Tensor | None = None) -> NextLogits[Any]:
    """Return what `gkd.sample` asks for the next logits: the model's own, through a cache that it fills.

    The model computes as it stands, so have it in evaluation mode (`writing`). Logits of a prompt's other tokens are
    not worked out where the model can leave them.
    banned  [vocab] bool, ids that are never written
    """
    last = last_logits(model)

    def following(ids: Tensor, attention: Tensor, positions: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache = _cache(model.config) if state is None else state
        mask = None if bool(attention.all()) else attention.long()
        output: Any = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **last
        )
        logits: Tensor = output.logits[:, -1]
        return (logits if banned is None else logits.masked_fill(banned, -torch.inf)), cache

    return following


def last_logits(model: Any) -> dict[str, int]:
    """Return the argument by which a model leaves out all logits but the last token's; none if it has no such one.

    A wrapper of `peft` takes anything; what the model in it takes decides.
    """
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(own.forward).parameters else {}


@contextmanager
def writing(*models: nn.Module) -> Iterator[None]:
    """Have models in evaluation mode, without gradients and with fast products, and then as they were."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), fast_linear():
            yield
    finally:
        for module, training in before:
            module.training = training


def self_text(
    model: nn.Module,
    tokens: Tokens,
    samples: int,
    seq_len: int,
    *,
    seed: int = 0,
    greedy: Sequence[int] = GREEDY,
    batch: int = BATCH,
) -> Tensor:
    """Let a model write texts on its own → ids [samples, seq_len] int64 on the CPU, settled by `seed`.

    Each begins with another token, drawn at random; when all have been first once, it starts over. Of text i the first
    greedy[i % 3] tokens, the first one included, are settled by that one; all others are drawn at temperature 1.
    The end of a text is drawn like any token, and the model goes on as it does in windows of running text: LLM-QAT's
    texts end there, and would have to be padded.
    Raises RecipeError for sizes below 1, and DataError if logits are NaN.
    """
    if min(samples, seq_len, batch, *greedy) < 1:
        raise RecipeError(
            249, f"{samples} texts of {seq_len} tokens, of which {list(greedy)} are settled, cannot be written."
        )
    rng = torch.Generator().manual_seed(seed)
    rounds = -(-samples // len(tokens.starts))
    order = torch.cat([torch.randperm(len(tokens.starts), generator=rng) for _ in range(rounds)])
    starts = [tokens.starts[i] for i in order[:samples].tolist()]
    lengths = [min(greedy[i % len(greedy)], seq_len) for i in range(samples)]
    parts, batches = [], range(0, samples, batch)
    with writing(model), bar("own text", len(batches)) as step:
        for i in batches:
            parts.append(_texts(model, tokens, starts[i : i + batch], lengths[i : i + batch], seq_len, rng))
            step(f"{len(parts[-1])} texts")
    return torch.cat(parts)


def continued(
    model: nn.Module,
    prompts: Tensor,
    new: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    batch: int = BATCH,
) -> Tensor:
    """Let a model write `new` tokens after each prompt [texts, tokens] → ids [texts, tokens + new] on the CPU.

    Texts do not end early, as in `self_text`. temperature  0 takes the most probable token
    """
    rng = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    parts, batches = [], torch.split(prompts, batch)
    with writing(model), bar("teacher's text", len(batches)) as step:
        for part in batches:
            following = next_logits(model, banned)
            found = sample(following, part.tolist(), new, temperature=temperature, generator=rng, device=device)
            parts.append(found.ids.cpu())
            step(f"{len(part)} texts")
    return torch.cat(parts)


def _texts(
    model: nn.Module, tokens: Tokens, starts: list[int], lengths: list[int], seq_len: int, rng: torch.Generator
) -> Tensor:
    """Write texts from their first tokens, of which `lengths` tokens of each are settled by these."""
    device = next(model.parameters()).device
    lead = list(tokens.lead)
    prompts = [[*lead, start] for start in starts]
    if seq_len == 1:
        return torch.tensor(starts)[:, None]
    following = _settled(next_logits(model, tokens.banned(device)), torch.tensor(lengths, device=device) + len(lead))
    found = sample(following, prompts, seq_len - 1, generator=rng, device=device)
    return found.ids[:, len(lead) :].cpu()


def _settled(following: NextLogits[Any], lengths: Tensor) -> NextLogits[Any]:
    """Leave the most probable token alone to texts of fewer tokens than `lengths` [batch]: it is drawn then."""

    def first(ids: Tensor, attention: Tensor, positions: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = following(ids, attention, positions, state)
        settled = attention.shape[1] < lengths
        if bool(settled.any()):
            best = torch.full_like(logits, -torch.inf).scatter(1, logits.argmax(-1, keepdim=True), 0.0)
            logits = torch.where(settled[:, None], best, logits)
        return logits, state

    return first


class _Growing(DynamicLayer):  # type: ignore[misc]  # transformers is not type checked
    """A layer's keys and values with room for more behind them; a plain one copies all of them for each token."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the room, of no size yet."""
        super().lazy_initialization(key_states, value_states)
        self.room = [x[:, :, :0] for x in (key_states, value_states)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, tokens, channels], and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        self.keys, self.values = (self._appended(i, start, x) for i, x in enumerate((key_states, value_states)))
        return self.keys, self.values

    def _appended(self, which: int, start: int, new: Tensor) -> Tensor:
        stop, room = start + new.shape[2], self.room[which]
        if stop > room.shape[2]:
            larger = new.new_empty(*new.shape[:2], max(stop, 2 * room.shape[2]), new.shape[3])
            larger[:, :, :start] = room[:, :, :start]
            self.room[which] = room = larger
        room[:, :, start:stop] = new
        return room[:, :, :stop]


def _cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model; layers that look only so far back are as transformers has them."""
    cache = DynamicCache(config=config)
    cache.layers = [_Growing() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _ids(found: Any) -> list[int]:
    """Return what a config says of a role as a list: one id, several, or none."""
    return [] if found is None else [int(found)] if isinstance(found, int) else [int(i) for i in found]
