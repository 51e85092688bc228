"""The claims of the methods, row by row, from the committed reports: passed, or the honest number.

    python tools/claims.py

writes `claims.md` beside each report that has claims. What is exact is shown by a test, which the row names; speed
comes from `make bench`. A claim on a method of the report, but on runs that it lacks, is named at the end.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge import record
from quantforge.models import demo
from quantforge.record import Report, Run
from quantforge.report import number

Runs = dict[str, Run]
REPORTS = Path(__file__).parent.parent / "reports"
CLAIMED = ("all-weights", "small-llama", "all-activations")


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


def shown(value: float) -> str:
    """Format a perplexity with at least four digits that count."""
    return f"{value:.4f}" if value < 10 else f"{value:.3f}"


def below(better: str, worse: str, slack: float = 1.0) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that the run `better` has a lower perplexity than `worse`, times `slack`."""

    def check(runs: Runs) -> tuple[bool, str]:
        a, b = runs[better].perplexity, runs[worse].perplexity
        kl = f"KL {number(runs[better].kl, '.4f')} against {number(runs[worse].kl, '.4f')}"
        return a < b * slack, f"{shown(a)} ({better}) against {shown(b)} ({worse}); {kl}"

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
        return None, ", ".join(f"{shown(runs[label].perplexity)} ({label})" for label in labels)

    return check


def told(*labels: str) -> Callable[[Runs], tuple[bool | None, str]]:
    """Report what the notes of several runs say."""

    def check(runs: Runs) -> tuple[bool | None, str]:
        return None, "; ".join(f"{label}: {', '.join(runs[label].notes)}" for label in labels)

    return check


