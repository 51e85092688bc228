"""Every fault at every operation of the store, and every state of the disk that a loss of power can leave.

A small run writes three blocks, with a state that goes on from one to the next, and publishes what it made. Whatever
stopped it, the same run again finds all that was committed, and ends with the same output as one that nothing stopped.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from quantforge import shards, store
from quantforge.errors import ResourceError
from quantforge.journal import Journal, finished, place
from quantforge.store import MARK, disk, failpoints, publish

IDENTITY = {"model": "tiny", "recipe": "rtn"}
BLOCKS = 3
Committed = Callable[[int], object]


def step(state: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a block becomes, and the state behind it; both depend on all blocks before."""
    weight = (state * 3 + block).repeat(40)
    return weight, weight[: len(state)] + 1


def run(out: Path, committed: Committed = lambda count: None) -> None:
    """Do the run, or what is left of it, telling `committed` how many blocks last."""
    store.put_back(out)
    done = finished(out)
    with Journal.open(out, IDENTITY) as journal:
        facts = [f for f in journal.commits if "block" in f]
        committed(len(facts))
        last = facts[-1]["state_object"] if facts else None
        state = journal.get(last)[0]["h"].clone() if last else torch.arange(8.0)
        for block in range(len(facts), BLOCKS):
            weight, state = step(state, block)
            names = {"object": journal.put({"w": weight}), "state_object": journal.put({"h": state}, {"block": block})}
            facts.append({"block": block, **names, "drop": [last] if last else []})
            journal.commit(facts[-1])
            last = names["state_object"]
            committed(block + 1)
        if not done:
            with publish(out, overwrite=out.exists()) as staging:
                for f in facts:
                    tensors = journal.get(f["object"])[0]
                    store.write_tensors(staging / f"{f['block']}.safetensors", tensors)
                shards.write(staging, [("last", tensors["w"])])
                store.write_text(staging / MARK, '{"files": []}')
                journal.published(staging)
        committed(BLOCKS + 1)
        journal.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory where there is one: many thousand files come and go."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Return the output of a run that nothing stopped."""
    place_ = tmp_path_factory.mktemp("whole")
    run(place_ / "out")
    assert os.listdir(place_) == ["out"]
    return contents(place_ / "out")


OLD = {MARK: b'{"old": 1}'}


def prepare(out: Path, how: str) -> None:
    """Put what lies there before the run."""
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    if how != "nothing":
        out.mkdir()
        (out / MARK).write_bytes(OLD[MARK])


