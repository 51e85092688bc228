"""Whether the runs of a report differ by more than noise: each against its float model and the best of its width.

Perplexity and KL by the paired bootstrap over windows, answers by McNemar's test; see `evaluation.significance`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from quantforge.record import Report, TaskRow
from quantforge.report.groups import is_floor, lowest, reference, setting, settings

Role = Literal["float", "best"]
What = Literal["perplexity", "KL", "answers"]
LEVEL = 0.05
NOTHING = "no difference shown"


@dataclass(frozen=True)
class Difference:
    """One run against another, by their places in the report.

    role      what it is compared with: the float model, or the best run of its width
    task      of answers: which task's; None is the items of all tasks together
    size      how many windows or items were paired
    change    of perplexity as a share of it, of the mean KL in nats, of the share of right answers; below 0 is better
              for the first two; low and high are the ends of its 95 % interval, NaN for answers
    lost      of answers: right in `against` and wrong in `run`; gained the other way round
    verdict   "better", "worse", "no difference shown" of `run`; empty where nothing can be said
    reason    why nothing can be said
    """

    run: int
    against: int
    role: Role
    what: What
    task: str | None = None
    size: int = 0
    change: float = math.nan
    low: float = math.nan
    high: float = math.nan
    lost: int = 0
    gained: int = 0
    p: float = math.nan
    verdict: str = ""
    reason: str = ""


def pairs(report: Report) -> Iterator[tuple[int, int, Role]]:
    """Yield every (run, other, role of the other) that is to be compared, by place; the float models first."""
    for i, run in enumerate(report.runs):
        other = reference(report, run)
        if other is not None and other != i:
            yield i, other, "float"
    for where in settings(report):
        for bits, places in lowest(report, where).items():
            for i, run in enumerate(report.runs):
                if places and run.bits == bits and i != places[0] and setting(report, run) == where:
                    yield i, places[0], "best"


def differences(report: Report) -> list[Difference]:
    """Return every test that can be made, and for pairs that cannot be tested a row with the reason.

    KL is compared with the best run's only: the float model's is 0 by definition.
    """
    found = []
    for i, other, role in pairs(report):
        found.append(_windows(report, i, other, role, "perplexity"))
        if role == "best":
            found.append(_windows(report, i, other, role, "KL"))
        found += _answers(report, i, other, role)
    return found


def _windows(report: Report, i: int, other: int, role: Role, what: What) -> Difference:
    from quantforge.evaluation import significance  # scipy takes a second; reading a report must not

    run, against = report.runs[i], report.runs[other]
    after, before = (run.losses, against.losses) if what == "perplexity" else (run.kls, against.kls)
    for name, values in ((run.label, after), (against.label, before)):
        if not usable(values):
            return Difference(i, other, role, what, reason=f"{name} has no {what} of each window")
    if len(after) != len(before):
        return Difference(i, other, role, what, reason=f"{len(after)} windows against {len(before)}")
    found = significance.paired_change(before, after, LEVEL)
    shown = found.ratio if what == "perplexity" else found.mean
    less = 1.0 if what == "perplexity" else 0.0
    return Difference(
        i, other, role, what, None, len(after), shown.value - less, shown.low - less, shown.high - less, p=found.p,
        verdict=significance.verdict(found, LEVEL),
    )  # fmt: skip


def usable(values: Sequence[float]) -> bool:
    """Tell whether there is a finite value for each window, none of a size that no loss or divergence has."""
    return bool(values) and all(abs(value) < 1e4 for value in values)


def _answers(report: Report, i: int, other: int, role: Role) -> list[Difference]:
    """Return the test of all items that both runs answered, and one for each task."""
    run, against = report.runs[i], report.runs[other]
    theirs = {task.task: task for task in against.tasks}
    both = [(task, theirs[task.task]) for task in run.tasks if task.task in theirs]
    alike = [(ours, theirs) for ours, theirs in both if same_items(ours, theirs)]
    if not alike:
        if not run.tasks and not against.tasks:
            return []
        lacks = next((r.label for r in (run, against) if not r.tasks), None)
        reason = f"{lacks} has no answers" if lacks else "they answered other items"
        return [Difference(i, other, role, "answers", reason=reason)]
    pooled = "".join(ours.answers for ours, _ in alike), "".join(theirs.answers for _, theirs in alike)
    found = [_flips((i, other, role), None, *pooled)]
    found += [_flips((i, other, role), ours.task, ours.answers, theirs.answers) for ours, theirs in alike]
    different = [ours.task for ours, theirs in both if not same_items(ours, theirs)]
    return found + [
        Difference(i, other, role, "answers", task, reason="they answered other items") for task in different
    ]


def same_items(one: TaskRow, other: TaskRow) -> bool:
    """Tell whether two runs answered the same items in the same order, asked in the same way."""
    key = [(row.task, row.items, row.shots, len(row.answers)) for row in (one, other)]
    return key[0] == key[1] and len(one.answers) > 0


def _flips(pair: tuple[int, int, Role], task: str | None, after: str, before: str) -> Difference:
    from quantforge.evaluation import significance

    found = significance.mcnemar([c == "1" for c in before], [c == "1" for c in after])
    return Difference(
        *pair, "answers", task, found.items, found.gain, lost=found.lost, gained=found.gained, p=found.p,
        verdict=significance.verdict(found, LEVEL),
    )  # fmt: skip


def floors(report: Report, found: Sequence[Difference]) -> dict[int, list[Difference]]:
    """Return, by the place of each run that is the float model in another dtype, its tests against the float model."""
    return {
        i: [test for test in found if test.run == i and test.role == "float" and test.task is None and test.verdict]
        for i, run in enumerate(report.runs)
        if is_floor(run)
    }


def below_floor(report: Report, found: Sequence[Difference], test: Difference) -> bool:
    """Tell whether a run's perplexity differs from its float model's by no more than another dtype's does."""
    run = report.runs[test.run]
    if test.what != "perplexity" or test.role != "float" or not test.verdict or is_floor(run):
        return False
    sizes = [
        abs(other.change)
        for place, own in floors(report, found).items()
        for other in own
        if other.what == "perplexity" and setting(report, report.runs[place]) == setting(report, run)
    ]
    return bool(sizes) and abs(test.change) <= max(sizes)


def unpaired(report: Report) -> str:
    """Say why runs of different settings are not compared with each other, and which lack a float model."""
    wheres = settings(report)
    said = []
    if len(wheres) > 1:
        several = len({model for model, _ in wheres}) > 1
        what = "Runs on different models or other evaluation tokens" if several else "Runs on other evaluation tokens"
        said.append(f"{what} cannot be paired window by window, so no test is made between them.")
    alone = [run.label for run in report.runs if run.bits is not None and reference(report, run) is None]
    if alone and wheres:
        said.append(f"No float model was measured on the same tokens for {_few(alone)}.")
    return " ".join(said)


def _few(labels: list[str]) -> str:
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} others" if len(labels) > 4 else "")
