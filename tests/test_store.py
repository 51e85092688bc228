"""The store: a folder that is published is whole or absent, and what quantforge did not write is left alone."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantforge import store
from quantforge.errors import PlanError, QuantForgeError, ResourceError
from quantforge.journal import Journal
from quantforge.store import MARK, check_target, disk, failpoints, publish, write_text


def mark(text: str) -> str:
    return json.dumps({"about": text, "files": ["deep"]})


def fill(folder: Path, text: str) -> None:
    (folder / MARK).write_text(mark(text))
    (folder / "deep").mkdir()
    (folder / "deep" / "weights").write_text(text * 100)


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def whole(text: str) -> dict[str, str]:
    return {MARK: mark(text), "deep/weights": text * 100}


@pytest.fixture
def old(tmp_path) -> Path:
    out = tmp_path / "place" / "out"
    out.mkdir(parents=True)
    fill(out, "old")
    return out


def save(out: Path, text: str = "new", overwrite: bool = False) -> None:
    with publish(out, overwrite=overwrite) as staging:
        fill(staging, text)


class TroubleError(Exception):
    """What a body raises."""


def test_a_new_folder_appears_only_when_it_is_whole(tmp_path):
    with publish(tmp_path / "out") as staging:
        assert staging.parent == tmp_path
        fill(staging, "new")
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path / "out") == whole("new")
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_folder_stays_until_the_new_one_is_whole(old):
    with publish(old, overwrite=True) as staging:
        fill(staging, "new")
        assert contents(old) == whole("old")
    assert contents(old) == whole("new")
    assert os.listdir(old.parent) == ["out"]


@pytest.mark.parametrize("error", [TroubleError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_an_error_in_the_body_leaves_things_as_they_were(old, error, exists):
    def broken(out: Path) -> None:
        with publish(out, overwrite=True) as staging:
            fill(staging, "new")
            raise error

    with pytest.raises(error):
        broken(old if exists else old.parent / "other")
    assert contents(old) == whole("old")
    assert os.listdir(old.parent) == ["out"]


def failing(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Let the `call`-th use of os.`name` fail as a full disk does."""
    real, count = getattr(os, name), [0]

    def fail(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(store.os, name, fail)


class NoExchange:
    """A C library whose renameat2 is refused, as by file systems that cannot exchange names."""

    def renameat2(self, *args: object) -> int:
        return -1


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize(("name", "call"), [("fsync", n) for n in (1, 2, 3, 4)] + [("rename", n) for n in (1, 2)])
@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_fails_at_any_step_leaves_the_old_or_the_new_and_no_staging(
    old, monkeypatch, exists, name, call, exchange
):
    out = old if exists else old.parent / "other"
    if not exchange:
        monkeypatch.setattr(disk.ctypes, "CDLL", lambda *args, **kwargs: NoExchange())
    failing(monkeypatch, name, call)
    failed = None
    try:
        save(out, overwrite=True)
    except ResourceError as error:
        failed = error
    if failed is None:
        assert name == "rename", "an fsync that failed went unnoticed"
        assert contents(out) == whole("new")
    else:
        assert "No space left on device" in str(failed)
        assert not exists or contents(out) in (whole("old"), whole("new"))
        assert exists or not out.exists() or contents(out) == whole("new")
    assert contents(old) in (whole("old"), whole("new"))
    assert sorted(os.listdir(old.parent)) == sorted({"out", out.name} if out.exists() else {"out"})


def test_where_names_cannot_be_exchanged_the_old_folder_is_still_replaced(old, monkeypatch):
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *args, **kwargs: NoExchange())
    save(old, overwrite=True)
    assert contents(old) == whole("new")
    assert os.listdir(old.parent) == ["out"]


