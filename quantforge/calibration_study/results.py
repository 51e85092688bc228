"""The record of a study, and its JSON with a versioned schema.

Every name in it is untrusted text: whatever prints it must escape it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from quantforge import record
from quantforge.calibrate.overlap import Overlap
from quantforge.calibration_study.design import Cell, Design, Pool
from quantforge.errors import DataError

SCHEMA = "quantforge-calibration-study-2"


@dataclass(frozen=True)
class StudyRun:
    """One run: the windows of one cell, drawn with one seed, and what the model quantized on them scored.

    ids_sha256   of the calibration windows
    losses, kls  of each evaluation window: mean cross-entropy and mean KL from the float model, nats per token
    seconds      of quantizing
    """

    cell: Cell
    seed: int
    ids_sha256: str
    overlap: Overlap
    losses: tuple[float, ...]
    kls: tuple[float, ...]
    seconds: float

    @property
    def loss(self) -> float:
        """Return the mean cross-entropy, the logarithm of the perplexity."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def perplexity(self) -> float:
        """Return exp of the mean cross-entropy; infinity where it is too large."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def kl(self) -> float:
        """Return the mean KL; NaN if none was measured."""
        return math.fsum(self.kls) / len(self.kls) if self.kls else math.nan


@dataclass(frozen=True)
class Study:
    """The runs of a study, and what somebody needs to repeat it; dictionaries hold JSON values.

    fingerprint   of the model's files, and of the versions and the device that computed with them
    method        label of the method and its format
    options       what sets it apart from others of that label
    needs         whether the method looks at calibration data at all
    pools         the calibration texts, in the order of the design; then those of earlier designs
    float_losses  of the float model, for each evaluation window, nats per token
    runs          those that are done: in the order of the design, a cell after the other; then those of earlier designs
    """

    schema: str
    model: str
    model_notes: tuple[str, ...]
    fingerprint: str
    method: str
    options: dict[str, Any]
    needs: bool
    protocol: str
    design: Design
    pools: tuple[Pool, ...]
    evaluation: dict[str, Any]
    float_losses: tuple[float, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    created: str
    runs: tuple[StudyRun, ...]

    @property
    def texts(self) -> list[Pool]:
        """Return the calibration texts of the design."""
        return [pool for pool in self.pools if pool.name in self.design.data]


def to_json(study: Study) -> str:
    """Return the record as JSON in ASCII, floats in full; what is not finite becomes null."""
    return json.dumps(record.finite(asdict(study)), indent=1, allow_nan=False) + "\n"


def from_json(text: str, where: str = "calibration-study.json") -> Study:
    """Read what `to_json` wrote; null becomes NaN where a number is due. DataError says which field is wrong."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(493, f"{where} is not JSON: {error}.") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = repr(data.get("schema"))[:60] if isinstance(data, dict) else type(data).__name__
        raise DataError(493, f"{where} is no study that this version reads: its schema is {found}, not {SCHEMA!r}.")
    study: Study = record.read_value("study", data, Study)
    for i, run in enumerate(study.runs):
        if not run.losses or len(run.losses) != len(study.float_losses) or len(run.kls) not in (0, len(run.losses)):
            raise DataError(493, f"{where}: run {i} has not one loss for each of {len(study.float_losses)} windows.")
    return study
