"""Put the tables that the README shows into it, from the committed reports: `make readme`.

A line `<!-- table: FILE -->` is followed by the table of that report, up to `<!-- end of table -->`; a line
`<!-- methods: FILE -->` by a row for each of its runs, with the method's page and paper; a line `<!-- plot: FILE -->`
by its plot of quality against size, a file beside the report; a line `<!-- loaders: FILE -->` by the first table of
that page and the list right under it. Such a slot stays as it is while there is no report.
"""

import re
from pathlib import Path

from quantforge import recipe, record, report
from quantforge.errors import RecipeError
from quantforge.record import Report, Run

ROOT = Path(__file__).parent.parent
PLOT = "size.svg"
_SLOT = re.compile(r"(<!-- (table|methods|plot|loaders): (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def refreshed(text: str, root: Path = ROOT) -> str:
    """Return the README `text` with every table as its report below `root` has it now."""

    def filled(slot: re.Match[str]) -> str:
        file = root / slot[3]
        if slot[2] != "table" and not file.exists():
            return slot[0]
        if slot[2] == "loaders":
            return f"{slot[1]}\n{first_table(file)}\n{slot[4]}"
        found = record.from_json(file.read_text(encoding="utf-8"))
        if slot[2] == "plot":
            return f"{slot[1]}![Quality against bytes on disk]({Path(slot[3]).with_name(PLOT)})\n{slot[4]}"
        made = (f"`{o.command}`, {o.machine.get('processor', 'unknown processor')}, {o.created}" for o in found.origins)
        facts = "\n\n".join(made)
        table = report.table(found) if slot[2] == "table" else methods(found)
        return f"{slot[1]}\n{table}\n\n{facts}\n{slot[4]}"

    return _SLOT.sub(filled, text)


def first_table(page: Path) -> str:
    """Return the first table of a Markdown page with the list right under it; ValueError if it has none."""
    found = re.search(r"^((?:\|.*\n)+)(?:\n+((?:- .*\n)+))?", page.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{page} has no table")
    return "\n".join(filter(None, found.groups())).rstrip("\n")


def methods(found: Report) -> str:
    """Return a row for each run: the method linked to its page, its paper, and what was measured."""
    rows = [
        ["method", "paper", "bits per weight", "perplexity", "KL", "seconds"],
        ["---", "---", *["---:"] * 4],
        *(_row(run) for run in found.runs),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(run: Run) -> list[str]:
    seconds = "" if run.bits is None else report.number(run.seconds, ".1f")
    return [
        _linked(run),
        report.escape_markdown(_paper(run.method)),
        report.number(run.bits_per_weight, ".3f"),
        report.perplexity(run.perplexity),
        report.number(run.kl, "z.4f"),
        seconds,
    ]


def _linked(run: Run) -> str:
    """Return a run's label, in which each method that has a page is a link to it."""
    label, known = report.escape_markdown(run.label), recipe.names()
    if not label.startswith(run.method):
        return label
    links = (f"[{part}](docs/methods/{part}.md)" if part in known else part for part in run.method.split("+"))
    rest, equals, other = label.removeprefix(run.method).rpartition("=")
    if other in known:  # the method of some of the layers
        label = f"{run.method}{rest}{equals}[{other}](docs/methods/{other}.md)"
    return "+".join(links) + label.removeprefix(run.method)


def _paper(method: str) -> str:
    try:
        return recipe.load(method).paper
    except RecipeError:
        return ""


def plots(text: str, root: Path = ROOT) -> dict[Path, str]:
    """Return the files of the plots that the README `text` shows."""
    files = (root / slot[3] for slot in _SLOT.finditer(text) if slot[2] == "plot")
    return {
        file.with_name(PLOT): report.picture(record.from_json(file.read_text(encoding="utf-8")))
        for file in files
        if file.exists()
    }


if __name__ == "__main__":
    readme = ROOT / "README.md"
    for file, drawing in plots(readme.read_text(encoding="utf-8")).items():
        file.write_text(drawing, encoding="utf-8")
    readme.write_text(refreshed(readme.read_text(encoding="utf-8")), encoding="utf-8")
