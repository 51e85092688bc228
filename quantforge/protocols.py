"""The kinds of plug-in and the laws they obey; what a contributor reads first.

A plug-in is a frozen dataclass whose fields are its options, registered with `quantforge.registry.register`. It
registers no hooks and sees no model: the pipeline collects what it `needs` and hands it over in the `Problem`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantforge.models.walk import Call
    from quantforge.numerics.formats import Format
    from quantforge.numerics.inputs import Scheme
    from quantforge.numerics.problem import Problem, QWeight
    from quantforge.numerics.ranges import Range
    from quantforge.plan import Plan

Shape = tuple[int, int]


class Solver(Protocol):
    """Chooses codes.

    Laws, tested for every registered solver: the problem is left as it is; the result is what the format stores,
    finite, and the same whenever it is asked again; one that needs the Hessian never loses to rounding on the
    problem's loss.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected, of "hessian", "magnitude", "drift", "extremes", "samples"."""

    @property
    def extends_format(self) -> bool:
        """Tell whether results may hold more than the format says: single weights in float, a table of their own."""

    @property
    def takes_ranges(self) -> bool:
        """Tell whether it rounds under `problem.range` where there is one."""

    @property
    def by_row(self) -> bool:
        """Tell whether each row's result is its own, so that layers with the same input may be solved as one matrix."""

    def refuses(self, shape: Shape, fmt: Format) -> str | None:
        """Return why a layer of `shape` (out, in) cannot be solved in `fmt`, and what could; None if it can."""

    def solve(self, problem: Problem) -> QWeight:
        """Return `problem.weight` [out, in] as codes in `problem.format`."""


class Transform(Protocol):
    """Rescales the input channels of layers, and what produces them the other way: the float model stays the same.

    Laws: the scales are positive and finite, and the model's outputs are unchanged before anything is quantized.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected."""

    @property
    def producers(self) -> tuple[str, ...]:
        """Return what may take the inverse scales: of "norm", "values" (attention's), "rows" (of a linear layer)."""

    def scales(self, problem: Problem, tie: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what each input channel of `problem.weight` is to be multiplied by, [in]; ones leave it alone.

        tie  [in] → [in]: makes a quantity the same in channels that must share their scale
        """


class Tuner(Protocol):
    """Trains, on one decoder block at a time, its weights, or what its layers are then rounded with.

    Law: the error of the block's output with all its layers rounded is not raised.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected, with "blocks": the calls of every block, and "float_blocks"."""

    def refuses(self, shape: Shape, fmt: Format) -> str | None:
        """Return why a layer of `shape` (out, in) stored in `fmt` cannot be trained; None if it can."""

    def tune(
        self, block: nn.Module, schemes: Mapping[str, Scheme], calls: Sequence[Call], float_calls: Sequence[Call]
    ) -> dict[str, Range]:
        """Return the range of each layer whose range was trained, by its name within `block`; weights change in place.

        calls        the arguments with which the model, rounded up to here, calls the block, batch by batch
        float_calls  those of the float model, if "float_blocks" are needed
        """


class Correction(Protocol):
    """Appends to a result what makes up for its error.

    Laws: it lowers the error that its docstring names, and codes stay as they are.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected."""

    def refuses(self, shape: Shape, fmt: Format) -> str | None:
        """Return why a layer of `shape` (out, in) stored in `fmt` cannot be corrected; None if it can."""

    def nbits(self, shape: Shape) -> int:
        """Count the bits it adds to a layer of `shape`."""

    def correct(self, problem: Problem, solved: QWeight) -> QWeight:
        """Return `solved` with its residuals appended."""


class Exporter(Protocol):
    """Writes a checkpoint.

    Laws: what it cannot hold exactly it refuses at plan time, with the reason; what it has written loads back to the
    same numbers, bit for bit.
    """

    def takes(self, plan: Plan) -> bool:
        """Tell whether this is the container for the formats of `plan`, if nothing else stands against it."""

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be written in this format, and what could; None if it can."""

    def fix(self, fmt: Format) -> Format:
        """Return what this container makes of `fmt`, a method's own, where the user names the container.

        It is asked before anything is solved; what the user says of bits, groups and zero points goes before it.
        """

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """Return the dtypes of floats and of scales in a checkpoint of a model in `own`, if the user names it.

        None for scales: it takes any, and they come in the dtype of floats.
        """

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name."""

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config` that tells loaders how to read it; `linears` names every nn.Linear."""

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Return the quantized layers by name, taking their tensors out of `tensors`, all those of a checkpoint."""


@runtime_checkable
class FileExporter(Exporter, Protocol):
    """An exporter whose weights are no safetensors: it writes their file itself, beside config.json and the tokenizer.

    Its `tensors` are not asked for, and where its `config` is empty config.json says nothing of quantization.
    """

    def refuses_tokenizer(self, tokenizer: Any) -> str | None:
        """Return why the file cannot hold a model's tokenizer, or None for one that is missing; None if it can."""

    def notes(self, config: Any, tokenizer: Any) -> list[str]:
        """Return what a user should know before a model with this config and tokenizer is written."""

    def write(
        self,
        folder: Path,
        model: PreTrainedModel,
        plan: Plan,
        layers: Mapping[str, QWeight],
        tensors: Mapping[str, Tensor],
        tokenizer: Any,
        source: str,
    ) -> None:
        """Write the weights into `folder`, which holds nothing yet.

        layers     the quantized layers, by full name
        tensors    all else of the model's state, on the CPU, floats in `plan.dtype`; tied ones are one tensor
        tokenizer  the model's, or None
        source     name of the float model
        """
