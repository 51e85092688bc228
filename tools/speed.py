"""Write reports/speed/README.md from what was measured: `make speed`.

    python tools/speed.py

It reads reports/raw/operators.json, which `tests/bench/test_operators.py` leaves behind, and reports/raw/gpu.json where
`tools/gpu_speed.py` was run. What was asked of each figure stands beside it, met or not.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantforge.report.tables import Cell, Column, Table, markdown

ROOT = Path(__file__).parent.parent
RAW = ROOT / "reports" / "raw"
PAGE = ROOT / "reports" / "speed" / "README.md"


def page(found: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> str:
    """Return the page as Markdown, from pytest-benchmark's record and that of a GPU, if there is one."""
    told = {one["name"]: one["extra_info"] for one in found["benchmarks"]}
    about = found["machine_info"]
    threads = {info["threads"] for info in told.values()}
    parts = [
        "# Speed of packed checkpoints",
        f"{about['cpu']['brand_raw']}, {', '.join(map(str, sorted(threads)))} threads, {found['datetime'][:10]}; "
        "ratios to float32 in the same process, samples taken in turn, those during which the machine was busy left "
        "out. Layers are 2048 x 2048 and, together, more than any cache holds.",
        _limits(told),
        "## Single layers",
        _layers(told),
        "## SmolLM2-135M-Instruct from end to end",
        "A prompt of 512 tokens, then 32 tokens more, at batch 1.",
        _generation(told["test_generation"]),
        "## Loading",
        "Seconds from the folder to the first predicted token of a prompt of 8: transformers maps a float file into "
        "memory and reads it only then.",
        _rows(
            ("model", "seconds"), ((name, f"{value:.2f}") for name, value in told["test_loading"]["seconds"].items())
        ),
        "## On a GPU",
        _gpu(gpu) if gpu else "Not measured: no GPU was at hand. `python tools/gpu_speed.py` measures it where one is.",
        "Made by `make speed`. `quantforge bench` does the same for a checkpoint of yours: [int4](int4/bench.md) and "
        "[W8A8](w8a8/bench.md) of this model at several batch sizes.",
    ]
    return "\n\n".join(parts) + "\n"


def _limits(told: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what was asked beside what was measured."""
    one = told["test_layers_with_float_inputs[1]"]["times_float32"]
    many = told["test_layers_with_rounded_inputs[256]"]
    whole, loading = told["test_generation"], told["test_loading"]
    floats = loading["seconds"]["transformers, float32"]
    rows = [
        ("int4 layer, batch 1", one["int4"], 3.0, "x"),
        ("int8 layer, batch 1, in two digits: 16 bits of each input", one["int8 in two digits"], 2.5, "x"),
        ("int8 layer, batch 1, bfloat16 inputs", one["int8"], 2.5, "x"),
        ("W8A8 layer, 256 rows, to F.linear", many["times_float32"]["w8a8"], 2.0, "x"),
        ("W8A8 layer, 256 rows, to oneDNN's product", many["w8a8_times_onednn"], 2.0, "x"),
        ("int4 generation", whole["tokens_times_float32"]["int4"], 1.6, "x"),
        ("W8A8 prompt of 512 tokens", whole["prompt_times_float32"]["w8a8"], 1.7, "x"),
    ]
    cells = [
        (name, f"{value:.2f} {unit}", f"at least {least} {unit}", _met(value >= least))
        for name, value, least, unit in rows
    ]
    share = loading["int4_share_of_float32_memory"]
    cells.append(("memory of int4 linears", f"{share:.3f} of float32", "at most 0.2", _met(share <= 0.2)))
    seconds = loading["seconds"]["int4"]
    cells.append(("loading int4", f"{seconds:.2f} s", f"the float model's {floats:.2f} s", _met(seconds <= floats)))
    return _rows(("what", "measured", "asked", ""), cells)


def _met(yes: bool) -> str:
    return "met" if yes else "**not met**"


def _layers(told: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for test, info in told.items():
        if test.startswith("test_layers"):
            tokens = test.partition("[")[2].rstrip("]")
            for name, ratio in info["times_float32"].items():
                seconds = info["seconds_a_layer"][name] * 1e6
                counted = f"{info['kept'][name]} ({info['rejected'][name]})"
                rows.append((name, tokens, f"{seconds:.0f}", f"{ratio:.2f}", counted))
    return _rows(("layer", "tokens", "µs", "x float32", "samples (rejected)"), rows)


def _generation(info: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{512 / info['prompt_seconds'][name]:.0f}",
            f"{info['prompt_times_float32'][name]:.2f}",
            f"{rate:.1f}",
            f"{info['tokens_times_float32'][name]:.2f}",
        )
        for name, rate in info["tokens_per_second"].items()
    ]
    return _rows(("model", "prompt tokens/s", "x float32", "tokens/s", "x float32"), rows)


def _gpu(gpu: Mapping[str, Any]) -> str:
    shape = gpu["shape"]
    rows = [
        (
            name,
            f"{gpu['prompt_times_bfloat16'][name]:.2f}",
            f"{rate:.1f}",
            f"{gpu['tokens_times_bfloat16'][name]:.2f}",
        )
        for name, rate in gpu["tokens_per_second"].items()
    ]
    return (
        f"{gpu['machine']['name']}, a random model of {shape['layers']} blocks of width {shape['hidden']}, prompt of "
        f"{shape['prompt']} tokens, batch 1. GPTQ of it on {gpu['gptq_tokens']:,} tokens took "
        f"{gpu['gptq_seconds']:.1f} s.\n\n" + _rows(("model", "prompt, x bfloat16", "tokens/s", "x bfloat16"), rows)
    )


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = tuple(Column(name, "", text=not i) for i, name in enumerate(head))
    return markdown(Table("", columns, tuple(tuple(map(Cell, row)) for row in rows))).rstrip("\n")


def main() -> None:
    """Read the figures, write the page."""
    gpu = RAW / "gpu.json"
    told = json.loads(gpu.read_text()) if gpu.exists() else None
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(json.loads((RAW / "operators.json").read_text()), told), encoding="utf-8")


if __name__ == "__main__":
    main()
