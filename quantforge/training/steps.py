"""What a step of training makes small: losses of a student over a micro-batch, and the text that a step takes.

Each function returns a `StepLoss`, (student, micro-batch, step, count) → the micro-batch's sum of token losses divided
by `count`, the counted predictions of the whole step; and, where the student writes, a `Prepare` besides, which puts
what it wrote in the place of a step's batch, before that is cut into micro-batches. A teacher and a student each go
through a micro-batch once.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import api
from quantforge.distill.generate import next_logits, writing
from quantforge.distill.gkd import NextLogits, Written, batch_of_step, gkd_objective, is_on_policy, sample
from quantforge.distill.layers import layerwise_loss, matching_layers
from quantforge.distill.losses import Objective, cross_entropy, distillation_loss, from_hidden, next_tokens
from quantforge.distill.minillm import Sampled, mixed_log_probs, policy_loss, token_log_probs
from quantforge.distill.targets import top_k_loss, top_k_terms
from quantforge.errors import DataError, RecipeError
from quantforge.evaluation.divergence import TopK
from quantforge.training import forward
from quantforge.training.batches import Batch, seed_of
from quantforge.training.processes import Prepare, StepLoss
from quantforge.training.teachers import Kept, Live, Targets, Teacher


def supervised(teacher: Teacher, objective: Objective, *, hidden: float = 0.0, chunk: int | None = None) -> StepLoss:
    """Return the loss of distilling a teacher over the batch's own text: `distillation_loss` of both models' logits.

    hidden  weight of the squared error between what the blocks of both give, relative to the teacher's, which is added
    chunk   tokens whose logits exist at once, for a large vocabulary: heads are run again in the backward pass. None
            holds all logits of a micro-batch, which is faster
    Raises RecipeError for an objective that a kept teacher cannot give, or for hidden states of one.
    """
    if hidden < 0 or (hidden and not isinstance(teacher, Live)):
        raise RecipeError(249, f"a weight of {hidden:g} of hidden states needs a live teacher, and to be at least 0.")
    if hidden and chunk is not None:
        raise RecipeError(249, "hidden states are compared along with whole logits: leave out the chunk.")
    if isinstance(teacher, Kept) and objective.hard < 1:
        top_k_terms(objective, teacher.kept)
    if objective.hard == 1 and not hidden:
        return language_model(chunk=chunk)

    def loss(student: nn.Module, batch: Batch, step: int, count: int) -> Tensor:
        labels, mask = _predicted(student, batch, step, count)
        if chunk is not None:
            rows, lead = teacher.rows(batch), labels.flatten()
            inputs, head = forward.head_inputs(student, batch)

            def part(logits: Tensor, places: Tensor) -> Tensor:
                return against(logits, rows(places), objective, labels=lead[places], count=count)

            return from_hidden(inputs, head, part, mask, chunk=chunk) if bool(mask.any()) else inputs.sum() * 0.0
        if not hidden:
            goal = teacher.targets(batch)
            return against(forward.logits(student, batch), goal, objective, mask, labels=labels, count=count)
        assert isinstance(teacher, Live)
        with forward.block_outputs(teacher.model) as theirs:
            whole = teacher.targets(batch)
        with forward.block_outputs(student) as ours:
            logits = forward.logits(student, batch)
        between = _between(ours, theirs, mask, count=count, relative=True)
        return against(logits, whole, objective, mask, labels=labels, count=count) + hidden * between

    return loss


def language_model(*, chunk: int | None = None) -> StepLoss:
    """Return the mean of −log Q of the tokens that follow, without any teacher; chunk as for `supervised`."""

    def loss(student: nn.Module, batch: Batch, step: int, count: int) -> Tensor:
        labels, mask = _predicted(student, batch, step, count)
        if chunk is None:
            return cross_entropy(forward.logits(student, batch), labels, mask, count=count)
        inputs, head = forward.head_inputs(student, batch)
        flat = labels.flatten()

        def part(logits: Tensor, places: Tensor) -> Tensor:
            return cross_entropy(logits, flat[places], count=count)

        return from_hidden(inputs, head, part, mask, chunk=chunk) if bool(mask.any()) else inputs.sum() * 0.0

    return loss


def layerwise(teacher: Live, *, relative: bool = True, forced: bool = True) -> StepLoss:
    """Return the mean over the student's blocks of the squared error of what they give, against the teacher's.

    A student of fewer blocks is paired with those of the teacher at the same share of its depth.
    relative  divided, for each token, by the mean square of what the teacher's block gives, so that no block outweighs
              the others
    forced    each block is given what the teacher's block before it gave, so that no block's gradient reaches another:
              layer-by-layer distillation (ZeroQuant, arXiv:2206.01861, section 4.3). Otherwise the student's own
    """

    def loss(student: nn.Module, batch: Batch, step: int, count: int) -> Tensor:
        _, mask = _predicted(student, batch, step, count)
        with torch.no_grad(), forward.block_outputs(teacher.model) as theirs:
            first = _entering(teacher.model, batch)
        pairs = matching_layers(len(forward.blocks(student)), len(theirs))
        fed = [first, *(theirs[i] for i in pairs[:-1])] if forced else None
        with forward.block_outputs(student, fed) as ours:
            forward.without_logits(student, batch)
        return _between(ours, theirs, mask, count=count, relative=relative)

    return loss


def gkd(
    teacher: Teacher,
    objective: Objective | None = None,
    *,
    share: float = 0.5,
    prompt: int,
    new: int | None = None,
    seed: int = 0,
    temperature: float = 0.9,
    ends: tuple[int, ...] = (),
    pad: int = 0,
) -> tuple[StepLoss, Prepare]:
    """Return generalized distillation (arXiv:2306.13649): supervised, in a share of the steps on the student's text.

    objective    `gkd_objective()` if None, JSD at β = 0.5
    share        λ; at 0 nothing is ever sampled, and all is supervised distillation
    prompt       tokens of each window's beginning that the student writes on from; they do not count then
    new          tokens it writes at most; as many as the window has left if None
    temperature  of sampling alone; ends: tokens that end a text; pad: what stands behind its end
    What is drawn is settled by the seed, the step and the windows.
    Raises RecipeError for a share outside of 0 to 1, or above 0 with a kept teacher, which knows no other text.
    """
    is_on_policy(share, seed, 0)
    if share and not isinstance(teacher, Live):
        raise RecipeError(249, f"a share of {share:g} of the student's own text needs a live teacher; 0 does not.")
    _check_lengths(prompt, new)
    loss = supervised(teacher, objective or gkd_objective())

    def prepare(student: nn.Module, batch: Batch, step: int) -> Batch:
        def write(given: Batch) -> Batch:
            with writing(student):
                return _written(next_logits(student), student, given, prompt, new, seed, step, temperature, ends, pad)

        return batch_of_step(share, seed, step, batch, write)

    return loss, prepare


def minillm(
    teacher: Live,
    *,
    prompt: int,
    new: int | None = None,
    alpha: float = 0.2,
    clip: float | None = 0.2,
    normalized: bool = True,
    most: float | None = 100.0,
    reuse: int = 1,
    text: Tensor | None = None,
    text_weight: float = 1.0,
    batch_size: int = 1,
    seed: int = 0,
    ends: tuple[int, ...] = (),
    pad: int = 0,
) -> tuple[StepLoss, Prepare]:
    """Return MiniLLM (arXiv:2306.08543): the policy gradient of the reverse KL on text drawn from both models.

    alpha        the teacher's share in what is drawn from
    clip, normalized, most  those of `policy_loss`
    reuse        optimizer steps on one batch of texts; the ratio clip acts from the second on. A run that resumes
                 within one batch writes it anew, so save every multiple of it
    text         the training windows [windows, seq_len]; the cross-entropy of a step's is added: the pre-training loss
    text_weight  its weight; batch_size: windows of a step, by which its mean is taken
    The other arguments are those of `gkd`. Raises RecipeError for an alpha outside of 0 to 1, or sizes below 1.
    """
    mixed_log_probs(torch.zeros(1, 1), torch.zeros(1, 1), alpha)
    _check_lengths(prompt, new)
    if reuse < 1 or batch_size < 1:
        raise RecipeError(249, f"texts are for at least 1 step of at least 1 window, not {reuse} of {batch_size}.")
    written = list[Batch]()
    first = dict[str, Sampled]()

    def prepare(student: nn.Module, batch: Batch, step: int) -> Batch:
        if step % reuse == 0:
            written.clear()
            first.clear()
        if not written:
            with writing(student, teacher.model):
                both = _mixture(next_logits(student), next_logits(teacher.model), alpha)
                written.append(_written(both, student, batch, prompt, new, seed, step, 1.0, ends, pad))
        return replace(written[0], windows=batch.windows)

    def loss(student: nn.Module, batch: Batch, step: int, count: int) -> Tensor:
        ids, mask = _predicted(student, batch, step, count)
        theirs = teacher.targets(batch)
        ours = forward.logits(student, batch)
        key = sha256(batch.ids.cpu().numpy().tobytes()).hexdigest()
        drawn = first.get(key) or _as_sampled(ours.detach(), theirs, ids, mask, alpha)
        if reuse > 1:
            first[key] = drawn
        found = policy_loss(ours, theirs, drawn, normalized=normalized, clip=clip, most=most, count=count).total
        if text is None or not text_weight:
            return found
        windows = text[list(batch.windows)].to(mask.device)
        everything = torch.ones_like(windows, dtype=torch.bool)
        own = Batch(windows, everything, everything, batch.windows)
        following, places = next_tokens(windows)
        size = batch_size * (windows.shape[1] - 1)
        return found + text_weight * cross_entropy(forward.logits(student, own), following, places, count=size)

    return loss, prepare


def after_prompt(prompt: int) -> Prepare:
    """Return what lets only the tokens behind the first `prompt` ones of each window count."""

    def prepare(student: nn.Module, batch: Batch, step: int) -> Batch:
        counted = batch.counted.clone()
        counted[:, :prompt] = False
        return replace(batch, counted=counted)

    return prepare


def against(
    student: Tensor,
    targets: Targets,
    objective: Objective,
    mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """Return `distillation_loss` against a teacher's logits, or `top_k_loss` against what was kept of them."""
    if isinstance(targets, TopK):
        return top_k_loss(student, targets, objective, mask, labels=labels, count=count)
    return distillation_loss(student, targets, objective, mask, labels=labels, count=count)


