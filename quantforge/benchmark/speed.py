"""A quantized checkpoint beside a float model: tokens a second of prompts and of generation, memory, time to load."""

from __future__ import annotations

import datetime
import functools
import math
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantforge import __version__, api, checkpoint
from quantforge.benchmark.measure import Measured, Sample, Watch, few, generation, idle, in_turn, per_second
from quantforge.errors import DataError, ModelError, PlanError, clean
from quantforge.models import activations
from quantforge.models import load as loading
from quantforge.progress import bar
from quantforge.runtime import load as runtime
from quantforge.runtime.generate import steps

PACKED, FLOAT = "packed", "float"
SHORT = 8  # tokens of the prompt after which a model that was just opened writes its first token
_LOADS = 3  # good samples of that
_TEXT = "python-docs"


@dataclass(frozen=True)
class Model:
    """What was measured.

    name          of the checkpoint, or of the float model
    weight_bytes  of all of its weights; linear_bytes: of the layers that are quantized, and of their scales
    load_seconds  from opening its files, which were read just before, to the first token after a short prompt; the
                  float model's by transformers, from safetensors in the dtype that it is kept in
    operators     how many layers each operator computes
    """

    name: str
    weight_bytes: int
    linear_bytes: int
    load_seconds: float
    operators: dict[str, int]


@dataclass(frozen=True)
class Speed:
    """One model at one batch size; the ratios are to the float model, above 1 where this one is faster."""

    model: str
    batch_size: int
    first_token_seconds: float
    prompt_per_second: float
    generated_per_second: float
    prompt_ratio: float
    generated_ratio: float
    kept: int
    rejected: int
    share: float


@dataclass(frozen=True)
class Bench:
    """The figures of one run of `bench`, and on what they were measured."""

    models: tuple[Model, ...]
    speeds: tuple[Speed, ...]
    prompt_tokens: int
    new_tokens: int
    text: str
    machine: dict[str, Any]
    notes: tuple[str, ...]
    command: str = ""
    created: str = ""

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"schema": 1, **asdict(self)}


def machine(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return what the figures depend on besides the models."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "name": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "quantforge": __version__,
    }


def bench(
    folder: str | Path,
    *,
    against: str | None = None,
    batch_sizes: Sequence[int] = (1, 4, 16),
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    rounds: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    strict: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
) -> Bench:
    """Measure a packed checkpoint and a float model in one process, in turn.

    against      a float model: a folder, a hub id or "demo"; None: the checkpoint itself, dequantized, which computes
                 as its float model does
    new_tokens   timed after the first, which belongs to the prompt
    rounds       good samples of each
    command      the command line, for the report

    Raises PlanError for windows that are too long, and what `load` does.
    """
    folder = Path(folder)
    source = None
    if against is not None:
        source = loading.find(None if against == api.DEMO else against, trust_remote_code=trust_remote_code)
    loading.check_device(device)
    config = checkpoint.read_config(folder, trust_remote_code=trust_remote_code)
    api.check_length(config, prompt_tokens + new_tokens + 1)
    opened = functools.partial(
        runtime.read, folder, dtype, strict=strict, device=device, trust_remote_code=trust_remote_code
    )
    packed = opened()
    baseline = _float_model(folder, source, dtype, trust_remote_code)
    ids, text = _prompts(folder, config, max(batch_sizes), prompt_tokens, trust_remote_code)
    if source is not None and int(ids.max()) >= baseline.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        raise PlanError(276, f"--against {against} has too few tokens to read the checkpoint's text.")
    names = _names(folder.name, source.name if source else f"{folder.name}, dequantized")
    layers = list(packed.operators)
    kept = source.dtype if source else config.dtype
    loads, notes = _loads(lambda: opened().model, baseline, kept or dtype, ids[:1, :SHORT], device)
    models = (
        Model(
            names[PACKED],
            runtime.weight_bytes(packed.model),
            runtime.linear_bytes(packed.model, layers),
            loads[PACKED].seconds,
            dict(Counter(name for name, _ in packed.operators.values())),
        ),
        Model(
            names[FLOAT],
            runtime.weight_bytes(baseline),
            _float_linear_bytes(baseline, layers),
            loads[FLOAT].seconds if FLOAT in loads else math.nan,
            {FLOAT: len(layers)},
        ),
    )
    baseline = baseline.to(device)
    speeds, measured = _speeds(
        {PACKED: packed.model, FLOAT: baseline}, names, ids.to(device), batch_sizes, new_tokens, rounds, device
    )
    opening = {f"{names[key]}, opened": part for key, part in loads.items()}
    # files are opened by one thread, which says nothing of the machine
    notes = (*packed.notes, *notes, *few(opening, _LOADS), *few(measured, rounds), *idle(measured))
    today = datetime.date.today().isoformat()
    return Bench(models, speeds, prompt_tokens, new_tokens, text, machine(dtype, device), notes, command, today)


