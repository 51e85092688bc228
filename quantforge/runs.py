"""What a run is made from, by names that a message can show, and the journal that its work is kept in on the way."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantforge import __version__
from quantforge.digests import tensor_digest
from quantforge.evaluation.reference import digest
from quantforge.journal import Journal
from quantforge.models import beside
from quantforge.models.load import Source, fingerprint
from quantforge.plan import Plan


def made_of(
    model: Source | nn.Module,
    plan: Plan,
    ids: Tensor | None,
    calibration: Mapping[str, Any],
    tokenizer: Any,
    device: str,
) -> dict[str, str]:
    """Return all that the bytes of a checkpoint depend on; contents as SHA-256.

    model      a source, of whose files the digest is taken, or a model in memory
    tokenizer  what was given beside it; None: a source's own
    """
    if isinstance(model, Source):
        weights, config = model.digest(), model.config
    else:
        state = model.state_dict().items()
        weights = sha256("".join(f"{k}{tensor_digest(v)}" for k, v in state).encode()).hexdigest()
        config = model.config
    others = _others(model) if isinstance(model, Source) else ""
    if tokenizer is not None:
        others = sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    return {
        "model": weights,
        "config": _digest(config),
        "tokenizer": others,
        "method": plan.recipe.name,
        "recipe": sha256(repr(plan.recipe).encode()).hexdigest(),
        "format": plan.container,
        "dtype": str(plan.dtype).removeprefix("torch."),
        **{f"calibration {key}": str(value) for key, value in calibration.items()},
        "token ids": "" if ids is None else digest(ids),
        "device": device,
        "quantforge": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _digest(config: Any) -> str:
    """Return the digest of what a config says, wherever it was read from."""
    told = json.loads(config.to_json_string(use_diff=False))
    told.pop("_name_or_path", None)
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _others(source: Source) -> str:
    """Return the digest of the files of a model folder that are no weights and end up in the checkpoint."""
    if source.gguf:
        return ""  # it is in the file itself
    return fingerprint(source.path / name for name in beside.names(source.path))


@contextlib.contextmanager
def opened(out: Path | None, facts: Mapping[str, str], *, restart: bool = False) -> Iterator[Journal | None]:
    """Yield the journal of the run that writes `out`, None without one; torch computes with the journal's threads.

    facts    what the run is made from
    restart  throw away what an earlier run has left
    """
    if out is None:
        yield None
        return
    with Journal.open(out, facts, restart=restart) as journal:
        threads = torch.get_num_threads()
        if journal.commits and journal.threads != threads:
            told = f"going on with {journal.threads} threads, as this run began, and not {threads}"
            sys.stderr.write(f"quantforge: {told}.\n")
            torch.set_num_threads(journal.threads)
        try:
            yield journal
        finally:
            torch.set_num_threads(threads)
