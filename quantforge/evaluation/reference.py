"""What the float model predicted over some windows: kept in one small file, so that it runs once per model and text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import kept
from quantforge.errors import DataError, ResourceError
from quantforge.evaluation.divergence import TopK, id_dtype

SCHEMA = "quantforge-reference-1"
K = 128  # most probable tokens kept of each position: 19 MB for 48 windows of 512
CLOSE = 1e-3  # nats of a window's loss: two measurements of one float model differ by less, whatever the threads
DENSE = 4  # windows whose whole distributions are compared, to tell how far below them the bound lies


@dataclass(frozen=True)
class Dense:
    """The float model's whole predictions over the first windows, as the inputs of its output head.

    hidden  [windows, seq_len − 1, width]
    logits  hidden → logits, by the float model's own head and what follows it
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """The float model's predictions over some windows.

    kept    of all of them, windows one after the other
    losses  mean cross-entropy of each window, nats per token
    dense   None where they could not be kept: what is not comparable then is the bound of the KL with its dense value
    """

    kept: TopK
    losses: tuple[float, ...]
    dense: Dense | None = None

    def window(self, index: int) -> TopK:
        """Return what is kept of one window."""
        length = len(self.kept.ids) // len(self.losses)
        return self.kept.rows(slice(index * length, (index + 1) * length))


@dataclass(frozen=True)
class Made:
    """What a kept reference was made of, and with; all of it must be the same for it to be used.

    model        fingerprint of the float model's files, and of what computed with them
    tokens       `digest` of the token ids
    windows      how many; predictions: windows × (seq_len − 1)
    vocab        size of the vocabulary
    k            tokens kept of each position, at most vocab
    """

    model: str
    tokens: str
    windows: int
    predictions: int
    vocab: int
    k: int


def made(model: str, ids: Tensor, vocab: int) -> Made:
    """Return what a reference over ids [windows, seq_len] is made of; `model` is its fingerprint."""
    windows, length = ids.shape
    return Made(model, digest(ids), windows, windows * (length - 1), vocab, min(K, vocab))


def digest(ids: Tensor) -> str:
    """Return the SHA-256 of token ids as 64-bit integers in little-endian order, in hexadecimal."""
    return sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def save(path: Path, reference: Reference, made: Made) -> None:
    """Write a reference to one safetensors file, whole or not at all, replacing an old one; parents are made.

    Raises ResourceError if it cannot be written.
    """
    rows = reference.kept
    losses = torch.tensor(reference.losses, dtype=torch.float64)
    tensors = {"ids": rows.ids, "log_probs": rows.log_probs, "top": rows.top, "losses": losses}
    kept.write(path, tensors, _facts(made))


def load(path: Path, made: Made) -> Reference:
    """Read a reference that `save` wrote.

    Raises DataError, naming the file, if it cannot be read, is damaged, or was not made of and with `made`.
    """
    tensors = kept.read(path, _facts(made))
    kind, rows = id_dtype(made.vocab), made.predictions
    expected = {
        "ids": (kind, (rows, made.k)),
        "log_probs": (torch.float32, (rows, made.k + 1)),
        "top": (kind, (rows,)),
        "losses": (torch.float64, (made.windows,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
            found = "missing" if tensor is None else f"{tensor.dtype} of shape {list(tensor.shape)}"
            raise DataError(
                445, f"{path.name!r}: {name} is {found}, not {dtype} of shape {list(shape)}; {kept.ADVICE}."
            )
    top = TopK(tensors["ids"], tensors["log_probs"], tensors["top"], made.vocab)
    return Reference(top, tuple(tensors["losses"].tolist()))


def _facts(made: Made) -> dict[str, str]:
    return {"schema": SCHEMA, **{name: str(value) for name, value in asdict(made).items()}}


def get(folder: Path | None, made: Made, make: Callable[[], Reference]) -> Reference:
    """Return the reference that is kept in `folder`, or make it and keep it there.

    One that is damaged is made anew, and where none can be kept (or `folder` is None) each is made: that costs only
    time.
    """
    if folder is None:
        return make()
    path = folder / kept.name_of(_facts(made))
    with contextlib.suppress(DataError):
        return load(path, made)
    reference = make()
    with contextlib.suppress(ResourceError):
        save(path, reference, made)
    return reference


def after_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what the config says happens to the head's outputs: a divisor, a factor or a soft cap."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    fields = (getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"))
    divisor, factor, cap = (value if isinstance(value, int | float) else None for value in fields)

    def follow(logits: Tensor) -> Tensor:
        if divisor:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    return follow
