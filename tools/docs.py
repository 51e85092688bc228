"""Write docs/ from the recipes, the docstrings, a small worked example and the committed reports: `make docs`."""

import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantforge import exporters, plan, recipe, record, registry
from quantforge.models import tiny
from quantforge.numerics.formats import parse
from quantforge.numerics.inputs import Inputs
from quantforge.numerics.problem import Problem
from quantforge.numerics.qtensor import QTensor, fit
from quantforge.numerics.ranges import Range
from quantforge.recipe import Recipe
from quantforge.record import Report, Run
from quantforge.report import escape_markdown, number, perplexity
from quantforge.solvers.gptq import GPTQ
from quantforge.solvers.obq import OBQ, obd_saliency, obs_saliency, obs_update
from quantforge.solvers.rtn import RTN

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REPORTS = ("all-weights", "all-activations")
SIDE = 1024  # of the layer for which bits per weight are stated
STATISTICS = {
    "hessian": "second moments of each layer's inputs",
    "magnitude": "mean size of each input channel",
    "drift": "how far each layer's inputs have moved from the float model's",
    "blocks": "the calls of every decoder block",
    "float_blocks": "those of the float model's",
    "extremes": "the smallest and largest value of each input channel",
    "samples": "some inputs of each layer",
}


def pages(reports: Mapping[str, Report] = MappingProxyType({})) -> dict[str, str]:
    """Return the text of every page by its path below docs/.

    reports  where measured rows come from, by folder
    """
    found = {f"methods/{name}.md": method_page(name, reports) for name in recipe.names()}
    found["obd-obs-obq.md"] = lineage_page()
    found["inputs-and-caches.md"] = inputs_page()
    found["README.md"] = index_page()
    return found


def committed_reports() -> dict[str, Report]:
    """Return the reports that measured rows come from, by folder, as far as there are any."""
    files = {name: ROOT / "reports" / name / "report.json" for name in REPORTS}
    return {n: record.from_json(file.read_text(encoding="utf-8")) for n, file in files.items() if file.exists()}


def table(heads: list[str], rows: list[list[str]], right: int = 0) -> str:
    """Return a Markdown table; the last `right` columns are numbers."""
    marks = ["---"] * (len(heads) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, marks, *rows])


HAND = (
    "calibration-study.md",
    "checkpoints.md",
    "distillation.md",
    "evaluation.md",
    "memory-and-time.md",
    "papers.md",
    "sensitivity.md",
)  # pages that are written, not made


def index_page() -> str:
    rows = []
    for name in recipe.names():
        chosen = recipe.load(name)
        stored = f"`{chosen.weights.short}`" + (f", inputs `{chosen.inputs.short}`" if chosen.inputs else "")
        rows.append([f"[{name}](methods/{name}.md)", escape_markdown(chosen.about), stored])
    return f"""# Methods

{table(["method", "what it does", "stores"], rows)}

Methods that fill different slots can be joined: `--method awq+gptq` scales the channels and then runs GPTQ,
`--method gptq+lorc` adds low-rank factors to GPTQ's result. `quantforge methods` prints the same list with every
option, and `quantforge formats` the values, the cost and the error of every format.

What `--weights`, `--inputs` and `--kv` can be: [weights, inputs and caches](inputs-and-caches.md).

Where GPTQ comes from, on a layer small enough to check by hand: [OBD, OBS and OBQ](obd-obs-obq.md).

How results are measured: [tasks and perplexity](evaluation.md), [sensitivity](sensitivity.md), [what calibration
text does](calibration-study.md), [the papers' figures](papers.md).

How a quantized model is trained back to quality: [students](distillation.md).

What a checkpoint is written as, who loads it, and what computes with it: [checkpoints](checkpoints.md).
What a run takes, and how it keeps to it: [memory, disk and time](memory-and-time.md).

The pages of methods are made by `make docs` from the code and the committed reports.
"""


