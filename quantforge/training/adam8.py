"""AdamW that needs little memory for its states: 8-bit codes in blocks, or pages of a file, or both.

Dettmers et al., ICLR 2022, arXiv:2110.02861: both moments are kept as codes of the dynamic 8-bit maps, in blocks of 256
numbers that share the largest of their sizes; second moments above 0 never become 0, which is ours; they are numbers of
32 bits only while a step works on them, 131,072 at once here. That is 2 bytes and 1/32 a parameter, where Adam has 8.
Tensors of fewer than 4,096 numbers keep 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from quantforge.numerics.grids import dynamic8
from quantforge.training.paged import Page, new_page

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # numbers of a tensor, below which it keeps 32 bits: a norm would suffer, and little is gained
_CHUNK = 1 << 17  # numbers worked on at once, a multiple of BLOCK

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class CompactAdamW(torch.optim.Optimizer):
    """AdamW with states of 8 or 32 bits, in memory or in pages of files.

    bits   8, or 32: then the result of a step is bit for bit that of `torch.optim.AdamW(fused=True)`
    pages  folder of the files, which have no name and are gone with the optimizer; None keeps states in memory. A
           step then holds the states of one parameter after the other in memory, and changes nothing else
    States are plain tensors, which `state_dict` gives and `load_state_dict` takes.
    Raises ResourceError if `pages` has no room.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 8,
        pages: Path | None = None,
    ) -> None:
        self._bits, self._folder = bits, pages
        self._pages: dict[Tensor, Page] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; return what `closure` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p] or self._start(p)
                    (_update8 if "codes1" in state else _update32)(p, p.grad, state, group)
                    if p in self._pages:
                        self._pages[p].rest()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take states over; unlike torch's own, without a change of their dtype, and into the pages if there are."""
        super().load_state_dict({**state_dict, "state": {}})
        self._pages.clear()
        for p, found in zip(self._parameters(), _in_order(state_dict), strict=True):
            if found:
                state = self._start(p)
                for key, value in found.items():
                    state[key].copy_(value)
                if p in self._pages:
                    self._pages[p].rest()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        """Make the states of a parameter, all 0."""
        shapes = _shapes8(p) if self._bits == 8 and p.numel() >= SMALLEST else _shapes32(p)
        if self._folder is not None:
            self._pages[p] = new_page(self._folder, shapes)
            found = self._pages[p].tensors
        else:
            found = {key: torch.zeros(shape, dtype=dtype, device=p.device) for key, (shape, dtype) in shapes.items()}
        state = self.state[p] = {"step": torch.zeros((), dtype=torch.float32), **found}
        return state


def to_codes(x: Tensor, table: Map) -> tuple[Tensor, Tensor]:
    """Return the uint8 codes [n] of the values nearest to x [n] float32 in blocks, and the largest size in each."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return _nearest(scaled.view(-1)[: len(x)], table), largest


def from_codes(codes: Tensor, largest: Tensor, table: Map) -> Tensor:
    """Return the numbers [n] float32 that `to_codes` rounded to."""
    values = table.values.index_select(0, codes.int())
    whole = len(values) // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(largest[: whole // BLOCK, None])
    if whole < len(values):
        values[whole:] *= largest[-1]
    return values


@dataclass(frozen=True, eq=False)
class Map:
    """A table of 256 values from −1 or 0 to 1, and what finds the nearest of them.

    values   [256] float32, ascending
    middles  [256] between each value and the next; infinity at the end
    lowest   [65536] int32, the code of the lowest number whose bits have this upper half
    """

    values: Tensor
    middles: Tensor
    lowest: Tensor


@cache
def signed_map(device: torch.device | str = "cpu") -> Map:
    """Return the map of the first moments: dynamic8 of the numerics."""
    return _map(torch.tensor(dynamic8().values, dtype=torch.float32), device)


@cache
def unsigned_map(device: torch.device | str = "cpu") -> Map:
    """Return the map of the second moments, which have no sign: twice as fine, as in bitsandbytes.

    Decade i of 0 … 6 holds the middles of 2^(i+1) equal parts of [0.1, 1], times 10^(i−6); then 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, (2 << i) + 1)
        values.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    return _map(torch.cat(values).sort().values, device)


def _map(values: Tensor, device: torch.device | str) -> Map:
    middles = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([torch.inf])])
    bits = torch.arange(1 << 16, dtype=torch.int32).bitwise_left_shift(16)
    numbers = torch.where(bits < 0, bits.bitwise_or(0xFFFF), bits).view(torch.float32)
    lowest = torch.bucketize(numbers, middles[:-1], out_int32=True)
    return Map(values.to(device), middles.to(device), lowest.to(device))


def _nearest(x: Tensor, table: Map) -> Tensor:
    """Return the code [n] of the value nearest to each x [n], of two as near the lower one.

    The upper half of a number's bits tells its code but for one: between two such halves lies at most one middle of
    two values. Looking that up is several times as fast as searching the table.
    """
    code = table.lowest.index_select(0, x.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF))
    return code.add_(x > table.middles.index_select(0, code)).to(torch.uint8)


def _shapes8(p: Tensor) -> Shapes:
    blocks = -(-p.numel() // BLOCK)
    codes, largest = ((p.numel(),), torch.uint8), ((blocks,), torch.float32)
    return {"codes1": codes, "codes2": codes, "largest1": largest, "largest2": largest}


def _shapes32(p: Tensor) -> Shapes:
    return {"exp_avg": (tuple(p.shape), p.dtype), "exp_avg_sq": (tuple(p.shape), p.dtype)}


def _update32(p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [p],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _update8(p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    state["step"] += 1
    values, slopes = p.detach().contiguous().view(-1), grad.contiguous().view(-1)
    first, second = signed_map(p.device), unsigned_map(p.device)
    for start in range(0, len(values), _CHUNK):
        part = slice(start, start + _CHUNK)
        blocks = slice(start // BLOCK, start // BLOCK + _CHUNK // BLOCK)
        m = from_codes(state["codes1"][part], state["largest1"][blocks], first)
        v = from_codes(state["codes2"][part], state["largest2"][blocks], second)
        _adamw(values[part], slopes[part].float(), m, v, int(state["step"]), group)
        state["codes1"][part], state["largest1"][blocks] = to_codes(m, first)
        codes, state["largest2"][blocks] = to_codes(v, second)
        # code 0 is 0: a first moment whose second one is gone would be divided by eps alone
        state["codes2"][part] = codes.masked_fill_((codes == 0) & (v > 0), 1)
    if not p.is_contiguous():
        p.copy_(values.view_as(p))


def _adamw(values: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]) -> None:
    """Update `values` and its moments in place (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2)."""
    beta1, beta2 = group["betas"]
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    change = (m / size).mul_(group["lr"] / (1 - beta1**step))
    values.copy_((values.float() * (1 - group["lr"] * group["weight_decay"])).sub_(change))


def _in_order(state_dict: dict[str, Any]) -> Iterator[dict[str, Any]]:
    numbers = (i for group in state_dict["param_groups"] for i in group["params"])
    return (state_dict["state"].get(i, {}) for i in numbers)
