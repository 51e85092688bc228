"""A student and its optimizer over however many processes were launched, by accelerate: what one step does with them.

One process trains the student where it lies. Several share the windows of each step between them and add up their
gradients: by DistributedDataParallel, or, where accelerate was launched with FSDP (version 2), with every parameter
split over them by torch's `fully_shard`. accelerate knows FSDP on accelerators alone; on the CPU the same variable,
ACCELERATE_USE_FSDP=true, has torch do it here. Two processes on the CPU are launched by mpirun, or by
`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2`; `--cpu` alone starts one.

What is wrapped is not the student but the application of a function to it: so a loss may call whatever part of the
student it likes, and as often.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from quantforge.errors import RecipeError
from quantforge.training import optimizers
from quantforge.training.batches import Batch
from quantforge.training.layers import to_training

StepLoss = Callable[[nn.Module, Batch, int, int], Tensor]
"""(student, micro-batch, step, count) → the sum of the micro-batch's token losses divided by `count`, a scalar; `count`
is how many predictions count in the whole step, over all micro-batches and processes."""

Prepare = Callable[[nn.Module, Batch, int], Batch]
"""(student, the step's whole batch, step) → the batch to train on: a row of each of the same windows. The student is in
evaluation mode and there are no gradients. Every process calls it, and must get the same from it."""

_KNOWN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


@dataclass(frozen=True, eq=False)
class Engine:
    """What trains a student.

    module     (function, arguments) → function(student, arguments); it is what spans the processes
    student    as it was given; its parameters may be split over processes
    optimizer  over these parameters
    """

    accelerator: Accelerator
    module: nn.Module
    student: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def device(self) -> torch.device:
        """Return where batches go."""
        return next(self.student.parameters()).device

    @property
    def count(self) -> int:
        """Return the number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def index(self) -> int:
        """Return the number of this process, from 0; 0 alone writes."""
        return int(self.accelerator.process_index)

    def gradients(self, loss: StepLoss, shares: list[list[Batch]], step: int) -> list[float]:
        """Work out the gradients of a step; return the losses of all micro-batches, those of process 0 first.

        shares  the micro-batches of each process, as many of each
        """
        count = sum(part.predictions for share in shares for part in share)
        self.optimizer.zero_grad(set_to_none=True)
        own, losses = shares[self.index], []
        for i, part in enumerate(own):
            last = i + 1 == len(own)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                found = self.module(loss, part.to(self.device), step, count)
                # gradients are averaged over processes, and are to be added up
                self.accelerator.backward(found * self.count)
            losses.append(found.detach())
        every: list[float] = self.accelerator.gather(torch.stack(losses)).tolist()
        return every

    def prepare(self, prepare: Prepare, batch: Batch, step: int) -> Batch:
        """Return what `prepare` makes of the batch of a step."""
        self.student.eval()
        with torch.no_grad():
            found: Batch = self.module(prepare, batch.to(self.device), step)
        to_training(self.student)
        assert found.windows == batch.windows
        return found

    def gradient_norm(self) -> float:
        """Return the norm of all gradients as one vector."""
        norm = nn.utils.get_total_norm([p.grad for p in self._trained().values() if p.grad is not None])
        return float(whole(norm))

    def update(self, rate: float, shrink: float) -> None:
        """Multiply the gradients by `shrink` and take a step at the learning rate `rate`."""
        if shrink != 1:
            for p in self._trained().values():
                if p.grad is not None:
                    p.grad.mul_(shrink)
        optimizers.set_rate(self.optimizer, rate)
        self.optimizer.step()

    def forget_gradients(self) -> None:
        """Give the memory of the gradients back."""
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained parameters and the optimizer's states, whole, on the CPU; all processes must ask."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # paged states are read by the CPU
        found = {}
        for name, p in self._trained().items():
            found[f"parameter {name}"] = _plain(p)
            for key, state in optimizers.states(_inner(self.optimizer), p).items():
                found[f"{key} {name}"] = _plain(state)
        return found

    def parameters(self) -> dict[str, Tensor]:
        """Return what of `tensors` must be there whatever the optimizer, without values."""
        return {
            f"parameter {name}": torch.empty(p.shape, dtype=p.dtype, device="meta")
            for name, p in self._trained().items()
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        named = self._trained()
        kept: dict[Tensor, dict[str, Tensor]] = {p: {} for p in named.values()}
        for full, tensor in sorted(tensors.items()):
            key, _, name = full.partition(" ")
            p = named[name]
            if key == "parameter":
                with torch.no_grad():
                    p.copy_(_as(tensor.to(p.device), p))
            else:
                kept[p][key] = _as(tensor, p) if tensor.shape == p.shape else tensor
        optimizers.restore(_inner(self.optimizer), kept)

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def _trained(self) -> dict[str, Tensor]:
        return trained(self.student)


def start(student: nn.Module, name: str, how: Mapping[str, Any]) -> Engine:
    """Return what trains `student`, with the optimizer `name` made with the arguments `how` of `optimizers.make`.

    Raises RecipeError if what accelerate was launched with is not known here, or does not go with the optimizer.
    """
    handler = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    once = GradientAccumulationPlugin(num_steps=1)  # whatever accelerate was launched with: micro-batches are ours
    accelerator = Accelerator(device_placement=False, gradient_accumulation_plugin=once, kwargs_handlers=[handler])
    accelerator.device_placement = accelerator.use_distributed  # alone, the student stays where it is
    sharded = accelerator.use_distributed and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    _check(accelerator, name, sharded)
    if not trained(student):
        raise RecipeError(246, "there is nothing to train: no parameter of the student wants a gradient.")
    module = _Applied(student)
    if sharded and not accelerator.is_fsdp2:
        _shard(module, init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
        optimizer = optimizers.make(name, trained(student), sharded=True, **how)
    else:
        optimizer = optimizers.make(name, trained(student), sharded=sharded, **how)
        with warnings.catch_warnings():
            # the name of broadcast_buffers is to change; accelerate passes no other
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            module, optimizer = accelerator.prepare(module, optimizer)
    return Engine(accelerator, module, student, optimizer)


def trained(student: nn.Module) -> dict[str, Tensor]:
    """Return the parameters with gradients by name, shared ones once."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def whole(x: Tensor) -> Tensor:
    """Return a tensor that may be split over processes in one piece; all processes must ask."""
    found: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return found


class _Applied(nn.Module):
    """A student whose forward pass is a function of it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        found = {type(module).__name__ for module in student.modules()}
        self._no_split_modules = sorted(found & set(getattr(student, "_no_split_modules", None) or ()))

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.student, *arguments)


def _shard(module: _Applied, mesh: DeviceMesh) -> None:
    """Split the parameters of each block over the processes, and then the rest."""
    for block in [m for m in module.modules() if type(m).__name__ in module._no_split_modules]:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _check(accelerator: Accelerator, name: str, sharded: bool) -> None:
    kind = accelerator.distributed_type
    if kind not in _KNOWN and not accelerator.is_fsdp2:
        raise RecipeError(
            246, f"training does not run on {kind.value} of accelerate; DDP works, and FSDP with --fsdp_version 2."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise RecipeError(
            246, f"training does not run in {accelerator.mixed_precision}; --mixed_precision no or bf16 does."
        )
    if sharded and name != "adamw":
        raise RecipeError(246, f"optimizer {name} does not go with parameters split over processes (FSDP); adamw does.")


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that accelerate wrapped."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def _as(x: Tensor, p: Tensor) -> Tensor:
    """Return `x` split over processes as `p` is."""
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements) if isinstance(p, DTensor) else x


def _plain(x: Tensor) -> Tensor:
    """Return `x` whole, on the CPU, contiguous, and with a memory of its own, as safetensors wants it."""
    found = whole(x.detach()).cpu().contiguous()
    return found if found.untyped_storage().nbytes() == found.nbytes and found.numel() > 1024 else found.clone()
