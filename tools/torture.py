"""Kill a small run at random times, go on with it, and hold its files against those of a run that nothing stopped.

    python tools/torture.py reports/raw/torture.json [--kills 200] [--seed 0] [--methods rtn,gptq,awq]

Each run is a process of its own that is ended by SIGKILL, possibly several times, until it comes through. Every file of
its output must then have the bytes of the undisturbed run's, and nothing may lie beside it.
"""

import argparse
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
import tqdm

import quantforge
from quantforge import journal
from quantforge.errors import PlanError
from quantforge.store import disk, write_text

MODEL = Path(__file__).resolve().parent.parent / "tests" / "data" / "tiny-llama"
METHODS = ("rtn", "gptq", "awq", "lwc")
SAMPLES, SEQ_LEN = 8, 64
EXISTS = 262  # the number of the error for an output that is there
MOMENTS = ("at any time", "committing", "publishing")
LONGEST = 300.0  # seconds, after which a run hangs


@dataclass
class Counts:
    """What happened.

    kills      processes that were killed
    committed  of these, with work committed that the next process found
    published  of these, with the output there, and whole
    early      runs that came through before they were to be killed
    runs       that came through in the end
    lost       of these, with an output that differs, or with something left beside it
    failed     of these, that ended with an error
    """

    kills: int = 0
    committed: int = 0
    published: int = 0
    early: int = 0
    runs: int = 0
    lost: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def quantize(out: Path, method: str) -> None:
    """Do the run that is killed; one whose output is there already has nothing left to do."""
    tokens = torch.randint(3, 100, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    try:
        quantforge.quantize(MODEL, method, calibration=tokens, out=out)
    except PlanError as error:
        if error.number != EXISTS:
            raise


def start(out: Path, method: str, run: Callable[[Path, str], None]) -> int:
    """Begin a run in a process of its own, with what is imported here; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(os.devnull, "r+b") as nothing, open(out.parent.parent / "stderr", "ab") as said:
            os.dup2(nothing.fileno(), 1)
            os.dup2(said.fileno(), 2)
        os.environ["QUANTFORGE_COMMIT_SECONDS"] = "0"  # every commit that there can be
        run(out, method)
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """Wait at most so long; return how the process ended, or None."""
    end = time.monotonic() + seconds
    while True:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(min(0.001, max(end - time.monotonic(), 0)))


def killed(child: int) -> int:
    """Kill a process; return how it ended."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    """Return the digests of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def reached(moment: str, out: Path, least: int) -> bool:
    """Tell whether a run has come to a moment: to so many commits, or to having the output staged or published."""
    if moment == "committing":
        return journal.commits(out) >= least
    try:
        return out.exists() or any(out.parent.glob(".quantforge.*/*"))
    except FileNotFoundError:  # it took its name just now
        return True


def trial(
    place: Path,
    method: str,
    whole: dict[str, str],
    seconds: float,
    dice: random.Random,
    counts: Counts,
    run: Callable[[Path, str], None],
) -> None:
    """Do one run, killed at a random time or at one when files are written, and then, every second time, again."""
    out = place / "out"
    again = True
    while again:
        child = start(out, method, run)
        moment, code = dice.choice(MOMENTS), None
        if moment == "at any time":
            code = ended(child, dice.uniform(0, seconds))
        else:
            least = journal.commits(out) + dice.randrange(1, 4)
            while code is None and not reached(moment, out, least):
                code = ended(child, 0.001)
            code = ended(child, dice.uniform(0, 0.02)) if code is None else code
        if code is None:
            code = killed(child)
        if code != -signal.SIGKILL:
            counts.early += code == 0
            counts.failed += code != 0
            again = False
            continue
        counts.kills += 1
        counts.committed += journal.commits(out) > 0
        if out.exists():
            counts.published += 1
            counts.lost += contents(out) != whole
        again = dice.random() < 0.5
    child = start(out, method, run)
    code = ended(child, LONGEST)
    if code is None:
        killed(child)
    counts.runs += 1
    counts.failed += code != 0
    if out.exists() and contents(out) != whole:
        names = {*whole.items()} ^ {*contents(out).items()}
        print(f"\n{method}: {sorted({name for name, _ in names})} differ", file=sys.stderr)
    left = [name for name in os.listdir(place) if not name.startswith(".quantforge.")]  # swept up by later runs
    counts.lost += not out.exists() or contents(out) != whole or (left != ["out"] and not journal.finished(out))


def torture(
    kills: int, methods: list[str], seed: int, run: Callable[[Path, str], None] = quantize, say: bool = False
) -> Counts:
    """Kill runs of each method in turn until there were so many kills."""
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread that a fork would lose
    dice, counts = random.Random(seed), Counts()
    wholes = {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a kill leaves what was written, synced or not
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        for method in methods:
            place = Path(scratch) / method
            place.mkdir()
            run(place / "out", method)  # which imports all that a run needs
            disk.remove_folder(place / "out")
            begin = time.monotonic()
            if (code := ended(start(place / "out", method, run), LONGEST)) != 0:
                raise SystemExit(f"{method}: {code}, {(Path(scratch) / 'stderr').read_text()[-1000:]}")
            counts.seconds[method] = round(time.monotonic() - begin, 3)
            wholes[method] = contents(place / "out")
        number = 0
        while counts.kills < kills:
            method = methods[number % len(methods)]
            place = Path(scratch) / f"trial-{number}"
            place.mkdir()
            trial(place, method, wholes[method], counts.seconds[method], dice, counts, run)
            if say:
                print(f"\r{counts.kills} kills, {counts.lost} lost, {counts.failed} failed", end="", file=sys.stderr)
            if counts.lost or counts.failed:
                sys.stderr.write(f"\n{method}: {(Path(scratch) / 'stderr').read_text()[-1000:]}")
                break
            disk.remove_folder(place)
            number += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(METHODS))
    given = parser.parse_args()
    counts = torture(given.kills, given.methods.split(","), given.seed, say=True)
    facts = {
        "schema": 1,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"quantforge": quantforge.__version__, "torch": torch.__version__},
        "model": MODEL.name,
        **asdict(counts),
    }
    write_text(given.out, json.dumps(facts, indent=1) + "\n")
    print(f"\n{counts.kills} kills, {counts.committed} of them with work committed; {counts.lost} lost")
    sys.exit(1 if counts.lost or counts.failed else 0)


if __name__ == "__main__":
    main()
