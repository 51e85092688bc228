"""Zero- and few-shot scores, by lm-eval's own loop over a model that is loaded already."""

from __future__ import annotations

import io
import json
import logging
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantforge import network
from quantforge.errors import DataError, ModelError, ResourceError, nearest
from quantforge.evaluation import tasks as files
from quantforge.evaluation.significance import Accuracy, accuracy
from quantforge.evaluation.tasks import TaskFile
from quantforge.numerics.products import fast_linear
from quantforge.progress import bar

SUITES = {
    "smoke": ("quantforge_pairs", "quantforge_completions", "quantforge_choices"),
    "standard": ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "lambada_openai"),
}
_ACCURACY = "acc"
_LOG_LIKELIHOODS = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task.

    shots    examples before each item
    answers  right or wrong, item by item in the order of the task's file
    summary  the share of right answers with its interval, against chance; open completions have no chance: NaN
    others   the harness's other metrics by name
    items    digest of the items as the model got them, and of their order: answers to equal ones can be paired
    """

    task: str
    shots: int
    answers: tuple[bool, ...]
    summary: Accuracy
    others: Mapping[str, float]
    items: str

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values; null for what is not known."""
        summary = asdict(self.summary)
        share = summary.pop("share")
        values = {"accuracy": share["value"], "low": share["low"], "high": share["high"], **summary, **self.others}
        return {
            "task": self.task,
            "shots": self.shots,
            **{key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()},
            "digest": self.items,
            "answers": "".join("01"[answer] for answer in self.answers),
        }


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    wanted: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    folders: Sequence[Path] = (),
) -> tuple[TaskScore, ...]:
    """Score `model` on tasks of lm-eval; the global state of random numbers is left as it was.

    wanted      names of tasks or groups: of the folders, of our own, or of lm-eval's, which come from the hub
    shots       examples before each item, drawn by `seed`; None: what the task says
    limit       items of each task from its start; None: all
    batch_size  texts of similar length that go through the model at once; 1 for one in which texts of a batch mix
    folders     further folders of task files, which come first

    Raises DataError for an unknown task, with the nearest name, or items that cannot be, with their line; ResourceError
    where the hub is needed and out of reach; ModelError for log-likelihoods that are no numbers.
    """
    check_counts(shots, limit, batch_size)
    local, hub = resolve(wanted, folders)
    _check_hub(hub)
    with untouched_randomness(), quiet():
        from lm_eval import evaluator
        from lm_eval.api.task import ConfigurableTask

        loaded = {task.name: ConfigurableTask(config=files.config(task, shots)) for task in local}
        for name, task in _from_hub(hub).items():
            task.set_config("num_fewshot", shots if shots is not None else task.get_config("num_fewshot") or 0)
            _check_task(name, task)
            loaded.setdefault(name, task)
        for task in loaded.values():
            # simple_evaluate would seed Python, numpy and torch on its way to the same loop; only this seed has a use
            task.set_fewshot_seed(seed)
        harness = make_harness(model, tokenizer, batch_size)
        found = evaluator.evaluate(harness, {"tasks": loaded}, limit=limit, bootstrap_iters=0)
    return tuple(_score(name, found) for name in loaded)


