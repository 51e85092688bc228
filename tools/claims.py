"""The claims of the methods, row by row, from a report of `quantforge compare`: passed, or the honest number.

    python tools/claims.py reports/all-weights/report.json reports/raw/beside.json > reports/all-weights/claims.md

A claim on a method of the report, but on runs that it lacks, is named at the end. The claims on speed come from
`make bench`, the second file, which may be left out.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge import record
from quantforge.models import demo
from quantforge.record import Report, Run
from quantforge.report import number

Runs = dict[str, Run]


@dataclass(frozen=True)
class Claim:
    """What a method is to show: a sentence, and what decides it.

    check  runs by label → (passed, or None where there is nothing to pass; the numbers in words); KeyError where the
           report lacks a run
    model  the only model that it speaks of; None: any
    """

    method: str
    says: str
    check: Callable[[Runs], tuple[bool | None, str]]
    model: str | None = None


def below(better: str, worse: str, slack: float = 1.0) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that the run `better` has a lower perplexity than `worse`, times `slack`."""

    def check(runs: Runs) -> tuple[bool, str]:
        a, b = runs[better].perplexity, runs[worse].perplexity
        kl = f"KL {number(runs[better].kl, '.4f')} against {number(runs[worse].kl, '.4f')}"
        return a < b * slack, f"{a:.3f} ({better}) against {b:.3f} ({worse}); {kl}"

    return check


def nearer(better: str, worse: str) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that the run `better` has a lower divergence from the float model than `worse`."""

    def check(runs: Runs) -> tuple[bool, str]:
        a, b = runs[better].kl, runs[worse].kl
        return a < b, f"{a:.4f} ({better}) against {b:.4f} ({worse})"

    return check


def beside(*labels: str) -> Callable[[Runs], tuple[bool | None, str]]:
    """Report the perplexities of several runs beside one another."""

    def check(runs: Runs) -> tuple[bool | None, str]:
        return None, ", ".join(f"{runs[label].perplexity:.3f} ({label})" for label in labels)

    return check


def interpolated(label: str, coarse: str, fine: str) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that `label` lies below the line between two other runs at its own bits per weight."""

    def check(runs: Runs) -> tuple[bool, str]:
        run, a, b = runs[label], runs[coarse], runs[fine]
        share = (run.bits_per_weight - a.bits_per_weight) / (b.bits_per_weight - a.bits_per_weight)
        if not 0 <= share <= 1:
            return False, f"{run.bits_per_weight:.3f} bits do not lie between {coarse} and {fine}"
        line = a.perplexity + share * (b.perplexity - a.perplexity)
        numbers = f"{run.perplexity:.3f} at {run.bits_per_weight:.3f} bits against {line:.3f}"
        return run.perplexity < line, f"{numbers} between {coarse} and {fine}"

    return check


def near(label: str, value: float, share: float) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that a run's perplexity is `value` to within a share of it."""

    def check(runs: Runs) -> tuple[bool, str]:
        found = runs[label].perplexity
        return abs(found / value - 1) <= share, f"{found:.3f} against {value}"

    return check


def within(label: str, share: float) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that a run's perplexity is above the float model's by at most a share of it."""

    def check(runs: Runs) -> tuple[bool, str]:
        found, level = runs[label].perplexity, runs["fp"].perplexity
        return found <= level * (1 + share), f"{found:.3f} against {level:.3f} ({found / level - 1:+.2%})"

    return check


def under(label: str, value: float) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that a run's perplexity lies below `value`."""

    def check(runs: Runs) -> tuple[bool, str]:
        return runs[label].perplexity < value, f"{runs[label].perplexity:.3f}"

    return check


def costs(label: str, free: str, share: float) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that what `label` loses beyond the run `free` is at most a share of what that loses to the float model."""

    def check(runs: Runs) -> tuple[bool, str]:
        more = runs[label].perplexity - runs[free].perplexity
        lost = runs[free].perplexity - runs["fp"].perplexity
        return lost > 0 and more <= share * lost, f"{more:+.3f} beyond {lost:+.3f}"

    return check


def loses_less(better: str, worse: str, layer: str) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that one layer loses less of its output in the run `better` than in `worse`."""

    def check(runs: Runs) -> tuple[bool, str]:
        a, b = (next(row for row in runs[name].layers if row.name == layer) for name in (better, worse))
        return a.relative_loss < b.relative_loss, f"{a.relative_loss:.3e} against {b.relative_loss:.3e} in {layer}"

    return check


