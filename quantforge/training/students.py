"""What is trained: a float model, a quantized one, one that learns to be rounded, or adapters on a frozen one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from quantforge import api, checkpoint
from quantforge import plan as planning
from quantforge.errors import PlanError
from quantforge.models import load as loading
from quantforge.models.kvcache import KVFormat
from quantforge.recipe import Recipe
from quantforge.result import Result
from quantforge.store import publish
from quantforge.training import cut, qat, qlora, recover
from quantforge.training.qlora import Adapters

# last words of the names of parameters, and what these are
_PARTS = {
    "scale": "scales", "zero_point": "zero points", "latent": "weights", "original": "norms", "bias": "biases",
    "weight": "weights",
}  # fmt: skip
_RELATIVE = frozenset({"scales", "zero points", "norms", "factors"})


@dataclass(frozen=True)
class Student:
    """A model that is trained in place, and what is known of it.

    name     of the model it came from; method: label of its format, "" for floats
    model    computes as it will be saved; what is trained has `requires_grad`
    facts    what it was made of, so that no other run is resumed with it
    finish   puts what was trained back in place, and returns the model
    save     (folder, overwrite) writes it, whole or not at all; after `finish`
    rounds_cache  whether it rounds its cache, which it does no more after `finish`: so it is scored before
    """

    name: str
    method: str
    model: nn.Module
    config: Any
    tokenizer: Any
    facts: dict[str, Any]
    bits_per_weight: float
    notes: tuple[str, ...]
    finish: Callable[[], nn.Module]
    save: Callable[[Path, bool], object]
    rounds_cache: bool = False


def trained(model: nn.Module) -> dict[str, int]:
    """Return how many numbers are trained of each part of a model."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[part_of(name)] += parameter.numel()
    return dict(found)


def part_of(name: str) -> str:
    """Return what a parameter is, by its name."""
    if ".lora_" in name:
        return "adapters"
    last = name.rpartition(".")[2]
    return "factors" if last.startswith("factor") else _PARTS.get(last, "weights")


