"""The kinds of plug-in and the laws they obey; what a contributor reads first.

A plug-in is a frozen dataclass whose fields are its options, registered with `quantforge.registry.register`. It
registers no hooks and sees no model: the pipeline collects what it `needs` and hands it over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from quantforge.numerics.problem import Problem, QWeight
    from quantforge.numerics.qtensor import QTensor
    from quantforge.plan import Plan


class Solver(Protocol):
    """Chooses codes.

    Laws, tested for every registered solver: the problem is left as it is; the result is what the format stores,
    finite, and the same whenever it is asked again; one that needs the Hessian never loses to rounding on the
    problem's loss.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected: () or ("hessian",)."""

    def solve(self, problem: Problem) -> QWeight:
        """Return `problem.weight` [out, in] as codes in `problem.format`."""


class Exporter(Protocol):
    """Writes a checkpoint.

    Laws: what it cannot hold exactly it refuses at plan time, with the reason; what it has written loads back to the
    same numbers, bit for bit.
    """

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be written in this format, and what could; None if it can."""

    def tensors(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name."""

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config` that tells loaders how to read it; `linears` names every nn.Linear."""

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, QTensor]:
        """Return the quantized layers by name, from a `quantization_config` and all tensors of a checkpoint."""