def _predicted(student: nn.Module, batch: Batch, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the labels and the mask of the counted predictions; DataError if the whole step has none."""
    if count < 1:
        raise DataError(471, f"no prediction counts in step {step}: the mask of its windows is empty.")
    device = next(student.parameters()).device
    return next_tokens(batch.ids.to(device), batch.counted.to(device))


def _between(ours: dict[int, Tensor], theirs: dict[int, Tensor], mask: Tensor, *, count: int, relative: bool) -> Tensor:
    pairs = matching_layers(len(ours), len(theirs))
    goals = [theirs[i] for i in pairs]
    return layerwise_loss([ours[i] for i in range(len(ours))], goals, mask, relative=relative, count=count)


def _entering(model: nn.Module, batch: Batch) -> Tensor:
    """Run a batch, and return what the first block is given [batch, tokens, width]."""
    caught = list[Tensor]()

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    handle = forward.blocks(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        forward.without_logits(model, batch)
    finally:
        handle.remove()
    return caught[0]


def _check_lengths(prompt: int, new: int | None) -> None:
    if prompt < 1 or (new is not None and new < 1):
        raise RecipeError(249, f"a student writes at least 1 token after at least 1, not {new} after {prompt}.")


def _written(
    following: NextLogits[Any],
    student: Any,
    given: Batch,
    prompt: int,
    new: int | None,
    seed: int,
    step: int,
    temperature: float,
    ends: tuple[int, ...],
    pad: int,
) -> Batch:
    """Return what follows the first `prompt` tokens of each window; only that counts."""
    length = given.ids.shape[1] - prompt if new is None else new
    if length < 1 or prompt > given.ids.shape[1]:
        raise DataError(
            471, f"a prompt of {prompt} tokens leaves nothing of windows of {given.ids.shape[1]} to write: take fewer."
        )
    api.check_length(student.config, prompt + length)
    prompts = [row[kept][:prompt].tolist() for row, kept in zip(given.ids, given.attention, strict=True)]
    rng = torch.Generator().manual_seed(seed_of("written", seed, step, *given.windows))
    device = next(student.parameters()).device
    found: Written = sample(
        following, prompts, length, stop=ends, pad=pad, temperature=temperature, generator=rng, device=device
    )
    return Batch(found.ids, found.attention, found.completion, given.windows)


def _mixture(student: NextLogits[Any], teacher: NextLogits[Any], alpha: float) -> NextLogits[Any]:
    """Return the next log-probabilities of αp + (1 − α)q."""

    def following(ids: Tensor, attention: Tensor, positions: Tensor, state: Any) -> tuple[Tensor, Any]:
        (ours, mine), (theirs, its) = (
            model(ids, attention, positions, part)
            for model, part in zip((student, teacher), state or (None, None), strict=True)
        )
        return mixed_log_probs(ours, theirs, alpha), (mine, its)

    return following


@torch.no_grad()
def _as_sampled(student: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor, alpha: float) -> Sampled:
    """Return what is known of texts that models of these logits have just drawn.

    Of one token the mixture is αp + (1 − α)q again, so that no distribution is needed.
    """
    log_old, log_p = (token_log_probs(logits, ids, mask) for logits in (student, teacher))
    both = torch.stack([log_old, log_p.to(log_old.dtype)], -1)
    shares = torch.tensor([1 - alpha, alpha], dtype=both.dtype, device=both.device)
    return Sampled(ids, mask, log_old, (both + shares.log()).logsumexp(-1))