@pytest.mark.parametrize("moment", ["staging.rename:1:kill", "staging.parent:1:kill"])
def test_an_old_folder_that_was_moved_away_when_the_power_went_gets_its_name_back(old, monkeypatch, moment):
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *args, **kwargs: NoExchange())
    monkeypatch.setenv("QUANTFORGE_FAILPOINT", moment)
    child = os.fork()
    if not child:
        store.failpoints.reset()
        save(old, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    monkeypatch.delenv("QUANTFORGE_FAILPOINT")
    assert old.exists() == (moment != "staging.rename:1:kill")
    with pytest.raises(PlanError, match="exists"):  # and so nothing is replaced that nobody wants replaced
        store.check_target(old, overwrite=False)
    assert contents(old) == (whole("old") if moment == "staging.rename:1:kill" else whole("new"))
    save(old, overwrite=True)
    assert contents(old) == whole("new")
    assert os.listdir(old.parent) == ["out"]


def test_what_a_process_that_lives_has_moved_away_is_left_to_it(old, monkeypatch):
    """Between the two renames of one process another one looks."""
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *args, **kwargs: NoExchange())
    real, seen = disk.rename, []

    def rename(point: str, one: Path, other: Path) -> None:
        if point == "staging.rename":
            child = os.fork()
            if not child:
                store.put_back(old)
                os._exit(old.exists())
            seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        real(point, one, other)

    monkeypatch.setattr(disk, "rename", rename)
    save(old, overwrite=True)
    assert seen == [0]
    assert contents(old) == whole("new")


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(disk, "sync", lambda point, path: done.append(path.name))
    real = os.rename
    monkeypatch.setattr(store.os, "rename", lambda a, b: (done.append("rename"), real(a, b)))
    save(tmp_path / "out")
    before = done[: done.index("rename")]
    assert {MARK, "weights", "deep"} <= set(before)
    assert len(before) == 4
    assert done[done.index("rename") + 1 :] == [tmp_path.name]


def test_without_overwrite_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    def late() -> None:
        with publish(tmp_path / "out") as staging:
            fill(staging, "new")
            (tmp_path / "out").mkdir()
            fill(tmp_path / "out", "other")

    with pytest.raises(ResourceError):
        late()
    assert contents(tmp_path / "out") == whole("other")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_quantforge_wrote_is_replaced_only_when_asked(old, overwrite):
    if overwrite:
        check_target(old, overwrite=True)
        return
    with pytest.raises(PlanError, match=r"--overwrite") as caught:
        check_target(old, overwrite=False)
    assert str(old) in str(caught.value)


def test_an_empty_folder_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    check_target(tmp_path / "out", overwrite=True)
    save(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == whole("new")


@pytest.mark.parametrize("kind", ["foreign folder", "file", "link to a folder of ours", "link to nothing"])
def test_what_quantforge_did_not_write_is_never_replaced(tmp_path, old, kind):
    out = tmp_path / "target"
    if kind == "foreign folder":
        out.mkdir()
        (out / "thesis.tex").write_text("years")
    elif kind == "file":
        out.write_text("years")
    else:
        out.symlink_to(old if "ours" in kind else tmp_path / "nothing")
    for overwrite in (True, False):
        with pytest.raises(PlanError) as caught:
            check_target(out, overwrite=overwrite)
        assert caught.value.number == (262 if not overwrite else 264 if kind == "foreign folder" else 263)
    assert os.path.lexists(out)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    "where", ["model", "model/", "model/sub", "model/sub/deep", ".", "..", "link", "link/sub", "x/../model"]
)
def test_an_output_that_is_holds_or_lies_in_the_model_is_refused(tmp_path, monkeypatch, where, overwrite):
    place = tmp_path / "place"
    model = place / "model"
    model.mkdir(parents=True)
    fill(model, "weights")
    (place / "link").symlink_to(model)
    monkeypatch.chdir(place)
    before = contents(tmp_path)
    for source in (Path("model"), model, Path("link")):
        with pytest.raises(PlanError) as caught:
            check_target(Path(where), overwrite=overwrite, inputs=(source,))
        assert caught.value.number == (261 if where in (".", "..") else 260)
    assert contents(tmp_path) == before


def test_a_folder_beside_the_model_whose_name_begins_alike_is_fine(tmp_path):
    (tmp_path / "model").mkdir()
    check_target(tmp_path / "model-gptq", overwrite=False, inputs=(tmp_path / "model",))
    check_target(tmp_path / "new" / "parents" / "out", overwrite=False, inputs=(tmp_path / "model",))
    save(tmp_path / "new" / "parents" / "out")


