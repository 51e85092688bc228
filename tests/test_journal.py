"""The journal: what was committed is there again, exactly; what was not leaves no trace; other runs are let be."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantforge import journal as journals
from quantforge.errors import IdentityError, LockedError, PlanError, ResourceError
from quantforge.journal import Journal, finished, place
from quantforge.store import MARK, disk, failpoints, publish, write_text

IDENTITY = {"model": "a" * 64, "recipe": "gptq, 4 bits", "seed": "0"}
ROOT = Path(__file__).resolve().parent.parent


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 5), value), "codes": torch.arange(7, dtype=torch.uint8)}


def run(out: Path, blocks: int, **more: bool) -> list[dict[str, object]]:
    """Go on with a run of `blocks` commits, each of a block that stays and a state that the next one drops."""
    with Journal.open(out, IDENTITY, **more) as journal:
        before = [dict(facts) for facts in journal.commits]
        state = before[-1]["state_object"] if before else None
        for block in range(len(before), blocks):
            kept, last = journal.put(weights(block)), state
            state = journal.put({"h": torch.full((4,), float(block))}, {"block": block})
            journal.commit({"block": block, "objects": [kept], "state_object": state, "drop": [last] if last else []})
    return before


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def test_tensors_and_facts_come_back_exactly(out):
    tensors = {
        "half": torch.randn(3, 4).to(torch.bfloat16), "eighth": torch.randn(8).to(torch.float8_e4m3fn),
        "nothing": torch.empty(0, 3), "bits": torch.tensor([True, False]), "odd": torch.randn(6, 4).t(),
    }  # fmt: skip
    tensors["shared"] = tensors["half"]
    about = {"loss": 0.1, "none": None, "deep": {"z": [1, "ü"], "a": 1}}
    with Journal.open(out, IDENTITY) as journal:
        name = journal.put(tensors, about)
        journal.commit({"loss": math.nan, "first_object": name})
    with Journal.open(out, IDENTITY) as journal:
        found, told = journal.get(name)
        assert math.isnan(journal.commits[0]["loss"])
    assert json.dumps(told) == json.dumps(about)  # in their order, too
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].float(), tensor.float())


def test_the_same_tensors_are_kept_once_under_the_same_name(out):
    with Journal.open(out, IDENTITY) as journal:
        names = {journal.put(weights()), journal.put(weights())}
        journal.commit({"objects": sorted(names)})
        names.add(journal.put(weights()))
    assert len(names) == 1
    assert [p.name for p in (place(out) / "objects").iterdir()] == list(names)


def test_a_run_goes_on_from_its_last_commit_and_needs_no_more_room_than_its_state(out):
    assert run(out, 3) == []
    assert [facts["block"] for facts in run(out, 5)] == [0, 1, 2]
    facts = run(out, 5)
    assert [f["block"] for f in facts] == [0, 1, 2, 3, 4]
    with Journal.open(out, IDENTITY) as journal:
        for block, f in enumerate(facts):
            assert torch.equal(journal.get(f["objects"][0])[0]["w"], weights(block)["w"])
        assert journal.get(facts[-1]["state_object"])[1] == {"block": 4}
    assert len(list((place(out) / "objects").iterdir())) == 5 + 2  # the blocks, the state and the one before


def test_what_was_put_and_not_committed_is_gone_at_the_next_opening(out):
    run(out, 1)
    with Journal.open(out, IDENTITY) as journal:
        name = journal.put(weights(9))
        assert (place(out) / "objects" / name).exists()
    with Journal.open(out, IDENTITY):
        assert not (place(out) / "objects" / name).exists()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_run_that_committed_nothing_leaves_nothing(out, error):
    with contextlib.suppress(ValueError, KeyboardInterrupt), Journal.open(out, IDENTITY) as journal:
        journal.put(weights())
        if error:
            raise error
    assert os.listdir(out.parent) == []


def test_a_run_that_finished_leaves_nothing_but_its_output(out):
    run(out, 2)
    with Journal.open(out, IDENTITY) as journal, publish(out) as staging:
        write_text(staging / MARK, "{}")
        journal.published(staging)
    assert finished(out)
    with Journal.open(out, IDENTITY) as journal:
        journal.finish()
    assert os.listdir(out.parent) == ["out"]
    assert not finished(out)


def test_an_output_of_another_run_is_not_taken_for_this_ones(out):
    with Journal.open(out, IDENTITY) as journal, publish(out) as staging:
        write_text(staging / MARK, "{}")
        journal.published(staging)
    write_text(out / MARK, '{"another": 1}')
    assert not finished(out)


def test_other_inputs_are_refused_and_named_and_nothing_is_lost(out):
    run(out, 2)
    other = {**IDENTITY, "model": "b" * 64, "seed": "1", "dtype": "float32"}
    with pytest.raises(IdentityError) as caught, Journal.open(out, other):
        pass
    assert str(caught.value).startswith("error[QF-600]: ")
    for part in (
        "model was aaaaaaaaaaaaaaaa, is bbbbbbbbbbbbbbbb",
        "seed was '0', is '1'",
        "dtype was not set, is 'fl",
    ):
        assert part in str(caught.value)
    assert "recipe" not in str(caught.value)
    assert "--restart" in str(caught.value)
    assert len(run(out, 2)) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "journal"])
def test_a_folder_of_somebody_elses_is_no_journal(out, name):
    """A checkpoint may well be called out.qf."""
    other = out.with_name("out.qf")
    other.mkdir()
    (other / name).write_text("mine")
    with pytest.raises(PlanError, match="holds something else"), Journal.open(out, IDENTITY):
        pass
    assert {file.name: file.read_text() for file in other.iterdir()} == {name: "mine"}


def test_a_restart_throws_the_run_away(out):
    run(out, 2)
    with Journal.open(out, {"other": "inputs"}, restart=True) as journal:
        assert journal.commits == ()
        assert list((place(out) / "objects").iterdir()) == []
    assert os.listdir(out.parent) == []


def test_inputs_may_change_while_nothing_is_committed(out):
    for step in ("kill", "go on"):
        child = os.fork()
        if not child:
            with Journal.open(out, {"step": step}) as journal:
                journal.put(weights())
                os._exit(0 if journal.commits == () else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_the_thread_count_of_the_first_run_is_told(out):
    run(out, 1)
    file = place(out) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threads": 7}))
    with Journal.open(out, IDENTITY) as journal:
        assert journal.threads == 7


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"identity": {}, "threads": 1, "schema": 99}'])
def test_a_damaged_identity_is_refused_in_a_line(out, text):
    run(out, 1)
    (place(out) / "run.json").write_text(text)
    with pytest.raises(IdentityError, match=r"QF-601.*--restart"), Journal.open(out, IDENTITY):
        pass
    assert (place(out) / "journal").exists()


def test_a_second_run_is_refused_with_the_holders_name_and_changes_nothing(out):
    with Journal.open(out, IDENTITY) as journal:
        journal.commit({"block": 0})
        with pytest.raises(LockedError, match=rf"QF-610.*process {os.getpid()} on .* for \d+ s"):  # noqa: SIM117
            with Journal.open(out, IDENTITY, restart=True):
                pass
        journal.commit({"block": 1})
    with Journal.open(out, IDENTITY) as journal:
        assert [facts["block"] for facts in journal.commits] == [0, 1]


def test_an_output_that_another_is_writing_is_told_before_anything_is_read(out):
    journals.check_free(out)
    assert not place(out).exists()
    with Journal.open(out, IDENTITY), pytest.raises(LockedError, match=rf"QF-610.*process {os.getpid()}"):
        journals.check_free(out)
    journals.check_free(out)


def test_seconds_between_commits_that_are_none_are_refused_before_any_work(out, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_COMMIT_SECONDS", "soon")
    with (
        pytest.raises(PlanError, match="QUANTFORGE_COMMIT_SECONDS is 'soon', which is no number of seconds"),
        Journal.open(out, IDENTITY),
    ):
        pass
    assert not place(out).exists()


def test_the_lock_of_a_process_that_is_gone_is_taken_over_even_if_a_child_of_it_lives(out):
    code = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom quantforge.journal import Journal\n"
        f"with Journal.open(Path({str(out)!r}), {IDENTITY!r}) as journal:\n"
        "    journal.commit({'block': 0})\n"
        "    if not os.fork():\n"
        "        print(os.getpid(), flush=True); signal.pause()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        child = int(process.stdout.readline())
        try:
            assert process.wait() == -signal.SIGKILL
            assert json.loads((place(out) / "LOCK").read_text())["pid"] == process.pid
            with Journal.open(out, IDENTITY) as journal:
                assert journal.commits == ({"block": 0},)
        finally:
            os.kill(child, signal.SIGKILL)


def damage(file: Path, change: Callable[[bytes], bytes]) -> None:
    data = change(file.read_bytes())
    file.unlink()  # an open mapping of it stays whole
    file.write_bytes(data)


@pytest.mark.parametrize("end", [b"0", b"00000000 {}", b'1234abcd {"seq":3', b"\0" * 512])
def test_a_torn_last_line_is_dropped_without_a_word(out, end, capsys):
    run(out, 3)
    damage(place(out) / "journal", lambda data: data + end)
    assert len(run(out, 4)) == 3
    assert len(run(out, 4)) == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_bad_line_drops_it_and_all_behind_it_and_says_so(out, line, capsys):
    with Journal.open(out, IDENTITY) as journal:
        for block in range(3):
            journal.commit({"block": block, "objects": [journal.put(weights(block))]})

    def flip(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        lines[line] = lines[line].replace(b'"block"', b'"blork"')
        return b"".join(lines)

    damage(place(out) / "journal", flip)
    with Journal.open(out, IDENTITY) as journal:
        assert [facts["block"] for facts in journal.commits] == list(range(line))
        journal.commit({"block": line})
    assert f"damaged after commit {line} of 3" in capsys.readouterr().err
    with Journal.open(out, IDENTITY) as journal:
        assert len(journal.commits) == line + 1


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
@pytest.mark.parametrize("which", ["state", "block"])
def test_a_damaged_object_falls_back_to_the_last_state_that_is_whole(out, how, which, capsys):
    run(out, 3)
    last = json.loads((place(out) / "journal").read_bytes().splitlines()[-1][9:])["facts"]
    file = place(out) / "objects" / (last["state_object"] if which == "state" else last["objects"][0])
    if how == "gone":
        file.unlink()
    else:
        damage(file, lambda data: data[:-1] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert [facts["block"] for facts in run(out, 3)] == [0, 1]
    assert "damaged after commit 2 of 3" in capsys.readouterr().err
    assert [facts["block"] for facts in run(out, 3)] == [0, 1, 2]


def failing_once(monkeypatch: pytest.MonkeyPatch, point: str, times: int = 1) -> list[Path]:
    """Let the disk fail to sync at `point`; return the list that gets the files it was asked to sync there."""
    real, asked = disk.sync, []

    def sync(at: str, path: Path) -> None:
        if at == point:
            asked.append(path)
            if len(asked) <= times:
                raise OSError(5, "Input/output error")
        real(at, path)

    monkeypatch.setattr(disk, "sync", sync)
    return asked


def test_an_object_that_failed_to_sync_is_written_once_more_and_never_synced_again(out, monkeypatch):
    asked = failing_once(monkeypatch, "object.sync")
    with Journal.open(out, IDENTITY) as journal:
        name = journal.put(weights())
        journal.commit({"object": name})
    assert [path.name for path in asked] == [name, "again.tmp"]
    with Journal.open(out, IDENTITY) as journal:
        assert torch.equal(journal.get(name)[0]["w"], weights()["w"])


@pytest.mark.parametrize("point", ["object.sync", "object.folder"])
def test_a_disk_that_fails_for_good_ends_the_run_and_keeps_what_was_committed(out, monkeypatch, point):
    run(out, 1)
    failing_once(monkeypatch, point, times=99)
    with pytest.raises(ResourceError, match=r"QF-531.*Input/output error.*is kept"):
        run(out, 2)
    monkeypatch.undo()
    assert [facts["block"] for facts in run(out, 2)] == [0]
    assert not list(place(out).rglob("*.tmp"))


def test_a_line_that_failed_to_sync_is_committed_by_writing_the_journal_anew(out, monkeypatch):
    run(out, 1)
    node = (place(out) / "journal").stat().st_ino
    with Journal.open(out, IDENTITY) as journal:
        asked = failing_once(monkeypatch, "journal.sync")
        journal.commit({"block": 1, "state_object": journal.put(weights())})
    assert len(asked) == 1
    assert (place(out) / "journal").stat().st_ino != node
    assert len(run(out, 2)) == 2


@pytest.mark.parametrize("name", ["a b", "模型 ü", "-rf", "n" * 252, "n" * 255, "a\nb", ".hidden"])
def test_odd_names_work(tmp_path, name):
    run(tmp_path / name, 1)
    assert len(run(tmp_path / name, 1)) == 1
    assert place(tmp_path / name) != place(tmp_path / name[:-1])


def test_a_place_without_room_or_locks_is_told_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"QF-5(10|30)"), Journal.open(tmp_path / "file" / "out", IDENTITY):
        pass

    def refuse(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with pytest.raises(ResourceError, match=r"QF-530.*No locks available"), Journal.open(tmp_path / "out", IDENTITY):
        pass


def test_a_commit_is_due_when_the_time_is_over(out, monkeypatch):
    with Journal.open(out, IDENTITY) as journal:
        assert not journal.due()
        monkeypatch.setenv("QUANTFORGE_COMMIT_SECONDS", "0")
        assert journal.due()
        monkeypatch.delenv("QUANTFORGE_COMMIT_SECONDS")
        monkeypatch.setattr(journals.time, "monotonic", lambda: 1e12)
        assert journal.due()
        journal.commit({})
        assert not journal.due()


def test_objects_are_found_at_any_depth_under_their_keys(out):
    with Journal.open(out, IDENTITY) as journal:
        names = [journal.put(weights(i)) for i in range(4)]
        loose = journal.put(weights(9))
        deep = {"deep": {"h_objects": {"a": names[2]}}}
        layers = [{"name": loose, "objects": [names[1]]}, deep]
        journal.commit({"object": names[0], "layers": layers, "more_objects": [[names[3]]]})
        assert {p.name for p in (place(out) / "objects").iterdir()} == {*names, loose}
    with Journal.open(out, IDENTITY):
        assert {p.name for p in (place(out) / "objects").iterdir()} == set(names)


def test_what_a_commit_does_not_name_or_drops_is_removed_when_work_goes_on(out):
    with Journal.open(out, IDENTITY) as journal:
        names = [journal.put(weights(i)) for i in range(3)]
        journal.commit({"object": names[0]})
        journal.commit({"object": journal.put(weights(3)), "drop": [names[0]]})
        last = journal.put(weights(4))
        assert not {p.name for p in (place(out) / "objects").iterdir()} & set(names)
        journal.commit({"object": last})


def test_each_point_of_the_journal_is_reached(out, monkeypatch):
    seen = set()
    real = failpoints.reach
    monkeypatch.setattr(failpoints, "reach", lambda point: (seen.add(point), real(point))[1])
    run(out, 3)
    damage(place(out) / "journal", lambda data: data + b"0")
    run(out, 4, restart=False)
    with Journal.open(out, IDENTITY) as journal:
        journal.finish()
    journals_own = {p for p in failpoints.POINTS if p.startswith(("journal.", "object."))}
    assert journals_own <= seen
