"""QLoRA: adapters trained on a quantized model that stays as it is (Dettmers et al., arXiv:2305.14314).

The base's weights are held as codes, two a byte where they have at most 4 bits, and made anew in the forward and in the
backward pass, one layer at a time. Adapters are those of `peft`: stock `peft` loads what is saved onto the base.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.corrections.lorc import factor
from quantforge.errors import PlanError, RecipeError, pick
from quantforge.models import arch
from quantforge.numerics.residuals import LowRank
from quantforge.result import Result
from quantforge.store import MARK, check_target, publish, write_text
from quantforge.training.coded import CodedLinear
from quantforge.training.layers import checkpoint_blocks, computed_layers, to_training


def _tells(record: logging.LogRecord) -> bool:
    """Tell whether a line of bitsandbytes is of use: not that it did without a kernel that it wanted to download."""
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


_LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")
_LOGGER.addFilter(_tells)
try:
    from peft import LoraConfig, get_peft_model  # which imports bitsandbytes
finally:
    _LOGGER.removeFilter(_tells)

STARTS = ("zero", "lorc")
_ADAPTER = "default"
_NOTHING = 1e-6  # share of the largest part of an error below which there is nothing to start from


@dataclass(frozen=True)
class Adapters:
    """What is trained on every quantized layer: x Âᵀ B̂ᵀ · alpha / rank is added to its output.

    rank           of the products (the paper: 64)
    alpha          their weight (the paper: 16)
    dropout        of the adapters' inputs, while the model is in training mode
    start          zero: B is zero, and the outputs are the base's; lorc: A and B are the low-rank factors of the
                   base's error, as in LoftQ (Li et al., arXiv:2310.08659) with one step
    checkpointing  keep the inputs of decoder blocks only, and run these again in the backward pass
    seed           of A where the start is zero
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    start: str = "zero"
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        pick("start of adapters", self.start, STARTS)
        if self.rank < 1:
            raise RecipeError(248, f"rank must be at least 1, not {self.rank}; 16 to 64 are usual.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise RecipeError(248, f"alpha must be above 0 and finite, not {self.alpha}; 16 is usual.")
        if not 0 <= self.dropout < 1:
            raise RecipeError(248, f"dropout must be at least 0 and below 1, not {self.dropout}.")


def open_student(result: Result, adapters: Adapters, floats: nn.Module | None = None) -> Any:
    """Return the model of `result`, changed in place, as a `peft` model with adapters on every quantized layer.

    floats  the float model, for the start "lorc"; None where the result's own low-rank factors are to be the start:
            then they are no part of the base, which is that of `without_factors`

    Only adapters have `requires_grad`. With `checkpointing` or `dropout` the modules that do it are left in training
    mode, without which neither has an effect; all else is in evaluation mode. The result's own codes stay in memory as
    long as the result does; the model has copies, two a byte, where they have at most 4 bits. Raises PlanError for a
    rank above a layer's width.
    """
    _check(result, adapters, floats)
    starts = _starts(result, adapters, floats) if adapters.start == "lorc" else {}
    base = without_factors(result) if adapters.start == "lorc" and floats is None else result
    model = result.model
    model.requires_grad_(False)
    for layer in base.layers:
        own = model.get_submodule(layer.name)
        model.set_submodule(layer.name, CodedLinear(own, layer.weight, frozenset(), result.plan.dtype))
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]
        lora_dropout=adapters.dropout,
        target_modules=[layer.name for layer in result.layers],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(adapters.seed)
        student = get_peft_model(model, config)
    student.peft_config[_ADAPTER].base_model_name_or_path = result.source
    for name, (a, b) in starts.items():
        _start(model.get_submodule(name), a, b)
    if adapters.checkpointing:
        checkpoint_blocks(model, on=True)
    to_training(student)
    return student


