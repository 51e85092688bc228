"""The journal of an unfinished run, a folder beside its output: what is committed survives any end of the process.

`OUT.qf/` holds LOCK, run.json (the inputs of the run), objects/ (tensors under the digest of their file) and journal
(a line for each commit, with its checksum). A line that is synced, and the objects it names, are a committed state.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantforge.errors import IdentityError, LockedError, PlanError, ResourceError, clean
from quantforge.store import MARK, check_writable, discard, disk, failpoints, lines, sweep, write_text

COMMIT_SECONDS = 20.0  # between commits; QUANTFORGE_COMMIT_SECONDS in the environment changes it
SCHEMA = 1
_KEPT = "what was committed is kept, and the same command goes on from there"
_SHOWN = 16  # characters of a digest that a message shows


class Journal:
    """The commits of a run and the objects they name; made by `Journal.open`.

    commits  what was committed before this opening, oldest first; all objects that it still needs are whole
    threads  threads that torch computed with when the run began: another number can give other bits
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads
        self.commits: tuple[Mapping[str, Any], ...] = ()
        self._lines: list[bytes] = []
        self._needed: set[str] = set()
        self._dropped: set[str] = set()  # by the last commit: kept until new work is put, should it be damaged
        self._fresh: list[str] = []  # put since the last commit, and not yet synced
        self._last = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, identity: Mapping[str, str], *, restart: bool = False) -> Iterator[Journal]:
        """Open the journal of the run that writes `out`, or begin it; it is this process's until the block is left.

        identity  what the run is made from, by names a message can show; digests for what is large
        restart   throw away what an earlier run has left

        A journal without a commit is removed on leaving; any other stays, also where the block raises, until `finish`.
        Raises LockedError if another process is at work on `out`, IdentityError naming each input that differs from
        the unfinished run's, ResourceError if the journal cannot be written.
        """
        folder = place(out)
        _wait()
        held = _take(folder, out)
        try:
            with _told(folder):
                if restart:
                    _clear(folder)
                journal = cls(folder, _check_identity(folder, out, identity))
                journal._recover()
            yield journal
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(held), os.stat(folder / "LOCK")) and not _held_lines(folder):
                    discard("journal.finish", folder)
            disk.unlock(held)

    def put(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> str:
        """Keep tensors, of any device, and facts (JSON) in an object; return its name. `commit` makes it last.

        Raises ResourceError if it cannot be written.
        """
        fresh = self._path(f"{len(self._fresh)}.tmp")
        with _told(self.folder):
            self._drop()
            try:
                facts = {"about": json.dumps(about or {})}
                disk.write_tensors("object.write", fresh, _own(tensors), facts)
                name = _digest(fresh)
                if name in self._needed or name in self._fresh:
                    return name
                disk.rename("object.rename", fresh, self._path(name))
            finally:
                disk.remove_quietly(fresh)
        self._fresh.append(name)
        return name

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors, which may be views of the file, and the facts of an object."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
                about: dict[str, Any] = json.loads((file.metadata() or {})["about"])
        except (OSError, SafetensorError) as error:
            raise ResourceError(532, f"{self._path(name)} can no longer be read: {error}.") from error
        return tensors, about

    def commit(self, facts: Mapping[str, Any]) -> None:
        """Make a state last: sync the objects put since the last commit, then add a line with `facts` and sync it.

        facts  JSON; names of objects stand, alone or in lists or mappings, under keys that end in "object" or
               "objects"; those put before and not named by the first commit after are removed. Under "drop": names of
               objects that are needed no longer

        Raises ResourceError if it could not be made to last; the states before still do.
        """
        named, dropped = lines.named(facts), set(facts.get("drop", ()))
        assert named <= self._needed | set(self._fresh), "a commit names an object that was never put"
        line = lines.make(len(self._lines), facts)
        with _told(self.folder):
            self._sync_objects(sorted(named - self._needed))
            self._append(line)
        self._lines.append(line)
        self._needed = (self._needed - dropped) | named
        self._dropped |= dropped | (set(self._fresh) - named)
        self._fresh = []
        self._last = time.monotonic()
        with _told(self.folder):
            failpoints.reach("journal.committed")

    def due(self) -> bool:
        """Tell whether the last commit is so long ago that the work since should be committed."""
        return time.monotonic() - self._last >= _wait()

    def published(self, staging: Path) -> None:
        """Commit that the output is whole in `staging`, just before it takes its name; see `finished`."""
        self.commit({"published": _digest(staging / MARK)})

    def finish(self) -> None:
        """Remove the journal: the output is published, and nothing is left to go on with."""
        with _told(self.folder):
            discard("journal.finish", self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / "objects" / name

    def _recover(self) -> None:
        """Read the commits, fall back to the last whole one, cut off what is behind it, remove what nobody needs."""
        file = self.folder / "journal"
        data = _held_lines(self.folder)
        rows, commits = lines.read(data)
        whole = data.count(b"\n")  # a last line without an end was never committed
        kept = len(commits)
        sound: dict[str, bool] = {}
        while kept and not all(self._sound(name, sound) for name in lines.state(commits[:kept])[0]):
            kept -= 1
        if kept < whole:
            sys.stderr.write(
                f"{clean(str(self.folder))}: damaged after commit {kept} of {whole}; goes on from there.\n"
            )
        self._lines = rows[:kept]
        self.commits = tuple(commits[:kept])
        size = sum(map(len, self._lines))
        if size < len(data):
            disk.cut("journal.cut", file, size)
        elif data:  # a process that was killed may have written the last line, and not synced it
            disk.sync("journal.sync", file)
            disk.sync("object.folder", self.folder)
        self._needed, self._dropped = lines.state(commits[:kept])
        known = self._needed | self._dropped
        for path in (self.folder / "objects").iterdir():
            if path.name not in known:
                disk.remove("journal.drop", path)

    def _sound(self, name: str, known: dict[str, bool]) -> bool:
        """Tell, reading each object once, whether it is there and has the bytes that it is named after."""
        if name not in known:
            path = self._path(name)
            known[name] = path.is_file() and _digest(path) == name
        return known[name]

    def _sync_objects(self, names: list[str]) -> None:
        """Make objects last; one that a disk failed to sync is written again under a new name, and not synced again."""
        for name in names:
            try:
                disk.sync("object.sync", self._path(name))
            except OSError:
                self._rewrite(name)
        if names:
            disk.sync("object.folder", self.folder / "objects")

    def _rewrite(self, name: str) -> None:
        """Write an object once more, from what can still be read of it if that is whole."""
        data = self._path(name).read_bytes()
        if sha256(data).hexdigest() != name:
            raise OSError(f"object {name[:_SHOWN]} was lost by the disk")
        fresh = self._path("again.tmp")
        try:
            disk.write("object.write", fresh, data)
            disk.sync("object.sync", fresh)
            disk.rename("object.rename", fresh, self._path(name))
        finally:
            disk.remove_quietly(fresh)

    def _append(self, line: bytes) -> None:
        """Add a line and sync it; if that fails the whole journal is written once more under a new name."""
        file = self.folder / "journal"
        first = not self._lines
        disk.append("journal.append", file, line)
        try:
            disk.sync("journal.sync", file)
        except OSError:
            write_text(file, b"".join([*self._lines, line]).decode())
            return
        if first:
            disk.sync("object.folder", self.folder)

    def _drop(self) -> None:
        """Remove what the last commit no longer needs."""
        while self._dropped:
            name = self._dropped.pop()
            if name not in self._needed:
                disk.remove("journal.drop", self._path(name))


def place(out: Path) -> Path:
    """Return the folder of the journal of the run that writes `out`."""
    out = out.parent.resolve() / out.name if out.name not in ("", "..") else out.resolve()
    name = f"{out.name}.qf"
    if len(os.fsencode(name)) > os.pathconf("/", "PC_NAME_MAX"):
        name = f"{sha256(os.fsencode(out.name)).hexdigest()[:_SHOWN]}.qf"
    return out.with_name(name)


def size(out: Path) -> int:
    """Return the bytes that the journal of the run that writes `out` takes on disk already."""
    return sum(file.stat().st_size for file in place(out).rglob("*") if file.is_file())


def check_free(out: Path) -> None:
    """Raise LockedError, naming the holder, if another process is at work on `out` just now."""
    lock = place(out) / "LOCK"
    with contextlib.suppress(OSError):
        held = disk.lock(lock) if lock.is_file() else -1
        if held is None:
            raise _locked(out)
        if held != -1:
            disk.unlock(held)


def _wait() -> float:
    """Return the seconds between commits; PlanError for what is no number of them."""
    asked = os.environ.get("QUANTFORGE_COMMIT_SECONDS") or str(COMMIT_SECONDS)
    try:
        return float(asked)
    except ValueError:
        raise PlanError(285, f"QUANTFORGE_COMMIT_SECONDS is {asked!r}, which is no number of seconds.") from None


def finished(out: Path) -> bool:
    """Tell whether `out` was published by the run whose journal lies beside it, which only had no time to remove it."""
    try:
        commits = lines.read(_held_lines(place(out)))[1]
        return bool(commits) and commits[-1].get("published") == _digest(out / MARK)
    except OSError:
        return False


def commits(out: Path) -> int:
    """Return how many commits lie in the journal of the run that writes `out`; 0 where there is none."""
    folder = place(out)
    return len(lines.read(_held_lines(folder))[1])


def _take(folder: Path, out: Path) -> int:
    """Make the journal's folder and lock it for this process; LockedError, naming the holder, if another has it."""
    while True:
        held = None
        try:
            if folder.is_dir() and not (folder / "LOCK").exists() and any(folder.iterdir()):
                raise PlanError(
                    284,
                    f"{folder}, where the unfinished work of --out {out} is kept, holds something else; choose "
                    "another --out.",
                )
            folder.mkdir(parents=True, exist_ok=True)
            held = disk.lock(folder / "LOCK")
            if held is not None:
                about = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
                disk.sign(held, json.dumps(about).encode())
                disk.sync("journal.made", folder.parent)
                sweep(folder.parent)
                return held
        except FileNotFoundError:  # a run that finished removed it between the two
            continue
        except OSError as error:
            if held is not None:
                disk.unlock(held)
            check_writable(folder.parent)
            raise ResourceError(530, f"{folder} cannot be made or locked: {error.strerror or error}.") from error
        raise _locked(out)


def _locked(out: Path) -> LockedError:
    """Return the error for an output that another process is writing."""
    holder = _holder(place(out))
    return LockedError(610, f"--out {out} is being written by {holder}; wait for it, or name another folder.")


def _holder(folder: Path) -> str:
    """Return who holds the lock, as far as can be read."""
    try:
        about = json.loads((folder / "LOCK").read_text(encoding="utf-8"))
        age = max(time.time() - float(about["started"]), 0)
        return f"process {int(about['pid'])} on {about['host']} for {age:.0f} s"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # it is writing just now
        return "another process"


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn what the disk says of the journal into a ResourceError."""
    try:
        yield
    except OSError as error:
        raise ResourceError(531, f"{folder} could not be written: {error.strerror or error}; {_KEPT}.") from error
    except SafetensorError as error:
        raise ResourceError(531, f"{folder} could not be written: {error}; {_KEPT}.") from error


def _held_lines(folder: Path) -> bytes:
    """Return what stands in the journal in `folder`, if there is one."""
    try:
        return (folder / "journal").read_bytes()
    except FileNotFoundError:
        return b""


def _clear(folder: Path) -> None:
    """Remove all but the lock; the journal first, so that no line names an object that is gone."""
    for name in ("journal", "run.json"):
        disk.remove("journal.drop", folder / name)
    if (folder / "objects").exists():
        discard("journal.finish", folder / "objects")


def _check_identity(folder: Path, out: Path, identity: Mapping[str, str]) -> int:
    """Write the identity of a new run, or hold an unfinished one's against `identity`; return the run's threads."""
    file = folder / "run.json"
    (folder / "objects").mkdir(exist_ok=True)
    if not lines.read(_held_lines(folder))[1]:  # nothing is lost
        run = {"schema": SCHEMA, "identity": dict(identity), "threads": torch.get_num_threads()}
        write_text(file, json.dumps(run, indent=1) + "\n")
        return torch.get_num_threads()
    advice = "give --restart to throw it away, or what it began with to go on"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        old, threads = dict(run["identity"]), int(run["threads"])
        readable = run["schema"] == SCHEMA
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        readable = False
    if not readable:
        raise IdentityError(601, f"the inputs of the unfinished run of {out} cannot be read from {file}; {advice}.")
    names = [name for name in (*old, *(n for n in identity if n not in old)) if old.get(name) != identity.get(name)]
    if names:
        said = "; ".join(f"{name} was {_short(old.get(name))}, is {_short(identity.get(name))}" for name in names)
        raise IdentityError(600, f"the unfinished run of {out} had other inputs: {said}; {advice}.")
    return threads


def _short(value: str | None) -> str:
    if value is None:
        return "not set"
    digest = len(value) == 64 and all(c in "0123456789abcdef" for c in value)
    return value[:_SHOWN] if digest else repr(value)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, each with memory of its own, which safetensors asks for."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found
