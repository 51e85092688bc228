"""The claims of the weight methods, row by row, from a report of `quantforge compare`: passed, or the honest number.

    python tools/claims.py reports/all-weights/report.json > reports/all-weights/claims.md

A claim whose runs the report lacks is left out, and named at the end.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantforge import record
from quantforge.record import Report, Run

Runs = dict[str, Run]


@dataclass(frozen=True)
class Claim:
    """What a method is to show: a sentence, and what decides it.

    check  runs by label → (passed, or None where there is nothing to pass; the numbers in words); KeyError where the
           report lacks a run
    """

    method: str
    says: str
    check: Callable[[Runs], tuple[bool | None, str]]


def below(better: str, worse: str, slack: float = 1.0) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that the run `better` has a lower perplexity than `worse`, times `slack`."""

    def check(runs: Runs) -> tuple[bool, str]:
        a, b = runs[better].perplexity, runs[worse].perplexity
        return a < b * slack, f"{a:.3f} ({better}) against {b:.3f} ({worse})"

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


def at_most(label: str, times: float, of: str, less: str | None = None) -> Callable[[Runs], tuple[bool, str]]:
    """Claim that a run took at most `times` the seconds of the run `of`, those of `less` taken off first."""

    def check(runs: Runs) -> tuple[bool, str]:
        seconds = runs[label].seconds - (runs[less].seconds if less else 0.0)
        ratio = seconds / runs[of].seconds
        return ratio <= times, f"{ratio:.2f} x ({seconds:.1f} s of {runs[of].seconds:.1f} s)"

    return check


G3, G4 = "int3-g64-asym", "int4-g64-asym"
CLAIMS = (
    Claim("nf4", "perplexity 37.597 on the standard setting", near("nf4-nf4-f64-dq", 37.597, 0.0005)),
    Claim("nf4", "beats 4-bit absmax rounding at equal bits", below("nf4-nf4-f64-dq", "rtn-int4-f64-sym-dq")),
    Claim("awq", "3 bits: better than RTN with the same range rule", below(f"awq-{G3}", f"rtn-{G3} range=hessian")),
    Claim("awq", "3 bits: better than RTN", below(f"awq-{G3}", f"rtn-{G3}")),
    Claim("awq", "3 bits: AWQ then GPTQ beside either alone", beside(f"awq+gptq-{G3}", f"awq-{G3}", f"gptq-{G3}")),
    Claim("awq", "4 bits: better than RTN with the same range rule", below(f"awq-{G4}", f"rtn-{G4} range=hessian")),
    Claim("gptaq", "not worse than GPTQ at 3 bits", below(f"gptaq-{G3}", f"gptq-{G3}", 1.0 + 1e-9)),
    Claim(
        "spqr",
        "3-bit base at about 3.9 bits: below GPTQ at the same bits",
        interpolated("spqr-int3-g16-asym-dq", "gptq-int3-g32-asym", "gptq-int3-g16-asym"),
    ),
    Claim("lorc", "RTN at 3 bits improves at rank 8", below(f"rtn+lorc-{G3} rank=8", f"rtn-{G3}")),
    Claim("lorc", "and more at rank 32", below(f"rtn+lorc-{G3} rank=32", f"rtn+lorc-{G3} rank=8")),
    Claim("lorc", "GPTQ at 3 bits improves at rank 8", below(f"gptq+lorc-{G3} rank=8", f"gptq-{G3}")),
    Claim("lorc", "and more at rank 32", below(f"gptq+lorc-{G3} rank=32", f"gptq+lorc-{G3} rank=8")),
    Claim(
        "lorc",
        "whitened at least as good as plain, rank 32",
        below(f"gptq+lorc-{G3} rank=32", f"gptq+lorc-{G3} rank=32 whiten=False", 1.0 + 1e-9),
    ),
    Claim("hqq", "better than RTN at 3 bits", below(f"hqq-{G3}", f"rtn-{G3}")),
    Claim(
        "spare",
        "columns picked by activation beat those picked by weight",
        below(f"spare-{G3} pick=activation", f"spare-{G3} pick=weight"),
    ),
    Claim("spare", "and those picked at random", below(f"spare-{G3} pick=activation", f"spare-{G3} pick=random")),
    Claim("awq", "at most 2.5 x the time of GPTQ", at_most(f"awq-{G3}", 2.5, f"gptq-{G3}")),
    Claim("spqr", "at most 2.5 x the time of GPTQ", at_most("spqr-int3-g16-asym-dq", 2.5, f"gptq-{G3}")),
    Claim(
        "lorc",
        "adds at most 1 x the time of GPTQ",
        at_most(f"gptq+lorc-{G3} rank=8", 1.0, f"gptq-{G3}", less=f"gptq-{G3}"),
    ),
    Claim("nf4", "at most 0.4 x the time of GPTQ", at_most("nf4-nf4-f64-dq", 0.4, f"gptq-{G3}")),
    Claim("hqq", "at most 0.4 x the time of GPTQ", at_most(f"hqq-{G3}", 0.4, f"gptq-{G3}")),
)


VERDICTS = {True: "pass", False: "**not met**", None: "reported"}


def table(report: Report) -> str:
    """Return a row a claim as Markdown, with what was measured."""
    runs = {run.label: run for run in report.runs}
    lines = ["| method | claim | measured | |", "| --- | --- | --- | --- |"]
    missing = []
    for claim in CLAIMS:
        try:
            passed, numbers = claim.check(runs)
        except KeyError as error:
            missing.append(f"{claim.method}: {claim.says} (no run {error.args[0]!r})")
            continue
        lines.append(f"| {claim.method} | {claim.says} | {numbers} | {VERDICTS[passed]} |")
    lines += ["", "Not in this report: " + "; ".join(missing) + "."] if missing else []
    return "\n".join(lines)


def page(report: Report) -> str:
    """Return the claims with where they come from."""
    return (
        f"# Claims of the weight methods\n\n{report.model}; perplexities and seconds of [the report](report.md), made "
        f"by `{report.command}`.\n\n"
        f"{table(report)}\n"
    )


if __name__ == "__main__":
    print(page(record.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
