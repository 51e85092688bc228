"""What a run will take, told before any weight is read: bytes of output, memory at its highest, disk, and time.

Output is exact where it does not depend on data. Memory and time come from a model of the run: what it holds at each
moment, and what it computes, by the shapes of the layers; a forward is rehearsed without data, solvers are tried on
small layers, and the machine's speed is measured for some 50 ms (`rehearsal`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quantforge import exporters
from quantforge.errors import ResourceError
from quantforge.models import blocks
from quantforge.models.load import Source
from quantforge.plan import Plan
from quantforge.preflight import costs, output, work
from quantforge.preflight.costs import Seconds
from quantforge.preflight.output import Output
from quantforge.preflight.serving import show
from quantforge.preflight.strategies import Strategy, strategies
from quantforge.protocols import FileExporter

__all__ = ["Estimate", "Strategy", "check_disk", "check_memory", "choose", "estimate"]
MARGIN = 1.05  # of what the disk must have


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    output    bytes of the checkpoint
    memory    bytes that are resident at the highest, of the whole process
    parts     what they are made of, where they are highest
    disk      bytes beside the output while the run lasts: packed layers, hidden states
    took      time by the cost model
    strategy  how the memory is kept to
    budget    bytes that it may take: --max-memory, or else what is free
    asked     True if the user named the budget
    probed    seconds that one block took, where it was measured
    """

    output: Output
    memory: int
    parts: dict[str, int]
    disk: int
    took: Seconds
    strategy: Strategy
    budget: int
    asked: bool
    probed: float | None = None

    @property
    def seconds(self) -> float:
        """Return the time of all of it."""
        return self.took.files + self.took.work

    @property
    def total_disk(self) -> int:
        """Return the bytes that must be free on the disk of the output."""
        return round((self.output.total + self.disk) * MARGIN)

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "output": {**asdict(self.output), "exact": not self.output.open},
            "peak_memory": self.memory,
            "memory_parts": self.parts,
            "temporary_disk": self.disk,
            "seconds": self.seconds,
            "probed_seconds": self.probed,
            "strategy": asdict(self.strategy),
        }

    def table(self) -> str:
        """Return it as lines of text."""
        least = f" at least ({self.output.open})" if self.output.open else ""
        how = "blocks are read one by one" if self.strategy.stream else "the whole model is loaded"
        how += ", batches wait in files" if self.strategy.replay else ""
        parts = ", ".join(f"{show(size)} {name}" for name, size in self.parts.items() if size >= self.memory / 100)
        probed = f", by a block that took {self.probed:.1f} s" if self.probed is not None else ""
        return "\n".join(
            [
                f"output: {self.output.weights:,} bytes of weights{least}, and about {show(self.output.beside)} beside",
                f"memory: {show(self.memory)} at the highest ({parts}); {how}",
                f"disk: {show(self.disk)} while the run lasts, beside the output",
                f"time: about {duration(self.seconds)} on this machine{probed}",
            ]
        )


