"""The errors a user can meet, each one line: what is wrong, where, and what would work.

Every error carries a code `QF-nnn`; its class decides the exit status of the command line.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches


class QuantForgeError(Exception):
    """A fault in what was given, not in quantforge; printed as one line, without a traceback.

    `number` is the nnn of QF-nnn; `exit_code` is what the command line exits with.
    """

    exit_code = 1

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    def __str__(self) -> str:
        """Return the message on one line, with its code."""
        return f"error[QF-{self.number}]: {clean(super().__str__())}"


class RecipeError(QuantForgeError):
    """A method, option or combination that does not exist (QF-2nn)."""

    exit_code = 2


class PlanError(QuantForgeError):
    """The recipe and the model, or the output folder, do not go together (QF-25n)."""

    exit_code = 2


class ModelError(QuantForgeError):
    """A model folder that is damaged, incomplete or not what it says (QF-3nn)."""

    exit_code = 3


class DataError(QuantForgeError):
    """Calibration or evaluation text that cannot be used (QF-4nn)."""

    exit_code = 4


class ResourceError(QuantForgeError):
    """The machine lacks something: a device, memory, disk, permission (QF-5nn)."""

    exit_code = 5


class IdentityError(QuantForgeError):
    """An unfinished run that was given other inputs than those it is continued with (QF-600 to 609)."""

    exit_code = 6


class LockedError(QuantForgeError):
    """Another process is at work on the same output folder (QF-61n)."""

    exit_code = 7


class Stopped(QuantForgeError):  # noqa: N818 - not a fault: the user asked for it
    """A run that was asked to stop, and can be gone on with by the same command (QF-62n)."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'? " for the closest of `known`, or an empty string."""
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def pick(what: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is among `known`; else raise RecipeError with the nearest name and all of them."""
    known = list(known)
    if name in known:
        return name
    raise RecipeError(
        201, f"no {what} is called {name!r}: {nearest(name, known)}there are: {', '.join(known) or 'none'}."
    )


def clean(text: str) -> str:
    """Spell out what would steer a terminal, a browser or the direction of text; white space becomes one space."""
    text = " ".join(text.split())
    return "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else _spelled(c) for c in text)


def _spelled(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