def method_page(name: str, reports: Mapping[str, Report]) -> str:
    """Return the page of one method."""
    chosen = recipe.load(name)
    parts = chosen.parts()
    data = "; ".join(STATISTICS[need] for need in chosen.needs)
    calib = " --calib my-text.txt" if data else ""
    sections = [
        f"# {name}",
        escape_markdown(f"{chosen.about}.") + " " + escape_markdown(f"{chosen.paper}."),
        f"```\nquantforge quantize path/to/model --method {name}{calib} --out path/to/checkpoint\n```",
        table(["", ""], _facts(chosen, data)),
    ]
    for kind, part in parts:
        sections += [f"## The {kind}: {registered(kind, type(part))}", prose(type(part))]
    rows = [
        [f"`{kind}.{f.name}`", f"`{getattr(part, f.name)}`", escape_markdown(described(type(part))[f.name])]
        for kind, part in parts
        for f in fields(part)
    ]
    if chosen.inputs is not None:
        rows += [
            [f"`inputs.{option}`", f"`{getattr(chosen.inputs, option)}`", escape_markdown(described(Inputs)[option])]
            for option in recipe.INPUT_OPTIONS
        ]
    if rows:
        sections += [
            "## Options",
            f"Each is changed by `--set`, as in `--set {rows[0][0].strip('`')}={rows[0][1].strip('`')}`.",
            table(["option", "default", "what it is"], rows),
        ]
    found = [part for folder, report in reports.items() for part in measured(name, folder, report)]
    sections += ["## Measured", *found] if found else []
    return "\n\n".join([*sections, "[All methods](../README.md)"]) + "\n"


def _facts(chosen: Recipe, data: str) -> list[list[str]]:
    laid = plan.make(_model(), chosen, torch.bfloat16)
    exporter = exporters.choose(laid)
    shape = (SIDE, SIDE)
    bits = chosen.weights.with_scale(torch.bfloat16).nbits(shape) + sum(c.nbits(shape) for c in chosen.corrections)
    more = ", and the weights kept in float on top" if chosen.solver.extends_format else ""
    beside = " The factors are a PEFT adapter beside it." if chosen.corrections else ""
    return [
        ["stores", f"`{chosen.weights.short}`: {bits / SIDE**2:.3f} bits per weight of a {SIDE} x {SIDE} layer{more}"],
        *(
            [["inputs", f"rounded when a layer is called: {escape_markdown(str(chosen.inputs))}"]]
            if chosen.inputs
            else []
        ),
        ["data", f"calibration text, for {data}" if data else "none: the weights alone"],
        ["saved as", f"{registered('exporter', type(exporter))}: {_first_line(exporter)}{beside}"],
        ["left alone", ", ".join(f"`{s}`" for s in chosen.skip)],
    ]


@cache
def _model() -> PreTrainedModel:
    return tiny.make("llama", intermediate_size=128)  # widths that every container takes


def _first_line(part: object) -> str:
    return (inspect.getdoc(type(part)) or "").partition("\n")[0]


def registered(kind: str, cls: type) -> str:
    """Return the name under which a plug-in's class is registered."""
    return next(name for name in registry.names(kind) if registry.find(kind, name) is cls)


def described(cls: type) -> dict[str, str]:
    """Return what a plug-in's docstring, or that of a class it extends, says of each of its options."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        found |= _split(owner)[1] if "__dataclass_fields__" in owner.__dict__ else {}
    return found


def prose(cls: type) -> str:
    """Return a plug-in's docstring without its options, as Markdown."""
    paragraphs = "\n".join(_split(cls)[0]).strip().split("\n\n")
    return "\n\n".join(escape_markdown(p) for p in paragraphs if p.strip())


def _split(cls: type) -> tuple[list[str], dict[str, str]]:
    """Return the lines of a class's own docstring that are prose, and its options' descriptions."""
    known = {f.name for f in fields(cls)}
    lines, options, current = [], {}, ""
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        m = re.match(r"(\w+) {2,}(\S.*)$", line)
        if m and m[1] in known:
            current, options[m[1]] = m[1], m[2]
        elif current and line.startswith(" "):
            options[current] += f" {line.strip()}"
        else:
            current = ""
            lines.append(line)
    return lines, options


