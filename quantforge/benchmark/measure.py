"""Samples of models that run in turn, so that what else the machine does meets all of them alike.

Samples taken while the machine was busy are rejected: in those the process got less of its processors than in its best
one. Medians are over the rest. On a machine that is busy all the time none is, so that notes say where even the best
sample had little of its processors, and where a median is over few.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from quantforge.runtime.generate import steps

QUIET = 0.9  # of the best share of the processors that a sample of the same kind had
LOW = 0.7  # of the processors: a best sample that had less is told
MOST = 3  # times as many samples as are wanted may be taken


@dataclass(frozen=True)
class Sample:
    """Seconds of one run of something, and the share of all threads' time in which the process was on a processor.

    On a GPU the share is of one thread's time: of the one that feeds it.
    """

    seconds: float
    share: float


@dataclass(frozen=True)
class Measured:
    """Samples of one thing.

    seconds   the median of those that were kept
    kept      how many those are
    rejected  how many were taken while the machine was busy
    share     the least share of the processors among those that were kept; best: the largest
    """

    seconds: float
    kept: int
    rejected: int
    share: float
    best: float


class Watch:
    """Takes the time from one call of `split` to the next, in seconds and in time on a processor."""

    def __init__(self, device: str = "cpu") -> None:
        """Begin."""
        self.device = device
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def split(self) -> Sample:
        """Return what passed since the last call, or the beginning."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        seconds, used = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        threads = 1 if self.device == "cuda" else torch.get_num_threads()
        return Sample(seconds, used / seconds / threads if seconds > 0 else 0.0)


def judge(samples: list[Sample]) -> Measured:
    """Return the median of the samples that had their processors to themselves, as far as the best one tells."""
    best = max(sample.share for sample in samples)
    kept = [s for s in samples if s.share >= QUIET * best]
    middle, least = median(s.seconds for s in kept), min(s.share for s in kept)
    return Measured(middle, len(kept), len(samples) - len(kept), least, best)


def in_turn(
    calls: Mapping[str, Callable[[], tuple[Sample, ...]]], rounds: int, *, warm_up: int = 1
) -> dict[str, tuple[Measured, ...]]:
    """Call each of `calls` in turn until each has `rounds` good samples, or three times as many; return its medians.

    Each call returns a sample of every thing that it times. The first `warm_up` rounds do not count.
    """
    for _ in range(warm_up):
        for call in calls.values():
            call()
    taken: dict[str, list[tuple[Sample, ...]]] = {name: [] for name in calls}
    found: dict[str, tuple[Measured, ...]] = {}
    for done in range(1, MOST * rounds + 1):
        for name, call in calls.items():
            taken[name].append(call())
        found = {name: tuple(map(judge, map(list, zip(*runs, strict=True)))) for name, runs in taken.items()}
        if done >= rounds and all(part.kept >= rounds for parts in found.values() for part in parts):
            break
    return found


def few(measured: Mapping[str, Measured], rounds: int) -> tuple[str, ...]:
    """Return a note if some of `measured`, by what they are of, have fewer than `rounds` good samples; else none."""
    short = {name: part.kept for name, part in measured.items() if part.kept < rounds}
    if not short:
        return ()
    worst = min(short, key=lambda name: short[name])
    return (
        f"{len(short)} of {len(measured)} medians are over fewer than {rounds} good samples ({worst}: {short[worst]}); "
        "the other samples had less of the processors, as beside other work",
    )


def idle(measured: Mapping[str, Measured]) -> tuple[str, ...]:
    """Return a note if even the best samples of some of `measured` had little of their processors; else none.

    That alone does not tell a busy machine from work of which much is done by one thread.
    """
    low = {name: part.best for name, part in measured.items() if part.best < LOW}
    if not low:
        return ()
    worst = min(low, key=lambda name: low[name])
    return (
        f"in {len(low)} of {len(measured)} medians even the best sample had its threads at work for less than "
        f"{LOW:.0%} of the time ({worst}: {low[worst]:.0%}); either this work leaves threads waiting, or the machine "
        "was busy throughout, and is faster when it is not",
    )


def generation(model: nn.Module, ids: Tensor, new_tokens: int, device: str = "cpu") -> tuple[Sample, Sample]:
    """Time the first token after the prompts `ids` [batch, tokens], and then `new_tokens` more."""
    stream: Iterator[Tensor] = steps(model, ids)
    watch = Watch(device)
    next(stream)
    first = watch.split()
    for _ in range(new_tokens):
        next(stream)
    return first, watch.split()


def per_second(count: int, measured: Measured) -> float:
    """Return how many of `count` tokens there were a second."""
    return count / measured.seconds if measured.seconds > 0 else math.nan
