"""Peak memory: what a block took at its highest, not what it kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantforge import memory
from quantforge.memory import PeakMemory

MB = 1_000_000


def touch(megabytes: int) -> torch.Tensor:
    """Allocate and write `megabytes`; larger than what an allocator keeps for later."""
    return torch.ones(megabytes * MB, dtype=torch.uint8)


def measurable() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


needs_proc = pytest.mark.skipif(not measurable(), reason="the kernel does not let the high-water mark be reset")


@needs_proc
@pytest.mark.parametrize("kept", [True, False])
def test_an_allocation_is_seen_whether_or_not_it_is_kept(kept):
    with PeakMemory() as peak:
        block = touch(100)
        if not kept:
            del block
    assert peak.bytes == pytest.approx(100 * MB, rel=0.3)


@needs_proc
def test_what_was_in_use_before_is_not_counted():
    block = touch(150)
    with PeakMemory() as peak:
        pass
    assert peak.bytes is not None
    assert 0 <= peak.bytes < 10 * MB
    assert len(block) == 150 * MB


@needs_proc
def test_an_earlier_peak_is_not_counted():
    block = touch(150)
    del block
    with PeakMemory() as peak:
        touch(40)
    assert peak.bytes == pytest.approx(40 * MB, rel=0.3)


@needs_proc
def test_blocks_of_one_after_another_do_not_add_up():
    with PeakMemory() as peak:
        for _ in range(5):
            block = touch(60)
            del block
    assert peak.bytes == pytest.approx(60 * MB, rel=0.3)


@needs_proc
def test_an_error_passes_through_and_the_peak_is_told_all_the_same():
    peak = PeakMemory()

    def fail() -> None:
        with peak:
            block = touch(50)
            raise KeyError(len(block))

    with pytest.raises(KeyError):
        fail()
    assert peak.bytes == pytest.approx(50 * MB, rel=0.3)


@pytest.mark.parametrize("broken", ["write_text", "read_text"])
def test_where_it_cannot_be_told_it_is_none(monkeypatch, broken):
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(memory.Path, broken, refuse)
    with PeakMemory() as peak:
        touch(1)
    assert peak.bytes is None


def test_a_status_without_the_field_is_none(monkeypatch):
    monkeypatch.setattr(memory.Path, "write_text", lambda self, text: len(text))
    monkeypatch.setattr(memory.Path, "read_text", lambda self: "Name:\tpython\n")
    with PeakMemory() as peak:
        pass
    assert peak.bytes is None