def settle(result: Result, student: Any) -> Result:
    """Return the base of `student` as a result again, its model dequantized and without adapters, to be saved.

    It is `result`, without the factors that became the adapters' start. Save adapters first.
    """
    model = student.unload()
    opened = computed_layers(model)
    held = [len(module.residuals) for module in opened.values() if isinstance(module, CodedLinear)]
    base = (
        result if sum(held) == sum(len(layer.weight.residuals) for layer in result.layers) else without_factors(result)
    )
    for layer in base.layers:
        module = opened[layer.name]
        model.set_submodule(layer.name, module.restored(layer.weight.dequantize(module.dtype).to(module.device)))
    checkpoint_blocks(model, on=False)
    model.requires_grad_(True).eval()
    return replace(base, model=model)


def without_factors(result: Result) -> Result:
    """Return `result` without its low-rank factors; its model is that of `result`, which still computes with them."""
    layers = [
        replace(
            layer,
            weight=replace(
                layer.weight, residuals=tuple(r for r in layer.weight.residuals if not isinstance(r, LowRank))
            ),
        )
        for layer in result.layers
    ]
    recipe = replace(result.plan.recipe, corrections=())
    plans = {name: replace(p, corrections=()) for name, p in result.plan.layers.items()}
    return replace(result, plan=replace(result.plan, recipe=recipe, layers=plans), layers=tuple(layers))


def save(student: Any, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapters to `folder`, whole or not at all, as `peft` reads them; return the folder.

    Raises PlanError if the folder exists, unless `overwrite`.
    """
    folder = Path(folder)
    check_target(folder, overwrite=overwrite)
    with publish(folder, overwrite=overwrite) as staging:
        student.save_pretrained(staging, save_embedding_layers=False)
        kept = {"schema": 1, "adapter": True, "files": sorted(p.name for p in staging.iterdir())}
        write_text(staging / MARK, json.dumps(kept, indent=1) + "\n")
    return folder


def _check(result: Result, adapters: Adapters, floats: nn.Module | None) -> None:
    """Raise PlanError unless adapters can be put on every layer of `result`."""
    for layer in result.layers:
        width = min(layer.weight.base.shape)
        if adapters.rank > width:
            raise PlanError(
                295, f"rank {adapters.rank} is more than the width {width} of {layer.name}; use at most {width}."
            )
    transposed = next((p.name for p in result.plan.layers.values() if p.transposed), None)
    if transposed:
        raise PlanError(295, f"adapters are put on nn.Linear, and {transposed} is a Conv1D; a llama or qwen works.")
    has = any(isinstance(r, LowRank) for layer in result.layers for r in layer.weight.residuals)
    if adapters.start == "lorc" and floats is None and not has:
        raise PlanError(
            295, "the start lorc needs the float model, or a base with low-rank factors, as of nf4+lorc; or start zero."
        )


def _starts(result: Result, adapters: Adapters, floats: nn.Module | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer what A [rank, in] and B [out, rank] of its adapter are to be."""
    found = {}
    for layer in result.layers:
        if floats is not None:
            weight = arch.get_weight(floats.get_submodule(layer.name))
            error = weight - layer.weight.dequantize().to(weight.device)
        else:
            error = torch.zeros(layer.weight.base.shape, device=layer.weight.base.codes.device)
            for residual in layer.weight.residuals:
                error = residual.onto(error) if isinstance(residual, LowRank) else error
        left, right = factor(error, adapters.rank)
        share = math.sqrt(adapters.alpha / adapters.rank)
        found[layer.name] = (right / share, left / share)
    return found


def _start(module: Any, a: Tensor, b: Tensor) -> None:
    """Put A and B into an adapter; where there is nothing to start from, A stays random and B zero, as it can learn."""
    own_a, own_b = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
    a, b = a.to(own_a), b.to(own_b)
    size = b.norm(dim=0)
    some = size > _NOTHING * size.max()
    with torch.no_grad():
        own_a.copy_(torch.where(some[:, None], a, own_a))
        own_b.copy_(torch.where(some, b, 0.0))