def check(out: Path, kept: int, whole: dict[str, bytes], how: str = "nothing") -> None:
    """Hold what a stop has left against what was promised; then go on, and hold the end against a run without one."""
    before = contents(out) if out.exists() else None
    assert before in (whole, None if how == "nothing" else OLD) or (how == "two renames" and before is None)
    assert kept <= BLOCKS or before == whole
    found: list[int] = []
    if kept <= BLOCKS or place(out).exists():
        run(out, found.append)
        assert found[0] >= min(kept, BLOCKS) or finished(out) or kept > BLOCKS
    assert contents(out) == whole
    store.sweep(out.parent)  # as every later run there does
    store.put_back(out)
    assert os.listdir(out.parent) == ["out"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk's caches be: what a loss of power leaves is computed here, and not tried."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class NoExchange:
    """A C library whose renameat2 is refused, as by file systems that cannot exchange names."""

    def renameat2(self, *args: object) -> int:
        return -1


@contextlib.contextmanager
def situation(how: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if how == "two renames":
            patch.setattr(disk.ctypes, "CDLL", lambda *args, **kwargs: NoExchange())
        yield


def counted(out: Path, how: str) -> Counter[str]:
    """Return how often each point is reached in a run that nothing stops."""
    seen: Counter[str] = Counter()
    real = failpoints.reach
    with pytest.MonkeyPatch.context() as patch, situation(how):
        patch.setattr(failpoints, "reach", lambda point: (seen.update([point]), real(point))[1])
        prepare(out, how)
        run(out)
    return seen


HOWS = ("nothing", "an old output", "two renames")


def test_the_runs_here_reach_every_point(tmp_path, quick):
    seen = set().union(*(counted(tmp_path / "place" / "out", how) for how in HOWS))
    assert failpoints.POINTS.keys() - seen == {"journal.cut"}  # see the torn lines below


def in_a_child(out: Path, setting: str) -> tuple[int, int]:
    """Run in a process of its own with a fault; return how it ended, and how many blocks it said to last."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 99
        try:
            os.environ[failpoints.VARIABLE] = setting
            failpoints.reset()
            run(out, lambda count: os.write(write, bytes([count])))
            code = 0
        except ResourceError:
            code = 5
        except SystemExit:
            code = 1
        finally:
            os._exit(code)
    os.close(write)
    told = os.read(read, 100)
    while more := os.read(read, 100):
        told += more
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), max(told, default=0)


@pytest.mark.parametrize("action", failpoints.ACTIONS)
@pytest.mark.parametrize("how", HOWS)
def test_each_fault_at_each_time_that_each_point_is_reached(tmp_path, quick, whole, how, action):
    out = tmp_path / "place" / "out"
    codes = {"kill": {-9}, "torn": {-9}, "exit": {1}, "ENOSPC": {5, 0}, "EIO": {5, 0}}[action]
    with situation(how):
        points = counted(out, how)
        if how != "nothing":  # all else is as without an old output
            points = Counter({point: n for point, n in points.items() if point.startswith("staging.")})
        for point, times in points.items():
            for time in {1, times}:
                prepare(out, how)
                code, kept = in_a_child(out, f"{point}:{time}:{action}")
                assert code in codes, (point, time, code)
                check(out, kept, whole, how)


@pytest.mark.parametrize("number", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("again", ["", "+"], ids=["once", "from then on"])
def test_the_kth_operation_fails_for_every_k_until_a_run_comes_through(
    tmp_path, quick, whole, monkeypatch, number, again
):
    out, k, failed = tmp_path / "place" / "out", 0, True
    total = counted(out, "nothing").total()
    while failed or k <= total:
        k += 1
        prepare(out, "nothing")
        kept: list[int] = [0]
        with monkeypatch.context() as patch:
            patch.setenv(failpoints.VARIABLE, f"*:{k}{again}:{number}")
            failpoints.reset()
            try:
                run(out, kept.append)
                failed = False
            except ResourceError:
                failed = True
        assert not list(tmp_path.rglob("*.tmp")), "a temporary file was left"
        check(out, max(kept), whole)
    assert k == total + 1


# What a loss of power can leave. A disk keeps, of each file, what was last synced, or any part of what came after; of
# each folder, its entries when it was last synced, with those of the changes after that came through, in their order.


@dataclass
class Model:
    """What is on the disk for sure, and what may be: files and folders by their numbers."""

    contents: dict[int, bytes] = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, list[dict[str, int]]] = field(default_factory=dict)  # entries when synced, and after each change

    def copy(self) -> Model:
        return Model(dict(self.contents), dict(self.synced), {n: list(v) for n, v in self.folders.items()})

    def loose(self) -> list[int]:
        """Return the files whose contents a loss of power could still change."""
        return [n for n, data in self.contents.items() if self.synced.get(n) != data]


class Recorder:
    """Looks at a folder around each operation, and keeps a model of the disk at each of these moments.

    skipped  a point whose syncs are taken for not done
    """

    def __init__(self, root: Path, skipped: str = "") -> None:
        self.root, self.skipped, self.model = root, skipped, Model()
        self.moments: list[tuple[Model, int]] = []
        self.kept = 0
        self.handles: dict[int, int] = {}  # held open, so that no number is given twice
        self.look()
        for number, entries in self.model.folders.items():
            self.model.folders[number] = entries[-1:]

    def look(self) -> None:
        """Note what has changed since the last look."""
        for folder, _, _ in os.walk(self.root):
            entries = {}
            for entry in os.scandir(folder):
                number = entry.inode()
                if number not in self.handles:
                    self.handles[number] = os.open(entry.path, os.O_RDONLY)
                entries[entry.name] = number
                if entry.is_file():
                    self.model.contents[number] = Path(entry.path).read_bytes()
            versions = self.model.folders.setdefault(os.stat(folder).st_ino, [{}])
            if versions[-1] != entries:
                versions.append(entries)

    def synced(self, path: Path) -> None:
        number = path.stat().st_ino
        if path.is_dir():
            self.model.folders[number] = self.model.folders[number][-1:]
        else:
            self.model.synced[number] = self.model.contents[number]

    def keep(self) -> None:
        self.moments.append((self.model.copy(), self.kept))

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle)


OPERATIONS = ("write", "write_tensors", "append", "cut", "rename", "exchange", "remove", "remove_folder", "sync")


def watched(recorder: Recorder, name: str) -> Callable[..., object]:
    """Return an operation of the disk that `recorder` looks at."""
    real = getattr(disk, name)

    def operate(*args: object) -> object:
        recorder.look()
        recorder.keep()
        result = real(*args)
        recorder.look()
        if name in ("sync", "cut") and args[0] != recorder.skipped:
            recorder.synced(args[1])
        return result

    return operate


def recorded(root: Path, skipped: str = "") -> Recorder:
    """Do a run below `root`, whose syncs at the point `skipped` do nothing, and return what was seen of it."""
    recorder = Recorder(root, skipped)
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(disk, name, watched(recorder, name))

        def committed(count: int) -> None:
            recorder.kept = count

        run(root / "out", committed)
    recorder.look()
    recorder.keep()
    recorder.close()
    return recorder


Choose = Callable[[int, list[bytes]], bytes]


def torn(old: bytes, new: bytes) -> list[bytes]:
    """Return what can be left of a file: as synced, whole, cut at sectors or anywhere, of its length but empty."""
    cuts = [*range(0, len(new), 512), (len(old) + len(new)) // 2]
    parts = [new[:n] for n in cuts if n >= len(old)] if new[: len(old)] == old else []
    return [old, new, *parts, old + bytes(max(len(new) - len(old), 0))]


def states(model: Model, dice: random.Random) -> Iterator[tuple[dict[int, bytes], dict[int, dict[str, int]]]]:
    """Yield contents and entries that a loss of power could leave: the extremes, each file torn, and random ones."""
    first = {n: v[0] for n, v in model.folders.items()}
    last = {n: v[-1] for n, v in model.folders.items()}
    old = {n: model.synced.get(n, b"") for n in model.contents}
    for entries in (first, last):
        yield model.contents, entries
        yield old, entries
    for number in model.loose():
        for data in torn(old[number], model.contents[number]):
            yield {**model.contents, number: data}, last
            yield {**old, number: data}, last
    for _ in range(4):
        mixed = {n: dice.choice(torn(old[n], data)) for n, data in model.contents.items()}
        yield mixed, {n: dice.choice(v) for n, v in model.folders.items()}


def build(root: Path, top: int, data: dict[int, bytes], folders: dict[int, dict[str, int]]) -> None:
    """Write a state of the disk into `root`."""
    root.mkdir()
    for name, number in folders.get(top, {}).items():
        if number in data:
            (root / name).write_bytes(data[number])
        else:
            build(root / name, number, data, folders)


def tried(tmp_path: Path, recorder: Recorder, whole: dict[str, bytes]) -> int:
    """Go on from each state of each moment; return how many there were."""
    top = recorder.root.stat().st_ino
    dice, seen = random.Random(0), set()
    for model, kept in recorder.moments:
        for data, folders in states(model, dice):
            key = (kept, tree(top, data, folders))
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(tmp_path / "after", ignore_errors=True)
            build(tmp_path / "after", top, data, folders)
            check(tmp_path / "after" / "out", kept, whole)
    return len(seen)


def tree(top: int, data: dict[int, bytes], folders: dict[int, dict[str, int]]) -> tuple[object, ...]:
    """Return what tells two states of the disk apart."""
    entries = sorted(folders.get(top, {}).items())
    return tuple((name, data[n] if n in data else tree(n, data, folders)) for name, n in entries)


def test_no_loss_of_power_loses_what_was_committed(tmp_path, quick, whole, capsys):
    (tmp_path / "run").mkdir()
    assert tried(tmp_path, recorded(tmp_path / "run"), whole) > 300
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "point",
    [
        *("object.sync", "object.folder", "journal.sync", "journal.made"),
        *("file.sync", "staging.sync", "staging.parent"),
    ],
)
def test_a_sync_that_was_left_out_would_be_noticed(tmp_path, quick, whole, point):
    (tmp_path / "run").mkdir()
    recorder = recorded(tmp_path / "run", skipped=point)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever shows it
        tried(tmp_path, recorder, whole)
