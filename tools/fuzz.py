"""Feed the parsers damaged input, a million times each: nothing but a refusal in one line may come of it.

    python tools/fuzz.py [--inputs N] [--targets header,index,recipe,tasks] [--engine mutate|atheris] [--out FILE]

`mutate` needs nothing: input number n of a target depends on n alone, so that a run that was stopped goes on where it
was, and `--only TARGET:N` shows one input again. `atheris` lets coverage guide it, where that package is installed.
Counts are added up in reports/raw/fuzz.json, from which tools/reliability.py makes a page.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_inputs import LARGEST, PIECES, SEEDS, mutated
from fuzz_targets import TARGETS, Check

from quantforge import store
from quantforge.errors import QuantForgeError

OUT = Path(__file__).parents[1] / "reports" / "raw" / "fuzz.json"
SECONDS = 5.0  # of one input
MEMORY = 2**30  # that the process may take on top of what it has when it begins
CHUNK = 10_000  # inputs between two writings of the counts


MEMORY_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else None  # else each input waits for a disk


class SlowError(BaseException):
    """An input took longer than SECONDS; no parser may catch it."""


@contextmanager
def workplace() -> Iterator[Path]:
    """Yield an empty folder with room beside it, in memory if the machine has a place for files there."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place:
        folder = Path(place, "model")
        folder.mkdir()
        yield folder


@contextmanager
def watched() -> Iterator[Callable[[Check, bytes], str]]:
    """Yield what runs one input under the caps of time and memory; it returns "accepted" or the code of the refusal."""

    def stop(number: int, at: FrameType | None) -> None:
        raise SlowError

    def run(check: Check, raw: bytes) -> str:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            check(raw)
        except QuantForgeError as error:
            said = str(error)
            assert said.isprintable(), said
            assert len(said) < 20_000, said
            return f"QF-{error.number}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return "accepted"

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield run
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def warm(target: str, check: Check) -> None:
    """Feed the sound inputs, since what is imported at the first call would count as slow."""
    for seed in SEEDS[target]:
        with suppress(QuantForgeError):
            check(seed)


def fuzz(target: str, start: int, stop: int, folder: Path) -> dict[str, Any]:
    """Run inputs `start` to `stop` of a target and count what came of them; unexpected ones are kept whole."""
    check = TARGETS[target](folder)
    warm(target, check)
    came: Counter[str] = Counter()
    unexpected: list[dict[str, Any]] = []
    slowest, began = 0.0, time.perf_counter()
    with watched() as run:
        for number in range(start, stop):
            raw, then = mutated(target, number), time.perf_counter()
            try:
                came[run(check, raw)] += 1
            except (Exception, SlowError) as error:
                unexpected.append({"number": number, "error": f"{type(error).__name__}: {error}"[:300]})
            slowest = max(slowest, time.perf_counter() - then)
    seconds = time.perf_counter() - began
    return {
        "inputs": stop - start,
        "came": dict(came),
        "unexpected": unexpected,
        "slowest": slowest,
        "seconds": seconds,
    }


def add(record: dict[str, Any], target: str, engine: str, more: dict[str, Any]) -> None:
    """Add the counts of some inputs to those of earlier ones."""
    found = record.setdefault("targets", {}).setdefault(target, {})
    inputs = found.setdefault("inputs", {})
    inputs[engine] = inputs.get(engine, 0) + more["inputs"]
    found["came"] = dict(sorted((Counter(found.get("came", {})) + Counter(more["came"])).items()))
    found["unexpected"] = (found.get("unexpected", []) + more["unexpected"])[:50]
    found["slowest"] = round(max(found.get("slowest", 0), more["slowest"]), 3)
    found["seconds"] = round(found.get("seconds", 0) + more["seconds"], 1)


def mutate(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Run every target to the number of inputs asked for, going on where the record ends."""
    for target in args.targets:
        done = record.get("targets", {}).get(target, {}).get("inputs", {}).get("mutate", 0)
        while done < args.inputs:
            until = min(done + CHUNK, args.inputs)
            with workplace() as folder:
                add(record, target, "mutate", fuzz(target, done, until, folder))
            store.write_text(args.out, json.dumps(record, indent=1) + "\n")
            done = until
            print(f"{target}: {done:,} of {args.inputs:,}", file=sys.stderr, flush=True)


def atheris(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Run every target under atheris, each in a process of its own, which libFuzzer ends."""
    for target in args.targets:
        place = Path(tempfile.mkdtemp(dir=MEMORY_DISK))
        (place / "model").mkdir()
        (place / "seeds").mkdir()
        for i, seed in enumerate(SEEDS[target]):
            (place / "seeds" / str(i)).write_bytes(seed)
        words = ("".join(map("\\x{:02x}".format, word)) for word in PIECES[target])
        (place / "words").write_text("".join(f'"{word}"\n' for word in words))
        ended = place / "ended.json"
        command = [sys.executable, __file__, "--guided", target, str(args.inputs), str(place), str(ended)]
        subprocess.run(command, check=False, capture_output=True)
        more = json.loads(ended.read_text()) if ended.exists() else {"inputs": 0, "unexpected": [{"error": "no end"}]}
        add(record, target, "atheris", {"came": {}, "slowest": 0, "seconds": 0, **more})
        store.write_text(args.out, json.dumps(record, indent=1) + "\n")
        shutil.rmtree(place)


def guided(target: str, inputs: str, place: str, ended: str) -> None:
    """Run one target under atheris in this process, and leave its counts in the file `ended`."""
    import atheris as engine

    with engine.instrument_imports(include=["quantforge"]):
        check = TARGETS[target](Path(place, "model"))
        warm(target, check)
    came: Counter[str] = Counter()
    unexpected: list[dict[str, Any]] = []
    slowest, began = 0.0, time.perf_counter()

    def end() -> None:
        more = {"inputs": sum(came.values()) + len(unexpected), "came": came, "unexpected": unexpected}
        seconds = time.perf_counter() - began
        store.write_text(Path(ended), json.dumps({**more, "slowest": slowest, "seconds": seconds}))

    with watched() as run:

        def one(raw: bytes) -> None:
            nonlocal slowest
            then = time.perf_counter()
            try:
                came[run(check, raw)] += 1
            except (Exception, SlowError) as error:
                unexpected.append({"input": raw.hex(), "error": f"{type(error).__name__}: {error}"[:300]})
            slowest = max(slowest, time.perf_counter() - then)
            if sum(came.values()) % 5000 == 0 or unexpected:  # libFuzzer ends the process without a word
                end()

        options = [f"-runs={inputs}", f"-max_len={LARGEST}", f"-dict={place}/words", "-verbosity=0", "-rss_limit_mb=0"]
        engine.Setup([sys.argv[0], f"{place}/seeds", *options], one)
        engine.Fuzz()


def main() -> None:
    if sys.argv[1:2] == ["--guided"]:
        guided(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--targets", type=lambda text: text.split(","), default=["header", "index", "recipe"])
    parser.add_argument("--engine", choices=["mutate", "atheris"], default="mutate")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", metavar="TARGET:N", help="print one input and what comes of it")
    args = parser.parse_args()
    if args.only:
        target, _, number = args.only.partition(":")
        raw = mutated(target, int(number))
        print(repr(raw))
        with workplace() as folder, watched() as run:
            print(run(TARGETS[target](folder), raw))
        return
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    {"mutate": mutate, "atheris": atheris}[args.engine](args, record)
    bad = sum(len(found["unexpected"]) for found in record["targets"].values())
    print(json.dumps({name: found["inputs"] for name, found in record["targets"].items()}))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
