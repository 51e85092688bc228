"""Measure the memory of models that are read block by block: `make streaming`, into reports/raw/streaming.json.

Beside what each run held stands what `--dry-run` foretold.

    python tools/streaming.py [PLACE] [--only NAME,…]

Random models are written into PLACE, a temporary folder if none is named, quantized by the command line in a process of
its own, and removed. Peak memory is that process's VmHWM, mapped files included, from its start to its end, saving and
verification among it. Runs that are there already are kept, and each is written down as it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantforge import __version__, store

ROOT = Path(__file__).parents[1]
OUT = ROOT / "reports" / "raw" / "streaming.json"
SMALL = {"width": 1024, "inner": 2816, "heads": 16, "vocab": 2048}
LARGE = {"width": 4096, "inner": 11008, "heads": 32, "vocab": 32000}
METHODS = {"rtn": ("--method", "rtn"), "gptq": ("--method", "gptq", "--samples", "8", "--seq-len", "256")}
MODELS = {"30 blocks": (30, SMALL, "2GB"), "60 blocks": (60, SMALL, "2GB"), "7B": (32, LARGE, "6GB")}


@dataclass(frozen=True)
class Measured:
    """One run: its name, and the blocks and bytes of the model; its peak memory in bytes, and its seconds.

    estimated  the peak that `--dry-run` foretold
    """

    name: str
    blocks: int
    bytes: int
    peak: int
    estimated: int
    seconds: float
    max_memory: str
    threads: int


def asked_for(folder: Path, limit: str, options: tuple[str, ...]) -> list[str]:
    """Return the command that quantizes the model in `folder`, save for where to."""
    command = [sys.executable, "-m", "quantforge", "quantize", str(folder), *options, "--bits", "4"]
    return [*command, "--group-size", "64", "--max-memory", limit]


def estimate(folder: Path, limit: str, options: tuple[str, ...]) -> int:
    """Return the peak memory that a dry run foretells."""
    command = [*asked_for(folder, limit, options), "--dry-run", "--json"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(told)["estimate"]["peak_memory"])


def measure(name: str, folder: Path, blocks: int, limit: str, options: tuple[str, ...]) -> Measured:
    """Quantize the model in `folder` and return what it took; RuntimeError if that fails."""
    out = folder.with_name("out")
    foretold = estimate(folder, limit, options)
    command = [*asked_for(folder, limit, options), "--out", str(out)]
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
                peak = max(peak, *(int(kib) * 1024 for kib in re.findall(r"VmHWM:\s+(\d+)", status)), 0)
            except OSError:  # it has just ended
                pass
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        told.seek(0)
        if process.returncode:
            raise RuntimeError(f"{name}: exit {process.returncode}: {told.read()[-500:]}")
    shutil.rmtree(out)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Measured(name, blocks, size, peak, foretold, round(seconds, 1), limit, torch.get_num_threads())


def runs() -> dict[str, Any]:
    """Return the runs that are written down, by name."""
    found = json.loads(OUT.read_text(encoding="utf-8"))["runs"] if OUT.exists() else []
    return {run["name"]: run for run in found}


def keep(found: dict[str, Any]) -> None:
    """Write runs down, in their order."""
    about = {"quantforge": __version__, "torch": torch.__version__, "processors": os.cpu_count()}
    order = [f"{model} {method}" for model in MODELS for method in METHODS]
    record = {**about, "runs": [found[name] for name in order if name in found]}
    store.write_text(OUT, json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Make each model, run each method on it, and write down what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="names of runs, such as '7B gptq', by commas")
    asked = parser.parse_args()
    wanted = set(filter(None, asked.only.split(",")))
    done = set(runs()) - wanted
    for model, (blocks, shape, limit) in MODELS.items():
        names = {f"{model} {method}": options for method, options in METHODS.items()}
        names = {n: o for n, o in names.items() if n not in done and (not wanted or n in wanted)}
        if not names:
            continue
        with tempfile.TemporaryDirectory(dir=asked.place) as place:
            folder = Path(place, "model")
            sizes = [f"--{key}={value}" for key, value in {"layers": blocks, **shape}.items()]
            subprocess.run([sys.executable, str(ROOT / "tools" / "bigmodel.py"), str(folder), *sizes], check=True)
            for name, options in names.items():
                found = asdict(measure(name, folder, blocks, limit, options))
                print(json.dumps(found), flush=True)
                keep({**runs(), name: found})


if __name__ == "__main__":
    main()
