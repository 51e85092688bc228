"""The figures of `bench` as text, as a Markdown page and as a drawing."""

from __future__ import annotations

import json
import math
from pathlib import Path

from quantforge.benchmark.speed import SHORT, Bench, Model, Speed
from quantforge.errors import clean
from quantforge.store import write_text

FILES = ("bench.json", "bench.md", "bench.svg")


def text(found: Bench) -> str:
    """Return a line a model and one a batch size and model."""
    lines = [_about(model) for model in found.models]
    width = max(len(speed.model) for speed in found.speeds)
    lines += [
        f"batch {s.batch_size:3}  {s.model:{width}}  prompt {s.prompt_per_second:9,.1f} tokens/s"
        f"{_times(s.prompt_ratio)}  first token {s.first_token_seconds:.3f} s  "
        f"generated {s.generated_per_second:8,.1f} tokens/s{_times(s.generated_ratio)}{_doubt(s)}"
        for s in found.speeds
    ]
    return "\n".join(lines)


def markdown(found: Bench) -> str:
    """Return a page with the same in two tables, and how it was measured."""
    on = found.machine
    lines = [
        "# Speed",
        "",
        f"Prompts of {found.prompt_tokens} tokens ({found.text}), {found.new_tokens} tokens written after the first. "
        "Medians of samples taken in turn in one process; those taken while the machine was busy are rejected. Opened: "
        f"from opening a model's files, which were read just before, to its first token after a prompt of "
        f"{min(SHORT, found.prompt_tokens)}.",
        "",
        f"{on['device']} ({_cell(str(on['name']))}, {on['instructions']}), {on['threads']} threads, {on['dtype']}, "
        f"torch {on['torch']}, quantforge {on['quantforge']}.",
        "",
        "| model | weights, MB | quantized layers, MB | opened, s | operators (layers) |",
        "| --- | ---: | ---: | ---: | --- |",
        *(_model_row(model) for model in found.models),
        "",
        "| batch size | model | prompt, tokens/s | x float | first token, s | written, tokens/s | x float | samples "
        "(rejected) |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_speed_row(speed) for speed in found.speeds),
        "",
        "![Tokens a second over the batch size](bench.svg)",
        *(["", f"Made {found.created} by `{_cell(found.command)}`."] if found.command else []),
    ]
    return "\n".join([*lines, *(f"\nNote: {_cell(note)}." for note in found.notes)]) + "\n"


def write(found: Bench, folder: Path) -> Path:
    """Write the figures, the page and its drawing into `folder`; return the page."""
    from quantforge.plots.drawing import svg
    from quantforge.plots.speed import speed_figure

    panels = {
        "prompt, tokens a second": {
            m.name: [(float(s.batch_size), s.prompt_per_second) for s in found.speeds if s.model == m.name]
            for m in found.models
        },
        "written, tokens a second": {
            m.name: [(float(s.batch_size), s.generated_per_second) for s in found.speeds if s.model == m.name]
            for m in found.models
        },
    }
    drawing = svg(speed_figure(panels), "speed", "Tokens a second over the batch size")
    write_text(folder / "bench.json", to_json(found) + "\n")
    write_text(folder / "bench.svg", _alone(drawing))
    write_text(folder / "bench.md", markdown(found))
    return folder / "bench.md"


def to_json(found: Bench) -> str:
    """Return the record as JSON; what is no number is null."""
    return json.dumps(_finite(found.record()), indent=1, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _about(model: Model) -> str:
    loaded = "" if math.isnan(model.load_seconds) else f", a first token {model.load_seconds:.2f} s after opening"
    operators = ", ".join(f"{name} {count}" for name, count in model.operators.items())
    return (
        f"{model.name}: {model.weight_bytes / 1e6:,.1f} MB, of which {model.linear_bytes / 1e6:,.1f} MB in quantized "
        f"layers{loaded}; {operators}"
    )


def _times(ratio: float) -> str:
    return "" if ratio == 1 else f" (x {ratio:.2f})"


def _doubt(speed: Speed) -> str:
    return f"  [{speed.rejected} busy samples rejected]" if speed.rejected else ""


def _model_row(model: Model) -> str:
    operators = ", ".join(f"{name} ({count})" for name, count in model.operators.items())
    loaded = "-" if math.isnan(model.load_seconds) else f"{model.load_seconds:.2f}"
    return (
        f"| {_cell(model.name)} | {model.weight_bytes / 1e6:,.1f} | {model.linear_bytes / 1e6:,.1f} | {loaded} | "
        f"{_cell(operators)} |"
    )


def _speed_row(s: Speed) -> str:
    return (
        f"| {s.batch_size} | {_cell(s.model)} | {s.prompt_per_second:,.1f} | {s.prompt_ratio:.2f} | "
        f"{s.first_token_seconds:.3f} | {s.generated_per_second:,.1f} | {s.generated_ratio:.2f} | "
        f"{s.kept} ({s.rejected}) |"
    )


def _cell(value: str) -> str:
    return clean(value).replace("|", "\\|")


def _alone(drawing: str) -> str:
    """Return the drawing as a file of its own: with the name space that pages imply, and the light palette."""
    from quantforge.plots.drawing import PALETTE

    for color, name in PALETTE.items():
        drawing = drawing.replace(f"var({name})", color)
    head, body = drawing.split(">", 1)
    space = "" if "xmlns=" in head else ' xmlns="http://www.w3.org/2000/svg"'
    return f'{head}{space} style="background:#ffffff">{body}'
