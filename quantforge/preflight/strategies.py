"""The ways to run, from the fastest to the one that takes least memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Strategy:
    """How a run keeps to its memory.

    stream        blocks are read from disk when they are wanted, and dropped; False: the whole model is loaded
    replay        batches wait at the entry of a block, in files, and go through it again for every stage; False: they
                  wait where they are
    """

    stream: bool = False
    replay: bool = False


def strategies(*, data: bool) -> Iterator[Strategy]:
    """Yield the ways to run; without `data` no batch waits anywhere."""
    yield Strategy()
    yield Strategy(stream=True)
    if data:
        yield Strategy(stream=True, replay=True)
