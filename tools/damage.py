"""What rounding the inputs alone does, by kind of layer and granularity: the damage table.

    python tools/damage.py [MODEL] TEXT.txt --out reports/damage.md

walks the float model twice over the first 16 windows of 512 tokens, for the extremes of every input and then to round
it as each format would, one window a call; the weights stay in float. A number is the share of a token's output energy
that is lost, as a mean over tokens: over all layers of a kind, and in the layer that loses most.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from quantforge.calibrate import corpus
from quantforge.calibrate.stats import Extremes
from quantforge.models import arch, load
from quantforge.models.walk import walk
from quantforge.numerics.inputs import parse_inputs, settle

SAMPLES, SEQ_LEN = 16, 512
FORMATS = ("int8-token", "int8-tensor", "int8-tensor-static", "e4m3-token", "e4m3-tensor", "int4-token", "int4-g64")
Losses = dict[tuple[str, str], list[tuple[float, str]]]  # (kind, format): the loss of each layer, and its name


def measure(model: torch.nn.Module, ids: Tensor) -> Losses:
    """Return what each format loses in each layer of the float `model` on ids [windows, tokens]."""
    stages = arch.find_stages(model)[0]
    body = getattr(model, "base_model", model)
    extremes: dict[int, Extremes] = {}
    shares: dict[tuple[str, str], list[Tensor]] = {}  # (layer, format): of each token, window by window

    def forward(batch: Tensor) -> object:
        return body(input_ids=batch, use_cache=False)

    def look(index: int, batch: int, x: Tensor) -> None:
        extremes.setdefault(index, Extremes(x.shape[-1], x.device)).add(x)

    def compare(index: int, batch: int, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        weights = {n: arch.get_weight(m) for n, m in zip(stages[index].names, stages[index].modules, strict=True)}
        energies = {name: (flat @ w.T).square().sum(1) for name, w in weights.items()}
        for notation in FORMATS:
            rounds = settle(parse_inputs(notation), extremes[index].low, extremes[index].high, torch.float32)
            error = rounds.round(flat) - flat
            for name, w in weights.items():
                lost = (error @ w.T).square().sum(1)
                shares.setdefault((name, notation), []).append((lost / energies[name])[energies[name] > 0])

    for observe in (look, compare):
        for _ in walk(forward, list(ids.split(1)), stages, observe):
            pass
    found: Losses = {}
    for (name, notation), parts in shares.items():
        loss = float(torch.cat(parts).double().mean())
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
        f"# What rounding the inputs does\n\n{source.name}, weights in float. The share of a token's output energy "
        "that is lost by rounding a layer's inputs, as a mean over tokens: over the layers of a kind; the most, "
        "and where.\n\n"
        f"{table(measure(load.model(source), ids))}\n\n"
        f"{SAMPLES} windows of {SEQ_LEN} tokens. Made by `python tools/damage.py {shlex.join(sys.argv[1:])}`.\n"
    )
    o.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
