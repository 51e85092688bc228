"""The Python face of the commands: quantize, evaluate, load, generate."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantforge import checkpoint, digests, exporters, fallbacks, kept, pipeline, preflight, recipe, resources, runs
from quantforge import journal as journaling
from quantforge import plan as planning
from quantforge.calibrate import corpus, overlap
from quantforge.calibrate.text_files import STRICT, Reading
from quantforge.course import Run
from quantforge.distill import generate as generating
from quantforge.errors import DataError, PlanError, RecipeError, ResourceError, clean, pick
from quantforge.evaluation import decoding, perplexity, rolling, significance, zeroshot
from quantforge.evaluation import reference as references
from quantforge.evaluation.divergence import Divergence, Gap
from quantforge.evaluation.perplexity import Score
from quantforge.evaluation.reference import Reference
from quantforge.evaluation.rolling import RollingScore
from quantforge.evaluation.significance import Interval, Mean
from quantforge.evaluation.zeroshot import TaskScore
from quantforge.memory import PeakMemory
from quantforge.models import activations, check
from quantforge.models import blocks as streaming
from quantforge.models import load as loading
from quantforge.models.blocks import Blocks, Streamed
from quantforge.models.kvcache import KVCache, KVFormat, parse_kv
from quantforge.plan import Plan
from quantforge.preflight.strategies import Strategy
from quantforge.progress import bar
from quantforge.protocols import FileExporter
from quantforge.record import finite
from quantforge.result import Result, check_fit, round_floats
from quantforge.resume import Record
from quantforge.runtime import load as runtime
from quantforge.runtime.generate import Sampling, Written, ends_of, write
from quantforge.store import check_target

DEMO = "demo"  # the demo model, where a name is needed
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
    reading: Reading = STRICT,
    out: str | Path | None = None,
    overwrite: bool = False,
    format: str | None = None,
    strict: bool = False,
    max_memory: int | None = None,
    restart: bool = False,
    command: str = "",
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
    calibration  a set's name, a .txt or .jsonl file, token ids [windows, seq_len], or "self": what the float model
                 itself writes, by `seed`
    samples      windows of `seq_len` tokens to calibrate on, the first ones, or drawn with `seed` if `shuffle`
    device       "cpu" or "cuda"
    settings     {"solver.damp_percent": 0.05}
    overrides    {"*.down_proj": {"bits": 8}, "layers.0.*": {"skip": True}}: layers by pattern, the last match wins
    tokenizer    for a model in memory that is to be calibrated on text; of a folder, in place of its own
    reading      how text files are read: their encoding, and what is done where one is damaged
    format       the checkpoint's: "compressed-tensors", "gptq", "awq", "bitsandbytes", "gguf", "native"; what it
                 demands of a method's own format is done before solving. None: the first that holds the method's
    strict       make any fallback, such as more damping or tokens left out, an error before anything is saved
    max_memory   bytes that the process may take; None: what is free. Where the model does not fit, its blocks are read
                 one by one, which needs `out`
    restart      throw away what an earlier, unfinished run to `out` has done, instead of going on with it
    command      the command line, for the record

    Everything that needs no weights is checked before they are read. With `out`, work is kept beside it on the way:
    the same call goes on with a run that was broken off. Raises the subclasses of QuantForgeError.
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
        fix=None if format is None else exporters.named(format).fix,
    )
    loading.check_device(device)
    calibration = _checked(calibration, "calibration")
    target = None if out is None else Path(out)
    draw = functools.partial(
        token_ids, calibration, "calibration", shuffle=shuffle, seed=seed, reading=reading, max_memory=max_memory
    )
    # and only the journal is left
    finished = target is not None and not restart and journaling.finished(target) and digests.whole(target)
    replaces = overwrite or finished
    ids, provenance, strategy, given = None, dict[str, Any](), Strategy(), tokenizer
    source: loading.Source | nn.Module
    if isinstance(model, nn.Module):
        plan = _plan_of(model, chosen, target, tokenizer, overwrite=replaces, format=format)
        check.check_plain(model)
        check.check_finite(model)
        source, config, name = model, model.config, type(model).__name__
        writer = Writer(lambda: model, lambda: "")
    else:
        source = loading.find(None if model is None else str(model), trust_remote_code=trust_remote_code)
        plan = planning.with_notes(
            prepare(source, chosen, target, overwrite=replaces, export=target is not None, format=format),
            source.notes,
        )
        tokenizer = tokenizer or loading.tokenizer(source)
        config, name = source.config, source.name
        if plan.needs and not isinstance(calibration, Tensor):
            check_length(config, seq_len)
        strategy = _strategy(plan, source, calibration, samples, seq_len, max_memory, target, tokenizer)
        writer = writer_of(source, device, whole=not strategy.stream)
    if target is not None:
        journaling.check_free(target)
    if plan.needs:
        ids, provenance = draw(tokenizer=tokenizer, config=config, seq_len=seq_len, count=samples, writer=writer)
    facts = runs.made_of(source, plan, ids, provenance, given, device) if target is not None else {}
    with runs.opened(target, facts, restart=restart) as journal:
        finished = finished and journal is not None and bool(journal.commits)
        blocks = _blocks(source, writer, strategy, device)
        if format is not None:
            _round(blocks, plan)
        record = Record(journal, torch.device(device), lean=strategy.stream)
        work = Run(blocks, record, strategy.replay, command)
        result = run(blocks.model, plan, ids, tokenizer=tokenizer, source=name, calibration=provenance, work=work)
        result = replace(result, made_of=facts, command=command, blocks=blocks if strategy.stream else None)
        if strict:
            fallbacks.refuse(result.fallbacks())
        if target is not None and journal is not None:
            if not finished:
                result.save(target, overwrite=overwrite, sealed=journal.published)
            journal.finish()
    return result


def _plan_of(
    model: Any, chosen: recipe.Recipe, target: Path | None, tokenizer: Any, *, overwrite: bool, format: str | None
) -> Plan:
    """Check the output folder, if there is one, and lay the recipe over a model in memory."""
    if target is not None and not isinstance(model, PreTrainedModel):
        raise PlanError(
            270,
            f"a {type(model).__name__} is no transformers model, so no checkpoint can be made of it; without "
            "out= it is quantized in memory.",
        )
    if target is not None:
        check_target(target, overwrite=overwrite)
    own = next(model.parameters()).dtype
    plan = lay(model, chosen, torch.float32 if own == torch.float64 else own, format=format, export=target is not None)
    return _with_tokenizer(plan, model.config, lambda: tokenizer)


def _strategy(
    plan: Plan,
    source: loading.Source,
    calibration: str | Tensor,
    samples: int,
    seq_len: int,
    max_memory: int | None,
    target: Path | None,
    tokenizer: Any,
) -> Strategy:
    """Return how the run keeps to its memory; ResourceError if it cannot, or the disk is too small."""
    if isinstance(calibration, Tensor) and calibration.dim() == 2:
        samples, seq_len = calibration.shape
    found = preflight.estimate(
        plan, source, samples=samples, seq_len=seq_len, max_memory=max_memory, tokenizer=tokenizer, quick=True
    )
    preflight.check_memory(found, plan)
    if found.strategy.stream and target is None:
        raise ResourceError(
            522, f"{source.name} does not fit in memory, and can be read block by block only with an output folder."
        )
    if target is not None:
        preflight.check_disk(found, target, journaling.size(target))
    return found.strategy


def _blocks(source: loading.Source | nn.Module, writer: Writer, strategy: Strategy, device: str) -> Blocks:
    """Return the blocks of the model, loaded or to be read one by one."""
    if isinstance(source, loading.Source) and strategy.stream:
        return streaming.stream(source, torch.device(device))
    return Blocks(writer.build())


def _round(blocks: Blocks, plan: Plan) -> None:
    """Round what stays in float, and that of every block that is yet to be read, as the plan's container stores it."""
    check_fit(blocks.model, plan, blocks)
    round_floats(blocks.model, plan)
    if isinstance(blocks, Streamed):
        blocks.prepare(lambda model, index: round_floats(model, plan, f"{blocks.path}.{index}."))