def interpolated(label: str, coarse: str, fine: str) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that `label` lies below the line between two other runs at its own bits per weight."""

    def check(runs: Runs) -> tuple[bool, str]:
        run, a, b = runs[label], runs[coarse], runs[fine]
        share = (run.bits_per_weight - a.bits_per_weight) / (b.bits_per_weight - a.bits_per_weight)
        if not 0 <= share <= 1:
            return False, f"{run.bits_per_weight:.3f} bits do not lie between {coarse} and {fine}"
        line = a.perplexity + share * (b.perplexity - a.perplexity)
        numbers = f"{shown(run.perplexity)} at {run.bits_per_weight:.3f} bits against {shown(line)}"
        return run.perplexity < line, f"{numbers} between {coarse} and {fine}"

    return check


def near(label: str, value: float, share: float) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that a run's perplexity is `value` to within a share of it."""

    def check(runs: Runs) -> tuple[bool, str]:
        found = runs[label].perplexity
        return abs(found / value - 1) <= share, f"{found:.3f} against {value}, to within {share:.2%}"

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
        Claim(
            "awq",
            "nearer than RTN by KL, both with Hessian ranges",
            nearer(f"awq-{g}", f"rtn-{g} range=hessian"),
        ),
        Claim("awq", "better than RTN", below(f"awq-{g}", f"rtn-{g}")),
        Claim("awq", "AWQ then GPTQ beside either alone", beside(f"awq+gptq-{g}", f"awq-{g}", f"gptq-{g}")),
        Claim("gptq", "better than RTN with the best range rule", below(f"gptq-{g}", f"rtn-{g} range=hessian")),
        Claim("gptaq", "not worse than GPTQ", below(f"gptaq-{g}", f"gptq-{g}", 1.0 + 1e-9)),
        Claim("lwc", "trained ranges are better than min-max", below(f"lwc-{g}", f"rtn-{g}")),
        Claim("lorc", "RTN improves at rank 8", below(f"rtn+lorc-{g} rank=8", f"rtn-{g}")),
        Claim(
            "lorc",
            "RTN gains more at rank 32",
            below(f"rtn+lorc-{g} rank=32", f"rtn+lorc-{g} rank=8"),
        ),
        Claim("lorc", "GPTQ improves at rank 8", below(f"gptq+lorc-{g} rank=8", f"gptq-{g}")),
        Claim(
            "lorc",
            "GPTQ gains more at rank 32",
            below(f"gptq+lorc-{g} rank=32", f"gptq+lorc-{g} rank=8"),
        ),
        Claim(
            "lorc",
            "whitened at least as good as plain, rank 32",
            below(f"gptq+lorc-{g} rank=32", f"gptq+lorc-{g} rank=32 whiten=False", 1.0 + 1e-9),
        ),
        Claim("hqq", "better than RTN", below(f"hqq-{g}-zero", f"rtn-{g}")),
        Claim("hqq", "better than RTN in the same format", below(f"hqq-{g}-zero", f"rtn-{g}-zero")),
        Claim(
            "hqq",
            "better than RTN, both in blocks of 64 rows",
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
    Claim("nf4", "beats E2M1 at equal bits", below("nf4-nf4-f64-dq", "e2m1-e2m1-f64-dq")),
    Claim("nf4", "beats bitsandbytes' FP4 at equal bits", below("nf4-nf4-f64-dq", "fp4-fp4-f64-dq")),
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
        "within 0.5 % of the float perplexity, features found anew in every input",
        within("llm-int8-narrow8-channel-sym-x-narrow8-token dynamic=True", 0.005),
    ),
    Claim(
        "llm-int8",
        "within 0.5 % of the float perplexity, threshold 3",
        within("llm-int8-narrow8-channel-sym-x-narrow8-token threshold=3.0", 0.005),
    ),
    Claim(
        "smoothquant",
        "by channel and token, alpha searched, folded up to down too: within 1 % of the float perplexity",
        within("smoothquant-int8-channel-sym-x-int8-token search=True down=True", 0.01),
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
            f"{level}, alpha searched: better than without",
            below(f"smoothquant-int8-tensor-sym-x-{inputs} search=True", f"rtn-int8-tensor-sym-x-{inputs}"),
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
        "distillation lowers W4A8 perplexity, on the student's own inputs",
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
        "M2 costs at most a quarter of what free scales lose",
        costs("zeroquant-fp-e2m1-g64-dq-x-e4m3-token", "gptq-e2m1-g64-x-e4m3-token range=mse", 0.25),
    ),
    Claim("kv", "bytes of the cache, measured", told("kv:int8-token", "kv:int4-kivi-g32-w32")),
    Claim("kv", "int8 by token within 0.5 % of the float perplexity", within("kv:int8-token", 0.005)),
    Claim(
        "kv",
        "4-bit keys by channel better than by token",
        below("kv:int4-kivi-g32-w32", "kv:int4-token-g32-w32-s4-asym"),
    ),
]
# what is exact, and the test that shows it: method, claim, file, test
TESTED = [
    (
        "nf4",
        "regenerated from the normal quantile function, equal to the published table",
        "tests/numerics/test_grids.py",
        "test_nf4_is_the_published_table_to_the_last_bit",
    ),
    (
        "nf4",
        "4-bit codes, and scales that are not quantized themselves, are bitsandbytes' on a CPU",
        "tests/exporters/test_bitsandbytes.py",
        "test_codes_and_scales_are_the_librarys_to_the_bit",
    ),
    (
        "nf4",
        "8-bit codes of scales are the nearest; under 1 % differ from bitsandbytes' on a CPU, whose table misses them",
        "tests/exporters/test_bitsandbytes.py",
        "test_codes_of_scales_are_the_nearest_which_the_librarys_table_for_cpus_misses_at_times",
    ),
    (
        "nf4",
        "stock transformers loads the checkpoint and computes the same",
        "tests/exporters/test_bitsandbytes.py",
        "test_stock_transformers_loads_a_quantized_folder_and_computes_the_same",
    ),
    (
        "quantile",
        "codes lie midway between empirical quantiles, for any k",
        "tests/numerics/test_grids.py",
        "test_quantile_codes_lie_midway_between_quantiles_and_one_of_them_is_zero",
    ),
    (
        "obq",
        "in the order of the columns it is GPTQ",
        "tests/methods/test_obq.py",
        "test_in_the_order_of_the_columns_it_is_gptq",
    ),
    (
        "spqr",
        "without outliers it is GPTQ with the same ranges",
        "tests/methods/test_spqr.py",
        "test_without_outliers_it_is_gptq_with_the_same_ranges",
    ),
    (
        "llm-int8",
        "with a threshold of infinity it is plain vector-wise rounding",
        "tests/numerics/test_inputs.py",
        "test_a_threshold_of_infinity_is_plain_rounding",
    ),
    (
        "llm-int8",
        "8-bit codes and row statistics are bitsandbytes'",
        "tests/numerics/test_inputs.py",
        "test_codes_and_row_statistics_are_those_of_bitsandbytes",
    ),
    (
        "llm-int8",
        "a layer computes what integers summed in 32 bits and the float features give",
        "tests/test_rounded_inputs.py",
        "test_a_layer_computes_what_integers_summed_in_32_bits_and_float_features_give",
    ),
    (
        "smoothquant",
        "in float the smoothed model computes what it did, to 1e-5, on every architecture",
        "tests/methods/test_smoothquant.py",
        "test_in_float_the_smoothed_model_computes_what_it_did",
    ),
    (
        "smoothquant",
        "a model whose norms come after the residual is refused",
        "tests/test_rounded_inputs.py",
        "test_a_model_whose_norms_come_after_the_residual_is_refused",
    ),
    (
        "kv",
        "what the cache holds does not depend on how the stream is cut",
        "tests/models/test_kvcache.py",
        "test_what_is_held_does_not_depend_on_how_the_stream_is_cut",
    ),
    (
        "kv",
        "noise in any part of the cache changes the result",
        "tests/models/test_kvcache.py",
        "test_noise_in_any_part_of_the_cache_changes_the_logits",
    ),
    (
        "zeroquant-fp",
        "FP4 times 2^-k is FP8 exactly over the whole window",
        "tests/numerics/test_grids.py",
        "test_four_bit_floats_times_a_power_of_two_are_eight_bit_floats",
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
    """Return a row a claim as Markdown, with what was measured; and the claims that lack runs of their methods."""
    runs, made = {run.label: run for run in report.runs}, methods(report)
    found, missing = [], []
    widths = [(bits, claim) for bits in (4, 3) for claim in claims(bits)]
    for bits, claim in [*widths, *((None, claim) for claim in (*ONCE, *ACTIVATIONS))]:
        if claim.model not in (None, report.origins[0].model):
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


def methods(report: Report) -> set[str]:
    """Return the methods that a report has runs of, also those used for some of the layers."""
    parts = {part for run in report.runs for part in run.method.partition(":")[0].split("+")}
    return parts | {run.label.rpartition("=")[2] for run in report.runs}


def exact_rows(report: Report) -> list[str]:
    """Return a row for each claim that a test shows."""
    link = "[{test}](../../{file})"
    return [
        f"| {method} | {says} | {link.format(test=test, file=file)} | test |"
        for method, says, file, test in TESTED
        if method in methods(report)
    ]


def range_rows(page: Path) -> list[str]:
    """Return a row for each of the two verdicts of the table of ranges."""
    found = re.findall(r"Each finer granularity is better: (.+?)\.$", page.read_text(encoding="utf-8"), re.M)
    whats, says = (
        ("error of 8-bit weights", "perplexity in 4 bits"),
        "each finer granularity is better under every rule",
    )
    return [
        f"| rtn, lwc | {what}: {says} | [ranges](../ranges.md) | {said} |"
        for what, said in zip(whats, found, strict=True)
    ]


def speed_rows(report: Report, benchmarks: list[dict[str, Any]]) -> list[str]:
    """Return a row a claim on the speed of the report's methods, from the record of `make bench`."""
    ratios = {b["params"]["method"]: b["extra_info"] for b in benchmarks if "ratio" in b["extra_info"]}
    found = []
    for method, (says, most, own) in SPEED.items():
        if method in ratios and method.rpartition("+")[2] in methods(report):
            info = ratios[method]
            ratio = info["ratio"] - own
            numbers = f"{ratio:.2f} x ({info['seconds']:.1f} s beside {info['gptq_seconds']:.1f} s)"
            found.append(f"| {method} | {says} | {numbers} | {VERDICTS[ratio <= most]} |")
    times = [b["extra_info"]["times_float"] for b in benchmarks if "times_float" in b["extra_info"]]
    if times and "smoothquant" in methods(report):
        found.append(
            f"| W8A8 | evaluation at most 3 x the float model's | {times[0]:.2f} x | {VERDICTS[times[0] <= 3]} |"
        )
    return found


def page(report: Report, benchmarks: list[dict[str, Any]], ranges: Path | None = None) -> str:
    """Return the claims with where they come from; those on speed and ranges of the demo model only."""
    found, missing = rows(report)
    model, command = report.origins[0].model, report.origins[0].command
    own = model == demo.NAME
    source = f"{model}; perplexities and losses of [the report](report.md), made by `{command}`."
    if own:
        source += " Speed by `make bench`, beside one run of GPTQ in the same process."
    source += " A claim passes by perplexity, unless it speaks of KL: the mean divergence from the float model."
    lines = ["# Claims", "", source, "", "| method | claim | measured | |", "| --- | --- | --- | --- |", *found]
    if own:
        lines += exact_rows(report)
        lines += range_rows(ranges) if ranges is not None and "lwc" in methods(report) else []
        lines += speed_rows(report, benchmarks)
    if missing:
        where = "; most claims at 4 bits are in [those of the small Llama](../small-llama/claims.md)" if own else ""
        lines += ["", f"Not in this report{where}:", "", *(f"- {claim}" for claim in missing)]
    return "\n".join(lines) + "\n"


def pages(root: Path = REPORTS) -> dict[Path, str]:
    """Return every page of claims by its file, as the reports below `root` have it now."""
    raw = (root / "raw" / name for name in ("beside.json", "beside-activations.json"))
    timed = [b for file in raw for b in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]]
    files = {name: root / name / "report.json" for name in CLAIMED}
    made = {n: record.from_json(f.read_text(encoding="utf-8")) for n, f in files.items() if f.exists()}
    return {root / name / "claims.md": page(report, timed, root / "ranges.md") for name, report in made.items()}


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
