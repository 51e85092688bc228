"""The model of a run: what it holds at each moment, what it computes, and what it writes on the way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from quantforge.models import arch
from quantforge.models.load import Source
from quantforge.plan import LayerPlan, Plan
from quantforge.preflight import rehearsal, work
from quantforge.preflight.output import Output
from quantforge.preflight.strategies import Strategy
from quantforge.preflight.work import StageWork, Work
from quantforge.shards import LIMIT

TILES = 0.5625  # of the products of a symmetric matrix are computed

ROOM = 0.9  # of the memory that is free now
_IDLE = 64 * 2**20  # of libraries that are loaded on the way, and of what the allocator keeps
_KEPT = 1.25  # of what solving holds: freed memory that the allocator keeps
_RETURNED = 1.05  # the same of streamed runs, which hand large pieces back at once
_PACKING = 14  # bytes a weight, while codes become a stream of bits
_HASHED, _READ, _WRITTEN = 1.3e9, 1.0e9, 4e8  # bytes a second
_START = 2.0  # seconds until the first weight is read
_COLD = 1.6  # what solving takes in layers that no cache holds


def free_memory() -> int:
    """Return the bytes that this process may come to hold, by what is free now and what its group is allowed."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found = [int(line.split()[1]) * 1024]
    group = Path("/sys/fs/cgroup")
    limit, used = (_lines(group / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdecimal():
        kept = [line.split() for line in _lines(group / "memory.stat")]  # files in the cache, which can be let go
        cached = sum(int(count) for name, count in kept if name in ("inactive_file", "active_file"))
        found.append(int(limit[0]) - int(used[0]) + cached)
    return resident() + round(ROOM * max(min(found), 0))


def resident() -> int:
    """Return the bytes that this process holds now; 0 where it cannot be told."""
    lines = _lines(Path("/proc/self/statm"))
    return int(lines[0].split()[1]) * os.sysconf("SC_PAGE_SIZE") if lines else 0


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def peak(
    plan: Plan, source: Source, done: Work, found: Output, tokens: int, strategy: Strategy
) -> tuple[int, dict[str, int]]:
    """Return the bytes that are resident at the highest, and what they are made of."""
    moments = _streamed(plan, source, done, found, tokens, strategy) if strategy.stream else []
    if not strategy.stream:
        moments = _whole(plan, source, done, found, tokens)
    base = {"of the program": done.resident + _IDLE}
    highest = max(moments, key=lambda parts: sum(parts.values()))
    parts = {name: size for name, size in {**base, **highest}.items() if size}
    return sum(parts.values()), parts


def _whole(plan: Plan, source: Source, done: Work, found: Output, tokens: int) -> list[dict[str, int]]:
    """Return the moments of a run that loads the whole model: loading, solving, saving."""
    weights, codes = 4 * done.parameters, sum(map(held, plan.layers.values()))
    item = 4 if source.gguf else source.dtype.itemsize
    twin = weights if plan.needs & {"drift", "float_blocks"} else 0
    return [
        {"of the model": weights, "as it is read": item * done.parameters},
        {
            "of the model": weights + twin,
            "of codes": codes,
            "of waiting batches": _parked(plan, done, tokens),
            "of solving": round(_KEPT * _solving(done, tokens)),
        },
        {"of the model": weights, "of codes": codes, "of the output": found.held + plan.kept[1]},
    ]


def _streamed(
    plan: Plan, source: Source, done: Work, found: Output, tokens: int, strategy: Strategy
) -> list[dict[str, int]]:
    """Return the moments of a run that holds one block: reading it, solving, packing."""
    largest = max(done.blocks, default=0)
    twin = 2 if plan.needs & {"drift", "float_blocks"} else 1
    if strategy.replay:
        parked = twin * round(done.forward.running * min(done.batch_tokens, tokens))
    else:
        parked = _parked(plan, done, tokens)
    codes = sum(map(held, plan.layers.values())) // max(len(done.blocks), 1)
    outside = done.outside - done.head
    common = {"of the model": twin * 4 * (outside + largest), "of codes": codes, "of waiting batches": parked}
    # a tensor is mapped, copied and widened before it takes its place
    reading = 2 * source.dtype.itemsize * max(done.widest, done.outside_widest)
    return [
        {**common, "of reading": reading},
        {**common, "of solving": round(_RETURNED * _solving(done, tokens))},
        {**common, "of packing": _PACKING * done.widest},
        {"of the model": 4 * (outside + largest), "of the output": max(found.held, _PACKING * done.widest)},
    ]


def held(p: LayerPlan) -> int:
    """Return the bytes of a solved layer in memory: a byte a code, and what is stored beside the codes."""
    weights = p.shape[0] * p.shape[1]
    return weights + max(p.nbits - weights * p.format.grid.bits, 0) // 8


def _parked(plan: Plan, done: Work, tokens: int) -> int:
    """Return the bytes of all batches where they wait, and of one that runs."""
    if not tokens:
        return 0
    twin = 2 if plan.needs & {"drift", "float_blocks"} else 1
    calls = done.entry * len(plan.needs & {"blocks", "float_blocks"})
    running = (done.forward.running - done.forward.parked) * min(done.batch_tokens, tokens)
    entered = twin * done.entry  # what a block was entered with, of which a commit is made
    return round((twin * done.forward.parked + entered + calls) * tokens + max(running, 0))


def _solving(done: Work, tokens: int) -> int:
    """Return the most that solving a stage holds: its statistics, what the solver makes, and what products take.

    A product orders one of its factors anew, and a batch is turned before it is multiplied.
    """
    batch = 4 * min(done.batch_tokens, tokens)
    held_by = [s.solving.bytes(s.rows, s.columns) + (batch + 4 * s.columns) * s.columns for s in done.stages]
    return max(held_by, default=0)


def disk(plan: Plan, done: Work, found: Output, tokens: int) -> int:
    """Return the bytes that are taken for a while: of the journal (packed layers, and hidden states, old ones until new
    ones are safe), and of tensors that wait for the header of their file."""
    twin = 2 if plan.needs & {"drift", "float_blocks"} else 1
    return found.packed + 2 * twin * done.entry * tokens + min(LIMIT, found.weights)


@dataclass(frozen=True)
class Seconds:
    """Time by the cost model.

    files  of reading, writing and digests
    work   of passes, statistics and solving
    first  the share of `work` that the first block with quantized layers has
    """

    files: float
    work: float
    first: float


def seconds(
    plan: Plan, source: Source, done: Work, found: Output, *, tokens: int, windows: int, strategy: Strategy
) -> Seconds:
    """Return the time of a run on `windows` windows that hold `tokens` tokens."""
    machine, depth = done.machine, max(len(done.blocks), 1)
    one = tokens * (done.operations / machine.speed + depth * 2 * done.forward.moved / machine.bandwidth)
    count = work.passes(plan, windows)
    if strategy.replay:  # half a block again for every stage
        count += len(done.stages) / depth / 2
    stages = [_of_stage(plan, s, tokens, done) for s in done.stages]
    first = arch.block_path(plan.stages[0][0]) if plan.stages else None
    inside = sum(t for t, names in zip(stages, plan.stages, strict=True) if arch.block_path(names[0]) == first)
    total = count * one + sum(stages)
    weights = source.dtype.itemsize * done.parameters
    files = weights / _READ + weights / _HASHED + 12 * done.parameters / machine.bandwidth
    if strategy.stream:  # all is looked at before anything is computed
        files += weights / _READ
    # what was written is read again, and held against the numbers in memory
    files += found.total / _WRITTEN + (3 * found.total + 8 * done.parameters) / _HASHED
    files += 24 * done.parameters / machine.bandwidth
    return Seconds(_START + files, total, (count * one / depth + inside) / total if total else 1.0)


def _of_stage(plan: Plan, s: StageWork, tokens: int, done: Work) -> float:
    """Return the seconds of a stage's statistics and of solving it."""
    speed, bandwidth = done.machine.speed, done.machine.bandwidth
    products = rehearsal.products(s.rows, s.columns, hessian="hessian" in s.plan.needs)
    judged = 2 * rehearsal.judging(s.columns) * s.rows * s.columns**2 if plan.needs else 0.0
    solved = _COLD * s.solving.time(s.rows, s.columns) + (products + judged) / speed
    return solved + _gathered(plan, s, tokens, done) + _tried(plan, s, speed, bandwidth)


def _gathered(plan: Plan, s: StageWork, tokens: int, done: Work) -> float:
    """Return the seconds of a stage's Hessians: products in float32, sums in float64."""
    needs = plan.walk_needs
    count = 0.0 if not tokens or needs <= {"extremes", "blocks", "float_blocks"} else 1.0
    count += len(plan.recipe.transforms) / 2  # of those, only what can be rescaled is looked at
    count += 2 * ("drift" in needs)
    summed = tokens / done.batch_tokens * 20 * s.columns**2 / done.machine.bandwidth
    return count * (2 * tokens * s.share * s.columns**2 * TILES / done.machine.speed + summed)


def _tried(plan: Plan, s: StageWork, speed: float, bandwidth: float) -> float:
    """Return the seconds in which transforms look for scales, about: their candidates are rounded and judged."""
    total = 0.0
    for transform in plan.recipe.transforms:
        steps = 2 * getattr(transform, "steps", 0) + 1
        rows = min(getattr(transform, "rows", -1) % (s.rows + 1), s.rows)
        total += 2 * steps * (2 * rows * s.columns**2 / speed + 60 * 4 * rows * s.columns / bandwidth)
    return total
