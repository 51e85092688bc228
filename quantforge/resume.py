"""What a run commits, and where one that was broken off goes on: its finished layers, its scales, and the hidden states
with which every batch enters the next decoder block.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ResourceError
from quantforge.exporters.native import Native
from quantforge.journal import Journal
from quantforge.numerics import formats
from quantforge.numerics.problem import QWeight
from quantforge.solving import Layer, UnreadWeight

_FORMAT = Native()  # holds any quantized layer exactly


@dataclass(frozen=True)
class Chosen:
    """What a transform chose for one group of layers.

    group   its place in the order of `fold.find`
    scales  [in]
    widths  [in], the largest |x| of each channel before; None if it was not looked at
    notes   on tokens that could not be looked at
    """

    group: int
    scales: Tensor
    widths: Tensor | None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Place:
    """A place in a run: all before block `at` of its walk number `phase` is done.

    outputs       how blocks return, as `walk.Entries` has it
    hidden        what each batch enters the block with; empty at the first block
    float_hidden  the same of the float model, where it is walked beside
    """

    phase: int = 0
    at: int = 0
    outputs: int = 0
    hidden: Sequence[Tensor] = ()
    float_hidden: Sequence[Tensor] = ()


class Held(Sequence[Tensor]):
    """Hidden states in memory; `changed` tells whether a block has written into what it was given."""

    def __init__(self, hidden: Sequence[Tensor]) -> None:
        """Take tensors as a block is about to get them."""
        self.hidden = list(hidden)
        self._versions = [h._version for h in self.hidden]

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: Any) -> Any:
        return self.hidden[index]

    @property
    def changed(self) -> bool:
        """Tell whether any of them has been written into since."""
        return [h._version for h in self.hidden] != self._versions


class Objects(Sequence[Tensor]):
    """Hidden states that lie in a journal, one object a batch, read whenever they are asked for."""

    def __init__(self, journal: Journal, names: Sequence[str], device: torch.device) -> None:
        self.journal, self.names, self.device = journal, list(names), device

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        tensors, _ = self.journal.get(self.names[index])
        return tensors["hidden"].to(self.device, copy=True)


class Record:
    """What is done of a run, in memory or, with a journal, also on disk.

    journal  None: nothing is committed
    lean     True: weights of finished layers are not held in memory, but in the journal
    place    where the run goes on
    layers   finished layers by name
    chosen   of each walk for a transform, what it chose
    tuned    objects with parameters that a tuner changed, or that stay in float in a block that it changed
    """

    def __init__(self, journal: Journal | None, device: torch.device, *, lean: bool = False) -> None:
        assert journal is not None or not lean
        self.journal, self.device, self.lean = journal, device, lean
        self.place = Place()
        self.layers: dict[str, Layer] = {}
        self.chosen: dict[int, list[Chosen]] = {}
        self.tuned: dict[str, Tensor] = {}
        self._before = 0.0
        self._start = time.perf_counter()
        self._rows: list[str] = []  # objects that no commit names yet
        self._new_tuned: list[str] = []
        self._unwritten: list[Layer] = []
        self._new_chosen: list[tuple[int, Chosen]] = []
        self._committed: dict[str, list[str]] = {}  # the hidden states of the last commit
        self._tensors = _OneObject(self.journal, device)
        for facts in () if journal is None else journal.commits:
            if "phase" in facts:
                self._restore(facts)

    @property
    def seconds(self) -> float:
        """Return for how long there was work, in this process and in those before."""
        return self._before + time.perf_counter() - self._start

    def add(self, layers: Sequence[Layer]) -> list[Layer]:
        """Take finished layers; return them as they are held from now on."""
        if self.lean:
            layers = self._put(layers)
        elif self.journal is not None:
            self._unwritten += layers
        self.layers |= {layer.name: layer for layer in layers}
        return list(layers)

    def choose(self, phase: int, chosen: Chosen) -> None:
        """Take what a transform chose."""
        self.chosen.setdefault(phase, []).append(chosen)
        self._new_chosen.append((phase, chosen))

    def tune(self, parameters: Mapping[str, Tensor]) -> None:
        """Take parameters that a tuner changed beside its layers' weights, by full name."""
        self.tuned |= parameters
        if self.journal is not None and parameters:
            self._new_tuned.append(self.journal.put(parameters))

    def keep(self, hidden: Tensor) -> str:
        """Put the hidden states of one batch on disk; return what `Objects` reads them by."""
        assert self.journal is not None
        return self.journal.put({"hidden": hidden})

    def due(self) -> bool:
        """Tell whether it is time for a commit."""
        return self.journal is not None and self.journal.due()

    def commit(self) -> bool:
        """Make all that was taken, and the place, outlast this process; tell whether that was possible.

        Nothing is done in the middle of a block that writes into its own hidden states: the last commit then stands.
        """
        place = self.place
        if self.journal is None or any(isinstance(h, Held) and h.changed for h in (place.hidden, place.float_hidden)):
            return False
        self._put(self._unwritten)
        self._unwritten = []
        hidden = {
            "hidden_objects": self._names(place.hidden),
            "float_objects": self._names(place.float_hidden),
        }
        facts = {
            "phase": place.phase,
            "at": place.at,
            "outputs": place.outputs,
            "seconds": self.seconds,
            "rows_objects": self._rows,
            "tuned_objects": self._new_tuned,
            "chosen_object": self._put_chosen(),
            **hidden,
            "drop": sorted(
                {n for old in self._committed.values() for n in old} - {n for v in hidden.values() for n in v}
            ),
        }
        self.journal.commit(facts)
        self._committed = hidden
        self._rows, self._new_tuned, self._new_chosen = [], [], []
        return True

    def _names(self, hidden: Sequence[Tensor]) -> list[str]:
        return hidden.names if isinstance(hidden, Objects) else [self.keep(h) for h in hidden]

    def _put(self, layers: Sequence[Layer]) -> list[Layer]:
        """Put layers into one object; return them with weights that are read from it."""
        assert self.journal is not None
        if not layers:
            return []
        tensors = {k: v for layer in layers for k, v in _FORMAT.tensors(layer.name, layer.weight).items()}
        rows = [_row(layer) for layer in layers]
        name = self.journal.put(tensors, {"rows": rows})
        self._rows.append(name)
        return [self._layer(name, row) for row in rows]

    def _layer(self, name: str, row: Mapping[str, Any]) -> Layer:
        """Return a layer of the object `name`, whose weight is read when it is asked for."""
        about = row["weight"]

        def read() -> QWeight:
            return replace(self._tensors.read(name, row["name"], about), notes=row["notes"])

        shape = (int(about["shape"][0]), int(about["shape"][1]))
        inputs = read().inputs if about["inputs"] is not None else None
        weight = UnreadWeight(read, row["notes"], inputs, row["nbits"], shape, formats.from_json(about["format"]))
        return Layer(row["name"], weight, row["loss"], row["relative_loss"], row["tokens"], row["seconds"])

    def _put_chosen(self) -> list[str]:
        if not self._new_chosen:
            return []
        assert self.journal is not None
        tensors: dict[str, Tensor] = {}
        for i, (_, chosen) in enumerate(self._new_chosen):
            tensors[f"{i}.scales"] = chosen.scales
            if chosen.widths is not None:
                tensors[f"{i}.widths"] = chosen.widths
        return [
            self.journal.put(
                tensors, {"groups": [[phase, chosen.group, dict(chosen.notes)] for phase, chosen in self._new_chosen]}
            )
        ]

    def _restore(self, facts: Mapping[str, Any]) -> None:
        """Take over one commit, those before it being taken over."""
        assert self.journal is not None
        for name in facts["rows_objects"]:
            for row in self.journal.get(name)[1]["rows"]:
                layer = self._layer(name, row)
                if not self.lean:
                    assert isinstance(layer.weight, UnreadWeight)
                    layer = replace(layer, weight=layer.weight.read())
                self.layers[layer.name] = layer
        for name in facts["chosen_object"]:
            tensors, about = self.journal.get(name)
            tensors = {key: value.to(self.device, copy=True) for key, value in tensors.items()}
            for i, (phase, group, notes) in enumerate(about["groups"]):
                chosen = Chosen(group, tensors[f"{i}.scales"], tensors.get(f"{i}.widths"), notes)
                self.chosen.setdefault(phase, []).append(chosen)
        for name in facts["tuned_objects"]:
            self.tuned |= {k: v.to(self.device, copy=True) for k, v in self.journal.get(name)[0].items()}
        self._committed = {key: facts[key] for key in ("hidden_objects", "float_objects")}
        hidden, floats = (Objects(self.journal, names, self.device) for names in self._committed.values())
        self.place = Place(facts["phase"], facts["at"], facts["outputs"], hidden, floats)
        self._before = facts["seconds"]


def _row(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "weight": _FORMAT.describe(layer.weight),
        "notes": layer.weight.notes,
        "nbits": layer.weight.nbits,
        "loss": layer.loss,
        "relative_loss": layer.relative_loss,
        "tokens": layer.tokens,
        "seconds": layer.seconds,
    }


class _OneObject:
    """Reads layers out of objects; the one that was read last stays open, since layers are read in order."""

    def __init__(self, journal: Journal | None, device: torch.device) -> None:
        self.journal, self.device = journal, device
        self.name = ""
        self.tensors: dict[str, Tensor] = {}

    def read(self, name: str, layer: str, about: Mapping[str, Any]) -> QWeight:
        """Return the weight of `layer` from the object `name`."""
        assert self.journal is not None
        if not self.journal.folder.exists():
            raise ResourceError(524, f"{layer} is in memory no more: read the checkpoint by quantforge.load.")
        if name != self.name:
            self.tensors, self.name = {}, ""
            self.tensors, self.name = self.journal.get(name)[0], name
        own = {
            key: value.to(self.device, copy=True) for key, value in self.tensors.items() if key.startswith(f"{layer}.")
        }
        return _FORMAT.read({"version": 1, "layers": {layer: about}}, own)[layer]
