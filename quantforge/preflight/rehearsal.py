"""What a forward and a solver hold and how long they take: the one rehearsed without memory, the other on small layers.

Nothing here knows a method or an architecture. A forward is run with tensors that have no data, block by block as the
model itself runs it; a stage of layers is solved for real, twice, with fewer rows and columns than it has, and what it
took is carried over to its own size.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantforge.calibrate.stats import Statistics
from quantforge.errors import QuantForgeError
from quantforge.models import arch
from quantforge.models.walk import Stage
from quantforge.numerics.blocks import extents
from quantforge.numerics.problem import TILES, WIDE
from quantforge.numerics.products import linear
from quantforge.plan import LayerPlan, Plan
from quantforge.solving import solve

_SMALL = 256  # columns of the layers that solvers are tried on
_GATHERED = {"hessian": 13.0, "drift": 50.0}  # bytes for D², while sums become means
_KEPT = {"hessian": 4.0, "drift": 12.0}  # while rows are rounded
_CHAIN = logging.getLogger("torch._subclasses.fake_tensor")


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that were made within it and still live.

    own  storages that are not counted, as those of parameters
    """

    def __init__(self, own: frozenset[int] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own = own
        self.peak = self.made = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def now(self) -> int:
        """Return the bytes that live now."""
        self._held = {key: pair for key, pair in self._held.items() if not _expired(pair[0])}
        return sum(size for _, size in self._held.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and count what it made."""
        found = func(*args, **(kwargs or {}))
        news = 0
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                known = _reference(storage)
                held = self._held.get(known.cdata)
                if known.cdata not in self.own and (held is None or _expired(held[0])):
                    self._held[known.cdata] = (known, storage.nbytes())
                    news += storage.nbytes()
        if news:
            self.made += news
            self.peak = max(self.peak, self.now())
        return found


def _reference(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _expired(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Forward:
    """What the forward of one batch holds in float32, in bytes a token.

    parked   the most that lives while a batch waits at a layer
    running  the most that lives at any time
    moved    all that a block's operators write
    """

    parked: float
    running: float
    moved: float


def forward(config: Any, batch: int, seq_len: int) -> Forward:
    """Rehearse the forward of two blocks, without data, on a batch of `batch` windows of `seq_len` tokens.

    A model whose forward looks at values, as one with experts does, is judged by its widths.
    """
    short, width = _shortened(config, 2), int(config.get_text_config().hidden_size)
    found: list[int] = []
    with (
        suppress(Exception),
        _silent(),
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(),
    ):  # whatever a model does that only values can tell
        model = AutoModelForCausalLM.from_config(short, dtype=torch.float32).eval()
        live = Live(frozenset(_reference(p.untyped_storage()).cdata for p in model.parameters()))
        for module in model.modules():
            if arch.is_linear(module):
                module.register_forward_pre_hook(lambda module, args: found.append(live.now()))
        ids = torch.zeros(batch, seq_len, dtype=torch.long)
        with torch.no_grad(), live:
            getattr(model, "base_model", model)(input_ids=ids, use_cache=False)
        tokens = batch * seq_len
        return Forward(max(found) / tokens, live.peak / tokens, live.made / 2 / tokens)
    text = config.get_text_config()
    wide = max(int(getattr(text, name, 0) or 0) for name in ("intermediate_size", "moe_intermediate_size"))
    each = int(getattr(text, "num_experts_per_tok", 1) or 1)
    return Forward(4.0 * (7 * width + each * wide), 4.0 * (9 * width + 4 * each * wide), 80.0 * width)


@dataclass(frozen=True)
class Solving:
    """What solving a stage takes, by rows R (of all its layers) and columns D.

    memory   pairs of coefficients (of D², of R D) of the bytes that live at most, by moments: the one that has most in
             layers as wide as high, the one in higher layers, and while sums become means
    seconds  coefficients (of D, of R D) of the time, without products of matrices
    """

    memory: tuple[tuple[float, float], ...]
    seconds: tuple[float, float]

    def bytes(self, rows: int, columns: int) -> int:
        """Return the bytes that live at most while such a stage is solved."""
        return round(max(square * columns**2 + cell * rows * columns for square, cell in self.memory))

    def time(self, rows: int, columns: int) -> float:
        """Return the seconds of what is no product of matrices."""
        return self.seconds[0] * columns + self.seconds[1] * rows * columns


MOST = Solving(((100.0, 60.0),), (1e-4, 1e-6))  # more than any solver of ours holds


def solving(plan: Plan, speed: float | None) -> Callable[[LayerPlan], Solving]:
    """Return what tells how a layer's solver, format and corrections behave, each tried when it is first asked for.

    speed  of products of matrices, operations a second; None: nothing is tried, and solvers hold as much as any does
    """
    known: dict[Any, Solving] = {}

    def of(p: LayerPlan) -> Solving:
        key = (p.solver, p.format, p.corrections, p.inputs)
        if speed is None:
            return MOST
        if key not in known:
            known[key] = _tried(plan, p, speed)
        return known[key]

    return of


def _tried(plan: Plan, p: LayerPlan, speed: float) -> Solving:
    """Solve two small layers in place of `p`; a share of the work is a product of matrices, which grows faster."""
    rows, columns, fewer = (_SMALL // 2, 4 * _SMALL), _columns(p, _SMALL), _columns(p, _SMALL // 2)
    try:
        times = [_seconds(plan, p, r, columns) for r in rows]
        low, high = _line(plan, p, (fewer // 2, fewer), fewer), _line(plan, p, (4 * _SMALL, 8 * _SMALL), fewer)
    except (QuantForgeError, ValueError, RuntimeError, AssertionError):  # a shape that the method does not take
        return MOST
    # what is searched piece by piece would count as if it grew with the columns; what is gathered is known
    gathered, kept = (sum(sizes.get(need, 0.0) for need in p.needs) for sizes in (_GATHERED, _KEPT))
    memory = low, (kept, high[1]), (gathered, 0.0)
    hessian = "hessian" in p.needs
    plain = [max(t - products(r, columns, hessian=hessian) / speed, 0.0) for t, r in zip(times, rows, strict=True)]
    each = max(plain[1] - plain[0], 0.0) / ((rows[1] - rows[0]) * columns)
    fixed = max(plain[0] - each * rows[0] * columns, 0.0) / columns
    return Solving(memory, (fixed, each))


def _line(plan: Plan, p: LayerPlan, rows: tuple[int, int], columns: int) -> tuple[float, float]:
    """Return the coefficients (of D², of R D) of the bytes that live at most, by two numbers of rows."""
    peaks = [_peak(plan, p, r, columns) for r in rows]
    cell = max(peaks[1] - peaks[0], 0) / ((rows[1] - rows[0]) * columns)
    return max(peaks[0] - cell * rows[0] * columns, 0.0) / columns**2, cell


def _columns(p: LayerPlan, most: int) -> int:
    """Return how many columns a small layer in place of `p` has: about `most`, by whole blocks of its format."""
    wide = min(most, p.shape[1])
    unit = extents((p.shape[0], wide), p.format.block)[1]
    return min(-(-wide // unit) * unit, p.shape[1])


def products(rows: int, columns: int, *, hessian: bool) -> float:
    """Return the operations of products of matrices in solving a stage: the factor, the sweep, and judging the rows."""
    return (4 / 3 * columns**3 + (1 + 4 * judging(columns)) * rows * columns**2) if hessian else 0.0


def judging(columns: int) -> float:
    """Return the operations, by rows and squared columns, of judging a result by the Hessian."""
    return 2.0 if columns < WIDE else (TILES + 1) / TILES


def _seconds(plan: Plan, p: LayerPlan, rows: int, columns: int) -> float:
    work, found = _small(plan, p, rows, columns), []
    for _ in range(2):  # what is done for the first time is slower
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _peak(plan: Plan, p: LayerPlan, rows: int, columns: int) -> int:
    work = _small(plan, p, rows, columns)
    with Live() as live:
        work()
    return int(live.peak)


def _small(plan: Plan, p: LayerPlan, rows: int, columns: int) -> Callable[[], object]:
    """Return the work of solving a random layer [rows, columns] in place of `p`, from gathering to putting in place."""
    draw = torch.Generator().manual_seed(0)
    with torch.device("meta"):  # where nothing is drawn
        module = Conv1D(rows, columns) if p.transposed else nn.Linear(columns, rows, bias=False)
    weight = torch.randn(module.weight.shape, generator=draw) / columns**0.5
    module.weight = nn.Parameter(weight, requires_grad=False)
    if p.transposed:
        module.bias = nn.Parameter(torch.zeros(rows), requires_grad=False)
    small = replace(p, name="x", shape=(rows, columns))
    part = replace(plan, layers={"x": small}, stages=(("x",),), floats=(), fused=())
    needs = part.walk_needs
    collected = needs if needs <= {"extremes", "blocks", "float_blocks"} else needs | {"hessian"}
    x = torch.randn(max(columns // 8, 8), columns, generator=draw)
    stage = Stage(("x",), (module,))

    def work() -> object:
        with torch.no_grad():
            found = Statistics(collected, columns) if collected else None
            if found is not None:
                for index, half in enumerate(x.chunk(2)):
                    found.add(index, half, half + 0.01 if "drift" in collected else None)
            return solve(stage, part, found, lambda layer: None, total=len(x))

    return work


@dataclass(frozen=True)
class Machine:
    """What this machine does: operations of float32 products a second, and bytes read or written a second."""

    speed: float
    bandwidth: float


def machine() -> Machine:
    """Measure this machine, for some 60 ms."""
    a, big = torch.ones(1024, 1024), torch.ones(1 << 22)
    other = torch.empty_like(big)
    products = _rate(lambda: linear(a, a), 0.04)
    copies = _rate(lambda: torch.mul(big, 2.0, out=other), 0.02)
    return Machine(2 * 1024**3 * products, 2 * big.nbytes * copies)


def _rate(work: Callable[[], object], seconds: float) -> float:
    """Return how often `work` is done in a second, by its best run, as others may be at work too."""
    work()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return 1 / best


def _shortened(config: Any, blocks: int) -> Any:
    """Return a copy of a transformers config with its first blocks only."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    count = min(blocks, int(text.num_hidden_layers))
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = list(kinds)[:count]
    text.num_hidden_layers = count
    return short


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what a rehearsal cannot run off the terminal."""
    level = _CHAIN.level
    _CHAIN.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        _CHAIN.setLevel(level)
