"""The only code that writes: everything is staged beside its destination, synced, then renamed into place.

A folder that is published is whole or absent; an old one stays until the new one has taken its name. Libraries that
write files of their own (a config, a tokenizer) are given the staging folder, which is synced before it takes its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from quantforge.errors import PlanError, ResourceError
from quantforge.store import disk, failpoints

if TYPE_CHECKING:
    from torch import Tensor

MARK = "quantforge.json"
_STAGING = (".quantforge.", ".tmp")  # how the names of staging folders begin and end


def check_target(out: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse, before any work, an output folder that exists, would destroy an input, or cannot be written.

    With `overwrite` a folder is replaced only if it is empty or holds nothing but what quantforge wrote.
    Raises PlanError, or ResourceError if the place cannot be read or written to.
    """
    target = out.resolve()
    for source in (p.resolve() for p in inputs):
        if target == source or source in target.parents:
            raise PlanError(
                260, f"--out {out} is the model's own folder or lies in it; choose a folder outside {source}."
            )
        if target in source.parents:
            raise PlanError(
                261, f"--out {out} contains the input {source}, which would be lost; choose another folder."
            )
    if _holds_current(target) or os.path.ismount(target):
        raise PlanError(
            269, f"--out {out} is a mount point, or is or holds the current folder; name a new folder inside it."
        )
    longest = os.pathconf("/", "PC_NAME_MAX")
    if len(os.fsencode(out.name)) > longest:
        raise PlanError(265, f"the last part of --out is longer than the {longest} bytes that a file name may have.")
    place = _place(out)
    put_back(out)
    if os.path.lexists(place):
        if not overwrite:
            raise PlanError(262, f"--out {out} exists; choose another folder, or give --overwrite to replace it.")
        try:
            _check_ours(out, place)
        except OSError as error:
            raise ResourceError(514, f"--out {out} cannot be read: {error.strerror or error}.") from error
    check_writable(place.parent)


def check_report_folder(out: Path, model: Path | None = None) -> None:
    """Refuse, before any work, a report folder that lies in the model's, is a file, or cannot be written."""
    if model is not None and (out.resolve() == model.resolve() or model.resolve() in out.resolve().parents):
        raise PlanError(266, f"--out {out} is the model's own folder or lies in it; choose another folder.")
    if os.path.lexists(out) and not out.is_dir():
        raise PlanError(267, f"--out {out} is a file; a report needs a folder.")
    check_writable(out)


def _check_ours(out: Path, place: Path) -> None:
    """Raise PlanError unless `place`, which the user calls `out`, is a folder of nothing but what we wrote."""
    if not place.is_dir() or place.is_symlink():
        raise PlanError(263, f"--out {out} is not a folder, and only a folder is ever replaced; remove it yourself.")
    names = {p.name for p in place.iterdir()}
    if names and not (place / MARK).is_file():
        raise PlanError(264, f"--out {out} was not written by quantforge (no {MARK} in it); it is left alone.")
    strangers = sorted(names - _written(place))
    if strangers:
        raise PlanError(
            268, f"--out {out} also holds {strangers[0]!r}, which quantforge did not write; move it away first."
        )


def _place(out: Path) -> Path:
    """Return `out` as an absolute path; a link is followed unless it is the last part."""
    return out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name


def _holds_current(target: Path) -> bool:
    """Tell whether the absolute path `target` is the current folder or one of its parents."""
    try:
        return Path.cwd().resolve().is_relative_to(target)
    except OSError:  # the current folder is gone
        return False


def _written(out: Path) -> set[str]:
    """Return the names of the files that a checkpoint says it is made of."""
    try:
        files = json.loads((out / MARK).read_text(encoding="utf-8"))["files"]
        return {MARK, *(name for name in files if isinstance(name, str))}
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return {MARK}


