"""What a report says of single layers: losses by kind, widest inputs, tokens of experts, and which rows a page has."""

from __future__ import annotations

import math

from quantforge.record import LayerRow, Report, Run
from quantforge.report.groups import names
from quantforge.report.tables import METHOD, Cell, Column, Table, figure, name_cell

FEW_ROWS = 20  # of a run, where a page cannot hold all layers
INPUTS = (
    "Rows of methods that only round are judged on the float model's inputs, those of GPTQ and the like on the inputs "
    "that come through the layers already quantized, so that losses of the two are not of the same inputs."
)

_WIDE = "largest |x| over the calibration tokens"
_SEEN = "of the experts of a block"


def losses(report: Report) -> Table:
    """Return the mean relative loss per run and kind of layer; without rows if no run has layers."""
    kinds = list(dict.fromkeys(layer.kind for run in report.runs for layer in run.layers))
    columns = (METHOD, *(Column(kind, "mean relative loss of its layers") for kind in kinds))
    rows = tuple(
        (name_cell(name), *(figure(_mean_loss(run, kind), ".2e") for kind in kinds))
        for run, name in zip(report.runs, names(report), strict=True)
        if run.layers
    )
    return Table("Loss by kind of layer", columns, rows)


def _mean_loss(run: Run, kind: str) -> float:
    found = [layer.relative_loss for layer in run.layers if layer.kind == kind]
    return math.fsum(found) / len(found) if found and all(abs(loss) < 1e300 for loss in found) else math.nan


def experts(report: Report) -> Table:
    """Return a row for each block of experts: how many, and the calibration tokens that they saw.

    Of the first run that says; without rows for models without experts.
    """
    columns = tuple(
        Column(name, _SEEN) for name in ("block", "experts", "fewest tokens", "median", "most", "without any")
    )
    for run in report.runs:
        seen: dict[int, dict[str, int]] = {}
        for layer in run.layers:
            tokens = layer.notes.get("tokens")
            if type(tokens) is int and layer.block is not None:
                seen.setdefault(layer.block, {})[layer.name.rpartition(".")[0]] = tokens
        if seen:
            rows = (_expert_row(block, sorted(found.values())) for block, found in sorted(seen.items()))
            return Table("Calibration tokens of each expert", columns, tuple(rows))
    return Table("Calibration tokens of each expert", columns, ())


def _expert_row(block: int, tokens: list[int]) -> tuple[Cell, ...]:
    values = (block, len(tokens), tokens[0], tokens[len(tokens) // 2], tokens[-1], tokens.count(0))
    return tuple(Cell(f"{value:,}", value) for value in values)


def widest(report: Report) -> Table:
    """Return a row for each run that smoothed inputs and kind of layer: the widest channel's |x| before and after."""
    columns = (
        METHOD, Column("layer", "the kind of layer", text=True), Column("widest input", _WIDE),
        Column("smoothed to", _WIDE),
    )  # fmt: skip
    rows = []
    for run, name in zip(report.runs, names(report), strict=True):
        kinds: dict[str, list[tuple[float, float]]] = {}
        for layer in run.layers:
            ends = (layer.notes.get("widest_input"), layer.notes.get("smoothed_to"))
            if isinstance(ends[0], float) and isinstance(ends[1], float):
                kinds.setdefault(layer.kind, []).append((ends[0], ends[1]))
        for kind, found in kinds.items():
            before, after = (figure(max(part), ".1f") for part in zip(*found, strict=True))
            rows.append((name_cell(name), Cell(kind, kind), before, after))
    return Table("Widest input channels", columns, tuple(rows))


def shown(report: Report, most: int) -> list[tuple[int, Run, tuple[LayerRow, ...]]]:
    """Return the place of each run that has layers, the run, and the layers of its table.

    These are all, or where they are more than `most` together, of each run the ones that lose most.
    """
    runs = [(i, run) for i, run in enumerate(report.runs) if run.layers]
    if sum(len(run.layers) for _, run in runs) <= most:
        return [(i, run, run.layers) for i, run in runs]
    return [(i, run, tuple(sorted(run.layers, key=_by_loss)[:FEW_ROWS])) for i, run in runs]


def _by_loss(layer: LayerRow) -> float:
    return -layer.relative_loss if math.isfinite(layer.relative_loss) else math.inf
