"""Overlap of calibration and evaluation text: all or nothing where that is the truth, exact shares in between."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.calibrate import overlap
from quantforge.calibrate.overlap import LIMIT, Overlap, measure, same_text

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=60)
ngrams = st.integers(1, 5)


def runs(windows: list[list[int]], n: int) -> list[tuple[int, ...]]:
    return [tuple(w[i : i + n]) for w in windows for i in range(len(w) - n + 1)]


def cut(text: list[int], length: int) -> list[list[int]]:
    return [text[i : i + length] for i in range(0, len(text) - length + 1, length)]


@given(tokens, tokens, st.integers(1, 12), st.integers(1, 12), ngrams)
def test_the_share_is_what_counting_runs_by_hand_gives(first, second, length, other, n):
    ours, theirs = cut(first, length), cut(second, other)
    if not ours or not theirs:
        return
    known, wanted = set(runs(ours, n)), runs(theirs, n)
    found = measure(torch.tensor(ours), torch.tensor(theirs), n=n)
    if wanted:
        assert found.share == sum(run in known for run in wanted) / len(wanted)
    else:
        assert math.isnan(found.share)
    assert found.same == (ours == theirs)


@given(st.lists(st.integers(0, 10**6), min_size=13, max_size=80))
def test_equal_windows_overlap_wholly_and_disjoint_ones_not_at_all(text):
    ids = torch.tensor(text)
    assert measure(ids, ids) == Overlap(1.0, True)
    assert measure(ids, ids + 10**6 + 1) == Overlap(0.0, False)


@given(tokens, tokens, ngrams)
def test_whether_anything_is_shared_does_not_depend_on_the_side(first, second, n):
    ours, theirs = torch.tensor(first), torch.tensor(second)
    if min(len(ours), len(theirs)) < n:
        return
    there, back = measure(ours, theirs, n=n), measure(theirs, ours, n=n)
    assert (there.share > 0) == (back.share > 0)
    assert there.same == back.same


@given(st.lists(st.integers(0, 2), min_size=24, max_size=96), st.integers(4, 24), ngrams)
def test_how_the_calibration_text_is_cut_matters_only_at_the_seams(text, length, n):
    """Each cut hides n − 1 runs, and each of them costs at most the evaluation runs that are found nowhere else."""
    text = text[: len(text) // length * length]
    whole = torch.tensor(text)
    if length < n:
        return
    found = measure(whole.view(-1, length), whole, n=n)
    seams = len(text) // length - 1
    assert found.share >= 1 - seams * (n - 1) / (len(text) - n + 1) - 1e-9
    assert measure(whole, whole.view(-1, length), n=n).share == 1


def test_pieces_make_no_difference(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randint(0, 3, (7, 50), generator=generator) for _ in range(2))
    whole = measure(ours, theirs, n=6)
    assert 0 < whole.share < 1
    for size in (1, 40, 300):
        monkeypatch.setattr(overlap, "_CHUNK", size)
        assert measure(ours, theirs, n=6) == whole
        assert measure(ours.flatten(), theirs.flatten(), n=6).share == pytest.approx(whole.share, abs=0.1)


def test_no_more_hashes_than_promised_are_held_at_once():
    sizes = [len(part) for part in overlap._hashes(torch.zeros(40, 30_000, dtype=torch.int64), 13)]
    assert sum(sizes) == 40 * (30_000 - 12)
    assert max(sizes) <= overlap._CHUNK


def test_hashes_of_runs_that_differ_a_little_differ():
    """Ids one apart, swapped or shifted are what a plain sum would confuse."""
    every = torch.cartesian_prod(*[torch.arange(49_000, 49_008)] * 5)
    assert len(torch.cat(list(overlap._hashes(every, 5))).unique()) == len(every)


def test_texts_are_the_same_by_their_digest_and_unknown_ones_are_not():
    assert same_text({"text_sha256": "a"}, {"text_sha256": "a"})
    assert not same_text({"text_sha256": "a"}, {"text_sha256": "b"})
    assert not same_text({"name": "token ids"}, {"name": "token ids"})


def test_a_warning_comes_with_the_same_text_or_a_share_that_counts():
    assert Overlap(LIMIT / 2, False).warning("a", "b") == ""
    assert Overlap(math.nan, False).warning("a", "b") == ""
    said = Overlap(0.25, False).warning("a.txt", "b.txt")
    assert "25.0% of the evaluation text's runs of 13 tokens in b.txt" in said
    assert "a.txt and b.txt are the same text;" in Overlap(0.0, True).warning("a.txt", "b.txt")
    same = Overlap(0.5, True).warning("a.txt", "b.txt")
    assert "a.txt and b.txt are the same text, and 50.0%" in same
    assert "a.txt is the text that was calibrated on" in Overlap(1, True).warning("a.txt", "a.txt")
    assert "nan" not in Overlap(math.nan, True).warning("a", "b")


def test_each_text_is_warned_of_once_by_its_largest_share():
    found = [
        ("a", Overlap(0.1, False)),
        ("b", Overlap(0.0, False)),
        ("a", Overlap(0.3, False)),
        ("c", Overlap(1, True)),
    ]
    said = overlap.warnings(found, "e")
    assert [line.split(":")[0] for line in said] == ["overlap", "overlap"]
    assert "c and e are the same text" in said[0]
    assert "30.0%" in said[1]


def test_a_run_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        measure(torch.zeros(3), torch.zeros(3), n=0)