def prepare(
    source: loading.Source,
    chosen: recipe.Recipe,
    out: Path | None,
    *,
    overwrite: bool = False,
    export: bool = True,
    format: str | None = None,
) -> Plan:
    """Check the output folder, if there is one, and lay the recipe over the model's skeleton; no weight is read.

    export  whether the checkpoint's format must be able to hold the result
    format  the checkpoint's, for which the recipe was loaded; None leaves the choice to the recipe
    """
    if out is not None:
        check_target(out, overwrite=overwrite, inputs=(source.path,))
    plan = lay(source.skeleton(), chosen, source.dtype, format=format, export=export)
    return _with_tokenizer(plan, source.config, lambda: loading.tokenizer(source))


def _with_tokenizer(plan: Plan, config: Any, tokenizer: Callable[[], Any]) -> Plan:
    """Check the tokenizer if it is to stand in the model's own file; return the plan with what is to be known of it."""
    exporter = exporters.choose(plan)
    if not isinstance(exporter, FileExporter):
        return plan
    found = tokenizer()
    if reason := exporter.refuses_tokenizer(found):
        raise PlanError(288, reason)
    return planning.with_notes(plan, exporter.notes(config, found))


def lay(model: nn.Module, chosen: recipe.Recipe, own: torch.dtype, *, format: str | None, export: bool) -> Plan:
    """Lay the recipe over a model in the dtype `own`, for the checkpoint's `format` if the user named one.

    export  whether that must be able to hold the result, which one that is named always must
    """
    floats, scales = (own, None) if format is None else exporters.named(format).dtypes(own)
    plan = replace(planning.make(model, chosen, floats, scales), container=format or "")
    if floats != own:
        theirs, ours = (str(dtype).removeprefix("torch.") for dtype in (floats, own))
        plan = planning.with_notes(plan, [f"{format} holds floats in {theirs}, and those of the model are in {ours}"])
    if export or format is not None:
        exporters.check(plan, exporters.choose(plan))
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
    work: Run | None = None,
) -> Result:
    """Quantize a loaded model by a plan, with progress on stderr, and measure time and memory.

    collect        statistics to tell losses by, besides what the plan needs
    memory_before  what peak memory is counted from, by `memory.in_use`; None: what is in use when the work begins
    work           where it is kept on the way, and where it begins; None: in memory, at the beginning
    """
    work = work or pipeline.in_memory(model)
    device = work.record.device
    with PeakMemory(device, memory_before) as memory, bar(plan.recipe.name, len(plan.layers)) as step:
        layers = pipeline.quantize(
            model, plan, ids, lambda layer: step(f"{layer.name} {layer.relative_loss:.2%} lost"), collect, work
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = work.record.seconds
    return Result(model, plan, tuple(layers), tokenizer, source, calibration, seconds, memory.bytes)


@dataclass(frozen=True)
class Writer:
    """A float model that may be asked for calibration text of its own.

    build        loads it, or gives it where that is done
    fingerprint  tells it, and what computes with it; "" for a model in memory, whose text is not kept
    """

    build: Callable[[], nn.Module]
    fingerprint: Callable[[], str]


def writer_of(source: loading.Source, device: str, *, whole: bool = True) -> Writer:
    """Return the float model of `source` as a writer; it is loaded once, when it is first asked for.

    whole  False: it does not fit in memory, and asking for it is a ResourceError
    """

    @functools.cache
    def build() -> nn.Module:
        if not whole:
            raise ResourceError(523, f"{source.name} does not fit in memory, and only a model that does writes text.")
        return loading.model(source, device)

    return Writer(build, lambda: source.fingerprint(device))


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
    writer: Writer | None = None,
    reading: Reading = STRICT,
    max_memory: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return token ids [count, seq_len] that the model of `config` can read, and where they came from.

    text        a set's name, a file, the ids themselves, or for calibration "self", which `writer` writes by `seed`
    reading     how files are read
    max_memory  bytes that the process may take meanwhile; None: what is free
    Raises DataError for what is no text or no ids, PlanError for windows that are too long, ModelError for ids beyond
    the embedding, ResourceError for a text that takes too much memory to be tokenized.
    """
    if isinstance(text, Tensor):
        if text.dim() != 2 or text.dtype != torch.int64 or not text.numel() or int(text.min()) < 0:
            raise DataError(
                441, f"token ids must be int64 [windows, seq_len], at least 0, not {text.dtype} {tuple(text.shape)}."
            )
        check_length(config, text.shape[1])
        _check_padding(config, text)
        ids, provenance = text, {"name": "token ids", "seq_len": text.shape[1], "count": text.shape[0]}
    elif text == corpus.SELF and part == "calibration":
        check_length(config, seq_len)
        if writer is None or count is None:
            raise DataError(477, "text that the model itself writes needs the model, and the number of windows.")
        ids, provenance = own_text(writer, tokenizer=tokenizer, config=config, seq_len=seq_len, count=count, seed=seed)
    elif tokenizer is None:
        raise DataError(442, f"text {str(text)!r} needs a tokenizer; pass tokenizer=, or token ids [windows, seq_len].")
    else:
        check_length(config, seq_len)
        read = corpus.load_text(str(text), part, reading)
        preflight.check_text(str(text), corpus.memory(read), max_memory)
        found = corpus.windows(read, tokenizer, seq_len, count, shuffle=shuffle, seed=seed)
        ids, provenance = found.ids, found.provenance
    check.check_ids(ids, tokenizer, config)
    return ids, provenance


def own_text(
    writer: Writer, *, tokenizer: Any, config: Any, seq_len: int, count: int, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Return ids [count, seq_len] of text that a float model writes by itself, and how to have them again.

    They are kept, so that each is written once. Raises RecipeError for sizes below 1, ModelError for a damaged model.
    """
    tokens = generating.tokens_of(tokenizer, config)
    mark = writer.fingerprint()
    facts = {
        "kind": "own text, by starts at random",
        "model": mark,
        "tokenizer": sha256(repr(tokens).encode()).hexdigest(),
        "number of tokens": f"{count} x {seq_len}",
        "seed": str(seed),
    }
    folder = resources.cache_dir() if mark else None
    path = None if folder is None else folder / kept.name_of(facts)
    ids = None
    if path is not None and path.exists():
        with contextlib.suppress(DataError):
            ids = kept.read(path, facts)["ids"]
    if ids is None:
        model = writer.build()
        check.check_finite(model)
        ids = generating.self_text(model, tokens, count, seq_len, seed=seed)
        if path is not None:
            with contextlib.suppress(ResourceError):
                kept.write(path, {"ids": ids}, facts)
    provenance = {
        "name": corpus.SELF,
        "part": "calibration",
        "source": "text that the float model itself wrote, from tokens drawn by the seed",
        "ids_sha256": references.digest(ids),
        "tokens": ids.numel(),
        "seq_len": seq_len,
        "count": count,
        "shuffle": False,
        "seed": seed,
    }
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
class Against:
    """How a model's predictions over some windows differ from a float model's.

    model       the float model's name
    perplexity  of the float model
    ratio       of perplexities, with its interval over windows, and the p-value of there being no difference
    verdict     that in words
    kl          mean over the windows, nats per token, with its interval; a lower bound
    gap         how far below the dense mean it lies, over the first windows; None where that is unknown
    divergence  of all predictions
    """

    model: str
    perplexity: float
    ratio: Interval
    p: float
    verdict: str
    kl: Interval
    gap: Gap | None
    divergence: Divergence

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values; null for what is not finite."""
        found: dict[str, Any] = finite(asdict(self))
        return found


@dataclass(frozen=True)
class Evaluation:
    """What a model scored, and on what.

    perplexity       per token: exp of the mean over windows of the mean cross-entropy of their seq_len − 1 predictions;
                     NaN where tasks or whole documents were scored instead
    model            its name
    data             where the tokens came from; empty with tasks
    kv               how the cache was stored through which it was decoded; None: no cache, all tokens at once
    bytes_per_token  of that cache, measured
    tasks            scores of tasks
    rolling          word and byte perplexity of whole documents
    against          how its predictions differ from a float model's
    losses           of each window: mean cross-entropy, nats per token
    warnings         what to know of the data: that the model was calibrated on it
    """

    perplexity: float
    model: str
    data: dict[str, Any]
    kv: str | None = None
    bytes_per_token: float | None = None
    tasks: tuple[TaskScore, ...] = ()
    rolling: RollingScore | None = None
    against: Against | None = None
    losses: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def interval(self) -> Interval:
        """Return the perplexity with its interval of 95 % over windows; NaN where there are too few."""
        if len(self.losses) < 2 or not all(map(math.isfinite, self.losses)):
            return Interval(self.perplexity, math.nan, math.nan)
        return significance.perplexity_interval(self.losses)

    @property
    def tasks_mean(self) -> Mean | None:
        """Return the mean over tasks of their shares of right answers; None for fewer than two tasks."""
        if len(self.tasks) < 2:
            return None
        return significance.mean_accuracy([task.summary for task in self.tasks])

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "interval": finite([self.interval.low, self.interval.high]),
            "losses": finite(self.losses),
            "model": self.model,
            "data": self.data,
            "kv": self.kv,
            "bytes_per_token": self.bytes_per_token,
            "tasks": [task.record() for task in self.tasks],
            "tasks_mean": None if self.tasks_mean is None else finite(asdict(self.tasks_mean)),
            "rolling": None if self.rolling is None else self.rolling.record(),
            "against": None if self.against is None else self.against.record(),
            "warnings": list(self.warnings),
        }


def evaluate(
    model: str | Path | nn.Module | None = None,
    *,
    data: str | Path | Tensor = "python-docs",
    seq_len: int = 512,
    windows: int | None = 48,
    kv: str | None = None,
    against: str | Path | None = None,
    rolling: bool = False,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    task_dirs: Sequence[str | Path] = (),
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    tokenizer: Any = None,
    reading: Reading = STRICT,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Return the perplexity of a float model or of a quantized checkpoint, or what it scores on tasks, in float32.

    model       a folder, a hub id, None for the demo model, or a model in memory
    data        a set's name, a .txt or .jsonl file, or token ids [windows, seq_len]
    windows     how many non-overlapping windows from the start; None takes all
    kv          "int8-token", "int4-kivi-g32-w32", …: decode token by token, all windows at once, through a cache that
                is stored so; PlanError for another notation
    against     a float model with the same tokenizer, a folder, a hub id or "demo": how predictions diverge from its is
                told; what it predicts is kept, so that over a text that it has read it runs on four windows only
    rolling     word and byte perplexity of whole documents, read in windows of `seq_len` tokens, instead: the lines of
                a .jsonl file, else the whole text, up to `windows` · `seq_len` tokens
    tasks       names of tasks or groups, of `task_dirs`, our own or lm-eval's, and of a `suite`: "smoke" or "standard";
                with any only tasks are scored; of `task_dirs` alone all tasks are
    shots       examples before each item, drawn by `seed`; None: what each task says
    limit       items of each task from its start; None: all
    batch_size  texts or windows that go through the model at once with tasks or `rolling`
    reading     how text files are read: their encoding, and what is done where one is damaged

    Everything that needs no weights is checked before they are read. Raises the subclasses of QuantForgeError.
    """
    loading.check_device(device)
    folders = tuple(map(Path, task_dirs))
    wanted = wished_tasks(tasks, suite, folders)
    check_together(bool(wanted), rolling=rolling, kv=kv, counts=(shots, limit))
    if against is not None and (wanted or rolling or kv is not None):
        raise RecipeError(225, "--against compares predictions over windows: leave out tasks, rolling and kv.")
    cache = None if kv is None else cache_format(kv)
    if wanted:
        zeroshot.check(wanted, folders, shots=shots, limit=limit, batch_size=batch_size)
    data = "" if wanted else _checked(data, "evaluation")
    opened = _open(model, device, tokenizer, trust_remote_code, reads=bool(wanted) or not isinstance(data, Tensor))
    if wanted:
        _need_tokenizer(opened, "tasks")
        built = opened.build()
        scores = zeroshot.evaluate(
            built,
            opened.tokenizer,
            wanted,
            shots=shots,
            limit=limit,
            seed=seed,
            batch_size=1 if mixes_tokens(built) else batch_size,
            folders=folders,
        )
        return Evaluation(math.nan, opened.name, {}, tasks=scores)
    if rolling:
        return _rolling(opened, data, seq_len, windows, batch_size, reading)
    cut = functools.partial(token_ids, data, "evaluation", seq_len=seq_len, count=windows, reading=reading)
    ids, provenance = cut(tokenizer=opened.tokenizer, config=opened.config)
    if cache is not None:
        KVCache(cache, opened.config)  # which refuses a model that it is not for
    reference = None
    if against is not None:
        source = loading.find(None if against == DEMO else str(against), trust_remote_code=trust_remote_code)
        source.skeleton()
        check_length(source.config, ids.shape[1])
        theirs, ours = (config.get_text_config().vocab_size for config in (source.config, opened.config))
        if theirs != ours:
            raise PlanError(
                276, f"--against {against} has {theirs} tokens and the model {ours}: they cannot be compared."
            )
        if not isinstance(data, Tensor):
            _check_same_tokens(source, ids, cut)
        reference, _ = kept_reference(loading.model(source, device), ids, source.fingerprint(device))
    built = opened.build()
    if cache is not None:
        score, size = decode(built, ids, cache)
        found = Evaluation(score.perplexity, opened.name, provenance, kv, size)
        return replace(found, losses=score.losses, warnings=opened.warnings(provenance))
    with bar("perplexity", len(ids)) as step:
        score = perplexity.evaluate(built, ids, reference, progress=lambda loss: step(f"loss {loss:.3f}"))
    told = None if reference is None else _against(source.name, reference, score)
    found = Evaluation(score.perplexity, opened.name, provenance, against=told)
    return replace(found, losses=score.losses, warnings=opened.warnings(provenance))


def _check_same_tokens(source: loading.Source, ids: Tensor, cut: Callable[..., tuple[Tensor, dict[str, Any]]]) -> None:
    """Refuse a float model whose tokenizer reads the text that `ids` were cut from as other tokens."""
    theirs, _ = cut(tokenizer=loading.tokenizer(source), config=source.config)
    if not torch.equal(theirs, ids):
        raise PlanError(276, f"--against {source.name} reads the text as other tokens: they cannot be compared.")


def kept_reference(model: nn.Module, ids: Tensor, fingerprint: str) -> tuple[Reference, Score]:
    """Return what the float `model` predicts over ids [windows, seq_len], and its score: kept, or made and kept.

    fingerprint  of its files and of what computes; "" for a model in memory, whose predictions are not kept
    Whole distributions of the first windows are always the model's own. A score that was kept tells no speed; one that
    differs from the model's by more than `CLOSE` was kept by something else, and all is made anew.
    """
    made = list[Score]()

    def make() -> Reference:
        with bar("fp", len(ids)) as step:
            found, score = perplexity.make_reference(model, ids, progress=lambda loss: step(f"loss {loss:.3f}"))
        made.append(score)
        return found

    if not fingerprint:
        return make(), made[0]
    config: Any = model.config
    key = references.made(fingerprint, ids, config.get_text_config().vocab_size)
    found = references.get(resources.cache_dir(), key, make)
    if not made:
        first, _ = perplexity.make_reference(model, ids[: references.DENSE], k=1)
        close = all(abs(a - b) <= references.CLOSE for a, b in zip(first.losses, found.losses, strict=False))
        if close:
            return replace(found, dense=first.dense), Score(found.losses)
        found = make()
    return found, made[0]


def _against(name: str, reference: Reference, score: Score) -> Against:
    assert score.divergence is not None
    nothing = Interval(math.nan, math.nan, math.nan)
    known = all(map(math.isfinite, score.losses))
    change = significance.paired_change(reference.losses, score.losses) if known else None
    return Against(
        name,
        Score(reference.losses).perplexity,
        change.ratio if change else nothing,
        change.p if change else math.nan,
        significance.verdict(change) if change else "worse",
        significance.mean_interval(score.kls) if all(map(math.isfinite, score.kls)) else nothing,
        score.gap,
        score.divergence,
    )


def check_together(tasks: bool, *, rolling: bool, kv: str | None, counts: tuple[int | None, int | None]) -> None:
    """Raise RecipeError for wishes that exclude each other; `counts` are the shots and the limit of tasks."""
    if tasks and (rolling or kv is not None):
        raise RecipeError(225, f"with tasks only tasks are scored: leave out {'rolling' if rolling else 'kv'}.")
    if rolling and kv is not None:
        raise RecipeError(225, "rolling log-likelihoods are not decoded through a cache: leave out kv or rolling.")
    if not tasks and counts != (None, None):
        raise RecipeError(225, "shots and limit are for tasks, and none was named: add --tasks or --suite smoke.")


def mixes_tokens(model: nn.Module) -> bool:
    """Tell whether tokens share the range that inputs are rounded in, so that texts of one batch change each other."""
    gates = filter(None, map(activations.find, model.modules()))
    return any(gate.rounds is not None and gate.rounds.inputs.mixes_tokens for gate in gates)


def wished_tasks(tasks: Sequence[str], suite: str | None, folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the tasks that are to be scored; none if no task was asked for."""
    named = (*tasks, *(zeroshot.SUITES[pick("suite", suite, zeroshot.SUITES)] if suite is not None else ()))
    return tuple(dict.fromkeys(named or zeroshot.everything(folders)))


@dataclass(frozen=True)
class _Opened:
    """A model that is known and checked, and not yet read; `calibration` says what text it was calibrated on."""

    name: str
    config: Any
    tokenizer: Any
    build: Callable[[], nn.Module]
    calibration: dict[str, Any] = field(default_factory=dict)

    def warnings(self, data: dict[str, Any]) -> tuple[str, ...]:
        """Return what to say of the evaluation text `data` if it is the one that was calibrated on."""
        same = overlap.same_text(self.calibration, data)
        said = overlap.Overlap(math.nan, same).warning(str(self.calibration.get("name")), str(data.get("name")))
        return (said,) if same else ()


def _open(model: str | Path | nn.Module | None, device: str, tokenizer: Any, trusted: bool, *, reads: bool) -> _Opened:
    """Find a model and its tokenizer; a quantized checkpoint's only if text is to be read with it."""
    if isinstance(model, nn.Module):
        return _Opened(type(model).__name__, model.config, tokenizer, lambda: model)
    if model is not None and checkpoint.is_quantized(Path(model)):
        folder = Path(model)
        config = checkpoint.read_config(folder, trust_remote_code=trusted)
        if reads:
            tokenizer = tokenizer or loading.read_tokenizer(folder, trust_remote_code=trusted)
        build = functools.partial(_dequantized, folder, device, trusted)
        told = checkpoint.read_record(folder).get("calibration")
        return _Opened(clean(folder.name), config, tokenizer, build, told if isinstance(told, dict) else {})
    source = loading.find(None if model is None else str(model), trust_remote_code=trusted)
    source.skeleton()
    tokenizer = tokenizer or loading.tokenizer(source)
    return _Opened(source.name, source.config, tokenizer, functools.partial(loading.model, source, device))


def _need_tokenizer(opened: _Opened, what: str) -> None:
    if opened.tokenizer is None:
        raise DataError(442, f"{what} need a tokenizer; pass tokenizer=.")
    check.check_tokenizer(opened.tokenizer, opened.config, opened.name)


def _rolling(
    opened: _Opened, data: str | Tensor, seq_len: int, windows: int | None, batch_size: int, reading: Reading
) -> Evaluation:
    if isinstance(data, Tensor):
        raise DataError(442, "words and bytes are counted in text: give a set's name or a file in place of token ids.")
    _need_tokenizer(opened, "documents")
    check_length(opened.config, seq_len)
    zeroshot.check_counts(None, None, batch_size)
    documents, provenance = corpus.load_documents(data, "evaluation", reading)
    if windows is not None:
        documents = rolling.cut(documents, opened.tokenizer, windows * seq_len)
    built = opened.build()
    score = rolling.evaluate(
        built,
        opened.tokenizer,
        documents,
        window=seq_len,
        batch_size=1 if mixes_tokens(built) else batch_size,
    )
    return Evaluation(math.nan, opened.name, provenance, rolling=score, warnings=opened.warnings(provenance))


def decode(model: nn.Module, ids: Tensor, fmt: KVFormat) -> tuple[Score, float]:
    """Score `model` on ids [windows, seq_len] token by token through a cache kept in `fmt`, with its bytes a token.

    Many windows are decoded at once, but one at a time where tokens share the range that their inputs are rounded in.
    """
    parts = torch.split(ids, 1 if mixes_tokens(model) else DECODED)
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


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    packed: bool = True,
    strict: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return the model of a quantized checkpoint, for inference.

    dtype   of all that is not quantized, and of what goes through the layers; default: the checkpoint's
    packed  keep the codes of the layers packed, and compute with them by the operators that this machine has, which
            may round inputs and sums to bfloat16 (`runtime.table`); False: dequantize all of them
    strict  refuse layers that no operator here computes; else a warning names them, and they are dequantized
    device  "cpu" or "cuda"

    Raises ModelError for a damaged or foreign checkpoint, ResourceError for what the machine lacks.
    """
    if not packed:
        loading.check_device(device)
        return checkpoint.read(Path(folder), dtype, trust_remote_code=trust_remote_code).to(device)
    found = runtime.read(Path(folder), dtype, strict=strict, device=device, trust_remote_code=trust_remote_code)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found.model


def generate(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    dtype: torch.dtype | None = None,
    packed: bool = True,
    strict: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Written:
    """Let a quantized checkpoint go on with a text.

    sampling  how tokens are drawn; None: always the most probable one
    For the rest, and what is raised, see `load`; DataError for a prompt without tokens, PlanError for one that leaves
    no room for the new ones.
    """
    folder = Path(folder)
    loading.check_device(device)
    config = checkpoint.read_config(folder, trust_remote_code=trust_remote_code)
    tokenizer = loading.read_tokenizer(folder, trust_remote_code=trust_remote_code)
    check.check_tokenizer(tokenizer, config, folder.name)
    if packed:
        found = runtime.read(folder, dtype, strict=strict, device=device, trust_remote_code=trust_remote_code)
    else:
        read = checkpoint.read(folder, dtype, trust_remote_code=trust_remote_code).to(device)
        found = runtime.Loaded(read, {})
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device=device, dtype=torch.long)
    check.check_ids(ids, tokenizer, config)
    tokens, start, first = [], time.perf_counter(), math.nan
    for token in write(found.model, ids, max_new_tokens, sampling=sampling, ends=ends_of(found.model, tokenizer)):
        tokens.append(token)
        first = first if len(tokens) > 1 else time.perf_counter() - start
    seconds = time.perf_counter() - start
    operators = dict(Counter(name for name, _ in found.operators.values()))
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Written(prompt, text, tuple(tokens), seconds, first, operators, found.notes)
