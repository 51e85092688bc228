"""The record of a training run, and its JSON with a versioned schema.

Every name in it is untrusted text: whatever prints it must escape it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from quantforge import record
from quantforge.errors import DataError

SCHEMA = "quantforge-training-1"
NAME = "training"


@dataclass(frozen=True)
class Scored:
    """What a model scored on the evaluation windows; each one's mean cross-entropy and KL from the teacher, nats."""

    losses: tuple[float, ...]
    kls: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Return the mean cross-entropy, the logarithm of the perplexity; NaN if none was measured."""
        return math.fsum(self.losses) / len(self.losses) if self.losses else math.nan

    @property
    def perplexity(self) -> float:
        """Return exp of the mean cross-entropy; infinity where it is too large."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def kl(self) -> float:
        """Return the mean KL from the teacher, a lower bound; NaN if none was measured."""
        return math.fsum(self.kls) / len(self.kls) if self.kls else math.nan


@dataclass(frozen=True)
class Texts:
    """What the texts show that a student writes after prompts of the evaluation text.

    prompts, new   how many texts, and tokens written in each
    student_nll    −log p of the student's tokens under the teacher, nats per token
    teacher_nll    the same of the texts that the teacher writes after the same prompts
    distinct       share of different ones among the student's pairs of tokens; of_teacher: among the teacher's
    excess         ExAccErr: how much more the student errs on its own prefixes than on the teacher's
    """

    prompts: int
    new: int
    student_nll: float
    teacher_nll: float
    distinct: float
    of_teacher: float
    excess: float


@dataclass(frozen=True)
class Step:
    """One optimizer step: loss and size of the gradient before it, its learning rate, tokens trained on, seconds."""

    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Training:
    """A run, and what somebody needs to repeat it; dictionaries hold JSON values.

    kind           distill, qat or qlora
    method         label of the student's format; "" for a float student
    aim            the loss and its options
    trained        how many numbers of each part of the student are trained
    before, after  the student's scores; level: the teacher's; all on the same windows
    texts          what the student's own texts show after training; None if none were written
    bits_per_weight of the quantized layers; NaN for a float student
    seconds        of training, without evaluation
    peak_memory    bytes that the process (on CUDA its tensors) held at most in training; None: unknown, or resumed
    """

    schema: str
    kind: str
    student: str
    method: str
    teacher: str
    aim: dict[str, Any]
    settings: dict[str, Any]
    trained: dict[str, int]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    notes: tuple[str, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    created: str
    steps: tuple[Step, ...] = ()
    before: Scored | None = None
    after: Scored | None = None
    level: Scored | None = None
    texts: Texts | None = None
    bits_per_weight: float = math.nan
    seconds: float = math.nan
    peak_memory: int | None = None

    @property
    def recovered(self) -> float:
        """Return the share of the log-perplexity lost to the teacher that training won back; NaN if none was lost."""
        if self.before is None or self.after is None or self.level is None:
            return math.nan
        lost = self.before.loss - self.level.loss
        return (self.before.loss - self.after.loss) / lost if lost > 0 else math.nan

    @property
    def tokens(self) -> int:
        """Return how many tokens the student was trained on."""
        return sum(step.tokens for step in self.steps)


def to_json(run: Training) -> str:
    """Return the record as JSON in ASCII, floats in full; what is not finite becomes null."""
    return json.dumps(record.finite(asdict(run)), indent=1, allow_nan=False) + "\n"


def from_json(text: str, where: str = f"{NAME}.json") -> Training:
    """Read what `to_json` wrote; null becomes NaN where a number is due. DataError says which field is wrong."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(475, f"{where} is not JSON: {error}.") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = repr(data.get("schema"))[:60] if isinstance(data, dict) else type(data).__name__
        raise DataError(475, f"{where} is no run that this version reads: its schema is {found}, not {SCHEMA!r}.")
    run: Training = record.read_value("training", data, Training)
    return run