def check(
    wanted: Sequence[str],
    folders: Sequence[Path] = (),
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> None:
    """Raise what `evaluate` would raise, as far as it can be known without a model."""
    check_counts(shots, limit, batch_size)
    local, hub = resolve(wanted, folders)
    for task in local:
        files.config(task, shots)
    _check_hub(hub)


def digest(wanted: Sequence[str], folders: Sequence[Path] = ()) -> str:
    """Return a digest of tasks: of the contents of those that lie in files, of the names of those of the hub."""
    local, hub = resolve(wanted, folders)
    found = sha256(json.dumps(hub).encode())
    for task in local:
        found.update(task.path.read_bytes())
        for file in files.item_files(task):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def check_counts(shots: int | None, limit: int | None, batch_size: int) -> None:
    """Raise DataError for numbers that cannot be counts."""
    for what, value, least in (("shots", shots, 0), ("limit", limit, 1), ("the batch size", batch_size, 1)):
        if value is not None and value < least:
            raise DataError(459, f"{what} must be at least {least}, not {value}.")


def resolve(wanted: Sequence[str], folders: Sequence[Path] = ()) -> tuple[list[TaskFile], list[str]]:
    """Return the task files that names stand for, and the names that are left to lm-eval's own tasks.

    DataError for a name that is none of either, with the nearest one.
    """
    known = [files.read_folder(folder) for folder in (*folders, files.own_folder())]
    local: dict[str, TaskFile] = {}
    hub: list[str] = []
    for name in wanted:
        found = next((tasks for folder in known if (tasks := folder.find(name))), ())
        local |= {task.name: task for task in found if task.name not in local}
        if not found:
            hub.append(name)
    theirs = _harness_names() if hub else {}
    ours = {name for folder in known for name in (*folder.tasks, *folder.groups)}
    for name in hub:
        if name not in theirs:
            near = nearest(name, ours) or nearest(name, theirs)
            raise DataError(458, f"no task is called {name!r}: {near}see --suite and --task-dir.")
    if not wanted:
        raise DataError(458, "no task is named; --suite smoke needs no network.")
    return list(local.values()), list(dict.fromkeys(hub))


def everything(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of all tasks in `folders`."""
    return tuple(dict.fromkeys(name for folder in folders for name in files.read_folder(folder).tasks))


def _harness_names() -> dict[str, Path | None]:
    """Return the names of lm-eval's own tasks and groups; of tasks also the file.

    They are found by their lines: to parse all files, as lm-eval does, takes long.
    """
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, Path | None] = {}
    for path in sorted((Path(spec.origin).parent / "tasks").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for kind, name in re.findall(r"^(task|group|tag): *[\"']?([\w.-]+)[\"']? *$", text, re.MULTILINE):
            found.setdefault(name, path if kind == "task" and not re.search(r"^(group|class):", text, re.M) else None)
    return found


def _check_hub(names: Sequence[str]) -> None:
    if names and not _offline() and not network.reachable():
        raise ResourceError(
            515,
            f"the items of {names[0]!r} come from the hub, which cannot be reached; --suite smoke needs no network, "
            "and HF_HUB_OFFLINE=1 reads items that were loaded before.",
        )


def _offline() -> bool:
    import datasets
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)


def _from_hub(names: Sequence[str]) -> dict[str, Any]:
    """Return lm-eval's own tasks, their items loaded."""
    if not names:
        return {}
    from lm_eval.tasks import TaskManager

    known = _harness_names()
    manager = TaskManager(include_defaults=any(known[name] is None for name in names))
    loaded: dict[str, Any] = {}
    for name in names:
        try:
            loaded |= manager.load([str(known[name] or name)])["tasks"]
        except Exception as error:  # many libraries deep: what they raise is no interface
            what = f"{type(error).__name__}: {error}"
            raise DataError(469, f"the task {name!r} cannot be loaded: {what:.300}") from error
    return loaded


def _check_task(name: str, task: Any) -> None:
    """Refuse a task of the harness that is not scored by log-likelihood, or has too few examples."""
    kind, count = task.get_config("output_type"), task.get_config("num_fewshot")
    if kind not in _LOG_LIKELIHOODS:
        raise DataError(
            459, f"task {name!r} is of the kind {kind!r}; {' and '.join(_LOG_LIKELIHOODS)} are scored here."
        )
    if count:
        # of the split that is scored, the item itself is left out
        pool = len(task.sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
        if count > pool:
            raise DataError(468, f"task {name!r} has {pool} examples to draw from, {count} before each item are asked.")


class _Logits:
    """A model as the harness needs it, which would set modes and tie weights of a module that it is given."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.device = next(model.parameters()).device

    def __call__(self, ids: torch.Tensor) -> Any:
        """Return the model's output for ids [batch, tokens], which has `logits`."""
        with fast_linear():
            return self.model(input_ids=ids, use_cache=False)


def make_harness(model: nn.Module, tokenizer: Any, batch_size: int, max_length: int | None = None) -> Any:
    """Return `model` as lm-eval's own class for transformers models.

    max_length  tokens of its longest window; None: the model's positions
    ModelError if a log-likelihood is no number, DataError for texts that need a first token where there is none.
    """
    from lm_eval.models.huggingface import HFLM

    terminal = sys.stderr
    # the harness gives its tokenizer a padding token, though it pads by itself
    own = deepcopy(tokenizer)
    starts = own.bos_token_id is not None or own.eos_token_id is not None

    class Harness(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            if not starts and any(not request.args[0] for request in requests):
                raise DataError(
                    448, "the tokenizer has no token to begin a text with, which items without context need."
                )
            with self._shown(len(requests)):
                return _numbers(super().loglikelihood(requests, disable_tqdm=True), lambda found: found[0])

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            found = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            self.scored += [(value, len(asked[2])) for asked, (value, _) in zip(requests, found, strict=True)]
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            if not starts:
                raise DataError(448, "the tokenizer has no token to begin a text with, which the first word needs.")
            sizes = [len(self.tok_encode(request.args[0])) for request in requests]
            with self._shown(sum(-(-size // self.max_length) for size in sizes)):
                return _numbers(super().loglikelihood_rolling(requests, disable_tqdm=True), float)

        @contextmanager
        def _shown(self, total: int) -> Iterator[None]:
            self.scored: list[tuple[float, int]] = []  # the log-likelihood and the tokens of each text or window
            with redirect_stderr(terminal), bar("log-likelihoods", total) as step:
                self._step = step
                yield

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            logits = super()._model_call(inps, attn_mask, labels)
            for _ in range(len(inps)):
                self._step("")
            return logits

    return Harness(
        pretrained=_Logits(model),
        tokenizer=own,
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype="float32",
        backend="causal",
        # never used where it would matter: see `starts`
        prefix_token_id=None if starts else 0,
    )


def _numbers(found: Any, value: Callable[[Any], float]) -> Any:
    """Return `found`; ModelError if it holds what is no number, which the harness would take for a right answer."""
    if any(math.isnan(value(one)) for one in found):
        raise ModelError(396, "the model's predictions are no numbers (NaN): it is broken, and has no scores.")
    return found


def _score(name: str, found: Mapping[str, Any]) -> TaskScore:
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    if not samples or _ACCURACY not in samples[0]:
        raise DataError(459, f"task {name!r} has no accuracy, and only tasks with one are compared.")
    answers = tuple(bool(sample[_ACCURACY]) for sample in samples)
    counts = [len(sample["arguments"]) for sample in samples]
    asked = json.dumps([[sample["arguments"], sample["target"]] for sample in samples], default=str)
    others = {
        key.partition(",")[0]: float(value)
        for key, value in found["results"][name].items()
        if "," in key and isinstance(value, int | float) and "_stderr" not in key
    }
    others.pop(_ACCURACY, None)
    return TaskScore(
        name, int(found["n-shot"].get(name) or 0), answers, _summary(answers, counts), others,
        sha256(asked.encode()).hexdigest()[:16],
    )  # fmt: skip


def _summary(answers: tuple[bool, ...], counts: Sequence[int]) -> Accuracy:
    """Return the share of right answers among `counts` choices each; one choice is an open completion."""
    if min(counts) > 1:
        return accuracy(answers, [1 / count for count in counts])
    return replace(accuracy(answers, 0.5), chance=math.nan, p=math.nan)


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Put the global generators back as they were, whatever is done to them within."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's own log and bars from the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
