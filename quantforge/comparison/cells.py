"""One row of a comparison: a method's result, the float model or a cache, measured on the common ground."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import api, exporters
from quantforge.comparison.wishes import FLOAT, told
from quantforge.errors import ResourceError
from quantforge.evaluation import histograms, perplexity, zeroshot
from quantforge.evaluation.histograms import Spread
from quantforge.evaluation.perplexity import Score
from quantforge.evaluation.reference import Reference
from quantforge.exporters.compressed_tensors import CompressedTensors
from quantforge.exporters.native import Native
from quantforge.models import arch, moe
from quantforge.models import load as loading
from quantforge.models.kvcache import KVFormat
from quantforge.numerics.blocks import Flat
from quantforge.numerics.formats import Format
from quantforge.plan import Plan
from quantforge.progress import bar
from quantforge.record import DivergenceRow, Histogram, LayerRow, Run, TaskRow
from quantforge.result import Result
from quantforge.solving import Layer

Losses = Mapping[str, tuple[float, float]]
TASKS_AT_ONCE = 32  # texts of similar length, fewer if logits of a large vocabulary would need much memory
WORST = 3  # layers of each run whose values are drawn


@dataclass(frozen=True)
class Tasks:
    """The zero-shot tasks that every row is scored on, as `zeroshot.evaluate` takes them."""

    names: tuple[str, ...]
    shots: int | None
    limit: int | None
    seed: int
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Ground:
    """What all rows on one model have in common.

    calib, ids  token ids [windows, seq_len] to calibrate and to evaluate on
    reference   what the float model predicts over ids
    spreads     of the weights and inputs of the float model's layers
    memory      bytes in use before any row
    keep        folder that receives the checkpoints; None: they are not kept
    """

    source: loading.Source
    tokenizer: Any
    calib: Tensor
    calib_from: dict[str, Any]
    ids: Tensor
    reference: Reference
    spreads: Mapping[str, tuple[Spread, Spread]]
    tasks: Tasks | None
    memory: int | None
    keep: Path | None


def quantized(label: str, plan: Plan, model: nn.Module, ground: Ground, losses: Losses | None) -> Run:
    """Quantize `model` in place by `plan`, and measure what came of it.

    losses  (loss, relative loss) of each layer by name, for a method that collects no statistics to tell them itself
    """
    result = api.run(
        model,
        plan,
        ground.calib if plan.needs else None,
        tokenizer=ground.tokenizer,
        source=ground.source.name,
        calibration=ground.calib_from,
        memory_before=ground.memory,
        collect=frozenset() if losses is not None else frozenset({"hessian"}),
    )
    if losses is not None:
        result = replace(result, layers=tuple(_judged(layer, losses) for layer in result.layers))
    score = _score(label, model, ground)
    size, note = _save(label, result, ground.keep)
    run = Run(
        label=label,
        method=plan.recipe.name,
        bits=plan.recipe.weights.grid.bits,
        bits_per_weight=result.bits_per_weight,
        perplexity=score.perplexity,
        kl=score.kl,
        seconds=result.seconds,
        peak_memory_bytes=result.peak_memory,
        bytes_on_disk=size,
        disk_note=note,
        options=told(plan),
        layers=tuple(_row(layer) for layer in result.layers),
        notes=(*result.fallbacks(), *filter(None, [_bias(plan, ground.source)])),
    )
    return measured(run, score, model, ground, _histograms(result, ground))


def float_model(score: Score, skeleton: nn.Module, source: loading.Source) -> Run:
    """Return what is known of the float model, which was scored when the reference was made."""
    dtype = source.dtype
    return Run(
        label=FLOAT,
        method=FLOAT,
        bits=None,
        bits_per_weight=8.0 * dtype.itemsize,
        perplexity=score.perplexity,
        kl=0.0,
        seconds=0.0,
        peak_memory_bytes=None,
        bytes_on_disk=sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize,
        disk_note=f"weights in {str(dtype).removeprefix('torch.')}",
        options={},
        layers=(),
        notes=(),
    )


def in_dtype(label: str, dtype: torch.dtype, model: nn.Module, ground: Ground, level: Run) -> Run:
    """Return the row of the float `model` computed in another dtype, whose differences are rounding.

    level  the float model's row
    """
    other = copy.deepcopy(model)
    for parameter in other.parameters():  # buffers such as the rotary frequencies stay as a loaded model has them
        parameter.data = parameter.data.to(dtype)
    score = _score(label, other, ground)
    note = f"the float model computed in {str(dtype).removeprefix('torch.')}: differences as small as its are rounding"
    run = replace(
        level,
        label=label,
        perplexity=score.perplexity,
        kl=score.kl,
        bytes_on_disk=None,
        disk_note="",
        options={"dtype": str(dtype).removeprefix("torch.")},
        notes=(note,),
    )
    return measured(run, score, other, ground)


def cached(label: str, fmt: KVFormat, model: nn.Module, ground: Ground, level: Run) -> Run:
    """Return the row of the float `model` decoded token by token through a cache stored in `fmt`.

    level  the float model's row
    """
    score, size = api.decode(model, ground.ids, fmt)
    note = f"decoded token by token through a cache of {size:,.0f} bytes a token; weights and inputs stay in float"
    return replace(
        level,
        label=label,
        method=label,
        perplexity=score.perplexity,
        kl=math.nan,
        options={"cache": str(fmt)},
        notes=(note,),
        losses=score.losses,
        kls=(),
        divergence=None,
        tasks=(),
        tokens_per_second=math.nan,
    )


def failed(label: str, reason: str) -> Run:
    """Return the row of a run that came to nothing, which a comparison that is resumed tries again."""
    return Run(
        label=label,
        method=label,
        bits=None,
        bits_per_weight=math.nan,
        perplexity=math.nan,
        kl=math.nan,
        seconds=math.nan,
        peak_memory_bytes=None,
        bytes_on_disk=None,
        disk_note="",
        options={"failed": reason},
        layers=(),
        notes=(reason,),
    )


def _judged(layer: Layer, losses: Losses) -> Layer:
    loss, relative = losses[layer.name]
    return replace(layer, loss=loss, relative_loss=relative)


def _score(label: str, model: nn.Module, ground: Ground) -> Score:
    with bar(f"{label}: perplexity", len(ground.ids)) as step:
        return perplexity.evaluate(model, ground.ids, ground.reference, progress=lambda loss: step(f"loss {loss:.3f}"))


def measured(run: Run, score: Score, model: nn.Module, ground: Ground, drawn: Sequence[Histogram] = ()) -> Run:
    """Add what a pass over the windows and the tasks told to a row."""
    return replace(
        run,
        losses=score.losses,
        kls=score.kls,
        divergence=_divergence(score),
        tasks=_tasks(model, ground),
        tokens_per_second=score.tokens_per_second,
        histograms=tuple(drawn),
    )


def _vocab(model: nn.Module) -> int:
    config: Any = model.config
    size: int = config.get_text_config().vocab_size
    return size


def _divergence(score: Score) -> DivergenceRow | None:
    found, gap = score.divergence, score.gap
    if found is None:
        return None
    return DivergenceRow(
        tokens=found.tokens,
        median=found.median,
        p99=found.p99,
        agreement=found.agreement,
        lost=found.lost,
        gained=found.gained,
        dense=gap.dense if gap else math.nan,
        bound=gap.bound if gap else math.nan,
    )


def _tasks(model: nn.Module, ground: Ground) -> tuple[TaskRow, ...]:
    if ground.tasks is None:
        return ()
    wanted = ground.tasks
    scores = zeroshot.evaluate(
        model,
        ground.tokenizer,
        wanted.names,
        shots=wanted.shots,
        limit=wanted.limit,
        seed=wanted.seed,
        batch_size=1 if api.mixes_tokens(model) else max(1, min(TASKS_AT_ONCE, 2**21 // _vocab(model))),
        folders=wanted.folders,
    )
    return tuple(
        TaskRow(
            task=score.task,
            shots=score.shots,
            answers="".join("01"[answer] for answer in score.answers),
            chance=math.nan if score.summary.chance is None else score.summary.chance,
            items=score.items,
            metrics=dict(score.others),
        )
        for score in scores
    )


def _histograms(result: Result, ground: Ground) -> list[Histogram]:
    """Return the spread of weights and inputs, before and after, of the layers that lose most."""
    told = [layer for layer in result.layers if math.isfinite(layer.relative_loss) and layer.name in ground.spreads]
    names = [layer.name for layer in sorted(told, key=lambda layer: -layer.relative_loss)[:WORST]]
    edges = {name: (ground.spreads[name][0].edge, ground.spreads[name][1].edge) for name in names}
    after = histograms.layers(result.model, names, ground.ids[:1], edges) if names else {}
    return [
        Histogram(name, what, before.edge, before.shares, now.shares)
        for name, found in after.items()
        for what, before, now in zip(("weights", "inputs"), ground.spreads[name], found, strict=True)
    ]


def _bias(plan: Plan, source: loading.Source) -> str | None:
    """Say so if a layer's format can hit the very values that the float model was dequantized from."""
    if source.lattice is None or not any(_hits(p.format, *source.lattice) for p in plan.layers.values()):
        return None
    bits, size = source.lattice
    return f"base-biased: the float model itself was stored in {bits} bits in blocks of {size}"