def measured(name: str, folder: str, report: Report) -> list[str]:
    """Return a method's runs in the `report` of `folder`, alone, joined or for one layer; nothing if it has none."""
    runs = [run for run in report.runs if name in run.method.split("+") or run.label.endswith(f"={name}")]
    if not runs:
        return []
    base = [run for run in report.runs if run.bits is None]
    origin = report.origins[0]
    calibrated, scored = origin.calibration, origin.evaluation
    return [
        escape_markdown(
            f"{origin.model}, {scored.get('count')} windows of {scored.get('seq_len')} tokens of {scored.get('name')}; "
            f"calibrated, where it needs data, on {calibrated.get('count')} of {calibrated.get('name')}."
        )
        + f" The whole comparison: [{folder}](../../reports/{folder}/report.md).",
        table(
            ["run", "bits per weight", "perplexity", "KL", "seconds"], [_row(run) for run in [*base, *runs]], right=4
        ),
    ]


def _row(run: Run) -> list[str]:
    seconds = "" if run.bits is None else number(run.seconds, ".1f")
    figures = [number(run.bits_per_weight, ".3f"), perplexity(run.perplexity), number(run.kl, "z.4f"), seconds]
    return [escape_markdown(run.label), *figures]


def example(outputs: int = 64) -> tuple[Tensor, Problem]:
    """Return the inputs [256, 8] of a small layer, correlated, and the layer in 2 bits, one group a row; float64."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(256, 8, generator=rng, dtype=torch.float64)
    for j in range(1, 8):
        x[:, j] = 0.8 * x[:, j - 1] + 0.6 * x[:, j]
    weight = torch.randn(outputs, 8, generator=rng, dtype=torch.float64)
    return x, Problem("example", weight, parse("int2-g8-asym"), x.T @ x * (2 / len(x)))


def cost_by_least_squares(x: Tensor, w: Tensor, column: int) -> float:
    """Return the mean squared error of the output x w when one weight is gone and the others are fitted anew."""
    others = [j for j in range(len(w)) if j != column]
    target = x @ w
    refitted = torch.linalg.lstsq(x[:, others], target[:, None]).solution
    return float((target[:, None] - x[:, others] @ refitted).square().mean())


def obq_order(w: Tensor, inverse: Tensor, r: Range, problem: Problem) -> list[tuple[int, float, float]]:
    """Follow OBQ over one row `w` [in]: the column taken in each step, what it becomes, and what that costs."""
    w, inverse, scale, zero = w.clone(), inverse.clone(), float(r.scale[0, 0]), float(r.zero[0, 0])
    left, steps = list(range(len(w))), []
    for _ in range(len(w)):
        rounded = (problem.format.grid.round(w / scale + zero) - zero) * scale
        cost = obs_saliency(w - rounded, inverse)
        far = [j for j in left if abs(float(w[j] - rounded[j])) > scale / 2 * (1 + 1e-9)]
        j = max(far, key=lambda i: abs(float(w[i] - rounded[i]))) if far else min(left, key=lambda i: float(cost[i]))
        steps.append((j, float(rounded[j]), float(cost[j])))
        w = obs_update(w[None], inverse, j, rounded[j])[0]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0.0, 0.0
        left.remove(j)
    return steps


def least_loss(problem: Problem, r: Range) -> float:
    """Return the least loss that any choice of codes has under the range `r`, by trying all of them."""
    grid = torch.tensor(problem.format.grid.values, dtype=torch.float64)
    codes = torch.cartesian_prod(*[grid] * problem.weight.shape[1])
    total = 0.0
    for w, scale, zero in zip(problem.weight, r.scale[:, 0].double(), r.zero[:, 0].double(), strict=True):
        error = w - (codes - zero) * scale
        total += float(((error @ problem.hessian) * error).sum(1).min())
    return total


def inputs_page() -> str:
    """Return the page on notations of weights, of inputs and of KV caches."""
    rows = [
        ["`int8-token`", "integers of 8 bits, a scale for each token, found when the layer is called"],
        ["`int8-tensor`", "one scale for all tokens of a call"],
        ["`int8-tensor-static`", "one scale from calibration, the same for all calls"],
        ["`int8-g64`", "a scale for each group of 64 channels of a token"],
        ["`int8-token-asym`", "with a zero point"],
        ["`narrow8-token`", "integers from −127 to 127, as bitsandbytes has them"],
        ["`e4m3-token`, `e4m3-tensor`", "8-bit floats, saturating"],
        ["`e4m3-g32-e8m0`", "groups of 32 with a power of two as the scale, as MXFP8 has them"],
    ]
    caches = [
        ["`int8-token`", "8 bits, a scale for each token and head"],
        ["`int4-token-g32-asym`", "4 bits, groups of 32 channels with zero points"],
        [
            "`int4-kivi-g32-w32`",
            "keys by channel, 32 tokens sharing a scale; values by token; the latest 32 tokens and the first 4 in "
            "float (KIVI, arXiv:2402.02750)",
        ],
        ["`-wN`, `-sN`", "the latest N tokens, the first N tokens, in float"],
    ]
    return f"""# Weights, inputs and caches

