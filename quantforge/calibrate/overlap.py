"""How much of the evaluation text was calibrated on: runs of tokens that both have, counted by their hashes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

N = 13  # tokens of a run: the length by which GPT-3's authors looked for test sets in their training text
LIMIT = 0.01  # share of common runs above which one cannot speak of two texts; phrases that recur stay below
_CHUNK = 2**18  # hashes that are held at once, of either side
_BASE = 0x9E3779B97F4A7C15 - 2**64  # odd, so that multiplying by it loses nothing


@dataclass(frozen=True)
class Overlap:
    """What calibration windows and evaluation windows have in common.

    share  of the runs of `n` tokens in the evaluation windows, those that occur in a calibration window as well; NaN
           where the evaluation windows are shorter than such a run
    same   whether both were cut from one and the same text, from whatever places
    """

    share: float
    same: bool
    n: int = N

    @property
    def found(self) -> bool:
        """Tell whether results on the evaluation text are too good because of it."""
        return self.same or self.share >= LIMIT

    def warning(self, calibration: str, evaluation: str) -> str:
        """Return what to say of it in one line, with the names of the two texts; "" if there is nothing to say."""
        if not self.found:
            return ""
        common = f"{self.share:.1%} of the evaluation text's runs of {self.n} tokens"
        if not self.same:
            said = f"{common} in {evaluation} occur in the calibration text {calibration}"
        else:
            said = f"{evaluation} is the text that was calibrated on"
            if calibration != evaluation:
                said = f"{calibration} and {evaluation} are the same text"
            if self.share >= LIMIT:
                said += f", and {common} were calibrated on"
        return f"overlap: {said}; figures on it flatter whatever was calibrated, use other text"


def measure(calibration: Tensor, evaluation: Tensor, *, same: bool = False, n: int = N) -> Overlap:
    """Compare calibration and evaluation token ids, [windows, seq_len] or [tokens], by their runs of `n` tokens.

    Runs lie within windows, so that the n − 1 that span a cut are not seen; those of the evaluation windows count as
    often as they occur. Runs are told apart by hashes of 64 bits: of a million against a million, the chance that any
    is taken for another is 1 in 10⁷. Apart from one truth value for each run, at most 2¹⁸ hashes of either side are
    held at once, however long the texts are.

    same  whether the texts they come from are known to be the same, by `same_text`; equal ids always are
    Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"a run has at least one token, not {n}")
    ours, theirs = (ids if ids.dim() == 2 else ids[None] for ids in (calibration, evaluation))
    same = same or torch.equal(ours, theirs)
    runs = len(theirs) * max(theirs.shape[1] - n + 1, 0)
    if not runs:
        return Overlap(nan, same, n)
    hit = torch.zeros(runs, dtype=torch.bool)
    for known in _hashes(ours, n):
        known = torch.unique(known)
        start = 0
        for wanted in _hashes(theirs, n):
            place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
            hit[start : start + len(wanted)] |= known[place] == wanted
            start += len(wanted)
    return Overlap(int(hit.sum()) / runs, same, n)


def run_length(bytes_per_token: float) -> int:
    """Return how many tokens a run needs to be as long as N tokens of four bytes: words that recur are shorter."""
    return max(N, math.ceil(4 * N / max(bytes_per_token, 1)))


def same_text(calibration: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Tell by their provenance whether two sets of windows were cut from the same text; False if it does not say."""
    digest = calibration.get("text_sha256")
    return digest is not None and digest == evaluation.get("text_sha256")


def warnings(found: Iterable[tuple[str, Overlap]], evaluation: str) -> list[str]:
    """Return what to say of each calibration text, by name, that shares too much with `evaluation`.

    A text that occurs several times is warned of once, by its largest share.
    """
    said: dict[str, str] = {}
    for name, each in sorted(found, key=lambda pair: 0.0 if isnan(pair[1].share) else -pair[1].share):
        if each.found:
            said.setdefault(name, each.warning(name, evaluation))
    return list(said.values())


def _hashes(ids: Tensor, n: int) -> Iterator[Tensor]:
    """Yield the hashes of the runs of `n` in ids [windows, seq_len], window by window, in pieces."""
    step = max(_CHUNK, n)  # tokens of a long window that are hashed at once
    for block in torch.split(ids.cpu(), max(1, step // max(ids.shape[1], 1))):
        for start in range(0, ids.shape[1] - n + 1, step):
            part = _mixed(block[:, start : start + step + n - 1])
            count = part.shape[1] - n + 1
            found = torch.zeros(len(part), count, dtype=torch.int64)
            for i in range(n):  # a polynomial in _BASE modulo 2⁶⁴
                found = found * _BASE + part[:, i : i + count]
            yield found.flatten()


def _mixed(ids: Tensor) -> Tensor:
    """Spread ids over 64 bits (the finalizer of MurmurHash3), so that neighbouring ids do not make equal sums."""
    found = ids.to(torch.int64) + 1
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        found = (found ^ (found >> 33 & 0x7FFFFFFF)) * factor
    return found ^ (found >> 33 & 0x7FFFFFFF)
