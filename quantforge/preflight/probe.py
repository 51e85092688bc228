"""One decoder block quantized for real, to tell by the clock what the cost model only guesses."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from quantforge import pipeline
from quantforge.course import Run
from quantforge.memory import PeakMemory
from quantforge.models import arch, blocks, load
from quantforge.models.load import Source
from quantforge.plan import Plan
from quantforge.preflight import Estimate
from quantforge.resume import Record


def measured(found: Estimate, plan: Plan, source: Source, *, samples: int, seq_len: int, device: str) -> Estimate:
    """Return `found` with the time and the memory that the first block with quantized layers took, scaled up.

    The block has the model's weights; its inputs are random tokens, since no text is to be read. What the block did
    not show, reading and saving the model, stays as it was estimated.
    """
    first = arch.block_path(next(iter(plan.layers)))
    part = replace(
        plan,
        layers={name: p for name, p in plan.layers.items() if arch.block_path(name) == first},
        stages=tuple(names for names in plan.stages if arch.block_path(names[0]) == first),
    )
    where = load.check_device(device)
    held = blocks.stream(source, where) if blocks.can_stream(source) else blocks.Blocks(load.model(source, device))
    ids = None
    if plan.needs:
        rows = source.config.get_text_config().vocab_size
        ids = torch.randint(rows, (samples, seq_len), generator=torch.Generator().manual_seed(0))
    with PeakMemory(where, above=0) as memory:
        start = time.perf_counter()
        pipeline.quantize(held.model, part, ids, run=Run(held, Record(None, where)))
        seconds = time.perf_counter() - start
    took = replace(found.took, work=seconds / found.took.first)
    if isinstance(held, blocks.Streamed) and memory.bytes is not None:
        return replace(found, took=took, memory=max(found.memory, memory.bytes), probed=seconds)
    return replace(found, took=took, probed=seconds)
