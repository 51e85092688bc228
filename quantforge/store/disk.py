"""The operations on the disk that all writing is made of: each is a failpoint, and each stands alone, so that a test
can record their order and try what a loss of power after any of them leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantforge.store import failpoints

if TYPE_CHECKING:
    from torch import Tensor

_locked: set[int] = set()  # file descriptors that hold a lock


def write(point: str, path: Path, data: bytes) -> None:
    """Write a new file; it is not synced, and an error leaves no part of it."""
    with stream(point, path) as put:
        put(data)


@contextlib.contextmanager
def stream(point: str, path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Make a new file and yield what adds bytes to it; it is not synced, and an error leaves no part of it."""
    with open(path, "xb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            torn = failpoints.reach(point)
            rest = memoryview(data).cast("B")
            if torn:
                rest = rest[: len(rest) // 2]
            while rest:
                rest = rest[file.write(rest) :]
            if torn:
                failpoints.kill()

        try:
            yield put
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_tensors(point: str, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new safetensors file; it is not synced, and an error leaves no part of it.

    Raises OSError or SafetensorError.
    """
    from safetensors.torch import save_file

    torn = failpoints.reach(point)
    try:
        save_file(dict(tensors), path, dict(metadata))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if torn:
        os.truncate(path, path.stat().st_size // 2)
        failpoints.kill()


def append(point: str, path: Path, data: bytes) -> None:
    """Add bytes to the end of a file, making it if need be; it is not synced, and an error leaves it as it was."""
    torn = failpoints.reach(point)
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        rest = memoryview(data)[: len(data) // 2 if torn else len(data)]
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            raise
    if torn:
        failpoints.kill()


def cut(point: str, path: Path, size: int) -> None:
    """Shorten a file to `size` bytes and sync it."""
    failpoints.reach(point)
    with open(path, "r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def sync(point: str, path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk; a failure must never be tried again."""
    failpoints.reach(point)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(point: str, old: Path, new: Path) -> None:
    """Give a file or folder a new name, in place of a file that had it; lasting once the folder is synced."""
    failpoints.reach(point)
    os.rename(old, new)


def exchange(point: str, one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; return False, with nothing done, where that is impossible."""
    failpoints.reach(point)
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    known = hasattr(libc, "renameat2")
    return known and libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def remove(point: str, path: Path) -> None:
    """Remove a file, if it is there."""
    failpoints.reach(point)
    path.unlink(missing_ok=True)


def remove_quietly(path: Path) -> None:
    """Remove a file that nobody needs, as far as that is possible."""
    with contextlib.suppress(OSError):
        path.unlink()


def remove_folder(path: Path) -> None:
    """Remove a folder that nobody needs, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)


def lock(path: Path) -> int | None:
    """Lock a file (made if need be) or a folder for this process; return what `unlock` takes, None if it is held.

    The lock ends with the process. Raises OSError where the file system has no locks.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    while True:
        handle = os.open(path, flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.lexists(path) and os.path.samestat(os.fstat(handle), os.stat(path))
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        if mine:
            _locked.add(handle)
            return handle
        os.close(handle)  # it was removed or replaced meanwhile


def sign(handle: int, data: bytes) -> None:
    """Write into the file of a lock who holds it; nothing relies on that being there."""
    os.ftruncate(handle, 0)
    os.pwrite(handle, data, 0)


def unlock(handle: int) -> None:
    """Give a lock back."""
    _locked.discard(handle)
    os.close(handle)


def _forked() -> None:
    """Close the locks in a process that was forked, which would else keep them when its parent is gone."""
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_forked)