def claims(bits: int) -> list[Claim]:
    """Return the claims on perplexity at one width, groups of 64."""
    g = f"int{bits}-g64-asym"
    return [
        Claim("awq", "better than RTN, both with min-max ranges", below(f"awq-{g} range=minmax", f"rtn-{g}")),
        Claim("awq", "better than RTN, both with Hessian ranges", below(f"awq-{g}", f"rtn-{g} range=hessian")),
        Claim("awq", "and nearer to the float model by KL", nearer(f"awq-{g}", f"rtn-{g} range=hessian")),
        Claim("awq", "better than RTN", below(f"awq-{g}", f"rtn-{g}")),
        Claim("awq", "AWQ then GPTQ beside either alone", beside(f"awq+gptq-{g}", f"awq-{g}", f"gptq-{g}")),
        Claim("gptq", "better than RTN with the best range rule", below(f"gptq-{g}", f"rtn-{g} range=hessian")),
        Claim("gptaq", "not worse than GPTQ", below(f"gptaq-{g}", f"gptq-{g}", 1.0 + 1e-9)),
        Claim("lwc", "trained ranges are better than min-max", below(f"lwc-{g}", f"rtn-{g}")),
        Claim("lorc", "RTN improves at rank 8", below(f"rtn+lorc-{g} rank=8", f"rtn-{g}")),
        Claim("lorc", "and more at rank 32", below(f"rtn+lorc-{g} rank=32", f"rtn+lorc-{g} rank=8")),
        Claim("lorc", "GPTQ improves at rank 8", below(f"gptq+lorc-{g} rank=8", f"gptq-{g}")),
        Claim("lorc", "and more at rank 32", below(f"gptq+lorc-{g} rank=32", f"gptq+lorc-{g} rank=8")),
        Claim(
            "lorc",
            "whitened at least as good as plain, rank 32",
            below(f"gptq+lorc-{g} rank=32", f"gptq+lorc-{g} rank=32 whiten=False", 1.0 + 1e-9),
        ),
        Claim("hqq", "better than RTN", below(f"hqq-{g}-zero", f"rtn-{g}")),
        Claim("hqq", "better than RTN in the same format", below(f"hqq-{g}-zero", f"rtn-{g}-zero")),
        Claim(
            "hqq",
            "the same in blocks of 64 rows",
            below(f"hqq-int{bits}-b64x1-asym-zero", f"rtn-int{bits}-b64x1-asym-zero"),
        ),
        *(
            Claim(
                "spare",
                f"1 % of channels picked by activation beat those picked {by}",
                below(f"spare-{g} pick=activation", f"spare-{g} pick={pick}"),
            )
            for pick, by in (("weight", "by weight"), ("random", "at random"))
        ),
        Claim(
            "obq",
            "loses less than GPTQ in the layer it is used for",
            loses_less(f"gptq-{g} {SMALL_LAYER}=obq", f"gptq-{g}", SMALL_LAYER),
        ),
    ]


SMALL_LAYER = "model.layers.0.self_attn.k_proj"
ONCE = [  # at widths of their own
    Claim("nf4", "perplexity 37.597 on the standard setting", near("nf4-nf4-f64-dq", 37.597, 0.0005), demo.NAME),
    Claim("nf4", "beats 4-bit absmax rounding at equal bits", below("nf4-nf4-f64-dq", "rtn-int4-f64-sym-dq")),
    Claim("nf4", "beats both 4-bit floats at equal bits, E2M1", below("nf4-nf4-f64-dq", "e2m1-e2m1-f64-dq")),
    Claim("nf4", "and bitsandbytes' own", below("nf4-nf4-f64-dq", "fp4-fp4-f64-dq")),
    Claim(
        "spqr",
        "3-bit base at about 3.9 bits: below GPTQ at the same bits",
        interpolated("spqr-int3-g16-asym-dq", "gptq-int3-g32-asym", "gptq-int3-g16-asym"),
    ),
]
W8, W4 = "int8-channel-sym", "int4-g64-sym"
ACTIVATIONS = [
    Claim(
        "llm-int8",
        "within 0.5 % of the float perplexity",
        within("llm-int8-narrow8-channel-sym-x-narrow8-token", 0.005),
    ),
    Claim(
        "llm-int8",
        "and so with features found anew in every input",
        within("llm-int8-narrow8-channel-sym-x-narrow8-token dynamic=True", 0.005),
    ),
    Claim(
        "smoothquant",
        "by channel and token: below 29.25",
        under(f"smoothquant-{W8}-x-int8-token", 29.25),
        demo.NAME,
    ),
    Claim(
        "smoothquant",
        "with GPTQ, by channel and token: below 29.25",
        under(f"smoothquant+gptq-{W8}-x-int8-token", 29.25),
        demo.NAME,
    ),
    Claim(
        "smoothquant",
        "by channel and token: better than without",
        below(f"smoothquant-{W8}-x-int8-token", f"rtn-{W8}-x-int8-token"),
    ),
    *(
        Claim(
            "smoothquant",
            f"{level}: better than without",
            below(f"smoothquant-int8-tensor-sym-x-{inputs}", f"rtn-int8-tensor-sym-x-{inputs}"),
        )
        for level, inputs in (("O1", "int8-token"), ("O2", "int8-tensor"), ("O3", "int8-tensor-static"))
    ),
    Claim(
        "zeroquant",
        "distillation lowers W4A8 perplexity, forced by the teacher",
        below(f"zeroquant-{W4}-x-int8-token", f"rtn-{W4}-x-int8-token"),
    ),
    Claim(
        "zeroquant",
        "and on the student's own inputs",
        below(f"zeroquant-{W4}-x-int8-token teacher=False", f"rtn-{W4}-x-int8-token"),
    ),
    *(
        Claim(
            "zeroquant-fp",
            f"FP8 inputs lose less than INT8 ones by {where}",
            below(f"rtn-{W8}-x-e4m3-{where}", f"rtn-{W8}-x-int8-{where}"),
        )
        for where in ("token", "tensor")
    ),
    Claim(
        "zeroquant-fp",
        "M1 costs at most a quarter of what free scales lose",
        costs("gptq-e2m1-g64-e8m0-x-e4m3-token range=mse", "gptq-e2m1-g64-x-e4m3-token range=mse", 0.25),
    ),
    Claim(
        "zeroquant-fp",
        "and so does M2",
        costs("zeroquant-fp-e2m1-g64-dq-x-e4m3-token", "gptq-e2m1-g64-x-e4m3-token range=mse", 0.25),
    ),
    Claim("kv", "int8 by token within 0.5 % of the float perplexity", within("kv:int8-token", 0.005)),
    Claim(
        "kv",
        "4-bit keys by channel better than by token",
        below("kv:int4-kivi-g32-w32", "kv:int4-token-g32-w32-s4-asym"),
    ),
]
# method: what it may take, in multiples of GPTQ, and whether GPTQ's own seconds are part of what is timed
SPEED = {
    "awq": ("at most 2.5 x the time of GPTQ", 2.5, 0),
    "spqr": ("at most 2.5 x the time of GPTQ", 2.5, 0),
    "gptq+lorc": ("adds at most 1 x the time of GPTQ", 1.0, 1),
    "nf4": ("at most 0.4 x the time of GPTQ", 0.4, 0),
    "hqq": ("at most 0.4 x the time of GPTQ", 0.4, 0),
    "smoothquant": ("at most 0.5 x the time of GPTQ", 0.5, 0),
    "llm-int8": ("at most 0.5 x the time of GPTQ", 0.5, 0),
    "zeroquant": ("100 steps a block: at most 6 x the time of GPTQ", 6.0, 0),
}


