"""Teachers: a model that runs beside the student, or its predictions over the training windows, made once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantforge import kept
from quantforge.distill.generate import continued
from quantforge.distill.targets import K, keep
from quantforge.errors import DataError, PlanError
from quantforge.evaluation.divergence import TopK, joined_top_k
from quantforge.evaluation.reference import digest
from quantforge.numerics.products import fast_linear
from quantforge.progress import bar
from quantforge.training import forward
from quantforge.training.batches import Batch

Targets = Tensor | TopK
"""What a loss compares the student with: logits [..., vocab], or what was kept of as many tokens, counted in a row."""

PROBE = "The naïve fox's 3 cafés cost $1,234.50…\n\tif (x_1 >= 0): return 'ΑΒΓ 日本語 🙂'  # CamelCase  snake_case\r\n"
_DIFFERENT = "logits over different tokens cannot be compared"


class Teacher(Protocol):
    """Predicts for each place of a batch what comes next."""

    def targets(self, batch: Batch) -> Targets:
        """Return the predictions for all places of the batch."""

    def rows(self, batch: Batch) -> Callable[[Tensor], Targets]:
        """Return what gives the predictions for places [n] of the batch, counted in a row; for a few at a time."""


@dataclass(frozen=True)
class Live:
    """A model, put into evaluation mode; no gradient reaches it."""

    model: nn.Module

    def __post_init__(self) -> None:
        self.model.eval()

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """Return its logits [batch, tokens, vocab]."""
        return forward.logits(self.model, batch)

    @torch.no_grad()
    def rows(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Return what gives its logits [n, vocab] at places, by its head; twice if asked twice."""
        hidden, head = forward.head_inputs(self.model, batch)
        flat = hidden.flatten(end_dim=-2)

        @torch.no_grad()
        def at(places: Tensor) -> Tensor:
            return head(flat[places.to(flat.device)])

        return at


@dataclass(frozen=True)
class Kept:
    """What was kept of a model's predictions over windows of ids [windows, seq_len], all places counted in a row."""

    kept: TopK
    ids: Tensor

    def targets(self, batch: Batch) -> TopK:
        """Return what was kept of the batch's windows; DataError if it holds other text than they do."""
        windows = torch.tensor(batch.windows)
        if len(windows) != len(batch.ids) or not torch.equal(self.ids[windows], batch.ids.cpu()):
            raise DataError(
                477, "kept predictions are those of the training windows, and the batch holds other text: take a live "
                "teacher where the student writes."
            )  # fmt: skip
        length = self.ids.shape[1]
        return _at(self.kept, (windows[:, None] * length + torch.arange(length)).flatten())

    def rows(self, batch: Batch) -> Callable[[Tensor], TopK]:
        """Return what gives what was kept of places."""
        found = self.targets(batch)
        return lambda places: _at(found, places.cpu())


@dataclass(frozen=True)
class Made:
    """What kept predictions were made of, and with; all of it must be the same for them to be used.

    tokenizer      `tokenizer_digest`
    model          digest of the teacher's files, `Source.digest`
    text           digest of the token ids
    vocab          of the logits; k: tokens kept of each place, at most vocab
    """

    tokenizer: str
    model: str
    text: str
    windows: int
    seq_len: int
    vocab: int
    k: int

    def facts(self) -> dict[str, str]:
        """Return it as the metadata of a file, by names that read well after "another"."""
        words = {"windows": "number of windows", "seq_len": "length of windows", "vocab": "vocabulary", "k": "k"}
        return {words.get(name, name): str(value) for name, value in {"kind": "teacher", **asdict(self)}.items()}


def made(tokenizer: Any, model: str, ids: Tensor, vocab: int, k: int = K) -> Made:
    """Return what predictions over ids [windows, seq_len] are made of; `model` is the digest of the teacher's files."""
    windows, length = ids.shape
    return Made(tokenizer_digest(tokenizer), model, digest(ids), windows, length, vocab, min(k, vocab))


