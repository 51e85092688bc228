"""Layers that read the same input, such as q, k and v, as one product: the first that is called computes for all.

No architecture's code knows of it. Each layer stays a module of its own; what tells that the input is the same is the
tensor itself and its version, which every change in place counts up, but through `.data`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantforge.models import arch
from quantforge.numerics.inputs import QInput
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.numerics.ranges import plain_format
from quantforge.numerics.residuals import Columns
from quantforge.runtime.kernel import Kernel, PackedLinear


@dataclass
class _Kept:
    """A product that some of the layers have yet to ask for; `copy` is of inputs that have no version."""

    input: weakref.ref[Tensor]
    version: int
    copy: Tensor | None
    result: Tensor
    taken: set[int] = field(default_factory=set)

    def is_of(self, x: Tensor) -> bool:
        """Tell whether the result is that of `x` as it is now."""
        if self.input() is not x:
            return False
        return self.version == x._version if self.copy is None else torch.equal(self.copy, x)


class Joint:
    """One kernel for several layers, whose rows follow each other; of each thread the last product is kept.

    It is let go when each layer has taken its part, when the first is called with another input, and with its input.
    """

    def __init__(self, kernel: Kernel, rows: Sequence[int]) -> None:
        """Take the kernel of all layers, and the number of outputs of each."""
        self.kernel = kernel
        self.rows = tuple(rows)
        self._kept: dict[int, _Kept] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return the outputs [tokens, out] of layer `index` for `x` [..., in], in memory that nothing else writes."""
        thread = threading.get_ident()
        kept = self._kept.get(thread)
        if kept is None or index in kept.taken or not kept.is_of(x):
            timeless = x.is_inference() or torch.is_inference_mode_enabled()
            result = self.kernel.product(x.reshape(-1, x.shape[-1]).contiguous())
            version = 0 if timeless else x._version
            kept = _Kept(
                weakref.ref(x, functools.partial(self._let_go, thread)),
                version,
                x.clone() if timeless else None,
                result,
            )
            self._kept[thread] = kept
        kept.taken.add(index)
        if len(kept.taken) == len(self.rows):
            self._kept.pop(thread, None)
        start = sum(self.rows[:index])
        return kept.result[:, start : start + self.rows[index]]

    def _let_go(self, thread: int, gone: weakref.ref[Tensor]) -> None:
        """Forget what `thread` keeps if it is of the input that is gone."""
        kept = self._kept.get(thread)
        if kept is not None and kept.input is gone:
            self._kept.pop(thread, None)


class JointLinear(PackedLinear):
    """A layer whose product is a part of a joint one."""

    def __init__(self, joint: Joint, index: int, bias: Tensor | None = None) -> None:
        """Take part `index` of `joint`, and the bias as it is."""
        super().__init__(joint.kernel, bias)
        self.joint, self.index = joint, index
        self.out_features = joint.rows[index]

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [..., out] for `x` [..., in]."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = self.joint.part(self.index, x)
        # models may ask for a view that only whole memory has
        y = y.contiguous() if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def __deepcopy__(self, memo: dict[int, object]) -> JointLinear:
        joint = memo.setdefault(id(self.joint), Joint(self.kernel, self.joint.rows))
        assert isinstance(joint, Joint)
        return JointLinear(joint, self.index, None if self.bias is None else self.bias.clone())


def partners(model: torch.nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return `names` of layers of `model` as those that read the same input; one alone where nothing is known."""
    wanted, found = set(names), []
    if arch.knows(model):
        for stage in arch.find_stages(model)[0]:
            here = tuple(name for name in stage.names if name in wanted)
            wanted -= set(here)
            found += [here] if here else []
    return [*found, *((name,) for name in names if name in wanted)]


def stack(weights: Sequence[QWeight]) -> QWeight | None:
    """Return the weights of layers that read the same input as one, row after row; None if they differ in kind.

    Scales that are quantized themselves become float32.
    """
    first = weights[0]
    block = first.base.format.block
    alike = all(w.base.format == first.base.format and same_inputs(w.inputs, first.inputs) for w in weights)
    # of flat blocks, those that end with rows have scales by row too
    flat = first.base.offset is not None or any(len(_scale(w.base)) != w.base.shape[0] for w in weights)
    if not alike or flat or (isinstance(block, tuple) and block[0] != 1):
        return None
    residuals = _columns(weights)
    if residuals is None:
        return None
    scales, zeros = [_scale(w.base) for w in weights], [_zero(w.base) for w in weights]
    base = QTensor(
        plain_format(first.base.format),
        torch.cat([w.base.codes for w in weights]),
        torch.cat(scales),
        torch.cat([z for z in zeros if z is not None]) if zeros[0] is not None else None,
    )
    return replace(first, base=base, residuals=residuals)


def _scale(q: QTensor) -> Tensor:
    return q.scale if isinstance(q.scale, Tensor) else q.scale.dequantize(torch.float32)


def _zero(q: QTensor) -> Tensor | None:
    return q.zero.dequantize(torch.float32) if isinstance(q.zero, QTensor) else q.zero


def _columns(weights: Sequence[QWeight]) -> tuple[Columns, ...] | None:
    """Return the columns that all layers keep in float, as one; () if none keeps any, None if they differ."""
    kept = [[r for r in w.residuals if isinstance(r, Columns)] for w in weights]
    if any(len(own) != len(w.residuals) or len(own) != len(kept[0]) for own, w in zip(kept, weights, strict=True)):
        return None
    if not kept[0]:
        return ()
    index = kept[0][0].index
    if len(kept[0]) > 1 or not all(torch.equal(own[0].index, index) for own in kept):
        return None
    return (Columns(index, torch.cat([own[0].values for own in kept])),)


def same_inputs(a: QInput | None, b: QInput | None) -> bool:
    """Tell whether two layers round the same input alike."""
    if a is None or b is None:
        return a is b
    if a.inputs != b.inputs:
        return False
    ranges = [() if q.range is None else (q.range.scale, q.range.zero) for q in (a, b)]
    parts = [[*r, *(() if q.spared is None else (q.spared,))] for r, q in zip(ranges, (a, b), strict=True)]
    return len(parts[0]) == len(parts[1]) and all(torch.equal(x, y) for x, y in zip(*parts, strict=True))
