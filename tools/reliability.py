"""Write reports/reliability.md, and the README's lines on it, from the counts that other commands left.

    python tools/reliability.py [--check]

Reads reports/raw/{faults,fuzz,overhead,streaming,torture}.json, each written by a command of its own. What was not
measured is said to be missing; no figure stands here. `--check` writes nothing, and fails where the pages are not up to
date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from quantforge import store

ROOT = Path(__file__).parents[1]
RAW = ROOT / "reports" / "raw"
PAGE = ROOT / "reports" / "reliability.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- reliability -->", "<!-- /reliability -->"
COMMANDS = {
    "torture": "make torture",
    "faults": "make faults",
    "fuzz": "make fuzz",
    "streaming": "make streaming",
    "overhead": "make overhead",
}
WHAT = {"header": "safetensors header", "index": "index of shards", "recipe": "recipe", "tasks": "task file"}
Counts = dict[str, Any]


def read(raw: Path) -> dict[str, Counts | None]:
    """Return what each command counted, None where it has not run."""
    return {
        name: json.loads(file.read_text(encoding="utf-8")) if (file := raw / f"{name}.json").exists() else None
        for name in COMMANDS
    }


def missing(name: str) -> str:
    return f"Not measured: there is no reports/raw/{name}.json yet (`{COMMANDS[name]}`)."


def torture(found: Counts | None) -> tuple[str, str]:
    """Return what the kills came to, as a paragraph and as the clause of the README."""
    if found is None:
        return missing("torture"), ""
    counts = found.get("total", found)
    lost, failed = counts["lost"] or "none", counts["failed"] or "none"
    text = (
        f"{counts['kills']:,} processes were ended by SIGKILL at random times, {counts['committed']:,} of them with "
        f"work committed. {counts['runs']:,} runs came through in the end. Outputs that differ from those of a run "
        f"that nothing stopped, or that left something beside them: {lost}. Runs that ended with an error: {failed}."
    )
    lost = counts["lost"] + counts["failed"]
    return text, f"{counts['kills']:,} random kills, {'none' if not lost else f'{lost:,}'} of which lost anything"


def fuzz(found: Counts | None) -> tuple[str, str]:
    """Return what came of damaged input."""
    if found is None:
        return missing("fuzz"), ""
    lines = ["| parser | inputs | accepted | refused in a line | anything else | slowest (s) |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    total = bad = 0
    for name, counts in found["targets"].items():
        inputs, odd = sum(counts["inputs"].values()), len(counts["unexpected"])
        accepted = counts["came"].get("accepted", 0)
        how = " + ".join(f"{n:,} {engine}" for engine, n in counts["inputs"].items())
        lines.append(
            f"| {WHAT.get(name, name)} | {how} | {accepted:,} | {inputs - accepted - odd:,} | {odd:,} | "
            f"{counts['slowest']:.3f} |"
        )
        total, bad = total + inputs, bad + odd
    return "\n".join(
        lines
    ), f"{total:,} damaged inputs, {bad or 'none'} of which did anything but be read or refused in a line"


def faults(found: Counts | None, table: list[Counts]) -> tuple[str, str]:
    """Return the table of faults with the tests that ran for each."""
    counted = {row["n"]: row for row in (found or {"rows": []})["rows"]}
    lines = ["| | fault | exit | what happens | tests passed |", "| ---: | --- | ---: | --- | ---: |"]
    shown = 0
    for row in table:
        came = counted.get(row["n"])
        whole = came is not None and came["passed"] and not came["failed"] and not came["absent"]
        shown += bool(whole)
        tests = "not run" if came is None else f"{came['passed']}" if whole else f"{came['passed']}, **not all**"
        does = row["does"] + (f" ({row['differs']})" if "differs" in row else "")
        does += " — by an injected fault" if row.get("injected") else ""
        lines.append(f"| {row['n']} | {_cell(row['fault'])} | {row['exit']} | {_cell(does)} | {tests} |")
    head = "" if found is not None else missing("faults") + "\n\n"
    said = f"{shown} of {len(table)} faults met as the table says" if found is not None else ""
    return head + "\n".join(lines), said


def streaming(found: Counts | None) -> tuple[str, str]:
    """Return peak memory of streamed runs."""
    if found is None:
        return missing("streaming"), ""
    lines = ["| run | blocks | weights (GB) | allowed (GB) | foretold (GB) | peak memory (GB) |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    peaks = {run["name"]: run["peak"] for run in found["runs"]}
    for run in found["runs"]:
        allowed = run["max_memory"].removesuffix("GB")
        lines.append(
            f"| {_cell(run['name'])} | {run['blocks']} | {run['bytes'] / 1e9:.2f} | {allowed} | "
            f"{_foretold(run)} | {run['peak'] / 1e9:.2f} |"
        )
    grown = [
        f"{100 * (peaks[f'60 blocks {method}'] / peaks[f'30 blocks {method}'] - 1):+.1f} % by {method.upper()}"
        for method in ("rtn", "gptq")
        if {f"30 blocks {method}", f"60 blocks {method}"} <= set(peaks)
    ]
    lines += ["", f"Peak memory of 60 blocks beside that of 30: {', '.join(grown)}."] if grown else []
    largest = max(found["runs"], key=lambda run: (run["bytes"], run["peak"]))
    weights, peak = largest["bytes"] / 1e9, largest["peak"] / 1e9
    return "\n".join(lines), f"{weights:.1f} GB of weights quantized in {peak:.1f} GB of memory"


def overhead(found: Counts | None) -> tuple[str, str]:
    """Return what keeping work costs: the journal's share of runs, by what they would have taken without it."""
    if found is None:
        return missing("overhead"), ""
    lines = ["| run | commits | whole run (s) | of that the journal (s) | on top of the rest, median |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for run in found["runs"]:
        whole, kept = (", ".join(f"{seconds:.1f}" for seconds in run[key]) for key in ("seconds", "journal"))
        lines.append(f"| {run['method']} | {run['commits']} | {whole} | {kept} | {100 * run['share']:.1f} % |")
    said = ", ".join(f"{100 * run['share']:.1f} % of {run['method'].upper()}'s time" for run in found["runs"])
    return "\n".join(lines), f"keeping work costs {said}"


def _foretold(run: Counts) -> str:
    return f"{run['estimated'] / 1e9:.2f}" if "estimated" in run else "not noted"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def page(found: dict[str, Counts | None], table: list[Counts]) -> str:
    """Return the page."""
    return f"""# Reliability

Each figure is counted by the command that stands above it, and read from reports/raw. `make reliability` writes this
page.

## Killed at any time

`{COMMANDS["torture"]}`

{torture(found["torture"])[0]}

## Damaged input

`{COMMANDS["fuzz"]}`: sound files with changes, each parsed within 5 seconds and 1 GiB, or counted as anything else.

{fuzz(found["fuzz"])[0]}

## Larger than memory

`{COMMANDS["streaming"]}`: random models, read block by block under `--max-memory`, in 4 bits with groups of 64; GPTQ on
8 windows of 256 tokens. The peak is VmHWM of the whole process, mapped files included, saving and verifying among it.

{streaming(found["streaming"])[0]}

## What keeping work costs

`{COMMANDS["overhead"]}`: the demo model read, quantized on 64 windows of 512 tokens and saved; the digests of its
inputs, and all that the journal writes, syncs and removes, timed in the run itself.

{overhead(found["overhead"])[0]}

## {len(table)} faults

`{COMMANDS["faults"]}` runs the tests that tests/data/faults.yaml names. Each asserts the exit code, the line that is
printed, and that inputs, older outputs and committed work are as they were.

{faults(found["faults"], table)[0]}
"""


def summary(found: dict[str, Counts | None], table: list[Counts]) -> str:
    """Return the README's sentence: what was measured, and what is missing."""
    said = [
        torture(found["torture"])[1],
        faults(found["faults"], table)[1],
        fuzz(found["fuzz"])[1],
        streaming(found["streaming"])[1],
        overhead(found["overhead"])[1],
    ]
    absent = [name for name, counts in found.items() if counts is None]
    text = f"Measured: {'; '.join(filter(None, said))}." if any(said) else ""
    text += f" Not measured yet: {', '.join(absent)}." if absent else ""
    return f"{text.strip()} [All figures](reports/reliability.md)."


def placed(readme: str, text: str) -> str:
    """Return the README with `text` between its marks; as it is where it has none."""
    if BEGIN not in readme or END not in readme:
        return readme
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    table = yaml.safe_load((ROOT / "tests" / "data" / "faults.yaml").read_text(encoding="utf-8"))
    found = read(RAW)
    readme = README.read_text(encoding="utf-8")
    wanted = {PAGE: page(found, table), README: placed(readme, summary(found, table))}
    stale = [file for file, text in wanted.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    if args.check:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is not what `make reliability` writes", file=sys.stderr)
        sys.exit(bool(stale))
    for file in stale:
        store.write_text(file, wanted[file])


if __name__ == "__main__":
    main()
