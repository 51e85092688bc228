"""Being asked to stop: the first signal lets the work come to a point where it can be gone on with, the second ends it.

Where work is not kept piece by piece, as in loading and saving, the first ends it as well: nothing more would be kept.
A thread reads the signals, since Python's own handlers wait until a long computation in a library has returned.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from quantforge.errors import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_asked = threading.Event()
_deferring = threading.Event()


def asked() -> bool:
    """Tell whether this process was asked to stop while `watching`."""
    return _asked.is_set()


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Let `asked` be looked at, until the block is left, by whoever can keep what is done."""
    _deferring.set()
    try:
        yield
    finally:
        _deferring.clear()


def going_on(command: str) -> str:
    """Return how a run is gone on with, by the command line `command`; "" if there is none."""
    return f"go on with: {command}" if command else "the same call goes on from here."


@contextlib.contextmanager
def watching(command: str = "") -> Iterator[None]:
    """Take SIGINT, SIGTERM and SIGHUP for a wish to stop until the block is left.

    While `deferring`, `asked` tells of it; else Stopped is raised, which names the `command` that goes on. A second one
    ends the process at once with 128 + its number; nothing that was committed is lost by that. Signals that are ignored
    (nohup) stay so. Outside the main thread, which alone can be signalled, nothing is done.
    """
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handlers = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}

    def handle(number: int, frame: FrameType | None) -> None:
        if not _deferring.is_set():
            raise Stopped(621, f"stopped, and what was committed is kept; {going_on(command)}")

    for number in handlers:
        signal.signal(number, handle)
    watcher = threading.Thread(target=_watch, args=(read, frozenset(handlers)), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(write)  # the watcher reads the end of the pipe and returns
        watcher.join()
        os.close(read)
        _asked.clear()


def _watch(read: int, numbers: frozenset[int]) -> None:
    """Read the numbers of signals as they come."""
    while number := os.read(read, 1):
        if number[0] not in numbers:
            continue
        if _asked.is_set():
            os._exit(128 + number[0])
        _asked.set()
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            sys.stderr.write("\nstopping as soon as the work so far can be kept; once more to stop at once\n")
            sys.stderr.flush()
