"""Which runs of a report belong together: their names, what each was measured on, and what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from quantforge.record import Origin, Report, Run

FLOAT = "fp"  # the method of the float model, whatever its dtype
CACHE = "kv:"  # leads the methods that only store the cache in few bits
DIGITS = 6  # of a fingerprint, after the name of a model that shares it with another

Setting = tuple[str, str]
"""A model and the digest of its evaluation tokens: runs that share both can be compared window by window."""


@dataclass(frozen=True)
class Name:
    """What a run is called: its label, and where labels of several origins meet, whose it is."""

    label: str
    where: str = ""

    @property
    def text(self) -> str:
        """Return both in one line."""
        return f"{self.label} · {self.where}" if self.where else self.label


def model_name(report: Report, place: int) -> str:
    """Return what the model of the origin at `place` is called: its name, and where other fingerprints have the same
    name the first digits of its own, as many as tell them apart."""
    own = report.origins[place]
    same = {other.fingerprint for other in report.origins if other.model == own.model and other.fingerprint}
    if len(same) < 2 or not own.fingerprint:
        return own.model
    digits = DIGITS
    while len({fingerprint[:digits] for fingerprint in same}) < len(same):
        digits += 1
    return f"{own.model} ({own.fingerprint[:digits]})"


def models(report: Report) -> list[str]:
    """Return the models that there are runs of, in order of appearance; without runs, those of the origins."""
    used = [run.origin for run in report.runs] or range(len(report.origins))
    return list(dict.fromkeys(model_name(report, place) for place in used))


def names(report: Report) -> list[Name]:
    """Return the name of every run: the label; with several models the model too; the machine, the date or the
    number of the comparison where that does not tell two runs apart."""
    several = len(models(report)) > 1
    found = [Name(run.label, model_name(report, run.origin) if several else "") for run in report.runs]
    tellers: tuple[Callable[[Origin], str], ...] = (_machine, lambda origin: origin.created)
    for tell in tellers:
        found = _told_apart(found, [tell(report.origins[run.origin]) for run in report.runs])
    return _told_apart(found, [f"comparison {run.origin + 1}" for run in report.runs])


def _told_apart(found: list[Name], facts: list[str]) -> list[Name]:
    """Add its fact to each name that several runs have, where these facts differ."""
    groups: dict[Name, set[str]] = {}
    for name, fact in zip(found, facts, strict=True):
        groups.setdefault(name, set()).add(fact)
    return [
        replace(name, where=", ".join(filter(None, (name.where, fact)))) if len(groups[name]) > 1 else name
        for name, fact in zip(found, facts, strict=True)
    ]


def _machine(origin: Origin) -> str:
    return str(origin.machine.get("accelerator") or origin.machine.get("processor") or "")


def setting(report: Report, run: Run) -> Setting:
    """Return a run's model and evaluation tokens; tokens of unknown digest are only those of their own origin."""
    digest = report.origins[run.origin].evaluation.get("ids_sha256")
    return model_name(report, run.origin), digest if isinstance(digest, str) else f"origin {run.origin}"


def settings(report: Report) -> list[Setting]:
    """Return every setting that has runs, in order of appearance."""
    return list(dict.fromkeys(setting(report, run) for run in report.runs))


def is_floor(run: Run) -> bool:
    """Tell whether a run is the float model in another dtype, which shows what rounding alone changes."""
    return run.bits is None and run.method == FLOAT and run.label != FLOAT and not failed(run)


def is_float(run: Run) -> bool:
    """Tell whether a run is the float model itself: no other dtype, no cache that is quantized, nothing that failed."""
    return run.bits is None and not is_floor(run) and not run.method.startswith(CACHE) and not failed(run)


def failed(run: Run) -> bool:
    """Tell whether a run came to nothing."""
    return "failed" in run.options


def reference(report: Report, run: Run) -> int | None:
    """Return the place of the float model that was measured on what `run` was, the origin's own if there are several;
    None if there is none."""
    same = [i for i, r in enumerate(report.runs) if is_float(r) and setting(report, r) == setting(report, run)]
    return min(same, key=lambda i: report.runs[i].origin != run.origin) if same else None


def lowest(report: Report, where: Setting) -> dict[int, list[int]]:
    """Return, by width in order of appearance, the places of the runs with the lowest perplexity; several if equal."""
    found: dict[int, list[int]] = {}
    own = [run for run in report.runs if setting(report, run) == where]
    for bits in dict.fromkeys(run.bits for run in own if run.bits is not None):
        values = {i: report.runs[i].perplexity for i in measured(report, where, bits)}
        found[bits] = [i for i, value in values.items() if value == min(values.values())]
    return found


def measured(report: Report, where: Setting, bits: int) -> list[int]:
    """Return the places of the runs of a width whose perplexity is known."""
    return [
        i
        for i, run in enumerate(report.runs)
        if run.bits == bits and math.isfinite(run.perplexity) and setting(report, run) == where
    ]


def best(report: Report) -> set[int]:
    """Return the places of the runs with the lowest perplexity of their width, where a width has several."""
    return {
        i
        for where in settings(report)
        for bits, places in lowest(report, where).items()
        if len(measured(report, where, bits)) > 1
        for i in places
    }
