"""How much memory a piece of work took at its highest, above what was in use when it began."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD; set, it no longer grows with what was freed


class PeakMemory:
    """Measure a `with` block; afterwards `bytes` is the highest use above that at entry, or None if it cannot be told.

    On CPU this is the process's resident set as Linux reports it (VmHWM, reset at entry), on CUDA the allocator's peak.

    above  what to count from instead, as `in_use` gave it: one baseline makes several pieces of work comparable
    """

    def __init__(self, device: torch.device | str = "cpu", above: int | None = None) -> None:
        self.device = torch.device(device)
        self.bytes: int | None = None
        self._above = above
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = in_use(self.device)
        else:
            before = in_use(self.device)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # 5 resets the high-water mark
                self._before = before
        if self._before is not None and self._above is not None:
            self._before = self._above
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        self.bytes = None if peak is None else max(peak - self._before, 0)


def in_use(device: torch.device | str = "cpu") -> int | None:
    """Return the bytes in use now, after handing back what is free; None if it cannot be told."""
    device = torch.device(device)
    release()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def release() -> None:
    """Hand back to the system what is free: glibc keeps it, in pieces that large tensors do not fit into again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_pieces() -> None:
    """Have glibc hand pieces of 4 MB and more back to the system as soon as they are freed, from now on."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 22)


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None