`--weights FORMAT` says how weights are stored, `--inputs FORMAT` how layers round their inputs when they are called,
`--kv FORMAT` how `quantforge evaluate` stores keys and values while it decodes. A run's name says all of it:
`rtn-int8-channel-sym-x-int8-token` has 8-bit weights by channel, times 8-bit inputs by token.

## Weights

A grid, the weights that share a scale, then what is kept beside them: `int4-g64-asym`, `e4m3-channel`, `nf4-f64-dq`.
`quantforge formats` lists them with bits and errors. `gN` are groups of N along a row, `fN` blocks of N of the
flattened matrix, `bNxM` rectangles, `channel` a row, `tensor` all; `e8m0` a power of two as the scale; `dq` scales that
are quantized too, which in ZeroQuant-FP's format means that they differ by shifts.

## Inputs

{table(["notation", ""], rows)}

Text is joined and cut into full windows, so that ranges from calibration are those of text: there is no padding, and
padded token ids are refused. Layers compute in float from the rounded values; for 8-bit integers that equals sums in 32
bits to 1e-5.

## Caches

{table(["notation", ""], caches)}

```python
from quantforge.models.kvcache import KVCache, parse_kv

model.generate(ids, past_key_values=KVCache(parse_kv("int4-kivi-g32-w32"), model.config))
```

What a layer's cache holds depends on the keys and values alone. A prompt read at once sees its early tokens as codes
already, where decoding token by token still has those within the window in float; `--kv` decodes token by token.

[All methods](README.md)
"""


def lineage_page() -> str:
    """Return the page that works OBD, OBS and OBQ through on a small layer."""
    x, problem = example()
    hessian, row = problem.hessian, problem.weight[:1]
    inverse = torch.linalg.inv(hessian)
    obd, obs = obd_saliency(row, hessian)[0], obs_saliency(row, inverse)[0]
    true = [cost_by_least_squares(x, row[0], j) for j in range(8)]
    removal = [[str(j), f"{row[0, j]:.3f}", f"{obd[j]:.4f}", f"{obs[j]:.4f}", f"{true[j]:.4f}"] for j in range(8)]
    by_obd, by_obs = (sorted(range(8), key=lambda j: float(s[j])) for s in (obd, obs))
    solved = OBQ(damp_percent=0.0).solve(problem).base
    r = fit(problem.weight, problem.format)
    steps = obq_order(row[0], inverse, r, problem)
    done = sorted((j, value) for j, value, _ in steps)
    assert torch.allclose(torch.tensor([v for _, v in done]).double(), solved.dequantize(torch.float64)[0])
    order = [[str(i + 1), str(j), f"{value:.3f}", f"{cost:.4f}"] for i, (j, value, cost) in enumerate(steps)]
    error = sum(cost for *_, cost in steps)
    losses = [[what, f"{loss / 2 / len(problem.weight):.4f}"] for what, loss in _losses(problem, solved, r)]
    return f"""# OBD, OBS and OBQ on one small layer

