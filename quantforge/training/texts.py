"""What a student's own texts show: how a teacher judges them, how much they repeat, what own prefixes cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantforge.distill.exposure import distinct, exposure
from quantforge.distill.generate import next_logits
from quantforge.distill.gkd import Written, positions_of, sample
from quantforge.distill.losses import Objective, dense_terms
from quantforge.distill.minillm import token_log_probs
from quantforge.distill.tokens import per_token
from quantforge.numerics.products import fast_linear
from quantforge.training.results import Texts

BATCH = 8  # texts whose logits of all tokens are held at once


def measure(student: nn.Module, teacher: nn.Module, prompts: Tensor, new: int, seed: int = 0) -> Texts:
    """Let both models write `new` tokens after each of the prompts [texts, tokens], and compare what they wrote.

    Texts are drawn at temperature 1 and do not end early, so that all are of the same length.
    """
    own, theirs = (_written(model, prompts, new, seed) for model in (student, teacher))
    own_loss, own_kl = _judged(student, teacher, own)
    their_loss, their_kl = _judged(student, teacher, theirs)
    mask = torch.ones_like(own_kl, dtype=torch.bool)
    found = exposure(own_kl, mask, their_kl, mask)
    tokens = [written.ids[:, prompts.shape[1] :].tolist() for written in (own, theirs)]
    return Texts(
        prompts=len(prompts),
        new=new,
        student_nll=float(own_loss.mean()),
        teacher_nll=float(their_loss.mean()),
        distinct=distinct(tokens[0]),
        of_teacher=distinct(tokens[1]),
        excess=float(found.excess[-1]),
    )


def _written(model: nn.Module, prompts: Tensor, new: int, seed: int) -> Written:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    with fast_linear():
        return sample(next_logits(model), prompts.tolist(), new, generator=generator, device=device)


@torch.no_grad()
def _judged(student: nn.Module, teacher: nn.Module, written: Written) -> tuple[Tensor, Tensor]:
    """Return −log p and KL(teacher ‖ student) of each written token [texts, new]."""
    start = int(written.completion.long().argmax(-1).min())
    losses, kls = [], []
    for i in range(0, len(written.ids), BATCH):
        ids, attention = written.ids[i : i + BATCH], written.attention[i : i + BATCH]
        ours, theirs = (_predictions(model, ids, attention, start) for model in (student, teacher))
        losses.append(-token_log_probs(theirs, ids[:, start:]))
        kls.append(per_token(ours, dense_terms(Objective("fkl"), theirs)))
    return torch.cat(losses), torch.cat(kls)


def _predictions(model: nn.Module, ids: Tensor, attention: Tensor, start: int) -> Tensor:
    """Return the logits [texts, tokens from `start` on, vocab] of these tokens, given those before."""
    with fast_linear():
        logits: Tensor = model(
            input_ids=ids, attention_mask=attention.long(), position_ids=positions_of(attention), use_cache=False
        ).logits
    return logits[:, start - 1 : -1]
