"""The tables of training runs: `reports/distillation/README.md`, from the runs committed beside it.

    python tools/distillation.py [FOLDER]

A run is a folder with `training.json`, as `quantforge distill`, `qat` and `qlora` write it.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from quantforge.report.tables import Cell, Column, Table, markdown
from quantforge.report.words import MISSING, number, perplexity
from quantforge.training import results
from quantforge.training.results import Training

REPORTS = Path(__file__).parent.parent / "reports" / "distillation"
Value = Callable[[Training], str]


def before(run: Training) -> str:
    return perplexity(run.before.perplexity) if run.before else MISSING


def after(run: Training) -> str:
    return perplexity(run.after.perplexity) if run.after else MISSING


def kl(run: Training) -> str:
    return number(run.after.kl, ".4f") if run.after else MISSING


def recovered(run: Training) -> str:
    return number(run.recovered, ".1%") if math.isfinite(run.recovered) else MISSING


def of_texts(name: str, spec: str) -> Value:
    return lambda run: MISSING if run.texts is None else number(getattr(run.texts, name), spec)


def memory(run: Training) -> str:
    return MISSING if run.peak_memory is None else f"{run.peak_memory / 1e6:,.0f} MB"


COMMON: tuple[tuple[Column, Value], ...] = (
    (Column("loss", "what was made small", text=True), lambda run: str(run.aim["loss"])),
    (Column("text", "trained on", text=True), lambda run: str(run.data["name"])),
    (Column("trained", "numbers"), lambda run: f"{sum(run.trained.values()):,}"),
    (Column("tokens", "read in training"), lambda run: f"{run.tokens:,}"),
    (Column("minutes", "of training, without evaluation"), lambda run: number(run.seconds / 60, ".1f")),
    (Column("before", "perplexity"), before),
    (Column("after", "perplexity"), after),
)
RECOVERY: tuple[tuple[Column, Value], ...] = (
    *COMMON,
    (Column("KL", "from the teacher, after"), kl),
    (Column("recovered", "share of the lost log-perplexity that is back"), recovered),
)
MEMORY: tuple[tuple[Column, Value], ...] = (*COMMON, (Column("peak memory", "of the process in training"), memory))
STUDENTS: tuple[tuple[Column, Value], ...] = (
    *COMMON,
    (Column("KL", "from the teacher, after"), kl),
    (Column("teacher's loss", "of what the student writes, nats per token"), of_texts("student_nll", ".3f")),
    (Column("distinct-2", "of what the student writes"), of_texts("distinct", ".3f")),
    (Column("ExAccErr", "excess error on own prefixes"), of_texts("excess", ".1%")),
)

# What papers say of two losses: the first has the lower value
CLAIMS: tuple[tuple[str, str, str, str], ...] = (
    (
        "minillm",
        "fkl",
        "excess",
        "the policy gradient errs less on its own prefixes than forward KL (arXiv:2306.08543)",
    ),
    ("gkd", "jsd", "excess", "text of its own lowers the excess error of the same divergence (arXiv:2306.13649)"),
    ("rkl", "fkl", "student_nll", "reverse KL writes what the teacher finds likelier (arXiv:2306.08543)"),
    ("minillm", "fkl", "student_nll", "so does the policy gradient of it (arXiv:2306.08543)"),
    ("rkl", "fkl", "distinct", "reverse KL seeks modes, and its texts vary less (arXiv:2306.13649)"),
    ("fkl", "rkl", "perplexity", "forward KL covers the teacher, and has the lower perplexity (arXiv:2306.08543)"),
)
WORDS = {"excess": "ExAccErr", "student_nll": "teacher's loss", "distinct": "distinct-2", "perplexity": "perplexity"}


def table(runs: Sequence[tuple[str, Training]], columns: Sequence[tuple[Column, Value]]) -> str:
    """Return a row a run, each with a link to its page."""
    rows = [(Cell(name), *(Cell(value(run)) for _, value in columns)) for name, run in runs]
    made = markdown(Table("", (Column("run", "", text=True), *(column for column, _ in columns)), tuple(rows)))
    for name, _ in runs:
        made = made.replace(f"| {name} ", f"| [{name}]({name}/training.md) ")
    return made


def page(runs: Sequence[tuple[str, Training]]) -> str:
    """Return the page: a table for each kind of run, and the commands."""
    kinds: list[tuple[str, Sequence[tuple[Column, Value]], Callable[[Training], bool]]] = [
        ("Quantized students", RECOVERY, lambda run: run.kind != "qlora" and bool(run.method)),
        ("Adapters, and all weights", MEMORY, lambda run: run.kind == "qlora" or _whole(run)),
        ("Students of fewer blocks", STUDENTS, lambda run: not run.method and not _whole(run)),
    ]
    parts = ["# Training runs\n"]
    for title, columns, takes in kinds:
        found = [(name, run) for name, run in runs if takes(run)]
        if found:
            parts.append(f"## {title}\n\n{table(found, columns)}")
        if found and columns is STUDENTS:
            parts.append(said([run for _, run in found]))
    commands = "\n".join(f"{run.command}" for _, run in runs)
    machine = runs[0][1].machine
    made = (
        f"Made on {machine.get('processor', 'a machine')} with {machine.get('threads')} of {machine.get('cores')} cores"
    )
    parts.append(f"## Commands\n\n{made}, beside another run, by:\n\n```\n{commands}\n```")
    return "\n".join(parts) + "\n"


def said(runs: Sequence[Training]) -> str:
    """Return what papers say of the losses, and what these students show."""
    by_loss = {str(run.aim["loss"]): run for run in runs if run.texts is not None}
    written = next((run.texts for run in by_loss.values()), None)
    if written is None:
        return ""
    lines = [
        f"Each student writes {written.prompts} texts of {written.new} tokens, drawn at temperature 1 by one seed. "
        "ExAccErr(l) = R(l) / (l ε(l)) − 1 at l, the length of the texts: R(l) is the sum over the first l tokens of "
        "the mean KL(teacher ‖ student) after what the student wrote, l ε(l) the same after what the teacher wrote "
        "(arXiv:2204.01171). One seed and few steps: what differs little is not told apart.",
        "",
        "| what papers say | here | |",
        "| --- | --- | --- |",
    ]
    for one, other, key, claim in CLAIMS:
        if one in by_loss and other in by_loss:
            low, high = (_value(by_loss[loss], key) for loss in (one, other))
            verdict = "as said" if low < high else "**not here**"
            lines.append(f"| {claim} | {WORDS[key]} {low:.4g} ({one}) and {high:.4g} ({other}) | {verdict} |")
    return "\n".join(lines) + "\n"


def _value(run: Training, key: str) -> float:
    if key == "perplexity":
        return math.nan if run.after is None else run.after.perplexity
    return math.nan if run.texts is None else float(getattr(run.texts, key))


def _whole(run: Training) -> bool:
    return not run.method and run.aim["loss"] == "ce"


def main(folder: Path = REPORTS) -> None:
    """Write the page of the runs in `folder`."""
    files = sorted(folder.glob("*/training.json"))
    runs = [(file.parent.name, results.from_json(file.read_text(encoding="utf-8"), str(file))) for file in files]
    (folder / "README.md").write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
