"""Being asked to stop: told once, also while a library computes; the second time it ends at once; all is put back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quantforge import cli, pipeline, stopping
from quantforge.errors import Stopped

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "data" / "tiny-llama"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

# one call into a library that takes minutes, during which no handler of Python's runs
LONG = """
import hashlib, sys
from quantforge.stopping import deferring, watching
with watching(), deferring():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 400_000_000)
"""
SHORT = """
import sys, time
from quantforge.stopping import asked, deferring, watching
with watching(), deferring():
    print("ready", flush=True)
    while not asked():
        time.sleep(0.01)
    sys.exit(75)
"""


def heeded() -> None:
    """Have no signal ignored, as they are in what a shell starts in the background."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def started(code: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = [sys.executable, "-c", code]
    with subprocess.Popen(run, text=True, env=environment, preexec_fn=heeded, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> str:
    """Wait for the line that answers a signal."""
    assert process.stderr.readline() == "\n"
    return process.stderr.readline()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_wish(number):
    with started(SHORT) as process:
        process.send_signal(number)
        assert "once more to stop at once" in told(process)
        assert process.wait() == 75


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_ends_the_process_at_once_even_while_a_library_computes(number):
    with started(LONG) as process:
        process.send_signal(signal.SIGTERM)
        told(process)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait() == 128 + number


def test_handlers_and_threads_are_as_before_afterwards():
    handlers, threads = [signal.getsignal(n) for n in SIGNALS], threading.active_count()
    for _ in range(2):
        with stopping.watching(), stopping.deferring():
            assert not stopping.asked()
            os.kill(os.getpid(), signal.SIGTERM)
            while not stopping.asked():
                time.sleep(0.001)
        assert not stopping.asked()
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_where_nothing_is_kept_piece_by_piece_it_ends_and_names_the_command():
    def asked_for() -> None:
        with stopping.watching("quantforge quantize x"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    with pytest.raises(Stopped, match=r"what was committed is kept; go on with: quantforge quantize x"):
        asked_for()
    assert not stopping.asked()


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.watching():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_done():
    found = []

    def other() -> None:
        with stopping.watching():
            found.append((stopping.asked(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [(False, signal.getsignal(signal.SIGTERM))]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put back the handlers that a command sets."""
    before = [signal.getsignal(n) for n in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def quantize(out: Path, *more: str) -> Result:
    asked = ["quantize", str(TINY), "--method", "rtn", "--out", str(out), *more]
    return CliRunner().invoke(cli.main, asked)


@pytest.mark.parametrize("number", SIGNALS)
def test_quantize_keeps_what_is_done_exits_with_75_and_goes_on_when_called_again(
    number, monkeypatch, tmp_path, handlers
):
    def told(*args: object, **more: object) -> object:
        solved.append(args)
        if len(solved) == 3:
            os.kill(os.getpid(), number)
            while not stopping.asked():
                time.sleep(0.001)
        return real(*args, **more)

    solved: list[object] = []
    real = pipeline.solve
    monkeypatch.setattr(pipeline, "solve", told)
    signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have it ignored
    stopped = quantize(tmp_path / "out")
    assert stopped.exit_code == Stopped.exit_code == 75, stopped.output
    assert "error[QF-620]: stopped" in stopped.stderr
    assert os.listdir(tmp_path) == ["out.qf"]
    assert len(solved) == 3
    again = quantize(tmp_path / "out")
    assert again.exit_code == 0, again.output
    stages = len(solved)
    assert os.listdir(tmp_path) == ["out"]
    assert quantize(tmp_path / "whole").exit_code == 0
    assert stages == len(solved) - stages, "work was done twice"
    for file in sorted(path.name for path in (tmp_path / "whole").iterdir()):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("out", "whole"))
        assert one.replace(b"out", b"whole") == other.replace(b"out", b"whole"), file


def test_a_text_that_the_model_still_writes_does_not_keep_it_from_stopping(tmp_path, monkeypatch, handlers):
    def write(*args: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("quantforge.api.generating.self_text", write)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stopped = quantize(tmp_path / "out", "--method", "gptq", "--group-size", "32", "--calib", "self")
    assert stopped.exit_code == 75, stopped.output
    assert "error[QF-621]: stopped, and what was committed is kept; go on with: " in stopped.stderr
    assert os.listdir(tmp_path) == []


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("a bug"), 70, "ZeroDivisionError: a bug"),
        (MemoryError(), 5, "error[QF-533]: memory ran out: no more is given; fewer --samples"),
        (
            RuntimeError("[x] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            5,
            "9 bytes;",
        ),
        (RuntimeError("another"), 70, "RuntimeError: another"),
    ],
    ids=["interrupt", "bug", "memory", "torch's memory", "runtime"],
)
def test_other_ends_have_their_codes(monkeypatch, error, code, says):
    monkeypatch.setattr("quantforge.recipe.catalogue", lambda: fail(error))
    result = CliRunner().invoke(cli.main, ["methods"])
    assert result.exit_code == code
    assert says in result.stderr
