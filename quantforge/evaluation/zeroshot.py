"""Zero- and few-shot scores, by lm-eval's own loop over a model that is loaded already."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantforge import network
from quantforge.errors import DataError, ResourceError, nearest
from quantforge.evaluation import tasks as files
from quantforge.evaluation.significance import Accuracy, accuracy
from quantforge.evaluation.tasks import TaskFile

SUITES = {
    "smoke": ("quantforge_pairs", "quantforge_completions", "quantforge_choices"),
    "standard": ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "lambada_openai"),
}
_ACCURACY = "acc"


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task.

    answers  right or wrong, item by item in the order of the task's file
    summary  the share of right answers with its interval, against chance
    others   the harness's other metrics by name
    """

    task: str
    shots: int
    answers: tuple[bool, ...]
    summary: Accuracy
    others: Mapping[str, float]


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

    wanted   names of tasks or groups: of the folders, of our own, or of lm-eval's, which come from the hub
    shots    examples before each item, drawn by `seed`; None: what the task says
    limit    items of each task from its start; None: all
    folders  further folders of task files, which come first

    Raises DataError for an unknown task, with the nearest name, or items that cannot be, with their line; ResourceError
    where the hub is needed and out of reach.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    local, hub = resolve(wanted, folders)
    with _quiet(), _untouched_randomness():
        manager = TaskManager(include_defaults=bool(hub))
        _check_hub(hub, manager)
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32", backend="causal"
        )
        found = evaluator.simple_evaluate(
            harness,
            tasks=[_config(task) for task in local] + hub,
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=seed,
        )
    return tuple(_score(name, found) for name in found["samples"])


def resolve(wanted: Sequence[str], folders: Sequence[Path] = ()) -> tuple[list[TaskFile], list[str]]:
    """Return the task files that names stand for, and the names that are left to lm-eval's own tasks."""
    known = [files.read_folder(folder) for folder in (*folders, files.own_folder())]
    local: dict[str, TaskFile] = {}
    hub: list[str] = []
    for name in wanted:
        found = next((tasks for folder in known if (tasks := folder.find(name))), ())
        local |= {task.name: task for task in found}
        if not found:
            hub.append(name)
    return list(local.values()), list(dict.fromkeys(hub))


def _check_hub(names: Sequence[str], manager: Any) -> None:
    for name in names:
        if name not in manager.all_tasks:
            raise DataError(
                458, f"no task is called {name!r}: {nearest(name, manager.all_tasks)}see --suite and --task-dir."
            )
    if names and not network.reachable():
        raise ResourceError(
            513,
            f"the items of {names[0]!r} come from the hub, which cannot be reached; --suite smoke needs no network.",
        )


def _config(task: TaskFile) -> dict[str, Any]:
    """Return a task as lm-eval takes it, its items handed over in memory."""
    split = task.config["test_split"]

    def items(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list([dict(item) for item in task.items])})

    return {**task.config, "task": task.name, "custom_dataset": items}


def _score(name: str, found: Mapping[str, Any]) -> TaskScore:
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    if not samples or _ACCURACY not in samples[0]:
        raise DataError(459, f"task {name!r} has no accuracy, and only tasks with one are compared.")
    answers = tuple(bool(sample[_ACCURACY]) for sample in samples)
    chances = [1 / len(sample["arguments"]) if len(sample["arguments"]) > 1 else 0.0 for sample in samples]
    others = {
        key.partition(",")[0]: float(value)
        for key, value in found["results"][name].items()
        if isinstance(value, int | float) and "_stderr" not in key and not key.startswith(_ACCURACY + ",")
    }
    return TaskScore(name, int(found["n-shot"].get(name, 0)), answers, accuracy(answers, chances), others)


@contextmanager
def _untouched_randomness() -> Iterator[None]:
    """Put the global generators back as they were, whatever is done to them within."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's own log from the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