def duration(seconds: float) -> str:
    """Return a time for people: `25 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def estimate(
    plan: Plan,
    source: Source,
    *,
    samples: int,
    seq_len: int,
    max_memory: int | None = None,
    skeleton: nn.Module | None = None,
    tokenizer: Any = None,
    quick: bool = False,
) -> Estimate:
    """Return what quantizing `source` by `plan` will take, by its config and headers alone.

    samples     windows of `seq_len` tokens; they count only where the plan needs data
    max_memory  bytes that the process may take; None: what is free now
    skeleton    of `source`, where it has been made already
    quick       nothing is measured if the whole model fits whatever the solver holds; the time then means nothing
    """
    skeleton = source.skeleton() if skeleton is None else skeleton
    resident = costs.resident()
    tokens = samples * seq_len if plan.needs else 0
    budget = costs.free_memory() if max_memory is None else max_memory
    found = output.size(plan, skeleton, tokenizer, beside=_tokenizer_bytes(source))
    done = work.lay_out(plan, skeleton, seq_len=seq_len, resident=resident, quick=quick)
    if quick and costs.peak(plan, source, done, found, tokens, Strategy())[0] > budget:
        done = work.lay_out(plan, skeleton, seq_len=seq_len, resident=resident)
    for strategy in ways(source, data=bool(tokens)):
        peak, parts = costs.peak(plan, source, done, found, tokens, strategy)
        if peak <= budget:
            break
    took = costs.seconds(plan, source, done, found, tokens=tokens, windows=samples, strategy=strategy)
    disk = costs.disk(plan, done, found, tokens)
    return Estimate(found, peak, parts, disk, took, strategy, budget, max_memory is not None)


def choose(plan: Plan, source: Source, tokens: int, budget: int | None = None, *, seq_len: int = 512) -> Strategy:
    """Return how to run `plan` on `tokens` calibration tokens within `budget` bytes; None: what is free now.

    ResourceError, before any work, where no way fits.
    """
    found = estimate(plan, source, samples=max(tokens // seq_len, 1), seq_len=seq_len, max_memory=budget, quick=True)
    check_memory(found, plan)
    return found.strategy


def check_memory(found: Estimate, plan: Plan) -> None:
    """Raise ResourceError if a run does not fit the memory, with what would."""
    if found.strategy.stream and isinstance(exporters.choose(plan), FileExporter):
        raise ResourceError(
            525,
            f"the model does not fit in {show(found.budget)}, and {plan.container} is written from memory; "
            "--format compressed-tensors can be written block by block, or give more --max-memory.",
        )
    if found.memory <= found.budget:
        return
    largest = max(found.parts, key=lambda name: found.parts[name])
    needs = f"{plan.recipe.label} needs {show(found.memory)} even at the least, {show(found.parts[largest])} {largest}"
    least = -(-found.memory // 10**8) / 10
    if found.asked:
        raise ResourceError(550, f"{needs}; --max-memory is {show(found.budget)}: {least:.1f}GB would fit.")
    raise ResourceError(
        551, f"{needs}, and {show(found.budget)} are free: close other programs, or use a method without data."
    )


def check_text(name: str, needed: int, max_memory: int | None) -> None:
    """Raise ResourceError if tokenizing a text takes `needed` bytes more than the process may."""
    budget = costs.free_memory() if max_memory is None else max_memory
    needed += costs.resident()
    if needed > budget:
        limit = "are free" if max_memory is None else "is --max-memory"
        raise ResourceError(
            553, f"to tokenize {name!r} takes {show(needed)}, and {show(budget)} {limit}: use a shorter text."
        )


def check_disk(found: Estimate, out: Path, held: int = 0) -> None:
    """Raise ResourceError if the disk of `out` lacks the room for the output and for what is kept on the way.

    held  bytes of that which are there already, of a run that was broken off
    """
    place = out.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free + held
    if free < found.total_disk:
        raise ResourceError(
            552,
            f"--out {out}: the run needs {show(found.total_disk)} of disk ({show(found.output.total)} of output, "
            f"{show(found.disk)} on the way, 5 % to spare), and {show(free)} are free: remove something, or choose "
            "another disk.",
        )


def ways(source: Source, *, data: bool) -> Iterator[Strategy]:
    """Yield the ways to run; what does not stand in safetensors under its own names cannot be streamed."""
    streams = blocks.can_stream(source)
    for strategy in strategies(data=data):
        if streams or not strategy.stream:
            yield strategy


def _tokenizer_bytes(source: Source) -> int:
    """Return the bytes of the files of a model folder that are no weights."""
    if source.folder is None:
        return 4_000_000
    weights = {tensor.file for tensor in source.folder.tensors.values()}
    files = (p for p in source.path.iterdir() if p.suffix in (".json", ".model", ".txt", ".jinja") and p not in weights)
    return sum(p.stat().st_size for p in files if p.is_file() and not p.name.endswith(".index.json"))
