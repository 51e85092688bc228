"""The training loop: one student, one loss, steps of windows of a text; on as many processes as were launched."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import store
from quantforge.errors import DataError, RecipeError, pick
from quantforge.evaluation.reference import digest
from quantforge.models.headers import some
from quantforge.numerics.products import fast_linear
from quantforge.progress import bar
from quantforge.training import processes, state
from quantforge.training.batches import Batch, batch_of_step, seed_of, split
from quantforge.training.layers import in_training
from quantforge.training.optimizers import OPTIMIZERS
from quantforge.training.processes import Engine, Prepare, StepLoss

__all__ = ["Batch", "Curve", "Prepare", "Settings", "StepLoss", "train"]

Point = tuple[float, float, float, int, float]  # of a curve, in the order of its fields

SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class Settings:
    """How a student is trained.

    steps          updates of the parameters
    batch_size     windows of a step, over all processes
    micro_batch    windows that a process works on at once; all of its share if None
    lr             largest learning rate, from above 0 to 1: what Adam moves a parameter by in a step, roughly
    schedule       constant; cosine and linear: from lr towards 0 at the end
    warmup         steps over which the rate rises evenly to lr before that
    weight_decay   decoupled, times the rate (arXiv:1711.05101); of matrices alone, see `optimizers.is_decayed`
    betas          of Adam
    max_grad_norm  gradients of a larger norm, as one vector, are scaled down to it; None: never
    optimizer      adamw; adamw8bit: states of 8 bits; paged-adamw and paged-adamw8bit: states in pages
    seed           of the order of windows and of all that is random in a step
    save_every     steps after which the state is kept on disk, if there is a folder
    """

    steps: int
    batch_size: int = 8
    micro_batch: int | None = None
    lr: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    optimizer: str = "adamw"
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        pick("schedule", self.schedule, SCHEDULES)
        pick("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("steps", "batch_size", "micro_batch", "save_every"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "at least 1")
        _check("lr", self.lr, 0 < self.lr <= 1, "above 0 and at most 1")
        _check("warmup", self.warmup, 0 <= self.warmup < self.steps, f"from 0 to {self.steps - 1}, below steps")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _check(
            "betas", self.betas, len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two from 0 to below 1"
        )
        norm = self.max_grad_norm
        _check("max_grad_norm", norm, norm is None or 0 < norm < math.inf, "above 0, or none")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.lr * falling[self.schedule]


@dataclass(frozen=True)
class Curve:
    """What was measured at each step; `asdict` of it is fit for JSON.

    loss       the mean over the step's counted predictions, before its update
    lr         learning rate
    grad_norm  of all gradients as one vector, before clipping
    tokens     read in the step, over all processes
    seconds    that the step took
    """

    loss: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()
    grad_norm: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()


def train(
    student: nn.Module,
    ids: Tensor,
    loss: StepLoss,
    settings: Settings,
    *,
    prepare: Prepare | None = None,
    out: Path | None = None,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    lr_of: Callable[[str], float] | None = None,
) -> Curve:
    """Train the parameters of `student` that want gradients, in place, and return the curve.

    ids      [windows, tokens] int64, the training text
    loss     of a micro-batch; see `StepLoss`
    prepare  changes the batch of each step, such as to text that the student writes
    out      folder whose `state` is kept every `save_every` steps and at the end, by process 0; pages of paged
             optimizers lie there too, without a name
    resume   go on from `out`/state
    facts    what else the run is made of, fit for JSON: it must be the same to resume
    lr_of    name of a parameter → factor on its learning rate
    A step whose loss or gradient is not finite is not taken: the parameters stay those after the step before, are kept
    in `out`, and DataError names the step and its windows.
    The student is without its own dropout, as its teacher is; that of adapters acts.
    Random numbers of a step, such as for that dropout, follow from seed, step and process; the global state is left
    alone.
    Raises RecipeError for settings that do not go with the text or the processes, PlanError if `out` cannot be resumed
    from or holds a run already, ResourceError if it cannot be written.
    """
    if resume and out is None:
        raise RecipeError(246, "a run can be resumed only from the folder that its state is in, and none is given.")
    if out is not None:
        store.check_writable(out)
        if not resume:
            state.refuse_old(out)
    known = state.plain({"settings": asdict(settings), "text": digest(ids), **(facts or {})})
    how = {
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
        "lr_of": lr_of,
        "pages": _pages(settings, out),
    }
    engine = processes.start(student, settings.optimizer, how)
    _check_shares(settings, engine.count)
    points = _resumed(engine, out, known) if resume and out is not None else []

    def keep() -> str:
        if out is None:
            return ""
        _keep(engine, out, points, known)
        return f", kept in {out / state.NAME}"

    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), in_training(student), fast_linear():
        _go_on(engine, ids, loss, settings, prepare, points, keep)
    return _curve(points)


def _go_on(
    engine: Engine,
    ids: Tensor,
    loss: StepLoss,
    settings: Settings,
    prepare: Prepare | None,
    points: list[Point],
    keep: Callable[[], str],
) -> None:
    """Take the steps that are still to be taken, and add what was measured to `points`.

    keep  puts the state on disk, if there is a folder, and says so
    """
    left = settings.steps - len(points)
    with bar("training", left) if engine.index == 0 else contextlib.nullcontext(_silent) as advance:
        for step in range(len(points), settings.steps):
            began = time.perf_counter()
            batch = batch_of_step(ids, settings.batch_size, settings.seed, step)
            if prepare is not None:
                torch.manual_seed(seed_of("prepare", settings.seed, step))
                batch = engine.prepare(prepare, batch, step)
            if not batch.predictions:
                raise DataError(475, f"no token counts in {_named(step, batch.windows)}.")
            shares = _shares(batch, settings, engine.count)
            torch.manual_seed(seed_of("step", settings.seed, step, engine.index))
            losses = engine.gradients(loss, shares, step)
            total, norm = sum(losses), engine.gradient_norm()
            if not (math.isfinite(total) and math.isfinite(norm)):
                engine.forget_gradients()
                raise _broken(losses, norm, step, batch, shares, keep(), settings.warmup)
            limit = settings.max_grad_norm
            engine.update(settings.rate(step), 1.0 if limit is None else min(1.0, limit / (norm + 1e-6)))
            seconds = time.perf_counter() - began
            points.append((total, settings.rate(step), norm, batch.tokens, seconds))
            advance(f"loss {total:.4g}, {batch.tokens / seconds:,.0f} tokens/s")
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                keep()
    engine.forget_gradients()


def _shares(batch: Batch, settings: Settings, processes: int) -> list[list[Batch]]:
    """Return the micro-batches of each process."""
    own = settings.batch_size // processes
    return [split(share, -(-own // (settings.micro_batch or own))) for share in split(batch, processes)]


def _broken(
    losses: list[float], norm: float, step: int, batch: Batch, shares: list[list[Batch]], kept: str, warmup: int
) -> DataError:
    """Return the error that names the windows whose loss is not finite, or all whose gradients were added up."""
    parts = [part for share in shares for part in share]
    bad = [w for part, found in zip(parts, losses, strict=True) if not math.isfinite(found) for w in part.windows]
    what = f"the loss is {sum(losses)}" if bad else f"the gradient's norm is {norm}"
    stay = f"the parameters stay those after {step} steps{kept}"
    can_end = kept and step > warmup
    works = f"--resume --steps {step} keeps what came before" if can_end else "look at these, or try a smaller lr"
    return DataError(475, f"{what} in {_named(step, bad or batch.windows)}: {stay}; {works}.")


def _named(step: int, windows: Sequence[int]) -> str:
    """Name a step, counted from 1 as on the bar, and windows, counted from 0."""
    return f"step {step + 1}, {'windows' if len(windows) > 1 else 'window'} {some(map(str, windows), 16)}"


def _keep(engine: Engine, out: Path, points: list[Point], facts: Mapping[str, Any]) -> None:
    tensors = engine.tensors()
    if engine.index == 0:
        curve = {name: list(values) for name, values in asdict(_curve(points)).items()}
        state.save(out, state.State(len(points), curve, tensors), facts)
    engine.wait()


def _resumed(engine: Engine, out: Path, facts: Mapping[str, Any]) -> list[Point]:
    """Put a run's state back; return what was measured so far."""
    kept = state.load(out, facts, engine.parameters())
    engine.fill(kept.tensors)
    return list(zip(*(kept.curve[field.name] for field in fields(Curve)), strict=True))


def _curve(points: list[Point]) -> Curve:
    return Curve(*zip(*points, strict=True)) if points else Curve()


def _pages(settings: Settings, out: Path | None) -> Path | None:
    """Return the folder of a paged optimizer's pages."""
    if out is not None and settings.optimizer.startswith("paged"):
        out.mkdir(parents=True, exist_ok=True)
    return out


def _check_shares(settings: Settings, processes: int) -> None:
    if settings.batch_size % processes:
        near = settings.batch_size // processes * processes
        works = f"{near} and {near + processes} do" if near else f"{processes} does"
        raise RecipeError(
            246, f"batch_size {settings.batch_size} cannot be shared evenly by {processes} processes; {works}."
        )


def _check(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise RecipeError(246, f"{name} must be {wanted}, not {value}.")


def _silent(remark: str) -> None:
    """Show nothing."""