def rates(model: nn.Module) -> dict[str, float]:
    """Return by name what the learning rate of a parameter is multiplied by.

    That of scales, zero points, norms and factors is relative: by their root mean square now, so that one rate suits
    scales of a hundredth and norms of one. Weights and adapters have the rate itself.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = float(parameter.detach().double().square().mean().sqrt()) if part_of(name) in _RELATIVE else 1.0
            found[name] = size or 1.0
    return found


def floats(source: loading.Source, device: str, blocks: int | None = None) -> Student:
    """Return a float model, or as many of its blocks, all of whose parameters are trained."""
    model: Any = loading.model(source, device)
    if blocks is not None:
        model = cut.cut(model, blocks)
    model.requires_grad_(True)
    name = source.name if blocks is None else f"{blocks} blocks of {source.name}"
    tokenizer = loading.tokenizer(source)

    @torch.no_grad()
    def finish() -> nn.Module:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(source.dtype))
        done: nn.Module = model.eval()
        return done

    def save(folder: Path, overwrite: bool) -> None:
        with publish(folder, overwrite=overwrite) as staging, loading.quiet():
            model.to(source.dtype).save_pretrained(staging)
            tokenizer.save_pretrained(staging)

    facts = {"student": source.digest(), "blocks": blocks}
    return Student(name, "", model, model.config, tokenizer, facts, float("nan"), source.notes, finish, save)


def quantized(result: Result, facts: dict[str, Any], parts: Iterable[str] = ("scales", "norms")) -> Student:
    """Return a quantized model whose `parts` are trained; see `recover.open_student`."""
    wanted = tuple(parts)
    model = recover.open_student(result, wanted)
    settled = list[Result]()

    def finish() -> nn.Module:
        settled.append(recover.settle(result))
        return settled[0].model

    return _of(
        result,
        model,
        {**facts, "parts": sorted(wanted)},
        finish,
        _saved(settled),
    )


def rounded(
    source: loading.Source,
    chosen: Recipe,
    device: str,
    *,
    kv: KVFormat | None = None,
    limit: float | None = None,
) -> Student:
    """Return a float model that is trained with all rounding of `chosen` in its forward; see `qat.open_student`."""
    plan = planning.with_notes(api.prepare(source, chosen, None), source.notes)
    tokenizer = loading.tokenizer(source)
    model = qat.open_student(loading.model(source, device), plan, kv=kv, limit=limit)
    settled = list[Result]()

    def finish() -> nn.Module:
        settled.append(qat.settle(model, plan, source=source.name, tokenizer=tokenizer))
        return settled[0].model

    label = chosen.label if kv is None else f"{chosen.label}-kv-{kv}"
    facts = {"student": source.digest(), "method": label, "limit": limit}
    return Student(
        source.name, label, model, source.config, tokenizer, facts, plan.bits_per_weight, plan.notes, finish,
        _saved(settled), rounds_cache=kv is not None,
    )  # fmt: skip


def adapted(
    result: Result, adapters: Adapters, facts: dict[str, Any], base: Path, float_model: nn.Module | None = None
) -> Student:
    """Return a quantized model that stays, with adapters that are trained; see `qlora.open_student`.

    base  the folder of what the adapters are for. One that is not there yet is written: `result`, or if its low-rank
          factors become the adapters' start, `result` without them
    """
    if not base.exists() and PartialState().is_main_process:
        own = adapters.start == "lorc" and float_model is None
        (qlora.without_factors(result) if own else result).save(base)
    model = qlora.open_student(result, adapters, float_model)
    model.peft_config["default"].base_model_name_or_path = str(base)

    def finish() -> nn.Module:
        done: nn.Module = model.eval()
        return done

    def save(folder: Path, overwrite: bool) -> None:
        qlora.save(model, folder, overwrite=overwrite)

    return _of(result, model, {**facts, "adapters": repr(adapters)}, finish, save)


def quantize(source: loading.Source, chosen: Recipe, device: str, calibration: dict[str, Any]) -> Result:
    """Quantize a float model, to be trained; calibration: the arguments of `api.token_ids`, and its text."""
    plan = planning.with_notes(api.prepare(source, chosen, None), source.notes)
    tokenizer = loading.tokenizer(source)
    writer = api.writer_of(source, device)
    ids, provenance = None, dict[str, Any]()
    if plan.needs:
        ids, provenance = api.token_ids(
            part="calibration",
            tokenizer=tokenizer,
            config=source.config,
            writer=writer,
            seq_len=usual_length(source.config),
            **calibration,
        )
    return api.run(writer.build(), plan, ids, tokenizer=tokenizer, source=source.name, calibration=provenance)


def opened(folder: str, device: str) -> tuple[Result, dict[str, Any]]:
    """Return a quantized checkpoint as a result, and what tells it from others.

    Raises PlanError if it is none.
    """
    path = Path(folder)
    if not checkpoint.is_quantized(path):
        raise PlanError(298, f"{folder} is no quantized checkpoint; name a method, or train it as a float model.")
    result = checkpoint.open_result(path)
    result.model.to(device)
    files = [*sorted(path.glob("*.safetensors")), path / "config.json"]
    return result, {"student": loading.fingerprint(files)}


def recipe_facts(source: loading.Source, chosen: Recipe, result: Result) -> dict[str, Any]:
    """Return what tells a model quantized on the fly from others: its codes too, which other threads may change."""
    codes = sha256()
    for layer in result.layers:
        codes.update(layer.weight.base.codes.cpu().contiguous().numpy().tobytes())
    return {"student": source.digest(), "method": chosen.label, "options": repr(chosen), "codes": codes.hexdigest()}


def usual_length(config: Any) -> int:
    """Return the tokens of a window where nothing else is said: 512, or as many as the model has positions for."""
    return min(512, getattr(config.get_text_config(), "max_position_embeddings", None) or 512)


def _saved(settled: list[Result]) -> Callable[[Path, bool], object]:
    """Return what saves the result that will be settled."""
    return lambda folder, overwrite: settled[0].save(folder, overwrite=overwrite)


def _of(
    result: Result,
    model: nn.Module,
    facts: dict[str, Any],
    finish: Callable[[], nn.Module],
    save: Callable[[Path, bool], object],
) -> Student:
    """Return the student that a quantized model became."""
    config: Any = result.model.config
    label = result.plan.recipe.label
    return Student(
        result.source, label, model, config, result.tokenizer, facts, result.bits_per_weight, result.plan.notes,
        finish, save,
    )  # fmt: skip