Second-order compression goes back to one question: what does it cost to change a weight? For a row w of a linear layer
and inputs x the squared error of the output is ½ δᵀ H δ, with δ the change of w and H = (2 / N) Σ x xᵀ. It is exactly
quadratic, so that everything below can be checked. The layer has 8 inputs, each correlated with its neighbours, and
64 outputs, drawn from a fixed seed.

## Which weight may go?

Optimal brain damage (LeCun, Denker and Solla, NeurIPS 1989) keeps only the diagonal of H: removing w_j costs
½ h_jj w_j², as if no other weight could help. Optimal brain surgeon (Hassibi and Stork, NeurIPS 1992) lets the others
answer: w_j² / (2 [H⁻¹]_jj). The last column fits the other seven weights anew by least squares on the inputs, without
any of these formulas. The first output's weights:

{table(["input", "weight", "OBD", "OBS", "least squares"], removal, right=4)}

OBS is the true cost; OBD, which ignores the correlation, is {_ratio(obd, obs)} times too high. From cheapest to dearest
OBD says {_list(by_obd)}; OBS says {_list(by_obs)}.

## From removing to rounding

Optimal brain quantization (Frantar, Singh and Alistarh, NeurIPS 2022, arXiv:2208.11580) asks the same of setting a
weight to its nearest code q_j instead of zero: (w_j − q_j)² / (2 [H⁻¹]_jj). It takes the cheapest weight, lets those
still free answer, and goes on. The first output again, in 2 bits:

{table(["step", "input", "becomes", "cost"], order, right=3)}

A weight that the others have pushed beyond its range is taken at once, whatever it costs. The costs add up to the
row's error ½ δᵀ H δ, {error:.4f}; most of it falls on the later steps, when few are left to answer.

## Against rounding and GPTQ

GPTQ (ICLR 2023, arXiv:2210.17323) takes the columns of all rows in one order, so that one factorization serves all
rows, and gives up a little for it. All inputs are about equally large here, so that taking the largest diag(H) first
gains nothing. The mean over the 64 outputs of ½ δᵀ H δ, with the same ranges and no damping:

{table(["how codes are chosen", "error of an output"], losses, right=1)}

The last line tries all 4⁸ = 65 536 choices for each output; no method that runs on a real layer can.

[All methods](README.md), among them [obq](methods/obq.md) and [gptq](methods/gptq.md).
"""


def _losses(problem: Problem, obq: QTensor, r: Range) -> list[tuple[str, float]]:
    gptq = [GPTQ(damp_percent=0.0, act_order=act, range="minmax").solve(problem).base for act in (False, True)]
    results = [
        ("each weight to the nearest", RTN().solve(problem).base),
        ("GPTQ, columns in their order", gptq[0]),
        ("GPTQ, largest diag(H) first", gptq[1]),
        ("OBQ", obq),
    ]
    found = [(what, problem.loss(q.dequantize(torch.float64))) for what, q in results]
    return [*found, ("the best there is", least_loss(problem, r))]


def _ratio(high: Tensor, low: Tensor) -> str:
    ratio = high / low
    return f"{ratio.min():.1f} to {ratio.max():.1f}"


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def main() -> None:
    """Write every page, and remove those of methods that are gone."""
    found = pages(committed_reports())
    for path, text in found.items():
        (DOCS / path).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / path).write_text(text, encoding="utf-8")
    for file in itertools.chain((DOCS / "methods").glob("*.md"), DOCS.glob("*.md")):
        if file.relative_to(DOCS).as_posix() not in {*found, *HAND}:
            file.unlink()


if __name__ == "__main__":
    main()