def test_a_place_that_cannot_be_written_to_is_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    file = tmp_path / "file"
    for out, there in ((file / "out", file), (file / "sub" / "out", file), (Path("/proc/quantforge/out"), "/proc")):
        with pytest.raises(ResourceError) as caught:
            check_target(out, overwrite=False)
        assert f"{there} cannot be written to" in str(caught.value)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store.tempfile, "mkdtemp", refuse)
    with pytest.raises(ResourceError, match=r"cannot be written to: Permission denied"):
        check_target(tmp_path / "out", overwrite=False)


NAMES = ["a b", "模型 ü", "-rf", "--out", "*", "$HOME", "'\"", "a\nb", "n" * 200, "ü" * 100, ".hidden"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_work(tmp_path, name):
    for _ in range(2):
        check_target(tmp_path / name, overwrite=True)
        save(tmp_path / name, overwrite=True)
    write_text(tmp_path / f"{name}.md", "text")
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name}.md"])
    assert contents(tmp_path / name) == whole("new")


@pytest.mark.parametrize("length", [240, 250, 255, 256, 1000])
def test_a_name_that_is_too_long_works_or_is_refused_in_a_line_before_any_work(tmp_path, length):
    out = tmp_path / ("n" * length)
    refused = None
    try:
        check_target(out, overwrite=False)
    except QuantForgeError as error:
        refused = str(error)
    if refused is None:
        save(out)
        assert contents(out) == whole("new")
    else:
        assert "\n" not in refused
        assert os.listdir(tmp_path) == []


def test_a_text_that_is_too_long_named_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ResourceError, match=r"could not be written"):
        write_text(tmp_path / ("n" * 300), "text")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_text_gets_the_mode_that_the_umask_gives_and_stands_as_it_is_given(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "new" / "deep" / "a.md", "ü\n\r\nend")
        write_text(tmp_path / "new" / "deep" / "a.md", "ü\n\r\nnew")
    finally:
        os.umask(before)
    file = tmp_path / "new" / "deep" / "a.md"
    assert file.read_bytes() == "ü\n\r\nnew".encode()
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.listdir(file.parent) == ["a.md"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "rename"])
def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, step):
    write_text(tmp_path / "a.md", "old")
    failing(monkeypatch, step, 1)
    with pytest.raises(ResourceError, match=r"a\.md could not be written: No space left on device"):
        write_text(tmp_path / "a.md", "new")
    assert (tmp_path / "a.md").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.md"]


def test_a_text_where_no_folder_can_be_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/a\.md could not be written"):
        write_text(tmp_path / "file" / "a.md", "text")