def _hits(fmt: Format, bits: int, most: int) -> bool:
    """Tell whether codes of `fmt` have `bits`, and its blocks at most `most` weights of one row."""
    rows, columns = (1, fmt.block.size) if isinstance(fmt.block, Flat) else fmt.block
    return fmt.grid.bits == bits and rows == 1 and columns is not None and columns <= most


def _save(label: str, result: Result, keep: Path | None) -> tuple[int | None, str]:
    """Save the checkpoint to learn its size (and keep it if asked); return the bytes of its weight files and a note."""
    exporter = exporters.choose(result.plan)
    reason = exporter.refuses(result.plan)
    if reason:
        return None, f"not saved: {reason}"
    bits = result.plan.recipe.weights.grid.bits
    notes = []
    if isinstance(exporter, CompressedTensors) and 32 % bits:
        notes.append(f"{bits}-bit codes take {32 / (32 // bits):.2f} bits each in the file")
    if isinstance(exporter, CompressedTensors) and result.plan.recipe.corrections:
        notes.append("factors take 16 bits a number in the adapter, and are counted with 8")
    if isinstance(exporter, Native):
        notes.append("quantforge's own container, which quantforge.load reads")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = result.save((keep or Path(scratch)) / label)
        except ResourceError as error:
            if keep is not None:
                raise
            return None, f"not saved: {error}"
        return sum(f.stat().st_size for f in folder.rglob("*.safetensors")), "; ".join(notes)


def _row(layer: Layer) -> LayerRow:
    base = layer.weight.base
    return LayerRow(
        name=layer.name,
        kind=layer.name.rsplit(".", 1)[-1],
        block=arch.block_index(layer.name),
        shape=base.shape,
        format=" x ".join(map(str, filter(None, [base.format, layer.weight.inputs and layer.weight.inputs.inputs]))),
        bits_per_weight=layer.weight.nbits / base.codes.numel(),
        loss=layer.loss,
        relative_loss=layer.relative_loss,
        notes={**layer.weight.notes, **({"tokens": layer.tokens} if moe.expert_of(layer.name) else {})},
    )