def _float_model(folder: Path, source: loading.Source | None, dtype: torch.dtype, trusted: bool) -> nn.Module:
    """Return the model to compare with, on the CPU: of `source`, or the checkpoint's own, dequantized."""
    if source is not None:
        return loading.model(source).to(dtype)
    model = checkpoint.read(folder, dtype, trust_remote_code=trusted)
    activations.remove(model.modules())  # a float model does not round its inputs
    return model


def _names(packed: str, baseline: str) -> dict[str, str]:
    """Return what the two models are called; never the same."""
    names = {PACKED: clean(packed), FLOAT: clean(baseline)}
    if names[PACKED] == names[FLOAT]:  # the last parts of two paths
        names[FLOAT] += ", float"
    return names


def _float_linear_bytes(model: nn.Module, names: Sequence[str]) -> int:
    known = dict(model.named_modules())
    return runtime.linear_bytes(model, [name for name in names if name in known])


def _loads(
    packed: Callable[[], nn.Module], baseline: nn.Module, kept: torch.dtype, ids: Tensor, device: str
) -> tuple[dict[str, Measured], tuple[str, ...]]:
    """Time both models from opening their files to the first token after `ids` [1, tokens]; return notes, too.

    Transformers maps files into memory and leaves reading them to the first forward, so that the time until there is a
    model could not be compared. The float model is saved for it as it would be kept, in `kept`, and left out with a
    note if there is no room.
    """
    assert isinstance(baseline, PreTrainedModel)
    dtype = baseline.dtype
    ways = {PACKED: functools.partial(_first_token, packed, ids, device)}
    notes: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as place, loading.quiet():
        try:
            tensors = {name: t.to(kept) if t.is_floating_point() else t for name, t in baseline.state_dict().items()}
            baseline.save_pretrained(place, state_dict=tensors)
        except (OSError, SafetensorError) as error:  # a full disk is one or the other
            notes = (f"how long the float model takes to open is not known, as it could not be saved: {error}",)
        else:
            kind: Any = type(baseline)
            read = functools.partial(
                kind.from_pretrained, place, dtype=dtype, local_files_only=True, use_safetensors=True
            )
            ways[FLOAT] = functools.partial(_first_token, lambda: read().to(device), ids, device)
        measured = in_turn(ways, _LOADS, warm_up=0)
    return {name: parts[0] for name, parts in measured.items()}, notes


def _first_token(opened: Callable[[], nn.Module], ids: Tensor, device: str) -> tuple[Sample]:
    watch = Watch(device)
    next(steps(opened(), ids.to(device)))
    return (watch.split(),)


def _prompts(folder: Path, config: Any, count: int, length: int, trusted: bool) -> tuple[Tensor, str]:
    """Return ids [count, length] of a text, or random ones without a tokenizer or for want of text; and which."""
    try:
        tokenizer = loading.read_tokenizer(folder, trust_remote_code=trusted)
        cut = functools.partial(api.token_ids, _TEXT, "evaluation", tokenizer=tokenizer, config=config)
        return cut(seq_len=length, count=count)[0], _TEXT
    except (ModelError, DataError):  # for some architectures transformers makes up a tokenizer without words
        rng = torch.Generator().manual_seed(0)
        return torch.randint(config.get_text_config().vocab_size, (count, length), generator=rng), "random tokens"


def _speeds(
    models: dict[str, nn.Module],
    names: dict[str, str],
    ids: Tensor,
    batch_sizes: Sequence[int],
    new_tokens: int,
    rounds: int,
    device: str,
) -> tuple[tuple[Speed, ...], dict[str, Measured]]:
    """Measure both models at each batch size; return that, and every median by what it is of."""
    found: list[Speed] = []
    medians: dict[str, Measured] = {}
    with bar("batch sizes", len(batch_sizes)) as step:
        for size in batch_sizes:
            calls: dict[str, Callable[[], Any]] = {
                key: functools.partial(generation, model, ids[:size], new_tokens, device)
                for key, model in models.items()
            }
            measured = in_turn(calls, rounds)
            rates = {key: _rates(parts, size, ids.shape[1], new_tokens) for key, parts in measured.items()}
            for key, parts in measured.items():
                found.append(_speed(names[key], size, parts, rates[key], rates[FLOAT]))
                medians |= {
                    f"{names[key]}, batch {size}, {what}": part
                    for what, part in zip(("prompt", "written"), parts, strict=True)
                }
            step(f"{size}: x {found[-2].generated_ratio:.2f}")
    return tuple(found), medians


def _speed(
    name: str, size: int, parts: tuple[Measured, ...], rates: tuple[float, float], floats: tuple[float, float]
) -> Speed:
    return Speed(
        name,
        size,
        parts[0].seconds,
        *rates,
        rates[0] / floats[0],
        rates[1] / floats[1],
        min(part.kept for part in parts),
        max(part.rejected for part in parts),
        min(part.share for part in parts),
    )


def _rates(parts: tuple[Measured, ...], size: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    return per_second(size * prompt_tokens, parts[0]), per_second(size * new_tokens, parts[1])
