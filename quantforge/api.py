"""The Python face of the commands: quantize, evaluate, load."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantforge import checkpoint, exporters, pipeline, recipe
from quantforge import plan as planning
from quantforge.calibrate import corpus
from quantforge.errors import DataError, PlanError, clean
from quantforge.evaluation import decoding, perplexity
from quantforge.evaluation.perplexity import Score
from quantforge.memory import PeakMemory
from quantforge.models import activations, check
from quantforge.models import load as loading
from quantforge.models.kvcache import KVCache, KVFormat, parse_kv
from quantforge.plan import Plan
from quantforge.progress import bar
from quantforge.result import Result
from quantforge.store import check_target

DECODED = 48  # windows that are decoded side by side


def quantize(
    model: str | Path | nn.Module | None = None,
    method: str = "gptq",
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    weights: str | None = None,
    inputs: str | None = None,
    calibration: str | Path | Tensor = "python-docs",
    samples: int = 64,
    seq_len: int = 512,
    shuffle: bool = False,
    seed: int = 0,
    device: str = "cpu",
    settings: dict[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Result:
    """Quantize a model, and save it if `out` is given.

    model        a folder, a hub id, None for the demo model, or a model in memory, which is changed in place
                 (one in float64 is stored as float32)
    method       a name from `quantforge methods`
    bits         2 to 8; group_size: weights sharing a scale, -1 for a whole row; symmetric: no zero points;
                 None keeps the method's own
    weights      a notation of `quantforge formats`, "e4m3-channel", "mxfp4"; None keeps the method's own
    inputs       how layers round their inputs when they are called: "int8-token", "int8-tensor-static", "e4m3-token"
    calibration  a set's name, a .txt or .jsonl file, or token ids [windows, seq_len]
    samples      windows of `seq_len` tokens to calibrate on, the first ones, or drawn with `seed` if `shuffle`
    device       "cpu" or "cuda"
    settings     {"solver.damp_percent": 0.05}
    overrides    {"*.down_proj": {"bits": 8}, "layers.0.*": {"skip": True}}: layers by pattern, the last match wins
    tokenizer    for a model in memory that is to be calibrated on text

    Everything that needs no weights is checked before they are read. Raises the subclasses of QuantForgeError.
    """
    chosen = recipe.load(
        method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        weights=weights,
        inputs=inputs,
        settings=settings,
        overrides=overrides,
    )
    loading.check_device(device)
    calibration = _checked(calibration, "calibration")
    target = None if out is None else Path(out)
    draw = functools.partial(token_ids, calibration, "calibration", shuffle=shuffle, seed=seed)
    ids, provenance = None, dict[str, Any]()
    if isinstance(model, nn.Module):
        if target is not None and not isinstance(model, PreTrainedModel):
            raise PlanError(
                270,
                f"a {type(model).__name__} is no transformers model, so no checkpoint can be made of it; without "
                "out= it is quantized in memory.",
            )
        if target is not None:
            check_target(target, overwrite=overwrite)
        own = next(model.parameters()).dtype
        plan = planning.make(model, chosen, torch.float32 if own == torch.float64 else own)
        if target is not None:
            planning.check_export(plan, exporters.choose(plan))
        if plan.needs:
            ids, provenance = draw(tokenizer=tokenizer, config=model.config, seq_len=seq_len, count=samples)
        check.check_finite(model)
        name, built = type(model).__name__, model
    else:
        source = loading.find(None if model is None else str(model), trust_remote_code=trust_remote_code)
        plan = planning.with_notes(
            prepare(source, chosen, target, overwrite=overwrite, export=target is not None), source.notes
        )
        tokenizer = tokenizer or loading.tokenizer(source)
        if plan.needs:
            ids, provenance = draw(tokenizer=tokenizer, config=source.config, seq_len=seq_len, count=samples)
        name, built = source.name, loading.model(source, device)
    result = run(built, plan, ids, tokenizer=tokenizer, source=name, calibration=provenance)
    if target is not None:
        result.save(target, overwrite=overwrite)
    return result


def prepare(
    source: loading.Source, chosen: recipe.Recipe, out: Path | None, *, overwrite: bool = False, export: bool = True
) -> Plan:
    """Check the output folder, if there is one, and lay the recipe over the model's skeleton; no weight is read.

    export  whether the checkpoint's format must be able to hold the result
    """
    if out is not None:
        check_target(out, overwrite=overwrite, inputs=(source.path,))
    plan = planning.make(source.skeleton(), chosen, source.dtype)
    if export:
        planning.check_export(plan, exporters.choose(plan))
    return plan


def run(
    model: nn.Module,
    plan: Plan,
    ids: Tensor | None,
    *,
    tokenizer: Any,
    source: str,
    calibration: dict[str, Any],
    memory_before: int | None = None,
    collect: frozenset[str] = frozenset(),
) -> Result:
    """Quantize a loaded model by a plan, with progress on stderr, and measure time and memory.

    collect        statistics to tell losses by, besides what the plan needs
    memory_before  what peak memory is counted from, by `memory.in_use`; None: what is in use when the work begins
    """
    device = next(model.parameters()).device
    with PeakMemory(device, memory_before) as memory, bar(plan.recipe.name, len(plan.layers)) as step:
        start = time.perf_counter()
        layers = pipeline.quantize(
            model, plan, ids, lambda layer: step(f"{layer.name} {layer.relative_loss:.2%} lost"), collect
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return Result(model, plan, tuple(layers), tokenizer, source, calibration, seconds, memory.bytes)


def token_ids(
    text: str | Path | Tensor,
    part: Literal["calibration", "evaluation"],
    *,
    tokenizer: Any,
    config: Any,
    seq_len: int,
    count: int | None,
    shuffle: bool = False,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Any]]:
    """Return token ids [count, seq_len] that the model of `config` can read, and where they came from.

    text  a set's name, a file, or the ids themselves
    Raises DataError for what is no text or no ids, PlanError for windows that are too long, ModelError for ids beyond
    the embedding.
    """
    if isinstance(text, Tensor):
        if text.dim() != 2 or text.dtype != torch.int64 or not text.numel() or int(text.min()) < 0:
            raise DataError(
                441, f"token ids must be int64 [windows, seq_len], at least 0, not {text.dtype} {tuple(text.shape)}."
            )
        check_length(config, text.shape[1])
        _check_padding(config, text)
        ids, provenance = text, {"name": "token ids", "seq_len": text.shape[1], "count": text.shape[0]}
    elif tokenizer is None:
        raise DataError(442, f"text {str(text)!r} needs a tokenizer; pass tokenizer=, or token ids [windows, seq_len].")
    else:
        check_length(config, seq_len)
        found = corpus.windows(corpus.load_text(str(text), part), tokenizer, seq_len, count, shuffle=shuffle, seed=seed)
        ids, provenance = found.ids, found.provenance
    check.check_ids(ids, tokenizer, config)
    return ids, provenance


def _check_padding(config: Any, ids: Tensor) -> None:
    """Refuse windows that begin or end with padding, which statistics would count as text."""
    text = config.get_text_config()
    pad, *ends = (getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos"))
    if pad is None or any(pad == end or (isinstance(end, list) and pad in end) for end in ends):
        return
    padded = (ids[:, 0] == pad) | (ids[:, -1] == pad)
    if bool(padded.any()):
        raise DataError(
            447, f"window {int(padded.nonzero()[0])} of the token ids is padded with {pad}; give full windows."
        )


def _checked(text: str | Path | Tensor, part: Literal["calibration", "evaluation"]) -> str | Tensor:
    """Return `text` as a name, or token ids as they are; DataError unless the name is a set or a file."""
    if isinstance(text, Tensor):
        return text
    corpus.check_name(str(text), part)
    return str(text)


def check_length(config: Any, seq_len: int) -> None:
    """Refuse windows longer than the model's positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise PlanError(
            254, f"seq_len {seq_len} is more than the {limit} positions of this model; use at most {limit}."
        )