VERDICTS = {True: "pass", False: "**not met**", None: "reported"}


def rows(report: Report) -> tuple[list[str], list[str]]:
    """Return a row a claim as Markdown, with what was measured; and the claims on its methods that it lacks
    runs for."""
    runs = {run.label: run for run in report.runs}
    made = {part for run in report.runs for part in run.method.partition(":")[0].split("+")}
    found, missing = [], []
    widths = [(bits, claim) for bits in (4, 3) for claim in claims(bits)]
    for bits, claim in [*widths, *((None, claim) for claim in (*ONCE, *ACTIVATIONS))]:
        if claim.model not in (None, report.model):
            continue
        says = f"{bits} bits: {claim.says}" if bits else claim.says
        try:
            passed, numbers = claim.check(runs)
        except KeyError as error:
            if claim.method in made:
                missing.append(f"{claim.method}, {says} (no run {error.args[0]!r})")
            continue
        found.append(f"| {claim.method} | {says} | {numbers} | {VERDICTS[passed]} |")
    return found, missing


def speed_rows(benchmarks: list[dict[str, Any]]) -> list[str]:
    """Return a row a claim on speed, from the record of `make bench`."""
    ratios = {b["params"]["method"]: b["extra_info"] for b in benchmarks if "ratio" in b["extra_info"]}
    found = []
    for method, (says, most, own) in SPEED.items():
        if method in ratios:
            info = ratios[method]
            ratio = info["ratio"] - own
            numbers = f"{ratio:.2f} x ({info['seconds']:.1f} s beside {info['gptq_seconds']:.1f} s)"
            found.append(f"| {method} | {says} | {numbers} | {VERDICTS[ratio <= most]} |")
    for b in benchmarks:
        times = b["extra_info"].get("times_float")
        if times is not None:
            found.append(
                f"| W8A8 | evaluation at most 3 x the float model's | {times:.2f} x | {VERDICTS[times <= 3]} |"
            )
    return found


def page(report: Report, benchmarks: list[dict[str, Any]]) -> str:
    """Return the claims with where they come from."""
    found, missing = rows(report)
    speed = speed_rows(benchmarks)
    source = f"{report.model}; perplexities and losses of [the report](report.md), made by `{report.command}`"
    source += "; speed by `make bench` on the demo model." if speed else "."
    source += " A claim passes by perplexity, unless it speaks of KL: the mean divergence from the float model."
    lines = [
        "# Claims",
        "",
        source,
        "",
        "| method | claim | measured | |",
        "| --- | --- | --- | --- |",
    ]
    lines += [*found, *speed]
    if missing:
        lines += ["", "Not in this report:", "", *(f"- {claim}" for claim in missing)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    made = record.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    timed = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["benchmarks"] if len(sys.argv) > 2 else []
    print(page(made, timed), end="")
