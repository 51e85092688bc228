"""What rounding the inputs alone does, by kind of layer and granularity: the damage table.

    python tools/damage.py [MODEL] TEXT.txt --out reports/damage.md

walks the float model over the first 16 windows of 512 tokens, keeps 16 tokens of every fourth of them, and rounds these
as each format would; the weights stay in float. A number is the share of the layers' output energy that is lost, the
mean over layers of a kind, and the layer that loses most.
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from quantforge.calibrate import corpus
from quantforge.calibrate.stats import Statistics
from quantforge.models import arch, load
from quantforge.models.walk import walk
from quantforge.numerics.inputs import parse_inputs, settle

SAMPLES, SEQ_LEN, BATCH = 16, 512, 4
FORMATS = ("int8-token", "int8-tensor", "int8-tensor-static", "e4m3-token", "e4m3-tensor", "int4-token", "int4-g64")
Losses = dict[tuple[str, str], list[tuple[float, str]]]  # (kind, format): the loss of each layer, and its name


def lost(weight: Tensor, x: Tensor, extremes: tuple[Tensor, Tensor], notation: str) -> float:
    """Return Σ ((x̂ − x) Wᵀ)² / Σ (x Wᵀ)² for samples x [tokens, in]."""
    rounded = settle(parse_inputs(notation), *extremes, torch.float32).round(x)
    energy = float((x @ weight.T).double().square().sum())
    return float(((rounded - x) @ weight.T).double().square().sum()) / energy if energy > 0 else 0.0


def measure(model: torch.nn.Module, ids: Tensor) -> Losses:
    """Return what each format loses in each layer of the float `model`."""
    stages = arch.find_stages(model)[0]
    gathered: dict[int, Statistics] = {}

    def observe(index: int, batch: int, x: Tensor) -> None:
        if index not in gathered:
            gathered[index] = Statistics(frozenset({"extremes", "samples"}), x.shape[-1], x.device)
        gathered[index].add(batch, x)

    body = getattr(model, "base_model", model)
    found: Losses = {}
    for index in walk(lambda batch: body(input_ids=batch, use_cache=False), torch.split(ids, BATCH), stages, observe):
        if index not in gathered:
            continue
        fields = gathered.pop(index).fields()
        for name, module in zip(stages[index].names, stages[index].modules, strict=True):
            for notation in FORMATS:
                loss = lost(arch.get_weight(module), fields["samples"], fields["extremes"], notation)
                found.setdefault((name.rsplit(".", 1)[-1], notation), []).append((loss, name))
    return found


def table(losses: Losses) -> str:
    """Return the mean and the worst loss by kind of layer and format as a Markdown table."""
    kinds = list(dict.fromkeys(kind for kind, _ in losses))
    lines = ["| layer | " + " | ".join(FORMATS) + " |", "| --- |" + " ---: |" * len(FORMATS)]
    for kind in kinds:
        lines.append(f"| {kind} | " + " | ".join(_cell(losses[kind, f]) for f in FORMATS) + " |")
    return "\n".join(lines)


def _cell(found: Iterable[tuple[float, str]]) -> str:
    values = list(found)
    worst, name = max(values)
    mean = math.fsum(value for value, _ in values) / len(values)
    return f"{mean:.1e}; {worst:.1e} in block {arch.block_index(name)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="left out: the demo model")
    parser.add_argument("text")
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    source = load.find(o.model)
    ids = corpus.windows(corpus.load_text(o.text, "calibration"), load.tokenizer(source), SEQ_LEN, SAMPLES).ids
    text = (
        f"# What rounding the inputs does\n\n{source.name}, weights in float. The share of a layer's output energy "
        "that is lost by rounding its inputs: the mean over the layers of a kind; the most, and where.\n\n"
        f"{table(measure(load.model(source), ids))}\n\n"
        "Made by `python tools/damage.py [MODEL] TEXT.txt --out reports/damage.md`.\n"
    )
    o.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
