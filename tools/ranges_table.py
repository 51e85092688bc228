"""Granularity by range rule: the error of 8-bit weights, and the perplexity of 4-bit ones, as a table.

    python tools/ranges_table.py [MODEL] TEXT.txt --report reports/ranges/report.json --out reports/ranges.md

rounds every linear layer of the model to 8 bits under each rule (rules that look at data see the first 16 windows of
512 tokens), and takes the perplexities from a report of `quantforge compare --methods ranges`.
"""

import argparse
import itertools
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from quantforge import pipeline, plan, recipe, record
from quantforge.calibrate import corpus
from quantforge.models import arch, load
from quantforge.numerics.formats import parse

SAMPLES, SEQ_LEN = 16, 512
RULES = ("minmax", "percentile", "mse", "hessian", "learned")
GRANULARITIES = {"tensor": "int{}-tensor-asym", "channel": "int{}-channel-asym", "group of 64": "int{}-g64-asym"}


def chosen(rule: str, notation: str) -> recipe.Recipe:
    """Return the recipe that rounds by `rule` to the format `notation`."""
    base = recipe.load("lwc") if rule == "learned" else recipe.load("rtn", settings={"solver.range": rule})
    return replace(base, weights=parse(notation))


def weight_error(source: load.Source, ids: torch.Tensor, rule: str, notation: str) -> float:
    """Return Σ (W − Ŵ)² / Σ W² over all quantized layers."""
    model = load.model(source)
    made = plan.make(model, chosen(rule, notation), source.dtype)
    before = {name: arch.get_weight(model.get_submodule(name)).clone() for name in made.layers}
    pipeline.quantize(model, made, ids if made.needs else None)
    error = sum(float((arch.get_weight(model.get_submodule(n)) - w).double().square().sum()) for n, w in before.items())
    return error / sum(float(w.double().square().sum()) for w in before.values())


def table(values: dict[tuple[str, str], float], spec: str) -> str:
    """Return values by (granularity, rule) as a Markdown table."""
    lines = ["| granularity | " + " | ".join(RULES) + " |", "| --- |" + " ---: |" * len(RULES)]
    return "\n".join(
        [*lines, *(f"| {g} | " + " | ".join(format(values[g, r], spec) for r in RULES) + " |" for g in GRANULARITIES)]
    )


def verdict(values: dict[tuple[str, str], float]) -> str:
    """Say whether each finer granularity has the lower value under every rule, and where it has not."""
    steps = list(itertools.pairwise(GRANULARITIES))
    worse = [
        f"{fine} than {coarse} under {r}"
        for r in RULES
        for coarse, fine in steps
        if not values[fine, r] < values[coarse, r]
    ]
    of = len(steps) * len(RULES)
    return f"**not met** in {len(worse)} of {of} steps: {', '.join(worse)}" if worse else f"pass in all {of} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="left out: the demo model")
    parser.add_argument("text")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    source = load.find(o.model)
    ids = corpus.windows(corpus.load_text(o.text, "calibration"), load.tokenizer(source), SEQ_LEN, SAMPLES).ids
    found = record.from_json(o.report.read_text(encoding="utf-8"))
    origin = found.origins[0]
    perplexity = {run.label: run.perplexity for run in found.runs}
    errors: dict[tuple[str, str], float] = {}
    perplexities: dict[tuple[str, str], float] = {}
    for granularity, notation in GRANULARITIES.items():
        for rule in RULES:
            errors[granularity, rule] = weight_error(source, ids, rule, notation.format(8))
            short = parse(notation.format(4)).short
            label = f"lwc-{short}" if rule == "learned" else f"rtn-{short} range={rule}"
            perplexities[granularity, rule] = perplexity[label]
    text = (
        f"# Granularity and range rule\n\n{origin.model}. Rounding to nearest, asymmetric.\n\n"
        f"Relative squared error of the weights in 8 bits:\n\n{table(errors, '.3e')}\n\n"
        f"Each finer granularity is better: {verdict(errors)}.\n\n"
        f"Perplexity in 4 bits, from [the report](ranges/report.md), made by `{origin.command}`; "
        f"{found.runs[0].perplexity:.2f} in float. It is that of {origin.evaluation['count']} windows, and does not "
        "compare with that of others:\n\n"
        f"{table(perplexities, '.2f')}\n\n"
        f"Each finer granularity is better: {verdict(perplexities)}.\n\n"
        f"Made by `python tools/ranges_table.py {shlex.join(sys.argv[1:])}`.\n"
    )
    o.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