def check_writable(folder: Path) -> None:
    """Raise ResourceError unless a file can be written in `folder`, or in the nearest parent that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        staging, held = _make_staging(folder)
        try:
            disk.write("file.write", staging / "probe", b"probe")
            disk.sync("file.sync", staging / "probe")
            disk.rename("file.rename", staging / "probe", staging / "probed")
        finally:
            _leave(staging, held)
    except OSError as error:
        raise ResourceError(510, f"{folder} cannot be written to: {error.strerror or error}.") from error


@contextlib.contextmanager
def publish(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder beside `out`; on leaving, sync it and give it the name `out`.

    If the body raises, the staging folder is removed and `out` is as it was. Files get the mode that the user's umask
    gives to new files. What a process that was killed left in a staging folder is removed by the next one's.
    ResourceError if the disk is full or fails.
    """
    with _told(out):
        out = _place(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        put_back(out)
        sweep(out.parent)
        staging, held = _make_staging(out.parent)
    try:
        with _told(out):
            yield staging
            failpoints.reach("staging.filled")
            _settle(staging)
            if not (overwrite and out.exists()):
                disk.rename("staging.rename", staging, out)
            elif not disk.exchange("staging.exchange", staging, out):
                _replace(staging, out)
            disk.sync("staging.parent", out.parent)
    except ResourceError as error:  # of a file in the staging folder, whose name tells nobody anything
        raise ResourceError(error.number, str(error.args[0]).replace(str(staging), str(out))) from error
    finally:
        _leave(staging, held)


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    """Turn what the disk, or safetensors for it, says of `out` into a ResourceError."""
    try:
        yield
    except OSError as error:
        raise ResourceError(511, f"{out} could not be written: {error.strerror or error}.") from error
    except SafetensorError as error:  # how safetensors reports a full disk
        raise ResourceError(511, f"{out} could not be written: {error}.") from error


def _make_staging(parent: Path) -> tuple[Path, int | None]:
    """Make a locked staging folder in `parent`; return it, and what gives the lock back."""
    begin, end = _STAGING
    while True:
        failpoints.reach("staging.make")
        # not named after the output, whose name may already be as long as the file system allows
        staging = Path(tempfile.mkdtemp(prefix=begin, suffix=end, dir=parent))
        try:
            held = disk.lock(staging)
        except FileNotFoundError:  # swept away before it was locked
            continue
        except OSError:  # no locks here, so it is never swept either
            return staging, None
        if held is not None:
            return staging, held


def _leave(staging: Path, held: int | None) -> None:
    """Remove a staging folder, or what an exchange has left under its name, and give its lock back."""
    disk.remove_folder(staging)
    if held is not None:
        disk.unlock(held)


def sweep(parent: Path) -> None:
    """Remove the staging folders in `parent` whose makers are gone."""
    begin, end = _STAGING
    for folder in parent.glob(f"{begin}*{end}"):
        with contextlib.suppress(OSError):  # it is gone, another user's, or where no locks are
            held = disk.lock(folder) if folder.is_dir() and not folder.is_symlink() else None
            if held is not None:
                disk.remove_folder(folder)
                disk.unlock(held)


def discard(point: str, folder: Path) -> None:
    """Remove a folder so that it is whole or gone: it first gets the name of a staging folder, which is swept up."""
    begin, end = _STAGING
    aside = Path(tempfile.mkdtemp(prefix=begin, suffix=end, dir=folder.parent))
    try:
        disk.rename(point, folder, aside)
    finally:
        disk.remove_folder(aside)


def write_text(path: Path, text: str) -> None:
    """Write a small text file as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all, replacing an old one; parents are made.

    Raises ResourceError if it cannot be written.
    """
    _write(path, lambda fresh: disk.write("file.write", fresh, data))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all, as `write_bytes` does; tensors that share memory are refused."""
    _write(path, lambda fresh: disk.write_tensors("file.write", fresh, tensors, metadata or {}))


@contextlib.contextmanager
def stream(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Make a new file in a staging folder and yield what adds bytes to it; an error leaves no part of it.

    It is synced when its folder is published. Raises ResourceError if it cannot be written.
    """
    with _told(path), disk.stream("stream.write", path) as put:
        yield put


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a new file beside `path`, sync it and give it the name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mktemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            write(fresh)
            os.chmod(fresh, 0o666 & ~_umask())
            disk.sync("file.sync", fresh)
            disk.rename("file.rename", fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        disk.sync("file.folder", path.parent)
    except OSError as error:
        raise ResourceError(512, f"{path} could not be written: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise ResourceError(512, f"{path} could not be written: {error}.") from error


def _settle(folder: Path) -> None:
    """Give every file and folder below `folder`, and itself, the user's normal mode, and sync all of it to disk."""
    mask = _umask()
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            path.chmod(0o666 & ~mask)
            disk.sync("staging.sync", path)
        Path(root).chmod(0o777 & ~mask)
        disk.sync("staging.sync", Path(root))


def _replace(staging: Path, out: Path) -> None:
    """Give `staging` the name `out` in two steps, where names cannot be swapped; if that fails, undo it.

    Ended between the two, `put_back` undoes it.
    """
    aside = _aside(out)
    disk.rename("staging.aside", out, aside)
    try:
        disk.rename("staging.rename", staging, out)
    except OSError:
        os.rename(aside, out)
        raise
    disk.remove_folder(aside)


def put_back(out: Path) -> None:
    """Give an output that was moved away, by a process that ended before it could replace it, its name again."""
    out = _place(out)
    aside = _aside(out)
    if not aside.is_dir() or aside.is_symlink() or _at_work(out.parent):
        return
    if os.path.lexists(out):  # the new one is there
        disk.remove_folder(aside)
    else:
        with _told(out):
            disk.rename("staging.aside", aside, out)


def _at_work(parent: Path) -> bool:
    """Tell whether a process that lives has a staging folder in `parent`, and might be replacing an output."""
    begin, end = _STAGING
    for folder in parent.glob(f"{begin}*{end}"):
        with contextlib.suppress(OSError):
            held = disk.lock(folder)
            if held is None:
                return True
            disk.unlock(held)
    return False


def _aside(out: Path) -> Path:
    """Return where `out` lies while another takes its name; its own name may be as long as a name can be."""
    return out.with_name(f"{_STAGING[0]}{sha256(os.fsencode(out.name)).hexdigest()[:16]}.old")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
