"""The design of a study, and the calibration windows that each of its runs draws."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from quantforge import api
from quantforge.api import Writer
from quantforge.calibrate import corpus, overlap
from quantforge.calibrate.corpus import Text, Windows
from quantforge.calibrate.overlap import Overlap
from quantforge.calibrate.text_files import STRICT, Reading
from quantforge.distill import generate
from quantforge.errors import DataError, RecipeError
from quantforge.evaluation import reference
from quantforge.models import check

_LEAST = {"samples": 1, "seq_lens": 2, "seeds": 0}
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Cell:
    """One choice of calibration data: a set or file, how many windows, and their length in tokens."""

    data: str
    samples: int
    seq_len: int

    def __str__(self) -> str:
        """Return it in words, as tables show it."""
        return f"{self.samples} x {self.seq_len} of {self.data}"


@dataclass(frozen=True)
class Design:
    """Every set × number of windows × length, each drawn with every seed.

    Raises RecipeError for a list that is empty, names something twice, or has a number that is too small.
    """

    data: tuple[str, ...]
    samples: tuple[int, ...]
    seq_lens: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values in (
            ("calib", self.data), ("samples", self.samples), ("seq-lens", self.seq_lens), ("seeds", self.seeds)
        ):  # fmt: skip
            _check_list(name, values)

    @property
    def cells(self) -> list[Cell]:
        """Return the cells by set, then by number of windows, then by length, each in the order given."""
        return [Cell(*levels) for levels in product(self.data, self.samples, self.seq_lens)]


@dataclass(frozen=True)
class Pool:
    """A calibration text that windows are drawn from; `tokens` as this model's tokenizer counts.

    text_sha256  of what the model itself writes, the model's fingerprint
    """

    name: str
    source: str
    text_sha256: str
    tokens: int


@dataclass(frozen=True)
class Draw:
    """The windows of one run: ids [samples, seq_len], their digest, and what they share with the evaluation windows."""

    cell: Cell
    seed: int
    ids: Tensor
    ids_sha256: str
    overlap: Overlap


def draw(
    design: Design,
    evaluation: Tensor,
    told: dict[str, Any],
    tokenizer: Any,
    config: Any,
    writer: Writer | None = None,
    reading: Reading = STRICT,
) -> list[tuple[Pool, list[Draw]]]:
    """Read every calibration text and draw the windows of every run, a text and its draws at a time.

    evaluation  token ids [windows, seq_len]; told: their provenance
    writer      the float model, needed where a text is called "self": it writes that by each seed
    reading     how text files are read
    With the same seed and length the windows of fewer samples are the first of those of more. Raises DataError for a
    text that is too short, or given under two names; PlanError for windows that the model has no positions for.
    """
    for length in design.seq_lens:
        api.check_length(config, length)
    found: list[tuple[Pool, list[Draw]]] = []
    for name in design.data:
        if name == corpus.SELF:
            if writer is None:
                raise DataError(477, "text that the model itself writes needs the model.")
            found.append(_own(design, evaluation, tokenizer, config, writer))
            continue
        text = corpus.load_text(name, "calibration", reading)
        for other, _ in found:
            if other.text_sha256 == text.sha256:
                raise DataError(492, f"{other.name!r} and {name!r} are the same text; leave one of them out.")
        encoded = tokenizer(text.text, verbose=False)  # once, for all windows
        run = overlap.run_length(len(text.text.encode()) / max(len(encoded["input_ids"]), 1))
        cells = [cell for cell in design.cells if cell.data == name]
        draws = []
        for cell, seed in product(cells, design.seeds):
            windows = _windows(text, encoded, cell, seed)
            check.check_ids(windows.ids, tokenizer, config)
            same = overlap.same_text(windows.provenance, told)
            shared = overlap.measure(windows.ids, evaluation, same=same, n=run)
            draws.append(Draw(cell, seed, windows.ids, windows.provenance["ids_sha256"], shared))
        found.append((Pool(name, text.source, text.sha256, len(encoded["input_ids"])), draws))
    return found


def _own(design: Design, evaluation: Tensor, tokenizer: Any, config: Any, writer: Writer) -> tuple[Pool, list[Draw]]:
    """Return the windows that the model writes itself: of a seed and a length the most, of which others are the first.

    The pool counts as long as one text of the model's positions from each token that may begin one.
    """
    tokens = generate.tokens_of(tokenizer, config)
    own = functools.partial(api.own_text, writer, tokenizer=tokenizer, config=config, count=max(design.samples))
    texts = {(n, seed): own(seq_len=n, seed=seed) for n, seed in product(design.seq_lens, design.seeds)}
    draws = []
    for cell, seed in product((cell for cell in design.cells if cell.data == corpus.SELF), design.seeds):
        whole, said = texts[cell.seq_len, seed]
        ids = whole[: cell.samples]
        draws.append(Draw(cell, seed, ids, reference.digest(ids), overlap.measure(ids, evaluation)))
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or max(design.seq_lens)
    mark = writer.fingerprint()
    return Pool(corpus.SELF, said["source"], mark, len(tokens.starts) * longest), draws


def _windows(text: Text, encoded: Any, cell: Cell, seed: int) -> Windows:
    """Return the windows of `cell` that `seed` draws from a text that is tokenized already."""
    return corpus.windows(text, lambda *_, **__: encoded, cell.seq_len, cell.samples, shuffle=True, seed=seed)


def _check_list(name: str, values: Sequence[str] | Sequence[int]) -> None:
    if not values:
        raise RecipeError(230, f"--{name} names nothing; give at least one, or several with commas between them.")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise RecipeError(231, f"--{name} has {value} twice; name each once.")
    least = _LEAST.get(name.replace("-", "_"), 0)
    for value in values:
        if not isinstance(value, str) and not least <= value <= MOST_SEED:
            raise RecipeError(232, f"--{name} has {value}; the least is {least}, the most {MOST_SEED}.")
