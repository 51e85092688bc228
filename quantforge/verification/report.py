"""What `verify` found out about a checkpoint, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantforge.errors import ModelError, clean


@dataclass(frozen=True)
class Finding:
    """One thing that was found: a fault, by its number as QF-nnn, or without a number a note."""

    message: str
    number: int | None = None

    def __str__(self) -> str:
        """Return it on one line."""
        return f"note: {clean(self.message)}" if self.number is None else str(ModelError(self.number, self.message))


@dataclass(frozen=True)
class Loader:
    """Whether other software takes a checkpoint.

    name    the software
    tested  its version whose rules were applied
    reason  why it does not take it; empty if it does
    needs   what it needs beside itself
    """

    name: str
    tested: str
    reason: str = ""
    needs: str = ""

    @property
    def takes(self) -> bool:
        """Tell whether it takes the checkpoint."""
        return not self.reason

    def __str__(self) -> str:
        text = f"{self.name} {self.tested}".rstrip()
        if self.reason:
            return f"{text}: no, {self.reason}"
        return f"{text}: yes" + (f", with {self.needs}" if self.needs else "")


@dataclass(frozen=True)
class Report:
    """A checkpoint that was opened cold.

    folder     where it is
    container  how its layers are stored; None where that could not be told
    layers     how many quantized layers were read without a fault
    tensors    how many tensors its files hold
    digests    True if it was compared with what was saved
    findings   faults and notes
    loaders    who will take it; empty where it is not sound
    """

    folder: Path
    container: str | None
    layers: int
    tensors: int
    digests: bool
    findings: tuple[Finding, ...]
    loaders: tuple[Loader, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """Return the findings that are no mere notes."""
        return tuple(f for f in self.findings if f.number is not None)

    @property
    def sound(self) -> bool:
        """Tell whether nothing is wrong with it."""
        return not self.faults

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "folder": str(self.folder),
            "container": self.container,
            "layers": self.layers,
            "tensors": self.tensors,
            "digests": self.digests,
            "sound": self.sound,
            "findings": [
                {"code": None if f.number is None else f"QF-{f.number}", "message": clean(f.message)}
                for f in self.findings
            ],
            "loaders": [{**asdict(loader), "takes": loader.takes} for loader in self.loaders],
        }

    def text(self) -> str:
        """Return it as lines: each finding, what it comes to, and each loader."""
        lines = [str(finding) for finding in self.findings]
        held = "equal to what was saved" if self.digests else "with no digests to compare with"
        if self.sound:
            lines.append(
                f"{clean(str(self.folder))} is sound: {self.container}, {self.layers} quantized layers, "
                f"{self.tensors} tensors, {held}"
            )
        else:
            lines.append(f"{clean(str(self.folder))} is not sound: {len(self.faults)} faults")
        return "\n".join([*lines, *map(str, self.loaders)])


@contextmanager
def noting(findings: list[Finding]) -> Iterator[None]:
    """Append a ModelError of the body to `findings` instead of raising it."""
    try:
        yield
    except ModelError as error:
        findings.append(Finding(str(error.args[0]), error.number))