def kept_teacher(path: Path, facts: Made, ids: Tensor, build: Callable[[], nn.Module], *, batch: int = 1) -> Kept:
    """Return the teacher kept in a file, or let `build` load the model and keep its predictions there.

    ids    the training windows [windows, seq_len]; batch: how many go through the model at once
    Raises DataError, in a line, if the file was made with another tokenizer, model or text, or is damaged.
    """
    if path.exists():
        held = kept.read(path, facts.facts())
        return Kept(TopK(held["ids"], held["log_probs"], held["top"], facts.vocab), ids)
    found = predictions(build(), ids, facts.k, batch=batch)
    kept.write(path, {"ids": found.ids, "log_probs": found.log_probs, "top": found.top}, facts.facts())
    return Kept(found, ids)


@torch.no_grad()
def predictions(model: nn.Module, ids: Tensor, k: int = K, *, batch: int = 1) -> TopK:
    """Return what `targets.keep` keeps of a model's logits at all places of the windows [windows, seq_len]."""
    teacher, parts = Live(model), []
    with fast_linear(), bar("teacher", len(ids)) as step:
        for i in range(0, len(ids), batch):
            part = ids[i : i + batch]
            everything = torch.ones_like(part, dtype=torch.bool)
            found = teacher.targets(Batch(part, everything, everything, tuple(range(i, i + len(part)))))
            parts.append(keep(found, k))
            for _ in part:
                step("")
    return joined_top_k(parts)


def write_texts(
    path: Path,
    prompts: Tensor,
    new: int,
    facts: Mapping[str, str],
    build: Callable[[], nn.Module],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    banned: Tensor | None = None,
) -> Tensor:
    """Return the teacher's own continuations of prompts [texts, tokens] → ids [texts, tokens + new], to be trained on.

    Sequence-level distillation (Kim and Rush, arXiv:1606.07947) with drawn texts in place of the most probable ones,
    which temperature 0 comes near to. They are kept in the file `path`, and read from it the next time: `build` then
    loads no model. Train on them with `steps.after_prompt`, so that prompts do not count.
    facts  digests of the teacher's files and tokenizer, by name: {"model": …, "tokenizer": …}
    Raises DataError, in a line, if the file was made with others, or of other prompts, sizes, seed or temperature.
    """
    told = {
        **facts,
        "kind": "texts",
        "text": digest(prompts),
        "number of tokens": str(new),
        "seed": str(seed),
        "temperature": str(float(temperature)),
        "set of banned tokens": "" if banned is None else digest(banned.nonzero()),
    }
    if path.exists():
        return kept.read(path, told)["ids"]
    found = continued(build(), prompts, new, seed=seed, temperature=temperature, banned=banned)
    kept.write(path, {"ids": found}, told)
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's tokens with their ids, and of how it reads a text with something of all."""
    seen = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE, verbose=False)["input_ids"]]
    return sha256(json.dumps(seen).encode()).hexdigest()


def check_pair(student: Any, teacher: Any, student_config: Any, teacher_config: Any) -> None:
    """Refuse a teacher whose predictions are not of the student's tokens; the first two arguments are tokenizers.

    Raises PlanError that names a token which only one has or which they number differently, or the probe that they
    read differently; and if the logits of the models are not as many.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        odd = min((ours.items() ^ theirs.items()), key=lambda pair: (pair[1], pair[0]))[0]
        said = [f"{found[odd]}" if odd in found else "none" for found in (ours, theirs)]
        raise PlanError(
            296,
            f"the teacher has another tokenizer than the student: {odd!r} has the id {said[1]} there and {said[0]} "
            f"here; {_DIFFERENT}.",
        )
    if student(PROBE, verbose=False)["input_ids"] != teacher(PROBE, verbose=False)["input_ids"]:
        raise PlanError(
            296, "the teacher has another tokenizer than the student: of the same tokens, it cuts text into others; "
            "prepare both models with one tokenizer."
        )  # fmt: skip
    mine, its = (config.get_text_config().vocab_size for config in (student_config, teacher_config))
    if mine != its:
        raise PlanError(296, f"the teacher predicts {its:,} tokens and the student {mine:,}; {_DIFFERENT}.")


def _at(found: TopK, places: Tensor) -> TopK:
    return TopK(found.ids[places], found.log_probs[places], found.top[places], found.vocab)
