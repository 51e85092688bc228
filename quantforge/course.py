"""One walk through the blocks of a model, from where a run stands, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantforge import stopping
from quantforge.errors import ResourceError, Stopped
from quantforge.models.blocks import Blocks
from quantforge.models.walk import Entries, Stage, hidden_of, walk
from quantforge.resume import Held, Objects, Record


@dataclass(frozen=True)
class Run:
    """What a run works on.

    blocks   of the model
    record   what is done of it
    again    walks compute again what they could have kept in memory, and keep hidden states on disk
    command  the command line that goes on with it; "" if there is none
    """

    blocks: Blocks
    record: Record
    again: bool = False
    command: str = ""

    def check_stop(self) -> None:
        """Commit what is done and raise Stopped, if the process was asked to stop and can be gone on with."""
        if self.record.journal is not None and stopping.asked():
            kept = "what is done is kept" if self.record.commit() else "what was committed before this block is kept"
            raise Stopped(620, f"stopped, and {kept}; {stopping.going_on(self.command)}")


def by_block(blocks: Blocks, stages: Sequence[Stage], first: int = 0) -> list[Stage]:
    """Return stages from block `first` to the last that has any, each block's behind a stage that is the block."""
    inside: dict[int, list[Stage]] = {}
    for stage in stages:
        inside.setdefault(number(blocks, stage), []).append(stage)
    found: list[Stage] = []
    for index in range(first, max(inside, default=-1) + 1):
        found.append(Stage((f"{blocks.path}.{index}",), (blocks.modules[index],), block=True))
        found += inside.get(index, [])
    return found


def number(blocks: Blocks, stage: Stage) -> int:
    """Return the number of the block that a stage is, or lies in."""
    return int(stage.names[0].removeprefix(f"{blocks.path}.").partition(".")[0])


class Course:
    """A walk from a block on.

    stages   as `by_block` gives them
    at       the block that all batches have reached, with `hidden` of each; None where that is not kept
    outputs  how blocks return, as `Entries` has it
    """

    def __init__(
        self, run: Run, batches: Sequence[Tensor], stages: Sequence[Stage], hidden: Sequence[Tensor], outputs: int
    ) -> None:
        self.run, self.batches, self.stages = run, batches, stages
        self.at = number(run.blocks, stages[0]) if stages else 0
        self.hidden: Sequence[Tensor] | None = hidden
        self._entries = Entries(run.blocks.modules, outputs)
        self._entries.at, self._entries.hidden = self.at, hidden

    @property
    def outputs(self) -> int:
        """Return how blocks return, as far as it has been seen."""
        return self._entries.outputs

    def walk(self, observe: Callable[[int, int, Any], None]) -> Iterator[int]:
        """Yield the index of each stage when every batch has reached it, with its block in memory, as `walk` does.

        It ends with the last stage; what comes behind that is not computed.
        """
        if not self.stages:
            return
        record, blocks = self.run.record, self.run.blocks
        waiting: dict[int, Any] = {}

        def see(index: int, batch: int, x: Any) -> None:
            if self.stages[index].block:
                if self.run.again:
                    waiting[batch] = record.keep(hidden_of(x))
                elif record.journal is not None:
                    waiting[batch] = hidden_of(x)
            observe(index, batch, x)

        forward = body(blocks.model)
        for index in walk(forward, self.batches, self.stages, see, self._entries, self.run.again):
            if self.stages[index].block:
                self.at = number(blocks, self.stages[index])
                self._keep([waiting.pop(batch) for batch in sorted(waiting)])
                blocks.enter(self.at)
            yield index
            if index + 1 == len(self.stages):
                break
        blocks.leave()

    def _keep(self, hidden: list[Any]) -> None:
        """Take the hidden states with which all batches enter a block; a batch that does not has none to go on with."""
        self.hidden = None
        if len(hidden) == len(self.batches):
            self.hidden = hidden if self.run.again else Held(hidden)
        if self.run.again:
            journal, device = self.run.record.journal, self.run.record.device
            assert journal is not None
            if self.hidden is None:
                raise ResourceError(
                    526,
                    f"block {self.at} is not called with every window, so walks cannot begin there: more "
                    "--max-memory, or fewer --samples, lets them be kept in memory.",
                )
            self.hidden = self._entries.hidden = Objects(journal, hidden, device)
            self._entries.at = self.at


def body(model: nn.Module) -> Callable[[Tensor], object]:
    """Return the forward without the output head, which no layer behind it needs."""
    inner = getattr(model, "base_model", model)
    return lambda batch: inner(input_ids=batch, use_cache=False)
