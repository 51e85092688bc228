"""A run of training on disk, to go on with: parameters, the optimizer's states, and what the run was made of.

The folder `state` holds tensors.safetensors and state.json, and is replaced as one when a later state is kept, so that
it is whole at any time. Nothing in it is ever executed. The numbers of a step are settled by what the run is made of
and by the step alone, so a run that is taken up again goes on as it would have.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantforge import store
from quantforge.errors import ModelError, PlanError
from quantforge.models.headers import read_json, show

SCHEMA = "quantforge-state-1"
NAME = "state"
_TENSORS, _ABOUT = "tensors.safetensors", "state.json"
_LARGEST = 1 << 28  # bytes of state.json, 100 of them a step
_FREE = "settings.save_every"  # may change
_STEPS = "settings.steps"  # may be any number from what is done

Values = Mapping[str, list[float]]


@dataclass(frozen=True, eq=False)
class State:
    """A run after some steps.

    step     how many were done
    curve    what was measured at each
    tensors  by name
    """

    step: int
    curve: Values
    tensors: dict[str, Tensor]


def save(out: Path, state: State, facts: Mapping[str, Any]) -> None:
    """Write `out`/state, whole or not at all, in the place of an earlier one.

    facts  what the run is made of, as JSON has it
    Raises ResourceError if it cannot be written.
    """
    with store.publish(out / NAME, overwrite=True) as folder:
        store.write_tensors(folder / _TENSORS, state.tensors)
        about = {"schema": SCHEMA, "step": state.step, "facts": facts, "curve": state.curve}
        about["tensors"] = _digest(folder / _TENSORS)
        about["content"] = _content(about)
        store.write_text(folder / _ABOUT, json.dumps(about, allow_nan=False))


def refuse_old(out: Path) -> None:
    """Raise PlanError if `out` holds a state, which a new run would replace."""
    if os.path.lexists(out / NAME):
        raise PlanError(293, f"{out / NAME} holds an earlier run: resume it, remove it, or choose another folder.")


def load(out: Path, facts: Mapping[str, Any], shapes: Mapping[str, Tensor]) -> State:
    """Read what `save` wrote of a run made of `facts`.

    Its number of steps may be another: any from what is done.
    shapes  the parameters that must be there, by "parameter NAME", of which dtype and shape alone are looked at
    Raises PlanError, in one line, if there is none, if it is damaged, or if it was made of something else: then naming
    the first fact that differs, with both values.
    """
    folder = out / NAME
    if not os.path.lexists(folder):
        raise PlanError(293, f"there is no {folder} to resume from; start without resuming.")
    about = _about(folder)
    _compare(folder, about, facts)
    try:
        if _digest(folder / _TENSORS) != about["tensors"]:
            raise _damaged(folder, f"{_TENSORS} is not what was written")
        with safe_open(folder / _TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, str(getattr(error, "strerror", None) or error)) from error
    for name, wanted in shapes.items():
        found = tensors.get(name)
        if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise _differs(folder, name, _shown(found), _shown(wanted))
    known = {name.partition(" ")[2] for name in shapes}
    for name in tensors:
        if name.partition(" ")[2] not in known:
            raise _differs(folder, name, _shown(tensors[name]), _shown(None))
    return State(about["step"], about["curve"], tensors)


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as they are when read back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = read_json(folder / _ABOUT, _LARGEST)
    except ModelError as error:
        raise _damaged(folder, str(error.args[0])) from error
    if about.get("schema") != SCHEMA:
        raise _differs(folder, "schema", about.get("schema"), SCHEMA)
    if about.pop("content", None) != _content(about):
        raise _damaged(folder, f"{_ABOUT} is not what was written")
    return about


def _compare(folder: Path, about: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    was, now = dict(_flat(about["facts"])), dict(_flat(facts))
    for key in sorted(was.keys() | now.keys(), key=lambda key: (key.startswith("settings."), key)):
        old, new = was.get(key), now.get(key)
        if key == _STEPS and isinstance(new, int):
            if new < about["step"]:
                raise PlanError(
                    293, f"{folder} holds {about['step']} steps, more than {new}; ask for as many, or more."
                )
        elif (key in was, old) != (key in now, new) and key != _FREE:
            raise _differs(folder, key.removeprefix("settings."), old, new)


def _flat(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return facts within facts by keys with dots."""
    found: list[tuple[str, Any]] = []
    for key, value in facts.items():
        found += _flat(value, f"{before}{key}.") if isinstance(value, dict) and value else [(f"{before}{key}", value)]
    return found


def _content(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shown(x: Tensor | None) -> str:
    return "missing" if x is None else f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _differs(folder: Path, key: str, old: object, new: object) -> PlanError:
    both = f"{show(str(old))}, not {show(str(new))}" if str(old) != str(new) else f"{old!r}, not {new!r}"
    return PlanError(293, f"{folder} was made with {key} {both}; resume with the same, or choose another folder.")


def _damaged(folder: Path, why: str) -> PlanError:
    return PlanError(293, f"{folder} cannot be resumed from: {why.rstrip('.')}; remove it and start anew.")