@dataclass(frozen=True)
class Evaluation:
    """The perplexity of a model, and on what.

    perplexity       exp of the mean over windows of the mean cross-entropy of their seq_len − 1 predictions
    model            its name
    data             where the tokens came from
    kv               how the cache was stored through which it was decoded; None: no cache, all tokens at once
    bytes_per_token  of that cache, measured
    """

    perplexity: float
    model: str
    data: dict[str, Any]
    kv: str | None = None
    bytes_per_token: float | None = None

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


def evaluate(
    model: str | Path | nn.Module | None = None,
    *,
    data: str | Path | Tensor = "python-docs",
    seq_len: int = 512,
    windows: int | None = 48,
    kv: str | None = None,
    device: str = "cpu",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Return the perplexity of a float model, or of a quantized checkpoint, computed in float32.

    model    a folder, a hub id, None for the demo model, or a model in memory
    data     a set's name, a .txt or .jsonl file, or token ids [windows, seq_len]
    windows  how many non-overlapping windows from the start; None takes all
    kv       "int8-token", "int4-kivi-g32-w32", …: decode token by token, all windows at once, through a cache that is
             stored so; PlanError for another notation
    """
    loading.check_device(device)
    cache = None if kv is None else cache_format(kv)
    data = _checked(data, "evaluation")
    build: Callable[[], nn.Module]
    if isinstance(model, nn.Module):
        name, config, build = type(model).__name__, model.config, lambda: model
    elif model is not None and checkpoint.is_quantized(Path(model)):
        folder = Path(model)
        name, config = clean(folder.name), checkpoint.read_config(folder, trust_remote_code=trust_remote_code)
        if not isinstance(data, Tensor):
            tokenizer = tokenizer or loading.read_tokenizer(folder, trust_remote_code=trust_remote_code)
        build = functools.partial(_dequantized, folder, device, trust_remote_code)
    else:
        source = loading.find(None if model is None else str(model), trust_remote_code=trust_remote_code)
        source.skeleton()
        tokenizer = tokenizer or loading.tokenizer(source)
        name, config, build = source.name, source.config, functools.partial(loading.model, source, device)
    ids, provenance = token_ids(data, "evaluation", tokenizer=tokenizer, config=config, seq_len=seq_len, count=windows)
    if cache is not None:
        KVCache(cache, config)  # which refuses a model that it is not for
    built = build()
    if cache is not None:
        score, size = decode(built, ids, cache)
        return Evaluation(score.perplexity, name, provenance, kv, size)
    with bar("perplexity", len(ids)) as step:
        score = perplexity.evaluate(built, ids, progress=lambda loss: step(f"loss {loss:.3f}"))
    return Evaluation(score.perplexity, name, provenance)


def decode(model: nn.Module, ids: Tensor, fmt: KVFormat) -> tuple[Score, float]:
    """Score `model` on ids [windows, seq_len] token by token through a cache kept in `fmt`, with its bytes a token.

    Many windows are decoded at once, but one at a time where tokens share the range that their inputs are rounded in.
    """
    gates = filter(None, map(activations.find, model.modules()))
    mixes = any(gate.rounds is not None and gate.rounds.inputs.mixes_tokens for gate in gates)
    parts = torch.split(ids, 1 if mixes else DECODED)
    scores = []
    with bar(f"decoding through {fmt}", (ids.shape[1] - 1) * len(parts)) as step:
        for part in parts:
            score, size = decoding.evaluate_decoding(
                model, part, lambda: KVCache(fmt, model.config), progress=lambda loss: step(f"loss {loss:.3f}")
            )
            scores.append(score)
    return Score(tuple(loss for score in scores for loss in score.losses)), size


def cache_format(text: str) -> KVFormat:
    """Read the notation of a cache; PlanError if it is none."""
    try:
        return parse_kv(text)
    except ValueError as error:
        raise PlanError(274, f"kv: {error}.") from error


def _dequantized(folder: Path, device: str, trusted: bool) -> nn.Module:
    return checkpoint.read(folder, torch.float32, trust_remote_code=trusted).to(device)


def load(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the model of a checkpoint that quantforge wrote, dequantized in `dtype` (default: the checkpoint's)."""
    return checkpoint.read(Path(folder), dtype)