def test_the_result_can_be_moved_and_removed_by_its_owner(tmp_path):
    save(tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("record", ["{}", "not json", '{"files": 3}', '{"files": ["weights"]}'])
def test_a_file_of_the_users_own_in_a_checkpoint_keeps_it_from_being_replaced(tmp_path, record):
    out = tmp_path / "out"
    out.mkdir()
    (out / MARK).write_text(record)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match=r"QF-268.*'notes.txt'"):
        check_target(out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("where", [".", "..", "deep/..", "link", "absolute"])
def test_the_current_folder_and_what_holds_it_are_never_replaced(old, monkeypatch, where):
    (old.parent / "link").symlink_to(old.parent)
    monkeypatch.chdir(old)
    out = {"absolute": old, "link": old.parent / "link" / "out"}.get(where, Path(where))
    with pytest.raises(PlanError, match=r"QF-269"):
        check_target(out, overwrite=True)
    assert contents(old) == whole("old")


def test_a_mount_point_is_never_replaced(old, monkeypatch):
    monkeypatch.setattr(store.os.path, "ismount", lambda path: path == old)
    with pytest.raises(PlanError, match=r"QF-269.*mount point"):
        check_target(old, overwrite=True)


def test_a_folder_named_by_way_of_its_own_part_is_replaced_from_beside_it(old):
    out = old / "deep" / ".."
    check_target(out, overwrite=True)
    save(out, overwrite=True)
    assert contents(old) == whole("new")
    assert os.listdir(old.parent) == ["out"]


def test_a_folder_that_may_not_be_read_is_told_in_a_line(old, monkeypatch):
    def forbidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(store.Path, "iterdir", forbidden)
    with pytest.raises(ResourceError, match=r"QF-514.*out cannot be read: Permission denied"):
        check_target(old, overwrite=True)


def leave_half(out: Path, ready: int) -> None:
    """Begin to publish, tell so, and wait to be killed."""
    with publish(out) as staging:
        fill(staging, "new")
        os.write(ready, b".")
        time.sleep(60)


@pytest.mark.parametrize("alive", [True, False])
def test_what_a_killed_process_had_staged_is_swept_up_and_what_a_living_one_has_is_not(tmp_path, alive):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        leave_half(tmp_path / "other", write)
        os._exit(0)
    assert os.read(read, 1) == b"."
    if not alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    (tmp_path / ".quantforge.notes.tmp").write_text("a file is no staging folder")
    save(tmp_path / "out")
    staged = [p for p in tmp_path.glob(".quantforge.*.tmp") if p.is_dir()]
    if alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(staged) == alive
    assert (tmp_path / ".quantforge.notes.tmp").exists()


def test_where_there_are_no_locks_folders_are_published_and_nothing_is_swept(tmp_path, monkeypatch):
    (tmp_path / ".quantforge.another.tmp").mkdir()

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    save(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".quantforge.another.tmp", "out"]


def test_the_probe_of_a_place_syncs_and_renames_and_leaves_nothing(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(disk, "sync", lambda point, path: done.append("sync"))
    monkeypatch.setattr(disk, "rename", lambda point, old, new: done.append("rename"))
    check_target(tmp_path / "out", overwrite=False)
    assert done == ["sync", "rename"]
    assert os.listdir(tmp_path) == []


def test_tensors_are_written_whole_with_the_users_mode(tmp_path):
    store.write_tensors(tmp_path / "deep" / "t.safetensors", {"a": torch.arange(3)}, {"format": "pt"})
    store.write_tensors(tmp_path / "deep" / "t.safetensors", {"b": torch.arange(4)})
    file = tmp_path / "deep" / "t.safetensors"
    assert {k: v.tolist() for k, v in load_file(file).items()} == {"b": [0, 1, 2, 3]}
    assert file.stat().st_mode & 0o777 == 0o666 & ~store._umask()
    assert os.listdir(file.parent) == ["t.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"could not be written"):
        store.write_tensors(tmp_path / "file" / "t", {})


def test_a_stream_that_breaks_off_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def broken(number: int) -> None:
        with store.stream(tmp_path / "a") as put:
            put(b"one")
            put(memoryview(b"two"))
            monkeypatch.setenv("QUANTFORGE_FAILPOINT", f"stream.write:{number}:ENOSPC")
            put(b"three")

    failpoints.reset()
    broken(2)
    assert (tmp_path / "a").read_bytes() == b"onetwothree"
    (tmp_path / "a").unlink()
    monkeypatch.delenv("QUANTFORGE_FAILPOINT")
    failpoints.reset()
    with pytest.raises(ResourceError, match=r"a could not be written: No space left on device"):
        broken(1)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_told_and_leaves_the_old(tmp_path):
    """On a real file system that is full, where one can be mounted."""
    place = tmp_path / "full"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {shlex.quote(str(place))} 2>/dev/null"):
        pytest.skip("needs the right to mount")
    try:
        save(place / "out", "x")
        told = rf"QF-512.*{place / 'new' / 't.safetensors'} could.*No space left on device"
        with pytest.raises(ResourceError, match=told), publish(place / "new") as staging:
            store.write_tensors(staging / "t.safetensors", {"a": torch.zeros(1 << 20)})
        with pytest.raises(ResourceError, match=r"QF-512.*No space left on device"):
            write_text(place / "a.md", "x" * (1 << 17))
        with Journal.open(place / "other", {}) as journal:
            journal.commit({"block": 0, "object": journal.put({"a": torch.zeros(10)})})
            with pytest.raises(ResourceError, match=r"QF-531.*No space left.*what was committed is kept"):
                journal.put({"a": torch.zeros(1 << 20)})
        with Journal.open(place / "other", {}) as journal:
            assert len(journal.commits) == 1
        assert sorted(os.listdir(place)) == ["other.qf", "out"]
        assert contents(place / "out") == whole("x")
    finally:
        os.system(f"umount {shlex.quote(str(place))}")
