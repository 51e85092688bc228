"""The only code that writes results: everything is staged beside its destination, synced, then renamed into place.

A folder that is published is whole or absent; an old one stays until the new one has taken its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from quantforge.errors import PlanError, ResourceError

MARK = "quantforge.json"


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
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise ResourceError(510, f"{folder} cannot be written to: {error.strerror}.") from error


@contextlib.contextmanager
def publish(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty staging folder beside `out`; on leaving, sync it and give it the name `out`.

    If the body raises, the staging folder is removed and `out` is as it was. Files get the mode that the user's umask
    gives to new files. ResourceError if the disk is full or fails.
    """
    try:
        out = _place(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        # not named after `out`, whose name may already be as long as the file system allows
        staging = Path(tempfile.mkdtemp(prefix=".quantforge.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise ResourceError(511, f"{out} could not be written: {error.strerror or error}.") from error
    try:
        yield staging
        _settle(staging)
        if overwrite and out.exists():
            _exchange(staging, out)
        else:
            os.rename(staging, out)
            _sync(out.parent)
    except OSError as error:
        raise ResourceError(511, f"{out} could not be written: {error.strerror or error}.") from error
    except SafetensorError as error:  # how safetensors reports a full disk
        raise ResourceError(511, f"{out} could not be written: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all, replacing an old one; parents are made.

    Raises ResourceError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        _sync(path.parent)
    except OSError as error:
        raise ResourceError(512, f"{path} could not be written: {error.strerror or error}.") from error


def _settle(folder: Path) -> None:
    """Give every file and folder below `folder`, and itself, the user's normal mode, and sync all of it to disk."""
    mask = _umask()
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            path.chmod(0o666 & ~mask)
            _sync(path)
        Path(root).chmod(0o777 & ~mask)
        _sync(Path(root))


def _exchange(staging: Path, out: Path) -> None:
    """Swap the two folders' names in one step, so that `out` is never absent; where that is impossible, in two."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renamed = (
        hasattr(libc, "renameat2") and libc.renameat2(here, os.fsencode(staging), here, os.fsencode(out), swap) == 0
    )
    if not renamed:
        aside = staging.with_suffix(".old")
        os.rename(out, aside)
        try:
            os.rename(staging, out)
        except OSError:
            os.rename(aside, out)
            raise
        shutil.rmtree(aside)
    _sync(out.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
